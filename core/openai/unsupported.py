"""Fields of other servers and of OpenAI that would change the answer and have no effect here: they are refused.

A field without effect on the answer (`user`, `store`, `service_tier`, `parallel_tool_calls` where there are no tools)
is accepted, and so is one with the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from core.errors import InvalidRequest

INSTEAD: Mapping[str, str] = {
    "repetition_penalty": "use 'repeat_penalty'",
    "max_new_tokens": "use 'max_tokens'",
    "max_output_tokens": "use 'max_tokens'",
    "n_predict": "use 'max_tokens'",
    "system": "send a message with role 'system'",
    "json_schema": "use 'response_format'",
    "guided_json": "use 'response_format'",
    "structured_outputs": "use 'response_format'",
}


class UnsupportedFields(Struct, kw_only=True):
    """The default of each is the value that changes nothing; null is another."""

    # The prompt's form
    chat_template: Any = None
    chat_template_kwargs: Any = {}
    add_generation_prompt: Any = True
    continue_final_message: Any = False
    documents: Any = []
    system: Any = None

    # Reasoning and style
    reasoning_effort: Any = None
    reasoning: Any = None
    enable_thinking: Any = None
    thinking: Any = None
    verbosity: Any = "medium"
    web_search_options: Any = None

    # The form of the answer
    grammar: Any = ""
    json_schema: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None

    # Where it ends
    max_new_tokens: Any = None
    max_output_tokens: Any = None
    n_predict: Any = None
    min_tokens: Any = 0
    ignore_eos: Any = False
    stop_token_ids: Any = []

    # How tokens are drawn
    repetition_penalty: Any = 1
    typical_p: Any = 1
    mirostat: Any = 0
    dry_multiplier: Any = 0
    xtc_probability: Any = 0
    dynatemp_range: Any = 0
    best_of: Any = 1
    use_beam_search: Any = False
    allowed_token_ids: Any = None
    bad_words: Any = []


def check(fields: UnsupportedFields) -> None:
    """Raise InvalidRequest that names the first field with a value that would change the answer."""
    names, defaults = UnsupportedFields.__struct_fields__, UnsupportedFields()
    for name in names:
        value = getattr(fields, name)
        if value is not None and value != getattr(defaults, name):
            instead = INSTEAD.get(name, "leave it out")
            raise InvalidRequest(
                f"'{name}' is not supported, and without it the answer would be another; {instead}.", param=name
            )

"""Turn a client's plain text into tokens. None of them is a control token, whatever names the text contains."""

from __future__ import annotations

from itertools import pairwise

from core.engine.interface import Engine, ModelCard
from core.errors import InvalidRequest

LONGEST_TOKEN = 128  # characters in the longest token of the vocabularies that we know (Llama 3: 128 spaces)


def tokenize(engine: Engine, text: str, *, param: str, continued: bool = False) -> list[int]:
    """Return the tokens of `text`, without BOS. Call it in a worker thread.

    Names of control tokens, and of user-defined tokens that are markup, are cut after their first character, and the
    parts are tokenized separately. `continued` is that of `Engine.tokenize`. Raises InvalidRequest for `param` if the
    text is longer than the context.
    """
    check_length(engine.card, len(text), param)
    cuts = [start + 1 for start in engine.control_names(text)]
    if len(cuts) * 2 > engine.card.n_ctx:  # a name that is cut has at least two tokens; tokenizing them takes seconds
        raise InvalidRequest(
            f"'{param}' contains names of control tokens {len(cuts)} times, but the context holds "
            f"{engine.card.n_ctx} tokens. {engine.card.remedy}",
            param=param,
            code="context_length_exceeded",
        )
    tokens: list[int] = []
    for start, end in pairwise((0, *cuts, len(text))):
        tokens += engine.tokenize(text[start:end], special=False, continued=continued or start > 0)
    return tokens


def bos(engine: Engine) -> list[int]:
    """Return the token that the vocabulary puts in front of every text, if it has one."""
    card = engine.card
    adds_bos = card.bos and card.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    return engine.tokenize(card.bos, special=True) if adds_bos else []


def check_length(card: ModelCard, characters: int, param: str) -> None:
    """Raise InvalidRequest if a text has more characters than the context has room for, before it is tokenized."""
    if characters > card.n_ctx * LONGEST_TOKEN:
        raise InvalidRequest(
            f"'{param}' has {characters} characters, but the context holds {card.n_ctx} tokens, which is at most "
            f"{card.n_ctx * LONGEST_TOKEN} characters. {card.remedy}",
            param=param,
            code="context_length_exceeded",
        )

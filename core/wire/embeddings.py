"""OpenAI's embeddings: the request, and the list of vectors. `user` and unlisted fields have no effect."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from core.errors import InvalidRequest
from core.wire.fields import Unsupported, check_unsupported

MOST_INPUTS = 2048  # OpenAI's limit

TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Tokens = list[TokenId]
Text = str | Tokens  # one text, as such or as tokens of the embedding model's own vocabulary


class UnsupportedFields(Unsupported, kw_only=True):
    """The unsupported fields of other servers' embeddings."""

    truncate: Any = False
    truncate_prompt_tokens: Any = None
    add_special_tokens: Any = True
    normalize: Any = True
    embd_normalize: Any = 2
    late_chunking: Any = False
    task: Any = None
    input_type: Any = None
    prompt_name: Any = None
    instruction: Any = None


class EmbeddingRequest(UnsupportedFields, kw_only=True):
    """`input` is one text or an array of them. A text is a string or an array of token ids."""

    input: str | list[str | TokenId | Tokens]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        check_unsupported(self)
        self.texts()

    def texts(self) -> list[Text]:
        """Return the texts. Raises InvalidRequest if there is none, there are too many, or one is empty."""
        if isinstance(self.input, str):
            return [_checked(self.input, "input")]
        if not self.input:
            raise InvalidRequest("'input' is an empty array; send at least one text.", param="input")
        if all(isinstance(text, int) for text in self.input):
            return [self.input]  # type: ignore[list-item]
        if len(self.input) > MOST_INPUTS:
            raise InvalidRequest(
                f"'input' may have at most {MOST_INPUTS} texts, got {len(self.input)}. Send several requests.",
                param="input",
            )
        kinds = {type(text) for text in self.input}
        if len(kinds) > 1:
            raise InvalidRequest(
                "'input' must be all strings, all token ids or all arrays of token ids, got a mixture.", param="input"
            )
        return [_checked(text, f"input[{place}]") for place, text in enumerate(self.input)]  # type: ignore[arg-type]


def _checked(text: Text, field: str) -> Text:
    if not text:
        raise InvalidRequest(f"'{field}' is empty; an empty text has no embedding.", param=field)
    return text


class Embedding(Struct):
    """`embedding` is an array of numbers, or base64 of 32-bit floats, lowest byte first."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct):
    """`prompt_tokens` includes the special tokens that the model expects around each text."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"

"""A row rendered as text, with the spans that the loss is on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered sequence."""

    text: str
    spans: tuple[Span, ...]
    """Character ranges [begin, end) that contribute to the loss, in order."""
    ends_the_text: bool = False
    """True if the tokenizer adds its own BOS and EOS tokens, as for text without a chat template."""

"""A row rendered as text, with the spans that the loss is on."""

from dataclasses import dataclass, field

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered sequence."""

    text: str
    spans: tuple[Span, ...]
    """Character ranges [begin, end) that contribute to the loss, in order."""
    ends_the_text: bool = False
    """True if the tokenizer adds its own BOS and EOS tokens, as for text without a chat template."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Parts that were changed or excluded to render the row, as counted in the plan."""

    @property
    def size(self) -> int:
        """Return the number of characters."""
        return len(self.text)

    @property
    def content(self) -> bytes:
        """Return what rows are compared by."""
        return self.text.encode()

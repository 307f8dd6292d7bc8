"""Rows as the formats read them, before they are rendered."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Message = dict[str, Any]

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of the reasoning of an answer, in rows and in chat templates."""


Task = Literal["instruction_tuning", "causal_lm", "preference_tuning", "classification"]
Turns = Literal["auto", "last", "all"]
"""Turns of a chat that are trained, and their contexts; see the key `turns`."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with an assistant message."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    untrained: tuple[int, ...] = ()
    """Indices of assistant messages that `weight: 0` excludes from the loss."""
    label: int | None = None
    """For classification: index of the label in the last message."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template for this row (`chat_template_kwargs`)."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Parts of the row that are changed or not used, as the plan counts them."""
    numbers: tuple[int, ...] = field(default=(), compare=False)
    """Number of each message in the row as written, from 1; 0 for a system column. Empty: counted from 1."""

    def name_of(self, index: int) -> str:
        """Return how errors name a message: by its number in the row as written."""
        number = self.numbers[index] if self.numbers else index + 1
        return f"message {number} ({self.messages[index]['role']})" if number else "the system column"


@dataclass(frozen=True, slots=True)
class Text:
    """A text to train on without a chat template."""

    text: str
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Filled:
    """A row formatted with `prompt_template`."""

    prompt: str
    answer: str
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a chosen and a rejected response, or with one of them."""

    prompt: list[Message]
    chosen: list[Message]
    """Empty in an unpaired row whose response is not desirable."""
    rejected: list[Message]
    """Empty in an unpaired row whose response is desirable."""
    tools: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template for this row (`chat_template_kwargs`)."""
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A sequence that is tokenized already, and trained as it stands."""

    ids: np.ndarray
    """int32 [tokens]"""
    trained: np.ndarray
    """bool [tokens]: True for loss tokens."""
    is_marked: bool
    """True if the row says which tokens are in the loss."""
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def size(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)

    @property
    def content(self) -> bytes:
        """Return what rows are compared by."""
        return self.ids.tobytes()


Example = Chat | Text | Filled | Pair | Tokens

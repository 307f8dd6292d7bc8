"""The tally of rows: how many were read, retained and rejected, and the first messages about them."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from training.data.chunks import ChunkResult
from training.data.errors import DataError
from training.data.request import DataRequest
from training.data.template_checks import DROPPED_TEXT

_MAX_SHOWN = 5
_TEMPLATE_KINDS = {"template", DROPPED_TEXT}
_RENDERING_KINDS = {*_TEMPLATE_KINDS, "reasoning", "rendered already", "several contexts"}
"""Faults of rows whose format was read."""
_VARIES = re.compile(r"'[^']*'|\d+")

Place = tuple[int, int]
"""(index in `DataRequest.files`, row)."""


@dataclass
class Tally:
    """What became of rows. Its size depends on the kinds of faults and lengths, not on the number of rows."""

    read: int = 0
    taken: int = 0
    """Rows that can be trained on, before the token limit."""
    rows: int = 0
    """Rows within the token limit."""
    truncated: int = 0
    lost: int = 0
    """Tokens removed by truncation or in dropped rows."""
    dropped: int = 0
    split_rows: int = 0
    split_sequences: int = 0
    too_long_rows: int = 0
    lines: int = 0
    """Lines of a range of a JSONL file, whose rows are numbered from its start; 0 for other rows."""
    has_chats: bool = False
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens per row, before the limit -> number of rows."""
    notes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    """Fault -> number of rejected rows."""
    alike: Counter[str] = field(default_factory=Counter)
    """Message of a fault without its quoted texts and numbers -> number of rejected rows."""
    shown: dict[str, tuple[Place, str]] = field(default_factory=dict)
    """The first of these messages -> their first occurrence."""
    too_long: list[tuple[Place, int]] = field(default_factory=list)
    """The first rows that exceed the limit with `long_rows: error`, and their tokens."""

    def add(self, result: ChunkResult) -> None:
        """Add the rows of the next chunk."""
        self.read += result.read
        self.taken += result.taken
        self.split_rows += result.split_rows
        self.split_sequences += result.split_sequences
        self.has_chats |= result.has_chats
        self.notes.update(result.notes)
        for row, kind, message in result.faults:
            same = _VARIES.sub("", message)
            self.kinds[kind] += 1
            self.alike[same] += 1
            self._show(same, (result.file, row), message)
        if rows := result.tokenized:
            self.rows += rows.data.num_rows
            self.truncated += rows.truncated
            self.lost += rows.lost
            self.dropped += len(rows.left_out)
            self.lengths.update(rows.lengths.tolist())
            self.too_long_rows += len(rows.too_long)
            places = [((file, row), tokens) for file, row, tokens in rows.too_long]
            self.too_long = [*self.too_long, *places][:_MAX_SHOWN]

    def merge(self, following: "Tally", lines_before: int) -> None:
        """Add the rows of another tally, which follow those of this one.

        Args:
            following: The other tally.
            lines_before: Number to add to its row numbers.
        """
        for name in (
            *("read", "taken", "rows", "truncated", "lost", "dropped", "too_long_rows"),
            *("split_rows", "split_sequences"),
        ):
            setattr(self, name, getattr(self, name) + getattr(following, name))
        self.has_chats |= following.has_chats
        for name in ("lengths", "notes", "kinds", "alike"):
            getattr(self, name).update(getattr(following, name))
        for same, ((file, row), message) in following.shown.items():
            self._show(same, (file, row + lines_before), message)
        places = [((file, row + lines_before), tokens) for (file, row), tokens in following.too_long]
        self.too_long = [*self.too_long, *places][:_MAX_SHOWN]

    def _show(self, same: str, place: Place, message: str) -> None:
        if len(self.shown) < _MAX_SHOWN:
            self.shown.setdefault(same, (place, message))

    def first_faults(self, request: DataRequest) -> list[str]:
        """Return the first messages, each with its file and row and the number of rows that have the same."""
        return [
            f"{request.files[file].uri}:{row}: {message}"
            + (f" (and {self.alike[same] - 1:,} more rows)" if self.alike[same] > 1 else "")
            for same, ((file, row), message) in self.shown.items()
        ]

    def reject_faults(self, request: DataRequest, template: str) -> None:
        """Raise an error for rows that stop the run.

        Args:
            request: The request for the rows.
            template: Where the chat template comes from.
        """
        count = self.kinds.total()
        if not count or (request.bad_rows == "skip" and self.rows):
            return
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in self.kinds.most_common())
        unseen = count - sum(self.alike[same] for same in self.shown)
        lines = [
            f"{count:,} of {self.read:,} rows cannot be trained on ({kinds}):",
            *self.first_faults(request),
        ]
        if unseen:
            lines.append(f"… and {unseen:,} more rows")
        if self.kinds.keys() & _TEMPLATE_KINDS:
            lines.append(f"The chat template is {template}.")
        if self.kinds.keys() <= _RENDERING_KINDS:
            every = "No row can be rendered as it is: do what these errors say, or set chat_template."
        else:
            every = (
                "No row fits the YAML: check task, data_format, columns and prompt_template, or fix the rows."
            )
        some = "Fix or remove these rows, or skip them with bad_rows: skip."
        lines.append(some if count < self.read else every)
        raise DataError("\n".join(lines))

    def reject_long_rows(self, request: DataRequest) -> None:
        """Raise an error for rows that exceed the limit with `long_rows: error`, or if no rows are left."""
        sources = ", ".join(request.paths)
        if self.too_long:
            more = self.too_long_rows - len(self.too_long)
            shown = "\n".join(
                f"{request.files[file].uri}:{row}: {tokens} tokens" for (file, row), tokens in self.too_long
            ) + (f"\n… and {more:,} more rows" if more else "")
            raise DataError(
                f"{sources}: {self.too_long_rows:,} rows exceed the limit of {request.limit} tokens (long_rows: error):\n{shown}\n"
                "Increase context_length, shorten these rows, or set long_rows to truncate or drop."
            )
        if self.rows == 0 and not self.dropped:
            raise DataError(
                f"{sources}: no row is in this part of the split: with few rows, a share can be empty. Increase valid_split, or set valid_path."
            )
        if self.rows == 0:
            advice = (
                "Increase context_length."
                if request.context_length
                else "This is the model's maximum context, so shorten the rows."
            )
            raise DataError(
                f"{sources}: no row has a loss token within {request.limit} tokens ({self.dropped:,} rows dropped). {advice}"
            )


def reject_empty_shares(request: DataRequest, rows: Sequence[int]) -> None:
    """Raise an error for a source with a weight and without rows.

    Args:
        request: The request for the rows.
        rows: Rows of each source within the token limit.
    """
    for path, count in zip(request.paths, rows, strict=True):
        if request.weights and not count:
            raise DataError(
                f"{path}: no rows are left after filtering, so the source cannot fill its weight's share of an epoch. Fix it, or "
                "remove it from train_path."
            )

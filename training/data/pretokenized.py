"""Pretokenised rows: `input_ids` with labels or masks, under the names of TRL, Axolotl and transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.data.errors import RowError, json_type
from training.data.records import Tokens
from training.data.row_index import IGNORED
from training.data.tools import parse_printed

LOSS_COLUMNS = ("labels", "assistant_masks", "completion_mask", "loss_mask")
"""Columns that say which tokens are in the loss. A token is, if all that a row has say so."""
OTHER_COLUMNS = ("attention_mask", "position_ids", "seq_lengths")
_MASKS = LOSS_COLUMNS[1:]
_LARGEST = 2**31 - 1
_PACKED = "packs several rows into one. Write each row on its own, and set packing: true, which computes every row as if it were alone"


def has_loss_column(row: Mapping[str, Any]) -> bool:
    """Return whether a row says which of its tokens are in the loss."""
    return any(row.get(name) is not None for name in LOSS_COLUMNS)


def read_tokens(row: dict[str, Any], columns: Mapping[str, str]) -> Tokens:
    """Validate a pretokenised row, and remove the padding that its attention mask marks.

    Args:
        row: The row.
        columns: Not used: these columns have the same names in all tools.

    Raises:
        RowError: The row cannot be trained on; the message names the column and the position.
    """
    del columns
    if row.get("input_ids") is None:
        found = ", ".join(map(str, list(row)[:6])) or "nothing"
        raise RowError("wrong columns", f"has no `input_ids` (found: {found})")
    values = _integers(row["input_ids"], "input_ids")
    wrong = next((place for place, token in enumerate(values) if not 0 <= token <= _LARGEST), None)
    if wrong is not None:
        raise RowError("unknown token", f"`input_ids`: entry {wrong + 1} is {values[wrong]}, not a token id")
    ids = np.array(values, np.int32)
    _check_not_packed(row, len(ids))
    trained = np.ones(len(ids), bool)
    if row.get("labels") is not None:
        trained &= _labelled(_integers(row["labels"], "labels", len(ids)), ids)
    for name in _MASKS:
        if row.get(name) is not None:
            trained &= _mask(row[name], name, len(ids))
    is_marked = has_loss_column(row)
    if row.get("attention_mask") is None:
        return Tokens(ids, trained, is_marked)
    real = _unpadded(_mask(row["attention_mask"], "attention_mask", len(ids)))
    if real == slice(0, len(ids)):
        return Tokens(ids, trained, is_marked)
    return Tokens(ids[real], trained[real], is_marked, ("padding (`attention_mask` 0) is removed",))


def check_loss(tokens: Tokens, *, whole_text: bool) -> None:
    """Check that a row has loss tokens, and that they are those of the task.

    Args:
        tokens: The row.
        whole_text: True if the task trains on every token.

    Raises:
        RowError: The row has no loss token, or says nothing or something else about them.
    """
    if whole_text and not tokens.trained.all():
        raise RowError(
            "wrong labels",
            f"has {int((~tokens.trained).sum()):,} of {len(tokens.ids):,} tokens out of the loss ({' or '.join(f'`{n}`' for n in LOSS_COLUMNS[:3])}), "
            "but task: causal_lm trains on every token. Use task: instruction_tuning",
        )
    if not whole_text and not tokens.is_marked:
        raise RowError(
            "no labels",
            "has `input_ids`, but nothing that says which of them are in the loss. Add `labels` (-100 excludes a token), `assistant_masks` or "
            "`completion_mask`, or use task: causal_lm, which trains on every token",
        )
    if not tokens.trained[1:].any():
        raise RowError(
            "nothing trained",
            "has no token in the loss (`labels` and masks exclude all of them; the first token is never predicted)",
        )


def _integers(value: Any, name: str, count: int | None = None) -> list[int]:
    """Return a column's list of integers, which CSV files have as JSON text."""
    if isinstance(value, str):
        value = parse_printed(value, f"`{name}`")
    if not isinstance(value, list | tuple):
        raise RowError("wrong type", f"`{name}` is {json_type(value)}, not a list of numbers")
    kinds = set(map(type, value))
    if not kinds <= {int, bool} or len(kinds) > 1:
        place = next(place for place, entry in enumerate(value) if type(entry) is not int)
        advice = ". Write one row for each of its lists" if isinstance(value[place], list) else ""
        raise RowError(
            "wrong type", f"`{name}`: entry {place + 1} is {_shown(value[place])}, not an integer{advice}"
        )
    if not value:
        raise RowError("empty content", f"`{name}` is an empty list")
    if count is not None and len(value) != count:
        raise RowError(
            "wrong length",
            f"`{name}` has {len(value):,} entries, but `input_ids` has {count:,}. Write one entry for each token",
        )
    return list(value)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, float | bool) else json_type(value)


def _labelled(labels: Sequence[int], ids: np.ndarray) -> np.ndarray:
    """Return which tokens labels put into the loss, bool [tokens]."""
    trained = np.array([label != IGNORED for label in labels], bool)
    wrong = next(
        (
            place
            for place, (label, token) in enumerate(zip(labels, ids.tolist(), strict=True))
            if label not in (IGNORED, token)
        ),
        None,
    )
    if wrong is None:
        return trained
    following = [*ids[1:].tolist(), IGNORED]
    is_shifted = all(label in (IGNORED, token) for label, token in zip(labels, following, strict=True))
    raise RowError(
        "wrong labels",
        f"`labels`: entry {wrong + 1} is {labels[wrong]}, but `input_ids` has {ids[wrong]} there. A label is the id of its own token, or "
        f"{IGNORED} to exclude it from the loss"
        + ("; these labels are shifted by one, which the loss does itself" if is_shifted else ""),
    )


def _mask(value: Any, name: str, count: int) -> np.ndarray:
    """Return a mask of 0 and 1 as bool [tokens]."""
    flags = _integers(value, name, count)
    wrong = next((place for place, flag in enumerate(flags) if flag not in (0, 1)), None)
    if wrong is not None:
        raise RowError("wrong mask", f"`{name}`: entry {wrong + 1} is {flags[wrong]}. Use 0 or 1")
    return np.array(flags, bool)


def _unpadded(mask: np.ndarray) -> slice:
    """Return the span of the tokens that are no padding; padding may stand before and after them only."""
    places = np.flatnonzero(mask)
    if not len(places):
        raise RowError("empty content", "`attention_mask` is 0 for all tokens")
    begin, end = int(places[0]), int(places[-1]) + 1
    if end - begin != len(places):
        hole = begin + int(np.argmin(mask[begin:end]))
        raise RowError(
            "wrong mask",
            f"`attention_mask`: entry {hole + 1} is 0 between tokens that are attended to. Only padding at the start or the end can be "
            "excluded; to exclude a token from the loss, use `labels`",
        )
    return slice(begin, end)


def _check_not_packed(row: Mapping[str, Any], count: int) -> None:
    """Reject rows that hold several packed rows: each must be computed on its own."""
    positions = row.get("position_ids")
    if positions is not None and _integers(positions, "position_ids", count) != list(range(count)):
        raise RowError("packed already", f"`position_ids` are not 0 to {count - 1:,}, so the row {_PACKED}")
    lengths = row.get("seq_lengths")
    if lengths is not None and _integers(lengths, "seq_lengths") != [count]:
        raise RowError("packed already", f"`seq_lengths` is not [{count:,}], so the row {_PACKED}")

"""Classification labels as loss tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.data.errors import DataError
from training.data.row_index import IGNORED


def label_tokens(sources: Sequence[Any], names: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each label that occurs, and reject labels whose tokens are a prefix of another's.

    Args:
        sources: Prepared rows (datasets.Dataset) of training and validation.
        names: Labels from `classifier_config.label_tokens`; the `label` of a row is an index into it.
    """
    tokens: dict[int, list[int]] = {}
    for rows in sources:
        labels, first_rows = np.unique(rows.with_format("numpy")["label"], return_index=True)
        for label, row in zip(labels.tolist(), first_rows.tolist(), strict=True):
            trained = [token for token in rows[row]["labels"] if token != IGNORED]
            tokens.setdefault(label, trained)
    for label, its_tokens in tokens.items():
        for other, other_tokens in tokens.items():
            if label != other and other_tokens[: len(its_tokens)] == its_tokens:
                raise DataError(
                    f"classifier_config.label_tokens: {names[other]!r} starts with the tokens of {names[label]!r}, so the two "
                    "are ambiguous. Rename the labels so that none is a prefix of another."
                )
    return [tokens[label] for label in sorted(tokens)]

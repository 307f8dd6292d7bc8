"""The labels of a classification, as the tokens that are trained."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.data.sources import DataError
from training.data.token_files import IGNORED


def label_tokens(sources: Sequence[Any], names: Sequence[str]) -> list[list[int]]:
    """The tokens of each label that occurs.

    Args:
        sources: Prepared rows (datasets.Dataset) of training and validation.
        names: What `classifier_config.label_tokens` calls the labels; `label` of a row is a position in it.

    Raises:
        DataError: one label's tokens are the beginning of another's: after them nobody knows which it is.
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
                    f"classifier_config.label_tokens: {names[other]!r} begins with the tokens of {names[label]!r}, so the one cannot "
                    "be told from the other. Give the labels names of which none begins another."
                )
    return [tokens[label] for label in sorted(tokens)]

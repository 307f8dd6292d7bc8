"""The made-up rows of the cookbooks: none twice, and none both trained and validated on."""

import pytest

from cookbooks.causal_lm import prepare as causal_lm
from cookbooks.classification import prepare as classification
from cookbooks.preference_tuning import prepare as preference_tuning
from cookbooks.quickstart import prepare as quickstart
from cookbooks.quickstart.word_problems import TRAIN_KINDS, VALID_KINDS, write_problems


@pytest.mark.parametrize(
    "rows",
    [
        write_problems(TRAIN_KINDS, quickstart.TRAIN_ROWS, 1)
        + write_problems(VALID_KINDS, quickstart.VALID_ROWS, 2),
        causal_lm.write_texts(TRAIN_KINDS, causal_lm.TRAIN_ROWS, 1)
        + causal_lm.write_texts(VALID_KINDS, causal_lm.VALID_ROWS, 2),
        classification.write_topics(classification.TRAIN_ROWS + classification.VALID_ROWS, 1),
        preference_tuning.write_pairs(TRAIN_KINDS, preference_tuning.TRAIN_ROWS, 1)
        + preference_tuning.write_pairs(VALID_KINDS, preference_tuning.VALID_ROWS, 2),
    ],
    ids=["quickstart", "causal_lm", "classification", "preference_tuning"],
)
def test_no_row_repeats(rows: str):
    lines = rows.splitlines()
    assert len(set(lines)) == len(lines)

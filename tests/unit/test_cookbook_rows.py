"""The generated rows of a cookbook are unique across its training and validation data."""

import pytest

from cookbooks.bring_your_own_data import prepare as bring_your_own_data
from cookbooks.causal_lm import prepare as causal_lm
from cookbooks.classification import prepare as classification
from cookbooks.function_calling import prepare as function_calling
from cookbooks.long_context import prepare as long_context
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
        function_calling.write_calls(function_calling.TRAIN_CITIES, function_calling.TRAIN_ROWS, 1)
        + function_calling.write_calls(function_calling.VALID_CITIES, function_calling.VALID_ROWS, 2),
        long_context.write_notes(long_context.TRAIN_ROWS, 1)
        + long_context.write_notes(long_context.VALID_ROWS, 2),
        bring_your_own_data.write_chats(TRAIN_KINDS, bring_your_own_data.TABLE_ROWS, 1)
        + bring_your_own_data.write_chats(TRAIN_KINDS, bring_your_own_data.CHAT_ROWS, 3)
        + bring_your_own_data.write_chats(VALID_KINDS, bring_your_own_data.VALID_ROWS, 2),
    ],
    ids=[
        "quickstart",
        "causal_lm",
        "classification",
        "preference_tuning",
        "function_calling",
        "long_context",
        "bring_your_own_data",
    ],
)
def test_generated_rows_are_unique(rows: str):
    lines = rows.splitlines()
    assert len(set(lines)) == len(lines)

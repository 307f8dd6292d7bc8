"""OpenAI's preference rows: input, preferred_output and non_preferred_output."""

from typing import Any

import pytest

from training.data.errors import RowError
from training.data.records import Pair
from training.data.rows import RowSchema, read_row, recognise

USER = {"role": "user", "content": "2 + 2?"}
ROW: dict[str, Any] = {
    "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [{"role": "assistant", "content": "4"}],
    "non_preferred_output": [{"role": "assistant", "content": "5"}],
}


def read(row: dict[str, Any]) -> Pair:
    assert recognise(row, {}, "preference_tuning") == "preference"
    example = read_row(row, RowSchema("preference_tuning", "preference", {}, None, ()))
    assert isinstance(example, Pair)
    return example


def test_openai_preference_row_is_a_pair():
    pair = read(ROW)
    assert [message["content"] for message in pair.prompt] == ["2 + 2?"]
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("4", "5")
    assert pair.notes == ("column `input.parallel_tool_calls` is not used",)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"input": {"messages": []}}, "`input.messages`"),
        ({"preferred_output": [{"role": "user", "content": "4"}]}, "`preferred_output`"),
        ({"non_preferred_output": "5", "preferred_output": "5"}, "identical"),
    ],
)
def test_wrong_openai_preference_row_names_the_column(changes: dict[str, Any], named: str):
    with pytest.raises(RowError, match=named):
        read(ROW | changes)

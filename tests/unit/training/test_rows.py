import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.rows import Conversation, DataError, is_hub_dataset, parse_hub_uri, read_conversations

USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"messages": [USER, ASSISTANT]}


def read(path: Path, *, columns: dict[str, str] | None = None, whole_text: bool = False):
    return list(read_conversations(path, f"data/{path.name}", columns=columns or {}, whole_text=whole_text))


def jsonl(directory: Path, *rows: Any) -> Path:
    path = directory / "rows.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_a_chat_keeps_its_turns_and_its_line_number(tmp_path: Path):
    path = jsonl(
        tmp_path,
        {"messages": [SYSTEM, USER, ASSISTANT]},
        b"",
        GOOD | {"id": 7},
        {"messages": [USER, ASSISTANT] * 3},
    )
    conversations = read(path)
    assert [conversation.row for conversation in conversations] == [1, 3, 4]
    assert conversations[0].messages == (SYSTEM, USER, ASSISTANT)
    assert conversations[2].messages == (USER, ASSISTANT) * 3


def test_prompt_and_completion_are_a_chat_of_two_turns(tmp_path: Path):
    (conversation,) = read(jsonl(tmp_path, {"prompt": "2 + 2?", "completion": "4"}))
    assert conversation.messages == (USER, ASSISTANT)


def test_columns_may_be_called_otherwise(tmp_path: Path):
    path = jsonl(tmp_path, {"question": "2 + 2?", "answer": "4"})
    (conversation,) = read(path, columns={"prompt": "question", "completion": "answer"})
    assert conversation.messages == (USER, ASSISTANT)
    with pytest.raises(DataError, match=r"found: question, answer.*columns: \{prompt: question\}"):
        read(path)


def test_plain_text_is_for_causal_lm_only(tmp_path: Path):
    path = jsonl(tmp_path, {"text": "Once upon a time"})
    assert read(path, whole_text=True) == [Conversation(1, text="Once upon a time")]
    with pytest.raises(DataError, match="has no `messages`, or `prompt` and `completion`"):
        read(path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode())
    assert len(read(path)) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{bad", "is not JSON"),
        (b'{"messages": [', "is not JSON"),
        (b'"text"', "is text. One JSON object"),
        (b"[1]", "is a list. One JSON object"),
        (b'{"prompt": "\xff"}', r"is not UTF-8 \(byte 13\)"),
        (b"[" * 100_000, "nested too deeply"),
        ({}, "found: nothing"),
        ({"prompt": "2 + 2?"}, "has no `messages`"),
        ({"messages": "hello"}, "`messages` is text, not a list"),
        ({"messages": []}, "`messages` is an empty list"),
        ({"messages": ["hello"]}, "message 1 is no object with role and content"),
        (
            {"messages": [USER, {"role": "bot", "content": "4"}]},
            "message 2 has the role 'bot'. Known: system",
        ),
        ({"messages": [{"content": "4"}]}, "message 1 has the role None"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, r"message 2 \(assistant\) is empty"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            r"message 2 \(assistant\) is null, not text",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [1]}]},
            r"message 2 \(assistant\) is a list, not text",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "a\x00"}]}, "holds a NUL character"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "message 2: a system message stands first or nowhere"),
        ({"messages": [ASSISTANT, USER]}, "message 1: an assistant message answers a user message"),
        ({"messages": [SYSTEM, ASSISTANT]}, "message 2: an assistant message answers a user message"),
        ({"messages": [USER, USER, ASSISTANT]}, "messages 1 and 2 are both from the user: roles take turns"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "messages 2 and 3 are both from the assistant"),
        ({"messages": [USER]}, "has no assistant turn: there is nothing to learn"),
        ({"messages": [USER, ASSISTANT, USER]}, "ends with a user message that nobody answers"),
        ({"prompt": "2 + 2?", "completion": ""}, "`completion` is empty"),
        ({"prompt": 4, "completion": "4"}, "`prompt` is a number, not text"),
        ({"prompt": None, "completion": "4"}, r"found: prompt \(null\), completion"),
        ({"messages": None}, r"found: messages \(null\)"),
        ({"messages": {"role": "user"}}, "`messages` is an object"),
    ],
)
def test_a_wrong_row_is_named_with_its_reason(tmp_path: Path, row: Any, reason: str):
    with pytest.raises(
        DataError, match=rf"(?s)1 of 2 rows.*\ndata/rows.jsonl:2: .*{reason}.*\nMend or remove them"
    ):
        read(jsonl(tmp_path, GOOD, row))


def test_many_wrong_rows_are_counted_and_five_are_shown(tmp_path: Path):
    with pytest.raises(DataError) as refused:
        read(jsonl(tmp_path, GOOD, *[b"{"] * 9))
    message = str(refused.value)
    assert message.startswith("9 of 10 rows cannot be trained on:\n")
    assert message.count("data/rows.jsonl:") == 5
    assert "… and 4 more rows" in message


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data/rows.jsonl: holds no rows"):
        read(path)


def test_parquet_rows_are_numbered_from_one(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": [USER, ASSISTANT]}, {"messages": [USER]}]), path)
    with pytest.raises(DataError, match=r"data/rows.parquet:2: has no assistant turn"):
        read(path)
    pq.write_table(pa.Table.from_pylist([{"prompt": "2 + 2?", "completion": "4"}] * 3), path)
    assert [conversation.row for conversation in read(path)] == [1, 2, 3]


def test_a_damaged_parquet_file_is_refused(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD] * 100), path)
    whole = path.read_bytes()
    for damaged in (b"", b"{}", whole[: len(whole) // 2], whole[:200] + bytes(100) + whole[300:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"data/rows.parquet: no Parquet file, or a damaged one"):
            read(path)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "prompt", "completion", "text"]), inner
        )
    ),
    max_leaves=12,
)


@given(row=_json, whole_text=st.booleans())
def test_any_json_is_a_conversation_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, row: Any, whole_text: bool
):
    path = jsonl(tmp_path_factory.getbasetemp(), row)
    try:
        (conversation,) = read(path, whole_text=whole_text)
    except DataError:
        return
    assert conversation.text or conversation.messages[-1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("hf://datasets/openai/gsm8k", ("openai/gsm8k", None, "train")),
        ("hf://datasets/openai/gsm8k/main", ("openai/gsm8k", "main", "train")),
        ("hf://datasets/openai/gsm8k/main?split=test", ("openai/gsm8k", "main", "test")),
        ("hf://datasets/openai/gsm8k?split=train[50%:]", ("openai/gsm8k", None, "train[50%:]")),
    ],
)
def test_hub_uris(uri: str, parts: tuple[str, str | None, str]):
    assert is_hub_dataset(uri)
    assert parse_hub_uri(uri) == parts


@pytest.mark.parametrize(
    "uri",
    ["hf://datasets/gsm8k", "hf://datasets/a/b/c/d", "hf://datasets/a/b?rows=3", "hf://datasets/a/b?split="],
)
def test_other_hub_uris_are_refused_with_the_form_to_write(uri: str):
    with pytest.raises(DataError, match=r"split=|hf://datasets/ORG/NAME/CONFIG"):
        parse_hub_uri(uri)

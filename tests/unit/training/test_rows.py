import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.rows import Chat, Example, Filled, Pair, Reading, Task, Text, read_row, recognise
from training.data.sources import RowError

USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
}
TOOL = {"role": "tool", "content": "4", "tool_call_id": "1"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def read(
    row: dict[str, Any],
    task: Task = "instruction_tuning",
    *,
    columns: dict[str, str] | None = None,
    prompt_template: str | None = None,
    labels: tuple[str, ...] = (),
) -> Example:
    data_format = recognise(row, columns or {}, task, prompt_template)
    return read_row(row, Reading(task, data_format, columns or {}, prompt_template, labels))


def test_a_chat_keeps_its_turns():
    assert read({"messages": [SYSTEM, USER, ASSISTANT], "id": 7}) == Chat([SYSTEM, USER, ASSISTANT])
    assert read({"messages": [USER, ASSISTANT] * 3}) == Chat([USER, ASSISTANT] * 3)


def test_two_columns_are_a_chat_of_two_turns():
    assert read({"prompt": "2 + 2?", "completion": "4"}) == Chat([USER, ASSISTANT])
    assert read({"instruction": "2 + 2?", "output": "4"}) == Chat([USER, ASSISTANT])
    assert read({"instruction": "2 + 2?", "input": " ", "output": "4"}) == Chat([USER, ASSISTANT])
    both = read({"instruction": "Add.", "input": "2 + 2", "output": "4"})
    assert both == Chat([{"role": "user", "content": "Add.\n\n2 + 2"}, ASSISTANT])


def test_sharegpt_turns_are_messages():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2 + 2?"},
        {"from": "gpt", "value": "4"},
    ]
    assert read({"conversations": turns}) == Chat([SYSTEM, USER, ASSISTANT])
    assert read({"conversations": turns[1:], "system": "Be brief."}) == Chat([SYSTEM, USER, ASSISTANT])
    misnamed = Reading("instruction_tuning", "conversations", {"conversations": "messages"}, None, ())
    assert read_row({"messages": turns}, misnamed) == Chat([SYSTEM, USER, ASSISTANT])
    with pytest.raises(RowError, match=r"message 2 is from 'bing'. Known: system, human"):
        read({"conversations": [turns[1], {"from": "bing", "value": "4"}]})


def test_columns_may_be_called_otherwise():
    row = {"question": "2 + 2?", "answer": "4"}
    assert read(row, columns={"prompt": "question", "completion": "answer"}) == Chat([USER, ASSISTANT])
    with pytest.raises(RowError, match=r"found: question, answer.*columns: \{prompt: question\}"):
        read(row)
    with pytest.raises(
        RowError, match=r"has no `reply`, which `columns` gives as `completion` \(found: quest"
    ):
        read(row, columns={"prompt": "question", "completion": "reply"})


def test_plain_text_is_for_causal_lm_only():
    assert read({"text": "Once upon a time"}, "causal_lm") == Text("Once upon a time")
    with pytest.raises(
        RowError, match="is plain text, which task: causal_lm learns from, not instruction_tuning"
    ):
        read({"text": "Once upon a time"})


def test_a_weight_of_0_takes_a_message_out_of_the_loss():
    chat = read({"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}]})
    assert chat == Chat([USER, ASSISTANT] * 2, untrained=(1,))
    with pytest.raises(RowError, match="has only assistant messages of weight 0"):
        read({"messages": [USER, ASSISTANT | {"weight": 0}]})
    with pytest.raises(
        RowError, match=r"message 2 has the weight 0.5. A message is trained \(1\) or not \(0\)"
    ):
        read({"messages": [USER, ASSISTANT | {"weight": 0.5}]})
    with pytest.raises(RowError, match="message 2 has the weight 0, and task: causal_lm trains on all"):
        read({"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT]}, "causal_lm")


def test_words_about_a_nul_character_are_none():
    def calling(code: str) -> dict[str, Any]:
        call = {"name": "run", "arguments": {"code": code}}
        return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}

    read(calling(r"print('\u0000')"))
    for code in ("\x00", "\\\x00"):
        with pytest.raises(RowError, match="holds a NUL character"):
            read(calling(code))


def test_tool_calls_keep_what_templates_print():
    chat = read({"messages": [USER, CALL, TOOL, ASSISTANT], "tools": TOOLS})
    assert isinstance(chat, Chat)
    assert chat.tools == TOOLS
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}, "id": "1"}
    assert chat.messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        TOOL,
        ASSISTANT,
    ]
    assert read({"messages": json.dumps([USER, CALL, TOOL, ASSISTANT]), "tools": json.dumps(TOOLS)}) == chat
    with pytest.raises(RowError, match="message 3: a tool message answers an assistant's tool_calls"):
        read({"messages": [USER, ASSISTANT, TOOL, ASSISTANT]})
    with pytest.raises(RowError, match=r"tool call 1: arguments is text that is not JSON"):
        read(
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]},
                ]
            }
        )


def test_pairs_share_a_beginning():
    expected = Pair([USER], [ASSISTANT], [{"role": "assistant", "content": "5"}])
    five = {"role": "assistant", "content": "5"}
    for row in (
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [five]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, five]},
        {"prompt": "2 + 2?", "chosen": [USER, ASSISTANT], "rejected": [USER, five]},
    ):
        assert read(row, "preference_tuning") == expected
    with pytest.raises(RowError, match="the same text as `chosen` and as `rejected`"):
        read({"prompt": "2 + 2?", "chosen": "4", "rejected": "4"}, "preference_tuning")
    with pytest.raises(RowError, match="do not begin with the same messages"):
        read({"chosen": "4", "rejected": "5"}, "preference_tuning")
    with pytest.raises(RowError, match=r"is preference pairs .* task: preference_tuning learns from"):
        read({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})


def test_labels_are_those_of_the_yaml():
    labels = ("bad", "good")
    row = read({"text": "I like it", "label": "good"}, "classification", labels=labels)
    assert isinstance(row, Chat)
    assert (row.messages[-1]["content"], row.label) == ("good", 1)
    assert read(
        {"messages": [USER, {"role": "assistant", "content": " bad\n"}]}, "classification", labels=labels
    ) == Chat([USER, {"role": "assistant", "content": "bad"}], label=0)
    assert read({"text": "I like it", "label": 1}, "classification", labels=("0", "1")).label == 1
    with pytest.raises(
        RowError, match=r"has the label 'fine', which is none of classifier_config.label_tokens \(bad, good\)"
    ):
        read({"text": "I like it", "label": "fine"}, "classification", labels=labels)


def test_a_prompt_template_lays_out_columns():
    template = "### Instruction: {instruction} {input}\n### Response: {output}\n"
    row = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
    assert read(row, prompt_template=template) == Filled("### Instruction: Add. 2 + 2\n### Response: ", "4")
    del row["input"]
    assert read(row, prompt_template=template) == Filled("### Instruction: Add. \n### Response: ", "4")
    with pytest.raises(RowError, match=r"has no `output` \(found: instruction\)"):
        read({"instruction": "Add."}, prompt_template=template)


def test_a_column_that_a_format_needs_is_missing_not_null():
    reading = Reading("instruction_tuning", "instruction", {}, None, ())
    with pytest.raises(RowError, match=r"has no `instruction` \(found: messages\)"):
        read_row({"messages": [USER, ASSISTANT]}, reading)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
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
        (
            {"messages": [{"from": "human", "value": "2 + 2?"}]},
            "has `from`, not `role`: ShareGPT's chats need",
        ),
        ({"prompt": "2 + 2?", "completion": ""}, "`completion` is empty"),
        ({"prompt": 4, "completion": "4"}, "`prompt` is a number, not text"),
        ({"prompt": b"2 + 2?", "completion": "4"}, "`prompt` is of type bytes, not text"),
        ({"prompt": "2 + 2?", "completion": "\ud800"}, "holds half of a surrogate pair"),
        ({"prompt": None, "completion": "4"}, r"found: prompt \(null\), completion"),
        ({"messages": None}, r"found: messages \(null\)"),
        ({"messages": {"role": "user"}}, "`messages` is an object"),
        ({"messages": [USER, ASSISTANT], "tools": ["add"]}, "tool 1 of `tools` is text, not a JSON schema"),
    ],
)
def test_a_wrong_row_is_refused_with_its_reason(row: dict[str, Any], reason: str):
    with pytest.raises(RowError, match=reason):
        read(row)


def test_a_label_that_is_null_is_missing():
    with pytest.raises(RowError, match=r"has no `text` and `label`.*found: text, label \(null\)"):
        read({"text": "2 + 2?", "label": None}, "classification", labels=("0", "1"))


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "tool"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "conversations",
                    "role",
                    "from",
                    "value",
                    "content",
                    "weight",
                    "tools",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "prompt",
                    "completion",
                    "chosen",
                    "rejected",
                    "instruction",
                    "output",
                    "text",
                    "label",
                ]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@given(
    row=st.dictionaries(
        st.sampled_from(
            ["messages", "conversations", "prompt", "completion", "chosen", "rejected", "text", "label"]
        ),
        _json,
    )
)
@pytest.mark.parametrize("task", ["instruction_tuning", "causal_lm", "preference_tuning", "classification"])
def test_any_json_is_an_example_or_is_refused(task: Task, row: dict[str, Any]):
    try:
        example = read(row, task, labels=("0", "1"))
    except RowError:
        return
    assert isinstance(example, Pair if task == "preference_tuning" else Chat | Text)

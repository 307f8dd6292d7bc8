import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.messages import assert_names
from training.data import rows
from training.data.class_names import with_names
from training.data.errors import RowError
from training.data.records import Chat, Example, Filled, Pair, Task, Text
from training.data.rows import RowSchema, read_row, recognise

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
    unpaired: bool = False,
) -> Example:
    data_format = recognise(row, columns or {}, task, prompt_template, unpaired=unpaired)
    return read_row(row, RowSchema(task, data_format, columns or {}, prompt_template, labels, unpaired))


def test_messages_become_a_chat():
    assert read({"messages": [SYSTEM, USER, ASSISTANT], "id": 7}) == Chat([SYSTEM, USER, ASSISTANT])
    assert read({"messages": [USER, ASSISTANT] * 3}) == Chat([USER, ASSISTANT] * 3)


def test_prompt_and_instruction_columns_become_a_chat_of_two_turns():
    assert read({"prompt": "2 + 2?", "completion": "4"}) == Chat([USER, ASSISTANT])
    assert read({"instruction": "2 + 2?", "output": "4"}) == Chat([USER, ASSISTANT])
    assert read({"instruction": "2 + 2?", "input": " ", "output": "4"}) == Chat([USER, ASSISTANT])
    both = read({"instruction": "Add.", "input": "2 + 2", "output": "4"})
    assert both == Chat([{"role": "user", "content": "Add.\n\n2 + 2"}, ASSISTANT])


def test_sharegpt_turns_become_messages():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2 + 2?"},
        {"from": "gpt", "value": "4"},
    ]
    assert read({"conversations": turns}) == Chat([SYSTEM, USER, ASSISTANT])
    assert read({"conversations": turns[1:], "system": "Be brief."}) == Chat([SYSTEM, USER, ASSISTANT])
    renamed = RowSchema("instruction_tuning", "conversations", {"conversations": "messages"}, None, ())
    assert read_row({"messages": turns}, renamed) == Chat([SYSTEM, USER, ASSISTANT])
    with pytest.raises(RowError, match=r"message 2 .*'bing'.*human"):
        read({"conversations": [turns[1], {"from": "bing", "value": "4"}]})


def test_columns_setting_maps_other_column_names():
    row = {"question": "2 + 2?", "answer": "4"}
    assert read(row, columns={"prompt": "question", "completion": "answer"}) == Chat([USER, ASSISTANT])
    with pytest.raises(RowError, match=r"ask, reply.*columns: \{prompt: question\}"):
        read({"ask": "2 + 2?", "reply": "4"})
    with pytest.raises(RowError, match=r"`reply`.*`columns`.*`completion`.*question"):
        read(row, columns={"prompt": "question", "completion": "reply"})


def test_plain_text_requires_causal_lm():
    assert read({"text": "Once upon a time"}, "causal_lm") == Text("Once upon a time")
    with pytest.raises(RowError, match=r"task: causal_lm.*instruction_tuning"):
        read({"text": "Once upon a time"})


def test_weight_of_0_excludes_a_message_from_the_loss():
    chat = read({"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}]})
    assert chat == Chat([USER, ASSISTANT] * 2, untrained=(1,))
    with pytest.raises(RowError, match=r"assistant.*weight 0"):
        read({"messages": [USER, ASSISTANT | {"weight": 0}]})
    with pytest.raises(RowError, match=r"message 2 .*weight.* 0\.5\b.*1.*0"):
        read({"messages": [USER, ASSISTANT | {"weight": 0.5}]})
    with pytest.raises(RowError, match=r"message 2 .*task: causal_lm.*weight"):
        read({"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT]}, "causal_lm")


def test_tool_call_may_contain_an_escaped_nul_but_no_nul_character():
    def row_with_call(code: str) -> dict[str, Any]:
        call = {"name": "run", "arguments": {"code": code}}
        return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}

    chat = read(row_with_call(r"print('\u0000')"))
    assert isinstance(chat, Chat)
    assert r"\u0000" in chat.messages[1]["tool_calls"][0]["function"]["arguments"]["code"]
    for code in ("\x00", "\\\x00"):
        with pytest.raises(RowError, match="NUL"):
            read(row_with_call(code))


def test_tool_calls_are_normalized_for_templates():
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
    with pytest.raises(RowError, match=r"message 3.*tool.*tool_calls"):
        read({"messages": [USER, ASSISTANT, TOOL, ASSISTANT]})
    with pytest.raises(RowError, match=r"tool call 1: .*arguments.*JSON"):
        read(
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]},
                ]
            }
        )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
    ],
    ids=lambda row: next(iter(row)),
)
def test_label_makes_the_answer_the_chosen_or_the_rejected_one(row: dict[str, Any]):
    good, bad = Pair([USER], [ASSISTANT], []), Pair([USER], [], [ASSISTANT])
    for label in (True, 1, "True", "true", "1"):
        assert read(row | {"label": label}, "preference_tuning", unpaired=True) == good
    for label in (False, 0, "False", "0"):
        assert read(row | {"label": label}, "preference_tuning", unpaired=True) == bad
    assert read(row | {"kto_tag": False}, "preference_tuning", unpaired=True) == bad
    rated = read(row | {"good": True}, "preference_tuning", columns={"label": "good"}, unpaired=True)
    assert rated == good
    assert read(
        row | {"label": None, "kto_tag": True, "id": 3}, "preference_tuning", unpaired=True
    ).notes == ("column `id` is not used",)


def test_unpaired_rows_without_a_usable_label_are_rejected():
    row = {"prompt": "2 + 2?", "completion": "4"}
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        (row, ("`label`", "kto_tag", "chosen")),
        (row | {"label": "good"}, ("'good'", "true", "false")),
        (row | {"label": 0.5}, ("0.5", "true", "false")),
        (
            row | {"completion": [ASSISTANT, USER, ASSISTANT], "label": True},
            ("`completion`", "3 messages", "`prompt`"),
        ),
        ({"messages": [USER, ASSISTANT | {"weight": 0}], "label": True}, ("loss", "label")),
    ]
    for bad, names in cases:
        with pytest.raises(RowError) as error:
            read(bad, "preference_tuning", unpaired=True)
        assert_names(str(error.value), *names)
    with pytest.raises(RowError, match=r"one response.*preference_tuning_config: \{loss: kto\}"):
        read(row | {"label": True}, "preference_tuning")


def test_preference_rows_become_pairs_with_a_common_prompt():
    expected = Pair([USER], [ASSISTANT], [{"role": "assistant", "content": "5"}])
    five = {"role": "assistant", "content": "5"}
    for row in (
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [five]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, five]},
        {"prompt": "2 + 2?", "chosen": [USER, ASSISTANT], "rejected": [USER, five]},
    ):
        assert read(row, "preference_tuning") == expected
    with pytest.raises(RowError, match=r"identical.*`chosen`.*`rejected`"):
        read({"prompt": "2 + 2?", "chosen": "4", "rejected": "4"}, "preference_tuning")
    with pytest.raises(RowError, match=r"`chosen`.*`rejected`.*begin|begin.*`chosen`.*`rejected`"):
        read({"chosen": "4", "rejected": "5"}, "preference_tuning")
    with pytest.raises(RowError, match=r"task: preference_tuning.*instruction_tuning"):
        read({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})


@pytest.mark.parametrize(
    ("prompt", "side"),
    [
        ([SYSTEM, USER], [USER]),
        ([SYSTEM, USER], [SYSTEM, USER]),
        ([USER], [SYSTEM, USER]),
        ([SYSTEM, USER], []),
    ],
)
def test_sides_of_a_pair_may_repeat_the_end_of_the_prompt(
    prompt: list[dict[str, Any]], side: list[dict[str, Any]]
):
    five = {"role": "assistant", "content": "5"}
    row = {"prompt": prompt, "chosen": [*side, ASSISTANT], "rejected": [*side, five]}
    assert read(row, "preference_tuning") == Pair([SYSTEM, USER], [ASSISTANT], [five])
    as_texts = {name: json.dumps(value) for name, value in row.items()}
    assert read(as_texts, "preference_tuning") == read(row, "preference_tuning")


def test_sides_of_a_pair_with_another_prompt_are_rejected():
    other = {**SYSTEM, "content": "Be long."}
    row = {"prompt": [SYSTEM, USER], "chosen": [other, USER, ASSISTANT], "rejected": "5"}
    with pytest.raises(RowError, match=r"`chosen`: repeats the last message of `prompt`"):
        read(row, "preference_tuning")


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]),
        '[{"from": "alice@x.com"}]',
        '[{"role": "Agent"}]',
        "\n\nHuman: Hi\n\nAssistant: Hello",
    ],
)
def test_an_answer_that_looks_like_messages_is_a_text(answer: str):
    message = {"role": "assistant", "content": answer}
    assert read({"prompt": "2 + 2?", "completion": answer}) == Chat([USER, message])
    pair = read({"prompt": "2 + 2?", "chosen": answer, "rejected": "4"}, "preference_tuning")
    assert pair == Pair([USER], [message], [ASSISTANT])
    assert isinstance(pair, Pair)
    assert pair.notes == ()


def test_an_answer_may_be_the_json_text_of_assistant_messages():
    assert read({"prompt": "2 + 2?", "completion": json.dumps([ASSISTANT])}) == Chat([USER, ASSISTANT])


@pytest.mark.parametrize("task", ["instruction_tuning", "causal_lm"])
@pytest.mark.parametrize(
    "tag",
    [
        *({"label": value} for value in (False, "false", "0", "bad", Decimal("0.1"), "0.5", 0.5)),
        *({"score": value} for value in ("0.1", Decimal(1), "-3")),
    ],
    ids=str,
)
def test_a_quality_tag_is_rejected_in_each_spelling(task: Task, tag: dict[str, Any]):
    with pytest.raises(RowError, match=rf"`{next(iter(tag))}`.*task: {task}"):
        read({"prompt": "2 + 2?", "completion": "5", **tag}, task)


def test_a_label_under_another_name_is_a_quality_tag():
    with pytest.raises(RowError, match="`is_good`"):
        read({"prompt": "2 + 2?", "completion": "5", "is_good": False}, columns={"label": "is_good"})


def test_a_topic_or_a_class_is_no_quality_tag():
    row = {"prompt": "2 + 2?", "completion": "4", "label": "maths"}
    assert read(row) == Chat([USER, ASSISTANT])
    for tag in ({"label": 1}, {"score": 3.2}):  # as AG News and FineWeb-Edu have them
        assert read({"text": "2 + 2 = 4", **tag}, "causal_lm") == Text("2 + 2 = 4")
    with pytest.raises(RowError, match="`label`"):
        read({"text": "2 + 2 = 5", "label": "false"}, "causal_lm")


@pytest.mark.parametrize(
    "column",
    [
        *({"mask": [0, 1]}, {"mask": 1}, {"masked": True}, {"loss_weight": 0}, {"weights": [0, 1]}),
        *({"assistant_mask": [0, 1]}, {"sample_weight": 0.5}, {"training": False}, {"ignore": True}),
        *(
            {"loss_masks": [0, 1]},
            {"train_mask": [False, True]},
            {"label_mask": [1, 0]},
            {"turn_weights": [1, 0.5]},
        ),
    ],
    ids=str,
)
def test_a_column_that_excludes_something_is_rejected(column: dict[str, Any]):
    name = next(iter(column))
    with pytest.raises(RowError, match=rf"`{name}`.*`loss_mask`"):
        read({"messages": [USER, ASSISTANT] * 2, **column})
    with pytest.raises(RowError, match=rf"`{name}`.*`labels`"):
        read({"input_ids": [5, 6], "labels": [5, 6], **column})


@pytest.mark.parametrize(
    "column",
    [
        {"weight": "1"},
        {"weights": [1, 1.0]},
        {"mask": False},
        {"train_mask": [1, True]},
        {"class_weights": [0.5, 1]},
    ],
    ids=str,
)
def test_a_column_that_excludes_nothing_is_noted(column: dict[str, Any]):
    assert read({"prompt": "2 + 2?", "completion": "4", **column}) == Chat([USER, ASSISTANT])


def test_answers_in_a_prompt_are_context():
    """TRL trains the completion alone."""
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert read(row) == Chat([USER, ASSISTANT] * 2, untrained=(1,))
    assert read({name: json.dumps(value) for name, value in row.items()}) == read(row)
    assert read({**row, "system": "Be brief."}) == Chat([SYSTEM, *[USER, ASSISTANT] * 2], untrained=(2,))
    assert read(row, "causal_lm") == Chat([USER, ASSISTANT] * 2)
    for trained, untrained in (({"weight": 1}, ()), ({"train": True}, ()), ({"weight": None}, (1,))):
        prompt = [USER, ASSISTANT | trained, USER]
        assert read({**row, "prompt": prompt}) == Chat([USER, ASSISTANT] * 2, untrained=untrained)


@pytest.mark.parametrize(
    ("answer", "task"),
    [
        ({"completion": "4"}, "instruction_tuning"),
        ({"completion": "4", "label": True}, "preference_tuning"),
        ({"chosen": "4", "rejected": "5"}, "preference_tuning"),
    ],
)
def test_a_prompt_that_begins_the_answer_is_rejected(answer: dict[str, Any], task: Task):
    prompt = [USER, {"role": "assistant", "content": "It is "}]
    with pytest.raises(RowError, match="`prompt` ends with an assistant message"):
        read({"prompt": prompt, **answer}, task, unpaired=True)


def test_two_labels_that_differ_are_rejected():
    row = {"prompt": "2 + 2?", "completion": "4", "label": True}
    with pytest.raises(RowError, match=r"`label` \(True\) and `kto_tag` \(False\)"):
        read({**row, "kto_tag": False}, "preference_tuning", unpaired=True)
    read({**row, "kto_tag": "true"}, "preference_tuning", unpaired=True)


def test_a_pair_may_have_a_history():
    five = {"role": "assistant", "content": "5"}
    row = {"prompt": "2 + 2?", "history": [["2 + 2?", "4"]], "chosen": "4", "rejected": "5"}
    assert read(row, "preference_tuning") == Pair([USER, ASSISTANT, USER], [ASSISTANT], [five])


def test_an_empty_instruction_with_an_input_is_a_question():
    assert read({"instruction": "", "input": "2 + 2?", "output": "4"}) == Chat([USER, ASSISTANT])


def test_columns_may_map_system_history_and_reasoning():
    row = {
        "prompt": "2 + 2?",
        "completion": "4",
        "who": "Be brief.",
        "past": [["2 + 2?", "4"]],
        "why": "Sum.",
    }
    chat = read(row, columns={"system": "who", "history": "past", "reasoning": "why"})
    reasoned = ASSISTANT | {"reasoning_content": "Sum."}
    assert chat == Chat([SYSTEM, USER, ASSISTANT, USER, reasoned])


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"input": "2 + 2?", "output": "4"}, {"instruction": "input"}),
        ({"context": "2 + 2?", "response": "4"}, {"instruction": "context"}),
        ({"ask": "2 + 2?", "thinking": "4"}, {"prompt": "ask", "completion": "thinking"}),
        ({"system": "2 + 2?", "cot": "4"}, {"prompt": "system", "completion": "cot"}),
    ],
)
def test_a_column_that_columns_maps_is_read_once(row: dict[str, str], columns: dict[str, str]):
    """As in OpenCodeInstruct, which has `input` and `output`."""
    assert read(row, columns=columns) == Chat([USER, ASSISTANT])


CALLS = [{"name": "find_weather", "arguments": {"city": "Oslo"}}]


@pytest.mark.parametrize("names", [("query", "answers"), ("prompt", "completion"), ("instruction", "output")])
@pytest.mark.parametrize("answer", [CALLS, json.dumps(CALLS)])
def test_an_answer_that_is_a_list_of_calls_is_a_call(names: tuple[str, str], answer: Any):
    """As in xlam-function-calling-60k, where the names and the tools are text."""
    tools = [{"name": "find_weather", "description": "d", "parameters": {"city": {"type": "str"}}}]
    question, name = names
    chat = read({question: "2 + 2?", name: answer, "tools": json.dumps(tools)})
    assert isinstance(chat, Chat)
    (call,) = chat.messages[-1]["tool_calls"]
    assert call["function"] == {"name": "find_weather", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize(
    ("answer", "tools"),
    [
        (CALLS, None),
        ([{"name": "other", "arguments": {}}], "find_weather"),
        ([{"name": "Ada", "age": 3}], "Ada"),
    ],
)
def test_an_answer_in_json_that_calls_none_of_the_tools_is_a_text(answer: Any, tools: str | None):
    row = {"prompt": "2 + 2?", "completion": json.dumps(answer)}
    if tools:
        row["tools"] = json.dumps([{"name": tools, "description": "d", "parameters": {}}])
    chat = read(row)
    assert isinstance(chat, Chat)
    assert chat.messages[-1] == {"role": "assistant", "content": json.dumps(answer)}


def test_columns_of_another_format_leave_the_names_of_a_row():
    row = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
    assert read(row, columns={"prompt": "instruction", "completion": "output"}) == read(row)


@pytest.mark.parametrize("name", ["input", "system", "reasoning"])
def test_a_column_that_the_prompt_template_does_not_name_is_rejected(name: str):
    template = "{instruction} ### {output}"
    row = {"instruction": "Add.", "output": "4", name: "2 + 2"}
    with pytest.raises(RowError, match=rf"`{name}`.*prompt_template.*ignore_columns: \[{name}\]"):
        read(row, prompt_template=template)
    assert read({**row, name: ""}, prompt_template=template) == Filled("Add. ### ", "4")


def test_labels_must_be_listed_in_the_yaml():
    labels = ("bad", "good")
    row = read({"text": "I like it", "label": "good"}, "classification", labels=labels)
    assert isinstance(row, Chat)
    assert (row.messages[-1]["content"], row.label) == ("good", 1)
    assert read(
        {"messages": [USER, {"role": "assistant", "content": " bad\n"}]}, "classification", labels=labels
    ) == Chat([USER, {"role": "assistant", "content": "bad"}], label=0)
    assert read({"text": "I like it", "label": 1}, "classification", labels=("0", "1")).label == 1
    with pytest.raises(RowError, match=r"'fine'.*classifier_config\.label_tokens.*bad, good"):
        read({"text": "I like it", "label": "fine"}, "classification", labels=labels)


LABEL = {"role": "assistant", "content": "good"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, LABEL | {"weight": 0}]},
        {"messages": [USER, ASSISTANT, USER, LABEL | {"train": False}]},
        {"conversations": [USER, LABEL], "loss_mask": [0]},
        {"prompt": "2 + 2?", "completion": [LABEL | {"mask": True}]},
    ],
)
def test_a_label_that_is_excluded_from_the_loss_is_rejected(row: dict[str, Any]):
    with pytest.raises(RowError) as caught:
        read(row, "classification", labels=("good",))
    assert_names(str(caught.value), "label", "excluded from the loss", "Remove the weight or mask")


def test_earlier_answers_than_the_label_may_be_excluded_from_the_loss():
    row = {"messages": [USER, ASSISTANT | {"weight": 0}, USER, LABEL]}
    chat = read(row, "classification", labels=("good",))
    assert isinstance(chat, Chat)
    assert (chat.label, chat.untrained) == (0, (1,))


@pytest.mark.parametrize("name", ["dialog", "chat", "turns", "data"])
def test_a_chat_is_read_under_the_name_that_columns_give(name: str):
    assert read({name: [USER, ASSISTANT]}, columns={"messages": name}) == Chat([USER, ASSISTANT])


def test_an_answer_beside_the_messages_is_read_as_columns_say():
    """Dolphin-R1."""
    row = {"messages": [SYSTEM, USER], "reasoning": "Two twos.", "answer": "4", "model": "x"}
    columns = {"prompt": "messages", "completion": "answer"}
    chat = read(row, columns=columns)
    assert chat == Chat([SYSTEM, USER, ASSISTANT | {"reasoning_content": "Two twos."}])
    assert isinstance(chat, Chat)
    assert chat.notes == ("column `model` is not used",)


def test_a_number_of_a_class_is_read_by_its_name():
    """As `datasets` stores a ClassLabel."""
    number = with_names({"text": "I like it", "label": 1}, {"label": ["bad", "good"]})
    labels = {("bad", "good"): "good", ("good", "bad"): "good", ("0", "1"): "1"}
    for known, expected in labels.items():
        chat = read(number, "classification", labels=known)
        assert isinstance(chat, Chat)
        assert chat.messages[-1]["content"] == expected
        assert chat.label == known.index(expected)
    with pytest.raises(RowError, match=r"'1'.*label_tokens \(bad, good\).*text of the class instead"):
        read({"text": "I like it", "label": 1}, "classification", labels=("bad", "good"))
    assert with_names({"label": -1}, {"label": ["bad"]}) == {"label": -1}


def test_a_prompt_template_formats_columns():
    template = "### Instruction: {instruction} {input}\n### Response: {output}\n"
    row = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
    assert read(row, prompt_template=template) == Filled("### Instruction: Add. 2 + 2\n### Response: ", "4")
    del row["input"]
    assert read(row, prompt_template=template) == Filled("### Instruction: Add. \n### Response: ", "4")
    with pytest.raises(RowError, match=r"`output`.*instruction"):
        read({"instruction": "Add."}, prompt_template=template)


def test_missing_column_raises_an_error_that_lists_the_present_ones():
    schema = RowSchema("instruction_tuning", "instruction", {}, None, ())
    with pytest.raises(RowError, match=r"`instruction`.*messages"):
        read_row({"messages": [USER, ASSISTANT]}, schema)


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({}, ("`messages`", "nothing")),
        ({"prompt": "2 + 2?"}, ("`messages`", "found: prompt")),
        (USER, ("one message", '{"messages": [...]}')),
        ({"data": [{"prompt": "2 + 2?", "completion": "4"}]}, ("`data`", "one row per line")),
        ({"segments": [{"label": True, "text": "4"}]}, ("`segments`", "input_ids", "labels")),
        ({"dialog": [USER, ASSISTANT]}, ("`dialog`", "columns: {messages: dialog}", "found: dialog")),
        ({"id": 7, "msgs": [USER, ASSISTANT]}, ("`msgs`", "columns: {messages: msgs}")),
        ({"history": [{"from": "human", "value": "a"}]}, ("columns: {conversations: history}",)),
        ({"messages": [USER], "id": 7}, ("no assistant", "End the messages with the answer")),
        (
            {"messages": [SYSTEM, USER], "model": "x", "answer": "4"},
            ("no assistant", "`answer`", "columns: {prompt: messages, completion: answer}"),
        ),
        (
            {"conversations": [USER], "reference_answer": "4"},
            ("columns: {prompt: conversations, completion: reference_answer}",),
        ),
        ({"messages": "hello"}, ("`messages`", "string", "list")),
        ({"messages": []}, ("`messages`", "empty")),
        ({"messages": ["hello"]}, ("message 1 ", "role", "content")),
        (
            {"messages": [USER, {"role": "robot", "content": "4"}]},
            ("message 2 ", "'robot'", "system"),
        ),
        ({"messages": [{"content": "4"}]}, ("message 1 ", "role", "None")),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, ("message 2 (assistant)", "empty")),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            ("message 2 (assistant)", "empty"),
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [1]}]},
            ("message 2 (assistant)", "list"),
        ),
        ({"messages": [USER, {"role": "assistant", "content": "a\x00"}]}, ("NUL",)),
        ({"messages": [ASSISTANT, USER]}, ("before the first user message",)),
        ({"messages": [SYSTEM, ASSISTANT]}, ("before the first user message",)),
        (
            {"messages": [USER, ASSISTANT | {"weight": 0}, ASSISTANT]},
            ("messages 2 and 3 ", "assistant", "merged"),
        ),
        ({"messages": [USER]}, ("no assistant",)),
        ({"prompt": "2 + 2?", "completion": ""}, ("`completion`", "empty")),
        ({"prompt": 4, "completion": "4"}, ("`prompt`", "number")),
        ({"prompt": b"2 + 2?", "completion": "4"}, ("`prompt`", "bytes")),
        ({"prompt": "2 + 2?", "completion": "\ud800"}, ("surrogate",)),
        ({"prompt": None, "completion": "4"}, ("prompt (null), completion",)),
        ({"messages": None}, ("messages (null)",)),
        ({"messages": {"role": "user"}}, ("`messages`", "object")),
        ({"messages": [USER, ASSISTANT], "tools": ["add"]}, ("tool 1 ", "`tools`", "JSON schema")),
    ],
)
def test_invalid_row_raises_an_error_that_names_the_fault(row: dict[str, Any], facts: tuple[str, ...]):
    with pytest.raises(RowError) as caught:
        read(row)
    assert_names(str(caught.value), *facts)


def test_null_label_raises_the_error_of_a_missing_label():
    with pytest.raises(RowError, match=r"`text`.*`label`.*text, label \(null\)"):
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
def test_any_json_is_an_example_or_raises_a_row_error(task: Task, row: dict[str, Any]):
    try:
        example = read(row, task, labels=("0", "1"))
    except RowError:
        return
    assert isinstance(example, Pair if task == "preference_tuning" else Chat | Text)


def test_a_pair_of_very_many_messages_is_joined_in_linear_time():
    """Comparing each end of the side with the prompt would take minutes."""
    count = 10_000
    other = {**USER, "content": "2 + 3?"}
    prompt = [*[USER] * count, other, *[USER] * count]
    row = {"prompt": prompt, "chosen": [SYSTEM, *[USER] * 4 * count, ASSISTANT], "rejected": "5"}
    with pytest.raises(RowError, match=r"`chosen`: repeats the last message of `prompt`"):
        read(row, "preference_tuning")


@given(
    prompt=st.lists(st.integers(0, 2), max_size=5),
    context=st.lists(st.integers(0, 2), max_size=8),
)
def test_repeated_messages_of_a_prompt_are_the_fewest_or_all(prompt: list[int], context: list[int]):
    def repeated_before(end: int) -> int:
        count = min(len(prompt), end)
        return count if count and prompt[-count:] == context[end - count : end] else 0

    counts = map(repeated_before, range(1, len(context) + 1))
    assert rows._count_repeated(prompt, context) == next(filter(None, counts), 0)


def test_lists_as_python_prints_them_are_read():
    """pandas writes them so into CSV files; a text of this form was trained as the answer."""
    messages = [USER, {**ASSISTANT, "name": None}]
    assert read({"messages": str(messages)}) == read({"messages": messages})
    assert read({"messages": messages, "tools": str([]), "loss_mask": "[False, True]"}) == read(
        {"messages": messages}
    )
    pair = {
        "prompt": "2 + 2?",
        "chosen": [USER, ASSISTANT],
        "rejected": [USER, {**ASSISTANT, "content": "5"}],
    }
    printed = {name: value if name == "prompt" else str(value) for name, value in pair.items()}
    assert read(printed, "preference_tuning") == read(pair, "preference_tuning")
    assert read({name: printed[name] for name in ("chosen", "rejected")}, "preference_tuning") == read(
        pair, "preference_tuning"
    )
    listed = "[{'a': 1}]"
    assert read({"prompt": "2 + 2?", "completion": listed}) == Chat([USER, {**ASSISTANT, "content": listed}])

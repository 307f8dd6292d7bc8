"""Spellings of other tools are read as chats, and nothing that a row says is dropped without an error or a note."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from tests.support.messages import assert_names
from training.data.errors import RowError
from training.data.records import Chat, Pair, Task
from training.data.rows import RowSchema, read_row, recognise
from training.data.template_forms import is_wrapped, split_thought, thought_of
from training.data.written_calls import calls_in, is_plain_json, notation_of

USER = {"role": "user", "content": "How warm is it?"}
ANSWER = {"role": "assistant", "content": "21 degrees"}
SYSTEM = {"role": "system", "content": "Answer briefly."}
LOOK = {"name": "look", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "21"}


def read(row: dict[str, Any], task: Task = "instruction_tuning") -> Any:
    return read_row(row, RowSchema(task, recognise(row, {}, task), {}, None, ()))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {
                "messages": [
                    {"role": "human", "content": "How warm is it?"},
                    {"role": "bot", "content": "21 degrees"},
                ]
            },
            [USER, ANSWER],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "How warm is it?"},
                    {"role": "model", "content": "21 degrees"},
                ]
            },
            [USER, ANSWER],
        ),
        (
            {
                "messages": [
                    {"from": "human", "value": "How warm is it?"},
                    {"from": "chatgpt", "value": "21 degrees"},
                ]
            },
            [USER, ANSWER],
        ),
        (
            {
                "conversation": [
                    {"from": "human", "value": "How warm is it?"},
                    {"from": "gpt", "value": "21 degrees"},
                ]
            },
            [USER, ANSWER],
        ),
        ({"query": "How warm is it?", "response": "21 degrees"}, [USER, ANSWER]),
        ({"question": "How warm is it?", "answer": "21 degrees"}, [USER, ANSWER]),
        ({"instruction": "How warm is it?", "context": "", "response": "21 degrees"}, [USER, ANSWER]),
        ({"system": "Answer briefly.", "messages": [USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"system": " ", "messages": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {
                "system": "Answer briefly.",
                "messages": [{"role": "developer", "content": "Be kind."}, USER, ANSWER],
            },
            [SYSTEM, {"role": "developer", "content": "Be kind."}, USER, ANSWER],
        ),
        ({"system": "Answer briefly.", "messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        (
            {"system": "Answer briefly.", "prompt": "How warm is it?", "completion": "21 degrees"},
            [SYSTEM, USER, ANSWER],
        ),
        (
            {
                "instruction": "How warm is it?",
                "output": "21 degrees",
                "system": "Answer briefly.",
                "history": [["And in Oslo?", "Cold."]],
            },
            [
                SYSTEM,
                {"role": "user", "content": "And in Oslo?"},
                {"role": "assistant", "content": "Cold."},
                USER,
                ANSWER,
            ],
        ),
        (
            {
                "messages": [
                    {
                        **USER,
                        "content": [
                            {"type": "text", "text": "How warm "},
                            {"type": "text", "text": "is it?"},
                        ],
                    },
                    ANSWER,
                ]
            },
            [USER, ANSWER],
        ),
        ({"messages": [{"role": "system", "content": ""}, USER, ANSWER]}, [USER, ANSWER]),
        (
            {"messages": [{"role": "developer", "content": "Be kind."}, USER, ANSWER]},
            [{"role": "developer", "content": "Be kind."}, USER, ANSWER],
        ),
        (
            {"messages": [USER, {**CALLING, "content": None}, {**RESULT, "content": None}, ANSWER]},
            [USER, CALLING, {**RESULT, "content": ""}, ANSWER],
        ),
        (
            {"messages": [USER, CALLING, {**RESULT, "content": {"warm": 21, "wet": None}}, ANSWER]},
            [USER, CALLING, {**RESULT, "content": '{"warm": 21}'}, ANSWER],
        ),
        (
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": None,
                        "function_call": {"name": "look", "arguments": "{}"},
                    },
                    {"role": "function", "content": "21"},
                    ANSWER,
                ]
            },
            [USER, CALLING, RESULT, ANSWER],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "How warm is it?"},
                    {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
                    {"from": "observation", "value": "21"},
                    {"from": "gpt", "value": "21 degrees"},
                ]
            },
            [USER, CALLING, RESULT, ANSWER],
        ),
        (
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "look", "parameters": {"a": 1}}}],
                    },
                ]
            },
            [
                USER,
                {
                    **CALLING,
                    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}],
                },
            ],
        ),
        (
            {
                "messages": [
                    USER,
                    {**ANSWER, "content": '<tool_call>\n{"name": "look"}\n</tool_call>'},
                    RESULT,
                    ANSWER,
                ]
            },
            [USER, {**ANSWER, "content": '<tool_call>\n{"name": "look"}\n</tool_call>'}, RESULT, ANSWER],
        ),
    ],
)
def test_other_spellings_are_read_as_messages(row: dict[str, Any], messages: list[dict[str, Any]]):
    assert read(row).messages == messages


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_under_each_of_its_names(key: str):
    expected = [USER, {**ANSWER, "reasoning_content": "The sun shines."}]
    assert read({"messages": [USER, {**ANSWER, key: "The sun shines."}]}).messages == expected
    turns = [
        {"from": "human", "value": "How warm is it?"},
        {"from": "gpt", "value": "21 degrees", key: "The sun shines."},
    ]
    assert read({"conversations": turns}).messages == expected
    chunks = [{"type": "text", "text": "The sun "}, {"type": "text", "text": "shines."}]  # of mistral_common
    for thought in ("The sun shines.", chunks):
        parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": "21 degrees"}]
        assert read({"messages": [USER, {**ANSWER, "content": parts}]}).messages == expected


@pytest.mark.parametrize(
    "content",
    [
        "<think>\nThe sun shines.\n</think>\n\n21 degrees",
        "The sun shines.\n</think>\n\n21 degrees",
        "<think>\n\n</think>\n\n21 degrees",
        [{"type": "text", "text": "<think>The sun shines.</think>21 degrees"}],
    ],
)
def test_reasoning_under_a_key_and_in_the_content_is_read_once(content: Any):
    answer = {**ANSWER, "content": content, "reasoning_content": "The sun shines."}
    assert read({"messages": [USER, answer]}).messages == [
        USER,
        {**ANSWER, "reasoning_content": "The sun shines."},
    ]


@pytest.mark.parametrize(
    "excluded",
    [
        {"weight": 0},
        {"train": False},
        {"trainable": False},
        {"loss": False},
        {"loss": 0},
        {"loss_mask": 0},
        {"mask": True},
        {"masked": True},
        {"training": False},
        {"loss_weight": 0},
        {"ignore": True},
    ],
)
def test_each_key_that_excludes_a_turn_takes_it_out_of_the_loss(excluded: dict[str, Any]):
    key = next(iter(excluded))
    chat = read({"messages": [USER, {**ANSWER, **excluded}, USER, {**ANSWER, key: not excluded[key]}]})
    assert chat.untrained == (1,)


@pytest.mark.parametrize("mask", [[0, 1], [False, True], [1, 0, 1, 1], "[0, 1]"])
def test_a_loss_mask_of_a_row_excludes_turns(mask: Any):
    assert read({"messages": [USER, ANSWER, USER, ANSWER], "loss_mask": mask}).untrained == (1,)


def test_functions_become_tools():
    tools = [{"type": "function", "function": LOOK}]
    row = {"functions": [LOOK], "messages": [USER, CALLING]}
    assert read(row).tools == tools
    assert (
        read(
            {**row, "functions": '[{"name": "look", "parameters": {"type": "object", "properties": {}}}]'}
        ).tools
        == tools
    )
    in_system = {"role": "system", "content": "Help.", "functions": [LOOK]}
    assert read({"messages": [in_system, USER, {**ANSWER, "functions": None}]}).tools == tools
    bare = {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        "tools": [LOOK],
    }
    assert read(bare).tools == tools


def test_nulls_that_arrow_adds_are_removed_and_others_stay():
    """Arrow gives each object of a column the keys of all others, with null."""
    nullable = {"type": ["string", "null"], "default": None}
    tools = [
        {
            "type": "function",
            "function": {
                "name": "a",
                "parameters": {"properties": {"x": {"type": "string"}, "y": None, "z": nullable}},
            },
        },
        {
            "type": "function",
            "function": {"name": "b", "parameters": {"properties": {"x": None, "y": {"enum": ["u", None]}}}},
        },
    ]
    called = {"function": {"name": "a", "arguments": {"x": "1", "y": None, "z": None}}}
    chat = read(
        {"tools": tools, "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [called]}]}
    )
    assert any("null arguments" in note for note in chat.notes)
    assert chat.tools[0]["function"]["parameters"]["properties"] == {"x": {"type": "string"}, "z": nullable}
    assert chat.tools[1]["function"]["parameters"]["properties"] == {"y": {"enum": ["u", None]}}
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": "1", "z": None}
    assert any("null arguments" in note for note in chat.notes)


@pytest.mark.parametrize(
    ("messages", "facts"),
    [
        (
            [{**ANSWER, "reasoning": "a"}, ANSWER],
            ("messages 2 and 3", "because of `reasoning_content`", "one"),
        ),
        ([{**ANSWER, "weight": 0}, ANSWER], ("messages 2 and 3", "in the loss", "same weight")),
        ([{**ANSWER, "content": " "}], ("message 2", "empty", "Write its content")),
    ],
)
def test_errors_of_messages_name_their_cause_and_fix(messages: list[dict[str, Any]], facts: tuple[str, ...]):
    with pytest.raises(RowError) as caught:
        read({"messages": [USER, *messages]})
    assert_names(str(caught.value), *facts)


def test_an_analysis_of_gpt_oss_is_the_reasoning_of_the_next_message():
    thought = {"role": "assistant", "channel": "analysis", "content": "The sun shines."}
    called = {**CALLING, "channel": "commentary"}
    said = {**ANSWER, "channel": "final"}
    chat = read({"messages": [USER, thought, called, RESULT, thought, said]})
    assert chat.messages == [
        USER,
        {**CALLING, "reasoning_content": "The sun shines."},
        RESULT,
        {**ANSWER, "reasoning_content": "The sun shines."},
    ]
    assert chat.notes == ()
    left_out = read({"messages": [USER, {**thought, "weight": 0}, {**ANSWER, "weight": 0}, USER, ANSWER]})
    assert left_out.untrained == (1,)


def test_a_message_of_reasoning_alone_belongs_to_the_next_message():
    """As in rows of gpt-oss without channels, in which a thought is a message of its own."""
    thought = {"role": "assistant", "content": "", "thinking": "The sun shines."}
    more = {**thought, "content": None, "thinking": "It is noon."}
    part = {"role": "assistant", "content": [{"type": "thinking", "thinking": "The sun shines."}]}
    expected = {**ANSWER, "reasoning_content": "The sun shines."}
    for messages in (
        [thought, ANSWER],
        [part, ANSWER],
        [thought, {**ANSWER, "reasoning": "The sun shines."}],
    ):
        assert read({"messages": [USER, *messages]}).messages == [USER, expected]
    assert read({"messages": [USER, thought, CALLING, RESULT, thought, ANSWER]}).messages == [
        *(USER, {**CALLING, "reasoning_content": "The sun shines."}, RESULT, expected)
    ]
    both = {**ANSWER, "reasoning_content": "The sun shines.\n\nIt is noon."}
    assert read({"messages": [USER, thought, more, ANSWER]}).messages == [USER, both]
    answers = [[thought, ANSWER], [thought, {**ANSWER, "content": "cold"}]]
    pair = read({"prompt": [USER], "chosen": answers[0], "rejected": answers[1]}, "preference_tuning")
    assert pair == Pair([USER], [expected], [{**expected, "content": "cold"}])


@pytest.mark.parametrize(
    ("messages", "facts"),
    [
        ([{"content": "", "thinking": "a"}], ("message 2", "only reasoning", "Add its answer")),
        (
            [{"content": " ", "thinking": "a"}, USER, ANSWER],
            ("message 2", "only reasoning", "Add its answer"),
        ),
        ([{"content": "", "thinking": "a"}, {"thinking": "b"}], ("messages 2 and 3", "different reasoning")),
        ([{"channel": "analysis"}], ("message 2", "channel: analysis", "Add its answer")),
        ([{"channel": "analysis"}, USER, ANSWER], ("message 2", "channel: analysis", "Add its answer")),
        ([{"channel": "analysis"}, {"reasoning": "b"}], ("messages 2 and 3", "reasoning")),
        ([{"channel": "analysis"}, {"weight": 0}], ("messages 2 and 3", "same weight")),
        ([{"channel": "commentary", "recipient": "functions.look"}], ("message 2", "`tool_calls`")),
        ([{"channel": "commentary"}, {"channel": "final"}], ("message 2", "commentary")),
    ],
)
def test_channels_without_their_answer_raise_an_error(messages: list[dict[str, Any]], facts: tuple[str, ...]):
    with pytest.raises(RowError) as caught:
        read({"messages": [USER, *({**ANSWER, **message} for message in messages)]})
    assert_names(str(caught.value), *facts)


def test_calls_that_are_written_as_python_are_converted_to_json():
    """Rows of Hermes print some calls as Python prints a dictionary. Other notations stay as they are."""
    for written, expected in (
        ("{'arguments': {'city': None}, 'name': 'look'}", '{"arguments": {"city": null}, "name": "look"}'),
        ('{"name":"look"}', '{"name":"look"}'),
        ("<function=look>\n</function>", "<function=look>\n</function>"),
    ):
        content = f"Wait.\n<tool_call>\n{written}\n</tool_call>"
        chat = read({"messages": [USER, {**ANSWER, "content": content}]})
        assert chat.messages[1]["content"] == f"Wait.\n<tool_call>\n{expected}\n</tool_call>"
        assert any("Python" in note for note in chat.notes) == (written != expected)


@pytest.mark.parametrize(
    "written",
    [
        """{"name": "find", "arguments": '{"title": "Joe's List", "rank": 1}'}""",
        r"""{"name": "find", "arguments": '{"title": "Joe\'s List", "rank": 1}'}""",
        """{'name': 'find', 'arguments': {'title': "Joe's List", 'rank': 1}}""",
        """[{'name': 'find', 'arguments': {'title': "Joe's List", 'rank': 1}}]""",
    ],
)
def test_calls_of_glaive_and_python_are_read(written: str):
    row = [{"from": "human", "value": "Go"}, {"from": "function_call", "value": written}]
    rows = [*row, {"from": "function-response", "value": "found"}, {"from": "gpt", "value": "Done"}]
    chat = read({"conversations": rows})
    (call,) = chat.messages[1]["tool_calls"]
    assert call["function"] == {"name": "find", "arguments": {"title": "Joe's List", "rank": 1}}
    assert chat.messages[2]["role"] == "tool"
    assert chat.notes == ("calls that are written as Python are converted to JSON",)


def test_a_result_follows_a_call_of_glaive():
    chat = read({"messages": [USER, {**ANSWER, "content": '<functioncall> {"name": "f"}'}, RESULT, ANSWER]})
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]


def test_nulls_inside_arguments_are_removed_at_every_depth():
    """Parquet stores nested arguments with the keys of all rows, JSONL with their own."""
    schema = {
        "properties": {
            "filter": {"anyOf": [{"properties": {"n": {"type": ["string", "null"]}}}, {"type": "null"}]}
        }
    }
    tools = [{"type": "function", "function": {"name": "find", "parameters": schema}}]
    stored = {"filter": {"a": 1, "b": None, "n": None}, "by": [{"c": 2, "d": None}, None]}
    called = {"function": {"name": "find", "arguments": stored}}
    chat = read({"tools": tools, "messages": [USER, {"role": "assistant", "tool_calls": [called]}]})
    read_arguments = chat.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert read_arguments == {"filter": {"a": 1, "n": None}, "by": [{"c": 2}, None]}


@pytest.mark.parametrize(
    ("row", "roles", "note"),
    [
        (
            {"messages": [USER, ANSWER, USER]},
            "user assistant",
            "user messages after the last answer are removed",
        ),
        ({"messages": [ANSWER, USER, ANSWER]}, "assistant user assistant", "before the first user message"),
        (
            {"messages": [SYSTEM, SYSTEM, USER, ANSWER]},
            "system user assistant",
            "consecutive system messages are merged",
        ),
        ({"messages": [USER, USER, ANSWER]}, "user assistant", "consecutive user messages are merged"),
        ({"messages": [USER, ANSWER, ANSWER]}, "user assistant", "consecutive assistant messages are merged"),
        ({"messages": [USER, {**ANSWER, "id": 3}]}, "user assistant", "`id` of messages is not used"),
        ({"messages": [USER, ANSWER], "topic": "weather"}, "user assistant", "column `topic` is not used"),
        (
            {"prompt": "Hi", "completion": "Hello", "source": "web"},
            "user assistant",
            "column `source` is not used",
        ),
    ],
)
def test_changed_and_unused_parts_of_a_chat_are_noted(row: dict[str, Any], roles: str, note: str):
    chat = read(row)
    assert [message["role"] for message in chat.messages] == roles.split()
    assert any(note in found for found in chat.notes)


def test_merged_messages_keep_both_texts():
    chat = read({"messages": [SYSTEM, {"role": "system", "content": "Be kind."}, USER, ANSWER]})
    assert chat.messages[0]["content"] == "Answer briefly.\n\nBe kind."


def test_very_many_messages_of_a_role_are_merged_in_linear_time():
    """Joining the texts at each message would copy a hundred gigabytes."""
    long, count = "x" * 1000, 20_000
    asked = [{"role": "user", "content": long}] * count
    chat = read({"messages": [*asked, ANSWER]})
    assert [len(message["content"]) for message in chat.messages[:-1]] == [count * 1002 - 2]


def test_a_greeting_is_context_and_not_in_the_loss():
    row = {"messages": [ANSWER, USER, ANSWER]}
    assert read(row).untrained == (0,)
    whole = read(row, "causal_lm")
    assert (whole.untrained, whole.notes) == ((), ())
    with pytest.raises(RowError, match=r"message 1 is excluded from the loss.*causal_lm"):
        read({"messages": [{**ANSWER, "weight": 0}, USER, ANSWER]}, "causal_lm")


def test_empty_columns_are_neither_used_nor_noted():
    row = {
        "instruction": "Hi",
        "input": "",
        "output": "Hello",
        "system": "",
        "history": [],
        "topic": None,
        "tags": [],
    }
    assert read(row).notes == ()


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({"messages": [USER, ANSWER], "label": False}, ("`label`", "preference_tuning")),
        ({"prompt": "Hi", "completion": "Go away", "label": True}, ("`label`", "preference_tuning")),
        ({"prompt": "Hi", "completion": "Go away", "kto_tag": "bad"}, ("`kto_tag`", "preference_tuning")),
        ({"messages": [USER, ANSWER], "score": 0.1}, ("`score`", "0.1", "ignore_columns: [score]")),
        ({"messages": [USER, ANSWER], "images": ["cat.jpg"]}, ("`images`", "text", "ignore_columns")),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
            ("message 1", "'image_url'", "text"),
        ),
        ({"messages": [{**USER, "audio": "a.wav"}, ANSWER]}, ("message 1", "`audio`")),
        (
            {
                "messages": [
                    USER,
                    {**ANSWER, "train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]},
                ]
            },
            ("message 2", "`train_detail`", "weight: 0"),
        ),
        ({"messages": [USER, ANSWER], "weight": 0.5}, ("`weight`",)),
        ({"messages": [USER, ANSWER], "loss_mask": [1, 0, 1]}, ("`loss_mask`", "3 entries", "1 assistant")),
        ({"messages": [USER, {**ANSWER, "weight": 1, "train": False}]}, ("message 2", "weight and train")),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "Be kind."}, ("system",)),
        (
            {"messages": [USER, {**ANSWER, "reasoning": "a", "thinking": "b"}]},
            ("message 2", "`reasoning` and `thinking`", "Keep one"),
        ),
        (
            {"messages": [USER, {**ANSWER, "reasoning": "a", "content": "<think>b</think>21 degrees"}]},
            ("message 2", "<think>", "Keep one"),
        ),
        ({"messages": [{**USER, "reasoning": "a"}, ANSWER]}, ("message 1", "reasoning", "assistant")),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "args": {"a": 1}}}]},
                ]
            },
            ("tool call 1", "`args`", "Rename it to `arguments`"),
        ),
        (
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": {}, "parameters": {"a": 1}}}],
                    },
                ]
            },
            ("tool call 1", "`parameters`"),
        ),
        (
            {"instruction": "Hi", "output": "Hello", "history": [["only one"]]},
            ("`history`", "entry 1", "pair"),
        ),
    ],
)
def test_keys_that_would_change_the_result_raise_an_error(row: dict[str, Any], facts: tuple[str, ...]):
    with pytest.raises(RowError) as caught:
        read(row)
    assert_names(str(caught.value), *facts)


def test_a_pair_takes_its_shared_beginning_as_the_prompt():
    shared = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q two"}]
    sides = {
        name: [*shared, {"role": "assistant", "content": text}]
        for name, text in (("chosen", "b"), ("rejected", "c"))
    }
    question = {"role": "user", "content": "q one"}
    expected = Pair(
        [question, *shared], [{"role": "assistant", "content": "b"}], [{"role": "assistant", "content": "c"}]
    )
    assert read({"prompt": "q one", **sides}, "preference_tuning") == expected
    assert read({name: [question, *side] for name, side in sides.items()}, "preference_tuning") == expected


def test_a_pair_reads_its_system_column():
    pair = read(
        {"system": "Answer in French.", "question": "Yes or no?", "chosen": "oui", "rejected": "yes"},
        "preference_tuning",
    )
    assert pair.prompt == [
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "Yes or no?"},
    ]


def test_a_pair_whose_answers_continue_raises_an_error():
    """Token columns of a pair have no mask, so the words of the user would be scored."""
    side = [ANSWER, USER, ANSWER]
    with pytest.raises(RowError, match=r"`rejected`.*message 2.*End both"):
        read(
            {"prompt": "q", "chosen": "b", "rejected": [{**ANSWER, "content": "c"}, *side[1:]]},
            "preference_tuning",
        )


def test_a_system_column_may_have_text_parts():
    """As the APIs of Anthropic and Bedrock."""
    for parts in (
        [{"type": "text", "text": "Be kind.", "cache_control": {"type": "x"}}],
        [{"text": "Be kind."}],
    ):
        assert read({"messages": [USER, ANSWER], "system": parts}) == read(
            {"messages": [{"role": "system", "content": "Be kind."}, USER, ANSWER]}
        )
    assert read({"messages": [USER, ANSWER], "system": [{"text": ""}]}) == read({"messages": [USER, ANSWER]})
    with pytest.raises(RowError, match="system column has a part of type 'image'"):
        read({"messages": [USER, ANSWER], "system": [{"type": "image"}]})


@pytest.mark.parametrize(
    ("message", "facts"),
    [
        ({"content": [{"type": "tool_use", "name": "f", "input": {}}]}, ("'tool_use'", "`tool_calls`")),
        ({"content": [{"type": "tool_result", "content": "x"}]}, ("'tool_result'", "role tool")),
        ({"parts": [{"text": "Yes"}]}, ("is empty", "keys found: role, parts")),
    ],
)
def test_errors_of_other_shapes_of_messages_name_their_keys(message: dict[str, Any], facts: Sequence[str]):
    """Of Anthropic's and Gemini's APIs."""
    with pytest.raises(RowError) as caught:
        read({"messages": [USER, {"role": "assistant", **message}]})
    assert all(fact in str(caught.value) for fact in facts), caught.value


@pytest.mark.parametrize(
    "name", ["image", "images", "img", "image_path", "image_paths", "audio_file", "video_url", "pixel_values"]
)
def test_columns_of_media_are_rejected(name: str):
    with pytest.raises(RowError, match=rf"`{name}`.*Only text is supported"):
        read({"messages": [USER, ANSWER], name: "a.png"})


def test_classification_notes_and_rejects_alike():
    row = {"text": "I like it", "label": "good", "images": ["a.png"]}
    with pytest.raises(RowError, match="`images`"):
        read_row(row, RowSchema("classification", "classification", {}, None, ("good",)))
    chat = read_row(
        {**row, "images": None, "id": 3}, RowSchema("classification", "classification", {}, None, ("good",))
    )
    assert isinstance(chat, Chat)
    assert chat.notes == ("column `id` is not used",)


def test_a_loss_mask_is_applied_to_messages_as_written():
    """Not after a system text is added and messages are merged."""
    messages = [USER, ANSWER, ANSWER, USER, {**ANSWER, "content": "22 degrees"}]
    with pytest.raises(RowError, match="cannot be merged"):
        read({"messages": messages, "loss_mask": [0, 0, 1, 0, 1]})
    chat = read(
        {"system": "Answer briefly.", "messages": messages[:2] + messages[3:], "loss_mask": [0, 1, 0, 0]}
    )
    assert chat.untrained == (4,)


def test_a_prompt_that_the_answers_repeat_in_other_spelling_is_taken_once():
    asked = [{"role": "user", "content": "How warm is it?\n"}]
    for chosen, rejected in (
        ([*asked, ANSWER], [*asked, {**ANSWER, "content": "cold"}]),
        ([SYSTEM, *asked, ANSWER], [SYSTEM, *asked, {**ANSWER, "content": "cold"}]),
    ):
        pair = read(
            {"prompt": "How warm is it?", "chosen": chosen, "rejected": rejected}, "preference_tuning"
        )
        assert [message["role"] for message in pair.prompt].count("user") == 1


def test_a_pair_without_a_question_raises_an_error():
    row = {"system": "Answer briefly.", "input": "How warm is it?", "chosen": "warm", "rejected": "cold"}
    with pytest.raises(RowError, match=r"no question.*input.*columns: \{prompt: question\}"):
        read(row, "preference_tuning")


def test_an_answer_in_json_is_a_text():
    assert (
        read({"prompt": "Names?", "completion": '[{"name": "Bob"}]'}).messages[1]["content"]
        == '[{"name": "Bob"}]'
    )
    assert read({"prompt": "[{}] What?", "completion": "A list."}).messages[0]["content"] == "[{}] What?"


def test_nulls_in_arguments_as_text_are_meant():
    called = {"function": {"name": "look", "arguments": '{"city": "Oslo", "unit": null}'}}
    chat = read({"messages": [USER, {"role": "assistant", "tool_calls": [called]}]})
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo", "unit": None}


def test_words_and_a_call_in_two_sharegpt_turns_are_one_message():
    turns = [
        {"from": "human", "value": "How warm is it?"},
        {"from": "gpt", "value": "Let me look."},
        {"from": "function-call", "value": '{"name": "look", "arguments": {}}'},
    ]
    assert read({"conversations": turns}).messages == [USER, {**CALLING, "content": "Let me look."}]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    "row",
    [
        {"question": "How warm is it?", "answer": "21 degrees"},
        {"instruction": "How warm is it?", "output": "21 degrees"},
        {"messages": [USER, ANSWER]},
        {"messages": [SYSTEM, ANSWER, USER, ANSWER]},
        {
            "conversations": [
                {"from": "human", "value": "How warm is it?"},
                {"from": "gpt", "value": "21 degrees"},
            ]
        },
        {"messages": [USER, {**ANSWER, "content": "<think>The sun shines.</think>21 degrees"}]},
    ],
    ids=["prompt", "instruction", "messages", "greeting", "conversations", "written twice"],
)
def test_reasoning_in_a_column_belongs_to_the_answer(row: dict[str, Any], key: str):
    chat = read({**row, key: "The sun shines."})
    assert chat.messages[-1] == {**ANSWER, "reasoning_content": "The sun shines."}
    assert "reasoning_content" not in chat.messages[-3:][0]
    assert not any("is not used" in note for note in chat.notes)


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        (
            {"messages": [USER, ANSWER, USER, ANSWER], "reasoning": "a thought"},
            ("`reasoning`", "2 assistant messages", "`reasoning_content`", "ignore_columns: [reasoning]"),
        ),
        (
            {"messages": [USER, {**ANSWER, "thinking": "b"}], "thinking": "a thought"},
            ("`thinking`", "different texts", "Keep one"),
        ),
        (
            {"messages": [USER, ANSWER], "thinking": ["a thought", "another"]},
            ("`thinking`", "list", "ignore_columns: [thinking]"),
        ),
    ],
)
def test_reasoning_in_a_column_that_fits_no_answer_raises_an_error(
    row: dict[str, Any], facts: tuple[str, ...]
):
    with pytest.raises(RowError) as caught:
        read(row)
    assert_names(str(caught.value), *facts)


@pytest.mark.parametrize("value", ["on", "off", "High", True, False, 1])
@pytest.mark.parametrize(
    "row", [{"messages": [USER, ANSWER]}, {"prompt": "How warm is it?", "completion": "21 degrees"}]
)
def test_a_setting_of_reasoning_is_no_text_of_it(row: dict[str, Any], value: Any):
    """Nemotron's post-training data has a column `reasoning` that says on or off."""
    chat = read({**row, "reasoning": value})
    assert chat.messages == [USER, ANSWER]
    assert chat.notes == ("column `reasoning` is not used",)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, {**ANSWER, "content": "warm"}]},
        {"prompt": "How warm is it?", "completion": "warm"},
    ],
)
def test_a_rationale_of_a_label_is_not_trained(row: dict[str, Any]):
    """The model is asked for the label alone."""
    task: Task = "classification"
    schema = RowSchema(task, recognise(row, {}, task), {}, None, ("warm",))
    chat = read_row({**row, "reasoning": "The sun shines."}, schema)
    assert isinstance(chat, Chat)
    assert chat.messages == [USER, {**ANSWER, "content": "warm"}]
    assert chat.notes == ("column `reasoning` is not used",)


@pytest.mark.parametrize(
    "answer",
    [
        {**ANSWER, "content": "warm", "reasoning_content": "Is it warm? The sun shines."},
        {**ANSWER, "content": "<think>Is it warm? The sun shines.</think>\n\nwarm"},
        {
            **ANSWER,
            "content": [{"type": "thinking", "thinking": "Is it warm?"}, {"type": "text", "text": "warm"}],
        },
    ],
)
def test_reasoning_in_the_message_of_a_label_is_not_trained(answer: dict[str, Any]):
    row = {"messages": [USER, answer]}
    schema = RowSchema("classification", recognise(row, {}, "classification"), {}, None, ("warm",))
    chat = read_row(row, schema)
    assert isinstance(chat, Chat)
    assert chat.messages == [USER, {**ANSWER, "content": "warm"}]
    assert chat.notes == ("reasoning of labels is not used",)


TEXT_PART = {"type": "text", "text": "21 degrees"}
SUMMARY = {"type": "reasoning.summary", "summary": "It is warm."}


@pytest.mark.parametrize(
    ("keys", "notes"),
    [
        ({"content": [{**TEXT_PART, "annotations": [{"url": "a"}]}]}, ("`annotations` of text parts",)),
        ({"content": [{**TEXT_PART, "cache_control": {"type": "a"}}]}, ("`cache_control` of text parts",)),
        ({"content": [{**TEXT_PART, "annotations": [], "cache_control": None}]}, ()),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": "Sun.", "signature": "x", "summary": "S"},
                    TEXT_PART,
                ]
            },
            ("`signature` of thinking parts", "`summary` of thinking parts"),
        ),
        (
            {
                "reasoning_details": [
                    {"type": "reasoning.text", "text": "Sun.", "signature": "x", "format": None}
                ]
            },
            ("`signature` of `reasoning_details`",),
        ),
        ({"reasoning": "Sun.", "reasoning_details": [SUMMARY]}, ("`summary` of `reasoning_details`",)),
    ],
)
def test_keys_of_parts_and_of_details_that_are_not_used_are_noted(
    keys: dict[str, Any], notes: tuple[str, ...]
):
    chat = read({"messages": [USER, {**ANSWER, **keys}]})
    assert chat.notes == tuple(f"{note} is not used" for note in notes)
    assert chat.messages[1]["content"] == "21 degrees"


def test_a_text_of_details_beside_another_reasoning_raises_an_error():
    details = [{"type": "reasoning.text", "text": "Clouds."}, SUMMARY]
    with pytest.raises(RowError, match=r"different texts in `reasoning` and `reasoning_details`"):
        read({"messages": [USER, {**ANSWER, "reasoning": "Sun.", "reasoning_details": details}]})


@pytest.mark.parametrize(
    ("message", "facts"),
    [
        ({**ANSWER, "label": False}, ("message 2", "`label`", "weight: 0")),
        ({**ANSWER, "kto_tag": False}, ("message 2", "`kto_tag`")),
        ({**ANSWER, "content": [{"type": "text", "text": "a", "image": "b"}]}, ("message 2", "`image`")),
        ({**CALLING, "function_call": {"name": "look", "arguments": "{}"}}, ("message 2", "`function_call`")),
    ],
)
def test_message_parts_that_cannot_be_trained_raise_an_error(message: dict[str, Any], facts: tuple[str, ...]):
    with pytest.raises(RowError) as caught:
        read({"messages": [USER, message]})
    assert_names(str(caught.value), *facts)


@pytest.mark.parametrize(
    "messages",
    [
        [{**ANSWER, "content": "<tool_call>{" * 300_000}],
        [{**ANSWER, "content": "<functioncall>{" * 300_000}],
        [{**ANSWER, "content": f"{' ' * 2_000_000}x</think>y"}],
        [CALLING, {**RESULT, "content": f"<tool_response>{' ' * 2_000_000}x"}, ANSWER],
        [CALLING, *[RESULT] * 40_000, ANSWER],
    ],
    ids=["calls", "calls of Glaive", "thought", "result", "results"],
)
def test_the_time_to_read_a_chat_is_linear(messages: list[dict[str, Any]]):
    """Quadratic steps on these chats would take minutes."""
    chat = read({"messages": [USER, *messages]})
    assert chat.messages[-1]["role"] == "assistant"
    for message in chat.messages[-2:]:
        assert not is_plain_json(message["content"]) or notation_of(message["content"]) is None
        assert thought_of(message)[1].strip()
        assert not is_wrapped(message)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('<tool_call>{"a": {}} </tool_call>', ['{"a": {}}']),
        ("<tool_call>{a</tool_call> }</tool_call>", ["{a</tool_call> }"]),
        ("<tool_call>{a} <functioncall> {b}", ["{b}"]),
        ("<functioncall> {a} <|endoftext|> <tool_call>\n{b}\n</tool_call>{c}", ["{a}", "{b}"]),
        ("<tool_call>{a}</tool_call><tool_call>{b", ["{a}"]),
    ],
)
def test_calls_are_found_in_texts(content: str, texts: list[str]):
    found = list(calls_in(content))
    assert [call.text for call in found] == texts
    assert [content[call.begin :][: len(call.text)] for call in found] == texts


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("<think>a</think>b", ("a", "b")),
        ("\n <think>\na\n</think>\n\nb", ("a", "\n\nb")),
        ("<think>a<think>b</think>c</think>", ("a<think>b", "c</think>")),
        ("a\n</think>\nb", ("a", "\nb")),
        ("\n</think>\nb", ("", "\nb")),
        ("a</think>b\n</think>\n\nc", ("a</think>b", "\n\nc")),
        *((same, ("", same)) for same in ("a</think>b", "a <think>b\n</think>\nc", "a\n</think>", "a")),
    ],
)
def test_thoughts_are_split_from_answers(content: str, parts: tuple[str, str]):
    assert split_thought(content) == parts


def test_a_tool_message_follows_a_call_that_is_written_as_text():
    """ToolACE writes calls as [name(key=value)]."""
    written = {**ANSWER, "content": '[Market Trends API(country="us")]'}
    assert len(read({"messages": [USER, written, RESULT, ANSWER]}).messages) == 4
    parts = {**RESULT, "content": [{"type": "hotel", "name": "X"}]}
    assert (
        read({"messages": [USER, CALLING, parts, ANSWER]}).messages[2]["content"]
        == '[{"type": "hotel", "name": "X"}]'
    )


def test_nulls_inside_arguments_are_removed_unless_the_schema_allows_them():
    """Parquet has one type for all values of a column, so JSON Lines and Parquet give the same call."""
    inner = {"properties": {"c": {"type": ["string", "null"]}}}
    parameters = {"properties": {"x": inner, "y": {"type": "array", "items": inner}}}
    tools = [{"type": "function", "function": {"name": "a", "parameters": parameters}}]
    arguments = {"x": {"a": 1, "b": None, "c": None}, "y": [{"a": {"d": None}, "c": None}, None]}
    called = {"name": "a", "arguments": arguments}
    chat = read({"tools": tools, "messages": [USER, {"role": "assistant", "tool_calls": [called]}]})
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {
        "x": {"a": 1, "c": None},
        "y": [{"a": {}, "c": None}, None],
    }


@pytest.mark.parametrize("key", ["args", "input"])
def test_arguments_under_another_name_are_to_be_renamed(key: str):
    with pytest.raises(RowError, match=f"`{key}`.*Rename it to `arguments`"):
        read({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "a", key: {"x": 1}}]}]})


def test_tools_of_a_message_may_repeat_those_of_the_row():
    for tools in ([LOOK], [{"type": "function", "function": LOOK}]):
        chat = read({"messages": [{**SYSTEM, "tools": [LOOK]}, USER, CALLING], "tools": tools})
        assert chat.tools == tools
    with pytest.raises(RowError, match=r"message 1 \(system\) has `tools`, but the row has other tools"):
        read({"messages": [{**SYSTEM, "tools": [{**LOOK, "name": "see"}]}, USER, CALLING], "tools": [LOOK]})


def test_results_of_tools_are_equal_from_json_lines_and_parquet():
    """Arrow gives each object the keys of all others, with null. Nulls inside a text are meant."""
    question, said = ([{"type": "text", "text": text}] for text in ("How warm is it?", "21 degrees"))
    results: list[Any] = [
        [{"type": "text", "text": "21"}],
        [{"warm": 21}],
        [{"wet": True, "wind": {"from": "north"}}],
        [{"wind": {"speed": 3}, "hours": [{"at": 1}, {"rain": "no"}]}],
        None,
    ]
    turns = [{**USER, "content": question}, {**CALLING, "content": None}]
    rows = [
        {"messages": [*turns, {**RESULT, "content": result}, {**ANSWER, "content": said}]}
        for result in results
    ]
    rows.append(
        {"messages": [{**USER, "content": [{"text": "How warm is it?"}]}, {**ANSWER, "content": said}]}
    )
    stored = pa.Table.from_pylist(rows).to_pylist()
    assert stored[1]["messages"][2]["content"][0]["wet"] is None
    assert list(map(read, stored)) == list(map(read, rows))
    assert [read(row).messages[2]["content"] for row in stored[:3]] == [
        *("21", '[{"warm": 21}]', '[{"wet": true, "wind": {"from": "north"}}]')
    ]
    filled = read({"messages": [USER, CALLING, {**RESULT, "content": {"warm": 21, "wet": None}}, ANSWER]})
    assert filled.notes == ("null entries of objects in results of tools are removed",)
    text = '{"warm": 21, "wet": null}'
    assert (
        read({"messages": [USER, CALLING, {**RESULT, "content": text}, ANSWER]}).messages[2]["content"]
        == text
    )


def test_nulls_inside_chat_template_kwargs_are_removed():
    given = {"documents": [{"title": "A", "text": None}], "reasoning_effort": None}
    row = {"messages": [USER, ANSWER], "chat_template_kwargs": given}
    assert read(row).variables == {"documents": [{"title": "A"}]}
    as_text = {**row, "chat_template_kwargs": json.dumps(given)}
    assert read(as_text).variables == {"documents": [{"title": "A", "text": None}]}


@pytest.mark.parametrize("place", ["result", "arguments", "tools"])
def test_values_that_are_nested_too_deeply_raise_an_error(place: str):
    deep: Any = 1
    for _ in range(700):
        deep = {"a": deep}
    row: dict[str, Any] = {"messages": [USER, CALLING, RESULT, ANSWER]}
    if place == "tools":
        row["tools"] = [{"type": "function", "function": {**LOOK, "parameters": deep}}]
    elif place == "result":
        row["messages"][2] = {**RESULT, "content": deep}
    else:
        row["messages"][1] = {**CALLING, "tool_calls": [{"name": "look", "arguments": deep}]}
    with pytest.raises(RowError, match="nested too deeply"):
        read(row)


def test_tools_may_be_texts_or_one_object():
    tool = {"type": "function", "function": LOOK}
    for tools in ([json.dumps(tool)], tool, [tool]):
        assert read({"messages": [USER, CALLING], "tools": tools}).tools == [tool]
    assert read({"instruction": "Hi", "output": "Hello", "tools": [LOOK]}).tools == [tool]


@pytest.mark.parametrize(
    ("message", "facts"),
    [
        ({"from": "human", "value": "Hi", "text": "Hello"}, ("message 1 (user)", "`value`", "`text`")),
        ({"role": "user", "from": "gpt", "content": "Hi"}, ("message 1 (user)", "'user'", "'gpt'")),
    ],
)
def test_a_message_that_says_two_things_is_rejected(message: dict[str, Any], facts: tuple[str, ...]):
    with pytest.raises(RowError) as caught:
        read({"messages": [message, ANSWER]})
    assert_names(str(caught.value), *facts)


@pytest.mark.parametrize(
    "message",
    [
        {**ANSWER, "content": None, "refusal": "21 degrees"},
        {**ANSWER, "content": "", "value": "21 degrees", "from": "gpt"},
        {**ANSWER, "content": [{"text": "21 degrees"}]},
        {**ANSWER, "content": ["21 ", "degrees"]},
        {**ANSWER, "role": "Assistant "},
    ],
)
def test_spellings_of_an_answer_are_read_as_one_text(message: dict[str, Any]):
    chat = read({"messages": [USER, message]})
    assert chat.messages == [USER, ANSWER]
    assert chat.notes == ()


@pytest.mark.parametrize("key", ["train", "weight"])
def test_a_user_message_that_is_put_in_the_loss_is_counted(key: str):
    (note,) = read({"messages": [{**USER, key: 1}, ANSWER]}).notes
    assert_names(note, "user", "only assistant messages")
    assert read({"messages": [{**USER, key: 0}, ANSWER]}).notes == ()


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("is_good", False, True),
        ("quality", "bad", "good"),
        ("feedback", "thumbs_down", "thumbs_up"),
        ("rating", -1, 4),
        ("rating", "-1", "1"),
    ],
)
def test_a_bad_verdict_under_another_name_raises_an_error(key: str, bad: Any, good: Any):
    for row in ({"messages": [USER, ANSWER]}, {"prompt": "Hi", "completion": "Hello"}):
        with pytest.raises(RowError, match=key) as caught:
            read({**row, key: bad})
        assert caught.value.kind == "quality tag"
        assert read({**row, key: good}).notes == (f"column `{key}` is not used",)
    with pytest.raises(RowError, match=key):
        read({"messages": [USER, {**ANSWER, key: bad}]})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, {**ANSWER, "thought": "Look."}]},
        {"messages": [USER, {**ANSWER, "reasoning_details": [{"type": "reasoning.text", "text": "Look."}]}]},
        {
            "messages": [
                USER,
                {
                    **ANSWER,
                    "reasoning": "Look.",
                    "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}],
                },
            ]
        },
        {"instruction": "How warm is it?", "output": "21 degrees", "cot": "Look."},
        {"question": "How warm is it?", "answer": "21 degrees", "thinking_trajectories": ["Look."]},
    ],
)
def test_other_names_of_reasoning_are_read(row: dict[str, Any]):
    assert read(row).messages == [USER, {**ANSWER, "reasoning_content": "Look."}]


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        (
            {
                "messages": [
                    USER,
                    {**ANSWER, "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
                ]
            },
            ("message 2", "reasoning_details", "reasoning_content"),
        ),
        (
            {"prompt": "Hi", "completion": "Hello", "thinking_trajectories": ["A", "B"]},
            ("ignore_columns: [thinking_trajectories]",),
        ),
        (
            {"messages": [USER, ANSWER, USER, ANSWER], "cot": "Look."},
            ("2 assistant messages", "ignore_columns: [cot]"),
        ),
    ],
)
def test_reasoning_that_is_no_text_of_one_answer_raises_an_error(row: dict[str, Any], facts: tuple[str, ...]):
    with pytest.raises(RowError) as caught:
        read(row)
    assert_names(str(caught.value), *facts)


def test_tools_of_anthropic_are_converted():
    schema = {"type": "object", "properties": {}}
    for given in (
        [{"name": "look", "input_schema": schema}],
        json.dumps([{"name": "look", "input_schema": schema}]),
    ):
        chat = read({"messages": [USER, CALLING], "tools": given})
        assert chat.tools == [{"name": "look", "parameters": schema}]
        assert chat.notes == ("`input_schema` of tools is read as `parameters`",)


def test_consecutive_calls_become_one_message():
    """ShareGPT has one turn for each call."""
    call = '{"name": "look", "arguments": {}}'
    turns = [
        {"from": "human", "value": "How warm is it?"},
        {"from": "function_call", "value": call},
        {"from": "tool_call", "value": call},
        {"from": "tool_response", "value": "21"},
        {"from": "ipython", "value": "21"},
        {"from": "gpt", "value": "21 degrees"},
    ]
    chat = read({"conversations": turns})
    calling = {**CALLING, "tool_calls": [CALL, CALL]}
    assert chat.messages == [USER, calling, RESULT, RESULT, ANSWER]
    assert chat.notes == ("consecutive calls are merged into one message",)


@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_arguments_beside_the_function_of_a_call_are_read(key: str):
    call = {"function": {"name": "look", "arguments": None}, key: {"city": "Oslo"}}
    chat = read({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]})
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize(("key", "value"), [("name", "find"), ("arguments", {"city": "Rome"})])
def test_a_call_with_two_different_values_is_rejected(key: str, value: Any):
    call = {"function": {"name": "look", "arguments": {"city": "Oslo"}}, key: value}
    with pytest.raises(RowError) as caught:
        read({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]})
    assert_names(str(caught.value), f"`{key}`", "function", "Remove one")


def test_a_tool_whose_function_is_no_object_is_rejected():
    with pytest.raises(RowError) as caught:
        read({"messages": [USER, CALLING], "tools": [{"function": "look"}]})
    assert_names(str(caught.value), "tool 1", "`function`", "object")


@pytest.mark.parametrize("schema", [{"anyOf": 5}, {"enum": 5}])
def test_schemas_with_numbers_instead_of_alternatives_are_accepted(schema: dict[str, Any]):
    parameters = {"type": "object", "properties": {"city": schema}}
    call = {"function": {"name": "look", "arguments": {"city": None, "size": {"width": 1}}}}
    row = {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [{"name": "look", "parameters": parameters}],
    }
    assert read(row).messages[1]["tool_calls"][0]["function"]["name"] == "look"


@pytest.mark.parametrize("value", [5, True])
def test_numbers_in_place_of_lists_are_rejected(value: Any):
    with pytest.raises(RowError, match="reasoning_details"):
        read({"messages": [USER, {**ANSWER, "reasoning_details": value}]})
    with pytest.raises(RowError, match="history"):
        read({"instruction": "How warm is it?", "output": "21 degrees", "history": value})


@pytest.mark.parametrize("key", ["train_on_turn", "sample_weight", "weights", "loss_weights"])
def test_every_loss_key_of_a_message_is_obeyed(key: str):
    chat = read({"messages": [USER, {**ANSWER, key: 0}, USER, ANSWER]})
    assert (chat.untrained, chat.notes) == ((1,), ())
    with pytest.raises(RowError, match=key):
        read({"messages": [USER, {**ANSWER, key: [0, 1]}]})


@pytest.mark.parametrize(
    ("keys", "is_untrained"),
    [
        ({"weight": "0"}, True),
        ({"train": "false"}, True),
        ({"mask": "True"}, True),
        ({"weight": "1"}, False),
        ({"weight": ""}, False),
    ],
    ids=str,
)
def test_loss_keys_may_be_texts(keys: dict[str, str], is_untrained: bool):
    """Tables and maps have only texts."""
    chat = read({"messages": [USER, {**ANSWER, **keys}, USER, ANSWER]})
    assert (chat.messages, chat.untrained) == ([USER, ANSWER] * 2, (1,) * is_untrained)
    with pytest.raises(RowError, match=r"message 2.*weight 'half'"):
        read({"messages": [USER, {**ANSWER, "weight": "half"}, USER, ANSWER]})


def test_a_plain_chat_whose_system_message_lists_the_tools_has_them_once():
    system = {"role": "system", "content": '<tools>[{"name": "look"}]</tools>'}
    assert read({"messages": [system, USER, ANSWER], "tools": [LOOK]}).tools is None


@pytest.mark.parametrize("calls", ["[]", "{}", "null"])
def test_texts_that_hold_no_calls_are_no_calls(calls: str):
    """Tables have lists as texts."""
    chat = read({"messages": [{**USER, "tool_calls": calls}, {**ANSWER, "tool_calls": calls}]})
    assert chat.messages == [USER, ANSWER]


def test_blank_reasoning_is_none():
    assert read({"messages": [USER, {**ANSWER, "reasoning_content": "\n"}]}).messages == [USER, ANSWER]


def test_media_in_results_of_tools_is_rejected():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(RowError, match=r"message 3.*image_url"):
        read({"messages": [USER, CALLING, {**RESULT, "content": [picture]}, ANSWER]})


def test_thinking_part_with_two_texts_is_rejected():
    part = {"type": "thinking", "thinking": "A", "text": "B"}
    with pytest.raises(RowError, match=r"thinking part.*`text`"):
        read({"messages": [USER, {**ANSWER, "content": [part, {"type": "text", "text": "yes"}]}]})


LOOKING = {"role": "assistant", "content": "Let me look."}
CALLS_ALONE = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.mark.parametrize("text_weight", [None, 0, 1])
@pytest.mark.parametrize("call_weight", [None, 0, 1])
def test_a_call_merged_into_a_text_needs_the_weight_of_the_text(
    text_weight: int | None, call_weight: int | None
):
    looking, calls = {**LOOKING, "weight": text_weight}, {**CALLS_ALONE, "weight": call_weight}
    row = {"messages": [USER, looking, calls, RESULT, ANSWER]}
    if (text_weight == 0) != (call_weight == 0):
        with pytest.raises(RowError) as caught:
            read(row)
        assert_names(str(caught.value), "messages 2 and 3", "in the loss", "Give both the same weight")
        return
    chat = read(row)
    assert chat.messages == [USER, {**LOOKING, "tool_calls": [CALL]}, RESULT, ANSWER]
    assert chat.untrained == ((1,) if text_weight == 0 else ())
    assert chat.notes == ("consecutive assistant messages are merged",)


@pytest.mark.parametrize(
    ("mask", "untrained"),
    [([1, 1, 1], ()), ([0, 0, 1], (1,)), ([0, 1, 1], None), ([1, 0, 1], None), ([0, 0, 0, 0, 1], (1,))],
)
def test_a_loss_mask_gives_merged_texts_and_calls_one_weight(
    mask: list[int], untrained: tuple[int, ...] | None
):
    row = {"messages": [USER, LOOKING, CALLS_ALONE, RESULT, ANSWER], "loss_mask": mask}
    if untrained is None:
        with pytest.raises(RowError, match="Give both the same weight"):
            read(row)
    else:
        assert read(row).untrained == untrained


def test_consecutive_calls_of_different_weights_are_rejected():
    with pytest.raises(RowError, match="Give both the same weight"):
        read({"messages": [USER, CALLS_ALONE, {**CALLS_ALONE, "weight": 0}, RESULT, ANSWER]})


@pytest.mark.parametrize("kind", ["thinking", "reasoning"])
@pytest.mark.parametrize("empty", ["", " \n", []])
def test_an_empty_thinking_part_is_no_reasoning(kind: str, empty: Any):
    parts = [{"type": kind, kind: empty, "signature": "Eq8"}, {"type": "text", "text": "21 degrees"}]
    chat = read({"messages": [USER, {"role": "assistant", "content": parts}]})
    assert chat.messages == [USER, ANSWER]
    assert chat.notes == (f"`signature` of {kind} parts is not used",)


def test_a_thinking_part_without_a_text_is_rejected():
    parts = [{"type": "thinking", "thinking": None}, {"type": "text", "text": "21 degrees"}]
    with pytest.raises(RowError, match="thinking part"):
        read({"messages": [USER, {"role": "assistant", "content": parts}]})


def test_blank_text_parts_are_kept_but_make_no_message():
    parts = [{"type": "text", "text": text} for text in ("21", "\n", " ", "degrees")]
    chat = read({"messages": [USER, {"role": "assistant", "content": parts}]})
    assert chat.messages[1]["content"] == "21\n degrees"
    with pytest.raises(RowError, match=r"message 2 \(assistant\) is empty"):
        read({"messages": [USER, {"role": "assistant", "content": parts[1:3]}]})


COUNT = 1_000
THOUGHTS = [
    {"role": "assistant", "content": f"{number:050}", "channel": "analysis"} for number in range(COUNT)
]


@pytest.mark.parametrize(
    ("messages", "merged"),
    [
        (
            [*[{**USER, "content": "abc" * 20}] * COUNT, ANSWER],
            {**USER, "content": "\n\n".join(["abc" * 20] * COUNT)},
        ),
        ([USER, *[CALLING] * COUNT, RESULT, ANSWER], {**CALLING, "tool_calls": [CALL] * COUNT}),
        (
            [USER, *THOUGHTS, ANSWER],
            {**ANSWER, "reasoning_content": "\n\n".join(m["content"] for m in THOUGHTS)},
        ),
    ],
    ids=["texts", "calls", "reasoning"],
)
def test_many_messages_of_one_role_are_merged(messages: list[dict[str, Any]], merged: dict[str, Any]):
    assert merged in read({"messages": messages}).messages


def test_many_untrained_messages_before_the_question_are_read():
    greeting = [{**CALLING, "weight": 0}, RESULT] * COUNT
    assert len(read({"messages": [*greeting, USER, ANSWER]}).untrained) == COUNT

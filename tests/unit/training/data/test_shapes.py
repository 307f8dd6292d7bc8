"""Rows in the shapes of well-known data sets, and templates with habits of their own, as their model cards show them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.data.errors import RowError
from training.data.records import Chat, Example, Pair, Task
from training.data.renderer import Renderer
from training.data.rows import RowSchema, read_row, recognise

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
NEXT = {"role": "user", "content": "And 3 + 3?"}
SIX = {"role": "assistant", "content": "6"}
WRONG = {"role": "assistant", "content": "5"}
TOOL = {"name": "add", "description": "Add two numbers.", "parameters": {"a": {"type": "number"}}}

PHI_4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The template of Phi 4 mini, which reads tools from the system message."""
SMOLLM3 = (
    "{% set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}"
    "{% set said = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if '/no_think' in said %}{% set mode = '/no_think' %}{% elif '/think' in said %}{% set mode = '/think' %}{% endif %}"
    "{{ '<|im_start|>system\nReasoning Mode: ' + mode + '\n\n' + said.replace('/no_think', '').replace('/think', '').rstrip() }}"
    "{{ '<|im_end|>\n' }}{% set empty = '' if mode == '/think' else '<think>\n\n</think>\n' %}"
    "{% for message in messages %}{% if message.role == 'user' %}{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}"
    "{% elif message.role == 'assistant' %}{{ '<|im_start|>assistant\n' + empty + message.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + empty }}{% endif %}"
)
"""The part of SmolLM3's template that reads its switches from the system message."""


def read(row: dict[str, Any], task: Task = "instruction_tuning") -> Example:
    return read_row(row, RowSchema(task, recognise(row, {}, task), {}, None, ()))


def rendered(template: str, row: dict[str, Any], tiny_model: Path) -> tuple[str, str]:
    """Return (prompt, completion) of the only answer of a row."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    (sequence,) = Renderer(tokenizer, whole_text=False).render(read(row))
    ((begin, end),) = sequence.spans
    return sequence.text[:begin], sequence.text[begin:end]


def test_exchanges_of_input_and_output_are_turns():
    """Capybara."""
    row = {
        "source": "Airoboros",
        "conversation": [{"input": "2 + 2?", "output": "4"}, {"input": "And 3 + 3?", "output": "6"}],
    }
    chat = read(row)
    assert chat == Chat([USER, ANSWER, NEXT, SIX])
    assert chat.notes == ("column `source` is not used",)
    row["conversation"][1] |= {"output": ""}
    with pytest.raises(RowError, match=r"message 4 \(assistant\) is empty"):
        read(row)


def test_an_exchange_may_have_a_system_text():
    """XTuner."""
    exchanges = [
        {"system": "Be brief.", "input": "2 + 2?", "output": "4"},
        {"input": "And 3 + 3?", "output": "6"},
    ]
    system = {"role": "system", "content": "Be brief."}
    assert read({"conversation": exchanges}) == Chat([system, USER, ANSWER, NEXT, SIX])


def test_two_columns_for_the_answer_are_rejected():
    """NuminaMath has a worked solution and its short answer."""
    row = {"problem": "2 + 2?", "solution": "2 + 2 = 4", "answer": "4"}
    with pytest.raises(RowError, match=r"`answer` and `solution`.*columns: \{completion: solution\}"):
        read(row)
    assert read({**row, "solution": "4"}) == Chat([USER, ANSWER])


def test_texts_are_turns_of_user_and_assistant():
    """LIMA."""
    assert read({"conversations": ["2 + 2?", "4", "And 3 + 3?", "6"]}) == Chat([USER, ANSWER, NEXT, SIX])
    chat = read({"conversations": ["2 + 2?", "4", "And 3 + 3?"]})
    assert chat == Chat([USER, ANSWER])
    assert chat.notes == ("user messages after the last answer are removed",)
    with pytest.raises(RowError, match="message 1 is not an object"):
        read({"conversations": ["2 + 2?"]})


def test_messages_as_json_texts_are_messages():
    """Tables have messages of different types as JSON texts, which are no turns of user and assistant by themselves."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    answer = {"role": "assistant", "content": "{}"}
    chat = read({"messages": [json.dumps(message) for message in [*messages, answer]]})
    assert chat.messages == [*messages, answer]
    assert [m["content"] for m in read({"messages": ["{a}", "{b}"]}).messages] == ["{a}", "{b}"]


def test_texts_of_human_and_assistant_are_pairs():
    """HH-RLHF."""
    shared = "\n\nHuman: 2 + 2?\n\nAssistant: 4\n\nHuman: And 3 + 3?\n\nAssistant:"
    pair = read({"chosen": f"{shared} 6", "rejected": f"{shared} 5"}, "preference_tuning")
    assert pair == Pair([USER, ANSWER, NEXT], [SIX], [WRONG])
    assert any("Human:" in note for note in pair.notes)
    assert read({"prompt": shared, "chosen": "6", "rejected": "5"}, "preference_tuning") == pair
    with pytest.raises(RowError, match="empty"):
        read(
            {"chosen": f"{shared} 6", "rejected": shared + " \n\nHuman: why?\n\nAssistant: no"},
            "preference_tuning",
        )


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {"messages": [USER], "chosen": ANSWER, "rejected": WRONG},
        {"messages": [USER], "chosen": [ANSWER], "rejected": [WRONG]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": "4", "rejected": "5"},
        {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"},
    ],
    ids=["conversations", "messages", "lists", "texts", "instruction"],
)
def test_pairs_of_llama_factory_are_read(row: dict[str, Any]):
    pair = read(row, "preference_tuning")
    assert pair == Pair([USER], [ANSWER], [WRONG])
    assert pair.notes == ()


@pytest.mark.parametrize("chosen", ["4", ANSWER, [ANSWER]], ids=["text", "message", "list"])
def test_messages_of_a_pair_that_end_with_an_answer_raise_an_error(chosen: Any):
    """The answer would be merged with both answers of the pair."""
    with pytest.raises(RowError, match="`messages` ends with an answer"):
        read({"messages": [USER, ANSWER], "chosen": chosen, "rejected": WRONG}, "preference_tuning")


def test_messages_that_repeat_the_chosen_answer_are_noted():
    """UltraFeedback has a prompt and both conversations, and `messages` with the chosen one."""
    row = {
        "prompt": "2 + 2?",
        "chosen": [USER, ANSWER],
        "rejected": [USER, WRONG],
        "messages": [USER, ANSWER],
        "score_chosen": 8.0,
    }
    pair = read(row, "preference_tuning")
    assert pair == Pair([USER], [ANSWER], [WRONG])
    assert set(pair.notes) == {"column `messages` is not used", "column `score_chosen` is not used"}


def test_tools_in_the_system_message_reach_a_template_that_reads_them_there(tiny_model: Path):
    """Phi 4 mini: the row has them in the message, as its model card shows, or in a column."""
    called = {"role": "assistant", "content": '<|tool_call|>[{"name": "add"}]<|/tool_call|>'}
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"messages": [{**system, "tools": json.dumps([TOOL])}, USER, called]},
        {"messages": [system, USER, called], "tools": [{"type": "function", "function": TOOL}]},
    ]
    expected = (
        f"<|system|>Be brief.<|tool|>{json.dumps([TOOL])}<|/tool|><|end|><|user|>2 + 2?<|end|><|assistant|>"
    )
    for row in rows:
        assert rendered(PHI_4_MINI, row, tiny_model) == (expected, f"{called['content']}<|end|>")
    without_system = {**rows[1], "messages": [USER, called]}
    assert rendered(PHI_4_MINI, without_system, tiny_model)[0] == expected.replace("Be brief.", "")


def test_tools_that_the_system_text_lists_are_not_listed_twice(tiny_model: Path):
    """Hermes."""
    functions = [{"type": "function", "function": TOOL}]
    row = {
        "conversations": [
            {"from": "system", "value": f"You may call functions. <tools>{json.dumps(functions)}</tools>"},
            {"from": "human", "value": "2 + 2?"},
            {"from": "gpt", "value": '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'},
            {"from": "tool", "value": '<tool_response>\n{"sum": 4}\n</tool_response>'},
            {"from": "gpt", "value": "4"},
        ],
        "tools": json.dumps(functions),
    }
    chat = read(row)
    assert isinstance(chat, Chat)
    assert chat.tools is None
    assert [message["role"] for message in chat.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert any("`tools`" in note for note in chat.notes)
    row["tools"] = json.dumps([{"type": "function", "function": {**TOOL, "name": "multiply"}}])
    other = read(row)
    assert isinstance(other, Chat)
    assert other.tools is not None


def test_switches_in_a_system_message_are_read_by_the_template(tiny_model: Path):
    """SmolLM3."""
    for said, mode, left in (
        ("Be brief. /no_think", "/no_think", "Be brief."),
        ("/no_think", "/no_think", ""),
        ("/think Be brief.", "/think", " Be brief."),
    ):
        row = {"messages": [{"role": "system", "content": said}, USER, ANSWER]}
        empty = "<think>\n\n</think>\n" if mode == "/no_think" else ""
        assert rendered(SMOLLM3, row, tiny_model) == (
            f"<|im_start|>system\nReasoning Mode: {mode}\n\n{left}<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n{empty}",
            "4<|im_end|>",
        )

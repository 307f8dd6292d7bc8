"""The marks of reasoning and of answers are found in chat templates, however they write both."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_model import make_tokenizer
from training.data.answer_marks import AnswerMarks, find_marks
from training.data.chats import read_chat
from training.data.errors import RowError
from training.data.records import Chat
from training.data.renderer import Renderer

QUESTION = {"role": "user", "content": "2 + 2?"}
TURN = "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}</user>{% else %}<bot>"
END = "</bot>{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>"
IN_PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part['type'] == 'thinking' %}"
    "[THINK]{{ part['thinking'] }}[/THINK]{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
CALLS = (
    "{% if m.tool_calls %}<|START_THINKING|>{{ m.tool_plan }}<|END_THINKING|><|START_ACTION|>"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|END_ACTION|>{% else %}"
)
RESPONSE = "<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>"
REASONING = "{% if m.reasoning_content %}BEGIN{{ m.reasoning_content | trim }}END{% endif %}"
TEMPLATES = {
    "Mistral": TURN + IN_PARTS + END + "{% endif %}",
    "Command R7B": TURN + CALLS + RESPONSE + "{% endif %}" + END + "{% endif %}",
    "Command A Reasoning": TURN
    + REASONING.replace("BEGIN", "<|START_THINKING|>").replace("END{", "<|END_THINKING|>{")
    + RESPONSE
    + END
    + "{% endif %}",
    "Seed": TURN
    + REASONING.replace("BEGIN", "\n<seed:think>").replace("END{", "</seed:think>\n{")
    + "{{ m.content }}"
    + END
    + "{% endif %}",
    "Kimi K3": TURN
    + "<|open|>think<|sep|>{{ m.reasoning_content }}<|close|>think<|sep|><|open|>response<|sep|>{{ m.content }}"
    + "<|close|>response<|sep|>"
    + END
    + "<|open|>think<|sep|>{% endif %}",
    "Apriel": TURN
    + "{% if m.reasoning_content %}Here are my reasoning steps:\n{{ m.reasoning_content }}\n[BEGIN FINAL RESPONSE]\n{% endif %}"
    + "{{ m.content }}"
    + END
    + "Here are my reasoning steps:\n{% endif %}",
}
MARKS = re.compile(r"<[|/]?[\w:]+\|?>|\[/?THINK\]")


def with_template(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a template, whose marks are special tokens."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*MARKS.findall(template), "</bot>"})})
    return tokenizer


def written_by(renderer: Renderer, **keys: Any) -> tuple[str, str]:
    """Return the prompt of an answer, and what the model is trained to write."""
    rendered = renderer.render(Chat([QUESTION, {"role": "assistant", "content": "It is 4.", **keys}]))[-1]
    begin, end = rendered.spans[-1]
    return rendered.text[:begin], rendered.text[begin:end].removesuffix("</bot>")


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"Command R7B"}))
def test_the_answer_is_found_after_the_reasoning(name: str):
    renderer = Renderer(with_template(TEMPLATES[name]), whole_text=False)
    marks = find_marks(renderer)
    prompt, written = written_by(renderer, reasoning_content="Is it #### 5?")
    assert "Is it #### 5?" in written
    assert marks.answer_in(written, prompt).strip() == "It is 4."
    unfinished = written[: written.index("5?")]
    assert marks.answer_in(unfinished, prompt) == ""
    if name != "Apriel":  # whose prompts ask for reasoning
        prompt, written = written_by(renderer)
        assert marks.answer_in(written, prompt).strip() == "It is 4."


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"Apriel", "Command R7B"}))
def test_the_tokens_around_reasoning_are_marks(name: str):
    renderer = Renderer(with_template(TEMPLATES[name]), whole_text=False)
    written = written_by(renderer, reasoning_content="Is it 5?")[1]
    assert set(MARKS.findall(written)) <= find_marks(renderer).tokens
    assert "</bot>" not in find_marks(renderer).tokens or name == "Kimi K3"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<|START_THINKING|>Is it 5?<|END_THINKING|><|START_RESPONSE|>It is 4.<|END_RESPONSE|>", "It is 4."),
        ("<|START_RESPONSE|>It is 4.<|END_RESPONSE|>", "It is 4."),
        ("<|START_THINKING|>Is it 5?", ""),
        ("<|START_THINKING|>Is it 5?<|END_THINKING|><|START_ACTION|>[]<|END_ACTION|>", ""),
        ("It is 4.", "It is 4."),
    ],
)
def test_marks_of_reasoning_beside_calls_are_those_of_answers(text: str, answer: str):
    """Command R7B's template reads reasoning only beside calls, but the model also reasons after their results."""
    renderer = Renderer(with_template(TEMPLATES["Command R7B"]), whole_text=False)
    assert find_marks(renderer).answer_in(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("[THINK]Is it 5?[/THINK]It is 4.", "It is 4."),
        ("Is it 5?[/THINK]It is 4.", "It is 4."),
        ("[THINK]Is it 5?", ""),
        ("<think>\nIs it 5?\n</think>\n\nIt is 4.", "\n\nIt is 4."),
        ("<think>\nIs it 5?", ""),
        ("It is [THINK] 4.", "It is [THINK] 4."),
    ],
)
def test_reasoning_that_rows_have_in_their_text_is_found(text: str, answer: str):
    renderer = Renderer(with_template(TEMPLATES["Mistral"]), whole_text=False)
    assert find_marks(renderer).answer_in(text) == answer


def test_templates_without_reasoning_have_the_marks_of_think_tags():
    assert find_marks(Renderer(make_tokenizer(), whole_text=False)) == AnswerMarks()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert find_marks(Renderer(tokenizer, whole_text=False)) == AnswerMarks()


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("qwen3", ("<think>", "</think>", "")),
        ("gemma4", ("<|channel>thought", "<channel|>", "")),
        ("gemma4_v5", ("<|channel>thought", "<channel|>", "")),
        (
            "muse_glimmer",
            ("to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>", "to=user<|message|>"),
        ),
    ],
)
def test_marks_of_templates_of_models(name: str, marks: tuple[str, str, str]):
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    found = find_marks(Renderer(with_template(template), whole_text=False))
    assert (found.opening, found.closing, found.header) == marks


@pytest.mark.parametrize("name", ["Mistral", "Seed", "plain"])
@pytest.mark.parametrize("in_text", [False, True])
def test_prompts_of_requests_have_the_reasoning_of_earlier_turns_as_rows_do(name: str, in_text: bool):
    plain = TURN + "{{ m.content }}" + END + "{% endif %}"
    renderer = Renderer(with_template({**TEMPLATES, "plain": plain}[name]), whole_text=False)
    answers: list[dict[str, Any]] = [
        {"role": "assistant", "content": f"<think>\nIs it {number}?\n</think>\n\nYes."}
        if in_text or name == "plain"
        else {"role": "assistant", "content": "Yes.", "reasoning_content": f"Is it {number}?"}
        for number in (4, 5)
    ]
    messages = [QUESTION, answers[0], QUESTION, answers[1]]
    (rendered,) = renderer.render(Chat(messages))
    prompt = rendered.text[: rendered.spans[-1][0]]
    assert "Is it 4?" in prompt
    assert renderer.prompt(Chat(messages[:-1])) == prompt


def test_empty_thoughts_in_tags_are_removed_for_templates_that_read_parts():
    renderer = Renderer(with_template(TEMPLATES["Mistral"]), whole_text=False)
    answer = {"role": "assistant", "content": "<think>\n\n</think>\n\nIt is 4."}
    (rendered,) = renderer.render(Chat([QUESTION, answer]))
    assert rendered.text.endswith("<bot>It is 4.</bot>")
    assert any("empty thoughts" in note for note in rendered.notes)


def test_tool_plans_are_read_as_reasoning():
    """Cohere's API and templates have a plan beside calls."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    calling = {"role": "assistant", "tool_plan": "I add them.", "tool_calls": [call]}
    chat = read_chat([QUESTION, calling], "messages", None)
    (rendered,) = Renderer(with_template(TEMPLATES["Command R7B"]), whole_text=False).render(chat)
    assert "<|START_THINKING|>I add them.<|END_THINKING|><|START_ACTION|>add" in rendered.text


def test_tools_that_a_template_drops_are_named_although_other_forms_drop_the_reasoning():
    renderer = Renderer(with_template(TEMPLATES["Mistral"]), whole_text=False)
    answer = {"role": "assistant", "content": "It is 4.", "reasoning_content": "Is it 5?"}
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    with pytest.raises(RowError, match=r"`tools`: the chat template drops a tool \('add'\)"):
        renderer.render(Chat([QUESTION, answer], [tool]))

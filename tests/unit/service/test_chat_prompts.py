"""Prompts of requests are the renderings of training, and call forms are read from the chat template."""

import json
from datetime import datetime, tzinfo
from typing import Any, Self

import pytest

from service.engine import ChatRequest, Sampling, ToolCall
from service.errors import ApiError
from service.models import ServedModel
from service.prompts import CallForm, ChatFormat, split_calls
from tests.support.tiny_model import CHAT_TEMPLATE, make_tokenizer
from training.data.chats import read_chat, read_question
from training.data.renderer import Renderer

HERMES = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LISTED = HERMES.replace("{% for c in m.tool_calls or [] %}", "{% if m.tool_calls %}[CALLS][").replace(
    "<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}",
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}",
)
BARE = HERMES.replace(
    "<tool_call>\n{{ c.function | tojson }}\n</tool_call>", "{{ c.function | tojson }}"
).replace("c.function | tojson", "{'name': c.function.name, 'parameters': c.function.arguments} | tojson")
PYTHONIC = HERMES.replace("{{ c.function | tojson }}", "{{ c.function.name }}({{ c.function.arguments }})")
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}},
}
# The escapes of half a character: no response in UTF-8 could contain it.
SURROGATE = r'<c>{"name": "f", "arguments": {"city": "\ud83d"}}</c>'
SURROGATE_TEXT = r'<c>{"name": "f", "arguments": "{\"city\": \"\ud83d\"}"}</c>'
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def make_format(tokenizer: Any, template: str | None, **variables: Any) -> ChatFormat:
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, variables=variables, context=512, model="tiny")


def asked(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **variables: Any
) -> ChatRequest:
    question = read_question(messages, tools)
    return ChatRequest(
        ServedModel("m", "m", None), question.messages, tools, variables, Sampling(max_tokens=5)
    )


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, HERMES, LISTED], ids=["plain", "tags", "list"])
def test_prompt_is_the_rendering_of_training(tokenizer: Any, template: str):
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Rome?"}]},
    ]
    tools = None
    if template != CHAT_TEMPLATE:
        tools = [TOOL]
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ]
    form = make_format(tokenizer, template)
    row = read_chat([*messages, {"role": "assistant", "content": "It is sunny."}], "messages", tools)
    (rendered,) = Renderer(tokenizer, whole_text=False, turns="last").render(row)
    prompt = rendered.text[: rendered.spans[-1][0]]
    assert tokenizer.decode(form.encode(asked(messages, tools)), skip_special_tokens=False) == prompt


def test_variables_of_the_request_override_those_of_the_model(tokenizer: Any):
    template = CHAT_TEMPLATE.replace("assistant\n'", "assistant' + mood + '\n'")
    form = make_format(tokenizer, template, mood=" calm")
    question = [{"role": "user", "content": "Hi"}]
    assert " calm" in tokenizer.decode(form.encode(asked(question)))
    assert " merry" in tokenizer.decode(form.encode(asked(question, mood=" merry")))


def test_prompt_has_the_date_of_the_request(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    class Clock(datetime):
        number = 1

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls(2026, 1, cls.number, 23, 59, tzinfo=tz)

    monkeypatch.setattr("training.data.chat_template.datetime", Clock)
    form = make_format(tokenizer, "{{ strftime_now('%Y-%m-%d') }} " + CHAT_TEMPLATE)
    question = asked([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(form.encode(question)).startswith("2026-01-01")
    Clock.number = 2
    assert tokenizer.decode(form.encode(question)).startswith("2026-01-02")


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (HERMES, CallForm("<tool_call>", "</tool_call>")),
        (LISTED, CallForm("[CALLS]", "")),
        (BARE, CallForm("", "")),
    ],
    ids=["tags", "list", "bare"],
)
def test_call_form_is_read_from_the_template(tokenizer: Any, template: str, form: CallForm):
    assert make_format(tokenizer, template).call_form() == form


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PYTHONIC], ids=["no calls", "not JSON"])
def test_tools_are_rejected_if_the_template_writes_no_json_calls(tokenizer: Any, template: str):
    form = make_format(tokenizer, template)
    with pytest.raises(ApiError) as raised:
        form.encode(asked([{"role": "user", "content": "Hi"}], [TOOL]))
    assert (raised.value.status, raised.value.param) == (400, "tools")


def test_text_that_the_template_drops_is_an_error(tokenizer: Any):
    form = make_format(
        tokenizer, CHAT_TEMPLATE.replace("{% for message in messages %}", "{% for message in messages[1:] %}")
    )
    with pytest.raises(ApiError) as raised:
        form.encode(asked([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]))
    assert raised.value.param == "messages"
    assert "drops" in raised.value.message


def test_words_that_quote_the_template_are_reported_and_rendered_prompts_are_an_error(tokenizer: Any):
    form = make_format(tokenizer, CHAT_TEMPLATE)
    quote = "What does <|im_start|>assistant do?"
    assert quote in tokenizer.decode(form.encode(asked([{"role": "user", "content": quote}])))
    with pytest.raises(ApiError) as raised:
        form.encode(
            asked([{"role": "user", "content": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"}])
        )
    assert "rendered already" in raised.value.message


def test_model_without_a_template_is_an_error(tokenizer: Any):
    with pytest.raises(ApiError) as raised:
        make_format(tokenizer, None).encode(asked([{"role": "user", "content": "Hi"}]))
    assert raised.value.param == "model"


@pytest.mark.parametrize(
    ("text", "form", "content", "cities"),
    [
        ('[CALLS][{"name": "f", "arguments": {"city": "a"}}, {"name": "f", "arguments": {"city": "b"}}]', CallForm("[CALLS]", ""), "", ["a", "b"]),
        ('{"name": "f", "parameters": {"city": "a"}}', CallForm("", ""), "", ["a"]),
        ('{"city": "a"}', CallForm("", ""), '{"city": "a"}', []),
        ('<c>{"name": "f", "arguments": "{\\"city\\": \\"a\\"}"}</c> done', CallForm("<c>", "</c>"), "done", ["a"]),
        ('<c>{"name": "f"}</c>', CallForm("<c>", "</c>"), '<c>{"name": "f"}</c>', []),
        (SURROGATE, CallForm("<c>", "</c>"), SURROGATE, []),
        (SURROGATE_TEXT, CallForm("<c>", "</c>"), SURROGATE_TEXT, []),
    ],
    ids=["list", "parameters", "not a call", "arguments as text", "no arguments", "no Unicode", "no Unicode as text"],
)  # fmt: skip
def test_calls_are_split_from_content(text: str, form: CallForm, content: str, cities: list[str]):
    found, calls = split_calls(text, form)
    assert found == content
    assert calls == tuple(ToolCall("f", json.dumps({"city": city})) for city in cities)

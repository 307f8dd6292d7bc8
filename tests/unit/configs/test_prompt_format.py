"""The chat template that replaces LLMForge's `prompt_format` renders the same text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from configs.prompt_format import to_chat_template

LLAMA_3 = {
    "bos": "<|begin_of_text|>",
    "system": "<|start_header_id|>system<|end_header_id|>\n\n{instruction}<|eot_id|>",
    "user": "<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>",
    "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n{instruction}<|eot_id|>",
    "trailing_assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
MISTRAL = {
    "system": "{instruction} + ",
    "user": "[INST] {system}{instruction} [/INST]",
    "assistant": "{instruction}</s> ",
    "trailing_assistant": "",
    "system_in_user": True,
    "default_system_message": "Always assist with care.",
}
ODD = {
    "system": "{{\"said\": '{instruction}'}}\\\n",
    "user": "\n{instruction}🍎 {{{{ }}}} {{% x %}}\r\n",
    "assistant": "\t# {instruction}",
    "trailing_assistant": "\t",
    "default_system_message": 'Naïve "quotes" {% if %}',
    "strip_whitespace": False,
}
FORMATS: dict[str, dict[str, Any]] = {
    "llama 3": LLAMA_3,
    "mistral": MISTRAL,
    "odd": ODD,
    "tags": LLAMA_3 | {"add_system_tags_even_if_message_is_empty": True},
    "tags in user": MISTRAL
    | {"default_system_message": "", "add_system_tags_even_if_message_is_empty": True},
}


def reference_text(turns: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """Render messages with a prompt_format in plain Python, as the reference."""

    def clean(text: str) -> str:
        return text.strip() if turns.get("strip_whitespace", True) else text

    system_message = turns.get("default_system_message", "")
    if messages[0]["role"] == "system":
        system_message, messages = messages[0]["content"], messages[1:]
    system = ""
    if clean(system_message) or turns.get("add_system_tags_even_if_message_is_empty", False):
        system = turns["system"].format(instruction=clean(system_message))
    text = turns.get("bos", "")
    if not turns.get("system_in_user", False):
        text, system = text + system, ""
    for message in messages:
        values = {"instruction": clean(message["content"])}
        if message["role"] == "user" and turns.get("system_in_user", False):
            values, system = values | {"system": system}, ""
        text += turns[message["role"]].format(**values)
    return text


def render(turns: dict[str, Any], messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    (text,), _ = render_jinja_template(
        [messages], chat_template=to_chat_template(turns), add_generation_prompt=prompt
    )
    return text


def chat(system: str | None, pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


_content = st.text(min_size=1, max_size=8) | st.sampled_from([" {instruction} ", "{{ bos }}", "\n a \n"])


@pytest.mark.parametrize("name", list(FORMATS))
@given(system=st.none() | _content, pairs=st.lists(st.tuples(_content, _content), min_size=1, max_size=3))
def test_chat_template_renders_the_text_of_the_prompt_format(
    name: str, system: str | None, pairs: list[tuple[str, str]]
):
    turns, messages = FORMATS[name], chat(system, pairs)
    full_text = reference_text(turns, messages)
    assert render(turns, messages) == full_text
    prompt = render(turns, messages[:-1], prompt=True)
    assert prompt == reference_text(turns, messages[:-1]) + turns["trailing_assistant"]
    assert full_text.startswith(prompt)


def test_role_missing_from_the_prompt_format_raises_an_error():
    with pytest.raises(TemplateError, match="tool"):
        render(LLAMA_3, [*chat(None, [("2 + 2?", "4")]), {"role": "tool", "content": "4"}])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("{instruction}", "turns"),
        ({"user": "{instruction}"}, "`system`"),
        (LLAMA_3 | {"image": "x"}, "`image`"),
        (LLAMA_3 | {"user": "what"}, r"`user`.*\['system'\].*\['instruction', 'system'\]"),
        (LLAMA_3 | {"user": "{instruction} {text}"}, "`user`.*'text'"),
        (LLAMA_3 | {"user": "{instruction"}, "`user`: "),
        (LLAMA_3 | {"system_in_user": True}, r"`user`.*\['instruction'\].*\['instruction', 'system'\]"),
        (LLAMA_3 | {"bos": "{instruction}"}, r"`bos`.*\['instruction'\].*\[\]"),
        (LLAMA_3 | {"trailing_assistant": "Answer:"}, "`assistant`.*`trailing_assistant`"),
    ],
)
def test_invalid_prompt_format_raises_an_error_with_the_reason(turns: Any, reason: str):
    with pytest.raises(ValueError, match=reason):
        to_chat_template(turns)

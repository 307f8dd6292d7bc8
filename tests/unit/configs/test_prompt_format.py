"""The chat template that takes the place of LLMForge's `prompt_format` writes the same text."""

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


def lay_out(turns: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """What a prompt_format means, in Python."""

    def clean(text: str) -> str:
        return text.strip() if turns.get("strip_whitespace", True) else text

    said = turns.get("default_system_message", "")
    if messages[0]["role"] == "system":
        said, messages = messages[0]["content"], messages[1:]
    system = ""
    if clean(said) or turns.get("add_system_tags_even_if_message_is_empty", False):
        system = turns["system"].format(instruction=clean(said))
    text = turns.get("bos", "")
    if not turns.get("system_in_user", False):
        text, system = text + system, ""
    for message in messages:
        places = {"instruction": clean(message["content"])}
        if message["role"] == "user" and turns.get("system_in_user", False):
            places, system = places | {"system": system}, ""
        text += turns[message["role"]].format(**places)
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


_said = st.text(min_size=1, max_size=8) | st.sampled_from([" {instruction} ", "{{ bos }}", "\n a \n"])


@pytest.mark.parametrize("name", list(FORMATS))
@given(system=st.none() | _said, pairs=st.lists(st.tuples(_said, _said), min_size=1, max_size=3))
def test_the_text_is_the_same(name: str, system: str | None, pairs: list[tuple[str, str]]):
    turns, messages = FORMATS[name], chat(system, pairs)
    whole = lay_out(turns, messages)
    assert render(turns, messages) == whole
    asked = render(turns, messages[:-1], prompt=True)
    assert asked == lay_out(turns, messages[:-1]) + turns["trailing_assistant"]
    assert whole.startswith(asked)


def test_a_role_without_a_turn_raises_an_error():
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
def test_turns_that_no_template_can_render_raise_an_error(turns: Any, reason: str):
    with pytest.raises(ValueError, match=reason):
        to_chat_template(turns)

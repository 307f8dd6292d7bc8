"""Convert LLMForge's `generation_config.prompt_format` to an equivalent chat template (Jinja)."""

import json
import string
from typing import Any

from pydantic import ValidationError

from configs.schema import Section


class _PromptFormat(Section):
    """Format of each turn: `{instruction}` is the content; `{system}` in `user` is the formatted system turn."""

    system: str
    user: str
    assistant: str
    trailing_assistant: str = ""
    """Start of the assistant turn that the model continues (the generation prompt)."""
    default_system_message: str = ""
    system_in_user: bool = False
    """Insert the system turn at `{system}` of the first user turn; otherwise before it."""
    add_system_tags_even_if_message_is_empty: bool = False
    strip_whitespace: bool = True
    """Strip whitespace around the content."""
    bos: str = ""
    """Text at the start of the conversation."""


def to_chat_template(prompt_format: Any) -> str:
    """Return a chat template that renders the same text as a `prompt_format`.

    Raises:
        ValueError: no template can do so; the message names the part of the format that prevents it.
    """
    if not isinstance(prompt_format, dict):
        raise ValueError("it is not a mapping of turns")
    try:
        turns = _PromptFormat.model_validate(prompt_format)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None
    if not turns.assistant.partition("{instruction}")[0].startswith(turns.trailing_assistant):
        raise ValueError("`assistant` does not start with `trailing_assistant`, the generation prompt")
    user = turns.user if turns.system_in_user else "{system}" + turns.user
    trim = " | trim" if turns.strip_whitespace else ""
    is_written = "true" if turns.add_system_tags_even_if_message_is_empty else "said"
    default = json.dumps(turns.default_system_message, ensure_ascii=False)
    return "".join(
        [
            _write("bos", turns.bos),
            "{% set has_system = messages[0]['role'] == 'system' %}",
            f"{{% set said = (messages[0]['content'] if has_system else {default}){trim} %}}",
            "{% for message in messages %}",
            "{% if message['role'] == 'user' %}",
            f"{{% if loop.index0 == has_system | int and {is_written} %}}",
            "{% set system %}"
            + _write("system", turns.system, instruction="said")
            + "{% endset %}{% endif %}",
            _write("user", user, instruction=f"message['content']{trim}", system="(system or '')"),
            "{% elif message['role'] == 'assistant' %}",
            _write("assistant", turns.assistant, instruction=f"message['content']{trim}"),
            "{% elif not loop.first or not has_system %}",
            "{{ raise_exception('prompt_format does not support messages with the role ' + message['role']) }}",
            "{% endif %}{% endfor %}",
            "{% if add_generation_prompt %}"
            + _write("trailing_assistant", turns.trailing_assistant)
            + "{% endif %}",
        ]
    )


def _write(key: str, text: str, **places: str) -> str:
    """Return Jinja source that prints a text with Jinja expressions at its {placeholders}."""
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"`{key}`: {error}") from None
    names = [name for _, name, _, _ in pieces if name is not None]
    if sorted(names) != sorted(places):
        raise ValueError(f"`{key}` has the placeholders {names}, but needs {list(places)}, each once")
    printed: list[str] = []
    for literal, name, _, _ in pieces:
        if literal:
            printed.append(json.dumps(literal, ensure_ascii=False))
        if name:
            printed.append(places[name])
    return "".join(f"{{{{ {expression} }}}}" for expression in printed)

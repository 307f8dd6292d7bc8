"""LLMForge's `generation_config.prompt_format` -> the chat template (Jinja) that lays out the same text."""

import json
import string
from typing import Any

from pydantic import ValidationError

from configs.schema import Section


class _PromptFormat(Section):
    """How each turn is written: `{instruction}` is what was said, `{system}` in `user` the whole system turn."""

    system: str
    user: str
    assistant: str
    trailing_assistant: str = ""
    """What the model is asked to go on from."""
    default_system_message: str = ""
    system_in_user: bool = False
    """The system turn is written at `{system}` of the first user turn; else before it."""
    add_system_tags_even_if_message_is_empty: bool = False
    strip_whitespace: bool = True
    """Around what was said."""
    bos: str = ""
    """At the very beginning."""


def to_chat_template(prompt_format: Any) -> str:
    """The template that writes what a `prompt_format` writes.

    Raises:
        ValueError: there is none; the message says what of the format is in the way.
    """
    if not isinstance(prompt_format, dict):
        raise ValueError("it holds no turns")
    try:
        turns = _PromptFormat.model_validate(prompt_format)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None
    if not turns.assistant.partition("{instruction}")[0].startswith(turns.trailing_assistant):
        raise ValueError(
            "`assistant` does not begin with `trailing_assistant`, behind which a model is asked"
        )
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
            "{{ raise_exception('prompt_format has no place for a message from the ' + message['role']) }}",
            "{% endif %}{% endfor %}",
            "{% if add_generation_prompt %}"
            + _write("trailing_assistant", turns.trailing_assistant)
            + "{% endif %}",
        ]
    )


def _write(key: str, text: str, **places: str) -> str:
    """Jinja that prints a text with Jinja expressions at its {places}."""
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"`{key}`: {error}") from None
    names = [name for _, name, _, _ in pieces if name is not None]
    if sorted(names) != sorted(places):
        raise ValueError(f"`{key}` has the places {names}, and should have {list(places)}, each once")
    printed: list[str] = []
    for literal, name, _, _ in pieces:
        if literal:
            printed.append(json.dumps(literal, ensure_ascii=False))
        if name:
            printed.append(places[name])
    return "".join(f"{{{{ {expression} }}}}" for expression in printed)

#!/usr/bin/env bash
# Words that an assistant writes beside a tool call do not stay where it wrote them.
#
# Gemma 4's chat template (fifth revision) prints the words after the tool's result, directly before the next answer: the
# model's context shows "Let me look.21 degrees" as one answer. gpt-oss's template prints the words as analysis while the tool
# result is the last message, and removes them as soon as an answer follows. So the prompt of the second turn is not the
# beginning of the complete rendering, and code that masks the loss by rendering prefixes trains the wrong tokens or fails.
#
# Seen with trl==1.15.0, which ships copies of both templates, and jinja2==3.1.6.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check jinja2==3.1.6
"$directory/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$directory/trl" trl==1.15.0
"$directory/venv/bin/python" - "$directory/trl/trl/chat_templates" <<'PYTHON'
import json
import sys
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
environment.globals["strftime_now"] = lambda _: "2026-11-29"
call = {"type": "function", "id": "1", "function": {"name": "look", "arguments": {"city": "Oslo"}}}
messages = [
    {"role": "user", "content": "How warm is it?"},
    {"role": "assistant", "content": "Let me look.", "tool_calls": [call]},
    {"role": "tool", "tool_call_id": "1", "name": "look", "content": "21"},
    {"role": "assistant", "content": "21 degrees"},
]


def render(name: str, count: int, **keys: object) -> str:
    template = environment.from_string((Path(sys.argv[1]) / f"{name}.jinja").read_text())
    return template.render(messages=messages[:count], tools=None, bos_token="", eos_token="", **keys)


def check(name: str, found: bool, expected: bool, what: str) -> None:
    print(f"{name}: {what}: {expected}")
    if found is not expected:
        sys.exit(f"{name}: this has changed")


gemma, gpt = render("gemma4_v5", 4), render("gptoss", 4)
check("gemma4_v5", gemma.index("Let me look.") > gemma.index("21"), True, "the words stand after the tool's result")
check("gemma4_v5", "Let me look.21 degrees" in gemma, True, "the words and the next answer are one text")
check("gptoss", "Let me look." in render("gptoss", 3, add_generation_prompt=True), True, "the words are in the prompt of the answer")
check("gptoss", "Let me look." in gpt, False, "the words are in the complete rendering")
PYTHON

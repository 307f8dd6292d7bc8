#!/usr/bin/env bash
# Outside transformers, the same chat template writes "the user's order" in a tool as "the user\u0027s order".
#
# A chat template is Jinja, and its text is stored with the model, so one expects the same prompt from each engine that renders it.
# But templates print tools and arguments with `tojson`, whose meaning is up to the engine. transformers replaces Jinja's filter by
# json.dumps. Jinja's own filter and that of minijinja (the engine of Rust servers, such as text-generation-inference) make JSON for
# HTML: ' < > & become \u0027 \u003c \u003e \u0026. A model that was fine-tuned with transformers never saw these in a tool, and each
# of them takes several tokens. Nothing fails, and tools without such characters look right. An engine has to replace the filter
# in its environment, as transformers does.
#
# Seen with trl==1.15.0, which ships templates of the models, jinja2==3.1.6 and minijinja==3.1.0.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check jinja2==3.1.6 minijinja==3.1.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$directory/trl" trl==1.15.0
"$directory/venv/bin/python" - "$directory/trl/trl/chat_templates" <<'PYTHON'
import json
import sys
from pathlib import Path

import minijinja
from jinja2.sandbox import ImmutableSandboxedEnvironment

NAMES = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_6", "llama3_1", "llama3_2", "lfm2", "gptoss", "gemma4_v5")
DESCRIPTION = "Return the user's orders with a price < 10 & a date."
ESCAPED = r"Return the user\u0027s orders with a price \u003c 10 \u0026 a date."
city = {"type": "object", "properties": {"city": {"type": "string", "description": DESCRIPTION}}}
tools = [{"type": "function", "function": {"name": "find", "description": DESCRIPTION, "parameters": city}}]
messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Which orders?"}]
variables = {"messages": messages, "tools": tools, "bos_token": "", "add_generation_prompt": True}


def today(_: str) -> str:
    return "29 Nov 2026"


def jinja2(template: str, *, as_transformers: bool) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["strftime_now"] = today
    if as_transformers:  # transformers/utils/chat_template_utils.py
        environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None: json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent
        )
    return environment.from_string(template).render(**variables)


def rust(template: str) -> str:
    environment = minijinja.Environment(pycompat=True)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.add_global("strftime_now", today)
    return environment.render_str(template, **variables)


escaped = {"jinja2": 0, "minijinja": 0}
for name in NAMES:
    template = (Path(sys.argv[1]) / f"{name}.jinja").read_text()
    prompts = {"jinja2": jinja2(template, as_transformers=False), "minijinja": rust(template)}
    trained = jinja2(template, as_transformers=True)
    if DESCRIPTION not in trained or ESCAPED in trained:
        sys.exit(f"{name}: this has changed")
    found = [engine for engine, prompt in prompts.items() if ESCAPED in prompt and DESCRIPTION not in prompt]
    for engine in found:
        escaped[engine] += 1
    print(f"{name}: {len(trained)} characters, escaped by {', '.join(found) or 'none (this one does not use tojson)'}")
print(f"templates whose tools differ from training, of {len(NAMES)}: {escaped}")
if min(escaped.values()) < 7:
    sys.exit("this has changed")
PYTHON

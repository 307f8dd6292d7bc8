#!/usr/bin/env bash
# A model with two chat templates in its directory is prompted with one of them by transformers, and with the other by llama.cpp.
#
# A chat template is stored in tokenizer_config.json (older models) or in chat_template.jinja (newer ones). Both transformers and
# llama.cpp's converter know both places, and one expects one order of precedence. transformers reads chat_template.jinja
# first, and the `gguf` package, which the converter uses, tokenizer_config.json. So a chat_template.jinja that fixes or extends the
# template of a downloaded model is what training and evaluation with transformers use, and the GGUF file of the model has the
# old one, without a warning. Editing tokenizer_config.json does the opposite. Saving the tokenizer with transformers 5 leaves
# chat_template.jinja alone in the directory, and both agree again.
#
# Here, transformers prompts "<|user|>What is 2 + 3?<|assistant|>", and llama.cpp "[INST]What is 2 + 3?[/INST]".
#
# Seen with transformers==5.17.0, gguf==0.19.0 and jinja2==3.1.6.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 gguf==0.19.0 jinja2==3.1.6
"$directory/venv/bin/python" - "$directory" 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

import gguf
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

IN_CONFIG = "{% for message in messages %}[INST]{{ message.content }}[/INST]{% endfor %}"
IN_FILE = "{% for message in messages %}<|user|>{{ message.content }}<|assistant|>{% endfor %}"
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]


def templates(model: Path) -> tuple[str, str]:
    """Return the chat templates that transformers and llama.cpp's converter read from a model's directory."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    read = tokenizer.chat_template, gguf.SpecialVocab(model).chat_template
    for name, template in zip(("transformers", "llama.cpp"), read, strict=True):
        prompt = tokenizer.apply_chat_template(MESSAGES, chat_template=template, tokenize=False)
        print(f"{model.name}: {name} prompts {prompt!r}")
    return read


def save(model: Path, in_config: str | None, in_file: str | None) -> None:
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if in_config:
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": in_config}))
    if in_file:
        (model / "chat_template.jinja").write_text(in_file)


directory = Path(sys.argv[1])
save(directory / "config-alone", IN_CONFIG, None)
save(directory / "file-alone", None, IN_FILE)
save(directory / "both", IN_CONFIG, IN_FILE)
same = templates(directory / "config-alone") == (IN_CONFIG, IN_CONFIG) and templates(directory / "file-alone") == (IN_FILE, IN_FILE)
if not same or templates(directory / "both") != (IN_FILE, IN_CONFIG):
    sys.exit("this has changed")
AutoTokenizer.from_pretrained(directory / "both").save_pretrained(directory / "both")
if templates(directory / "both") != (IN_FILE, IN_FILE):
    sys.exit("saving the tokenizer does not remove the other template any more")
PYTHON

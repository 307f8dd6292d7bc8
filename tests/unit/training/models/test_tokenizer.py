"""Tokenizers whose files name a class that treats text differently than their tokenizer.json."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.support.tiny_model import make_model
from training.data.chat_template import ChatTemplate
from training.data.errors import DataError
from training.data.records import Chat
from training.models.files import ModelError
from training.models.tokenizer import load_tokenizer

TEXT = "Order 1234567 costs $12.\n\nIt's 3 items"


def name_class(model: Path, name: str, model_type: str) -> None:
    """Write a tokenizer class and a model type into the files of a model."""
    for file, key, value in (
        ("tokenizer_config.json", "tokenizer_class", name),
        ("config.json", "model_type", model_type),
    ):
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | {key: value}))


@pytest.mark.parametrize(
    ("name", "model_type"),
    [("LlamaTokenizerFast", "llama"), ("LlamaTokenizerFast", "qwen3"), ("PreTrainedTokenizerFast", "qwen2")],
)
def test_text_is_tokenized_as_tokenizer_json_says(name: str, model_type: str, tmp_path: Path):
    make_model(tmp_path)
    name_class(tmp_path, name, model_type)
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids
    # The reason for the check: transformers 5 builds another tokenizer.
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] != expected

    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False, chat_template=None)
    assert tokenizer(TEXT)["input_ids"] == expected
    assert tokenizer.decode(expected) == TEXT
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template is not None


def test_truncation_stored_in_tokenizer_json_does_not_matter(tmp_path: Path):
    make_model(tmp_path)
    stored = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.save(str(tmp_path / "tokenizer.json"))
    name_class(tmp_path, "LlamaTokenizerFast", "llama")
    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False, chat_template=None)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_file_is_named(name: str, content: str, tmp_path: Path):
    make_model(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(
        ModelError, match=rf"^model a/tiny: {re.escape(name)}: the tokenizer cannot be loaded"
    ):
        load_tokenizer(tmp_path, trust_remote_code=False, chat_template=None, source="a/tiny")


def test_damaged_tokenizer_of_an_adapter_is_named_with_both_fixes(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    message = r"^adapter a/b: tokenizer\.json: the tokenizer beside the adapter .*where the adapter was saved, or delete them"
    with pytest.raises(ModelError, match=message):
        load_tokenizer(tmp_path, trust_remote_code=False, chat_template=None, source="a/b", owner="adapter")


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer_config.json"]
)
def test_chat_template_with_a_syntax_error_is_named(file: str, tmp_path: Path):
    make_model(tmp_path)
    template, broken = tmp_path / "chat_template.jinja", "{% for m in messages %}{{ m.content }"
    place = tmp_path / file
    if place.suffix == ".json":
        template.unlink()
        place.write_text(json.dumps(json.loads(place.read_text()) | {"chat_template": broken}))
    else:
        place.parent.mkdir(exist_ok=True)
        place.write_text(broken)
    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False, chat_template=None)
    chat = Chat([{"role": "user", "content": "Hi"}], tools=[{"type": "function"}])
    with pytest.raises(DataError, match=rf"^{re.escape(str(place))}: the chat template has a syntax error"):
        ChatTemplate(tokenizer).render(chat.messages, chat)
    tokenizer.chat_template = broken + " "
    with pytest.raises(DataError, match=r"^the chat template has a syntax error"):
        ChatTemplate(tokenizer).render(chat.messages, chat)

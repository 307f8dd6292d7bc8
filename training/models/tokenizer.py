"""Load a model's tokenizer, with an optional chat template from the YAML."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from configs.loading import ConfigError
from configs.schema import FinetuneConfig
from training.models.files import ModelError
from utils.errors import first_line
from utils.processes import importing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Spaces, line ends, numbers, contractions, code and accents, on which pre-tokenizers differ. It begins with a letter, because
# transformers' Llama tokenizer treats a leading space as sentencepiece does, and older tokenizer.json files do not.
_PROBE = "Order 1234567 costs $12.50.\r\n\n  It's WE'LL  caf\u00e9 cafe\u0301\n\tdef f_1(x): return x != 3  # \u4f60\u597d\u3002"


def load_tokenizer(
    directory: Path,
    *,
    trust_remote_code: bool,
    chat_template: str | None,
    source: str | None = None,
    owner: Literal["model", "adapter"] = "model",
) -> "PreTrainedTokenizerFast":
    """Load the model's tokenizer.

    For some values of `tokenizer_class`, transformers 5 builds a tokenizer from the vocabulary, with the class's own treatment of
    spaces and numbers (LlamaTokenizerFast drops all spaces of a byte-level vocabulary). tokenizer.json decides here, as in other
    engines.

    Args:
        directory: Local directory with the tokenizer files.
        trust_remote_code: True if code in the directory may be executed.
        chat_template: Jinja source that replaces the model's template, or None.
        source: Name of the model or adapter in messages; defaults to the directory.
        owner: An adapter whose tokenizer is unusable can be continued with that of its base model.
    """
    with importing():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if type(tokenizer).__module__.startswith("transformers.") and not _follows_file(tokenizer, directory):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # tokenizers raises plain Exception for a corrupt file
        subject, fix = {
            "model": ("the tokenizer", "from the original model"),
            "adapter": (
                "the tokenizer beside the adapter",
                "from where the adapter was saved, or delete them to use the base model's",
            ),
        }[owner]
        raise ModelError(
            f"{owner} {source or directory}: {_damaged_file(directory)}{subject} cannot be loaded ({first_line(error)}). Copy the tokenizer "
            f"files again {fix}. A tokenizer with custom code also needs trust_remote_code: true."
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{owner} {source or directory}: the tokenizer gives no character offsets (it has no tokenizer.json). Convert it to a fast tokenizer."
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if tokenizer.pad_token_id is None:
        # Any token works, because padding is always masked.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _damaged_file(directory: Path) -> str:
    """Return the first file of a tokenizer that is no JSON object, as a message names it; empty if there is none."""
    for file in (directory / name for name in _JSON_FILES):
        try:
            is_object = not file.exists() or isinstance(json.loads(file.read_text("utf-8")), dict)
        except ValueError:
            is_object = False
        if not is_object:
            return f"{file.name}: "
    return ""


def _follows_file(tokenizer: "PreTrainedTokenizerFast", directory: Path) -> bool:
    """Return whether the tokenizer encodes text as the directory's tokenizer.json does."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = directory / "tokenizer.json"
    if type(tokenizer) is PreTrainedTokenizerFast or not tokenizer.is_fast or not file.exists():
        return True
    stored = Tokenizer.from_file(str(file))
    stored.no_truncation()
    stored.no_padding()
    expected = stored.encode(_PROBE, add_special_tokens=False).ids
    return tokenizer(_PROBE, add_special_tokens=False)["input_ids"] == expected


def is_template(value: str) -> bool:
    """Return whether `chat_template` is Jinja source and not a file name."""
    return "{%" in value or "{{" in value


def describe_template(config: FinetuneConfig, base: str) -> str:
    """Return where the chat template comes from, as errors name it."""
    if config.chat_template is None:
        return f"that of the model {base}"
    return "inline (chat_template)" if is_template(config.chat_template) else config.chat_template


def read_chat_template(config: FinetuneConfig) -> str | None:
    """Return the Jinja source of `chat_template`, which is inline or in a file."""
    from jinja2 import Environment, TemplateSyntaxError

    value = config.chat_template
    if value is None:
        return None
    if is_template(value):
        text, place = value, "chat_template"
    else:
        place = f"chat_template: {value}"
        try:
            text = Path(value).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{place} cannot be read ({error}). Use the path of a Jinja file, or write the template inline."
            ) from error
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        )
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{place}, line {error.lineno}: invalid Jinja template ({error}). Fix the syntax."
        ) from error
    return text

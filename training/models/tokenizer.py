"""The tokenizer of a model, and the chat template that a YAML may put in its place."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from configs.loading import ConfigError
from configs.schema import FinetuneConfig
from training.models.files import ModelError, first_line
from utils.processes import importing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(
    directory: Path, *, trust_remote_code: bool, chat_template: str | None, source: str | None = None
) -> "PreTrainedTokenizerFast":
    """The model's own tokenizer.

    Args:
        directory: The model's files on this node.
        trust_remote_code: Whether code that lies beside them may run.
        chat_template: What takes the place of its own, if anything.
        source: What messages call the model; the directory, when it is not given.

    Raises:
        ModelError: it cannot be loaded, or gives no character offsets.
    """
    with importing():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers has no class of its own for a damaged file
        raise ModelError(
            f"model {source or directory}: its tokenizer cannot be loaded ({first_line(error)}). Copy its tokenizer files again from "
            "where the model came from; one that needs code of its own also needs trust_remote_code: true."
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"model {source or directory}: its tokenizer gives no character offsets (it has no tokenizer.json). Convert it to a fast one."
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so which token it is does not matter.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def is_template(said: str) -> bool:
    """Whether `chat_template` holds Jinja text, and names no file of it."""
    return "{%" in said or "{{" in said


def read_chat_template(config: FinetuneConfig) -> str | None:
    """The Jinja text that `chat_template` holds or names.

    Raises:
        ConfigError: it names a file that cannot be read, or is no template.
    """
    from jinja2 import Environment, TemplateSyntaxError

    said = config.chat_template
    if said is None:
        return None
    if is_template(said):
        text, place = said, "chat_template"
    else:
        place = f"chat_template: {said}"
        try:
            text = Path(said).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{place} cannot be read ({error}). Name a file of Jinja text, or write the template itself."
            ) from error
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        )
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{place}, line {error.lineno}: is no Jinja template ({error}). Mend it."
        ) from error
    return text

"""What decides how sources become tokens, and the key that follows from it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from configs.schema import DataFormat
from training.data.rows import Task
from training.data.sources import DataFile
from utils.files import checksum, checksum_bytes

_FORMAT = 3  # raise it when prepared files change their meaning
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.model",
)


@dataclass(frozen=True)
class DataRequest:
    """What decides how sources become tokens."""

    paths: tuple[str, ...]
    """The sources as the YAML names them."""
    files: tuple[DataFile, ...]
    weights: tuple[float, ...] | None
    """Of each source; None: every row once."""
    task: Task
    data_format: Literal["auto"] | DataFormat
    columns: tuple[tuple[str, str], ...]
    """(our name, the name in the files)."""
    prompt_template: str | None
    chat_template: str | None
    """Jinja text; None: the model's own."""
    labels: tuple[str, ...]
    """Of a classification."""
    context_length: int | None
    """Tokens a row may have; None: as many as it has, at most `max_context`."""
    max_context: int | None
    """Tokens that the model's positions reach."""
    long_rows: Literal["truncate", "drop", "error"]
    bad_rows: Literal["error", "skip"]
    seed: int
    """Chooses rows where a weight takes a part of a source."""

    @property
    def limit(self) -> int | None:
        """Tokens a row may have, if anything limits them."""
        return self.context_length or self.max_context

    def key(self, tokenizer_dir: Path) -> str:
        """Of everything that decides the tokens and how their rows are named.

        Args:
            tokenizer_dir: The tokenizer's files.
        """
        tokenizer_files = [
            checksum(tokenizer_dir / name) for name in _TOKENIZER_FILES if (tokenizer_dir / name).exists()
        ]
        content = json.dumps([_FORMAT, asdict(self), tokenizer_files], sort_keys=True)
        return checksum_bytes(content.encode()).removeprefix("crc64nvme:")

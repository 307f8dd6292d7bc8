"""The request for data preparation, and its cache key."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from configs.schema import DataFormat
from training.data.records import Task, Turns
from training.data.sources import DataFile
from utils.files import checksum, checksum_bytes

_FORMAT = 12  # increment when the meaning of prepared files changes
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.model",
)


@dataclass(frozen=True)
class DataRequest:
    """The sources and all settings that determine their tokens."""

    paths: tuple[str, ...]
    """Source paths from the YAML."""
    files: tuple[DataFile, ...]
    weights: tuple[float, ...] | None
    """Sampling weight of each source; None: every row once per epoch."""
    task: Task
    data_format: Literal["auto"] | DataFormat
    columns: tuple[tuple[str, str], ...]
    """(standard column name, column name in the files)."""
    ignore_columns: tuple[str, ...]
    """Columns that are removed from every row."""
    prompt_template: str | None
    chat_template: str | None
    """Jinja source; None: the model's own template."""
    chat_template_kwargs: tuple[tuple[str, Any], ...]
    """Variables of the chat template."""
    turns: Turns
    """The assistant messages in the loss; see `Renderer`."""
    labels: tuple[str, ...]
    """Classification labels."""
    unpaired: bool
    """True if a row of preference tuning may be one response with a label (loss: kto)."""
    context_length: int | None
    """Maximum tokens per row; None: limited only by `max_context`."""
    max_context: int | None
    """The model's maximum context in tokens."""
    long_rows: Literal["truncate", "drop", "error"]
    bad_rows: Literal["error", "skip"]
    seed: int
    """Seed for sampling rows if a weight takes part of a source, and for the shares of a split."""
    share: tuple[float, float] = (0.0, 1.0)
    """Part of the rows to take, as bounds of a hash of their text: (begin, end), from 0 to 1. Equal rows have equal hashes."""
    new_tokens: tuple[str, ...] = ()
    """Tokens that were added to the tokenizer."""
    date: str | None = None
    """Date that the chat template prints (ISO 8601), if it prints one; None: that of the preparation."""
    max_rows: int | None = None
    """Rows to take from each source, from its start; None: all."""

    @property
    def limit(self) -> int | None:
        """Return the maximum tokens per row, or None without a limit."""
        return self.context_length or self.max_context

    def key(self, tokenizer_dir: Path) -> str:
        """Return a hash of everything that determines the tokens and the source locations of their rows.

        Args:
            tokenizer_dir: Directory of the tokenizer files.
        """
        more = sorted((tokenizer_dir / "additional_chat_templates").glob("*.jinja"))
        paths = [tokenizer_dir / name for name in _TOKENIZER_FILES]
        tokenizer_files = [checksum(path) for path in (*paths, *more) if path.exists()]
        content = json.dumps([_FORMAT, asdict(self), tokenizer_files], sort_keys=True)
        return checksum_bytes(content.encode()).removeprefix("crc64nvme:")

"""Generation settings of a base model, which transformers loads as they are but does not save if some have no effect."""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from training.models.architecture import load_config
from training.models.files import ModelError, first_line

if TYPE_CHECKING:
    from transformers import GenerationConfig

_FILE = "generation_config.json"
_IGNORED = re.compile(r"^- `(\w+)`: ", re.MULTILINE)


def read_generation_config(directory: Path) -> "GenerationConfig":
    """Read a model's generation config as from_pretrained does; old models have these settings in config.json."""
    from transformers import GenerationConfig

    file = _FILE if (directory / _FILE).exists() else "config.json"
    return GenerationConfig.from_pretrained(
        directory, config_file_name=file, _from_model_config=file != _FILE
    )


def remove_ignored(settings: "GenerationConfig") -> list[str]:
    """Reset settings that `generate` ignores, such as a temperature without do_sample, and return their names.

    `save_pretrained` rejects them. Other settings and the generated tokens stay the same.

    Raises:
        ValueError: Other settings are invalid.
    """
    from transformers import GenerationConfig

    try:
        settings.validate(strict=True)
    except ValueError as error:
        ignored = _IGNORED.findall(str(error))
        if not ignored:
            raise
        for name in ignored:
            setattr(settings, name, getattr(GenerationConfig(), name))
        return ignored + remove_ignored(settings)
    return []


def check_savable(directory: Path, source: str, *, trust_remote_code: bool) -> list[str]:
    """Check that transformers can save the model's configs, and return the generation settings that it ignores.

    Args:
        directory: Local directory with the model's configs; weights are not needed.
        source: Name of the model in messages.
        trust_remote_code: True if code in the directory may be executed.

    Raises:
        ModelError: A config cannot be saved.
    """
    config = load_config(directory, source, trust_remote_code)
    file = _FILE if (directory / _FILE).exists() else "config.json"
    try:
        settings = read_generation_config(directory)
        ignored = remove_ignored(settings)
        with tempfile.TemporaryDirectory() as scratch:
            settings.save_pretrained(scratch)
            file = "config.json"
            config.save_pretrained(scratch)
    except (ValueError, TypeError, OSError) as error:
        raise ModelError(
            f"model {source}: {file} can be loaded but not saved with a checkpoint or an export ({first_line(error)}). Correct it in a "
            "copy of the model."
        ) from error
    return ignored

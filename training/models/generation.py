"""Generation settings of a base model, which transformers loads as they are but may not save, or may not generate with."""

import copy
import json
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.models.architecture import load_config
from training.models.files import ModelError
from utils.errors import first_line

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

_FILE = "generation_config.json"
_ACCEPTED: dict[str, Callable[[float], bool]] = {
    "temperature": lambda value: value > 0,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: isinstance(value, int) and value >= 0,
    "min_p": lambda value: 0 <= value <= 1,
    "top_h": lambda value: 0 < value <= 1,
    "typical_p": lambda value: value > 0,
    "repetition_penalty": lambda value: value > 0,
    "encoder_repetition_penalty": lambda value: value > 0,
}
"""Setting -> whether `generate` and servers accept its value. transformers checks these only when it generates."""
_GREEDY = {"temperature", "top_p"}
"""Settings whose values of 0 and below mean greedy decoding in other programs."""
_FOR_SAMPLING = _ACCEPTED.keys() - {"repetition_penalty", "encoder_repetition_penalty"}
_NUMBERS = _ACCEPTED.keys() | {
    "epsilon_cutoff",
    "eta_cutoff",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "num_return_sequences",
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SWITCHES = ("do_sample", "use_cache")
_LIMITS = (("min_length", "max_length"), ("min_new_tokens", "max_new_tokens"))
_NEEDING_MORE = {"cache_config", "cache_implementation", "stop_strings", "token_healing"}
"""Settings for which `generate` needs a GPU or the argument `tokenizer`."""
_CHECKED = {
    *(*_ACCEPTED, *_TOKENS),
    *("do_sample", "max_length", "max_new_tokens", "transformers_version", "use_cache"),
}
"""Settings that need no trial: `generate` accepts each value, or it is checked otherwise."""
_IGNORED = re.compile(r"^- `(\w+)`: [^`]*`(\w+)`", re.MULTILINE)
"""A line of transformers' error: the setting, and the one that it needs."""


def read_generation_config(directory: Path) -> "GenerationConfig":
    """Read a model's generation config as from_pretrained does; old models have these settings in config.json."""
    from transformers import GenerationConfig

    file = _FILE if (directory / _FILE).exists() else "config.json"
    return GenerationConfig.from_pretrained(
        directory, config_file_name=file, _from_model_config=file != _FILE
    )


@dataclass(frozen=True)
class Corrections:
    """Generation settings that are changed, because transformers would reject the model when it saves it or generates with it."""

    ignored: tuple[str, ...] = ()
    """Settings that `generate` ignores, with the setting that they need."""
    rejected: tuple[str, ...] = ()
    """Settings that `generate` rejects, with their values."""


def correct(settings: "GenerationConfig", config: "PreTrainedConfig") -> Corrections:
    """Reset the generation settings that `save_pretrained` or `generate` rejects, and return them.

    Args:
        settings: The model's generation config.
        config: The model's config.

    Raises:
        ValueError: Other settings are invalid.
    """
    rejected = _reset_rejected(settings)
    ignored = _reset_ignored(settings)
    rejected += _reset_failing(settings, config)
    ignored += _reset_ignored(settings)  # some need a setting that was rejected
    return Corrections(tuple(ignored), tuple(rejected))


def _reset_rejected(settings: "GenerationConfig") -> list[str]:
    """Reset settings whose values `generate` rejects; a temperature or top_p of 0 and below becomes greedy decoding."""
    from transformers import GenerationConfig

    given = {name: value for name in _ACCEPTED if (value := getattr(settings, name, None)) is not None}
    used = {name: value for name, value in given.items() if settings.do_sample or name not in _FOR_SAMPLING}
    rejected = {name: value for name, value in used.items() if not _ACCEPTED[name](value)}
    for name, value in rejected.items():
        if name in _GREEDY and not value > 0:
            settings.do_sample = False
        # 0 disables top_k, but None is 50.
        setattr(settings, name, 0 if name == "top_k" else getattr(GenerationConfig(), name))
    for name in used.keys() - rejected.keys() - {"top_k"}:
        setattr(settings, name, float(used[name]))  # `generate` rejects integers
    return [f"{name}: {value}" for name, value in rejected.items()]


def _reset_ignored(settings: "GenerationConfig") -> list[str]:
    """Reset settings that `generate` ignores, such as a temperature without do_sample, and return them.

    Other settings and the generated tokens stay the same.
    """
    from transformers import GenerationConfig

    try:
        settings.validate(strict=True)
    except ValueError as error:
        ignored = _IGNORED.findall(str(error))
        if not ignored:
            raise
        for name, _ in ignored:
            setattr(settings, name, getattr(GenerationConfig(), name))
        reasons = [
            f"{name} (needs {needed})" if needed != name else f"{name} (invalid)" for name, needed in ignored
        ]
        return reasons + _reset_ignored(settings)
    return []


def _reset_failing(settings: "GenerationConfig", config: "PreTrainedConfig") -> list[str]:
    """Reset the settings with which `generate` raises an error, and return them.

    Each is tried, beside those that work, with a tiny model that has the vocabulary of the real one. Random states stay unchanged.
    """
    import torch
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    tried = settings.to_diff_dict().keys() - _CHECKED - _NEEDING_MORE
    if not tried:
        return []
    small: dict[str, Any] = {"n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
    no_tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    size = GPT2Config(vocab_size=config.get_text_config().vocab_size, **small, **no_tokens)
    default, working, rejected = GenerationConfig(), copy.deepcopy(settings), []
    for name in tried | _NEEDING_MORE:
        setattr(working, name, getattr(default, name, None))
    with torch.random.fork_rng([]):
        model = GPT2LMHeadModel(size)
        for name in sorted(tried, key=lambda name: (name != "num_beams", name)):  # others need num_beams
            value = getattr(settings, name)
            setattr(working, name, value)
            if not _generates(model, working):
                for each in (working, settings):
                    setattr(each, name, getattr(default, name, None))
                rejected.append(f"{name}: {value}")
    return rejected


def _generates(model: Any, settings: "GenerationConfig") -> bool:
    """Return whether `generate` accepts settings; its warnings are hidden."""
    import torch
    from transformers.utils.logging import get_verbosity, set_verbosity

    few = copy.deepcopy(settings)
    few.max_length, few.max_new_tokens = None, 2
    for name in ("num_beams", "num_return_sequences"):  # many would take much memory
        if isinstance(count := getattr(few, name), int):
            setattr(few, name, min(count, 2))
    prompt, level = torch.tensor([[0]]), get_verbosity()
    arguments: Any = {"attention_mask": torch.ones_like(prompt), "synced_gpus": False}
    set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.generate(prompt, generation_config=few, **arguments)
    except Exception:  # noqa: BLE001 - each setting fails in its own way
        return False
    finally:
        set_verbosity(level)
    return True


def check_generation(directory: Path, source: str, rows: int) -> None:
    """Check the file of a model's generation settings: valid JSON, valid types and lengths, and token ids that exist.

    Args:
        directory: Local directory with the model's configs.
        source: Name of the model in messages.
        rows: Number of rows of the model's embedding.
    """
    file = _FILE if (directory / _FILE).exists() else "config.json"
    where = f"model {source}: {file}"
    try:
        settings = json.loads((directory / file).read_text("utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{where}: not valid JSON ({first_line(error)}). Copy the file again, or remove it."
        ) from error
    if not isinstance(settings, dict):
        raise ModelError(
            f"{where}: contains {type(settings).__name__}, not a JSON object. Copy the file again, or remove it."
        )
    for name in sorted(_NUMBERS & settings.keys()):
        if settings[name] is not None and not _is_number(settings[name]):
            raise ModelError(
                f"{where}: {name} is {settings[name]!r}, but must be a number. Correct it in a copy of the model."
            )
    for name in _SWITCHES:
        if settings.get(name) not in (True, False, None):
            raise ModelError(
                f"{where}: {name} is {settings[name]!r}, but must be true or false. Correct it in a copy of the model."
            )
    for least, most in _LIMITS:
        # transformers ignores max_length beside max_new_tokens.
        is_used = most == "max_new_tokens" or settings.get("max_new_tokens") is None
        if is_used and (settings.get(least) or 0) > (settings.get(most) or math.inf):
            raise ModelError(
                f"{where}: {least} is {settings[least]}, but {most} is {settings[most]}. Correct one of them in a copy of the model."
            )
    for name in _TOKENS:
        value = settings.get(name)
        for token in value if isinstance(value, list) and value else [] if value is None else [value]:
            # transformers resets a pad_token_id of -1, and `generate` reads bos_token_id only without a prompt.
            if type(token) is not int or token >= rows or (token < 0 and name == "eos_token_id"):
                raise ModelError(
                    f"{where}: {name} has the value {token!r}, but the model has {rows:,} tokens (ids 0 to {rows - 1:,}). Correct it in a copy of the model."
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_savable(directory: Path, source: str, *, trust_remote_code: bool) -> Corrections:
    """Check that transformers can save the model's configs, and return the generation settings that are changed for it.

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
        corrections = correct(settings, config)
        with tempfile.TemporaryDirectory() as scratch:
            settings.save_pretrained(scratch)
            file = "config.json"
            config.save_pretrained(scratch)
    except (ValueError, TypeError, OSError) as error:
        raise ModelError(
            f"model {source}: {file} can be loaded but not saved with a checkpoint or an export ({first_line(error)}). Correct it in a "
            "copy of the model."
        ) from error
    return corrections

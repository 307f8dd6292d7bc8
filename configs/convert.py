"""Convert the YAML of another fine-tuning tool into this project's YAML.

The result names the key from which each line was translated. Comments at its start list what changes and what has no counterpart.
"""

import json
import re
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from configs.loading import ConfigError, LoadedConfig, load_text, read_text
from configs.other_tools import (
    SAME_NAME,
    TOOL_NAMES,
    NoCounterpartError,
    Tool,
    detect,
    find,
    hub_dataset,
    keys_of,
    number,
)
from configs.schema import FinetuneConfig, Section, sections_of
from configs.yaml_source import (
    SECRETS_COME_FROM,
    Origin,
    dotted,
    has_variable,
    looks_secret,
    names_secret,
    parse_yaml,
    plain_scalar,
    shown,
)
from configs.yaml_writer import commented_yaml
from utils.command_line import main_line

COMMANDS = {"convert": "translate a YAML of Axolotl, LLaMA-Factory, TRL or torchtune"}
"""Help text of the command."""

_DEFAULTS: dict[Tool, dict[str, Any]] = {
    "huggingface": {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "max_length": 1024,
    },
    "axolotl": {"num_epochs": 1, "sequence_len": 512, "warmup_ratio": 0.03, "excess_length_strategy": "drop"},
    "llamafactory": {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "cutoff_len": 2048,
    },
    "torchtune": {"lr_scheduler_type": "constant", "clip_grad_norm": 0.0, "optimizer.weight_decay": 0.01},
}
"""Defaults that another tool trains with where ours differ. For Hugging Face they are those of TRL's SFTConfig."""

_LORA_DEFAULTS: dict[Tool, dict[str, Any]] = {
    "huggingface": {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    "axolotl": {},
    "llamafactory": {},  # lora_alpha is twice the rank
    "torchtune": {},
}

SAME = "same as here"
_COLUMNS = 110

_TORCHTUNE_DATASETS = {
    "alpaca_dataset": "tatsu-lab/alpaca",
    "alpaca_cleaned_dataset": "yahma/alpaca-cleaned",
    "slimorca_dataset": "Open-Orca/SlimOrca-Dedup",
    "samsum_dataset": "Samsung/samsum",
    "hh_rlhf_helpful_dataset": "RLHFlow/HH-RLHF-Helpful-standard",
}
_TORCHTUNE_MODULES = {"output_proj": "o_proj"}
_MLP_MODULES = ["gate_proj", "up_proj", "down_proj"]
_FILE_TYPES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")


@dataclass
class Conversion:
    """Settings that were translated from another tool's YAML, and what was not."""

    tool: Tool
    theirs: dict[str, Any]
    """Their keys and values; dotted for torchtune. Keys without a value are excluded."""

    ours: dict[str, Any] = field(default_factory=dict)
    """Our dotted keys and values."""

    sources: dict[str, list[str]] = field(default_factory=dict)
    """Our dotted key -> the keys that it was translated from."""

    unknown: list[str] = field(default_factory=list)
    """Keys that the table does not have, so that nothing was translated, each with its value and the nearest known key."""

    changes: list[str] = field(default_factory=list)
    """Differences from training with the other tool; one sentence each."""

    lost: set[str] = field(default_factory=set)
    """Our keys for whose values there is no counterpart: our defaults apply."""

    unneeded: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> keys that need no counterpart."""

    def put(self, key: str, value: Any, source: str) -> None:
        """Set our key, a number also from its text; a second value for a key is reported."""
        if key in _NUMBERS and isinstance(value, str):
            value = plain_scalar(value)
        if key in self.ours and self.ours[key] != value:
            self.changes.append(
                f"{source}: `{key}: {shown(self.ours[key])}` is kept, from {self.sources[key][0]}"
            )
            return
        self.ours[key] = value
        sources = self.sources.setdefault(key, [])
        sources += [] if source in sources else [source]

    def put_paths(self, key: str, paths: list[str], source: str) -> None:
        """Set our key to a path, or to the list of several; no path sets nothing."""
        if paths:
            self.put(key, paths if len(paths) > 1 else paths[0], source)

    def skip(self, key: str, reason: str) -> None:
        """Note that a key needs no counterpart."""
        keys = self.unneeded.setdefault(reason, [])
        keys += [] if key in keys else [key]

    def change(self, key: str, value: Any, reason: str) -> None:
        """Note that training differs because of a key."""
        self.changes.append(f"{key}: {shown(value)}: {reason}")

    def note_unknown(self, key: str, value: Any, known: Iterable[str]) -> None:
        """Note that a key is unknown, with the nearest of the known keys that the file does not have."""
        others = [other for other in known if other not in self.theirs]
        near = get_close_matches(key.lower(), others, n=1, cutoff=0.75)
        meant = f": did you mean `{near[0]}`?" if near else ""
        self.unknown.append(f"{key}: {shown(value)}: is no known key of {TOOL_NAMES[self.tool]}{meant}")

    def take(self, key: str, default: Any = None) -> Any:
        """Remove and return the value of their key."""
        return self.theirs.pop(key, default)

    def take_items(self, key: str) -> list[Any]:
        """Remove and return the items of their key's list; a value that is no list is one item."""
        value = self.theirs.pop(key, None)
        return value if isinstance(value, list) else [] if value is None else [value]

    def number(self, key: str, default: float) -> float:
        """Return the number of their key; another value is removed, reported, and replaced by the default."""
        try:
            return number(self.theirs.get(key, default))
        except NoCounterpartError as error:
            self.change(key, self.take(key), str(error))
            return default

    def translate(self, key: str, value: Any, source: str = "") -> None:
        """Translate one key by the table."""
        row = find(key, self.tool)
        if names_secret(key):
            self.skip(key, SECRETS_COME_FROM)
        elif row is None and key in _SECTIONS and not isinstance(value, dict):
            self.change(key, value, "is not a section of `key: value` lines")
        elif row is None and key in SAME_NAME:
            self.put(key, value, source or key)
        elif row is None and value is False:
            self.skip(key, "it is off")
        elif row is None:
            self.note_unknown(key, value, keys_of(self.tool))
        elif row.ours is None and row.is_same(value):
            self.skip(key, SAME)
        elif row.ours is None and row.differs:
            self.change(key, value, row.note)
        elif row.ours is None:
            self.skip(key, row.note)
        else:
            try:
                settings = row.settings(value)
            except NoCounterpartError as error:
                self.change(key, value, str(error))
                self.lost.add(row.ours)
                return
            for ours, converted in settings.items():
                self.put(ours, converted, source or key)
            if not settings:
                self.skip(key, SAME if row.is_same(value) else row.note or SAME)


def convert(text: str, path: Path) -> Conversion:
    """Read and translate another tool's YAML.

    Args:
        text: the YAML.
        path: its path, for messages and for files that it names.

    Raises:
        ConfigError: the file is not YAML, or no YAML of a known tool.
    """
    document = parse_yaml(text, lambda line: Origin(f"{path}:{line}", line))
    if document.problems:
        raise ConfigError("\n".join(str(problem) for problem in document.problems))
    data = document.data
    tool = detect(data) if isinstance(data, dict) else None
    if tool is None:
        known = ", ".join(TOOL_NAMES.values())
        raise ConfigError(
            f"{path}: this is not a YAML of {known}. Check Anneal's own with: {main_line(str(path), '--print-config')}"
        )
    return translate(data, tool, path)


def translate(data: dict[str, Any], tool: Tool, path: Path) -> Conversion:
    """Translate the keys of another tool's YAML; arguments as in `convert`."""
    given = _resolved(_flat(data)) if tool == "torchtune" else data
    conversion = Conversion(tool, {})
    given = _without_secrets(given, conversion.changes)
    conversion.theirs = {key: value for key, value in given.items() if value not in (None, "")}
    _SPECIAL[tool](conversion, path)
    for key in list(conversion.theirs):
        conversion.translate(key, conversion.theirs[key])
    _add_defaults(conversion)
    _settle(conversion)
    return conversion


def add_arguments(commands: Mapping[str, ArgumentParser]) -> None:
    """Add the command's arguments to its parser."""
    command = commands["convert"]
    command.set_defaults(run_command=convert_command)
    command.add_argument("source", type=Path, metavar="OTHER.yaml", help="the other tool's YAML")
    command.add_argument(
        "--to", dest="target", type=Path, metavar="FILE", help="new file to write; default: standard output"
    )


def convert_command(source: Path, target: Path | None) -> None:
    """Write the converted YAML to a new file, or to standard output, and a summary to standard error."""
    if target is not None and target.exists():
        raise ConfigError(f"{target}: exists already. Remove it, or name a new file after --to")
    conversion = convert(read_text(source), source)
    text = "\n".join([*_header(conversion, source), "", *_body(conversion)]) + "\n"
    shown_as = target or Path("converted.yaml")
    if target is None:
        sys.stdout.write(text)
    else:
        try:
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{target}: cannot be written: {error.strerror}") from error
    lines = [f"converted {len(conversion.sources)} settings of {TOOL_NAMES[conversion.tool]}"]
    lines += [f"not translated: {key}" for key in conversion.unknown]
    lines += [f"changes: {change}" for change in conversion.changes]
    loaded = _still_wrong(text, shown_as)
    lines += [f"to do: {line}" for line in ([] if isinstance(loaded, LoadedConfig) else loaded)]
    if target is not None and conversion.unknown:
        lines.append(
            f"next: correct the keys in {source}, remove {target}, and convert again; or check it as it is"
        )
    if target is not None:
        lines.append(f"next: {main_line(str(target), '--dry-run')}")
    sys.stderr.write("\n".join(lines) + "\n")


def _still_wrong(text: str, path: Path) -> LoadedConfig | list[str]:
    try:
        return load_text(text, path)
    except ConfigError as error:
        return str(error).splitlines()


def _header(conversion: Conversion, source: Path) -> Iterator[str]:
    text = f"Converted from {source.name}, a YAML of {TOOL_NAMES[conversion.tool]}. A comment names the key that a line comes from."
    yield from textwrap.wrap(text, _COLUMNS, initial_indent="# ", subsequent_indent="# ")
    unneeded = [f"{', '.join(keys)}: {reason}" for reason, keys in conversion.unneeded.items()]
    for title, items in (
        ("Not translated:", conversion.unknown),
        ("What changes:", conversion.changes),
        ("Omitted, because nothing is needed:", unneeded),
    ):
        if items:
            yield from ("#", f"# {title}")
        for item in items:
            yield from textwrap.wrap(
                item, _COLUMNS, initial_indent="# - ", subsequent_indent="#   ", break_long_words=False
            )


def nested_settings(conversion: Conversion) -> dict[str, Any]:
    """Return our settings as they are written, with sections."""
    nested: dict[str, Any] = {}
    for key in sorted(conversion.ours, key=_place):
        section, _, inner = key.partition(".")
        value = conversion.ours[key]
        if inner:
            nested[section] = nested.get(section, {}) | {inner: value}
        else:
            nested[key] = value
    return nested


def _body(conversion: Conversion) -> Iterator[str]:
    comments = {
        key: ", ".join(source for source in sources if source != key)
        for key, sources in conversion.sources.items()
    }
    yield from commented_yaml(nested_settings(conversion), comments)


def _is_number(annotation: Any) -> bool:
    """Return whether a field takes a number, and no text but a few words."""
    if get_origin(annotation) is Annotated:
        return _is_number(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return str not in get_args(annotation) and any(map(_is_number, get_args(annotation)))
    return annotation in (int, float)


def _is_section(annotation: Any) -> bool:
    """Return whether a field takes a section, and nothing else but null."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = [kind for kind in kinds if kind is not type(None)]
    return all(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds)


def _fields(section: type[Section], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, declared in section.model_fields.items():
        yield f"{above}{name}", declared.annotation
        for below in sections_of(declared.annotation) if not above else ():
            yield from _fields(below, f"{name}.")


_PLACES = {key: place for place, key in enumerate(dict(_fields(FinetuneConfig)))}
"""Our dotted keys, in the order of their declaration."""
_NUMBERS = frozenset(key for key, annotation in _fields(FinetuneConfig) if _is_number(annotation))
"""Our dotted keys that take a number."""
_SECTIONS = frozenset(key for key, annotation in _fields(FinetuneConfig) if _is_section(annotation))
"""Our keys that take a section."""


def _place(key: str) -> tuple[int, str]:
    """Return the sort key of one of our dotted keys; names of columns follow `columns`."""
    return _PLACES.get(key, _PLACES[key.partition(".")[0]]), key


def _flat(data: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in data.items():
        keys |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return keys


def _without_secrets(section: dict[str, Any], changes: list[str], above: str = "") -> dict[str, Any]:
    """Return a section without the keys whose values contain a secret, and report each; secret names at the top stay."""

    def cleaned(value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return _without_secrets(value, changes, f"{place}.")
        return [cleaned(item, place) for item in value] if isinstance(value, list) else value

    kept: dict[str, Any] = {}
    for key, value in section.items():
        place = f"{above}{key}"
        is_named = bool(above) and names_secret(key) and not isinstance(value, bool | None)
        if is_named or (not isinstance(value, dict) and _has_secret(value)):
            changes.append(f"{dotted((place,))}: contains a secret and is left out: {SECRETS_COME_FROM}")
        else:
            kept[key] = cleaned(value, place)
    return kept


def _has_secret(value: Any) -> bool:
    """Return whether a text in a value looks like a secret; keys with secret names do not count."""
    if isinstance(value, dict):
        return any(_has_secret(below) for name, below in value.items() if not names_secret(name))
    if isinstance(value, list):
        return any(map(_has_secret, value))
    return isinstance(value, str) and looks_secret(value)


def _resolved(theirs: dict[str, Any]) -> dict[str, Any]:
    """Replace OmegaConf's references to other keys, such as `${output_dir}/logs`; unknown ones stay."""

    def value_of(match: re.Match[str]) -> str:
        value = theirs.get(match[1])
        return match[0] if value is None or "${" in str(value) else str(value)

    return {
        key: re.sub(r"\$\{([\w.]+)\}", value_of, value) if isinstance(value, str) else value
        for key, value in theirs.items()
    }


# --- Keys that depend on each other -----------------------------------------------------------------------------------


def _huggingface(conversion: Conversion, path: Path) -> None:
    name, config = conversion.take("dataset_name"), conversion.take("dataset_config")
    split, test = conversion.take("dataset_train_split"), conversion.take("dataset_test_split", "test")
    evaluates = (
        conversion.theirs.get("eval_strategy", conversion.theirs.get("evaluation_strategy", "no")) != "no"
    )
    if name:
        conversion.put("train_path", _rows(str(name), path, config, split), "dataset_name")
        if evaluates and "valid_split" not in conversion.ours:
            conversion.put("valid_path", _rows(str(name), path, config, test), "dataset_test_split")
    mixture = conversion.take("dataset_mixture")
    mixture = mixture if isinstance(mixture, dict) else {}
    if isinstance(items := conversion.take("datasets", mixture.get("datasets")), list):
        _dataset_mixture(conversion, [item for item in items if isinstance(item, dict)], path)
    if "test_split_size" in mixture:
        conversion.theirs["test_split_size"] = mixture["test_split_size"]
    train_file, valid_file = conversion.take("train_file"), conversion.take("validation_file")
    if train_file:
        conversion.put("train_path", train_file, "train_file")
    if valid_file:
        conversion.put("valid_path", valid_file, "validation_file")
    if conversion.take("use_peft") or "lora_r" in conversion.theirs:
        conversion.put("lora_config", {}, "use_peft")
        if "lora_target_modules" not in conversion.theirs:
            # PEFT's choice for the architecture, not all linear layers
            conversion.put("lora_config.target_modules", None, "lora_target_modules, the default there")
    _huggingface_loss(conversion)
    _settle_strategies(conversion)
    _settle_sharding(conversion)


def _dataset_mixture(conversion: Conversion, items: list[dict[str, Any]], path: Path) -> None:
    """Translate TRL's list of data sets, or that of the alignment handbook, which names a repository by `id`."""
    sources = [
        item | {"path": item.get("id") or item.get("path"), "name": item.get("config") or item.get("name")}
        for item in items
    ]
    conversion.put_paths("train_path", _loaded(conversion, "datasets", sources, path), "datasets")
    weights = [item.get("weight") for item in items]
    if any(weight not in (None, 1) for weight in weights):
        reason = "all rows of each source are used; `{path: ..., weight: ...}` in `train_path` mixes sources"
        conversion.change("datasets.weight", weights, reason)


def _huggingface_loss(conversion: Conversion) -> None:
    """Choose the task: DPO's settings mean preferences; TRL's supervised loss is on every token of a conversation."""
    theirs = conversion.theirs
    loss = theirs.get("loss_type")
    if loss in ("nll", "chunked_nll"):
        conversion.take("loss_type")
        conversion.skip("loss_type", "it is always so")
    elif "beta" in theirs or loss in ("sigmoid", "ipo", "orpo", "kto"):
        conversion.put("task", "preference_tuning", "beta" if "beta" in theirs else "loss_type")
        if "learning_rate" not in theirs:
            conversion.put("learning_rate", 1e-6, "learning_rate, DPOConfig's default there")
        return
    if not theirs.get("assistant_only_loss") and "completion_only_loss" not in theirs:
        conversion.take("assistant_only_loss")
        conversion.changes.append(
            "assistant_only_loss is not true: the loss is on the answers; TRL's is on every token of a conversation, as with "
            "`task: causal_lm`"
        )


def _settle_strategies(conversion: Conversion) -> None:
    """Drop the intervals that transformers ignores: those of a strategy other than steps."""
    for strategy, older, interval in (
        ("eval_strategy", "evaluation_strategy", "eval_steps"),
        ("save_strategy", "", "save_steps"),
    ):
        value = conversion.theirs.get(strategy, conversion.theirs.get(older))
        if value in ("epoch", "no", "best") and interval in conversion.theirs:
            conversion.take(interval)
            conversion.skip(interval, f"`{strategy}: {value}` ignores it")
        if value == "no" and strategy == "eval_strategy":
            conversion.skip(strategy, "without validation rows nothing is evaluated")
            conversion.take(strategy)


def _settle_sharding(conversion: Conversion) -> None:
    """Combine `fsdp` and `fsdp_config`, which may say together what is sharded and offloaded."""
    if conversion.theirs.get("fsdp") and (config := conversion.take("fsdp_config")):
        conversion.translate("fsdp", [conversion.take("fsdp"), config], "fsdp and fsdp_config")


def _axolotl(conversion: Conversion, path: Path) -> None:
    theirs = conversion.theirs
    preference = conversion.theirs.get("rl")
    if isinstance(rows := conversion.take("datasets"), list):
        _axolotl_datasets(conversion, rows, path, preference=bool(preference))
        for item in rows:
            _axolotl_rows(conversion, item if isinstance(item, dict) else {})
    tests = [item for item in conversion.take_items("test_datasets") if isinstance(item, dict)]
    conversion.put_paths("valid_path", _loaded(conversion, "test_datasets", tests, path), "test_datasets")
    given = conversion.take_items("pretraining_dataset")
    if texts := [item if isinstance(item, dict) else {"path": item} for item in given]:
        paths = _loaded(conversion, "pretraining_dataset", texts, path)
        conversion.put_paths("train_path", paths, "pretraining_dataset")
        conversion.put("task", "causal_lm", "pretraining_dataset")
        for column in {item.get("text_column") or "text" for item in texts} - {"text"}:
            conversion.put("columns.text", column, "pretraining_dataset.text_column")
    if theirs.get("tokenizer_config") == theirs.get("base_model") and conversion.take("tokenizer_config"):
        conversion.skip("tokenizer_config", SAME)
    targets = conversion.theirs.get("lora_target_modules")
    embeddings = ("embed_tokens", "lm_head")
    if theirs.get("lora_target_linear") and targets and not any(name in str(targets) for name in embeddings):
        conversion.take("lora_target_modules")
        conversion.skip("lora_target_modules", "`lora_target_linear: true` includes them")
    adapter = conversion.take("adapter")
    if adapter in ("lora", "qlora"):
        conversion.put("lora_config", {}, "adapter")
        if adapter == "qlora":
            conversion.put("load_in_4bit", True, "adapter")
            conversion.take("load_in_4bit")
    elif adapter:
        conversion.change("adapter", adapter, "is not supported: use `lora_config`")
    if adapter not in ("lora", "qlora"):
        _drop_adapter_keys(conversion, "adapter")
    _axolotl_intervals(conversion)
    _settle_strategies(conversion)
    _settle_sharding(conversion)
    _axolotl_extras(conversion)
    if isinstance(settings := theirs.get("trl"), dict) and "beta" in settings:
        conversion.translate("rl_beta", settings["beta"], "trl.beta")
        conversion.take("trl")
    if preference or conversion.ours.get("task") == "causal_lm":
        conversion.take("train_on_inputs")


def _drop_adapter_keys(conversion: Conversion, switch: str) -> None:
    for key in [key for key in conversion.theirs if key.startswith(("lora_", "peft_"))]:
        conversion.take(key)
        conversion.skip(key, f"it has no effect without `{switch}: lora`")


def _axolotl_intervals(conversion: Conversion) -> None:
    if has_variable(conversion.theirs.get("num_epochs")):
        return  # the number of times per run is not known: the table gives the part of an epoch
    for theirs, ours in (("evals_per_epoch", "eval_steps"), ("saves_per_epoch", "save_steps")):
        per_run = conversion.number(theirs, 0) * conversion.number("num_epochs", 1)
        conversion.take(theirs)
        if per_run <= 0:
            continue
        share = 1 / per_run
        if share < 1:
            conversion.put(ours, share, theirs)
        else:
            conversion.put(ours, 0.999999, theirs) if share > 1 else conversion.skip(
                theirs, "the last step always has one"
            )


def _axolotl_extras(conversion: Conversion) -> None:
    if conversion.theirs.get("cosine_min_lr_ratio"):
        conversion.take("lr_scheduler")  # the ratio selects a schedule of its own
    for plugin in conversion.take_items("plugins"):
        name = str(plugin).lower()
        if "liger" in name:
            conversion.put("kernels", "liger", "plugins")
        elif "cut_cross_entropy" in name:
            conversion.skip("plugins (cut_cross_entropy)", "the kernels are chosen by `kernels`")
        else:
            conversion.change("plugins", plugin, "is not supported")
    for key in [key for key in conversion.theirs if key.startswith("liger_")]:
        if conversion.take(key):
            conversion.put("kernels", "liger", key)
    template = conversion.take("chat_template")
    if template == "tokenizer_default":
        conversion.skip("chat_template", SAME)
    elif template not in (None, "jinja"):
        conversion.change(
            "chat_template",
            template,
            "the model's own chat template is used; name a file in `chat_template` for another",
        )
    tokens = conversion.theirs.get("special_tokens")
    if isinstance(tokens, dict) and set(tokens) - {"pad_token"}:
        conversion.take("special_tokens")
        conversion.change(
            "special_tokens",
            {name: token for name, token in tokens.items() if name != "pad_token"},
            "the model's own are used; if they differ, edit tokenizer_config.json in a copy of the model, and list tokens that it lacks "
            "in `new_special_tokens`",
        )
    for key in [key for key in conversion.theirs if key.startswith("lora_") and key.endswith("_kernel")]:
        conversion.take(key)
        conversion.skip(key, "the kernels are chosen by `kernels`")


def _axolotl_datasets(conversion: Conversion, rows: list[Any], path: Path, *, preference: bool) -> None:
    items = [item for item in rows if isinstance(item, dict) and item.get("path")]
    paths = _loaded(conversion, "datasets", items, path)
    if not paths:
        return
    conversion.put_paths("train_path", paths, "datasets")
    kinds = [item.get("type") for item in items]
    if len({shown(kind) for kind in kinds}) > 1:
        conversion.changes.append(
            "datasets: types differ between sources; the format of each is detected from its columns"
        )
        return
    kind = kinds[0]
    if isinstance(kind, dict):
        _axolotl_prompt(conversion, kind)
    elif preference:
        conversion.put("data_format", "preference", "datasets.type")
    elif kind is not None:
        _axolotl_type(conversion, str(kind))
    for theirs, ours in (
        ("field_messages", "columns.messages"),
        ("field_chosen", "columns.chosen"),
        ("field_rejected", "columns.rejected"),
        ("field", "columns.text"),
    ):
        natural = ours.partition(".")[2]
        names = [item.get(theirs) or natural for item in items]
        if any(name != names[0] for name in names):
            conversion.change(f"datasets.{theirs}", names, _DIFFERS)
        elif names[0] not in (natural, "conversations"):
            conversion.put(ours, names[0], f"datasets.{theirs}")


_DIFFERS = "differs between sources, and `columns` holds for all: rename the column in the files"
_MESSAGE_KEYS = "a message has role and content, or from and value"
_AXOLOTL_ROWS: dict[str, tuple[tuple[Any, ...], str]] = {
    "field_messages": (("messages", "conversations"), "`columns.messages` names the column"),
    "field_chosen": (("chosen",), "`columns.chosen` names the column"),
    "field_rejected": (("rejected",), "`columns.rejected` names the column"),
    "field": (("text",), "`columns.text` names the column"),
    "message_field_role": (("role", "from"), _MESSAGE_KEYS),
    "message_field_content": (("content", "value"), _MESSAGE_KEYS),
    "message_property_mappings": (
        ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
        _MESSAGE_KEYS,
    ),
    "chat_template": (("tokenizer_default",), "the model's own chat template is used"),
    "train_on_eot": (("turn",), "the end marker of each assistant message is in the loss"),
    "drop_system_message": ((False,), "system messages are rendered"),
    "revision": (("main",), "download the revision and name its files in `train_path`"),
    **dict.fromkeys(
        ("shards", "shards_idx", "preprocess_shards"),
        ((1,), "all rows are used; `max_train_rows` limits them"),
    ),
    "conversation": ((), "the model's own chat template is used"),
    **dict.fromkeys(("field_human", "field_model"), ((), _MESSAGE_KEYS)),
    "field_tools": (("tools",), "rename the column to `tools`"),
    **dict.fromkeys(
        ("field_thinking", "template_thinking_key"),
        (
            ("reasoning_content", "reasoning", "thinking", "thought"),
            "reasoning has one of the keys that docs/data.md lists",
        ),
    ),
    "split_thinking": ((True, False), "`<think>` in the content is read as reasoning"),
    "message_field_training": (
        ("weight", "loss_weight", "train", "training", "trainable", "loss"),
        "a message with `weight: 0` is not in the loss",
    ),
    "message_field_training_detail": ((), "a message is in the loss as a whole or not at all"),
    **dict.fromkeys(("logprobs_field", "temperature"), ((), "distillation is not supported")),
    "trust_remote_code": ((False,), "rows are read without running code from the data set"),
}
"""Settings of a data set -> (values that mean what this project does, how it differs with others)."""
_AXOLOTL_LOCATION = ("path", "type", "split", "name", "data_files")
_AXOLOTL_DETECTED = {
    "ds_type": "the format of a file is detected",
    "roles": "the usual names of roles are recognized (docs/data.md)",
}


def _axolotl_rows(conversion: Conversion, item: Mapping[str, Any]) -> None:
    """Note the settings of a data set that are not translated."""
    translated = {source for sources in conversion.sources.values() for source in sources}
    translated |= {change.partition(":")[0] for change in conversion.changes}
    for key, value in item.items():
        name = f"datasets.{key}"
        row = find(key, conversion.tool)
        same, note = _AXOLOTL_ROWS.get(key, ((False,), row.note if row else ""))
        if value is None or name in translated or key in _AXOLOTL_LOCATION:
            continue
        if not (row or key in _AXOLOTL_ROWS or key in _AXOLOTL_DETECTED):
            conversion.note_unknown(
                name,
                value,
                [f"datasets.{known}" for known in (*_AXOLOTL_LOCATION, *_AXOLOTL_ROWS, *_AXOLOTL_DETECTED)],
            )
        elif key in _AXOLOTL_DETECTED:
            conversion.skip(name, _AXOLOTL_DETECTED[key])
        elif value in (row.same if row and row.same else same):
            conversion.skip(name, SAME)
        else:
            conversion.change(name, value, note)


def _axolotl_type(conversion: Conversion, kind: str) -> None:
    name = kind.partition(":")[0].partition(".")[0]
    match name:
        case "alpaca" | "alpaca_chat" | "alpaca_w_system":
            conversion.put("data_format", "instruction", "datasets.type")
            conversion.changes.append(
                f"datasets.type: {kind}: rows are rendered with the model's chat template. A model without one needs `prompt_template`, "
                'such as "### Instruction: {instruction} ### Response: {output}"'
            )
        case "chat_template" | "sharegpt":
            if name == "sharegpt":
                conversion.put("data_format", "conversations", "datasets.type")
            else:
                conversion.skip(
                    "datasets.type",
                    "the format is detected from the columns, the template is the model's own",
                )
        case "completion" | "pretrain":
            conversion.put("task", "causal_lm", "datasets.type")
            conversion.put("data_format", "text", "datasets.type")
        case _:
            conversion.change("datasets.type", kind, "the format is detected from the columns (docs/data.md)")


def _axolotl_prompt(conversion: Conversion, kind: Mapping[str, Any]) -> None:
    """Translate a prompt of one's own: `format` with {instruction} and {input}, and the columns that they stand for."""
    names = {part: kind.get(f"field_{part}") or part for part in ("instruction", "input", "output")}
    text = kind.get("format")
    if not isinstance(text, str) or not text:
        for ours, theirs in names.items():
            if ours != theirs:
                conversion.put(f"columns.{ours}", theirs, f"datasets.type.field_{ours}")
        conversion.put("data_format", "instruction", "datasets.type")
        return
    for part in ("instruction", "input"):
        text = text.replace(f"{{{part}}}", f"{{{names[part]}}}")
    conversion.put("prompt_template", f"{text} {{{names['output']}}}", "datasets.type.format")
    if kind.get("no_input_format") not in (None, kind.get("format")):
        conversion.changes.append(
            "datasets.type.no_input_format: `prompt_template` renders rows with and without input alike"
        )
    if kind.get("system_prompt"):
        conversion.changes.append("datasets.type.system_prompt: write it at the start of `prompt_template`")


_BUILDERS = ("json", "csv", "parquet", "arrow", "text")
"""Names that load_dataset takes for files, in place of a dataset."""


def _loaded(conversion: Conversion, key: str, items: Iterable[Mapping[str, Any]], path: Path) -> list[str]:
    """Return the locations of rows that a tool loads with load_dataset: `path`, `data_files`, `name` and `split`."""
    return [location for item in items for location in _locations(conversion, key, item, path)]


def _locations(conversion: Conversion, key: str, item: Mapping[str, Any], path: Path) -> list[str]:
    name, split, given = str(item.get("path")), item.get("split"), item.get("data_files")
    if isinstance(given, dict):  # the files of each split
        given = given.get(split or "train")
    files = [str(file) for file in (given if isinstance(given, list) else [given] if given else [])]
    if _is_hub_name(name, path):
        if files:
            reason = f"all files of {name} are read: download these, and name them in `train_path`"
            conversion.change(f"{key}.data_files", files, reason)
        return [hub_dataset(name, item.get("name"), split)]
    if split not in (None, "train"):
        conversion.change(f"{key}.split", split, "all rows are read: name a file that has only these rows")
    if not files:
        return [name]
    return files if name in _BUILDERS else [f"{name}/{file}" for file in files]


def _rows(name: str, path: Path, config: str | None = None, split: str | None = None) -> str:
    """Return the location of rows that a tool names by a file, a directory, a URI or a Hub dataset."""
    return hub_dataset(name, config, split) if _is_hub_name(name, path) else name


def _is_hub_name(name: str, path: Path) -> bool:
    looks_local = "://" in name or name.startswith(("/", ".", "~")) or name.endswith(_FILE_TYPES)
    return (
        not looks_local
        and name.count("/") == 1
        and not Path(name).exists()
        and not (path.parent / name).exists()
    )


def _llamafactory(conversion: Conversion, path: Path) -> None:
    directory = str(conversion.take("dataset_dir", "data"))
    described: list[dict[str, str]] = []
    for theirs, ours in (("dataset", "train_path"), ("eval_dataset", "valid_path")):
        items = conversion.take_items(theirs)
        names = [name.strip() for item in items for name in str(item).split(",") if name.strip()]
        if names:
            paths = [
                _llamafactory_rows(conversion, name, directory, path, theirs, described) for name in names
            ]
            conversion.put_paths(ours, paths, f"{theirs} in dataset_dir")
    _put_columns(conversion, described)
    kind = conversion.take("finetuning_type", "lora")
    if kind == "lora":
        conversion.put("lora_config", {}, "finetuning_type")
        _llamafactory_rank(conversion)
    else:
        if kind != "full":
            conversion.change(
                "finetuning_type", kind, "is not supported: use `lora_config`, or train all weights"
            )
        _drop_adapter_keys(conversion, "finetuning_type")
    if conversion.theirs.get("stage") not in ("dpo", "kto"):
        for key in ("pref_beta", "pref_loss"):
            if conversion.take(key) is not None:
                conversion.skip(key, "it has no effect in this stage")
    elif "pref_loss" in conversion.theirs:
        conversion.take("stage")
        conversion.put("task", "preference_tuning", "stage")
    if conversion.theirs.get("packing") and not conversion.theirs.get("neat_packing"):
        conversion.changes.append("packing: packed rows do not attend to each other, as with neat_packing")
    _settle_strategies(conversion)


def _llamafactory_rank(conversion: Conversion) -> None:
    """Write down the default of lora_alpha, twice the rank."""
    if not has_variable(conversion.theirs.get("lora_rank")):
        rank = conversion.number("lora_rank", 8)
        conversion.theirs["lora_rank"] = rank
        conversion.theirs.setdefault("lora_alpha", 2 * rank)
    elif "lora_alpha" not in conversion.theirs:
        conversion.changes.append(
            "lora_alpha: is twice lora_rank there, and the value of a variable is not known here: write it as `lora_config.lora_alpha`"
        )


def _llamafactory_rows(
    conversion: Conversion, name: str, directory: str, path: Path, key: str, described: list[dict[str, str]]
) -> str:
    """Return the location of a data set that dataset_info.json describes, and add its columns to those of the others."""
    if directory == "ONLINE":
        return hub_dataset(name)
    if directory.startswith("REMOTE:"):
        repository = directory.removeprefix("REMOTE:")
        conversion.changes.append(
            f"{key}: {name}: dataset_info.json of {repository} names its file: download it and name it in `train_path`"
        )
        return f"{name}.json"
    entry = _dataset_info(directory, path).get(name)
    if not isinstance(entry, dict):
        conversion.changes.append(
            f"{key}: {name}: {directory}/dataset_info.json does not describe it here: check the path of the file"
        )
        return f"{directory}/{name}.json"
    if entry.get("ranking"):
        conversion.put("data_format", "preference", key)
    described.append(_llamafactory_columns(conversion, entry, key))
    if entry.get("hf_hub_url"):
        return hub_dataset(entry["hf_hub_url"], entry.get("subset"), entry.get("split"))
    return f"{directory}/{entry.get('file_name') or f'{name}.json'}"


_LLAMAFACTORY_COLUMNS = {
    "system": "system",
    "tools": "tools",
    "history": "history",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "label",
}
"""Column of dataset_info.json -> ours."""
_LLAMAFACTORY_PROMPT = {"prompt": "instruction", "query": "input", "response": "output"}
_RECOGNIZED = {"label": "kto_tag"}
"""Our column -> another name that is recognized."""


def _llamafactory_columns(conversion: Conversion, entry: Mapping[str, Any], key: str) -> dict[str, str]:
    """Return the columns of a data set that dataset_info.json describes: our name -> the name in its files."""
    columns, tags = (
        value if isinstance(value, dict) else {} for value in (entry.get("columns"), entry.get("tags"))
    )
    names, defaults = dict(_LLAMAFACTORY_COLUMNS), dict[str, str]()
    if (entry.get("formatting") or "alpaca") != "alpaca":
        names["messages"] = "messages" if tags.get("role_tag") else "conversations"
    elif conversion.theirs.get("stage") == "pt":
        names["prompt"], defaults = "text", {"text": "instruction"}
    else:
        names |= _LLAMAFACTORY_PROMPT
        defaults = {name: name for name in _LLAMAFACTORY_PROMPT.values()}
    for theirs, column in columns.items():
        if theirs not in names:
            conversion.change(f"{key}.columns.{theirs}", column, "is not read")
        elif column is not None:
            defaults[names[theirs]] = column
    if {tags.get("role_tag"), tags.get("content_tag")} - {None, "from", "role", "value", "content"}:
        conversion.change(f"{key}.tags", tags, _MESSAGE_KEYS)
    return defaults


def _put_columns(conversion: Conversion, described: list[dict[str, str]]) -> None:
    """Write the columns of all data sets, and report those that differ between them."""
    for ours in dict.fromkeys(name for columns in described for name in columns):
        names = list(dict.fromkeys(columns[ours] for columns in described if ours in columns))
        if len(names) > 1:
            conversion.change("dataset.columns", names, _DIFFERS)
        elif names[0] not in (ours, _RECOGNIZED.get(ours)):
            conversion.put(f"columns.{ours}", names[0], "dataset.columns")


def _dataset_info(directory: str, path: Path) -> dict[str, Any]:
    for base in (Path(directory), path.parent / directory):
        file = base / "dataset_info.json"
        try:
            described = json.loads(file.read_text("utf-8"))
        except OSError:
            continue
        except ValueError as error:
            raise ConfigError(f"{file}: not valid JSON ({error}).") from error
        return described if isinstance(described, dict) else {}
    return {}


def _torchtune(conversion: Conversion, path: Path) -> None:
    theirs = conversion.theirs
    component = str(conversion.take("model._component_", "")).rpartition(".")[2]
    if component.startswith(("lora_", "qlora_")):
        conversion.put("lora_config", {}, "model._component_")
        modules = [
            _TORCHTUNE_MODULES.get(str(name), name)
            for name in conversion.take_items("model.lora_attn_modules")
        ]
        modules += _MLP_MODULES if conversion.take("model.apply_lora_to_mlp") else []
        modules += ["lm_head"] if conversion.take("model.apply_lora_to_output") else []
        conversion.put("lora_config.target_modules", modules, "model.lora_attn_modules")
        if component.startswith("qlora_"):
            conversion.put("load_in_4bit", True, "model._component_")
    for key in ("lora_alpha", "lora_dropout", "use_dora"):
        if (value := conversion.take(f"model.{key}")) is not None:
            conversion.put(f"lora_config.{key}", value, f"model.{key}")
    name = str(conversion.take("dataset._component_", "")).rpartition(".")[2]
    source, files = conversion.take("dataset.source"), conversion.take("dataset.data_files")
    split = conversion.take("dataset.split")
    if source or name in _TORCHTUNE_DATASETS:
        rows = {"path": source or _TORCHTUNE_DATASETS[name], "data_files": files, "split": split}
        conversion.put_paths("train_path", _loaded(conversion, "dataset", [rows], path), "dataset")
    if name.startswith("alpaca"):
        on_input = conversion.take("dataset.train_on_input", True)
        conversion.put("task", "causal_lm" if on_input else "instruction_tuning", "dataset.train_on_input")
    if name == "text_completion_dataset":
        conversion.put("task", "causal_lm", "dataset._component_")
        if column := conversion.take("dataset.column"):
            conversion.put("columns.text", column, "dataset.column")
    elif "preference" in name or "dpo" in str(theirs.get("loss._component_", "")).lower():
        conversion.put("task", "preference_tuning", "dataset._component_")
    for key in [key for key in theirs if key.startswith("dataset.column_map.")]:
        conversion.put(f"columns.{key.rpartition('.')[2]}", conversion.take(key), key)
    if "wandb" in str(conversion.take("metric_logger._component_", "")).lower():
        conversion.put("logger.provider", "wandb", "metric_logger._component_")
        if project := conversion.take("metric_logger.project"):
            conversion.put("logger.project", project, "metric_logger.project")
    if theirs.get("optimizer.fused") and str(theirs.get("optimizer._component_")) == "torch.optim.AdamW":
        conversion.put("optim", "adamw_torch_fused", "optimizer.fused")
        conversion.take("optimizer._component_")
    conversion.take("optimizer.fused")
    known = {"tokenizer.max_seq_len", "checkpointer.checkpoint_dir"}
    for key in [
        key
        for key in theirs
        if key.partition(".")[0] in ("tokenizer", "checkpointer", "profiler", "metric_logger", "loss")
    ]:
        if key not in known:
            conversion.take(key)
            conversion.skip(key.partition(".")[0], "it is not used")


_SPECIAL: dict[Tool, Callable[[Conversion, Path], None]] = {
    "huggingface": _huggingface,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
    "torchtune": _torchtune,
}


def _add_defaults(conversion: Conversion) -> None:
    """Write down the other tool's defaults where ours differ, so that training does not."""
    defaults = dict(_DEFAULTS[conversion.tool])
    if "lora_config" in conversion.ours:
        defaults |= _LORA_DEFAULTS[conversion.tool]
    replaced_by = {
        "num_train_epochs": "max_steps",
        "num_epochs": "max_steps",
        "warmup_ratio": "num_warmup_steps",
        "per_device_train_batch_size": "train_batch_size",
    }
    for key, value in defaults.items():
        if key in conversion.theirs:
            continue  # its value needs no key here
        row = find(key, conversion.tool)
        ours = row.ours if row and row.ours else key
        if (
            ours not in conversion.ours.keys() | conversion.lost
            and replaced_by.get(key) not in conversion.ours
        ):
            conversion.translate(key, value, f"{key}, the default there")


def _settle(conversion: Conversion) -> None:
    """Resolve settings that the other tool ranks and that here exclude each other."""
    ours = conversion.ours

    def drop(key: str, reason: str) -> None:
        if key in ours:
            conversion.skip(conversion.sources.pop(key)[0], reason)
            del ours[key]

    if "max_steps" in ours:
        drop("num_epochs", "`max_steps` sets the length")
    if ours.get("num_warmup_steps"):
        drop("warmup_ratio", "`num_warmup_steps` sets the warm-up")
    if ours.get("num_warmup_steps") == 0:
        drop("num_warmup_steps", "it is the default")
    if ours.get("lr_scheduler_type") == "constant":
        drop("warmup_ratio", "`constant` has no warm-up")
        drop("num_warmup_steps", "`constant` has no warm-up")
    if any(key.startswith("preference_tuning_config.") for key in ours) and "task" not in ours:
        conversion.put("task", "preference_tuning", "the preference loss")
    place = ours.get("storage_path")
    if isinstance(place, str) and "://" not in place and not place.startswith("/"):
        conversion.changes.append(
            "storage_path: a directory of this machine; for a run on a cluster, write a bucket or a directory that all machines share"
        )
    if size := ours.get("sequence_parallel_size"):
        drop("flash_attention_2", "workers that share sequences use PyTorch's flash kernels")
        if "num_devices" not in ours:
            conversion.put("num_devices", size, "context_parallel_size")
    if "num_devices" not in ours:
        conversion.changes.append(
            "the number of GPUs: one here; add `num_devices: 8` for the eight that a launcher there would use"
        )
    if "lr_scheduler_kwargs.min_lr_rate" in ours:
        ours["lr_scheduler_type"] = "cosine_with_min_lr"
    if "valid_path" in ours:
        drop("valid_split", "`valid_path` names the validation rows")
    if "valid_split" in ours:
        conversion.changes.append(
            f"{conversion.sources['valid_split'][0]}: a hash of each row decides whether it is a validation row, so equal rows stay on "
            "one side, and few rows may miss the share by much"
        )
    if "valid_path" not in ours and "valid_split" not in ours:
        drop("eval_steps", "there are no validation rows")
    if ours.get("task") == "preference_tuning":
        drop("packing", "it does not work with preferences")
    if ours.get("load_in_4bit") is False:
        drop("load_in_4bit", "it is the default")
    if not ours.get("push_to_hub"):
        drop("hub_model_id", "nothing is pushed without `push_to_hub: true`")
    if "logger.provider" not in ours:
        for key in [key for key in ours if key.startswith("logger.")]:
            drop(key, "there is no tracker")

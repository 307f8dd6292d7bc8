"""Explain validation errors: what is wrong with a value or a key, and what to write instead."""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from configs import other_tools
from configs.schema import ConflictError, FinetuneConfig, Section, sections_of
from configs.yaml_source import (
    SECRETS_COME_FROM,
    Document,
    KeyPath,
    Problem,
    dotted,
    looks_secret,
    names_secret,
    plain_scalar,
    shown,
)
from configs.yaml_writer import flow

_IS_NO_SECTION = "is not a section"


def field_problems(document: Document, errors: list[ErrorDetails]) -> Iterator[Problem]:
    """Yield pydantic's errors as problems: one per value, and none for a value that has a problem already."""
    problems = list(_all_problems(document, errors))
    meant = {name for problem in problems for name in re.findall(r"did you mean `([\w.]+)", problem.text)}
    for problem in problems:
        value = document.data.get(problem.path[0]) if len(problem.path) == 1 else None
        if isinstance(value, dict) and _IS_NO_SECTION in problem.text:
            meant |= value.keys()
    for problem in problems:
        if not (problem.is_missing and dotted(problem.path) in meant):
            yield problem


def _all_problems(document: Document, errors: list[ErrorDetails]) -> Iterator[Problem]:
    known = {problem.path for problem in document.problems}
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(path_in_data(document.data, error), []).append(error)
    sections = {path[:length] for path in by_path for length in range(1, len(path))}
    said = {
        (row.ours,)
        for key in document.data
        if key not in FinetuneConfig.model_fields and (row := other_tools.find(key))
    }
    for path, here in by_path.items():
        if any(path[:length] in known for length in range(1, len(path) + 1)):
            continue
        # A section that may also be a name fails as both: report only the errors inside the section.
        if path in sections:
            continue
        if path in said and here[0]["type"] == "missing":
            continue  # the message about the other tool's key says it
        if path[:1] == ("deepspeed",) and path[-1] != "config_path" and _is_inline_deepspeed(document.data):
            continue  # the message about the missing config_path says it
        yield from _explain(document, path, here)


def path_in_data(data: Any, error: ErrorDetails) -> KeyPath:
    """Return the error's location without the type names that pydantic inserts between keys."""
    path: KeyPath = ()
    for part in error["loc"]:
        children: Any = dict(enumerate(data)) if isinstance(data, list) else data
        if isinstance(children, dict) and part in children:
            data, path = children[part], (*path, part)
    if error["type"] == "missing":
        path = (*path, error["loc"][-1])
    return path


def _explain(document: Document, path: KeyPath, errors: list[ErrorDetails]) -> Iterator[Problem]:
    origin = document.origin(path)
    kinds = {error["type"]: error for error in errors}
    if "value_error" in kinds:
        cause = kinds["value_error"].get("ctx", {})["error"]
        if isinstance(cause, ConflictError):
            for key, text in cause.conflicts:
                below = (*path, *key.split("."))
                yield Problem(below, document.origin(below), _in_section(path, text))
            return
        value = shown(kinds["value_error"]["input"])
        yield Problem(path, origin, f"`{dotted(path)}` is {value}: {cause}")
    elif path == ("deepspeed", "config_path") and _is_inline_deepspeed(document.data):
        yield Problem(
            path,
            origin,
            f"`deepspeed` has no preset and no file: write `deepspeed: zero_{_stage_of(document.data)}`, or put these settings into a JSON file and write "
            "`deepspeed: {config_path: FILE}`",
        )
    elif "missing" in kinds:
        yield Problem(
            path,
            origin,
            f"`{dotted(path)}` is missing: {_to_write(_help(path))}",
            rank=1 if len(path) == 1 else 2,
            is_missing=True,
        )
    elif "extra_forbidden" in kinds:
        value = kinds["extra_forbidden"]["input"]
        yield Problem(path, origin, _unknown_key(document, path, value))
    elif of_key := [error for error in errors if error["loc"][-1] == "[key]"]:
        is_choice = of_key[0]["type"] == "literal_error"
        expected = _choices(of_key[0]) if is_choice else _phrase(of_key[0])
        value = document.data.get(path[0], {}).get(path[-1]) if len(path) == 2 else None
        if is_choice and isinstance(value, str) and value in _choices_list(of_key[0]):
            expected = f"our name first: `{{{value}: {dotted(path[-1:])}}}`"
        yield Problem(path, origin, f"`{dotted(path)}` is not a key: use {expected}")
    else:
        value = errors[0]["input"]
        yield Problem(path, origin, f"`{dotted(path)}` is {shown(value)}: {_fix(path, value, errors)}")


def _stage_of(data: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of an inline DeepSpeed configuration; 3 if it has none."""
    given = data["deepspeed"]
    zero = given.get("zero_optimization")
    stage = (zero if isinstance(zero, dict) else given).get("stage", given.get("zero_stage"))
    return int(stage) if stage in (1, 2) else 3


def _is_inline_deepspeed(data: Mapping[str, Any]) -> bool:
    """Return whether `deepspeed` has the contents of a configuration file."""
    given = data.get("deepspeed")
    return (
        isinstance(given, dict)
        and "config_path" not in given
        and bool(given.keys() & {"stage", "zero_optimization", "zero_stage"})
    )


def _in_section(path: KeyPath, text: str) -> str:
    return f"{dotted(path)}: {text}" if path else text


_BETTER_PHRASES = {
    "num_devices": ["the number of devices, such as 8", "`{min: 4, max: 8}`"],
    "hub_model_id": ["ORG/NAME, a repository of the Hugging Face Hub"],
}
"""Key -> descriptions of its accepted values that say more than their types."""


_LIMITS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
"""Pydantic's errors about a number that is too small or too large."""


_OR_REMOVE = ", or remove the key"


def _expected(path: KeyPath, errors: list[ErrorDetails]) -> str:
    limits = [error for error in errors if error["type"] in _LIMITS]
    better = None if limits else _BETTER_PHRASES.get(dotted(path))
    phrases = better or list(dict.fromkeys(map(_phrase, limits or errors)))
    if "a number" in phrases and "an integer" in phrases:
        phrases.remove("an integer")
    return f"write {' or '.join(phrases)}"


def _phrase(error: ErrorDetails) -> str:
    """Return a description of the accepted values for one of pydantic's error types."""
    limits = error.get("ctx", {})
    match error["type"]:
        case "literal_error":
            return _choices(error)
        case "bool_type":
            return "true or false"
        case "int_type" | "int_from_float":
            return "an integer"
        case "float_type":
            return "a number"
        case "string_type":
            return "text"
        case "list_type":
            return "a list"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "a section of `key: value` lines"
        case "greater_than":
            return f"a number above {limits['gt']:g}"
        case "greater_than_equal":
            return f"a number of at least {limits['ge']:g}"
        case "less_than_equal":
            return f"a number of at most {limits['le']:,}"
        case "less_than":
            return f"a number below {limits['lt']:g}"
        case "finite_number":
            return "a finite number"
        case "string_too_short":
            return f"some text{_OR_REMOVE}"
        case "string_too_long":
            return f"at most {limits['max_length']} characters"
        case "too_short":
            return f"at least {limits['min_length']} items"
        case "string_pattern_mismatch":
            return "only letters, digits, `.`, `_` and `-`, starting with a letter or digit"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"`provider: {'`, `provider: '.join(_LOGGERS)}`"
    return f"something else ({error['msg']})"


_LOGGERS = ("wandb", "mlflow", "tensorboard")


def _choices(error: ErrorDetails) -> str:
    """Return pydantic's list of choices without quotes: `'a', 'b' or 'c'` -> a, b or c."""
    return error.get("ctx", {})["expected"].replace("'", "")


def _fix(path: KeyPath, value: Any, errors: list[ErrorDetails]) -> str:
    """Return what to write instead of a value: the setting that is probably meant, else the accepted values with a hint."""
    if value in (None, ""):
        return (
            _to_write(_help(path))
            if _is_required(path)
            else f"{_expected(path, errors).removesuffix(_OR_REMOVE)}{_OR_REMOVE} to use its default"
        )
    instead, reason = _other_tools_value(path, value)
    if instead:
        return instead
    if reason:
        return reason
    kinds = {error["type"] for error in errors}
    if (sections := _sections_at(path)) and not kinds - {"dict_type", "model_type", "model_attributes_type"}:
        return _section_fix(path, value, sections)
    if path[-1] in ("train_path", "valid_path") and isinstance(value, dict):
        return f"write a path, or a list such as `{path[-1]}: [{{path: a.jsonl, weight: 2}}, ...]`"
    expected, hint = _expected(path, errors), _hint(value, errors)
    if len(expected) > _LONG and hint.startswith(_MEANT):
        return hint.strip(" ()")  # the line stays within two lines of a terminal
    return f"{expected}{hint}"


_LONG = 80
_MEANT = " (did you mean "


def _hint(value: Any, errors: list[ErrorDetails]) -> str:
    kinds = {error["type"] for error in errors}
    if isinstance(value, str) and "bool_type" in kinds and value.lower() in ("yes", "no", "on", "off"):
        return f" ({value} is text in this YAML)"
    if isinstance(value, str) and "bool_type" in kinds and value.lower() in ("true", "false"):
        return " (without quotes)"
    if isinstance(value, str) and "float_type" in kinds and re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?%", value):
        return f": {float(value[:-1]) / 100:g}"
    if (
        isinstance(value, str)
        and kinds & {"int_type", "float_type"}
        and not isinstance(plain_scalar(value), str)
    ):
        return " (write numbers without quotes)"
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    if is_whole and "int_type" in kinds and not kinds.intersection(_LIMITS):
        return f": {int(value)}"
    if isinstance(value, str) and "literal_error" in kinds:
        choices = [choice for error in errors for choice in _choices_list(error)]
        if value.lower() == "gpu" and "cuda" in choices:
            return " (use `cuda` for a GPU)"
        if near := difflib.get_close_matches(value.lower(), choices, n=1):
            return f"{_MEANT}`{near[0]}`?)"
    return ""


def _other_tools_value(path: KeyPath, value: Any) -> tuple[str, str]:
    """Return (what to write for a value that another tool accepts, such as `deepspeed: 3`; why it has no counterpart)."""
    key = dotted(path)
    if key == "deepspeed" and isinstance(value, str) and value.endswith(".json"):
        preset = other_tools.deepspeed_setting(value)
        instead = f"`deepspeed: {preset}`, or `deepspeed: {{config_path: {value}}}`"
        return f"write {instead if isinstance(preset, str) else f'`deepspeed: {{config_path: {value}}}`'}", ""
    if isinstance(value, str | bool) and (instead := _OTHER_VALUES.get((key, value))):
        return instead, ""
    if (
        key == "checkpoint_and_evaluation_frequency"
        and isinstance(value, int)
        and not isinstance(value, bool)
    ):
        return f"write `{key}: {{unit: steps, frequency: {value}}}`", ""
    if key == "valid_path" and isinstance(value, float) and 0 < value < 1:
        return f"write `valid_split: {value:g}`", ""
    if key == "deepspeed" and isinstance(value, int) and not isinstance(value, bool) and not 0 <= value <= 3:
        return "write `deepspeed: zero_1`, `zero_2` or `zero_3`", ""
    theirs = _SAME_MEANING.get(key, key)
    row = next((row for row in other_tools.TABLE if (row.theirs, row.ours) == (theirs, key)), None)
    if row is None:
        return "", ""
    try:
        settings = row.settings(value)
    except other_tools.NotNumberError:
        return "", ""
    except other_tools.NoCounterpartError as error:
        return "", "" if _is_near_a_choice(path, value) else str(error)
    except (TypeError, ValueError, AttributeError):
        return "", ""
    if not settings:
        return ("remove the key" if isinstance(value, int | float) and value <= 0 else ""), ""
    return (f"write {written(settings)}" if settings.get(key) != value else ""), ""


_SAME_MEANING = {"num_warmup_steps": "warmup_steps", "valid_split": "val_set_size"}


def _is_near_a_choice(path: KeyPath, value: Any) -> bool:
    choices = [
        choice
        for field in _fields_at(path)
        for choice in get_args(field.annotation)
        if isinstance(choice, str)
    ]
    return isinstance(value, str) and bool(difflib.get_close_matches(value.lower(), choices, n=1))


_OTHER_VALUES = (
    {
        ("task", "dpo"): "write `task: preference_tuning`, whose default loss is dpo",
        ("task", "sft"): "write `task: instruction_tuning`",
        ("task", "pt"): "write `task: causal_lm`",
        ("task", "pretrain"): "write `task: causal_lm`",
        ("task", "pretraining"): "write `task: causal_lm`",
        ("dtype", "fp16"): other_tools.NO_FP16,
        ("dtype", "float16"): other_tools.NO_FP16,
        (
            "checkpoint_and_evaluation_frequency",
            "epochs",
        ): "write `checkpoint_and_evaluation_frequency: {unit: epochs}`",
        (
            "checkpoint_and_evaluation_frequency",
            "epoch",
        ): "write `checkpoint_and_evaluation_frequency: {unit: epochs}`",
        (
            "resume_from_checkpoint",
            True,
        ): "remove the key and run the same command again: a run resumes from its latest checkpoint",
        ("eval_steps", "epoch"): "remove the key: after each epoch is the default",
        ("save_steps", "epoch"): "remove the key: after each epoch is the default",
        ("logger", "none"): "remove the key: without it, metrics are only in the run's own files",
        ("deepspeed", "none"): "remove the key: without it, DeepSpeed is not used",
        ("resume", True): "write `resume: auto`, the default",
        ("resume", False): "write `resume: never`",
    }
    | {
        ("task", loss): f"write `task: preference_tuning` and `preference_tuning_config: {{loss: {loss}}}`"
        for loss in ("ipo", "orpo", "kto")
    }
    | {
        (
            "preference_tuning_config.loss",
            loss,
        ): f"there is no preference loss {loss}: use dpo, ipo, orpo or kto"
        for loss in ("simpo", "cpo", "rpo", "sppo", "hinge")
    }
    | {
        ("data_format", name): f"write `data_format: {ours}`"
        for name, ours in {
            "sharegpt": "conversations",
            "alpaca": "instruction",
            "chatml": "messages",
            "openai": "messages",
            "dpo": "preference",
            "completion": "text",
        }.items()
    }
)


def _section_fix(path: KeyPath, value: Any, sections: list[type[Section]]) -> str:
    """Return how to write a section for which something else was given, with the names of its keys."""
    key = dotted(path)
    if path == ("logger",):
        name = value[0] if isinstance(value, list) and value else value
        return f"write `logger: {{provider: {name if name in _LOGGERS else 'wandb'}}}`"
    fields = {name: field for section in sections for name, field in section.model_fields.items()}
    if value is False:
        return "remove it"
    default = (
        ""
        if any(field.is_required() for field in fields.values())
        else f"`{key}: {{}}` for its defaults, or "
    )
    names = list(fields)
    return (
        f"write {default}a section with keys {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}"
    )


def written(settings: Mapping[str, Any], data: Mapping[str, Any] = {}, *, as_overrides: bool = False) -> str:
    """Return settings as a message quotes them.

    Args:
        settings: dotted keys and values.
        data: the file; a section that it has is not written again.
        as_overrides: quote them as `section.key=value`.
    """
    if as_overrides:
        return " and ".join(f"`{key}={flow(value)}`" for key, value in settings.items())
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, inner = key.partition(".")
        if inner and isinstance(data.get(section), dict):
            nested[f"{section}\n{inner}"] = value
        elif inner:
            nested[section] = nested.get(section, {}) | {inner: value}
        elif value != {} or section not in data:
            nested.setdefault(section, value)
    parts = []
    for key, value in nested.items():
        section, _, inner = key.partition("\n")
        parts.append(f"`{inner}: {flow(value)}` in `{section}`" if inner else f"`{section}: {flow(value)}`")
    return " and ".join(parts)


def _choices_list(error: ErrorDetails) -> list[str]:
    """Return the choices that pydantic lists for a value or a key."""
    choices = _choices(error).replace(" or ", ",").split(",") if error["type"] == "literal_error" else []
    return [choice.strip() for choice in choices]


_OTHER_NAMES = {
    name: ours
    for ours, names in {
        "learning_rate": "lr",
        "num_devices": "num_gpus n_gpus n_gpu gpus gpus_per_node nproc_per_node num_processes num_workers devices",
        "device": "accelerator",
        "device: cuda": "use_gpu",
        "dtype": "precision mixed_precision",
        "lora_config": "lora peft peft_args peft_config lora_args qlora qlora_config",
        "lora_config.r": "rank lora_rank",
        "load_in_4bit": "quantization quantize quantization_config bnb_config bnb_4bit use_4bit",
        "kernels: unsloth": "unsloth",
        "kernels: liger": "liger liger_rope liger_rms_norm liger_layer_norm liger_swiglu liger_glu_activation liger_cross_entropy "
        "liger_fused_linear_cross_entropy",
        "task: preference_tuning": "dpo",
        "logger: {provider: wandb}": "wandb",
        "logger: {provider: mlflow}": "mlflow",
        "logger: {provider: tensorboard}": "tensorboard",
        "train_batch_size_per_device": "per_device_batch_size batch_size_per_device device_batch_size per_gpu_train_batch_size",
        "gradient_accumulation_steps": "grad_accum grad_acc grad_accumulation accumulation_steps accumulate_grad_batches",
        "num_warmup_steps": "warmup n_warmup_steps",
        "max_grad_norm": "gradient_clipping gradient_clip_val grad_clip grad_norm_clip clip_grad",
        "valid_split": "test_size validation_split eval_ratio",
        "model_id": "model model_name model_path base_model_name_or_path pretrained_model_name_or_path",
        "train_path": "train_file train_files train_data train_dataset training_data data data_path dataset_path "
        "dataset_mixer data_files",
        "valid_path": "validation_file valid_file val_path eval_path eval_file eval_data validation_path",
        "max_train_rows": "max_rows num_rows",
        "context_length": "max_len max_tokens block_size seq_length",
        "adam_beta1` and `adam_beta2": "betas adam_betas",
        "sequence_parallel_size": "sp_size cp_size ulysses_size sequence_parallel_degree",
    }.items()
    for name in names.split()
}
"""Names that scripts and launchers often use for a key, and that resemble another key or none."""


def _unknown_key(document: Document, path: KeyPath, value: Any) -> str:
    """Return the message for an unknown key; it contains only values that another tool's key has, and no secret."""
    data, key = document.data, str(path[-1])
    if any(names_secret(str(part)) for part in path):
        return f"`{dotted(path)}` is not a key (its value is not shown): remove it; {SECRETS_COME_FROM}"
    elsewhere = [name for name in FinetuneConfig.model_fields if key in _keys_of((name,), {})]
    advice = None
    if len(path) == 1 and elsewhere != ["lora_config"]:
        advice = other_tools_key(key, value, data, as_overrides=document.origin(path).from_override)
        advice = advice and f"`{key}` is {advice}"
    elif len(path) == 2:
        advice = _other_tools_key_in_section(path)
    if advice:
        return advice
    if path in (("system_prompt",), ("system_message",), ("system",)):
        return f"`{key}` is not a key: remove it, and write the system message into the rows (a message, or a column `system`)"
    if len(path) == 1 and isinstance(value, dict) and "_component_" in value:
        return f"`{key}` is a component of torchtune: remove it (`model_id` names the model; `main.py convert` translates complete files)"
    if len(path) == 1 and isinstance(value, dict) and _sections_at((_OTHER_NAMES.get(key, ""),)):
        return f"`{key}` is not a key: did you mean `{_OTHER_NAMES[key]}`?"
    if key in path[:-1] and isinstance(value, dict):
        return f"`{dotted(path)}` is not a key: write its keys directly into `{dotted(path[:-1])}`"
    if len(path) == 1 and isinstance(value, dict) and any(map(_is_known, value)):
        names = ", ".join(dotted((name,)) for name in list(value)[:3])
        return f"`{key}` {_IS_NO_SECTION}: write its keys ({names}) at the top level"
    if path[0] == "checkpoint_and_evaluation_frequency" and key in ("steps", "epochs"):
        return f"`{dotted(path)}` is not a key: write `{path[0]}: {{unit: {key}, frequency: {shown(value)}}}`"
    if len(path) == 1 and key in _OTHER_NAMES:
        return f"`{key}` is not a key: did you mean `{_OTHER_NAMES[key]}`?"
    if names := _names_split_by_commas(document, path):
        return f"`{dotted(path)}` is not a key: write {names}, since a comma ends a value in braces"
    if path[0] == "deepspeed" and "config_path" in data["deepspeed"]:
        return f"`{dotted(path)}` is not a key: remove it; the file that `deepspeed.config_path` names has these settings"
    siblings = _keys_of(path[:-1], data)
    near = difflib.get_close_matches(key.lower(), siblings, n=1)
    ours = _key_at_the_top(key) if path[:-1] else None
    if ours not in (None, path[0]) and not (near and ours == key):
        return (
            f"`{dotted(path)}` is not a key: `{ours}` belongs at the top level, not in `{dotted(path[:-1])}`"
        )
    if near:
        return f"`{dotted(path)}` is not a key: did you mean `{dotted((*path[:-1], near[0]))}`?"
    if elsewhere:
        return f"`{dotted(path)}` is not a key: did you mean `{elsewhere[0]}.{key}`?"
    if near := difflib.get_close_matches(key.lower(), siblings, n=1, cutoff=0.5):
        return f"`{dotted(path)}` is not a key (the closest is `{dotted((*path[:-1], near[0]))}`): remove it"
    return f"`{dotted(path)}` is not a key: remove it"


def _names_split_by_commas(document: Document, path: KeyPath) -> str:
    """Return the list that is meant by `{target_modules: q_proj,v_proj}`, which YAML reads as a key v_proj without a value."""
    above: Any = document.data
    for part in path[:-1]:
        above = above[part]
    # Keys of one line, or of one override, are keys of one pair of braces.
    origin = document.origin(path)
    keys = [key for key in above if document.origin((*path[:-1], key)) == origin]
    known = set(_keys_of(path[:-1], document.data))
    for start in range(keys.index(path[-1]) - 1, -1, -1):
        if keys[start] in known:
            rest = itertools.takewhile(
                lambda name: name not in known and above[name] is None, keys[start + 1 :]
            )
            names = [above[keys[start]], *rest]
            is_cut = path[-1] in names and isinstance(names[0], str)
            return f"`{keys[start]}: {flow(names)}`" if is_cut else ""
    return ""


def _is_known(key: str) -> bool:
    """Return whether a key belongs at the top level, here or in another tool's YAML."""
    return key in FinetuneConfig.model_fields or key in _OTHER_NAMES or other_tools.find(key) is not None


def _key_at_the_top(key: str) -> str | None:
    """Return the top-level key that a name stands for here or in another tool's YAML; None if it stands for none."""
    row = other_tools.find(key)
    names = (key, _OTHER_NAMES.get(key), row and row.ours)
    return next((name for name in names if name in FinetuneConfig.model_fields), None)


def meant_key(name: str) -> str | None:
    """Return the key that an unknown name probably stands for; None if none is close."""
    near = difflib.get_close_matches(name.lower(), FinetuneConfig.model_fields, n=1)
    return _OTHER_NAMES.get(name) or next(iter(near), None)


def other_tools_key(key: str, value: Any, data: Mapping[str, Any] = {}, *, as_overrides: bool) -> str | None:
    """Return what another tool's key is called here; None if no tool has it.

    Args:
        key: the key.
        value: its value.
        data: the file, whose sections are not written again.
        as_overrides: quote settings as `key=value`.
    """
    row = other_tools.find(key)
    if row is None:
        return None
    note = f": {row.note}" if row.note else ""
    if row.ours is None or value is None:
        return f"another tool's key without a counterpart: remove it ({row.note or 'it is empty'})"
    counterpart = f"another tool's key: its counterpart is `{row.ours}`{note}"
    try:
        settings = row.settings(value)
    except other_tools.NotNumberError:
        return counterpart
    except other_tools.NoCounterpartError as error:
        return f"another tool's key: {error}"
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
        return counterpart  # the value is not one that the other tool takes
    text = written(settings, data, as_overrides=as_overrides)
    is_copied_section = isinstance(value, dict) and value in settings.values()
    if text and not looks_secret(str(value)) and not is_copied_section and len(text) < 100:
        return f"another tool's key: write {text}"
    return counterpart if text else "another tool's key that needs nothing here: remove it"


def _other_tools_key_in_section(path: KeyPath) -> str | None:
    """Return the message for `lora_rank` or `rank` in `lora_config`, which is `r` there."""
    for name in (f"{path[1]}", f"lora_{path[1]}"):
        row = other_tools.find(name)
        if row and row.ours and row.ours.startswith(f"{path[0]}.") and row.ours != dotted(path):
            return f"`{dotted(path)}` is not a key: did you mean `{row.ours}`?"
    return None


def _sections_at(path: KeyPath) -> list[type[Section]]:
    """Return the section classes that the value at `path` may have."""
    sections: list[type[Section]] = [FinetuneConfig]
    for key in path:
        if isinstance(key, int):
            continue  # an item of a list has the sections of the list
        fields = [section.model_fields[str(key)] for section in sections if key in section.model_fields]
        sections = [below for field in fields for below in sections_of(field.annotation)]
    return sections


def _keys_of(path: KeyPath, data: dict[str, Any]) -> list[str]:
    sections = _sections_at(path)
    if path == ("logger",) and data:
        provider = data["logger"].get("provider")
        sections = [section for section in sections if provider in _choices_of(section)] or sections
    return list(dict.fromkeys(key for section in sections for key in section.model_fields))


def _choices_of(section: type[Section]) -> tuple[Any, ...]:
    """Return the `provider` values of a logger's section class."""
    return get_args(section.model_fields["provider"].annotation)


def _help(path: KeyPath) -> str:
    return next((field.description or "" for field in _fields_at(path)), "")


def _is_required(path: KeyPath) -> bool:
    return any(field.is_required() for field in _fields_at(path))


def _fields_at(path: KeyPath) -> list[FieldInfo]:
    sections = _sections_at(path[:-1])
    return [section.model_fields[str(path[-1])] for section in sections if path[-1] in section.model_fields]


def _to_write(description: str) -> str:
    first = " ".join(description.split()).partition(". ")[0]
    return f"add it ({first.rstrip('.')})"

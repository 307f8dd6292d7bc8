"""The uses of an adapter, and which kinds of adapter the plan rejects for them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.schema import FinetuneConfig, LoraConfig
from tests.support.adapter_training import can_be_new, config_of
from tests.support.adapters import KINDS, REJECTED_STARTS, meta_model
from training.models.adapter import AdapterParameters, continued_adapter, new_adapter
from training.models.files import AdapterFacts, read_model_facts
from training.planning.checks import check_adapter, check_new_adapter, check_zero_3_adapter
from training.planning.exportable import check_vllm_adapter, check_vllm_base
from utils.errors import AnnealError

PREFERENCE = {"task": "preference_tuning"}


def parameters_of(kind: str, models: dict[str, Path]) -> AdapterParameters:
    """Return the parameters of an adapter of a kind, also of one that only other trainers create."""
    name, lora = KINDS[kind]
    settings = LoraConfig(**{**lora, "init_lora_weights": True})
    return new_adapter(meta_model(models[name]), settings)


def _check_new(kind: str, models: dict[str, Path], **settings: Any) -> None:
    config, parameters = config_of(kind, **settings), parameters_of(kind, models)
    check_new_adapter(config, parameters, read_model_facts(str(models[KINDS[kind][0]])))


def _check_continued(kind: str, models: dict[str, Path], **settings: Any) -> None:
    name, lora = KINDS[kind]
    adapter = AdapterFacts("adapter", name, {**lora, "init_lora_weights": True}, {})
    config = FinetuneConfig.model_validate(
        {"model_id": "m", "train_path": "t", "initial_adapter_model_ckpt_path": "a", **settings}
    )
    check_adapter(config, adapter, parameters_of(kind, models), None, read_model_facts(str(models[name])))


def _check_zero_3(kind: str, models: dict[str, Path]) -> None:
    check_zero_3_adapter(parameters_of(kind, models))


def _check_zero_3_continued(kind: str, models: dict[str, Path]) -> None:
    parameters = parameters_of(kind, models)
    file = {**parameters.stored, **parameters.stored_embeddings}
    check_zero_3_adapter(parameters, AdapterFacts("adapter", "m", {}, file))


def _check_vllm(kind: str, models: dict[str, Path]) -> None:
    parameters = parameters_of(kind, models)
    check_vllm_base(read_model_facts(str(models[KINDS[kind][0]])))
    settings = LoraConfig(**{**KINDS[kind][1], "init_lora_weights": True}).model_dump()
    check_vllm_adapter({**settings, "target_parameters": parameters.target_parameters}, parameters.stored)


def _check_start(kind: str, models: dict[str, Path], **settings: Any) -> None:
    """Check a run that starts with a new adapter, or continues one that no run can create."""
    (_check_new if can_be_new(kind) else _check_continued)(kind, models, **settings)


USES: dict[str, Callable[[str, dict[str, Path]], None]] = {
    "train": _check_new,
    "resume": _check_start,
    "continue": _check_continued,
    "preference tuning": lambda kind, models: _check_start(kind, models, **PREFERENCE),
    "the same, continued": lambda kind, models: _check_continued(kind, models, **PREFERENCE),
    "merge": lambda kind, models: None,
    "vLLM": _check_vllm,
    "ZeRO-3": _check_zero_3,
    "ZeRO-3, continued": _check_zero_3_continued,
    "4 bits": lambda kind, models: _check_start(kind, models, load_in_4bit=True),
}
"""Use -> the checks of the plan."""


def rejection(kind: str, use: str, models: dict[str, Path]) -> str | None:
    """Return the plan's error for a kind of adapter in a use, or None if it is supported."""
    try:
        USES[use](kind, models)
    except (AnnealError, ValidationError) as error:
        return str(error)
    return None


def start_rejections(start: str, models: dict[str, Path]) -> list[str]:
    """Return the errors for a new and for a continued adapter with this initialization."""
    errors = []
    adapter = AdapterFacts("adapter", "llama", {"init_lora_weights": start}, {})
    for check in (
        lambda: LoraConfig.model_validate({"init_lora_weights": start}),
        lambda: continued_adapter(meta_model(models["llama"]), adapter),
    ):
        try:
            check()
        except (AnnealError, ValidationError) as error:
            errors.append(str(error))
    return errors


def table(models: dict[str, Path]) -> Iterator[str]:
    """Yield the lines of the table in docs/adapters.md."""
    yield f"| feature | {' | '.join(USES)} |"
    yield "|---" * (1 + len(USES)) + "|"
    for kind in KINDS:
        cells = ("rejected" if rejection(kind, use, models) else "works" for use in USES)
        yield f"| {kind} | {' | '.join(cells)} |"
    for start in REJECTED_STARTS:
        # Every other use has such an adapter, new or continued.
        cells = ["rejected" if len(start_rejections(start, models)) == 2 else "works"] * len(USES)
        yield f"| init_lora_weights: {start} | {' | '.join(cells)} |"

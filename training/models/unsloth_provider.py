"""Unsloth provider, the only module that imports Unsloth. The worker imports it before transformers, trl and peft.

Unsloth's files have AGPL-3.0 headers. It is an optional package; this project neither ships nor copies it.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import unsloth  # must come first: it patches the modules imported below
from transformers import AutoConfig, GenerationConfig, set_seed

from training.models import torch_provider
from training.models.architecture import count_experts
from training.models.files import ModelError
from training.models.generation import correct
from training.models.kernels import UNSLOTH_LORA_FIELDS, offloads_activations
from training.models.request import ModelRequest
from utils.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(request: ModelRequest) -> "PreTrainedModel":
    """Build the model with Unsloth's loaders: fused layers on a GPU, its CPU mode otherwise."""
    if request.adapter_directory is not None:
        with TemporaryDirectory() as temporary:
            return _load(_adapter_on(request.directory, request.adapter_directory, Path(temporary)), request)
    model = _load(request.directory, request)
    if request.lora is None:
        _restore_own_settings(model, request.directory)
        return model
    set_seed(request.seed)
    lora = request.lora
    offloads = offloads_activations(request.gradient_checkpointing, lora, request.context_length)
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        **lora.model_dump(include=set(UNSLOTH_LORA_FIELDS)),
        use_gradient_checkpointing="unsloth" if offloads else bool(request.gradient_checkpointing),
        random_state=request.seed,
        max_seq_length=request.context_length,
    )


def _adapter_on(base: Path, adapter: Path, directory: Path) -> Path:
    """Link the adapter into a directory with a config that has the local base path, a task type and no initialization.

    Unsloth loads the base from that path, and on a GPU it rejects an adapter without a task type. See also `loaded_config`.
    """
    for file in adapter.iterdir():
        (directory / file.name).symlink_to(file.absolute())
    settings = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    (directory / "adapter_config.json").unlink()
    (directory / "adapter_config.json").write_text(
        json.dumps(
            settings
            | {
                "base_model_name_or_path": str(base),
                "task_type": "CAUSAL_LM",
                "init_lora_weights": True,
                "eva_config": None,
            }
        ),
        "utf-8",
    )
    return directory


def _restore_own_settings(model: "PreTrainedModel", directory: Path) -> None:
    """Undo Unsloth's changes to saved configs: the local model path, and the generation's `max_length`."""
    vars(model.config).pop("model_name", None)
    exists = (directory / "generation_config.json").exists()
    own = GenerationConfig.from_pretrained(directory) if exists else GenerationConfig()
    if model.generation_config is not None:
        model.generation_config.max_length = own.max_length


def _is_mixture(request: ModelRequest) -> bool:
    config = AutoConfig.from_pretrained(request.directory, trust_remote_code=request.trust_remote_code)
    return count_experts(config.get_text_config()) > 0


def _load(directory: Path, request: ModelRequest) -> Any:
    import torch

    on_gpu = request.device == "cuda"
    if on_gpu and request.deterministic and _is_mixture(request):
        raise ModelError(
            "deterministic: Unsloth autotunes its mixture-of-experts kernels, so results vary between runs. Set kernels: liger."
        )
    try:
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            model_name=str(directory),
            max_seq_length=request.context_length,
            dtype=torch.bfloat16 if request.weights_dtype == "bf16" else torch.float32,
            load_in_4bit=request.load_in_4bit,
            full_finetuning=not request.is_lora,
            trust_remote_code=request.trust_remote_code,
            use_gradient_checkpointing=request.gradient_checkpointing,
            # Keep the model on one GPU. Otherwise Unsloth may offload parts to the host, and training fails later.
            **({"device_map": {"": torch.cuda.current_device()}} if on_gpu else {}),
            # Otherwise the optimizer updates a trained embedding on the CPU, with different bits than on the GPU.
            **({} if request.is_lora else {"offload_embedding": False}),
        )
    except RuntimeError as error:
        if "valid pad token" in str(error):
            raise ModelError(
                f"kernels: unsloth: {first_line(error).rstrip('.')}. Set kernels: {'liger' if on_gpu else 'torch'}."
            ) from error
        raise
    if model.generation_config is not None:
        correct(model.generation_config, model.config)
    torch_provider.reset_dynamic_rope(model)
    model.config.use_cache = False  # evaluation would fill the KV cache of every layer
    if request.load_in_4bit and not getattr(model, "is_loaded_in_4bit", False):
        # Unsloth silently falls back to 16 bits.
        raise ModelError(
            "load_in_4bit: Unsloth cannot use bitsandbytes here. Run `python -m bitsandbytes` for the cause, or set kernels: liger."
        )
    if request.load_in_4bit and request.device == "cpu":
        torch_provider.keep_4bit_layout(model)
    return model

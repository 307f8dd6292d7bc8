"""Our trainer on a pretended GPU: `python -m tests.support.pretended_gpu PROVIDER DIRECTORY RUN...`.

Pretended is one A10G: torch.cuda says that it is there, what is sent to it stays where it is, tensors say that they lie on it, and its
streams do nothing. So Unsloth and Liger take the code that they have for GPUs, with Triton's interpreter for their kernels, where
Unsloth's CPU mode is mostly stock transformers. Not like a GPU: torch.compile is off, bitsandbytes makes 4-bit weights by its code for
CPUs (Unsloth unpacks them by a kernel of its own), and torch's flash kernels for packed rows are tests/support/varlen_on_cpu.py.

For each run it does what a worker does from the model to the last step, and prints one line of JSON. PROVIDER `torch` runs on CPU,
without the pretence, to be compared with.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch._C._distributed_c10d import HashStore
from torch.overrides import TorchFunctionMode

_GPU = torch.device("cuda", 0)
_PROPERTIES = SimpleNamespace(
    name="NVIDIA A10G",
    major=8,
    minor=6,
    total_memory=22 * 2**30,
    multi_processor_count=80,
    warp_size=32,
    shared_memory_per_block_optin=101376,
)
_device_of = torch.Tensor.device.__get__  # pyright: ignore[reportAttributeAccessIssue]
_is_on_gpu = torch.Tensor.is_cuda.__get__  # pyright: ignore[reportAttributeAccessIssue]


def _host(device: Any) -> Any:
    """A device to put something on, with the CPU in place of the GPU; anything else as it is."""
    if isinstance(device, str | torch.device):
        return "cpu" if str(device).startswith("cuda") else device
    return "cpu" if type(device) is int else device


class _OnCpu(TorchFunctionMode):
    """What is asked to be on the GPU is on the CPU, and says that it is on the GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == _device_of:  # each look-up makes a new one
            real = func(*args)
            return _GPU if real.type == "cpu" else real
        if func == _is_on_gpu:
            return not args[0].is_meta
        if func is torch.device:  # of a number: the accelerator's, and torch knows of none
            return torch.device("cuda", args[0]) if type(args[0]) is int else func(*args, **named)
        if name in ("cuda", "pin_memory"):
            return args[0]
        if name == "to" and len(args) > 1:
            args = (args[0], _host(args[1]), *args[2:])
        if "device" in named:
            named["device"] = _host(named["device"])
        named.pop("pin_memory", None)
        return func(*args, **named)


class _Nothing:
    """A stream or the context of a device."""

    cuda_stream = 0

    def __init__(self, *arguments: Any, **keywords: Any):
        self.idx = 0

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *raised: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **keywords: None


class _Event(_Nothing):
    """A moment."""

    def record(self, *arguments: Any) -> None:
        self.seconds = time.monotonic()

    def elapsed_time(self, later: "_Event") -> float:
        return (later.seconds - self.seconds) * 1000


class _InCuda:
    """A function of bitsandbytes' library for GPUs."""

    restype = None  # as ctypes has it, which Unsloth looks for

    def __call__(self, *arguments: Any) -> None:
        raise RuntimeError("bitsandbytes' code for GPUs was called, and nothing here computes what it does")


def pretend_gpu() -> None:
    """Make this process take a GPU for granted."""
    # First, with its library for CPUs: it has none for a GPU of torch's CPU build.
    from bitsandbytes import functional
    from bitsandbytes.nn import modules
    from torch.amp.autocast_mode import autocast
    from torch.nn.attention import flex_attention
    from torch.utils import checkpoint

    # It would lay out 4-bit weights for this CPU, and backward passes behind that are wrong.
    cast(Any, modules).has_avx512bf16 = lambda: False
    # Unsloth takes 4 bits where it finds these, and leaves them alone for Triton kernels of its own.
    for number in ("fp32", "fp16_nf4", "bf16_nf4", "fp32_nf4"):
        setattr(functional.lib, f"cdequantize_blockwise_{number}", _InCuda())
    for number in ("fp16", "bf16"):
        setattr(functional.lib, f"cgemm_4bit_inference_naive_{number}", _InCuda())
    # Unsloth looks for CUDA's libraries with ldconfig where it may.
    os.geteuid = lambda: 1000
    torch.version.cuda = "13.0"
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (8, 6),
        "get_device_name": _PROPERTIES.name,
        "get_device_properties": _PROPERTIES,
        "mem_get_info": (2**20, 22 * 2**30),  # what is left: Unsloth would make room
        "current_stream": _Nothing(),
        "default_stream": _Nothing(),
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8)],
    }
    silent = ("_lazy_init", "empty_cache", "manual_seed", "manual_seed_all", "reset_peak_memory_stats")
    silent += ("set_device", "set_rng_state", "set_rng_state_all", "synchronize")
    for name, answer in (answers | dict.fromkeys(silent)).items():
        for module in (torch.cuda, torch.cuda.random):
            if hasattr(module, name):
                setattr(module, name, lambda *_, answer=answer, **__: answer)
    for name in ("Stream", "device", "device_of", "stream"):
        setattr(torch.cuda, name, _Nothing)
    torch.cuda.Event = _Event
    for name, answer in {
        "is_available": True,
        "current_accelerator": torch.device("cuda"),
        "current_stream": _Nothing(),
        "current_device_index": 0,
        "device_count": 1,
    }.items():
        setattr(torch.accelerator, name, lambda *_, answer=answer, **__: answer)
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    # Both look below what is pretended: which device a layer that is computed again saves for, and where flex attention (Gemma 3) is.
    checkpoint._allowed_determinism_checks_to_fns["default"] = lambda tensor: (tensor.shape, tensor.dtype)
    flex_attention._validate_device = lambda *_: None

    make = autocast.__init__
    autocast.__init__ = lambda self, device_type, *more, **named: make(
        self, _host(device_type), *more, **named
    )
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        asked = getattr(torch, name)
        setattr(torch, name, lambda *types, asked=asked: asked(*map(_host, types)))
    cast(Any, _OnCpu()).__enter__()


def train(provider: str, plan_file: Path, directory: Path, restored: Path | None = None) -> dict[str, Any]:
    """What a worker does from the model to the last step, with the largest batch rehearsed behind the first."""
    from training.loop.worker import model_request, peak_flops, prepare_process
    from training.models.attention import choose_attention, read_traits
    from training.models.kernels import KernelChoice
    from training.models.tokenizer import load_tokenizer
    from training.planning.plan import RunPlan
    from training.world import World

    plan = RunPlan.model_validate_json(plan_file.read_text())
    if provider != "torch":
        kernels = KernelChoice(provider, "")  # pyright: ignore[reportArgumentType]
        traits = read_traits(Path(plan.base_model), plan.base_model, trust_remote_code=False)
        attention = choose_attention(plan.config, traits, "cuda", kernels.provider)
        resolved = plan.resolved.model_copy(update={"kernels": kernels, "attention": attention})
        plan = plan.model_copy(update={"device": "cuda", "resolved": resolved})
    prepare_process(plan, World(rank=0, local_rank=0, world_size=1, local_world_size=1, node_rank=0))
    if provider == "unsloth":
        from unsloth.kernels import cross_entropy_loss

        from tests.support.triton_interpreter import cast

        cross_entropy_loss.triton_cast = cast

    from training.data.prepared import fetch_prepared
    from training.loop.callbacks import AfterFirstStep, Schedule
    from training.loop.throughput import GpuTimeline, HostTimeline, PhaseClock, Throughput
    from training.loop.trainer_factory import build_trainer
    from training.loop.trainers import trainer_arguments
    from training.models import build_model

    assert plan.valid
    rows, valid = (fetch_prepared(key, plan.cache, plan.prepared) for key in (plan.train, plan.valid))
    arguments = trainer_arguments(plan, directory, devices=1, eval_first=restored is None)
    base = Path(plan.base_model)
    request = model_request(plan, base, Path(plan.adapter) if plan.adapter else None, rows, valid)
    model: Any = build_model(plan.resolved.kernels.provider, request)
    order = plan.order(rows.index.length, rows.summary.longest, 1)
    throughput = Throughput(
        order,
        rows.index.tokens.tolist(),
        rows.index.trained_tokens.tolist(),
        clock=PhaseClock(GpuTimeline() if plan.device == "cuda" else HostTimeline()),
        flops=plan.flops,
        peak_flops=peak_flops(plan, 1),
    )
    frequency = plan.config.checkpoint_and_evaluation_frequency
    trainer = build_trainer(
        plan,
        order,
        rows,
        valid,
        model=model,
        request=request,
        tokenizer=load_tokenizer(base, trust_remote_code=False, source=str(base), chat_template=None),
        args=arguments,
        callbacks=[Schedule(frequency, plan.steps_per_epoch, evaluates=True), throughput],
        throughput=throughput,
        on_eval_progress=lambda _: None,
    )
    trainer.add_callback(AfterFirstStep(trainer.rehearse))
    decoder = model.get_base_model() if request.is_lora else model
    keeps_keys = set()
    decoder.register_forward_hook(
        lambda module, inputs, outputs: keeps_keys.add(outputs.get("past_key_values") is not None)
    )
    trainer.train(resume_from_checkpoint=str(restored) if restored else None)
    layer = decoder.model.layers[0]
    log = trainer.state.log_history
    return {
        "losses": [line["loss"] for line in log if "loss" in line],
        "gradient_norms": [line["grad_norm"] for line in log if "loss" in line],
        "evaluations": [
            {name: value for name, value in line.items() if name.startswith("eval_")}
            for line in log
            if "eval_loss" in line
        ],
        "device": str(trainer.args.device),
        "autocast": trainer.accelerator.mixed_precision,
        "attention": decoder.config._attn_implementation,
        "offloads": hasattr(decoder.get_input_embeddings(), "_unsloth_offload_hooks_installed"),
        "kernel": getattr(layer.self_attn, "apply_qkv", layer.input_layernorm.forward).__qualname__,
        "keeps_keys": True in keeps_keys,
    }


def refused(directory: Path) -> dict[str, str]:
    """What our provider says to what Unsloth takes in another way, or refuses in other words."""
    from unsloth.models import loader

    from configs.schema import LoraConfig
    from training.models import ModelRequest, unsloth_provider
    from training.models.attention import Attention
    from training.models.files import ModelError

    loader.ALLOW_BITSANDBYTES = False  # as it finds for itself where bitsandbytes has no functions for GPUs
    said = {}
    for model in ("llama", "without_pad", "mixture"):
        request = ModelRequest(
            directory=directory / model,
            adapter_directory=None,
            lora=LoraConfig(),
            device="cuda",
            weights_dtype="bf16",
            zero_stage=0,
            load_in_4bit=model == "llama",
            attention=Attention("unsloth", mask=True),
            gradient_checkpointing=True,
            context_length=32,
            seed=0,
            trust_remote_code=False,
            deterministic=model == "mixture",
        )
        try:
            unsloth_provider.build(request)
        except ModelError as error:
            said[model] = str(error)
    return said


def main(provider: str, directory: Path, runs: list[str]) -> dict[str, Any]:
    """What was found in each run, whose plan lies in a directory of its name; `resumed` is `lora` as it goes on from step 1, and
    `refused` is none.
    """
    found = {}
    for run in runs:
        if run == "refused":
            found[run] = refused(directory)
        elif run == "resumed":
            results = directory / "lora" / provider
            plan, checkpoint = directory / "lora" / "plan.json", results / "checkpoint-1"
            found[run] = train(provider, plan, results / run, checkpoint)
        else:
            found[run] = train(provider, directory / run / "plan.json", directory / run / provider)
    return found


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name, directory, *runs = sys.argv[1:]
    if name == "torch":
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    else:
        from tests.support import triton_interpreter, varlen_on_cpu  # noqa: F401

        pretend_gpu()
    print(json.dumps(main(name, Path(directory), runs)))

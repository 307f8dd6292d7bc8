"""The product's trainer on a simulated GPU: `python -m tests.support.pretended_gpu PROVIDER DIRECTORY RUN...`.

The simulated GPU is one A10G. torch.cuda reports it, tensors that are moved to it stay in host memory but report it as their
device, and its streams do nothing. So Unsloth and Liger run their code for GPUs, with their kernels in Triton's interpreter;
Unsloth's CPU mode would be mostly stock transformers. It differs from a real GPU:

- torch.compile is off.
- bitsandbytes makes 4-bit weights with its CPU code; Unsloth dequantizes them with its own kernel.
- tests/support/varlen_on_cpu.py replaces torch's flash kernels for packed rows.

The module performs each RUN as a worker does, from building the model to the last step, and prints one line of JSON. PROVIDER
`torch` runs on CPU without the simulation, as the reference.
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


def _host_device(device: Any) -> Any:
    """Return the CPU for a GPU device or index, and any other argument unchanged."""
    if isinstance(device, str | torch.device):
        return "cpu" if str(device).startswith("cuda") else device
    return "cpu" if type(device) is int else device


class _SimulatedGpu(TorchFunctionMode):
    """A mode in which tensors are on the CPU but report the GPU as their device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == _device_of:  # each access returns a new device object
            real = func(*args)
            return _GPU if real.type == "cpu" else real
        if func == _is_on_gpu:
            return not args[0].is_meta
        if func is torch.device:  # an index alone means the accelerator, and torch has none here
            return torch.device("cuda", args[0]) if type(args[0]) is int else func(*args, **named)
        if name in ("cuda", "pin_memory"):
            return args[0]
        if name == "to" and len(args) > 1:
            args = (args[0], _host_device(args[1]), *args[2:])
        if "device" in named:
            named["device"] = _host_device(named["device"])
        named.pop("pin_memory", None)
        return func(*args, **named)


class _NoOp:
    """A stream or device context that does nothing."""

    cuda_stream = 0

    def __init__(self, *arguments: Any, **keywords: Any):
        self.idx = 0

    def __enter__(self) -> "_NoOp":
        return self

    def __exit__(self, *raised: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **keywords: None


class _Event(_NoOp):
    """An event that records the time of the host."""

    def record(self, *arguments: Any) -> None:
        self.seconds = time.monotonic()

    def elapsed_time(self, later: "_Event") -> float:
        return (later.seconds - self.seconds) * 1000


class _CudaFunction:
    """A function of bitsandbytes' CUDA library that must not be called."""

    restype = None  # Unsloth expects this attribute of ctypes functions

    def __call__(self, *arguments: Any) -> None:
        raise RuntimeError("bitsandbytes' CUDA code was called, and the simulated GPU cannot run it")


def simulate_gpu() -> None:
    """Simulate the GPU in this process."""
    # Import bitsandbytes first, so that it loads its CPU library: it has no GPU library for torch's CPU build.
    from bitsandbytes import functional
    from bitsandbytes.nn import modules
    from torch.amp.autocast_mode import autocast
    from torch.nn.attention import flex_attention
    from torch.utils import checkpoint

    # With AVX-512 BF16, bitsandbytes repacks 4-bit weights during evaluation, and later backward passes are wrong.
    cast(Any, modules).has_avx512bf16 = lambda: False
    # Unsloth enables 4 bits only if these functions exist; its own Triton kernels replace them.
    for number in ("fp32", "fp16_nf4", "bf16_nf4", "fp32_nf4"):
        setattr(functional.lib, f"cdequantize_blockwise_{number}", _CudaFunction())
    for number in ("fp16", "bf16"):
        setattr(functional.lib, f"cgemm_4bit_inference_naive_{number}", _CudaFunction())
    # The simulation is a mode of this thread, and transformers would load weights in others.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    # As root, Unsloth would search for CUDA's libraries with ldconfig.
    os.geteuid = lambda: 1000
    torch.version.cuda = "13.0"
    return_values = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (8, 6),
        "get_device_name": _PROPERTIES.name,
        "get_device_properties": _PROPERTIES,
        # (free, total): with so little free memory, Unsloth offloads embeddings.
        "mem_get_info": (2**20, 22 * 2**30),
        "current_stream": _NoOp(),
        "default_stream": _NoOp(),
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": [torch.zeros(16, dtype=torch.uint8)],
    }
    no_ops = ("_lazy_init", "empty_cache", "manual_seed", "manual_seed_all", "reset_peak_memory_stats")
    no_ops += ("set_device", "set_rng_state", "set_rng_state_all", "synchronize")
    for name, return_value in (return_values | dict.fromkeys(no_ops)).items():
        for module in (torch.cuda, torch.cuda.random):
            if hasattr(module, name):
                setattr(module, name, lambda *_, return_value=return_value, **__: return_value)
    for name in ("Stream", "device", "device_of", "stream"):
        setattr(torch.cuda, name, _NoOp)
    torch.cuda.Event = _Event
    for name, return_value in {
        "is_available": True,
        "current_accelerator": torch.device("cuda"),
        "current_stream": _NoOp(),
        "current_device_index": 0,
        "device_count": 1,
    }.items():
        setattr(torch.accelerator, name, lambda *_, return_value=return_value, **__: return_value)
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    # Both checks bypass the simulation: the device of recomputed activations, and the device of flex attention (Gemma 3).
    checkpoint._allowed_determinism_checks_to_fns["default"] = lambda tensor: (tensor.shape, tensor.dtype)
    flex_attention._validate_device = lambda *_: None

    original_init = autocast.__init__
    autocast.__init__ = lambda self, device_type, *more, **named: original_init(
        self, _host_device(device_type), *more, **named
    )
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        original = getattr(torch, name)
        setattr(torch, name, lambda *types, original=original: original(*map(_host_device, types)))
    cast(Any, _SimulatedGpu()).__enter__()


def patch_unsloth() -> None:
    """Replace a function of Unsloth's kernels that Triton's interpreter cannot run; call it once Unsloth is imported."""
    from unsloth.kernels import cross_entropy_loss

    from tests.support.triton_interpreter import triton_cast

    cross_entropy_loss.triton_cast = triton_cast


def train(provider: str, plan_file: Path, directory: Path, restored: Path | None = None) -> dict[str, Any]:
    """Train as a worker does, with a run of the largest batch after the first step, and return what the tests compare."""
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
        patch_unsloth()

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
    trainer = build_trainer(
        plan,
        order,
        rows,
        valid,
        model=model,
        request=request,
        tokenizer=load_tokenizer(base, trust_remote_code=False, source=str(base), chat_template=None),
        args=arguments,
        callbacks=[Schedule(plan.config, plan.steps_per_epoch, plan.max_steps, evaluates=True), throughput],
        throughput=throughput,
        on_eval_progress=lambda _: None,
    )
    trainer.add_callback(AfterFirstStep(trainer.run_largest_batch))
    decoder = model.get_base_model() if request.is_lora else model
    has_kv_cache = set()
    decoder.register_forward_hook(
        lambda module, inputs, outputs: has_kv_cache.add(outputs.get("past_key_values") is not None)
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
        "has_kv_cache": True in has_kv_cache,
    }


def collect_errors(directory: Path) -> dict[str, str]:
    """Return the product's error for each model that Unsloth would load differently or reject in its own words."""
    from unsloth.models import loader

    from configs.schema import LoraConfig
    from training.models import ModelRequest, unsloth_provider
    from training.models.attention import Attention
    from training.models.files import ModelError

    loader.ALLOW_BITSANDBYTES = False  # Unsloth sets this itself if bitsandbytes has no CUDA functions
    messages = {}
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
            messages[model] = str(error)
    return messages


def main(provider: str, directory: Path, runs: list[str]) -> dict[str, Any]:
    """Perform the runs and return the results of each.

    Args:
        provider: The kernels provider.
        directory: Holds the plan of each run in a directory with the run's name.
        runs: Names of runs. `resumed` resumes `lora` from step 1; `rejected` collects errors instead.
    """
    if "qlora" in runs:
        import bitsandbytes  # noqa: F401  # the runs before it withhold it from their process

    results = {}
    for run in runs:
        if run == "rejected":
            results[run] = collect_errors(directory)
        elif run == "resumed":
            output = directory / "lora" / provider
            plan, checkpoint = directory / "lora" / "plan.json", output / "checkpoint-1"
            results[run] = train(provider, plan, output / run, checkpoint)
        else:
            results[run] = train(provider, directory / run / "plan.json", directory / run / provider)
    return results


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    provider, directory, *runs = sys.argv[1:]
    if provider == "torch":
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    else:
        from tests.support import triton_interpreter, varlen_on_cpu  # noqa: F401

        simulate_gpu()
    print(json.dumps(main(provider, Path(directory), runs)))

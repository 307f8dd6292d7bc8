"""Our trainer on a pretended GPU: `python -m tests.support.pretended_gpu PROVIDER PLAN.json DIRECTORY`.

Pretended is one A10G: torch.cuda says that it is there, what is sent to it stays where it is, tensors say that they lie on it, and its
streams and events do nothing. So Unsloth and Liger take the code that they have for GPUs, with Triton's interpreter for their kernels,
where Unsloth's CPU mode is mostly stock transformers. Not like a GPU: torch.compile is off, and so is everything that bitsandbytes has in
CUDA, without which Unsloth loads 16 bits instead of 4.

It does what a worker does from the model to the last step, in a process of its own, and prints one line of JSON. PROVIDER `torch`
runs on CPU, without the pretence, to be compared with.
"""

import json
import os
import sys
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
        if func is _device_of:
            real = func(*args)
            return _GPU if real.type == "cpu" else real
        if func is _is_on_gpu:
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
    """A stream, an event or the context of a device."""

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


def pretend_gpu() -> None:
    """Make this process take a GPU for granted."""
    import bitsandbytes  # noqa: F401  # with its library for CPUs: it has none for a GPU of torch's CPU build
    from torch.amp.autocast_mode import autocast

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
        "mem_get_info": (20 * 2**30, 22 * 2**30),
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
    for name in ("Event", "Stream", "device", "device_of", "stream"):
        setattr(torch.cuda, name, _Nothing)
    for name, answer in {
        "is_available": True,
        "current_accelerator": torch.device("cuda"),
        "current_stream": _Nothing(),
        "current_device_index": 0,
        "device_count": 1,
    }.items():
        setattr(torch.accelerator, name, lambda *_, answer=answer, **__: answer)
    torch._C._cuda_getCurrentRawStream = lambda index: 0

    make = autocast.__init__
    autocast.__init__ = lambda self, device_type, *more, **named: make(
        self, _host(device_type), *more, **named
    )
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        asked = getattr(torch, name)
        setattr(torch, name, lambda *types, asked=asked: asked(*map(_host, types)))
    cast(Any, _OnCpu()).__enter__()


def train(provider: str, plan_file: Path, directory: Path) -> dict[str, Any]:
    """What a worker does from the model to a checkpoint of the last step, with the largest batch rehearsed behind the first."""
    from training.models.kernels import KernelChoice
    from training.models.tokenizer import load_tokenizer
    from training.place import Place
    from training.plan import RunPlan
    from training.worker import model_request, prepare_process

    plan = RunPlan.model_validate_json(plan_file.read_text())
    if provider != "torch":
        plan = plan.model_copy(update={"device": "cuda", "kernels": KernelChoice(provider, "")})  # pyright: ignore[reportArgumentType]
    prepare_process(plan, Place(rank=0, local_rank=0, world_size=1, local_world_size=1, node_rank=0))

    from training.callbacks import AfterFirstStep
    from training.data.prepared import fetch_prepared
    from training.models import build_model
    from training.objectives import build_trainer
    from training.speed import HostTimeline, PhaseClock, Throughput
    from training.trainers import trainer_arguments

    assert plan.valid
    rows, valid = (fetch_prepared(key, plan.cache, plan.prepared) for key in (plan.train, plan.valid))
    arguments = trainer_arguments(plan, directory, devices=1, eval_first=True)
    base = Path(plan.base_model)
    request = model_request(plan, base, None, rows, valid)
    model: Any = build_model(plan.kernels.provider, request)
    order = plan.order(rows.index.length, rows.summary.longest, 1)
    throughput = Throughput(
        order,
        rows.index.tokens.tolist(),
        rows.index.trained_tokens.tolist(),
        clock=PhaseClock(HostTimeline()),
        flops=None,
        peak_flops=None,
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
        callbacks=[throughput],
        throughput=throughput,
        on_eval_progress=lambda _: None,
    )
    trainer.add_callback(AfterFirstStep(trainer.rehearse))
    keeps_keys = set()
    model.get_base_model().register_forward_hook(
        lambda module, inputs, outputs: keeps_keys.add(outputs.get("past_key_values") is not None)
    )
    trainer.train()
    trainer._save_checkpoint(trainer.model, None)
    trainer.evaluate()
    layer = model.get_base_model().model.layers[0]
    log = trainer.state.log_history
    return {
        "losses": [line["loss"] for line in log if "loss" in line],
        "gradient_norms": [line["grad_norm"] for line in log if "loss" in line],
        "eval_losses": [line["eval_loss"] for line in log if "eval_loss" in line],
        "device": str(trainer.args.device),
        "autocast": trainer.accelerator.mixed_precision,
        "kernel": getattr(layer.self_attn, "apply_qkv", layer.input_layernorm.forward).__qualname__,
        "keeps_keys": True in keeps_keys,
    }


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.argv[1] == "torch":
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    else:
        from tests.support import triton_interpreter  # noqa: F401

        pretend_gpu()
    print(json.dumps(train(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))

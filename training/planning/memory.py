"""How much memory a device needs for a run, counted from shapes before anything is built."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from configs.schema import FinetuneConfig, PreferenceTuningConfig
from training.data.batches import padded_length
from training.models.architecture import (
    ATTENTION_OUTPUT,
    PACKED_WITHOUT_MASK,
    ModelShape,
    is_embedding,
    is_expert,
    is_head,
    position,
    share_of_experts,
)
from training.models.files import AdapterFacts, ModelFacts, is_trained_whole, lora_ranks
from training.models.kernels import Device, Provider, offloads_activations
from training.planning.deepspeed import Execution, check_optimizer, resolve_execution
from utils.errors import AnnealError
from utils.files import format_bytes

_FP32 = 4
# bitsandbytes' NF4 with double quantisation: half a byte, an 8-bit scale for 64 weights, a 32-bit one for 256 of those
# (Dettmers et al. 2023, arXiv 2305.14314, section 3).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# bitsandbytes' 8-bit states: a byte, and a 32-bit scale for 256 of them (Dettmers et al. 2021, arXiv 2110.02861); small tensors keep 32.
_EIGHT_BITS, _LEAST_IN_EIGHT_BITS = 1 + 4 / 256, 4096
_LEAST_PAGED = 100_000  # smaller tensors of a paged optimizer stay on the device
# Of TRL's fused head: tokens and words that it computes logits of at a time.
_HEAD_TOKENS, _HEAD_WORDS = 4096, 32768
_ROWS_OF_A_PAIR = 2
_SURE_SHARE = 0.9  # of a device: the rest is for CUDA, NCCL and the allocator's fragments


@dataclass(frozen=True)
class Job:
    """What decides how much memory a device needs."""

    config: FinetuneConfig
    shape: ModelShape
    facts: ModelFacts
    adapter: AdapterFacts | None
    """The one that is continued, if any."""
    device: Device
    longest: int
    """Tokens of the longest sequence of a batch."""
    execution: Execution
    """DeepSpeed's settings, ZeRO stage and kernels."""
    new_adapter: Mapping[str, tuple[int, ...]] | None = None
    """Name -> shape of what is trained with a new adapter, where it was counted by PEFT itself."""

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Module -> rank, where an adapter sits."""
        if self.adapter:
            return self.adapter.ranks
        return lora_ranks(self.facts, self.config.lora_config) if self.config.lora_config else {}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device, at the moment at which they are most."""

    weights: int
    """Of the model as it is held, with bf16 copies of what autocast casts."""
    gradients: int
    """With the buffers in which they are exchanged."""
    optimizer: int
    """Its states and fp32 masters, and what its step takes beyond the activations and logits that are gone by then."""
    activations: int
    """What is kept of the forward pass for the backward pass, and what that takes beyond the logits that are gone by then."""
    logits: int
    """And their loss."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class _Held:
    """How a job holds its numbers, resolved from the YAML, DeepSpeed's settings and the kernels."""

    provider: Provider
    stage: int
    zero: Mapping[str, Any]
    """DeepSpeed's `zero_optimization`."""
    devices: int
    base: int
    """Bytes of a base weight that is not in 4 bits, and of a number between layers."""
    trained: int
    """Bytes of a trained weight, and of its gradient."""
    computed: int
    """Bytes of a number in a matrix product."""
    autocast: bool
    """Whether torch casts weights and inputs of each matrix product by itself."""
    trained_shapes: Mapping[str, tuple[int, ...]]
    """Of what is trained, by its name."""

    @property
    def trained_entries(self) -> int:
        """How many numbers are trained."""
        return sum(map(math.prod, self.trained_shapes.values()))


def estimate_memory(job: Job) -> MemoryEstimate:
    """Weights, gradients, optimizer, activations and logits of a device.

    Left out is what CUDA, NCCL and the allocator's fragments take.
    """
    held = _hold(job)
    kept, works_in, logits = _kept(job, held), _works_in(job, held), _logits(job, held)
    optimizer, step = _optimizer(job, held)
    # The backward pass of the layers comes when the logits are gone, and the optimizer's step when both are.
    activations = kept + max(0, works_in - logits)
    return MemoryEstimate(
        weights=int(_weights(job, held)),
        gradients=int(_gradients(held)),
        optimizer=int(optimizer + max(0, step - activations - logits)),
        activations=int(activations),
        logits=int(logits),
    )


def _hold(job: Job) -> _Held:
    config = job.config
    stage, bf16, adapts = job.execution.zero_stage, config.dtype == "bf16", config.trains_adapter
    half = 2 if bf16 else _FP32
    shapes = {
        name: shape
        for name, shape in job.facts.parameter_shapes.items()
        if not adapts or is_trained_whole(config.lora_config, name)
    }
    for module, rank in job.ranks.items():
        outputs, inputs = job.facts.matrix_shapes[module]
        shapes |= {f"{module}.lora_A": (rank, inputs), f"{module}.lora_B": (outputs, rank)}
        if config.lora_config and config.lora_config.use_dora:
            shapes[f"{module}.lora_magnitude_vector"] = (outputs,)
    if job.new_adapter is not None:
        shapes = dict(job.new_adapter)
    # On CPU Unsloth computes as transformers and PEFT do.
    provider = job.execution.kernels.provider if job.device == "cuda" else "torch"
    return _Held(
        provider=provider,
        stage=stage,
        zero=(job.execution.deepspeed or {}).get("zero_optimization", {}),
        devices=config.most_devices,
        base=2 if job.execution.weights_dtype == "bf16" else _FP32,
        # DeepSpeed casts what is trained to bf16 and keeps fp32 masters; PEFT holds adapters in fp32 without it.
        trained=half if stage else _FP32,
        computed=half,
        autocast=bf16 and not stage,
        trained_shapes=shapes,
    )


def _weights(job: Job, held: _Held) -> float:
    """The base and the adapter. ZeRO-3 splits them over the devices, and gathers a layer and the next, or the head."""
    config, facts = job.config, job.facts
    matrices = sum(
        math.prod(shape) for name, shape in facts.parameter_shapes.items() if _is_in_layers(name, shape)
    )
    if config.load_in_4bit:
        # transformers holds a layer's experts in one parameter, which bitsandbytes leaves as it is; Unsloth packs it on a GPU
        # (unsloth_zoo/temporary_patches/moe_utils_bnb4bit.py).
        packed = matrices if held.provider == "unsloth" else matrices - _in_experts(job)
        base = packed * _NF4 + (facts.parameters - packed) * held.base
    else:
        base = facts.parameters * held.base
    adapter = held.trained_entries * held.trained if config.trains_adapter else 0
    copies = 2 * _cast_by_autocast(job, held) if held.autocast else 0
    if config.task == "preference_tuning" and _loss(config) != "orpo":
        # Its reference: a second model, the adapter as it was, or no more than the base.
        base, adapter = base * (1 if config.trains_adapter else 2), adapter * (2 if job.adapter else 1)
    if held.stage < 3:
        return base + adapter + copies
    split = 0.0 if _is_offloaded(held, "offload_param") else (base + adapter) / held.devices
    return split + held.base * max(2 * matrices / job.shape.layers, job.shape.vocabulary * job.shape.hidden)


def _in_experts(job: Job) -> int:
    """Entries of all experts together."""
    return sum(math.prod(shape) for name, shape in job.facts.parameter_shapes.items() if is_expert(name))


def _cast_by_autocast(job: Job, held: _Held) -> int:
    """Entries of the matrices that are trained, which autocast casts to bf16 once a forward pass and keeps."""
    cast = sum(
        math.prod(shape)
        for name, shape in held.trained_shapes.items()
        if not is_embedding(name) and len(shape) > 1
    )
    has_own_head = any(is_head(name) for name in job.facts.parameter_shapes)
    return (
        cast if job.config.trains_adapter or has_own_head else cast + job.shape.vocabulary * job.shape.hidden
    )


def _gradients(held: _Held) -> float:
    """A number for each trained weight, in its type (Rajbhandari et al. 2019, arXiv 1910.02054, section 3.1), and the buffers.

    DDP keeps a second copy in its buckets. DeepSpeed has one buffer of `reduce_bucket_size`, with overlap_comm two (below
    ZeRO-3); from ZeRO-2 on a device keeps its part only.
    """
    gradients = held.trained_entries * held.trained
    if held.stage == 0:
        return gradients * (2 if held.devices > 1 else 1)
    buffers = 2 if held.zero.get("overlap_comm") and held.stage < 3 else 1
    size = held.zero.get("reduce_bucket_size", 500_000_000)
    bucket = size * held.trained * buffers if isinstance(size, int) else 0
    if held.stage > 1:
        gradients = 0 if _is_offloaded(held, "offload_optimizer") else gradients / held.devices
    return gradients + bucket


def _optimizer(job: Job, held: _Held) -> tuple[float, float]:
    """(states and fp32 masters, what a step takes beside them).

    With DeepSpeed each device has masters, states and, in its step, fp32 gradients of its part: 4 + 8 + 4 bytes a weight with Adam,
    as in DeepSpeed's own estimate (`estimate_zero2_model_states_mem_needs`). torch's Adam steps through all weights at once on a
    GPU and needs their size again (its documentation of `foreach`).
    """
    if _is_offloaded(held, "offload_optimizer"):
        return 0.0, 0.0
    trained = held.trained_entries
    states = sum(_states(job, name, shape) for name, shape in held.trained_shapes.items())
    at_once = _FP32 * trained if job.config.optim == "adamw_torch" and job.device == "cuda" else 0
    if held.stage == 0:
        return states, at_once
    return (states + _FP32 * trained) / held.devices, (_FP32 * trained + at_once) / held.devices


def _states(job: Job, name: str, shape: tuple[int, ...]) -> float:
    """Bytes of an optimizer's states for one parameter."""
    optim, size = job.config.optim, math.prod(shape)
    if optim == "sgd":
        return 0
    if optim == "adafactor":
        # A row and a column in place of a matrix (Shazeer and Stern 2018, arXiv 1804.04235).
        return _FP32 * (sum(size / part for part in shape[-2:]) if len(shape) > 1 else size)
    if optim.startswith("paged") and job.device == "cuda" and size >= _LEAST_PAGED:
        return 0  # moves to the host's memory where the device's runs out
    moments = 1 if "lion" in optim else 2
    # transformers keeps embeddings at 32 bits.
    in_8_bits = "8bit" in optim and size >= _LEAST_IN_EIGHT_BITS and not is_embedding(name)
    return moments * size * (_EIGHT_BITS if in_8_bits else _FP32)


def _kept(job: Job, held: _Held) -> float:
    """What lies in memory when the forward pass of the layers is done.

    With gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) that is each layer's input; `unsloth` keeps these in the host's
    memory.
    """
    shape, tokens = job.shape, _tokens(job)
    last = tokens * (_norm(job, held, shape.hidden) + held.computed * shape.hidden)
    mask = tokens * job.longest if _is_masked(job, held) else 0  # a byte each, for all layers
    if not job.config.gradient_checkpointing:
        layers = shape.layers * tokens * _layer(job, held)
    elif held.provider == "unsloth" and offloads_activations(
        job.config.gradient_checkpointing,
        None if job.adapter else job.config.lora_config,
        padded_length(job.config.context_length or job.longest, 8),
    ):
        layers = 0
    else:
        layers = shape.layers * tokens * held.base * shape.hidden
    return layers + last + mask


def _works_in(job: Job, held: _Held) -> float:
    """What the backward pass of a layer takes: the gradients inside its MLP, and with gradient checkpointing the layer itself again."""
    shape, tokens = job.shape, _tokens(job)
    width = shape.intermediate * max(1, shape.experts_per_token)
    gradients = tokens * held.computed * (3 * width + 2 * shape.hidden)
    if _attends_plainly(job, held):
        # Of a softmax's input and output in fp32, and what is multiplied: the gradients of each pair, most of which live at once.
        gradients = max(gradients, 7 * tokens * shape.heads * job.longest)
    return gradients + (tokens * _layer(job, held) if job.config.gradient_checkpointing else 0)


def _layer(job: Job, held: _Held) -> float:
    """Bytes that autograd saves for a token in one layer of attention and a gated MLP, as transformers' Llama computes it.

    Norms, the inputs of what is trained, queries, keys, values, output and log-sum-exp of attention, gate and up before and behind
    the activation function, their product. Autocast casts the input of each matrix product anew. Liger's and Unsloth's kernels
    compute the activation function again (`save_for_backward` in liger_kernel/ops/swiglu.py and unsloth/kernels/fast_lora.py).
    """
    shape, config, computed = job.shape, job.config, held.computed
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    hidden, width = shape.hidden, shape.intermediate * max(1, shape.experts_per_token)
    if held.provider == "unsloth" and config.trains_adapter and not _dropout(config):
        matrices = computed * (2 * hidden + 2 * width)  # fused with the adapters
    else:
        matrices = computed * (2 if held.provider == "liger" else 3) * width + _saved_inputs(job, held)
    # With a mask torch's attention takes keys and values as wide as queries, and the mask in its own type.
    if _attends_plainly(job, held):
        # What caps each pair's score, and its probability, in fp32 and as it is multiplied
        attention = computed * 4 * queries + 8 * shape.heads * job.longest
    elif _is_masked(job, held):
        attention = computed * (4 * queries + job.longest) + _FP32 * shape.heads
    else:
        attention = computed * (2 * queries + 2 * keys) + _FP32 * shape.heads
    copies = 2 * computed * hidden * shape.experts_per_token  # tokens sorted by expert, and back
    norms = sum(_norm(job, held, width) for width in _norms_of_a_layer(job))
    return norms + attention + matrices + copies


def _attends_plainly(job: Job, held: _Held) -> bool:
    """Whether attention is transformers' plain one, which torch's own cannot stand for."""
    return job.shape.caps_scores and held.provider != "unsloth" and not job.config.flash_attention_2


def _norms_of_a_layer(job: Job) -> list[int]:
    """How many numbers of a token each norm takes; two norms of all of them where they are not called so."""
    shape = job.shape
    widths = {"q_norm": shape.heads * shape.head_dim, "k_norm": shape.key_value_heads * shape.head_dim}
    names = (
        name.split(".")
        for name in job.facts.parameter_shapes
        if ".0." in name and name.endswith("norm.weight")
    )
    return [widths.get(parts[-2], shape.hidden) for parts in names] or [shape.hidden] * 2


def _norm(job: Job, held: _Held, width: int) -> float:
    """transformers computes norms in fp32; a trained one keeps what it scales. Liger's and Unsloth's keep their input."""
    if held.provider != "torch":
        return held.base * width + _FP32
    scaled = 0 if job.config.trains_adapter else held.base * width
    return _FP32 * (width + 1) + scaled


def _logits(job: Job, held: _Held) -> float:
    """transformers' loss, on CPU, has 12 bytes for each token and word: the logits, their log-softmax in fp32, the gradient in fp32 and,
    of logits in bf16, in bf16 again. TRL's fused head has a tile of logits, the hidden states with their fp32 gradient, and the head's
    own where it is trained (`ChunkedLogProbFunction` in trl/kernels/chunked_logprob.py)."""
    shape, tokens = job.shape, _tokens(job)
    if job.device == "cpu":
        return tokens * shape.vocabulary * 3 * _FP32
    tile = min(tokens, _HEAD_TOKENS) * min(shape.vocabulary, _HEAD_WORDS) * (held.computed + _FP32)
    head_is_trained = any(is_head(name) or is_embedding(name) for name in held.trained_shapes)
    head = _FP32 * shape.vocabulary * shape.hidden if head_is_trained else 0
    return tile + tokens * shape.hidden * (held.computed + _FP32) + head


def _tokens(job: Job) -> int:
    """Of a batch, padding included."""
    rows = job.config.batch_size
    return rows * job.longest * (_ROWS_OF_A_PAIR if job.config.task == "preference_tuning" else 1)


def _is_masked(job: Job, held: _Held) -> bool:
    """Whether attention gets a mask of all pairs: for packed rows on CPU, for windows, for what a mixture of experts leaves out.

    Unsloth, the flash-attn package and torch's kernels for packed rows (training/models/varlen_attention.py) need none.
    """
    config = job.config
    flash = (
        config.packing
        and job.device == "cuda"
        and config.dtype == "bf16"
        and job.shape.kind in PACKED_WITHOUT_MASK
    )
    if held.provider == "unsloth" or config.flash_attention_2 or flash:
        return False
    narrow = any(window is not None and window < job.longest for window in job.shape.windows)
    padded = job.device == "cuda" or config.batch_size > 1 or config.padding == "max_length"
    return config.packing or narrow or (padded and job.shape.experts > 0)


def _dropout(config: FinetuneConfig) -> float:
    return config.lora_config.lora_dropout if config.lora_config else 0.0


def _saved_inputs(job: Job, held: _Held) -> float:
    """Bytes a token and layer of the inputs of what is trained, and of what adapters make of them; matrices of one input share it.

    Autocast and dropout make each its own. The attention's output is saved by itself already.
    """
    shape, ranks = job.shape, job.ranks
    if job.config.trains_adapter:
        inputs = {f"{module}.weight": job.facts.matrix_shapes[module][1] for module in ranks}
    else:
        sizes = job.facts.parameter_shapes
        inputs = {name: size[-1] for name, size in sizes.items() if _is_in_layers(name, size)}
    shared: dict[tuple[int, int], float] = {}
    own = masks = 0.0
    for name, size in inputs.items():
        place = position(shape, name)
        share = share_of_experts(shape, name)
        if place[1] != ATTENTION_OUTPUT:
            shared[place] = max(shared.get(place, 0.0), size * (1 if share == 1 else shape.experts_per_token))
        if place[1] != ATTENTION_OUTPUT or job.config.trains_adapter:
            own += size * share
        # torch's dropout keeps a mask: of bytes on a GPU, in its input's type on CPU.
        masks += size * (held.trained if job.device == "cpu" else 1) if _dropout(job.config) else 0
    taken = own if held.autocast or _dropout(job.config) else sum(shared.values())
    if job.config.lora_config and job.config.lora_config.use_dora:
        # It scales what the base and the adapter make, each by itself.
        taken += sum(2 * job.facts.matrix_shapes[module][0] for module in ranks)
    return (held.computed * (taken + sum(ranks.values())) + masks) / shape.layers


def _loss(config: FinetuneConfig) -> str:
    """Of preference tuning."""
    return (config.preference_tuning_config or PreferenceTuningConfig()).loss


def _is_in_layers(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and not is_embedding(name) and not is_head(name)


def _is_offloaded(held: _Held, what: str) -> bool:
    return held.zero.get(what, {}).get("device", "none") != "none"


@dataclass(frozen=True)
class Saving:
    """A change of the YAML that takes less memory."""

    setting: str
    """As it would be written."""
    saved: int
    """Bytes on each device."""


Verdict = Literal["fits", "may not fit", "does not fit"]


@dataclass(frozen=True)
class MemoryReport:
    """What a person reads of it."""

    estimate: MemoryEstimate
    total: int
    kernels: Provider
    accelerator: str | None
    """What the workers are to have, or this machine's GPU; None where it is not known, and on CPU."""
    available: int | None
    """Bytes of it."""
    verdict: Verdict | None
    savings: list[Saving]
    """The three changes of the YAML that save most, each by itself."""


def report_memory(job: Job, accelerator: str | None, available: int | None) -> MemoryReport:
    """Return the estimate, beside what a device has."""
    estimate = estimate_memory(job)
    verdict: Verdict | None = None
    if available is not None:
        sure = estimate.total <= _SURE_SHARE * available
        verdict = "fits" if sure else "may not fit" if estimate.total <= available else "does not fit"
    return MemoryReport(
        estimate=estimate,
        total=estimate.total,
        kernels=_hold(job).provider,
        accelerator=accelerator,
        available=available,
        verdict=verdict,
        savings=_savings(job, available),
    )


def describe_savings(savings: Sequence[Saving]) -> str:
    """What would help, as a sentence; nothing where nothing does."""
    if not savings:
        return ""
    listed = "; ".join(f"`{saving.setting}` ({format_bytes(saving.saved)} less)" for saving in savings)
    cut = (
        " Rows longer than that context_length would be cut, or go by `long_rows`."
        if "context_length" in listed
        else ""
    )
    return f"What would help most, estimated for each device: {listed}.{cut}"


def largest_batch(job: Job, available: int) -> int:
    """What `train_batch_size_per_device: auto` comes to: the most rows that are estimated to fit surely, and 1 where none do.

    Args:
        job: Its configuration says auto.
        available: Bytes of a device.
    """
    for rows in job.config.possible_batch_sizes():
        if (
            estimate_memory(replace(job, config=job.config.with_batch_size(rows))).total
            <= _SURE_SHARE * available
        ):
            return rows
    return 1


def _savings(job: Job, available: int | None) -> list[Saving]:
    """The three changes that save most, each by itself and of another key: of one key the mildest that fits, else what saves most."""
    now = estimate_memory(job).total
    found: dict[str, Saving] = {}
    for setting, changes in _alternatives(job):
        try:
            changed = _changed(job, changes)
            if changed is None:
                continue
            held = _hold(changed)
            if job.device == "cuda":
                check_optimizer(changed.config, held.stage, held.trained_entries)
            saving = Saving(setting, now - estimate_memory(changed).total)
        except AnnealError:
            continue  # kernels that are not installed, or settings that a plan would reject
        key = setting.split(":")[0]
        known = found.get(key)
        fits = known and available is not None and now - known.saved <= _SURE_SHARE * available
        if known is None or (not fits and saving.saved > known.saved):
            found[key] = saving
    return sorted((one for one in found.values() if one.saved > 0), key=lambda one: -one.saved)[:3]


def _alternatives(job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    config = job.config
    rows, accumulation = config.batch_size, config.gradient_accumulation_steps
    if rows > 1:
        fewer = {"train_batch_size_per_device": rows // 2, "gradient_accumulation_steps": accumulation * 2}
        yield ", ".join(f"{key}: {value}" for key, value in fewer.items()), fewer
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing: true", {"gradient_checkpointing": True}
    if config.dtype == "fp32":
        yield "dtype: bf16", {"dtype": "bf16"}
    yield f"context_length: {job.longest // 2}", {"context_length": job.longest // 2}
    yield "load_in_4bit: true", {"load_in_4bit": True}
    if not config.trains_adapter:
        yield "lora_config: {r: 16}", {"lora_config": {"r": 16}}
    if config.optim.startswith("adamw_torch"):
        yield "optim: adamw_8bit", {"optim": "adamw_8bit"}
    if config.optim.startswith("adamw") and job.device == "cuda":
        yield "optim: paged_adamw_8bit", {"optim": "paged_adamw_8bit"}
    for preset in ("zero_2", "zero_3", "zero_3_offload_optim", "zero_3_offload_optim+param"):
        if config.most_devices > 1 or (job.device == "cuda" and "offload" in preset):
            yield f"deepspeed: {preset}", {"deepspeed": preset}
    if job.device == "cuda":
        unsloth = {"kernels": "unsloth", "gradient_checkpointing": "unsloth"}
        yield ", ".join(f"{key}: {value}" for key, value in unsloth.items()), unsloth
        yield "flash_attention_2: true", {"flash_attention_2": True}
        yield "kernels: liger", {"kernels": "liger"}


def _changed(job: Job, changes: dict[str, Any]) -> Job | None:
    """Return the job with other settings; None where they do not go together.

    Raises:
        StrategyError, ModelError: DeepSpeed or the kernels cannot serve them.
    """
    try:
        config = FinetuneConfig.model_validate(job.config.model_dump(exclude_unset=True) | changes)
    except ValidationError:
        return None
    return replace(
        job,
        config=config,
        longest=min(job.longest, config.context_length or job.longest),
        execution=resolve_execution(config, job.device),
    )

"""Estimate of the memory that a run needs per device, computed from shapes without building the model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from configs.schema import FinetuneConfig
from training.data.batches import padded_length
from training.models.adapter import AdapterParameters
from training.models.architecture import (
    ATTENTION_OUTPUT,
    ModelShape,
    is_embedding,
    is_expert,
    is_head,
    position,
    share_of_experts,
)
from training.models.attention import (
    Attention,
    AttentionTraits,
    choose_attention,
    exceeded_rope_of_unsloth,
)
from training.models.files import ModelFacts, is_fully_trained, lora_ranks
from training.models.kernels import Device, Provider, offloads_activations
from training.planning.deepspeed import Execution, check_optimizer, is_offloaded, resolve_execution
from utils.errors import AnnealError
from utils.files import format_bytes

_FP32 = 4
# bitsandbytes' NF4 with double quantization: half a byte per weight, an 8-bit scale per 64 weights, a 32-bit scale per 256 scales
# (Dettmers et al. 2023, arXiv 2305.14314, section 3).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# bitsandbytes' 8-bit states: a byte each, and a 32-bit scale per 256 (Dettmers et al. 2021, arXiv 2110.02861); small tensors keep 32 bits.
_EIGHT_BITS, _LEAST_IN_EIGHT_BITS = 1 + 4 / 256, 4096
_LEAST_PAGED = 100_000  # a paged optimizer keeps smaller tensors on the device
# Tile of TRL's fused LM head: tokens and vocabulary entries per block of logits.
_HEAD_TOKENS, _HEAD_ENTRIES = 4096, 32768
_ROWS_OF_A_PAIR = 2
_SAFE_SHARE = 0.9  # of a device; the rest is for CUDA, NCCL and fragmentation


@dataclass(frozen=True)
class Job:
    """The inputs of a memory estimate."""

    config: FinetuneConfig
    shape: ModelShape
    facts: ModelFacts
    continued: Mapping[str, Any] | None
    """The configuration of the adapter that the run continues."""
    device: Device
    longest: int
    """Tokens of the longest sequence in a batch."""
    execution: Execution
    """DeepSpeed's settings, ZeRO stage and kernels."""
    traits: AttentionTraits
    attention: Attention
    parameters: AdapterParameters | None = None
    """The adapter's parameters, if PEFT counted them."""
    unpaired: bool = False
    """True if rows of preference tuning have one response each."""

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Module -> rank of its adapter, for modules whose weight is a matrix."""
        if self.continued and self.parameters:
            matrices = self.facts.matrix_shapes
            return {module: rank for module, rank in self.parameters.ranks.items() if module in matrices}
        return lora_ranks(self.facts, self.config.lora_config) if self.config.lora_config else {}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device at the peak."""

    weights: int
    """Model weights in their stored dtype, and the bf16 copies that autocast makes."""
    gradients: int
    """Gradients, and the buffers of their all-reduce."""
    optimizer: int
    """Optimizer states and fp32 master weights, and temporary memory of a step beyond that of the freed activations and logits."""
    activations: int
    """Activations saved for the backward pass, and its temporary memory beyond that of the freed logits."""
    logits: int
    """Logits and their loss."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_checkpoint(job: Job) -> int:
    """Estimate the bytes of a checkpoint: the trained weights and their optimizer states."""
    held = _hold(job)
    states = sum(_states(job, name, shape) for name, shape in held.trained_shapes.items())
    return int(held.trained_entries * held.trained + states)


@dataclass(frozen=True)
class _Held:
    """The dtypes and partitioning of a job, derived from the YAML, DeepSpeed's settings and the kernels."""

    provider: Provider
    stage: int
    zero: Mapping[str, Any]
    """DeepSpeed's `zero_optimization`."""
    devices: int
    base: int
    """Bytes per base weight that is not in 4 bits, and per activation between layers."""
    trained: int
    """Bytes per trainable weight, and per gradient entry."""
    computed: int
    """Bytes per entry of a matrix product."""
    autocast: bool
    """True if autocast converts the weights and inputs of matrix products."""
    trained_shapes: Mapping[str, tuple[int, ...]]
    """Name -> shape of the trainable parameters."""

    @property
    def trained_entries(self) -> int:
        """Number of trainable parameters."""
        return sum(map(math.prod, self.trained_shapes.values()))


def estimate_memory(job: Job) -> MemoryEstimate:
    """Estimate the memory of a device for weights, gradients, optimizer, activations and logits.

    Not included: the CUDA context, NCCL buffers and allocator fragmentation.
    """
    held = _hold(job)
    saved, backward, logits = _saved(job, held), _backward(job, held), _logits(job, held)
    optimizer, step = _optimizer(job, held)
    # The logits are freed before the layers' backward pass, the activations before the optimizer step.
    activations = saved + max(0, backward - logits)
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
        if not adapts or is_fully_trained(config.lora_config, name)
    }
    for module, rank in job.ranks.items():
        outputs, inputs = job.facts.matrix_shapes[module]
        shapes |= {f"{module}.lora_A": (rank, inputs), f"{module}.lora_B": (outputs, rank)}
        if config.lora_config and config.lora_config.use_dora:
            shapes[f"{module}.lora_magnitude_vector"] = (outputs,)
    if job.parameters is not None:
        shapes = dict(job.parameters.trainable)
    # On CPU, Unsloth uses the code of transformers and PEFT.
    provider = job.execution.kernels.provider if job.device == "cuda" else "torch"
    return _Held(
        provider=provider,
        stage=stage,
        zero=(job.execution.deepspeed or {}).get("zero_optimization", {}),
        # On fewer devices of a range, ZeRO gives each a larger part.
        devices=config.fewest_devices if stage else config.most_devices,
        base=2 if job.execution.weights_dtype == "bf16" else _FP32,
        # DeepSpeed casts trainable weights to bf16 and keeps fp32 master weights; without it, PEFT keeps adapters in fp32.
        trained=half if stage else _FP32,
        computed=half,
        autocast=bf16 and not stage,
        trained_shapes=shapes,
    )


def _weights(job: Job, held: _Held) -> float:
    """Return the bytes of base model and adapter; ZeRO-3 shards them and gathers two layers at a time, or the head."""
    config, facts = job.config, job.facts
    matrices = sum(
        math.prod(shape) for name, shape in facts.parameter_shapes.items() if _is_in_layers(name, shape)
    )
    if config.load_in_4bit:
        # transformers holds a layer's experts in one parameter, which bitsandbytes does not quantize; Unsloth does on a GPU
        # (unsloth_zoo/temporary_patches/moe_utils_bnb4bit.py).
        packed = matrices if held.provider == "unsloth" else matrices - _in_experts(job)
        base = packed * _NF4 + (facts.parameters - packed) * held.base
    else:
        base = facts.parameters * held.base
    adapter = held.trained_entries * held.trained if config.trains_adapter else 0
    copies = 2 * _cast_by_autocast(job, held) if held.autocast else 0
    if config.task == "preference_tuning" and config.preference.needs_reference:
        # The reference: a second model, the initial adapter, or the base model itself.
        base, adapter = (
            base * (1 if config.trains_adapter else 2),
            adapter * (2 if job.continued else 1),
        )
    if held.stage < 3:
        return base + adapter + copies + _copies_of_rows(job, held)
    split = 0.0 if is_offloaded(held.zero, "offload_param") else (base + adapter) / held.devices
    return split + held.base * max(2 * matrices / job.shape.layers, job.shape.vocabulary * job.shape.hidden)


def _copies_of_rows(job: Job, held: _Held) -> float:
    """Return the bytes of the copy of a head in which PEFT replaces trained rows, and of its gradient, beyond the freed logits."""
    if not any("trainable_tokens_delta" in name for name in held.trained_shapes):
        return 0
    head = held.base * job.shape.vocabulary * job.shape.hidden
    return head + max(0, head - _logits(job, held))


def _in_experts(job: Job) -> int:
    """Return the number of entries of all experts."""
    return sum(math.prod(shape) for name, shape in job.facts.parameter_shapes.items() if is_expert(name))


def _cast_by_autocast(job: Job, held: _Held) -> int:
    """Return the entries of the trainable matrices, of which autocast caches a bf16 copy per forward pass."""
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
    """Return the bytes of gradients, in the dtype of their weights, and of the all-reduce buffers.

    DDP keeps a second copy in its buckets. DeepSpeed has one buffer of `reduce_bucket_size`, and two with overlap_comm below
    ZeRO-3. From ZeRO-2 on, each device keeps only its shard (Rajbhandari et al. 2019, arXiv 1910.02054, section 3.1).
    """
    gradients = held.trained_entries * held.trained
    if held.stage == 0:
        return gradients * (2 if held.devices > 1 else 1)
    buffers = 2 if held.zero.get("overlap_comm") and held.stage < 3 else 1
    size = held.zero.get("reduce_bucket_size", 500_000_000)
    bucket = size * held.trained * buffers if isinstance(size, int) else 0
    if held.stage > 1:
        gradients = 0 if is_offloaded(held.zero, "offload_optimizer") else gradients / held.devices
    return gradients + bucket


def _optimizer(job: Job, held: _Held) -> tuple[float, float]:
    """Return (bytes of states and fp32 master weights, temporary bytes of a step).

    With DeepSpeed, each device has master weights, states and, during the step, fp32 gradients of its shard. With Adam these
    are 4 + 8 + 4 bytes per weight, as in DeepSpeed's own estimate (`estimate_zero2_model_states_mem_needs`). torch's Adam on a
    GPU updates all weights at once and needs their size again (see `foreach` in its documentation).
    """
    if is_offloaded(held.zero, "offload_optimizer"):
        return 0.0, 0.0
    trained = held.trained_entries
    states = sum(_states(job, name, shape) for name, shape in held.trained_shapes.items())
    at_once = _FP32 * trained if job.config.optim == "adamw_torch" and job.device == "cuda" else 0
    if held.stage == 0:
        return states, at_once
    return (states + _FP32 * trained) / held.devices, (_FP32 * trained + at_once) / held.devices


def _states(job: Job, name: str, shape: tuple[int, ...]) -> float:
    """Return the bytes of the optimizer states of one parameter."""
    optim, size = job.config.optim, math.prod(shape)
    if optim == "sgd":
        return 0
    if optim == "adafactor":
        # A row and a column instead of a matrix (Shazeer and Stern 2018, arXiv 1804.04235).
        return _FP32 * (sum(size / part for part in shape[-2:]) if len(shape) > 1 else size)
    if optim.startswith("paged") and job.device == "cuda" and size >= _LEAST_PAGED:
        return 0  # evicted to host memory if the device runs out
    moments = 1 if "lion" in optim else 2
    # transformers keeps the states of embeddings in 32 bits.
    in_8_bits = "8bit" in optim and size >= _LEAST_IN_EIGHT_BITS and not is_embedding(name)
    return moments * size * (_EIGHT_BITS if in_8_bits else _FP32)


def _saved(job: Job, held: _Held) -> float:
    """Return the bytes saved for the backward pass at the end of the forward pass of the layers.

    With gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) these are the inputs of the layers; `unsloth` offloads
    them to host memory.
    """
    shape, tokens = job.shape, _tokens(job)
    last = tokens * (_norm(job, held, shape.hidden) + held.computed * shape.hidden)
    mask = tokens * job.longest if _masks_pairs(job) else 0  # one byte per pair, shared by all layers
    if not job.config.gradient_checkpointing:
        layers = shape.layers * tokens * _layer(job, held)
    elif held.provider == "unsloth" and offloads_activations(
        job.config.gradient_checkpointing,
        None if job.continued else job.config.lora_config,
        padded_length(job.config.context_length or job.longest, 8),
    ):
        layers = 0
    else:
        layers = shape.layers * tokens * held.base * shape.hidden
    return layers + last + mask


def _backward(job: Job, held: _Held) -> float:
    """Return the temporary bytes of a layer's backward pass: MLP gradients, and with gradient checkpointing the recomputed layer."""
    shape, tokens = job.shape, _tokens(job)
    width = shape.intermediate * max(1, shape.experts_per_token)
    gradients = tokens * held.computed * (3 * width + 2 * shape.hidden)
    if job.attention.implementation == "eager":
        # Gradients per query-key pair: softmax input and output in fp32, and the product; most exist at the same time.
        gradients = max(gradients, 7 * tokens * shape.heads * job.longest)
    return gradients + (tokens * _layer(job, held) if job.config.gradient_checkpointing else 0)


def _layer(job: Job, held: _Held) -> float:
    """Return the bytes that autograd saves per token in one layer of attention and a gated MLP (transformers' Llama).

    Saved are norms, the inputs of trainable weights, queries, keys, values, output and log-sum-exp of attention, the gate
    before and after its activation function, the up projection, and their product. Autocast converts the input of each matrix
    product separately. Liger's and Unsloth's kernels recompute the activation function (`save_for_backward` in
    liger_kernel/ops/swiglu.py and unsloth/kernels/fast_lora.py).
    """
    shape, config, computed = job.shape, job.config, held.computed
    # Workers that share sequences copy key-value heads if there are fewer than workers.
    key_value_heads = max(shape.key_value_heads, config.sequence_parallel_size)
    queries, keys = shape.heads * shape.head_dim, key_value_heads * shape.head_dim
    hidden, width = shape.hidden, shape.intermediate * max(1, shape.experts_per_token)
    if held.provider == "unsloth" and config.trains_adapter and not _dropout(config):
        matrices = computed * (2 * hidden + 2 * width)  # MLP and adapters are fused
    else:
        matrices = computed * (2 if held.provider == "liger" else 3) * width + _saved_inputs(job, held)
    # With a mask, torch's attention expands keys and values to the width of queries and converts the mask to its dtype.
    if job.attention.implementation == "eager":
        # Softcapped score and probability of each pair, in fp32 and in the dtype of the product.
        attention = computed * 4 * queries + 8 * shape.heads * job.longest
    elif _masks_pairs(job):
        attention = computed * (4 * queries + job.longest) + _FP32 * shape.heads
    else:
        attention = computed * (2 * queries + 2 * keys) + _FP32 * shape.heads
    copies = 2 * computed * hidden * shape.experts_per_token  # tokens sorted by expert, and back
    norms = sum(_norm(job, held, width) for width in _norms_of_a_layer(job))
    return norms + attention + matrices + copies


def _norms_of_a_layer(job: Job) -> list[int]:
    """Return the width of each norm in a layer; two norms of the hidden size if none is found by its name."""
    shape = job.shape
    widths = {"q_norm": shape.heads * shape.head_dim, "k_norm": shape.key_value_heads * shape.head_dim}
    names = (
        name.split(".")
        for name in job.facts.parameter_shapes
        if ".0." in name and name.endswith("norm.weight")
    )
    return [widths.get(parts[-2], shape.hidden) for parts in names] or [shape.hidden] * 2


def _norm(job: Job, held: _Held, width: int) -> float:
    """Return the bytes that a norm saves per token.

    transformers computes norms in fp32, and a trainable norm also saves the scaled input. Liger and Unsloth save the input.
    """
    if held.provider != "torch":
        return held.base * width + _FP32
    scaled = 0 if job.config.trains_adapter else held.base * width
    return _FP32 * (width + 1) + scaled


def _logits(job: Job, held: _Held) -> float:
    """Return the bytes of the logits and their loss.

    transformers' loss, used on CPU, needs 12 bytes per token and vocabulary entry: the logits, their log-softmax in fp32, the
    gradient in fp32, and a bf16 copy of it for bf16 logits. TRL's fused head needs a tile of logits, the hidden states with
    their fp32 gradient, and the head's gradient if it is trained (`ChunkedLogProbFunction` in trl/kernels/chunked_logprob.py).
    """
    shape, tokens = job.shape, _tokens(job)
    if job.device == "cpu":
        return tokens * shape.vocabulary * 3 * _FP32
    tile = min(tokens, _HEAD_TOKENS) * min(shape.vocabulary, _HEAD_ENTRIES) * (held.computed + _FP32)
    head_is_trained = any(is_head(name) or is_embedding(name) for name in held.trained_shapes)
    head = _FP32 * shape.vocabulary * shape.hidden if head_is_trained else 0
    return tile + tokens * shape.hidden * (held.computed + _FP32) + head


def _tokens(job: Job) -> int:
    """Return the tokens of a batch on a device, padding included."""
    rows = job.config.batch_size
    has_pairs = job.config.task == "preference_tuning" and not job.unpaired
    tokens = -(-job.longest // job.config.sequence_parallel_size)
    return rows * tokens * (_ROWS_OF_A_PAIR if has_pairs else 1)


def _masks_pairs(job: Job) -> bool:
    """Return whether transformers builds a mask of all query-key pairs: for packed rows, sliding windows and masked padding.

    Unsloth, the flash-attn package, PyTorch's kernels for packed rows (training/models/varlen_attention.py) and workers that share
    sequences (training/models/sequence_parallel.py) need none.
    """
    config = job.config
    if job.attention.implementation not in ("sdpa", "eager") or config.sequence_parallel_size > 1:
        return False
    narrow = any(window is not None and window < job.longest for window in job.shape.windows)
    padded = job.device == "cuda" or config.batch_size > 1 or config.padding == "max_length"
    return config.packing or narrow or (padded and job.attention.mask)


def _dropout(config: FinetuneConfig) -> float:
    return config.lora_config.lora_dropout if config.lora_config else 0.0


def _saved_inputs(job: Job, held: _Held) -> float:
    """Return the bytes per token and layer of the saved inputs of trainable weights and of the adapters' intermediate results.

    Matrices with the same input share it, except with autocast or dropout. The attention output is already saved elsewhere, unless
    workers that share sequences exchange it.
    """
    shape, ranks = job.shape, job.ranks
    is_exchanged = job.config.sequence_parallel_size > 1
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
        if place[1] != ATTENTION_OUTPUT or is_exchanged:
            shared[place] = max(shared.get(place, 0.0), size * (1 if share == 1 else shape.experts_per_token))
        if place[1] != ATTENTION_OUTPUT or job.config.trains_adapter or is_exchanged:
            own += size * share
        # torch's dropout saves a mask: one byte per entry on a GPU, in the input's dtype on CPU.
        masks += size * (held.trained if job.device == "cpu" else 1) if _dropout(job.config) else 0
    taken = own if held.autocast or _dropout(job.config) else sum(shared.values())
    if job.config.lora_config and job.config.lora_config.use_dora:
        # DoRA scales the outputs of the base and of the adapter separately.
        taken += sum(2 * job.facts.matrix_shapes[module][0] for module in ranks)
    return (held.computed * (taken + sum(ranks.values())) + masks) / shape.layers


def _is_in_layers(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and not is_embedding(name) and not is_head(name)


@dataclass(frozen=True)
class Saving:
    """A change of the YAML that reduces memory."""

    setting: str
    """The setting as written in the YAML."""
    saved: int
    """Bytes saved per device."""


Verdict = Literal["fits", "may not fit", "does not fit"]


@dataclass(frozen=True)
class MemoryReport:
    """The memory estimate in the plan report."""

    estimate: MemoryEstimate
    total: int
    kernels: Provider
    accelerator: str | None
    """The requested accelerator, or this machine's GPU; None if unknown and on CPU."""
    available: int | None
    """Memory of the accelerator in bytes; None if unknown."""
    verdict: Verdict | None
    savings: list[Saving]
    """The three changes of the YAML that save the most memory, each on its own."""


def report_memory(job: Job, accelerator: str | None, available: int | None) -> MemoryReport:
    """Return the estimate and the verdict for a device with this memory."""
    estimate = estimate_memory(job)
    verdict: Verdict | None = None
    if available is not None:
        sure = estimate.total <= _SAFE_SHARE * available
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
    """Return a sentence with the changes that save memory; empty if there are none."""
    if not savings:
        return ""
    listed = "; ".join(f"`{saving.setting}` ({format_bytes(saving.saved)} less)" for saving in savings)
    cut = (
        " `long_rows` decides what happens to rows longer than that context_length."
        if "context_length" in listed
        else ""
    )
    return f"Changes that save the most memory per device (estimated): {listed}.{cut}"


def largest_batch(job: Job, available: int) -> int:
    """Return the value of `train_batch_size_per_device: auto`: the most rows whose estimate fits with a margin, at least 1.

    Args:
        job: A job whose configuration has `auto`.
        available: Memory of a device in bytes.
    """
    for rows in job.config.possible_batch_sizes():
        if (
            estimate_memory(replace(job, config=job.config.with_batch_size(rows))).total
            <= _SAFE_SHARE * available
        ):
            return rows
    return 1


def _savings(job: Job, available: int | None) -> list[Saving]:
    """Return the three changes that save the most memory, each on its own, with at most one per key.

    For each key this is the first change that fits, or else the one that saves the most.
    """
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
            continue  # kernels are not installed, or a plan would reject the settings
        key = setting.split(":")[0]
        known = found.get(key)
        fits = known and available is not None and now - known.saved <= _SAFE_SHARE * available
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
    """Return the job with other settings, or None if the settings are invalid together."""
    try:
        config = FinetuneConfig.model_validate(job.config.model_dump(exclude_unset=True) | changes)
    except ValidationError:
        return None
    exceeded = exceeded_rope_of_unsloth(config, job.traits, job.facts.max_context)
    execution = resolve_execution(config, job.device, continued=job.continued, exceeded_rope=exceeded)
    return replace(
        job,
        config=config,
        longest=min(job.longest, config.context_length or job.longest),
        execution=execution,
        attention=choose_attention(config, job.traits, job.device, execution.kernels.provider),
    )

"""Warnings of a plan: what is allowed but probably not meant. Each function yields complete messages."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from configs.loading import LoadedConfig
from configs.schema import DEFAULT_MIN_UPDATE_STEPS, FinetuneConfig
from training.data.batches import BatchShape
from training.data.report import DataReport
from training.data.summary import DataSummary
from training.data.templates import Renderer
from training.models.architecture import ModelShape
from training.models.files import AdapterFacts, ModelFacts, untargeted_names
from training.models.kernels import Device, Provider
from training.planning.accelerators import memory_of, named_accelerator, nearest_name
from training.planning.checks import is_importable
from training.planning.memory import MemoryReport, describe_savings
from utils.files import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def model_warnings(
    config: FinetuneConfig, facts: ModelFacts, adapter: AdapterFacts | None, kernels: Provider
) -> Iterator[str]:
    """Settings that do not suit the model or its adapter."""
    if config.context_length and facts.max_context and config.context_length > facts.max_context:
        yield f"context_length {config.context_length} is beyond the {facts.max_context} positions that {facts.source} was trained for"
    if config.gradient_checkpointing == "unsloth" and kernels != "unsloth":
        yield f"gradient_checkpointing: unsloth needs Unsloth's kernels; with {kernels} it is the usual one (true)"
    if config.lora_config and not adapter:
        for name in untargeted_names(facts, config.lora_config):
            yield f"lora_config.target_modules: {name} matches nothing in {facts.source} and is passed over"
    if adapter and adapter.base_model not in ("", config.model_id, facts.source):
        yield f"the adapter names {adapter.base_model} as its base model, and this run puts it on {facts.source}, which has the same shapes"
    if config.trains_adapter and config.initial_base_model_ckpt_path:
        yield (
            "a LoRA adapter on top of a full-parameter checkpoint: serving it will need that checkpoint, so it has neither the economy of "
            "LoRA nor the quality of full-parameter training, unless many adapters share it"
        )
    if config.flash_attention_2 and not is_importable("flash_attn"):
        yield "flash_attention_2: the package flash-attn is not installed; torch's scaled_dot_product_attention is used"


def attention_warnings(
    config: FinetuneConfig, facts: ModelFacts, shape: ModelShape | None, device: Device, kernels: Provider
) -> Iterator[str]:
    """Attention that needs memory for all pairs of tokens."""
    if shape is None or not shape.caps_scores or kernels == "unsloth" or config.flash_attention_2:
        return
    text = (
        f"{facts.source} caps the scores of its attention, which torch's own kernels leave out: transformers' plain attention is used, "
        "whose memory grows with the square of the length"
    )
    yield f"{text}; flash_attention_2: true (a package of its own) needs less" if device == "cuda" else text


def expert_warnings(
    config: FinetuneConfig, facts: ModelFacts, shape: ModelShape | None, device: Device, kernels: Provider
) -> Iterator[str]:
    """Experts that stay in 16 bits under load_in_4bit."""
    unsloth_packs_them = (device, kernels) == ("cuda", "unsloth")
    if config.load_in_4bit and shape and shape.experts and not unsloth_packs_them:
        yield (
            f"load_in_4bit: transformers holds the experts of a layer of {facts.source} in one parameter, which bitsandbytes leaves in "
            "16 bits: only the rest is held in 4"
        )


def accelerator_warnings(config: FinetuneConfig) -> Iterator[str]:
    """Accelerator names that are probably misspelled."""
    named = named_accelerator(config.worker_resources)
    if named and memory_of(named) is None and (meant := nearest_name(named)):
        yield f"worker_resources: accelerator_type:{named} is not known here, and Ray takes names letter by letter: did you mean {meant}?"


def template_warnings(config: FinetuneConfig, tokenizer: "PreTrainedTokenizerFast") -> Iterator[str]:
    """Chat templates that do not mark the end of an answer."""
    if config.prompt_template is not None or config.task not in ("instruction_tuning", "preference_tuning"):
        return
    renderer = Renderer(tokenizer, whole_text=False)
    if renderer.header and not renderer.end_marker:
        yield "the chat template puts nothing behind an answer, so the model does not learn to end one; chat_template can add a mark"


def data_warnings(train: DataSummary, valid: DataSummary | None) -> Iterator[str]:
    """Rows that are cut, excluded or repeated, and missing validation rows."""
    for name, summary in (("train_path", train), ("valid_path", valid)):
        if summary is None:
            continue
        if summary.truncated_rows:
            yield f"{name}: {summary.truncated_rows:,} rows were longer than the context and are cut off at it (long_rows: truncate)"
        if summary.dropped_rows:
            yield f"{name}: {summary.dropped_rows:,} rows are left out: too long, or nothing to learn from within the context"
        if summary.skipped_rows:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.skipped_rows.items())
            yield f"{name}: {sum(summary.skipped_rows.values()):,} rows are left out (bad_rows: skip): {kinds}; the first: {summary.first_skipped[0]}"
        if summary.duplicates:
            yield f"{name}: {summary.duplicates:,} rows say the same as one before; the first: {summary.first_duplicates[0]}"
    if valid is None:
        yield "no valid_path: no eval loss, and the newest checkpoint counts as the best"


def memory_warnings(memory: MemoryReport | None) -> Iterator[str]:
    """Devices that are too small for the estimate."""
    if memory and memory.verdict and memory.verdict != "fits":
        yield (
            f"memory: each device needs about {format_bytes(memory.total)}, which {memory.verdict} {memory.accelerator} with its "
            f"{format_bytes(memory.available or 0)}. {describe_savings(memory.savings)}"
        )


def overlap_warnings(report: DataReport) -> Iterator[str]:
    """Validation rows that are training rows too."""
    if report.in_both:
        yield (
            f"valid_path: {report.in_both:,} of its rows are training rows, too, and their loss says nothing about new ones; the first: "
            f"{report.first_in_both[0]}"
        )


def learning_rate_warnings(loaded: LoadedConfig) -> Iterator[str]:
    """A default learning rate that suits LoRA only."""
    config = loaded.config
    if not config.trains_adapter and "learning_rate" not in loaded.given_keys:
        yield (
            f"learning_rate is not given: {config.learning_rate:g} suits LoRA, and all parameters of a pretrained model usually take about "
            "1e-5"
        )


def length_warnings(config: FinetuneConfig, shape: BatchShape) -> Iterator[str]:
    """Steps larger than an epoch, and a run length that the YAML does not give."""
    if shape.sequences_per_step > shape.sequences:
        what = "packs" if config.packing else "rows"
        yield (
            f"a step takes {shape.sequences_per_step:,} {what} (batch size, devices and accumulation multiplied), and "
            f"train_path has {shape.sequences:,}: every step is a whole epoch"
        )
    if config.num_epochs is None and config.max_steps is None and config.min_update_steps is None:
        epochs = config.number_of_epochs(shape.steps_per_epoch)
        yield (
            f"none of num_epochs, max_steps and min_update_steps is given: {epochs:g} epochs, the fewest that make "
            f"{DEFAULT_MIN_UPDATE_STEPS} steps"
        )

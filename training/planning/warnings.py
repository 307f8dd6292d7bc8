"""Warnings of a plan: valid settings that are probably not intended. Each function yields complete messages."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from configs.loading import LoadedConfig
from configs.schema import DEFAULT_MIN_UPDATE_STEPS, FinetuneConfig, LoraConfig
from training.data.batches import BatchShape
from training.data.prompting import end_of_turn
from training.data.renderer import Renderer
from training.data.report import DataReport, describe_split
from training.data.rows import ALL_COLUMNS, places_of
from training.data.sources import files_of_other_splits
from training.data.summary import DataSummary
from training.models.adapter import AdapterParameters
from training.models.architecture import MetaModel, ModelShape
from training.models.attention import Attention, AttentionTraits
from training.models.files import AdapterFacts, ModelFacts, is_hub_id, is_named, untargeted_names
from training.models.generation import Corrections
from training.models.kernels import Device, Provider, is_installed
from training.planning.accelerators import lacks_bf16, memory_of, named_accelerator, nearest_name
from training.planning.memory import MemoryReport, describe_savings
from utils.files import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A smaller model takes no noticeable time on any CPU.
_NOTICEABLE_PARAMETERS = 10_000_000
_SHOWN_FILES = 5


def model_warnings(
    config: FinetuneConfig, facts: ModelFacts, adapter: AdapterFacts | None, kernels: Provider
) -> Iterator[str]:
    """Warn of settings that do not suit the model or its adapter."""
    if config.context_length and facts.max_context and config.context_length > facts.max_context:
        yield f"context_length {config.context_length} exceeds the {facts.max_context} positions that {facts.source} was trained on"
    if config.gradient_checkpointing == "unsloth" and kernels != "unsloth":
        yield f"gradient_checkpointing: unsloth needs Unsloth's kernels; with {kernels} it is the same as true"
    if config.lora_config and not adapter:
        for name in untargeted_names(facts, config.lora_config):
            yield f"lora_config.target_modules: {name} matches no module of {facts.source} and is ignored"
    if adapter and adapter.base_model not in ("", config.model_id, facts.source):
        yield f"the adapter's base model is {adapter.base_model}, but this run trains it on {facts.source}, whose adapted modules have the same shapes"
    if config.trains_adapter and config.initial_base_model_ckpt_path:
        yield (
            "this run trains a LoRA adapter on a full-parameter checkpoint, and serving the adapter needs that checkpoint too. This pays "
            "off only if several adapters share the checkpoint"
        )
    pushed = config.final_export if config.push_to_hub else None
    if pushed and not pushed.merge and not is_hub_id(facts.source):
        yield (
            f"push_to_hub: the adapter needs its base model {facts.source}, which is not on the Hub, so it loads only where that can be "
            "read; write export: {merge: true} to push a complete model"
        )
    if config.flash_attention_2 and not is_installed("flash_attn"):
        yield "flash_attention_2: the package flash-attn is not installed, so torch's scaled_dot_product_attention is used"


def adapter_warnings(source: str | None, parameters: AdapterParameters | None) -> Iterator[str]:
    """Warn of patterns of a continued adapter that match nothing; those of a new one are errors.

    Args:
        source: Path of the continued adapter; None for a new one.
        parameters: The adapter's parameters, if PEFT counted them.
    """
    if source and parameters and (unmatched := parameters.unmatched_patterns):
        yield f"adapter {source}: adapter_config.json: {', '.join(unmatched)} matches no module that has an adapter; PEFT ignores it"


def exclusion_warnings(lora: LoraConfig, base: MetaModel) -> Iterator[str]:
    """Warn of exclude_modules of a new adapter that match no module.

    Args:
        lora: The YAML's lora_config.
        base: The base model.
    """
    names = [lora.exclude_modules] if isinstance(lora.exclude_modules, str) else lora.exclude_modules or []
    modules = [module for module, _ in base.model.named_modules()] if names else []
    for name in names:
        pattern = name if isinstance(lora.exclude_modules, str) else [name]
        if not any(is_named(pattern, module) for module in modules):
            yield f"lora_config.exclude_modules: {name} matches no module of {base.source} and is ignored"


def generation_warnings(source: str, corrections: Corrections) -> Iterator[str]:
    """Warn of generation settings that are not in the saved model, because they have no effect or no valid value."""
    if corrections.ignored:
        yield (
            f"{source}: its generation config sets {', '.join(corrections.ignored)}, which generate() ignores and transformers does not save. "
            "Checkpoints and exports are saved without; answers stay the same"
        )
    if corrections.rejected:
        yield (
            f"{source}: its generation config sets {', '.join(corrections.rejected)}, which generate() rejects. Checkpoints and exports are "
            "saved without; a temperature or top_p of 0 or below becomes greedy decoding"
        )


def tensor_warnings(source: str, unused: Sequence[str]) -> Iterator[str]:
    """Warn of tensors in the weight files that the model does not load."""
    if unused:
        more = f" and {len(unused) - 1} more tensors" if len(unused) > 1 else ""
        yield (
            f"{source}: its weight files have {unused[0]}{more} that config.json does not name. They are not loaded, and are not in "
            "checkpoints and exports; check config.json if the model should use them"
        )


def attention_warnings(
    config: FinetuneConfig, facts: ModelFacts, traits: AttentionTraits, attention: Attention, device: Device
) -> Iterator[str]:
    """Warn of attention whose memory grows with the square of the sequence length."""
    if attention.implementation != "eager":
        return
    cause = (
        "uses attention logit softcapping, which torch's attention kernels do not support"
        if traits.has_sdpa
        else "has attention that transformers does not implement with torch's attention kernels"
    )
    text = f"{facts.source} {cause}. transformers' eager attention is used; its memory grows with the square of the sequence length"
    yield (
        f"{text}. flash_attention_2: true needs less memory (install the package flash-attn)"
        if device == "cuda" and not config.flash_attention_2 and traits.has_sdpa
        else text
    )


def rope_warnings(
    config: FinetuneConfig, source: str, limit: int | None, train: int, valid: int
) -> Iterator[str]:
    """Warn of rows or padding that change the rotary frequencies of shorter rows.

    Args:
        config: The configuration, with the batch size resolved.
        source: Name of the model.
        limit: See `rope_limit` in training/models/attention.py.
        train: Tokens of the longest training row.
        valid: Tokens of the longest validation row; 0 if there is none.
    """
    if limit is None:
        return
    if config.padding == "max_length" and (config.context_length or 0) > limit:
        yield (
            f"{source}: its RoPE has other frequencies above {limit:,} tokens, and padding: max_length pads every row to "
            f"{config.context_length:,}. Shorter rows are trained with frequencies that the model does not use in short answers. Write "
            f"padding: longest, or context_length: {limit}"
        )
        return
    joins = config.packing or config.task == "preference_tuning"
    rows = [(train, config.batch_size), (valid, config.eval_batch_size_per_device or config.batch_size)]
    longest = max((tokens for tokens, size in rows if joins or size > 1), default=0)
    if longest > limit:
        yield (
            f"{source}: its RoPE has other frequencies above {limit:,} tokens, for all rows of a batch. The longest row has {longest:,}, so "
            f"the loss of a shorter row depends on the rows that are computed with it. Write context_length: {limit}"
            + ("" if joins else ", or batch sizes of 1 for training and evaluation")
        )


def expert_warnings(
    config: FinetuneConfig, facts: ModelFacts, shape: ModelShape | None, device: Device, kernels: Provider
) -> Iterator[str]:
    """Warn of experts that stay in 16 bits under load_in_4bit."""
    unsloth_packs_them = (device, kernels) == ("cuda", "unsloth")
    if config.load_in_4bit and shape and shape.experts and not unsloth_packs_them:
        yield (
            f"load_in_4bit: the experts of {facts.source} stay in 16 bits, because transformers holds the experts of a layer in one "
            "parameter, which bitsandbytes does not quantize"
        )


def accelerator_warnings(config: FinetuneConfig) -> Iterator[str]:
    """Warn of accelerator names that are probably misspelled."""
    named = named_accelerator(config.worker_resources)
    if named and memory_of(named) is None and (meant := nearest_name(named)):
        yield f"worker_resources: accelerator_type:{named} is unknown, and Ray matches names exactly: did you mean {meant}?"


def dtype_warnings(
    config: FinetuneConfig, facts: ModelFacts, device: Device, *, has_bf16: bool
) -> Iterator[str]:
    """Warn of bf16 on a CPU without bf16 instructions, where torch emulates it.

    Args:
        config: The YAML.
        facts: The base model.
        device: Where the run trains.
        has_bf16: See `cpu_has_bf16`.
    """
    if (
        device == "cpu"
        and config.dtype == "bf16"
        and not has_bf16
        and facts.parameters >= _NOTICEABLE_PARAMETERS
    ):
        yield (
            "dtype: bf16 is emulated on this CPU (no AVX-512) and can take more than ten times as long as fp32; write dtype: fp32"
        )


def gpu_dtype_warnings(config: FinetuneConfig, accelerator: str | None) -> Iterator[str]:
    """Warn of bf16 on a GPU without bf16 units, where torch emulates it."""
    if accelerator and config.dtype == "bf16" and lacks_bf16(accelerator):
        yield (
            f"dtype: bf16 is emulated on {accelerator}, which has no bf16 units, and is several times slower than fp32 there; write dtype: "
            "fp32, or train on an A10G, L4 or a newer GPU"
        )


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bf16 matrices in hardware, by the check that torch's own compiler uses."""
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def template_warnings(
    config: FinetuneConfig, tokenizer: "PreTrainedTokenizerFast", *, has_reasoning: bool | None = None
) -> Iterator[str]:
    """Warn of chat templates that do not mark the end of a response, mark it by text that does not stop
    generation, or prompt by default in another way than in training.

    Args:
        config: The run's YAML.
        tokenizer: The model's tokenizer.
        has_reasoning: Whether an answer has reasoning; None: the rows are no chats.
    """
    if config.prompt_template is not None or config.task not in ("instruction_tuning", "preference_tuning"):
        return
    renderer = Renderer(tokenizer, whole_text=False, variables=config.chat_template_kwargs)
    if has_reasoning is False and (switch := renderer.switch_of_plain_answers()):
        yield (
            "no row has reasoning, but the default prompt of the chat template asks for it, so chat, evaluation and servers would ask "
            f"otherwise than the rows. Set chat_template_kwargs: {{{switch}: false}}, also where the model is served"
        )
    if has_reasoning and (switch := renderer.switch_of_reasoning()):
        yield (
            "rows have reasoning, but the default prompt of the chat template asks for answers without it, so chat, evaluation and servers "
            f"would ask otherwise than these rows. Set chat_template_kwargs: {{{switch}: true}}, also where the model is served"
        )
    if (
        renderer.traits.header
        and not renderer.traits.end_marker
        and "user" not in renderer.traits.next_headers
    ):
        yield "the chat template puts no end token after a response, so the model does not learn to stop; set chat_template to one that does"
    marker = renderer.traits.end_marker.strip()
    if marker and not end_of_turn(tokenizer):
        count = len(tokenizer.encode(marker, add_special_tokens=False))
        yield (
            f"the chat template ends a response with {marker!r}, which is no token of its own ({count} tokens): chat, evaluation and "
            f"servers stop at the EOS token only, and not at this text. Write new_special_tokens: [{marker!r}], or set chat_template to "
            "one that ends a response with the EOS token"
        )


def tokenizer_warnings(tokenizer: "PreTrainedTokenizerFast") -> Iterator[str]:
    """Warn of tokenizers with Mistral's old regular expression, which transformers reports in its log only.

    transformers 5.17 flags every large vocabulary beside a config of Mistral's that an earlier version wrote, so the expression is
    compared.
    """
    backend = tokenizer.backend_tokenizer
    if getattr(backend, "fix_mistral_regex", None) is False and r"\p{Lu}\p{Lt}" not in str(
        backend.pre_tokenizer
    ):
        yield (
            "the tokenizer splits words by an expression that Mistral has corrected since, so tokens differ from those of pretraining. Copy "
            "tokenizer.json from the current repository of the model"
        )


def column_warnings(config: FinetuneConfig, train: DataSummary) -> Iterator[str]:
    """Warn of columns that the YAML maps but that the rows' format does not read."""
    read = set().union(*(ALL_COLUMNS[source.format] for source in train.sources))
    if config.prompt_template is not None:
        read = set(places_of(config.prompt_template))
    for name in config.columns:
        if name not in read:
            yield f"columns.{name}: the format of the rows ({', '.join({s.format for s in train.sources})}) has no such column: remove it"


def data_warnings(train: DataSummary, valid: DataSummary | None, key: str) -> Iterator[str]:
    """Warn of truncated, excluded or duplicate rows, and of missing validation rows.

    Args:
        train: The training rows.
        valid: The validation rows.
        key: The key of the YAML that the validation rows come from.
    """
    yield from row_warnings("train_path", train)
    if valid is None:
        yield "no valid_path: there is no eval loss, and the latest checkpoint counts as the best"
    else:
        yield from row_warnings(key, valid)


def row_warnings(name: str, summary: DataSummary) -> Iterator[str]:
    """Warn of rows of several splits, and of truncated, excluded, changed or duplicate rows, of one key."""
    begin = 0
    for source in summary.sources:
        files, begin = summary.files[begin : begin + source.files], begin + source.files
        if others := files_of_other_splits(files):
            more = f" and {len(others) - _SHOWN_FILES:,} more" if len(others) > _SHOWN_FILES else ""
            yield (
                f"{name}: {source.path} matches files of several splits, and all of them are used: {', '.join(others[:_SHOWN_FILES])}{more}. "
                "If they should not be, write a pattern without them"
            )
    if summary.truncated_rows:
        yield f"{name}: {summary.truncated_rows:,} rows exceed the context length and are truncated (long_rows: truncate)"
    if summary.dropped_rows:
        yield f"{name}: {summary.dropped_rows:,} rows are excluded: too long, or without loss tokens within the context length"
    if summary.skipped_rows:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.skipped_rows.items())
        yield f"{name}: {sum(summary.skipped_rows.values()):,} rows are excluded (bad_rows: skip): {kinds}; first: {summary.first_skipped[0]}"
    if summary.date:
        yield (
            f"{name}: the chat template prints the date, {summary.date} in these rows (the day of the run's beginning) and in its evaluations; "
            "chat prints the day on which it runs"
        )
    for note, count in summary.notes.items():
        yield f"{name}: {note} ({count:,} {'row' if count == 1 else 'rows'})"
    if summary.split_rows:
        yield f"{name}: {describe_split(summary)}"
    if summary.duplicates:
        yield f"{name}: {summary.duplicates:,} rows are duplicates; first: {summary.first_duplicates[0]}"


def memory_warnings(memory: MemoryReport | None) -> Iterator[str]:
    """Warn of devices whose memory is smaller than the estimate."""
    if memory and memory.verdict and memory.verdict != "fits":
        yield (
            f"memory: each device needs about {format_bytes(memory.total)}, which {memory.verdict} {memory.accelerator} "
            f"({format_bytes(memory.available or 0)}). {describe_savings(memory.savings)}"
        )


def overlap_warnings(report: DataReport) -> Iterator[str]:
    """Warn of validation rows that are also training rows."""
    if report.in_both:
        yield (
            f"valid_path: {report.in_both:,} of its rows are also training rows, so their loss does not measure generalization; first: "
            f"{report.first_in_both[0]}"
        )


def storage_warnings(config: FinetuneConfig, storage: str) -> Iterator[str]:
    """Warn of an output_dir without a storage_path: unlike in other tools, it does not receive the results.

    Args:
        config: The YAML.
        storage: URI that holds the runs.
    """
    if config.output_dir and config.storage_path is None:
        yield (
            f"output_dir: {config.output_dir} is only a scratch directory here. Checkpoints and results go to {storage}; to store them "
            "elsewhere, write storage_path"
        )


def learning_rate_warnings(loaded: LoadedConfig) -> Iterator[str]:
    """Warn of a default learning rate that suits only LoRA."""
    config = loaded.config
    if not config.trains_adapter and "learning_rate" not in loaded.given_keys:
        yield (
            f"learning_rate is not set: the default {config.learning_rate:g} suits LoRA, but full-parameter training usually needs about "
            "1e-5"
        )


def schedule_warnings(config: FinetuneConfig, steps_per_epoch: int, steps: int) -> Iterator[str]:
    """Warn of a schedule that does not fit into the run, and of checkpoints that cannot count as the best."""
    warmup = config.warmup_steps(steps)
    if warmup >= steps:
        yield (
            f"num_warmup_steps: {warmup:,}, but the run has {steps:,} steps: the learning rate never reaches {config.learning_rate:g}; "
            "write fewer, or warmup_ratio: 0.03"
        )
    decay = config.scheduler_arguments().get("num_decay_steps", 0)
    if decay and decay + warmup > steps:
        yield f"num_decay_steps: {decay:,} and the warm-up of {warmup:,} steps are longer than the run of {steps:,} steps; write fewer"
    evaluation = config.evaluation_interval(steps_per_epoch, steps)
    checkpoint = config.checkpoint_interval(steps_per_epoch, steps)
    if config.valid_sources and checkpoint < steps and checkpoint % evaluation:
        yield (
            f"checkpoints every {float(checkpoint):g} steps and evaluations every {float(evaluation):g}: a checkpoint without an evaluation "
            "at its step cannot be the best; make save_steps a multiple of eval_steps"
        )


def length_warnings(config: FinetuneConfig, shape: BatchShape) -> Iterator[str]:
    """Warn of steps that are larger than an epoch, and of a run length that the YAML does not set."""
    if shape.sequences_per_step > shape.sequences:
        what = "packs" if config.packing else "rows"
        yield (
            f"a step trains {shape.sequences_per_step:,} {what} (batch size x devices x accumulation), but train_path has only "
            f"{shape.sequences:,}: every step is a complete epoch"
        )
    if config.num_epochs is None and config.max_steps is None and config.min_update_steps is None:
        epochs = config.number_of_epochs(shape.steps_per_epoch)
        yield (
            f"none of num_epochs, max_steps and min_update_steps is set: the run trains {epochs:g} epochs, the fewest with at least "
            f"{DEFAULT_MIN_UPDATE_STEPS} steps"
        )

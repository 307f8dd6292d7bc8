"""Everything that can be known before a cluster is asked for: a RunPlan, or one clear refusal."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from configs.loading import ConfigError, LoadedConfig
from configs.schema import (
    DEFAULT_MIN_UPDATE_STEPS,
    DataSource,
    FinetuneConfig,
    LoraConfig,
    MlflowLogger,
    WandbLogger,
    config_hash,
)
from runs.layout import DataFingerprints, RunResult, run_of
from runs.reading import newest, read_result, survey
from training.accelerators import memory_of, named_accelerator, nearest_name
from training.continuation import adapter_differences, batch_size_of, misfits
from training.data.batches import BatchShape, Order, pack
from training.data.prepare import prepare_data
from training.data.prepared import PREPARED, PreparedData
from training.data.report import DataReport, make_report
from training.data.request import DataRequest
from training.data.sources import find_files
from training.data.summary import DataSummary
from training.data.templates import Renderer
from training.devices import accelerator_of, choose_device, describe_device
from training.exportable import check_export
from training.flops import RowFlops, row_flops
from training.memory import (
    Job,
    MemoryReport,
    describe_savings,
    estimate_memory,
    largest_batch,
    report_memory,
)
from training.models.architecture import (
    ModelShape,
    adapter_shapes,
    check_is_causal,
    check_packing,
    model_shape,
    parameter_shapes,
)
from training.models.files import (
    AdapterFacts,
    ModelError,
    ModelFacts,
    count_lora_parameters,
    is_hub_id,
    is_model_file,
    is_tokenizer_file,
    is_trained_whole,
    read_adapter_facts,
    read_hub_facts,
    read_model_facts,
    targeted_modules,
    untargeted_names,
)
from training.models.kernels import Device, KernelChoice, Provider, choose_kernels
from training.models.tokenizer import load_tokenizer, read_chat_template
from training.paths import (
    about_key,
    scratch_directory,
    storage_path,
)
from training.starts import listed, newest_of_the_same_run, resolve, starting_weights, whole_state
from training.strategy import check_optimizer, deepspeed_settings, zero_stage
from training.weights import fetch_model
from utils.bucket import (
    check_writable,
    is_remote,
    join_uri,
    missing_bytes,
    open_store,
)
from utils.files import checksum_bytes, format_bytes, free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Bytes that stay for Python, torch and what is loaded with it: a worker with a tiny model had 0.7 GB at most (2026-11-21).
_CPU_PROCESS = 1_000_000_000


class RunPlan(BaseModel):
    """What the driver decided and the workers follow. It crosses the wire as a plain dictionary and is validated again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: FinetuneConfig
    config_hash: str
    run_name: str
    run_uri: str
    device: Device
    kernels: KernelChoice
    deepspeed: dict[str, Any] | None
    base_model: str
    """Hub id, absolute directory or s3:// prefix of the weights to start from."""
    adapter: str | None
    """Directory or s3:// prefix of the LoRA adapter to continue."""
    parent: str | None
    """What the run started from, if not from the plain model: recorded in manifests and the result."""
    restore_from: str | None
    """URI of the checkpoint whose whole trainer state is taken."""
    chat_template: str | None
    """Jinja text that takes the place of the tokenizer's own."""
    prepared: str
    """Where the rows' tokens are kept in the bucket, by their keys."""
    train: str
    """Key of the training rows."""
    valid: str | None
    data: DataFingerprints
    max_steps: int
    steps_per_epoch: int
    flops: RowFlops | None
    """What a row is worth; None where nobody has counted it for such layers or such a task."""
    scratch: str
    """Absolute directory for the cache and unfinished files: the driver's; see `on_this_node`."""

    @property
    def cache(self) -> Path:
        """Where a node keeps what it downloaded and tokenised."""
        return Path(self.scratch) / "cache"

    def order(self, lengths: np.ndarray, longest: int, devices: int) -> Order:
        """Which rows each step takes; see `order_of`."""
        return order_of(self.config, lengths, longest, devices)

    def on_this_node(self) -> Self:
        """The plan with a scratch directory of the node that asks, where the YAML names none: nodes need not have the driver's."""
        if self.config.output_dir:
            return self
        return self.model_copy(update={"scratch": str(scratch_directory(self.config))})


class PlanReport(DataReport):
    """What a person reads before a run starts, and `--dry-run --json` returns."""

    run_name: str
    run_uri: str
    storage: str
    """What was tried where the run will go, with the credentials that are here."""
    cluster: str | None = None
    """What the cluster that RAY_ADDRESS names has for the workers, or has to scale up to; None where it was not asked."""
    model: str
    architecture: str
    parameters: int
    trainable_parameters: int
    device: str
    kernels: str
    parallelism: str
    batch: str
    """What a device takes at once, and how often before a step."""
    packing: str | None
    """How many packs, and how full they are."""
    resumes_from: str | None
    starts_from: str | None
    memory: MemoryReport | None
    """Estimated; None where nobody has counted it for such layers."""
    completed: RunResult | None
    """What the same run left, if it ended before: nothing is left to do."""
    warnings: list[str]


class Progress(Protocol):
    """Told what is being looked at; where it takes long, also how much of it is done (0 to 1) and a figure."""

    def __call__(self, what: str, fraction: float | None = None, figures: str = "") -> None: ...  # noqa: D102


def make_plan(loaded: LoadedConfig, *, progress: Progress) -> tuple[RunPlan, PlanReport, list[PreparedData]]:
    """Check everything that needs no cluster, cheapest first: settings, devices, storage, model, data.

    The rows come back with the plan, prepared: training rows and, where there are any, validation rows.

    Args:
        loaded: The checked YAML.
        progress: Told what is being looked at.

    Raises:
        ConfigError, StrategyError, ModelError, DataError, CheckpointError, BucketError: what refuses the run.
    """
    config = loaded.config
    _refuse_what_is_missing(loaded)
    settings = deepspeed_settings(config)
    device = choose_device(config)
    kernels = choose_kernels(config, device, zero_stage(settings))
    storage, scratch = storage_path(config), scratch_directory(config)

    progress("storage")
    with about_key("storage_path"):
        check_writable(storage)
    progress("model")
    base_model, adapter, parent = starting_weights(config, storage)
    facts = read_hub_facts(base_model) if is_hub_id(base_model) else read_model_facts(base_model)
    _check_disk(base_model, facts, scratch)
    tokenizer_dir = fetch_model(base_model, scratch / "cache", is_tokenizer_file)
    check_is_causal(tokenizer_dir, base_model, trust_remote_code=config.trust_remote_code)
    dimensions = model_shape(tokenizer_dir, base_model, trust_remote_code=config.trust_remote_code)
    if config.packing:
        check_packing(tokenizer_dir, base_model, trust_remote_code=config.trust_remote_code)
    adapter_facts = read_adapter_facts(adapter) if adapter else None
    if adapter_facts or facts.quantization:
        # By its architecture: files may be packed, or call things by older names.
        shapes = parameter_shapes(tokenizer_dir, base_model, trust_remote_code=config.trust_remote_code)
        facts = replace(facts, parameter_shapes=shapes)
    _check_quantization(config, facts)
    with about_key("export"):
        check_export(config, facts)
    if adapter_facts:
        _check_adapter(config, adapter_facts, facts)
    chat_template = read_chat_template(config)
    tokenizer = load_tokenizer(
        tokenizer_dir,
        trust_remote_code=config.trust_remote_code,
        source=base_model,
        chat_template=chat_template,
    )
    if config.lora_config and not adapter_facts:
        if not targeted_modules(facts, config.lora_config):  # files may call modules by older names
            shapes = parameter_shapes(tokenizer_dir, base_model, trust_remote_code=config.trust_remote_code)
            facts = replace(facts, parameter_shapes=shapes)
        _check_targets(config.lora_config, facts)
    new_adapter = None
    if config.lora_config and not adapter_facts and _only_peft_can_count(config.lora_config, dimensions):
        new_adapter = adapter_shapes(
            tokenizer_dir, base_model, config.lora_config, trust_remote_code=config.trust_remote_code
        )
    trained = _trainable_parameters(config, facts, adapter_facts, new_adapter)
    if device == "cuda":
        check_optimizer(config, zero_stage(settings), trained)
    warnings = list(_model_warnings(config, facts, adapter_facts, kernels.provider))
    warnings += _attention_warnings(config, facts, dimensions, device, kernels.provider)
    warnings += _expert_warnings(config, facts, dimensions, device, kernels.provider)
    warnings += _accelerator_warnings(config)
    if not config.trains_adapter and "learning_rate" not in loaded.given_keys:
        warnings.append(
            f"learning_rate is not given: {config.learning_rate:g} suits LoRA, and all parameters of a pretrained model usually take about "
            "1e-5"
        )

    def prepare(key: str, sources: Sequence[DataSource]) -> PreparedData:
        progress(f"rows of {key}")
        with about_key(key):
            request = data_request(config, sources, facts, chat_template)
        _check_template(request, tokenizer, base_model)
        return prepare_data(
            request,
            tokenizer,
            tokenizer_dir,
            scratch / "cache",
            bucket=prepared_uri,
            progress=lambda rows, fraction: progress(f"rows of {key}", fraction, f"{rows:,} rows"),
        )

    prepared_uri = join_uri(storage, PREPARED)
    prepared_train = prepare("train_path", config.train_sources)
    prepared_valid = prepare("valid_path", config.valid_sources) if config.valid_sources else None
    train, valid = prepared_train.summary, prepared_valid.summary if prepared_valid else None
    warnings += _template_warnings(config, tokenizer)
    warnings += _data_warnings(train, valid)

    data = DataFingerprints(train=train.fingerprint, valid=valid.fingerprint if valid else None)
    outcome_hash = config_hash(config)
    fingerprint = checksum_bytes(f"{outcome_hash} {data.train} {data.valid or ''}".encode())
    run_name = config.run_name or f"{loaded.path.stem}-{fingerprint[-8:]}"
    run_uri = join_uri(storage, run_name)
    job = dimensions and Job(
        config=config,
        shape=dimensions,
        facts=facts,
        adapter=adapter_facts,
        device=device,
        longest=_longest_sequence(config, train),
        new_adapter=new_adapter,
    )
    batch_reason = ""
    if config.train_batch_size_per_device == "auto":
        rows_at_once, batch_reason = _choose_batch_size(config, run_uri, storage, job)
        config = config.with_batch_size(rows_at_once)
        job = job and replace(job, config=config)
    order = order_of(config, prepared_train.index.length, train.longest, config.most_devices)
    shape = order.shape
    if shape.sequences_per_step > shape.sequences:
        what = "packs" if config.packing else "rows"
        warnings.append(
            f"a step takes {shape.sequences_per_step:,} {what} (batch size, devices and accumulation multiplied), and "
            f"train_path has {shape.sequences:,}: every step is a whole epoch"
        )
    if config.num_epochs is None and config.max_steps is None and config.min_update_steps is None:
        epochs = config.number_of_epochs(shape.steps_per_epoch)
        warnings.append(
            f"none of num_epochs, max_steps and min_update_steps is given: {epochs:g} epochs, the fewest that make "
            f"{DEFAULT_MIN_UPDATE_STEPS} steps"
        )
    progress("earlier runs")
    own_newest, damage = newest_of_the_same_run(config, run_uri, outcome_hash, data)
    warnings += [f"a checkpoint of this run is passed over: {line}" for line in damage]
    completed = _completed(run_uri) if own_newest else None
    parent_state = None if completed else whole_state(config, storage, data, count_steps(config, shape))
    memory = report_memory(job, *accelerator_of(config, device)) if job else None
    warnings += _memory_warnings(memory)
    plan = RunPlan(
        config=config,
        config_hash=outcome_hash,
        run_name=run_name,
        run_uri=run_uri,
        device=device,
        kernels=kernels,
        deepspeed=settings,
        base_model=base_model,
        adapter=adapter,
        parent=parent_state or parent,
        restore_from=own_newest or parent_state,
        chat_template=chat_template,
        prepared=prepared_uri,
        train=prepared_train.key,
        valid=prepared_valid.key if prepared_valid else None,
        data=data,
        max_steps=count_steps(config, shape),
        steps_per_epoch=shape.steps_per_epoch,
        flops=_flops(job),
        scratch=str(scratch),
    )
    rows = make_report(
        prepared_train,
        prepared_valid,
        order,
        limit=config.context_length or facts.max_context,
        padded_to=_longest_sequence(config, train) if config.padding == "max_length" else None,
        steps=plan.max_steps,
    )
    warnings += _overlap_warnings(rows)
    report = PlanReport(
        **dict(rows),
        run_name=run_name,
        run_uri=run_uri,
        storage="an object was written, read and deleted there"
        if is_remote(storage)
        else "this user may write there",
        model=config.model_id,
        architecture=facts.architecture,
        parameters=facts.parameters,
        trainable_parameters=trained,
        device=describe_device(config, device),
        kernels=f"{kernels.provider} ({kernels.reason})",
        parallelism=f"DeepSpeed ZeRO-{zero_stage(settings)}"
        if settings
        else ("DDP" if config.most_devices > 1 else "one worker"),
        batch=_describe_batch(config, batch_reason),
        packing=_describe_packing(config, train, shape) if config.packing else None,
        resumes_from=own_newest,
        starts_from=plan.parent,
        memory=memory,
        completed=completed,
        warnings=warnings,
    )
    return plan, report, [rows for rows in (prepared_train, prepared_valid) if rows]


def order_of(config: FinetuneConfig, lengths: np.ndarray, longest: int, devices: int) -> Order:
    """Which rows each step of a run takes: the same here and on every worker, and on any number of them.

    Args:
        config: The YAML.
        lengths: Tokens of each training row.
        longest: Of them.
        devices: One of the configuration's device_counts.
    """
    packs = pack(lengths, config.context_length or longest) if config.packing else None
    shape = BatchShape(
        len(lengths) if packs is None else len(packs),
        config.batch_size,
        devices,
        config.accumulation_on(devices),
    )
    is_padded_to_longest = config.padding == "longest" and packs is None
    return Order(shape, config.seed, lengths=lengths if is_padded_to_longest else None, packs=packs)


def _longest_sequence(config: FinetuneConfig, train: DataSummary) -> int:
    """Tokens of the longest sequence that is trained on, with what fills it up."""
    filled = config.packing or config.padding == "max_length"
    return (config.context_length if filled else None) or train.longest


def count_steps(config: FinetuneConfig, shape: BatchShape) -> int:
    """Optimizer steps of the whole run."""
    epochs = config.number_of_epochs(shape.steps_per_epoch)
    if epochs is None:
        assert config.max_steps is not None
        return config.max_steps
    return math.ceil(epochs * shape.steps_per_epoch)


def data_request(
    config: FinetuneConfig, sources: Sequence[DataSource], facts: ModelFacts, chat_template: str | None
) -> DataRequest:
    """Sources of the YAML with everything that decides their tokens; their files are listed, not fetched.

    Raises:
        BucketError: a source cannot be read.
        DataError: it holds no files of rows.
    """
    return DataRequest(
        paths=tuple(source.path for source in sources),
        files=tuple(
            file for number, source in enumerate(sources) for file in find_files(source.path, number)
        ),
        weights=tuple(source.weight for source in sources if source.weight is not None) or None,
        task=config.task,
        data_format=config.data_format,
        columns=tuple(sorted((str(ours), theirs) for ours, theirs in config.columns.items())),
        prompt_template=config.prompt_template,
        chat_template=chat_template,
        labels=tuple(config.classifier_config.label_tokens) if config.classifier_config else (),
        context_length=config.context_length,
        max_context=facts.max_context,
        long_rows=config.long_rows,
        bad_rows=config.bad_rows,
        seed=config.seed,
    )


def _refuse_what_is_missing(loaded: LoadedConfig) -> None:
    refusals = list(loaded.refusals)
    config = loaded.config
    if isinstance(config.logger, WandbLogger | MlflowLogger) and not _is_importable(config.logger.provider):
        refusals.append(
            f"logger: the package {config.logger.provider} is not installed (metrics.jsonl is always written). `make setup-trackers` installs it; an image takes it by --build-arg TRACKERS=1."
        )
    if config.run_name == PREPARED:
        refusals.append(f"run_name: {PREPARED} is where storage_path keeps prepared rows. Choose another.")
    if refusals:
        raise ConfigError("\n".join(refusals))


def _is_importable(provider: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(provider) is not None


def _check_disk(base_model: str, facts: ModelFacts, scratch: Path) -> None:
    if is_hub_id(base_model) or not is_remote(base_model) or os.environ.get("RAY_ADDRESS"):
        return  # the hub's cache and other nodes' disks are looked at where they are
    missing, free = (
        missing_bytes(base_model, scratch / "cache" / "models", is_model_file),
        free_bytes(scratch),
    )
    if missing > free:
        raise ModelError(
            f"model {facts.source}: needs {format_bytes(missing)} on this node, and {scratch} has {format_bytes(free)} free. "
            "Free some, or set output_dir to a larger disk."
        )


def _check_template(request: DataRequest, tokenizer: "PreTrainedTokenizerFast", base_model: str) -> None:
    if tokenizer.chat_template or request.prompt_template or request.task == "causal_lm":
        return  # causal_lm may be plain text; of chats, the first says what is missing
    raise ModelError(
        f"model {base_model}: its tokenizer has no chat template, so conversations cannot be rendered. Write chat_template (Jinja text or "
        "a file of it) or prompt_template, take the model's instruct version, or train on plain text with task: causal_lm."
    )


def _completed(run_uri: str) -> RunResult | None:
    """The result of a run that has done all its steps."""
    result = read_result(open_store(run_uri))
    return result if result and result.status == "completed" else None


def _check_quantization(config: FinetuneConfig, facts: ModelFacts) -> None:
    if facts.quantization is None:
        return
    if facts.quantization != "bitsandbytes":
        raise ModelError(
            f"model {facts.source}: its weights are stored quantised by {facts.quantization}, which cannot be trained here. Name the model "
            "that they were made from, or a bitsandbytes 4-bit copy."
        )
    if not config.load_in_4bit:
        raise ModelError(
            f"model {facts.source}: its weights are stored in 4 bits. Write load_in_4bit: true (with lora_config), or name the model that "
            "they were made from."
        )


def _check_targets(lora: LoraConfig, facts: ModelFacts) -> None:
    """A new adapter has something to sit on."""
    if targeted_modules(facts, lora):
        return
    names = sorted({module.split(".")[-1] for module in facts.matrix_shapes})
    raise ConfigError(
        f"lora_config.target_modules: {lora.target_modules} matches no matrix of {facts.source}. It has: {', '.join(names)}. "
        "Name some of them, or write all-linear."
    )


def _check_adapter(config: FinetuneConfig, adapter: AdapterFacts, facts: ModelFacts) -> None:
    """An adapter goes on with its own shape, on a model that it fits."""
    key = "initial_adapter_model_ckpt_path"
    wrong = misfits(adapter, facts)
    if wrong:
        more = [f"… and {len(wrong) - 3} more"] if len(wrong) > 3 else []
        raise ModelError(
            f"{key}: the adapter {adapter.source} (trained on {adapter.base_model or 'a model that it does not name'}) does not fit "
            f"{facts.source}:\n{listed(wrong[:3] + more)}\nName the model that it was trained on as model_id."
        )
    changed = adapter_differences(adapter, config.lora_config, facts)
    if changed:
        raise ConfigError(
            f"{key}: the adapter {adapter.source} keeps its own shape, and the YAML asks for another:\n{listed(changed)}\n"
            "Leave lora_config out, or write what the adapter has."
        )


def _only_peft_can_count(lora: LoraConfig, dimensions: ModelShape | None) -> bool:
    """Whether an adapter is more than matrices, and DoRA's magnitudes, beside each of the model's; PEFT takes a second or two to make it up."""
    beside_matrices = lora.target_parameters or lora.trainable_token_indices or lora.bias != "none"
    return bool(beside_matrices or lora.lora_bias or (dimensions and dimensions.experts))


def _trainable_parameters(
    config: FinetuneConfig,
    facts: ModelFacts,
    adapter: AdapterFacts | None,
    new_adapter: Mapping[str, tuple[int, ...]] | None,
) -> int:
    if adapter or new_adapter:
        shapes = adapter.parameter_shapes if adapter else new_adapter or {}
        return sum(math.prod(shape) for shape in shapes.values())
    if config.lora_config:
        return count_lora_parameters(facts, config.lora_config)
    return facts.parameters


def _flops(job: Job | None) -> RowFlops | None:
    if (
        job is None or job.config.task == "preference_tuning"
    ):  # a pair is two rows, and the reference reads them, too
        return None
    return row_flops(
        job.shape,
        job.facts.parameter_shapes,
        is_trained=lambda name: (
            not job.config.trains_adapter or is_trained_whole(job.config.lora_config, name)
        ),
        ranks=job.ranks,
    )


def _choose_batch_size(
    config: FinetuneConfig, run_uri: str, storage: str, job: Job | None
) -> tuple[int, str]:
    """What `train_batch_size_per_device: auto` comes to, and why.

    A run that goes on keeps what it began with, whatever devices it has now: other batches would round otherwise, and its end
    would not be that of a run that was never interrupted.
    """
    earlier = [run_uri] if survey(open_store(run_uri))[0] else []
    if config.resume_from_checkpoint:
        start = resolve("resume_from_checkpoint", config.resume_from_checkpoint, storage, newest)
        earlier.append(run_of(start))
    for run in earlier:
        if rows := batch_size_of(open_store(run), config):
            return rows, "auto: as it began"
    key = "train_batch_size_per_device: auto"
    if job is None:
        raise ConfigError(f"{key}: nobody has counted what layers such as this model's need. Write a number.")
    name, available = accelerator_of(config, job.device)
    if job.device == "cpu":
        memory = config.worker_resources.get("memory")
        if memory is None:
            raise ConfigError(
                f"{key}: on CPU nothing says how much memory a worker may take. Write it as worker_resources: {{memory: 8GiB}}, "
                "or a number of rows."
            )
        name, available = "worker_resources.memory", int(memory) - _CPU_PROCESS
    if available is None:
        raise ConfigError(
            f"{key}: it is not known how much memory {name or 'the devices of the cluster'} has. Name an accelerator that is known in "
            "worker_resources, such as {accelerator_type:A10G: 0.001}, or write a number."
        )
    rows = largest_batch(job, available)
    if estimate_memory(replace(job, config=config.with_batch_size(rows))).total > available:
        return rows, f"auto: the least; not even that is estimated to fit {name}"
    return rows, f"auto: the most that are estimated to fit {name}"


def _describe_batch(config: FinetuneConfig, reason: str) -> str:
    sequences = "pack" if config.packing else "row"
    rows, accumulated = config.batch_size, config.gradient_accumulation_steps
    text = f"{rows:,} {sequences}{'s' if rows > 1 else ''} a device, {accumulated:,} accumulated"
    for devices in config.device_counts[-2::-1]:
        text += f", {config.accumulation_on(devices):,} on {devices} device{'s' if devices > 1 else ''}"
    return f"{text} ({reason})" if reason else text


def _memory_warnings(memory: MemoryReport | None) -> Iterator[str]:
    if memory and memory.verdict and memory.verdict != "fits":
        yield (
            f"memory: each device needs about {format_bytes(memory.total)}, which {memory.verdict} {memory.accelerator} with its "
            f"{format_bytes(memory.available or 0)}. {describe_savings(memory.savings)}"
        )


def _model_warnings(
    config: FinetuneConfig, facts: ModelFacts, adapter: AdapterFacts | None, kernels: Provider
) -> Iterator[str]:
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
    if config.flash_attention_2 and not _is_importable("flash_attn"):
        yield "flash_attention_2: the package flash-attn is not installed; torch's scaled_dot_product_attention is used"


def _attention_warnings(
    config: FinetuneConfig, facts: ModelFacts, shape: ModelShape | None, device: Device, kernels: Provider
) -> Iterator[str]:
    if shape is None or not shape.caps_scores or kernels == "unsloth" or config.flash_attention_2:
        return
    text = (
        f"{facts.source} caps the scores of its attention, which torch's own kernels leave out: transformers' plain attention is used, "
        "whose memory grows with the square of the length"
    )
    yield f"{text}; flash_attention_2: true (a package of its own) needs less" if device == "cuda" else text


def _accelerator_warnings(config: FinetuneConfig) -> Iterator[str]:
    named = named_accelerator(config.worker_resources)
    if named and memory_of(named) is None and (meant := nearest_name(named)):
        yield f"worker_resources: accelerator_type:{named} is not known here, and Ray takes names letter by letter: did you mean {meant}?"


def _expert_warnings(
    config: FinetuneConfig, facts: ModelFacts, shape: ModelShape | None, device: Device, kernels: Provider
) -> Iterator[str]:
    unsloth_packs_them = (device, kernels) == ("cuda", "unsloth")
    if config.load_in_4bit and shape and shape.experts and not unsloth_packs_them:
        yield (
            f"load_in_4bit: transformers holds the experts of a layer of {facts.source} in one parameter, which bitsandbytes leaves in "
            "16 bits: only the rest is held in 4"
        )


def _template_warnings(config: FinetuneConfig, tokenizer: "PreTrainedTokenizerFast") -> Iterator[str]:
    """Where the template lays answers out, and says where they begin."""
    if config.prompt_template is not None or config.task not in ("instruction_tuning", "preference_tuning"):
        return
    renderer = Renderer(tokenizer, whole_text=False)
    if renderer.header and not renderer.end_marker:
        yield "the chat template puts nothing behind an answer, so the model does not learn to end one; chat_template can add a mark"


def _data_warnings(train: DataSummary, valid: DataSummary | None) -> Iterator[str]:
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


def _describe_packing(config: FinetuneConfig, train: DataSummary, shape: BatchShape) -> str:
    capacity = config.context_length or train.longest
    fill = train.tokens / (shape.sequences * capacity)
    return f"{train.rows:,} rows in {shape.sequences:,} sequences of {capacity:,} tokens, {fill:.1%} full"


def _overlap_warnings(report: DataReport) -> Iterator[str]:
    if report.in_both:
        yield (
            f"valid_path: {report.in_both:,} of its rows are training rows, too, and their loss says nothing about new ones; the first: "
            f"{report.first_in_both[0]}"
        )

"""The planner: a checked YAML becomes a RunPlan, or an error that says what to fix. It needs no cluster, except to prepare large data.

`make_plan` reads top to bottom. Each step checks one subject, cheapest first, and returns a frozen record.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from configs.loading import LoadedConfig
from configs.schema import DataSource, FinetuneConfig, config_hash
from runs.layout import DataFingerprints, RunResult
from runs.reading import read_result
from training.data.batches import BatchShape
from training.data.chat_template import ChatTemplate
from training.data.prepare import prepare_data
from training.data.prepared import PreparedData, find_prepared
from training.data.report import DataReport, IndexFigures, make_report
from training.data.request import DataRequest
from training.data.shards import ShardMap
from training.data.sources import DataFile, find_files
from training.data.summary import DataSummary
from training.models.adapter import describe_mixture
from training.models.attention import check_windows, choose_attention, exceeded_rope_of_unsloth
from training.models.files import ModelFacts, hub_revision, is_fully_trained, read_adapter_facts
from training.models.hub import check_hub_access
from training.models.tokenizer import describe_template
from training.planning import warnings as plan_warnings
from training.planning.batch_size import choose_batch_size, describe_batch, describe_packing
from training.planning.checks import (
    check_batch,
    check_checkpoint_fits,
    check_ids_of_rows,
    check_template,
    reject_missing_requirements,
)
from training.planning.deepspeed import resolve_execution
from training.planning.devices import (
    accelerator_of,
    choose_device,
    describe_device,
    describe_parallelism,
    runs_here,
)
from training.planning.endpoints import ClusterTarget
from training.planning.flops import RowFlops, row_flops
from training.planning.index_figures import IndexReader, index_figures
from training.planning.memory import Job, MemoryReport, estimate_checkpoint, report_memory
from training.planning.model import (
    Adapter,
    Model,
    Settings,
    Storage,
    count_trainable,
    read_model,
    read_start,
)
from training.planning.paths import about_key, needs_embedded_bucket, scratch_directory, storage_path
from training.planning.plan import Resolved, RunPlan
from training.planning.report import CheckedSample, PlanReport
from training.planning.resume import complete_state, latest_of_the_same_run, recorded_paths
from training.planning.template_date import find_earlier_rows, with_day
from utils.files import checksum_bytes
from utils.storage.bucket import check_writable, is_remote, join_uri, open_store
from utils.storage.node_cache import written_cache_limit

_SAMPLE_ROWS = 1000
"""Rows of each source that are checked before a run is submitted."""

Part = Literal["train", "valid"]
"""The training rows or the validation rows."""


class Progress(Protocol):
    """Called with the current check; for slow checks also with the fraction done (0 to 1) and a figure."""

    def __call__(self, what: str, fraction: float | None = None, figures: str = "") -> None: ...  # noqa: D102


def _ignore_progress(what: str, fraction: float | None = None, figures: str = "") -> None:
    pass


@dataclass(frozen=True)
class Requests:
    """The requests for all rows of a run, whose files are listed once. They have no date yet."""

    train: DataRequest
    valid: dict[str, DataRequest]
    """By the name of the validation set."""
    today: str | None
    """Today's date (ISO 8601) if the chat template may render rows and prints a date."""


@dataclass(frozen=True)
class Data:
    """The prepared rows, and the run's name, which depends on them."""

    train: PreparedData
    valid: PreparedData | None
    """The validation set that decides which checkpoint is the best."""
    more_valid: dict[str, PreparedData]
    """The other validation sets by name."""
    fingerprints: DataFingerprints
    recorded: dict[str, Any]
    """Values that the run records in place of the YAML's: the paths that the user wrote, or those of its earlier attempts."""
    config_hash: str
    run_name: str
    run_uri: str

    @property
    def prepared(self) -> list[PreparedData]:
        """The training rows and the validation rows of all sets."""
        return [self.train, *([self.valid] if self.valid else []), *self.more_valid.values()]


@dataclass(frozen=True)
class Batch:
    """The batches of a run, with the batch size resolved."""

    config: FinetuneConfig
    reason: str
    """The reason for the value of `train_batch_size_per_device: auto`; empty if the YAML has a number."""
    job: Job | None
    """Input of the memory estimate; None for unsupported architectures."""
    figures: IndexFigures
    max_steps: int

    @property
    def shape(self) -> BatchShape:
        """Sequences and steps."""
        return self.figures.shape


@dataclass(frozen=True)
class FoundCheckpoints:
    """The checkpoints that a run can resume from."""

    own_checkpoint: str | None
    """URI of the run's own latest checkpoint."""
    parent_state: str | None
    """URI of another run's checkpoint whose complete trainer state is restored."""
    completed: RunResult | None
    """The result of this run if it is already completed."""
    damage: list[str]
    """Errors of this run's damaged checkpoints, which are skipped."""


def make_plan(
    loaded: LoadedConfig,
    *,
    target: ClusterTarget,
    progress: Progress = _ignore_progress,
    on_cluster: ShardMap | None = None,
) -> tuple[RunPlan, PlanReport, list[PreparedData]]:
    """Check everything, cheapest first: settings, storage, model, adapter, data, batch, resume. Only large data may need the cluster.

    Args:
        loaded: The checked YAML.
        target: Where the workers will be placed.
        progress: Called with each check.
        on_cluster: Runs work on many rows on the target cluster, which is asked for nothing before; None: this machine does it.

    Returns:
        The plan, its report, and the prepared training and validation rows.
    """
    settings, storage, model, adapter = _check_run(loaded, target, progress)
    if _nodes_read_and_write(loaded.config, storage):
        storage = replace(storage, on_cluster=on_cluster)
    requests = _request_rows(loaded, model, progress)
    return _plan(loaded, progress, settings, storage, model, adapter, requests)


def _nodes_read_and_write(config: FinetuneConfig, storage: Storage) -> bool:
    """Return whether any node can load the tokenizer and access the storage. Code of a model's own tokenizer is on this machine only."""
    return is_remote(storage.uri) and not needs_embedded_bucket(config) and not config.trust_remote_code


def _plan(
    loaded: LoadedConfig,
    progress: Progress,
    settings: Settings,
    storage: Storage,
    model: Model,
    adapter: Adapter,
    requests: Requests,
) -> tuple[RunPlan, PlanReport, list[PreparedData]]:
    """Prepare the rows and decide what depends on them."""
    data = _prepare_rows(loaded, storage, model, progress, requests)
    batch = _plan_batches(loaded.config, settings, storage, model, adapter, data)
    checkpoints = _find_checkpoints(settings, batch, storage, data, progress)
    is_here = runs_here(batch.config, settings.device, settings.target)
    if batch.job and not checkpoints.completed and (is_here or not settings.target.is_local):
        scratch = storage.scratch if is_here else None
        check_checkpoint_fits(estimate_checkpoint(batch.job), storage.uri, scratch)
    memory = (
        report_memory(batch.job, *accelerator_of(batch.config, settings.device, settings.target))
        if batch.job
        else None
    )
    rows = _report_rows(model, data, batch)
    plan = RunPlan(
        config=batch.config.model_copy(update=data.recorded),
        config_hash=data.config_hash,
        run_name=data.run_name,
        run_uri=data.run_uri,
        device=settings.device,
        resolved=Resolved(
            target=settings.target,
            zero_stage=settings.execution.zero_stage,
            kernels=settings.execution.kernels,
            attention=model.attention,
            weights_dtype=settings.execution.weights_dtype,
        ),
        deepspeed=settings.execution.deepspeed,
        base_model=model.base,
        base_revision=_base_revision(model, batch.config, checkpoints),
        adapter=model.adapter,
        parent=checkpoints.parent_state or model.parent,
        restore_from=checkpoints.own_checkpoint or checkpoints.parent_state,
        tokenizer=model.tokenizer_source,
        new_tokens=model.new_tokens,
        chat_template=model.chat_template,
        prepared=storage.prepared,
        train=data.train.key,
        valid=data.valid.key if data.valid else None,
        more_valid={name: rows.key for name, rows in data.more_valid.items()},
        data=data.fingerprints,
        max_steps=batch.max_steps,
        steps_per_epoch=batch.shape.steps_per_epoch,
        flops=_flops(batch.job),
        scratch=str(storage.scratch),
    )
    warnings = list(
        _warnings(loaded, settings, storage, model, adapter, data, batch, checkpoints, memory, rows)
    )
    report = _report(plan, storage, model, adapter, batch, checkpoints, memory, rows, warnings)
    return plan, report, data.prepared


def plan_submission(
    loaded: LoadedConfig, *, target: ClusterTarget, progress: Progress
) -> PlanReport | CheckedSample:
    """Check a run that is submitted. If its rows are many and not prepared yet, check a sample: the job prepares all of them.

    Args:
        loaded: The checked YAML.
        target: The job server.
        progress: Called with each check.
    """
    settings, storage, model, adapter = _check_run(loaded, target, progress)
    requests = _request_rows(loaded, model, progress)
    if rows := _sample_rows(loaded, storage, model, progress, requests):
        run_name = loaded.config.run_name
        return CheckedSample(rows, join_uri(storage.uri, run_name) if run_name else None)
    return _plan(loaded, progress, settings, storage, model, adapter, requests)[1]


def _check_run(
    loaded: LoadedConfig, target: ClusterTarget, progress: Progress
) -> tuple[Settings, Storage, Model, Adapter]:
    """Check everything except the rows."""
    reject_missing_requirements(loaded, target)
    written_cache_limit()
    settings = _resolve_settings(loaded.config, target)
    if loaded.config.push_to_hub and not target.is_job_server:
        progress("access to the Hub")
        check_hub_access("push_to_hub")
    storage = _check_storage(loaded.config, progress)
    progress("model")
    start = read_start(loaded.config, storage)
    continued = start.adapter_facts.lora if start.adapter_facts else None
    if continued is not None:  # its settings decide which kernels can train it
        settings = _resolve_settings(loaded.config, target, continued)
    model = read_model(loaded.config, settings, storage, start)
    exceeded = exceeded_rope_of_unsloth(loaded.config, model.traits, model.facts.max_context)
    if exceeded is not None:
        settings = _resolve_settings(loaded.config, target, continued, exceeded)
        provider = settings.execution.kernels.provider
        attention = choose_attention(loaded.config, model.traits, settings.device, provider)
        model = replace(model, attention=attention)
    adapter = count_trainable(loaded.config, settings, storage, model)
    return settings, storage, model, adapter


def _resolve_settings(
    config: FinetuneConfig,
    target: ClusterTarget,
    continued: Mapping[str, Any] | None = None,
    exceeded_rope: int | None = None,
) -> Settings:
    device = choose_device(config, target)
    execution = resolve_execution(
        config,
        device,
        continued=continued,
        elsewhere=target.is_job_server,
        exceeded_rope=exceeded_rope,
    )
    return Settings(target, device, execution)


def _check_storage(config: FinetuneConfig, progress: Progress) -> Storage:
    storage = Storage(storage_path(config), scratch_directory(config))
    progress("storage")
    with about_key("storage_path"):
        check_writable(storage.uri)
    return storage


def _request_rows(loaded: LoadedConfig, model: Model, progress: Progress) -> Requests:
    """List the files of all rows, after checking that rows can be rendered."""
    config = loaded.config
    progress(f"rows of {_key_of('train', config)}")
    train = _request("train", loaded, model)
    valid: dict[str, DataRequest] = {}
    for name in config.valid_sets:
        files = train.files if config.valid_split is not None else None
        valid[name] = _request("valid", loaded, model, name, files)
    is_rendered = not config.prompt_template and config.data_format not in ("text", "tokens")
    return Requests(train, valid, ChatTemplate(model.tokenizer).date if is_rendered else None)


def _prepare_rows(
    loaded: LoadedConfig, storage: Storage, model: Model, progress: Progress, requests: Requests
) -> Data:
    """Tokenize the rows, and derive the run name from them unless the YAML has one."""
    config = loaded.config
    written = loaded.as_written(config)
    outcome_hash = config_hash(written)

    def name_of(prints: DataFingerprints) -> str:
        digest = checksum_bytes(f"{outcome_hash} {prints.train} {prints.valid or ''}".encode())
        return config.run_name or f"{loaded.path.stem}-{digest[-8:]}"

    train, day = _prepare_train_rows(loaded, storage, model, progress, requests, name_of)
    sets = {
        name: _prepare(_key_of("valid", config, name), request, day, loaded, storage, model, progress)
        for name, request in requests.valid.items()
    }
    valid_prints = {name: rows.summary.fingerprint for name, rows in sets.items()}
    fingerprints = DataFingerprints(train=train.summary.fingerprint, valid=_fingerprint_of(valid_prints))
    valid, *_ = (*sets.values(), None)
    more = dict(list(sets.items())[1:])
    run_name = name_of(fingerprints)
    run_uri = join_uri(storage.uri, run_name)
    recorded = {**loaded.written, **recorded_paths(written, run_uri, fingerprints)}
    return Data(
        train=train,
        valid=valid,
        more_valid=more,
        fingerprints=fingerprints,
        recorded=recorded,
        config_hash=config_hash(config.model_copy(update=recorded)),
        run_name=run_name,
        run_uri=run_uri,
    )


def _sample_rows(
    loaded: LoadedConfig, storage: Storage, model: Model, progress: Progress, requests: Requests
) -> int:
    """Check the first rows of each source that is not prepared yet; return their number, or 0 if no source has more."""
    config, today = loaded.config, requests.today
    sets = {_key_of("train", config): requests.train}
    if config.valid_split is None:
        sets |= {_key_of("valid", config, name): request for name, request in requests.valid.items()}
    rows, has_more = 0, False
    for key, request in sets.items():
        dated = with_day(
            request, today, model.tokenizer, model.tokenizer_directory, storage.cache, storage.prepared
        )
        if find_prepared(dated.key(model.tokenizer_directory), storage.cache, storage.prepared):
            continue
        limit = min(request.max_rows or _SAMPLE_ROWS, _SAMPLE_ROWS)
        sample = replace(request, max_rows=limit)
        summary = _prepare(key, sample, today, loaded, storage, model, progress).summary
        rows += sum(source.rows for source in summary.sources)
        if limit == _SAMPLE_ROWS != request.max_rows:
            has_more |= any(source.rows + summary.dropped_rows >= limit for source in summary.sources)
    return rows if has_more else 0


def _fingerprint_of(sets: Mapping[str, str]) -> str | None:
    """Return the fingerprint of all validation sets from their own by name, or None without validation rows."""
    prints = [f"{name} {fingerprint}" for name, fingerprint in sets.items()]
    if not prints:
        return None
    return prints[0].strip() if "" in sets else checksum_bytes(" ".join(prints).encode())


def _prepare_train_rows(
    loaded: LoadedConfig,
    storage: Storage,
    model: Model,
    progress: Progress,
    requests: Requests,
    name_of: Callable[[DataFingerprints], str],
) -> tuple[PreparedData, str | None]:
    """Tokenize the training rows. A chat template that prints the date prints that of the run to resume, if there is one.

    Args:
        loaded: The YAML.
        storage: Where the run writes.
        model: The model with its tokenizer.
        progress: Called with each check.
        requests: The requests for all rows.
        name_of: Returns the name of a run with these rows.

    Returns:
        The rows, and the date for the validation rows.
    """
    config = loaded.config
    key = _key_of("train", config)
    if requests.today:
        earlier = find_earlier_rows(
            config,
            storage.uri,
            loaded.path.stem,
            lambda rows: name_of(
                DataFingerprints(
                    train=rows.train,
                    valid=_fingerprint_of(dict(zip(config.valid_sets, rows.valid, strict=False))),
                )
            ),
        )
        if earlier:
            train = _prepare(key, requests.train, earlier.day, loaded, storage, model, progress)
            if train.summary.fingerprint == earlier.train:
                return train, earlier.day
            # the rows have changed since, and a new run prints today's date
    return _prepare(key, requests.train, requests.today, loaded, storage, model, progress), requests.today


def _request(
    part: Part,
    loaded: LoadedConfig,
    model: Model,
    name: str = "",
    files: tuple[DataFile, ...] | None = None,
) -> DataRequest:
    """Return the request for the rows of a part or of one validation set, after checking that they can be rendered.

    Args:
        part: The training rows or validation rows.
        loaded: The YAML.
        model: The model with its tokenizer.
        name: Name of the validation set, if it has one.
        files: The files of the sources; None: they are listed.
    """
    config = loaded.config
    with about_key(_key_of(part, config, name)):
        sources = _sources(part, config, name)
        files = files if files is not None else _files_of(sources)
        request = data_request(config, part, sources, files, model.facts, model.chat_template)
    check_template(request, model.tokenizer, model.tokenizer_source)
    written = _sources(part, loaded.as_written(config), name)
    return replace(request, paths=tuple(source.path for source in written))


def _files_of(sources: Sequence[DataSource]) -> tuple[DataFile, ...]:
    """Return the files of sources. Those in buckets are listed, local ones are read for their checksums."""
    return tuple(file for number, source in enumerate(sources) for file in find_files(source.path, number))


def _sources(part: Part, config: FinetuneConfig, name: str) -> Sequence[DataSource]:
    return config.train_sources if part == "train" else config.valid_sets[name]


def _key_of(part: Part, config: FinetuneConfig, name: str = "") -> str:
    """Return the YAML key that names the rows of a part."""
    key = "valid_path" if part == "valid" and config.valid_split is None else "train_path"
    return f"{key}.{name}" if name else key


def _prepare(
    key: str,
    request: DataRequest,
    day: str | None,
    loaded: LoadedConfig,
    storage: Storage,
    model: Model,
    progress: Progress,
) -> PreparedData:
    """Tokenize the rows of a key.

    Args:
        key: Key of the YAML that names the rows.
        request: The request for them.
        day: Date that the chat template prints; None: it prints none.
        loaded: The YAML.
        storage: Where the run writes.
        model: The model with its tokenizer.
        progress: Called with each check.
    """
    progress(f"rows of {key}")
    prepared = prepare_data(
        with_day(request, day, model.tokenizer, model.tokenizer_directory, storage.cache, storage.prepared),
        model.tokenizer,
        model.tokenizer_directory,
        storage.cache,
        bucket=storage.prepared,
        on_cluster=storage.on_cluster,
        template=describe_template(loaded.as_written(loaded.config), model.base),
        progress=lambda rows, fraction: progress(f"rows of {key}", fraction, f"{rows:,} rows"),
    )
    check_ids_of_rows(key, prepared.summary, model.tokenizer, model.facts)
    return prepared


def data_request(
    config: FinetuneConfig,
    part: Part,
    sources: Sequence[DataSource],
    files: tuple[DataFile, ...],
    facts: ModelFacts,
    chat_template: str | None,
) -> DataRequest:
    """Return the sources and their files with all settings that determine their tokens."""
    split = config.valid_split or 0.0
    return DataRequest(
        paths=tuple(source.path for source in sources),
        files=files,
        weights=tuple(source.weight for source in sources if source.weight is not None) or None,
        task=config.task,
        data_format=config.data_format,
        columns=tuple(sorted((str(ours), theirs) for ours, theirs in config.columns.items())),
        ignore_columns=tuple(sorted(config.ignore_columns)),
        prompt_template=config.prompt_template,
        chat_template=chat_template,
        chat_template_kwargs=tuple(sorted((config.chat_template_kwargs or {}).items())),
        turns=config.turns,
        labels=tuple(config.classifier_config.label_tokens) if config.classifier_config else (),
        unpaired=config.preference.takes_unpaired_rows,
        context_length=config.context_length,
        max_context=facts.max_context,
        long_rows=config.long_rows,
        bad_rows=config.bad_rows,
        seed=config.seed,
        new_tokens=config.added_tokens,
        share=(split, 1.0) if part == "train" else (0.0, split or 1.0),
        max_rows=config.max_train_rows if part == "train" else config.max_valid_rows,
    )


def _plan_batches(
    config: FinetuneConfig, settings: Settings, storage: Storage, model: Model, adapter: Adapter, data: Data
) -> Batch:
    """Resolve the batch size, then assign rows to steps."""
    train = data.train.summary
    if model.shape:
        longest = max(rows.summary.longest for rows in data.prepared)
        check_windows(model.attention, model.shape, longest, model.base)
    job = model.shape and Job(
        config=config,
        shape=model.shape,
        facts=model.facts,
        continued=model.adapter_facts.lora if model.adapter_facts else None,
        device=settings.device,
        longest=_longest_sequence(config, train),
        execution=settings.execution,
        traits=model.traits,
        attention=model.attention,
        parameters=adapter.parameters,
        unpaired=all(source.format != "preference" for source in train.sources),
    )
    reason = ""
    if config.train_batch_size_per_device == "auto":
        rows, reason = choose_batch_size(config, data.run_uri, storage.uri, job, settings.target)
        config = config.with_batch_size(rows)
        job = job and replace(job, config=config)
    check_batch(config, train.rows)
    padded_to = _longest_sequence(config, train) if config.padding == "max_length" else None
    reader = IndexReader(config, padded_to, storage.prepared, storage.scratch)
    figures = index_figures(reader, data.prepared, storage.on_cluster)
    return Batch(config, reason, job, figures, count_steps(config, figures.shape))


def _longest_sequence(config: FinetuneConfig, train: DataSummary) -> int:
    """Return the tokens of the longest training sequence, padding included."""
    filled = config.packing or config.padding == "max_length"
    return (config.context_length if filled else None) or train.longest


def count_steps(config: FinetuneConfig, shape: BatchShape) -> int:
    """Return the optimizer steps of the complete run."""
    epochs = config.number_of_epochs(shape.steps_per_epoch)
    if epochs is None:
        assert config.max_steps is not None
        return config.max_steps
    return math.ceil(epochs * shape.steps_per_epoch)


def _find_checkpoints(
    settings: Settings, batch: Batch, storage: Storage, data: Data, progress: Progress
) -> FoundCheckpoints:
    """Find the checkpoint to resume from; reject a configuration that differs from that of the checkpoint."""
    progress("earlier runs")
    recorded = batch.config.model_copy(update=data.recorded)
    own, damage = latest_of_the_same_run(
        recorded, settings.execution, data.run_uri, data.config_hash, data.fingerprints
    )
    completed = _completed(data.run_uri) if own else None
    parent_state = (
        None
        if completed
        else complete_state(
            batch.config, recorded, settings.execution, storage.uri, data.fingerprints, batch.max_steps
        )
    )
    return FoundCheckpoints(own, parent_state, completed, damage)


def _base_revision(model: Model, config: FinetuneConfig, checkpoints: FoundCheckpoints) -> str | None:
    """Return the commit of a base model on the Hub; for an adapter that is resumed, the one that it was trained on until then."""
    revision = hub_revision(model.base, model.directory)
    resumed = checkpoints.own_checkpoint or checkpoints.parent_state
    if revision and resumed and config.trains_adapter and not checkpoints.completed:
        return read_adapter_facts(resumed).base_revision or revision
    return revision


def _completed(run_uri: str) -> RunResult | None:
    """Return the result of a completed run, else None."""
    result = read_result(open_store(run_uri))
    return result if result and result.status == "completed" else None


def _flops(job: Job | None) -> RowFlops | None:
    if (
        job is None or job.config.task == "preference_tuning"
    ):  # a pair is two rows, and the reference model reads them too
        return None
    return row_flops(
        job.shape,
        job.facts.parameter_shapes,
        is_trained=lambda name: (
            not job.config.trains_adapter or is_fully_trained(job.config.lora_config, name)
        ),
        ranks=job.ranks,
    )


def _warnings(
    loaded: LoadedConfig,
    settings: Settings,
    storage: Storage,
    model: Model,
    adapter: Adapter,
    data: Data,
    batch: Batch,
    checkpoints: FoundCheckpoints,
    memory: MemoryReport | None,
    rows: DataReport,
) -> Iterator[str]:
    config, device, provider = batch.config, settings.device, settings.execution.kernels.provider
    yield from plan_warnings.model_warnings(config, model.facts, model.adapter_facts, provider)
    yield from plan_warnings.adapter_warnings(model.adapter, adapter.parameters)
    if config.lora_config and not model.adapter:
        yield from plan_warnings.exclusion_warnings(config.lora_config, model.meta)
    yield from plan_warnings.generation_warnings(model.facts.source, model.corrections)
    yield from plan_warnings.tensor_warnings(model.facts.source, model.unused_tensors)
    yield from plan_warnings.attention_warnings(config, model.facts, model.traits, model.attention, device)
    train, *others = (rows.summary.longest for rows in data.prepared)
    yield from plan_warnings.rope_warnings(
        config, model.facts.source, model.traits.rope_limit, train, max(others, default=0)
    )
    yield from plan_warnings.expert_warnings(config, model.facts, model.shape, device, provider)
    yield from plan_warnings.accelerator_warnings(config)
    if settings.target.is_local:
        has_bf16 = plan_warnings.cpu_has_bf16()
        yield from plan_warnings.dtype_warnings(config, model.facts, settings.device, has_bf16=has_bf16)
    yield from plan_warnings.gpu_dtype_warnings(config, accelerator_of(config, device, settings.target)[0])
    yield from plan_warnings.storage_warnings(config, storage.uri)
    yield from plan_warnings.learning_rate_warnings(loaded)
    yield from plan_warnings.schedule_warnings(config, batch.shape.steps_per_epoch, batch.max_steps)
    yield from plan_warnings.template_warnings(
        config, model.tokenizer, has_reasoning=data.train.summary.has_reasoning
    )
    yield from plan_warnings.tokenizer_warnings(model.tokenizer)
    yield from plan_warnings.column_warnings(config, data.train.summary)
    key = "valid_path" if config.valid_split is None else "valid_split"
    valid = data.valid.summary if data.valid else None
    yield from plan_warnings.data_warnings(data.train.summary, valid, key)
    for name, prepared in data.more_valid.items():
        yield from plan_warnings.row_warnings(f"valid_path.{name}", prepared.summary)
    yield from plan_warnings.length_warnings(config, batch.shape)
    for line in checkpoints.damage:
        yield f"skipped a damaged checkpoint of this run: {line}"
    yield from plan_warnings.memory_warnings(memory)
    yield from plan_warnings.overlap_warnings(rows)


def _report_rows(model: Model, data: Data, batch: Batch) -> DataReport:
    config = batch.config
    return make_report(
        data.train,
        data.valid,
        batch.figures,
        more_valid=data.more_valid,
        limit=config.context_length or model.facts.max_context,
        steps=batch.max_steps,
        valid_split=config.valid_split if config.max_train_rows == config.max_valid_rows else None,
    )


def _report(
    plan: RunPlan,
    storage: Storage,
    model: Model,
    adapter: Adapter,
    batch: Batch,
    checkpoints: FoundCheckpoints,
    memory: MemoryReport | None,
    rows: DataReport,
    warnings: list[str],
) -> PlanReport:
    config = plan.config
    return PlanReport(
        **dict(rows),
        run_name=plan.run_name,
        run_uri=plan.run_uri,
        storage="writable: an object was written, read and deleted" if is_remote(storage.uri) else "writable",
        model=config.model_id,
        architecture=model.facts.architecture,
        parameters=model.facts.parameters,
        trainable_parameters=adapter.trainable_parameters,
        mixture=describe_mixture(adapter.parameters, model.facts.parameter_shapes)
        if adapter.parameters
        else None,
        device=describe_device(config, plan.device, plan.resolved.target),
        kernels=f"{plan.resolved.kernels.provider} ({plan.resolved.kernels.reason})",
        parallelism=describe_parallelism(config, plan.resolved.zero_stage),
        batch=describe_batch(config, batch.reason),
        packing=describe_packing(config, rows.train, batch.shape) if config.packing else None,
        resumes_from=checkpoints.own_checkpoint,
        starts_from=plan.parent,
        tokenizer=model.tokenizer_source if model.tokenizer_source != model.base else None,
        memory=memory,
        completed=checkpoints.completed,
        warnings=warnings,
    )

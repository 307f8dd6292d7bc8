"""The worker function of Ray Train: prepare the inputs, build model and trainer, train, commit checkpoints."""

import json
import os
import pickle
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train

from configs.loading import flat, to_yaml
from runs.early_stopping import stopping_step
from runs.layout import CONFIG_FILE, METRICS_FILE, Lease, Manifest, metrics_lines, run_digest, samples_key
from training.checkpoints.committer import CheckpointCommitter, CommitContext
from training.checkpoints.resharding import reshard
from training.checkpoints.restore import Restoring
from training.checkpoints.store import CheckpointError
from training.checkpoints.weights import begin_fetch, fetch_model, verify_local_weights
from training.data.batches import BatchPlan, pad_to_multiple_of, padded_length
from training.data.prepared import PreparedData, fetch_prepared, verify_prepared
from training.events import CheckpointCommitted, Event, ModelReady, Phase, Restored
from training.loop.memory_errors import out_of_memory_line, shared_memory_message
from training.loop.offload_operators import load_offload_operators
from training.loop.saved_checkpoint import committed_event, describe_saved
from training.models import build_model
from training.models.files import check_weight_files, is_hub_id, is_model_file
from training.models.kernels import COLLECTIVE_BACKENDS, is_installed
from training.models.libraries import block_imports, set_environment, unused_packages
from training.models.new_tokens import add_tokens
from training.models.request import ModelRequest
from training.models.tokenizer import load_tokenizer
from training.planning.accelerators import peak_flops_of
from training.planning.paths import check_scratch
from training.planning.plan import RunPlan
from training.world import World, exclude_frozen_weights_from_sync
from utils.console import library_output_in
from utils.errors import AnnealError, first_line
from utils.files import FilesInUse, is_disk_full, nearest_existing
from utils.processes import importing
from utils.storage.bucket import Store, open_store

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]

    from training.loop.throughput import Throughput


class Driver:
    """A worker's connection to the driver's mailbox."""

    def __init__(self, mailbox: Any, world: World):
        self._mailbox = mailbox
        self._world = world
        # Only rank 0 waits for a request; it is broadcast to the others.
        self._request: Any = mailbox.wait_for_request.remote() if world.rank == 0 else None

    def emit(self, event: Event) -> None:
        """Send an event without waiting; only rank 0 sends events."""
        if self._world.rank == 0:
            self._mailbox.put.remote(event)

    def report(self, committed: CheckpointCommitted) -> None:
        """Report a committed checkpoint to the driver and to Ray Train; every rank calls it."""
        self.emit(committed)
        ray.train.report(asdict(committed) | {"speed": committed.speed.model_dump()})

    def has_request(self) -> bool:
        """Return whether rank 0 has received a request to stop or regroup; False on other ranks."""
        if self._request is None:
            return False
        answered, _ = ray.wait([self._request], timeout=0)
        return bool(answered)

    def requests_regroup(self) -> bool:
        """Return whether rank 0 has received a request to regroup with more workers; False on other ranks."""
        return self.has_request() and ray.get(self._request) == "regroup"

    def pause(self) -> None:
        """Notify Ray's controller from rank 0 that the workers have committed and can be terminated."""
        if self._world.rank == 0:
            ray.get(self._mailbox.pause.remote())

    def finish(self) -> None:
        """Emit the last phase from rank 0, and wait until the driver's mailbox has received all events."""
        if self._world.rank == 0:
            ray.get(self._mailbox.put.remote(Phase("ending")))

    def is_rejected(self) -> bool:
        """Return whether an earlier attempt reported an error that a restart cannot fix."""
        return ray.get(self._mailbox.is_rejected.remote())

    def reject(self, message: str) -> None:
        """Report an error that a restart cannot fix."""
        ray.get(self._mailbox.reject.remote(message))

    def fails_again(self, error: Exception) -> bool:
        """Report this rank's error; return whether it is the same as the last one, with no progress in between."""
        # The message of an out-of-memory error has free memory and process ids, which vary.
        text = "out of memory" if out_of_memory_line(error) else repr(error)
        return ray.get(self._mailbox.fails_again.remote(self._world.rank, text))


def train_worker(settings: dict[str, Any]) -> None:
    """Train as one worker; Ray Train calls it.

    Args:
        settings: `plan` (a RunPlan) and `lease` (a Lease) as dictionaries, and `mailbox`, the driver's EventMailbox.
    """
    plan = RunPlan.model_validate(settings["plan"]).on_this_node()
    lease = Lease.model_validate(settings["lease"])
    world = World.from_ray()
    driver = Driver(settings["mailbox"], world)
    if driver.is_rejected():
        return
    log = worker_log(plan, world.rank)
    try:
        check_scratch(log.parent)
        with library_output_in(log):
            _train_and_report(plan, lease, world, driver)
    except AnnealError as error:  # only the user can fix it
        driver.reject(str(error))
        raise


def _train_and_report(plan: RunPlan, lease: Lease, world: World, driver: Driver) -> None:
    """Train, and report an error that the driver cannot know to be final."""
    try:
        with importing():
            prepare_process(plan, world)
        _train(plan, lease, world, driver)
        if world.local_rank == 0:
            _remove_empty_scratch(plan, world)
        driver.finish()
    except AnnealError:
        raise
    except Exception as error:
        with suppress(OSError):  # the log file may be on a full disk, too
            traceback.print_exc()  # for the log file; Ray passes the exception to the driver
        if is_disk_full(error, nearest_existing(Path(plan.scratch))):
            driver.reject(
                f"{plan.scratch}: the disk of a worker is full ({first_line(error)}). Free some space, or set output_dir to a larger "
                "disk, and rerun the same command."
            )
        elif message := shared_memory_message(error):
            driver.reject(message)
        elif driver.fails_again(error):
            driver.reject(f"the same error twice, with no progress in between: {first_line(error)}")
        raise


def worker_log(plan: RunPlan, rank: int) -> Path:
    """Return the local log file for a worker's library output."""
    return Path(plan.scratch) / "logs" / plan.run_name / f"worker-{rank}.log"


def prepare_process(plan: RunPlan, world: World) -> None:
    """Set environment variables and initialize libraries on every rank, before training code is imported."""
    set_environment(deterministic=plan.config.deterministic)
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(_run_scratch(plan, world) / f"unsloth-{world.rank}")
    if plan.resolved.kernels.provider != "unsloth":  # it imports them itself
        block_imports(unused_packages(plan.config))
    if is_installed("wandb"):
        _import_wandb(_run_scratch(plan, world) / f"wandb-{world.rank}")
    if plan.resolved.kernels.provider == "unsloth":
        import unsloth  # noqa: F401  # before transformers, trl and peft, on every rank
    import torch

    if plan.config.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]  # no uninitialized memory is read
    if plan.device == "cpu":
        torch.set_num_threads(cpu_threads(plan.config.worker_resources.get("CPU"), world.local_world_size))
    if plan.deepspeed is not None:
        # Offloading compiles an optimizer with ninja, which is in the directory of this Python.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        import deepspeed
        import deepspeed.ops
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        # Plain classes that DeepSpeed's shards contain beside tensors.
        torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
        if plan.device == "cpu":
            # Compiling its shared-memory collectives with g++ takes two minutes; gloo works without.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        load_offload_operators(plan.deepspeed, plan.config.optim)
        deepspeed.init_distributed(dist_backend=COLLECTIVE_BACKENDS[plan.device], auto_mpi_discovery=False)


def cpu_threads(requested: float | None, local_world_size: int) -> int:
    """Return the number of threads of a worker that trains on the CPU.

    Args:
        requested: The worker's CPUs in `worker_resources`, which other workers and jobs of the node do not get; None: a share of
            all cores.
        local_world_size: Workers of this run on the node.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // local_world_size if requested is None else min(cores, int(requested)))


def _import_wandb(directory: Path) -> None:
    """Import wandb, as TRL does if it is installed, with the directories that it creates at import inside `directory`.

    They would stay in the machine's temporary directory, since Ray kills its workers.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(directory)
    try:
        import wandb  # noqa: F401
    finally:
        tempfile.tempdir = before


def _run_scratch(plan: RunPlan, world: World) -> Path:
    # Nodes may share the directory (home directories), and a node may train runs of the same name from two buckets.
    return Path(plan.scratch) / "runs" / plan.run_name / run_digest(plan.run_uri) / f"node-{world.node_rank}"


def _remove_empty_scratch(plan: RunPlan, world: World) -> None:
    """Remove the directories of this run on this node, up to the first that is not empty."""
    node = _run_scratch(plan, world)
    with suppress(OSError):
        for directory in (node / "trainer", node, *node.parents[:2]):
            directory.rmdir()


@dataclass(frozen=True)
class Inputs:
    """The verified inputs of a worker, on this node."""

    store: Store
    """Store of the run."""
    scratch: Path
    """Local directory of this run."""
    model_directory: Path
    mapped: FilesInUse
    """The files of weights that stay mapped while the run trains: frozen ones on CPU."""
    adapter_directory: Path | None
    tokenizer: "PreTrainedTokenizerFast"
    train: PreparedData
    valid: PreparedData | None
    more_valid: dict[str, PreparedData]
    """The validation sets after the first, by name."""
    resume: "Resume"


@dataclass(frozen=True)
class Resume:
    """The checkpoint from which this attempt resumes."""

    committed: list[Manifest]
    """The run's own checkpoints up to the one to resume from; empty on a first attempt."""
    uri: str | None
    """URI of the checkpoint to resume from, if any."""
    directory: Path | None
    """Local directory of that checkpoint."""
    manifest: Manifest | None
    """Manifest of that checkpoint."""
    step: int
    """Number of steps already trained."""
    log: list[dict[str, Any]]
    """The trainer's log of these steps."""


@dataclass(frozen=True)
class Built:
    """The model, its training arguments and the throughput counters."""

    model: Any
    request: ModelRequest
    arguments: "SFTConfig"
    order: BatchPlan
    throughput: "Throughput"


def _train(plan: RunPlan, lease: Lease, world: World, driver: Driver) -> None:
    inputs = _prepare_inputs(plan, lease, world, driver)
    built = _build(plan, inputs, world, driver)
    if inputs.resume.committed:
        driver.emit(Restored(committed_event(plan, inputs.resume.step, built.throughput)))
        # The previous attempt ended after its last checkpoint: the trainer would train another step.
        if inputs.resume.step >= min(plan.max_steps, _early_stop(plan, inputs.resume.log) or plan.max_steps):
            world.gather(None)  # every rank has read trainer_state.json
            if inputs.resume.directory and world.local_rank == 0:
                shutil.rmtree(inputs.resume.directory)
            return
    committer = CheckpointCommitter(
        CommitContext(
            inputs.store,
            lease,
            world,
            keep=plan.config.num_checkpoints_to_keep,
            describe=partial(describe_saved, plan, world, built.throughput),
            report=driver.report,
        ),
        inputs.resume.committed,
    )
    callbacks = _callbacks(plan, inputs, built, world, driver, committer)
    _run(plan, inputs, built, world, driver, committer, callbacks)


def _prepare_inputs(plan: RunPlan, lease: Lease, world: World, driver: Driver) -> Inputs:
    """Download model, rows and the checkpoint to resume from to this node, and verify them."""
    scratch = _run_scratch(plan, world)
    if world.local_rank == 0:
        _clear_trainer_files(scratch)
    store = open_store(plan.run_uri)
    # Every rank waits for the slowest node's download, which may exceed NCCL's timeout of 30 minutes.
    patient = world.with_long_timeout()
    # Both download in the background, unless the model is on the Hub.
    restoring = Restoring(store, lease, plan.restore_from, scratch / "trainer" / "restored", patient)
    finish_model = begin_fetch(plan.base_model, plan.cache, is_model_file, plan.base_revision)

    driver.emit(Phase("loading libraries"))
    with importing():
        import training.loop.callbacks
        import training.loop.throughput
        import training.loop.trainer_factory
        import training.loop.trainers  # noqa: F401

    driver.emit(Phase("fetching the prepared rows"))
    train, valid, more_valid = _fetch_rows(plan, world)

    driver.emit(Phase("syncing the model to the node"))
    model_directory = finish_model()
    check_weight_files(model_directory)
    adapter_directory = fetch_model(plan.adapter, plan.cache, is_model_file) if plan.adapter else None
    stays_mapped = plan.device == "cpu" and plan.config.trains_adapter
    mapped = FilesInUse(model_directory.glob("*.safetensors") if stays_mapped else ())
    if world.local_rank == 0:
        _verify_local_weights(plan, model_directory, adapter_directory)
    tokenizer = _load_tokenizer(plan, model_directory, adapter_directory)

    if restoring.committed or plan.restore_from:
        driver.emit(Phase("restoring the trainer state"))
    resume = _finish_restoring(restoring, driver)
    return Inputs(
        store,
        scratch,
        model_directory,
        mapped,
        adapter_directory,
        tokenizer,
        train,
        valid,
        more_valid,
        resume,
    )


def _clear_trainer_files(scratch: Path) -> None:
    """Remove what an earlier attempt has left in the directory of this run."""
    for leftover in ("trainer", "tracker"):
        shutil.rmtree(scratch / leftover, ignore_errors=True)
    (scratch / "trainer").mkdir(parents=True)


def _fetch_rows(
    plan: RunPlan, world: World
) -> tuple[PreparedData, PreparedData | None, dict[str, PreparedData]]:
    """Fetch the training rows, the first validation set and the others by name; verify them once per node."""
    train = fetch_prepared(plan.train, plan.cache, plan.prepared)
    valid = fetch_prepared(plan.valid, plan.cache, plan.prepared) if plan.valid else None
    more_valid = {
        name: fetch_prepared(key, plan.cache, plan.prepared) for name, key in plan.more_valid.items()
    }
    if world.local_rank == 0:
        for prepared in (train, valid, *more_valid.values()):
            if prepared:
                verify_prepared(prepared)
    return train, valid, more_valid


def _verify_local_weights(plan: RunPlan, model: Path, adapter: Path | None) -> None:
    """Verify the weights of a model and an adapter that the run reads where they are stored."""
    for start, directory in ((plan.base_model, model), (plan.adapter, adapter)):
        if start and directory and not is_hub_id(start):
            verify_local_weights(start, directory, is_model_file)


def _load_tokenizer(plan: RunPlan, model: Path, adapter: Path | None) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of the adapter or the model, with the run's chat template and new tokens."""
    own = adapter if plan.tokenizer == plan.adapter else None
    tokenizer = load_tokenizer(
        own or model,
        source=plan.tokenizer,
        trust_remote_code=plan.config.trust_remote_code,
        chat_template=plan.chat_template,
    )
    add_tokens(plan.config, tokenizer, plan.tokenizer)
    return tokenizer


def _finish_restoring(restoring: Restoring, driver: Driver) -> Resume:
    """Wait for the checkpoint to resume from, and read its progress."""
    restored = restoring.finish(driver.emit)
    step, log = _progress_of(restored) if restored else (0, [])
    return Resume(restoring.committed, restoring.uri, restored, restoring.manifest, step, log)


def _build(plan: RunPlan, inputs: Inputs, world: World, driver: Driver) -> Built:
    """Build the model, and the batch plan and counters, which depend on the number of workers."""
    from training.loop.throughput import GpuTimeline, HostTimeline, PhaseClock, Throughput
    from training.loop.trainers import trainer_arguments

    driver.emit(Phase("building the model"))
    train, valid, resume = inputs.train, inputs.valid, inputs.resume
    first_eval = plan.config.eval_first and valid is not None and resume.directory is None

    def make_arguments() -> "SFTConfig":
        return trainer_arguments(
            plan, inputs.scratch / "trainer", devices=world.world_size, eval_first=first_eval
        )

    # For ZeRO-3, transformers needs these arguments while it loads a model; Unsloth's CPU mode must load before they exist.
    arguments_later = plan.resolved.kernels.provider == "unsloth" and plan.device == "cpu"
    arguments = None if arguments_later else make_arguments()
    longest_valid = max(
        filter(None, (valid, *inputs.more_valid.values())),
        key=lambda rows: rows.summary.longest,
        default=None,
    )
    request = model_request(plan, inputs.model_directory, inputs.adapter_directory, train, longest_valid)
    attention = plan.resolved.attention
    if attention.sequence_parallel_size > 1:
        from training.models.sequence_parallel import join_group

        join_group(attention.sequence_parallel_size, attention.implementation)
    model = build_model(plan.resolved.kernels.provider, request)
    arguments = arguments or make_arguments()
    parameters = [(_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    trainable = sum(count for count, requires_grad in parameters if requires_grad)
    driver.emit(ModelReady(sum(count for count, _ in parameters), trainable))

    order = plan.order(train.index.length, train.summary.longest, world.world_size)
    throughput = Throughput(
        order,
        train.index.tokens.tolist(),
        train.index.trained_tokens.tolist(),
        clock=PhaseClock(GpuTimeline() if plan.device == "cuda" else HostTimeline()),
        flops=plan.flops,
        peak_flops=peak_flops(plan, world.world_size),
    )
    throughput.count_restored(resume.step)
    return Built(model, request, arguments, order, throughput)


def _callbacks(
    plan: RunPlan,
    inputs: Inputs,
    built: Built,
    world: World,
    driver: Driver,
    committer: CheckpointCommitter,
) -> "list[TrainerCallback]":
    """Return the callbacks that need no trainer, in calling order; `_run` adds the others after them."""
    from training.loop.callbacks import (
        AfterFirstStep,
        Committing,
        EarlyStopping,
        Gauges,
        LossWatchdog,
        NonFiniteLossCheck,
        Preempted,
        ProgressReporter,
        Recording,
        Schedule,
        Stopping,
        UnchangedWeights,
    )
    from training.loop.ray_internals import is_node_preempted

    callbacks: list[TrainerCallback] = [
        Schedule(plan.config, plan.steps_per_epoch, plan.max_steps, evaluates=inputs.valid is not None),
        Stopping(driver.has_request, world.broadcast),
    ]
    # A local cluster gets no preemption notices, and the callback broadcasts in every step.
    if not plan.resolved.target.is_local:
        callbacks.append(Preempted(is_node_preempted, world.broadcast))
    callbacks += [
        UnchangedWeights(inputs.mapped, committer.latest_checkpoint),
        Committing(committer.save, committer.check, built.throughput.clock),
        built.throughput,
        ProgressReporter(driver.emit),
    ]
    if world.rank == 0:
        callbacks += [Gauges(plan.run_name), *_tracking(plan, inputs, driver)]
    callbacks.append(
        NonFiniteLossCheck(
            lambda step: inputs.train.places(built.order.rows_of_step(step)), committer.latest_checkpoint
        )
    )
    config = plan.config
    if config.loss_watchdog_threshold is not None:
        callbacks.append(
            LossWatchdog(
                config.loss_watchdog_threshold, config.loss_watchdog_patience, committer.latest_checkpoint
            )
        )
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(config.early_stopping_patience, config.early_stopping_threshold))
    if world.rank == 0:
        callbacks.append(Recording(committer.record))
    restored = inputs.resume.directory
    if restored and world.local_rank == 0:
        # Free the disk after the first step: all ranks have loaded the checkpoint, since the step all-reduces gradients.
        callbacks.append(AfterFirstStep(partial(shutil.rmtree, restored)))
    return callbacks


def _run(
    plan: RunPlan,
    inputs: Inputs,
    built: Built,
    world: World,
    driver: Driver,
    committer: CheckpointCommitter,
    callbacks: "list[TrainerCallback]",
) -> None:
    """Train until the last step or a request to stop, and wait for the last commit."""
    from training.loop.callbacks import AfterFirstStep
    from training.loop.trainer_factory import build_trainer

    trainer = build_trainer(
        plan,
        built.order,
        inputs.train,
        inputs.valid,
        more_valid=inputs.more_valid,
        model=built.model,
        request=built.request,
        tokenizer=inputs.tokenizer,
        args=built.arguments,
        callbacks=callbacks,
        throughput=built.throughput,
        on_eval_progress=lambda fraction: driver.emit(Phase("evaluating", fraction)),
    )
    if built.request.is_lora:
        exclude_frozen_weights_from_sync(built.model)
    if plan.device == "cuda" and plan.deepspeed is None:
        # The optimizer states exist after the first step, so a GPU too small for the largest batch fails within a minute.
        trainer.add_callback(AfterFirstStep(trainer.run_largest_batch))
    if plan.config.eval_samples is not None:
        trainer.add_callback(_sampling(plan, inputs, built, world, driver, committer, trainer.accelerator))
    if world.rank == 0:
        inputs.store.write(CONFIG_FILE, to_yaml(plan.config).encode())
        # Remove steps that an earlier attempt recorded after the checkpoint that this attempt resumes from.
        inputs.store.write(METRICS_FILE, metrics_lines(inputs.resume.log).encode())
    trainer.before_loading = _resharding(plan, inputs.resume, world, driver)
    driver.emit(Phase("training"))
    restored = inputs.resume.directory
    with committer:
        try:
            trainer.train(resume_from_checkpoint=str(restored) if restored else None)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{inputs.resume.uri} contains pickled objects other than tensors and settings, which were not executed "
                f"({first_line(error)}). Check the source of this checkpoint."
            ) from error
        driver.emit(Phase("committing the last checkpoint"))
    stopped_early = trainer.state.global_step < plan.max_steps
    if stopped_early and world.broadcast(driver.requests_regroup()):
        driver.emit(Phase("restarting with more workers"))
        driver.pause()
        threading.Event().wait()  # Ray's controller terminates this process and restarts all workers from the checkpoint


def _sampling(
    plan: RunPlan,
    inputs: Inputs,
    built: Built,
    world: World,
    driver: Driver,
    committer: CheckpointCommitter,
    accelerator: Any,
) -> "TrainerCallback":
    from training.loop.samples import Sampling, choose_prompts
    from training.models.architecture import most_positions

    config = plan.config
    assert config.eval_samples is not None
    assert inputs.valid is not None
    prompts = choose_prompts(
        inputs.valid, config.eval_samples, config.seed, most_positions(built.model.config)
    )
    return Sampling(
        prompts,
        inputs.tokenizer,
        max_new_tokens=config.eval_max_new_tokens,
        world=world,
        autocast=accelerator.autocast,
        is_sharded=plan.resolved.zero_stage == 3,
        write=lambda step, text: committer.write(samples_key(step), text),
        on_progress=lambda fraction: driver.emit(Phase("generating samples", fraction)),
    )


def _resharding(
    plan: RunPlan, resume: Resume, world: World, driver: Driver
) -> "Callable[[DeepSpeedEngine], None] | None":
    """Return the conversion of the restored checkpoint to this number of workers, or None if it needs none."""
    manifest = resume.manifest
    if (
        manifest is None
        or resume.directory is None
        or plan.resolved.zero_stage == 0
        or manifest.world_size == world.world_size
    ):
        return None
    directory, uri = resume.directory, str(resume.uri)

    def convert(engine: "DeepSpeedEngine") -> None:
        saved_by, workers = manifest.world_size, world.world_size
        driver.emit(Phase(f"converting the checkpoint, which {saved_by} workers saved, for {workers}"))
        reshard(directory, uri, manifest, engine, world)
        driver.emit(Phase("training"))

    return convert


def _tracking(plan: RunPlan, inputs: Inputs, driver: Driver) -> "list[TrainerCallback]":
    from training.loop.trackers import TrackedRun, Tracking

    if plan.config.logger is None:
        return []
    run = TrackedRun(
        name=plan.run_name,
        store=inputs.store,
        parameters=flat(plan.config.model_dump(mode="json")),
        scratch=inputs.scratch / "tracker",
    )
    return [Tracking(plan.config.logger, run, driver.emit)]


def _early_stop(plan: RunPlan, log: list[dict[str, Any]]) -> int | None:
    """Return the step at which early stopping ended the run, if it did."""
    config = plan.config
    if config.early_stopping_patience is None:
        return None
    return stopping_step(log, config.early_stopping_patience, config.early_stopping_threshold)


def _progress_of(restored: Path) -> tuple[int, list[dict[str, Any]]]:
    """Return (number of trained steps, the trainer's log of them)."""
    state = json.loads((restored / "trainer_state.json").read_text())
    return state["global_step"], state["log_history"]


def model_request(
    plan: RunPlan,
    directory: Path,
    adapter_directory: Path | None,
    train: PreparedData,
    valid: PreparedData | None,
) -> ModelRequest:
    """Return the request to build the plan's model from local files."""
    config = plan.config
    longest = max(train.summary.longest, valid.summary.longest if valid else 0)
    multiple = pad_to_multiple_of(config, plan.device, train.summary.longest)
    return ModelRequest(
        directory=directory,
        adapter_directory=adapter_directory,
        lora=config.lora_config,
        new_tokens=plan.new_tokens,
        device=plan.device,
        weights_dtype=plan.resolved.weights_dtype,
        zero_stage=plan.resolved.zero_stage,
        load_in_4bit=config.load_in_4bit,
        attention=plan.resolved.attention,
        gradient_checkpointing=config.gradient_checkpointing,
        context_length=padded_length(config.context_length or longest, multiple),
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        deterministic=config.deterministic,
    )


def peak_flops(plan: RunPlan, devices: int) -> float | None:
    """Return the peak FLOPS of all devices, assuming that they equal this one; None if unknown."""
    if plan.device == "cpu" or plan.config.dtype != "bf16":
        return None
    import torch

    peak = peak_flops_of(torch.cuda.get_device_name())
    return peak * devices if peak else None


def _numel(parameter: Any) -> int:
    # Under ZeRO-3 a parameter is empty; DeepSpeed stores its full size in ds_numel.
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()

"""The life of one worker, top to bottom: sync -> model -> data -> train -> report. It runs inside a Ray Train worker."""

import json
import math
import os
import pickle
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train

from configs.loading import flat, to_yaml
from runs.layout import (
    CONFIG_FILE,
    METRICS_FILE,
    Claim,
    DataPosition,
    Manifest,
    checkpoint_uri,
    metrics_lines,
    run_digest,
)
from training import checkpoints
from training.accelerators import peak_flops_of
from training.checkpoints import CheckpointError
from training.commits import Commits, Saved
from training.data.batches import pad_to_multiple_of, padded_length
from training.data.prepared import PreparedData, fetch_prepared, verify_prepared
from training.events import CheckpointCommitted, Event, ModelReady, Phase, Restored
from training.models import ModelRequest, build_model
from training.models.files import fetch_model, first_line, is_hub_id, is_model_file
from training.models.tokenizer import load_tokenizer
from training.place import Place
from training.plan import RunPlan
from training.restoring import Restoring
from utils.bucket import Store, open_store
from utils.console import library_output_in
from utils.errors import AnnealError
from utils.processes import importing

if TYPE_CHECKING:
    from transformers import TrainerState
    from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]

    from training.speed import Throughput
    from training.trackers import Tracking

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "ray")


class _Question:
    """Asks once whether to stop, or to make room for more workers, and looks whether the answer has come."""

    def __init__(self, mailbox: Any):
        self._answer = mailbox.what_is_asked.remote()

    def is_answered(self) -> bool:
        answered, _ = ray.wait([self._answer], timeout=0)
        return bool(answered)

    def is_to_regroup(self) -> bool:
        return self.is_answered() and ray.get(self._answer) == "regroup"


def train_worker(settings: dict[str, Any]) -> None:
    """Ray Train's entry point: `plan` is a RunPlan and `claim` a Claim as dictionaries, `mailbox` the driver's EventMailbox."""
    plan = RunPlan.model_validate(settings["plan"]).on_this_node()
    claim = Claim.model_validate(settings["claim"])
    place = Place.of_ray()
    mailbox = settings["mailbox"]
    if ray.get(mailbox.is_refused.remote()):
        return  # an earlier attempt met what no restart mends

    def tell(event: Event) -> None:
        if place.rank == 0:
            mailbox.put.remote(event)

    with library_output_in(worker_log(plan, place.rank)):
        with importing():
            prepare_process(plan, place)
        try:
            _train(plan, claim, place, mailbox, tell)
            if place.rank == 0:
                ray.get(mailbox.put.remote(Phase("ending")))  # behind it, all that was told has arrived
        except AnnealError as error:  # a restart does not fix what a user has to fix
            ray.get(mailbox.refuse.remote(str(error)))
            raise
        except Exception as error:
            traceback.print_exc()  # for the log file; Ray carries the exception to the driver
            if ray.get(mailbox.fails_again.remote(place.rank, repr(error))):
                ray.get(
                    mailbox.refuse.remote(
                        f"the same error twice, without progress between: {first_line(error)}"
                    )
                )
            raise


def worker_log(plan: RunPlan, rank: int) -> Path:
    """Where a worker's library output goes, on its node."""
    return Path(plan.scratch) / "logs" / plan.run_name / f"worker-{rank}.log"


def package_versions() -> dict[str, str]:
    """What the run's outcome depends on."""
    return {package: version(package) for package in _PACKAGES}


def prepare_process(plan: RunPlan, place: Place) -> None:
    """What must be so before anything is imported that trains, on every rank."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # DeepSpeed unpickles its shards with whatever they execute; this overrides it for the whole process.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(_run_scratch(plan, place) / f"unsloth-{place.rank}")
    if plan.config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as torch.use_deterministic_algorithms asks
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # transformers hands it to the flash-attn package
        # torch.compile would choose some kernels by how fast they are now.
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    if plan.kernels.provider == "unsloth":
        import unsloth  # noqa: F401  # before transformers, trl and peft, on every rank
    import torch

    if plan.config.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]  # read is what was written
    if plan.device == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))
    if plan.deepspeed is not None:
        # Offloading compiles an optimizer: DeepSpeed asks for the program ninja, which its package brings beside this Python.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        import deepspeed
        import deepspeed.ops
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        # What its shards hold beside tensors: plain records.
        torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])
        if plan.device == "cpu":
            # Its shared-memory collectives would be compiled with g++ for two minutes; gloo serves.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="gloo" if plan.device == "cpu" else "nccl", auto_mpi_discovery=False
        )


def _run_scratch(plan: RunPlan, place: Place) -> Path:
    # Nodes may share the directory, as home directories often are, and runs of one name in two places share a node.
    return Path(plan.scratch) / "runs" / plan.run_name / run_digest(plan.run_uri) / f"node-{place.node_rank}"


def _train(plan: RunPlan, claim: Claim, place: Place, mailbox: Any, tell: Callable[[Event], None]) -> None:
    config = plan.config
    scratch = _run_scratch(plan, place)
    if place.local_rank == 0:
        for leftover in ("trainer", "tracker"):
            shutil.rmtree(scratch / leftover, ignore_errors=True)
        (scratch / "trainer").mkdir(parents=True)
    store = open_store(plan.run_uri)
    # Each waits for the last to have its files, which may take longer than the half hour that NCCL waits.
    patient = place.patient()
    restoring = Restoring(store, claim, plan.restore_from, scratch / "trainer" / "restored", patient)

    tell(Phase("loading libraries"))
    with importing():
        from training.callbacks import (
            AfterFirstStep,
            Committing,
            Diverging,
            Gauges,
            Preempted,
            Recording,
            Schedule,
            Stopping,
            Telling,
        )
        from training.objectives import build_trainer
        from training.speed import GpuTimeline, HostTimeline, PhaseClock, Throughput
        from training.trainers import trainer_arguments

    tell(Phase("syncing the model to the node"))
    model_directory = fetch_model(plan.base_model, plan.cache, is_model_file)
    adapter_directory = (
        checkpoints.fetch_weights(plan.adapter, plan.cache, is_model_file) if plan.adapter else None
    )
    if place.local_rank == 0:
        for start, directory in ((plan.base_model, model_directory), (plan.adapter, adapter_directory)):
            if start and directory and not is_hub_id(start):
                checkpoints.verify_local_weights(start, directory, is_model_file)
    tokenizer = load_tokenizer(
        model_directory,
        source=plan.base_model,
        trust_remote_code=config.trust_remote_code,
        chat_template=plan.chat_template,
    )

    tell(Phase("fetching the prepared rows"))
    train = fetch_prepared(plan.train, plan.cache, plan.prepared)
    valid = fetch_prepared(plan.valid, plan.cache, plan.prepared) if plan.valid else None
    if place.local_rank == 0:
        for prepared in (train, valid):
            if prepared:
                verify_prepared(prepared)

    if restoring.committed or plan.restore_from:
        tell(Phase("restoring the trainer state"))
    restored = restoring.finish(tell)

    tell(Phase("building the model"))
    first_eval = config.eval_first and valid is not None and restored is None
    # transformers looks at these arguments while it loads a model (ZeRO-3); Unsloth's CPU mode must not find them yet.
    arguments_later = plan.kernels.provider == "unsloth" and plan.device == "cpu"

    def make_arguments() -> "SFTConfig":
        return trainer_arguments(plan, scratch / "trainer", devices=place.world_size, eval_first=first_eval)

    arguments = None if arguments_later else make_arguments()
    request = model_request(plan, model_directory, adapter_directory, train, valid)
    model = build_model(plan.kernels.provider, request)
    arguments = arguments or make_arguments()
    parameters = [(_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    trainable = sum(count for count, requires_grad in parameters if requires_grad)
    tell(ModelReady(sum(count for count, _ in parameters), trainable))

    order = plan.order(train.index.length, train.summary.longest, place.world_size)
    throughput = Throughput(
        order,
        train.index.tokens.tolist(),
        train.index.trained_tokens.tolist(),
        clock=PhaseClock(GpuTimeline() if plan.device == "cuda" else HostTimeline()),
        flops=plan.flops,
        peak_flops=peak_flops(plan, place.world_size),
    )

    done, log = _progress_of(restored) if restored else (0, [])
    throughput.count_restored(done)
    if restoring.committed:
        tell(Restored(_committed(plan, done, throughput)))
        # An attempt ended behind its last checkpoint: the loop would train another step.
        if done >= plan.max_steps:
            place.gather(None)  # every rank has read how far it came
            if restored and place.local_rank == 0:
                shutil.rmtree(restored)
            return

    def on_commit(committed: CheckpointCommitted) -> None:
        tell(committed)
        ray.train.report(asdict(committed) | {"speed": committed.speed.model_dump()})

    question = _Question(mailbox) if place.rank == 0 else None
    commits = Commits(
        store, claim, place, restoring.committed, keep=config.num_checkpoints_to_keep, on_commit=on_commit
    )
    trainer = build_trainer(
        plan,
        order,
        train,
        valid,
        model=model,
        request=request,
        tokenizer=tokenizer,
        args=arguments,
        callbacks=[
            Schedule(
                config.checkpoint_and_evaluation_frequency, plan.steps_per_epoch, evaluates=valid is not None
            ),
            Stopping(question.is_answered if question else lambda: False, place.of_rank_0),
            *([Preempted(_is_preempted, place.of_rank_0)] if _preemption_is_watched() else []),
            Committing(
                lambda directory, state: commits.start(_saved(plan, place, throughput, directory, state)),
                commits.check,
                throughput.clock,
            ),
            throughput,
            Telling(tell),
            *([Gauges(plan.run_name), *_tracking(plan, place, store, tell)] if place.rank == 0 else []),
            Diverging(
                lambda step: train.places(order.rows_of_step(step)),
                lambda: commits.newest_checkpoint,
            ),
            *([Recording(commits.record)] if place.rank == 0 else []),
            # Every rank has loaded it then: none gets there without the others' gradients. It would fill the disk a second time.
            *(
                [AfterFirstStep(lambda: shutil.rmtree(restored))]
                if restored and place.local_rank == 0
                else []
            ),
        ],
        throughput=throughput,
        on_eval_progress=lambda fraction: tell(Phase("evaluating", fraction)),
    )
    if plan.device == "cuda" and plan.deepspeed is None:
        # When the optimizer's states lie in memory: a GPU that is too small for the largest batch shows in the first minute.
        trainer.add_callback(AfterFirstStep(trainer.rehearse))
    if place.rank == 0:
        store.write(CONFIG_FILE, to_yaml(config).encode())
        # What another attempt recorded behind the step that this one begins at, it did not train.
        store.write(METRICS_FILE, metrics_lines(log).encode())
    tell(Phase("training"))
    with commits:
        try:
            trainer.train(resume_from_checkpoint=str(restored) if restored else None)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{restoring.uri} holds more than tensors and settings, and nothing in it was executed "
                f"({first_line(error)}). Look where it comes from."
            ) from error
        tell(Phase("committing the last checkpoint"))
    stopped_early = trainer.state.global_step < plan.max_steps
    if stopped_early and place.of_rank_0(question is not None and question.is_to_regroup()):
        tell(Phase("making room for more workers"))
        if place.rank == 0:
            ray.get(mailbox.rest.remote())
        threading.Event().wait()  # Ray's controller ends this process, and starts all of them from the checkpoint


def _tracking(plan: RunPlan, place: Place, store: Store, tell: Callable[[Event], None]) -> "list[Tracking]":
    from training.trackers import TrackedRun, Tracking

    if plan.config.logger is None:
        return []
    run = TrackedRun(
        name=plan.run_name,
        store=store,
        parameters=flat(plan.config.model_dump(mode="json")),
        scratch=_run_scratch(plan, place) / "tracker",
    )
    return [Tracking(plan.config.logger, run, tell)]


def _preemption_is_watched() -> bool:
    # Ray hands the driver's setting to its workers; sharing the answer costs a message between them in every step.
    return os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") == "1"


def _is_preempted() -> bool:
    # ray.train.get_preemption_info waits for all workers at the barrier where ray.train.report, from the thread that commits, waits
    # as well; Ray lets a worker of the one and a worker of the other pass together, and the others wait for ever.
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def model_request(
    plan: RunPlan,
    directory: Path,
    adapter_directory: Path | None,
    train: PreparedData,
    valid: PreparedData | None,
) -> ModelRequest:
    """The plan's model, from files on this node."""
    config = plan.config
    longest = max(train.summary.longest, valid.summary.longest if valid else 0)
    multiple = pad_to_multiple_of(config, plan.device, train.summary.longest)
    return ModelRequest(
        directory=directory,
        adapter_directory=adapter_directory,
        lora=config.lora_config,
        device=plan.device,
        dtype=config.dtype,
        weights_dtype=plan.resolved.weights_dtype,
        zero_stage=plan.resolved.zero_stage,
        load_in_4bit=config.load_in_4bit,
        flash_attention_2=config.flash_attention_2,
        packing=config.packing,
        gradient_checkpointing=config.gradient_checkpointing,
        context_length=padded_length(config.context_length or longest, multiple),
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        deterministic=config.deterministic,
    )


def peak_flops(plan: RunPlan, devices: int) -> float | None:
    """What all devices can do in a second, taken to be like this one; None where that is not known."""
    if plan.device == "cpu" or plan.config.dtype != "bf16":
        return None
    import torch

    peak = peak_flops_of(torch.cuda.get_device_name())
    return peak * devices if peak else None


def _numel(parameter: Any) -> int:
    # Under ZeRO-3 a parameter holds nothing itself; DeepSpeed keeps its real size.
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def _saved(
    plan: RunPlan, place: Place, throughput: "Throughput", directory: Path, state: "TrainerState"
) -> Saved:
    """What is known of a checkpoint at the moment at which it was saved."""
    step, epoch = state.global_step, state.epoch or 0.0
    eval_loss = next(
        (entry["eval_loss"] for entry in state.log_history if entry["step"] == step and "eval_loss" in entry),
        None,
    )
    manifest = Manifest(
        step=step,
        epoch=epoch,
        eval_loss=eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None,
        world_size=place.world_size,
        zero_stage=plan.resolved.zero_stage,
        config_hash=plan.config_hash,
        data=plan.data,
        data_position=DataPosition(
            epoch=step // plan.steps_per_epoch,
            steps_in_epoch=step % plan.steps_per_epoch,
            rows_seen=throughput.trained.rows,
        ),
        parent=plan.parent,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=package_versions(),
        files=[],
    )
    return Saved(directory, manifest, metrics_lines(state.log_history), _committed(plan, step, throughput))


def _progress_of(restored: Path) -> tuple[int, list[dict[str, Any]]]:
    """(steps done, what the trainer has logged in them)."""
    state = json.loads((restored / "trainer_state.json").read_text())
    return state["global_step"], state["log_history"]


def _committed(plan: RunPlan, step: int, throughput: "Throughput") -> CheckpointCommitted:
    return CheckpointCommitted(
        step=step,
        uri=checkpoint_uri(plan.run_uri, step),
        tokens=throughput.trained.tokens,
        trained_tokens=throughput.trained.trained_tokens,
        speed=throughput.speed(),
    )

"""A killed run, sent again with the same command, ends as one that was never interrupted, to the last bit.

`make test` takes a sample of the grid, `make test-resume` all of it (RESUME_GRID=1).
"""

import hashlib
import json
import os
import secrets
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from runs.layout import MANIFEST_FILE, checkpoint_key
from runs.reading import committed
from tests.conftest import KILLS
from tests.support.bucket_proxy import Trap, bucket_proxy
from tests.support.faults import injection
from tests.support.jobs import Job, started, write_yaml
from tests.support.own_buckets import reach_as_a_user
from tests.support.tiny_model import make_model, write_data, write_pairs_of
from training.data.batches import PADDING_ROW
from utils.storage.bucket import join_uri, open_store, sync_to_node
from utils.storage.embedded_bucket import EmbeddedBucket

pytestmark = pytest.mark.timeout(900)

# 5 steps of 8 rows and one of 3: with two workers the second has nothing but padding at the end of an epoch.
ROWS, ROWS_PER_STEP, STEPS_PER_EPOCH, EPOCHS, INTERVAL = 43, 8, 6, 2, 2
STEPS = EPOCHS * STEPS_PER_EPOCH
PACKED_TOKENS = 60
KEYS: dict[str, dict[str, Any]] = {
    "train": {},
    "packed": {"packing": True, "context_length": PACKED_TOKENS},
    "pairs": {"task": "preference_tuning"},
}
DROPOUT = 0.1
LORA = {"r": 4, "lora_dropout": DROPOUT}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_config": LORA},
    # Matrices large enough for an 8-bit optimizer to hold them in 8 bits.
    "qlora": {"lora_config": LORA | {"r": 64}, "load_in_4bit": True, "optim": "adamw_8bit"},
    "bf16": {"lora_config": LORA, "dtype": "bf16"},
}
FIGURES = ("step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate")


class Kill(StrEnum):
    """Where a run is killed; in this order they fit into one epoch."""

    BEFORE_MANIFEST = "before_manifest"
    AFTER_MANIFEST = "after_manifest"
    AFTER_STEP = "after_step"
    MID_SAVE = "mid_save"
    MID_UPLOAD = "mid_upload"


STEP_IN_EPOCH = {
    Kill.BEFORE_MANIFEST: 2,
    Kill.AFTER_MANIFEST: 2,
    Kill.AFTER_STEP: 3,
    Kill.MID_SAVE: 4,
    Kill.MID_UPLOAD: 6,
}


@dataclass(frozen=True)
class Shape:
    """How a run trains."""

    method: str
    accumulation: int
    workers: int
    parallelism: str
    rows: str = "train"
    """The file that it trains on; see KEYS."""

    def __str__(self) -> str:
        return f"{self.method}-accumulation_{self.accumulation}-workers_{self.workers}-{self.parallelism}-{self.rows}"

    @property
    def model_file(self) -> str:
        """The checkpoint's weights."""
        return "model.safetensors" if self.method == "full" else "adapter_model.safetensors"


@dataclass(frozen=True)
class Chain:
    """One run that is killed at each of these places in an epoch, and sent again after each."""

    shape: Shape
    epoch: int
    kills: tuple[Kill, ...]

    def __str__(self) -> str:
        return f"{self.shape}-epoch_{self.epoch}"


GRID = [
    Chain(Shape(method, accumulation, workers, parallelism), epoch, tuple(Kill))
    for method, accumulation, workers, parallelism, epoch in product(
        ("lora", "full"), (1, 4), (1, 2), ("ddp", "zero_2"), (1, 2)
    )
] + [
    Chain(Shape("qlora", 1, 1, "ddp"), 1, tuple(Kill)),
    Chain(Shape("qlora", 4, 2, "ddp"), 2, tuple(Kill)),
    Chain(Shape("bf16", 1, 2, "ddp"), 2, tuple(Kill)),
    Chain(Shape("lora", 4, 2, "ddp", "packed"), 2, tuple(Kill)),
    Chain(Shape("lora", 1, 2, "ddp", "pairs"), 2, tuple(Kill)),
    Chain(Shape("full", 4, 2, "zero_2", "pairs"), 1, tuple(Kill)),
]
FAST = Chain(Shape("lora", 1, 1, "ddp"), 2, (Kill.AFTER_STEP,))
"""The one chain that is not marked slow."""
SAMPLE = [
    FAST,
    Chain(Shape("full", 4, 2, "zero_2"), 2, (Kill.BEFORE_MANIFEST, Kill.AFTER_MANIFEST)),
    Chain(Shape("lora", 4, 2, "ddp", "packed"), 2, (Kill.AFTER_STEP, Kill.MID_SAVE, Kill.MID_UPLOAD)),
]
CHAINS = GRID if os.environ.get("RESUME_GRID") else SAMPLE
SABOTAGED = Shape("lora", 1, 1, "ddp")


@dataclass(frozen=True, order=True)
class Taken:
    """A row, or a pack of rows, that a worker took for an optimizer step."""

    step: int
    rank: int
    row: int


@dataclass(frozen=True)
class End:
    """What a finished run is compared by."""

    figures: list[dict[str, float]]
    weights: dict[str, str]
    optimizer: dict[str, str]
    settings: dict[str, str]
    ledger: list[Taken]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and one model for adapters and one with dropout of its own for full-parameter training."""
    directory = tmp_path_factory.mktemp("resume")
    make_model(directory / "model")
    shutil.copytree(directory / "model", directory / "model-with-dropout")
    config = directory / "model-with-dropout" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": DROPOUT}))
    write_data(directory, train_rows=ROWS, valid_rows=3)
    train_pairs, _ = write_pairs_of(directory, train_rows=ROWS, valid_rows=3)
    train_pairs.rename(directory / "pairs.jsonl")
    _write_rows_of_a_length(directory / "packed.jsonl", directory / "model")
    return directory


def _write_rows_of_a_length(path: Path, model: Path) -> None:
    """Rows of which any two fill a sequence of PACKED_TOKENS, and no three: ROWS sequences."""
    sums = [(10 + row, 99 - row) for row in range(2 * ROWS)]
    chats = [
        [
            {"role": "user", "content": f"What is {one} + {other}?"},
            {"role": "assistant", "content": f"It is {one + other}."},
        ]
        for one, other in sums
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer.apply_chat_template(chat, return_dict=False)) for chat in chats]
    assert 2 * max(lengths) <= PACKED_TOKENS < 3 * min(lengths)


@pytest.fixture(scope="module")
def storage(bucket: EmbeddedBucket) -> Iterator[str]:
    """A bucket reached as a user's own is, so that a proxy can stand before it."""
    with pytest.MonkeyPatch.context() as patch:
        yield reach_as_a_user(patch, bucket, f"resume-{secrets.token_hex(6)}")


class Run:
    """A run of one name, and its attempts so far."""

    def __init__(self, files: Path, storage: str, name: str, shape: Shape):
        self.shape = shape
        self.place = files / "attempts" / name
        self.place.mkdir(parents=True)
        self.scratch = files / "scratch"
        self.uri = join_uri(storage, name)
        self.name = name
        self.ledgers: list[list[Taken]] = []
        self.config = write_yaml(
            self.place / "run.yaml",
            {
                "model_id": str(files / ("model-with-dropout" if shape.method == "full" else "model")),
                "train_path": str(files / f"{shape.rows}.jsonl"),
                "valid_path": str(files / ("valid-pairs.jsonl" if shape.rows == "pairs" else "valid.jsonl")),
                "storage_path": storage,
                "run_name": name,
                "output_dir": str(self.scratch),
                "device": "cpu",
                "dtype": "fp32",
                "num_devices": shape.workers,
                "train_batch_size_per_device": ROWS_PER_STEP // shape.accumulation // shape.workers,
                "gradient_accumulation_steps": shape.accumulation,
                "num_epochs": EPOCHS,
                "learning_rate": 1e-2,
                "gradient_checkpointing": False,
                "max_failures": 0,
                "num_checkpoints_to_keep": 1,
                "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": INTERVAL},
            }
            | METHODS[shape.method]
            | ({"deepspeed": shape.parallelism} if shape.parallelism != "ddp" else {})
            | KEYS[shape.rows],
        )

    @property
    def committed_step(self) -> int:
        """Of the latest checkpoint, 0 when there is none."""
        manifests = committed(open_store(self.uri))
        return manifests[-1].step if manifests else 0

    def finish(self, *, sabotage: str = "") -> End:
        """Send it, and let it train to its end."""
        ledger = self._next_ledger()
        with started(self.config, injection(ledger, sabotage=sabotage)) as job:
            finished = job.end()
        assert finished.exit_code == 0, finished.errors
        assert finished.result["train_steps"] == STEPS
        self.ledgers.append(read_ledger(ledger))
        return self._end(finished.result["last_checkpoint"])

    def kill(self, kill: Kill, step: int, endpoint: str) -> None:
        """Send it, and kill it with all that it started at one step."""
        checkpoint = checkpoint_key(step)
        traps = {
            Kill.MID_UPLOAD: Trap("midway", checkpoint + self.shape.model_file),
            Kill.BEFORE_MANIFEST: Trap("before", checkpoint + MANIFEST_FILE),
            Kill.AFTER_MANIFEST: Trap("after", checkpoint + MANIFEST_FILE),
        }
        # Steps and saves last milliseconds here: where it would have gone on, it is held until the kill comes.
        holds = {Kill.AFTER_STEP: f"after_step:{step}", Kill.MID_SAVE: f"in_save:{step}"}
        ledger, trap = self._next_ledger(), traps.get(kill)
        with ExitStack() as stack:
            proxy = stack.enter_context(bucket_proxy(endpoint, trap=trap)).endpoint
            variables = injection(ledger, hold=holds.get(kill, "")) | {"AWS_ENDPOINT_URL_S3": proxy}
            job = stack.enter_context(started(self.config, variables))
            self._wait_for(kill, step, job, trap)
            job.kill_all()
        if kill is Kill.MID_SAVE:
            (directory,) = self._saved(step)
            saved = {path.name for path in directory.iterdir()}
            assert "trainer_state.json" not in saved, "the save was done"
        self.ledgers.append(read_ledger(ledger))

    def stop(self, step: int) -> int:
        """Send it, and SIGTERM main.py once a step is seen; returns the step of the last checkpoint."""
        assert step % INTERVAL != 0, "with nothing uncommitted, a run stops at once"
        ledger = self._next_ledger()
        # Else these steps of milliseconds would be over before the signal comes.
        with started(self.config, injection(ledger, hold=f"in_step_until_stop:{step + 1}")) as job:
            job.wait_for_line(f"step {step}/")
            job.process.send_signal(signal.SIGTERM)
            finished = job.end()
        assert finished.exit_code == 128 + signal.SIGTERM, finished.errors
        self.ledgers.append(read_ledger(ledger))
        return finished.result["train_steps"]

    def _wait_for(self, kill: Kill, step: int, job: Job, trap: Trap | None) -> None:
        if trap:
            job.wait_until(trap.sprung.is_set, f"{kill} at step {step}")
        elif kill is Kill.MID_SAVE:
            job.wait_until(lambda: bool(self._saved(step)), f"{kill} at step {step}")
        else:
            job.wait_for_line(f"step {step}/")
        if not trap:
            # Steps of milliseconds leave the checkpoint before on its way, which would be lost as well.
            due = (step - 1 if kill is Kill.MID_SAVE else step) // INTERVAL * INTERVAL
            job.wait_until(lambda: self.committed_step >= due, f"the checkpoint of step {due}")

    def _saved(self, step: int) -> list[Path]:
        return list((self.scratch / "runs" / self.name).glob(f"*/node-0/trainer/checkpoint-{step}"))

    def _next_ledger(self) -> Path:
        return self.place / f"ledger-{len(self.ledgers)}"

    def _end(self, checkpoint: str) -> End:
        copy = sync_to_node(checkpoint, self.place / "last")
        lines = open_store(self.uri).read("metrics.jsonl").decode().splitlines()
        return End(
            [{name: line[name] for name in FIGURES if name in line} for line in map(json.loads, lines)],
            digests(load_file(copy / self.shape.model_file)),
            digests(optimizer_state(copy)),
            settings_in(copy),
            trained(self.ledgers),
        )


def optimizer_state(checkpoint: Path) -> dict[str, Any]:
    """Everything the optimizer and the schedule saved: one file of each, or DeepSpeed's, one for each rank."""
    paths = [
        path
        for path in sorted(checkpoint.rglob("*.pt"))
        if path.name in ("optimizer.pt", "scheduler.pt") or path.name.endswith("_optim_states.pt")
    ]
    assert any("optim" in path.name for path in paths)
    # DeepSpeed pickles objects of its own; the file is one that we have just written.
    return {
        str(path.relative_to(checkpoint)): torch.load(path, map_location="cpu", weights_only=False)
        for path in paths
    }


def settings_in(checkpoint: Path) -> dict[str, str]:
    """The files of settings beside the weights, to the letter: all but those that tell when, and how fast."""
    timed = (MANIFEST_FILE, "trainer_state.json")
    return {path.name: path.read_text() for path in checkpoint.glob("*.json") if path.name not in timed}


def digests(state: Any, name: str = "") -> dict[str, str]:
    """The sha256 of every tensor and number in nested state, by its path."""
    if isinstance(state, Mapping | list | tuple):
        parts = state.items() if isinstance(state, Mapping) else enumerate(state)
        return {
            key: value for part, inner in parts for key, value in digests(inner, f"{name}/{part}").items()
        }
    if isinstance(state, torch.Tensor):
        content = state.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return {name: hashlib.sha256(f"{state.dtype} {tuple(state.shape)} ".encode() + content).hexdigest()}
    if isinstance(state, int | float):
        return {name: hashlib.sha256(repr(state).encode()).hexdigest()}
    return {}


def read_ledger(directory: Path) -> list[Taken]:
    """What the workers of one attempt took."""
    lines = [line for path in directory.iterdir() for line in path.read_text().splitlines()]
    return [Taken(*map(int, line.split())) for line in lines]


def first_step(ledger: Sequence[Taken]) -> int:
    """The step with which an attempt began."""
    return min(taken.step for taken in ledger)


def trained(ledgers: Sequence[Sequence[Taken]]) -> list[Taken]:
    """What is in the weights: of each attempt, its steps before those of the next one that trained."""
    kept: list[Taken] = []
    for ledger in ledgers:
        if ledger:
            kept = [taken for taken in kept if taken.step < first_step(ledger)] + list(ledger)
    return sorted(kept)


def wrong_rows(ledger: Sequence[Taken]) -> list[str]:
    """Rows that an epoch took not once, over all workers."""
    wrong = []
    for epoch in range(EPOCHS):
        counts = Counter(
            taken.row
            for taken in ledger
            if (taken.step - 1) // STEPS_PER_EPOCH == epoch and taken.row != PADDING_ROW
        )
        wrong += [
            f"epoch {epoch + 1}: row {row} {counts[row]} times"
            for row in sorted(counts.keys() | set(range(ROWS)))
            if counts[row] != (1 if row in range(ROWS) else 0)
        ]
    return wrong


def differences(end: End, reference: End) -> list[str]:
    """In what a run's end is not the other's."""
    pairs = {
        "figures": (end.figures, reference.figures),
        "weights": (end.weights, reference.weights),
        "optimizer": (end.optimizer, reference.optimizer),
        "settings": (end.settings, reference.settings),
        "rows": (end.ledger, reference.ledger),
    }
    return [name for name, (one, other) in pairs.items() if one != other]


class References:
    """Each shape's run that nobody interrupts, made once."""

    def __init__(self, files: Path, storage: str):
        self._files = files
        self._storage = storage
        self._ends: dict[Shape, End] = {}

    def __getitem__(self, shape: Shape) -> End:
        if shape not in self._ends:
            end = Run(self._files, self._storage, f"{shape}-reference", shape).finish()
            losses = [line["loss"] for line in end.figures if "loss" in line]
            assert len(losses) == STEPS
            assert {taken.rank for taken in end.ledger} == set(range(shape.workers))
            assert wrong_rows(end.ledger) == []
            self._ends[shape] = end
        return self._ends[shape]


@pytest.fixture(scope="module")
def references(files: Path, storage: str) -> References:
    return References(files, storage)


@pytest.mark.parametrize(
    "chain",
    [pytest.param(chain, marks=[] if chain == FAST else pytest.mark.slow) for chain in CHAINS],
    ids=str,
)
def test_a_killed_run_ends_as_if_it_was_not(
    chain: Chain,
    files: Path,
    storage: str,
    bucket: EmbeddedBucket,
    references: References,
    record_property: Callable[[str, object], None],
):
    """Equal weights, optimizer and figures; each row once an epoch; no kill costs more than an interval."""
    run = Run(files, storage, str(chain), chain.shape)
    for kill in chain.kills:
        restored = run.committed_step
        step = (chain.epoch - 1) * STEPS_PER_EPOCH + STEP_IN_EPOCH[kill]
        run.kill(kill, step, bucket.endpoint)
        assert first_step(run.ledgers[-1]) == restored + 1
        whole_intervals = step - step % INTERVAL
        lost = INTERVAL if kill in (Kill.MID_SAVE, Kill.MID_UPLOAD, Kill.BEFORE_MANIFEST) else 0
        assert run.committed_step == whole_intervals - lost
        assert run.committed_step >= step - INTERVAL
    restored = run.committed_step
    end = run.finish()
    assert first_step(run.ledgers[-1]) == restored + 1
    assert differences(end, references[chain.shape]) == []
    assert wrong_rows(end.ledger) == []
    record_property(KILLS, len(chain.kills))


@pytest.fixture(scope="module")
def stopped(files: Path) -> tuple[Run, int, int]:
    """A run stopped by SIGTERM in the middle of its second epoch: (run, step seen, step of its last checkpoint)."""
    run = Run(files, str(files / "stopped"), "stopped", SABOTAGED)
    seen = STEPS_PER_EPOCH + INTERVAL + 1
    return run, seen, run.stop(seen)


def copy_of(stopped: Run, files: Path, name: str) -> Run:
    """The stopped run once more, elsewhere."""
    run = Run(files, str(files / "stopped"), name, stopped.shape)
    shutil.copytree(stopped.uri, run.uri)
    run.ledgers = list(stopped.ledgers)
    return run


@pytest.mark.slow
def test_a_stopped_run_loses_at_most_a_step(
    stopped: tuple[Run, int, int], files: Path, references: References
):
    """The step in which the signal came is the last one; test_run_life stops a run between two intervals."""
    run, seen, last = stopped
    assert last == seen + 1
    continued = copy_of(run, files, "continued")
    end = continued.finish()
    assert first_step(continued.ledgers[-1]) == last + 1
    assert differences(end, references[SABOTAGED]) == []
    assert wrong_rows(end.ledger) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", ["rng", "optimizer", "position"])
def test_what_is_not_restored_is_noticed(
    part: str, stopped: tuple[Run, int, int], files: Path, references: References
):
    """The comparison above fails for a checkpoint of which one part is left out."""
    run = copy_of(stopped[0], files, f"without-{part}")
    end = run.finish(sabotage=part)
    wrong = set(differences(end, references[SABOTAGED]))
    assert wrong - {"rows"} == {"figures", "weights", "optimizer"}
    assert ("rows" in wrong) == (wrong_rows(end.ledger) != []) == (part == "position")

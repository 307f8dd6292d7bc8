"""Tests that a killed run, rerun with the same command, ends bit for bit like an uninterrupted run.

`make test` runs a sample of the grid, `make test-resume` all of it (RESUME_GRID=1).
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
from tests.support.faults import ConsumedRow, injection, read_ledger
from tests.support.grids import only_in_test_resume
from tests.support.jobs import Job, started, write_yaml
from tests.support.own_buckets import set_up_own_bucket
from tests.support.tiny_model import make_model, write_data, write_preference_pairs, write_unpaired_rows
from training.data.batches import PADDING_ROW
from utils.storage.bucket import join_uri, open_store, sync_to_node
from utils.storage.embedded_bucket import EmbeddedBucket

pytestmark = pytest.mark.timeout(900)

# 5 steps of 8 rows and one of 3: with two workers, the second one gets only padding at the end of an epoch.
ROWS, ROWS_PER_STEP, STEPS_PER_EPOCH, EPOCHS, INTERVAL = 43, 8, 6, 2, 2
STEPS = EPOCHS * STEPS_PER_EPOCH
PACKED_TOKENS = 60
KEYS: dict[str, dict[str, Any]] = {
    "train": {},
    "packed": {"packing": True, "context_length": PACKED_TOKENS},
    "pairs": {"task": "preference_tuning"},
    "unpaired": {"task": "preference_tuning", "preference_tuning_config": {"loss": "kto"}},
    "sampled": {"eval_samples": 2, "eval_max_new_tokens": 6},
    "extended": {"new_tokens": ["shelves"], "new_special_tokens": [" apples"]},
}
TRAIN_FILES = {"sampled": "train.jsonl", "extended": "train.jsonl"}
VALID_FILES = {"pairs": "valid-pairs.jsonl", "unpaired": "valid-unpaired.jsonl"}
DROPOUT = 0.1
LORA = {"r": 4, "lora_dropout": DROPOUT}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_config": LORA},
    # With r=64, the matrices are large enough for the 8-bit optimizer to store their state in 8 bits.
    "qlora": {"lora_config": LORA | {"r": 64}, "load_in_4bit": True, "optim": "adamw_8bit"},
    "bf16": {"lora_config": LORA, "dtype": "bf16"},
}
FIGURES = ("step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate")


class Kill(StrEnum):
    """A point at which a run is killed; in this order, all points fit into one epoch."""

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
class Setup:
    """The method, parallelism and rows of a run."""

    method: str
    accumulation: int
    workers: int
    parallelism: str
    rows: str = "train"
    """Name of the keys that are added; see KEYS."""
    sharers: int = 1
    """Workers that share each sequence."""

    def __str__(self) -> str:
        shared = f"-shared_by_{self.sharers}" if self.sharers > 1 else ""
        return f"{self.method}-accumulation_{self.accumulation}-workers_{self.workers}-{self.parallelism}-{self.rows}{shared}"

    @property
    def model_file(self) -> str:
        """Name of the file with the weights of a checkpoint."""
        return "model.safetensors" if self.method == "full" else "adapter_model.safetensors"


@dataclass(frozen=True)
class Chain:
    """A run that is killed at each of these points in an epoch and rerun after each kill."""

    setup: Setup
    epoch: int
    kills: tuple[Kill, ...]

    def __str__(self) -> str:
        return f"{self.setup}-epoch_{self.epoch}"


GRID = [
    Chain(Setup(method, accumulation, workers, parallelism), epoch, tuple(Kill))
    for method, accumulation, workers, parallelism, epoch in product(
        ("lora", "full"), (1, 4), (1, 2), ("ddp", "zero_2"), (1, 2)
    )
] + [
    Chain(Setup("qlora", 1, 1, "ddp"), 1, tuple(Kill)),
    Chain(Setup("qlora", 4, 2, "ddp"), 2, tuple(Kill)),
    Chain(Setup("bf16", 1, 2, "ddp"), 2, tuple(Kill)),
    Chain(Setup("lora", 4, 2, "ddp", "packed"), 2, tuple(Kill)),
    Chain(Setup("lora", 1, 2, "ddp", "pairs"), 2, tuple(Kill)),
    Chain(Setup("lora", 1, 2, "ddp", "unpaired"), 2, tuple(Kill)),
    Chain(Setup("full", 4, 2, "zero_2", "pairs"), 1, tuple(Kill)),
    Chain(Setup("lora", 1, 2, "ddp", "packed", sharers=2), 2, tuple(Kill)),
    Chain(Setup("full", 4, 2, "zero_3", sharers=2), 1, tuple(Kill)),
    Chain(Setup("lora", 1, 2, "ddp", "sampled"), 2, tuple(Kill)),
    Chain(Setup("lora", 4, 2, "ddp", "extended"), 2, tuple(Kill)),
    Chain(Setup("full", 1, 2, "ddp", "extended"), 1, tuple(Kill)),
]
FAST = Chain(Setup("lora", 1, 1, "ddp"), 2, (Kill.AFTER_STEP,))
"""The only chain that is not marked slow."""
SAMPLE = [
    FAST,
    Chain(Setup("full", 4, 2, "zero_2"), 2, (Kill.AFTER_MANIFEST, Kill.MID_UPLOAD)),
]
CHAINS = GRID if os.environ.get("RESUME_GRID") else SAMPLE
SABOTAGED = Setup("lora", 1, 1, "ddp")


@dataclass(frozen=True)
class Outcome:
    """The results of a finished run that are compared."""

    figures: list[dict[str, float]]
    weights: dict[str, str]
    optimizer: dict[str, str]
    settings: dict[str, str]
    ledger: list[ConsumedRow]
    samples: dict[str, str]
    """Key of each file of samples -> its text."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the data, a model for adapters, and a model with its own dropout for full-parameter training."""
    directory = tmp_path_factory.mktemp("resume")
    make_model(directory / "model")
    shutil.copytree(directory / "model", directory / "model-with-dropout")
    config = directory / "model-with-dropout" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": DROPOUT}))
    write_data(directory, train_rows=ROWS, valid_rows=3)
    train_pairs, valid_pairs = write_preference_pairs(directory, train_rows=ROWS, valid_rows=3)
    write_unpaired_rows(train_pairs, directory / "unpaired.jsonl")
    write_unpaired_rows(valid_pairs, directory / "valid-unpaired.jsonl")
    train_pairs.rename(directory / "pairs.jsonl")
    _write_rows_for_packs_of_two(directory / "packed.jsonl", directory / "model")
    return directory


def _write_rows_for_packs_of_two(path: Path, model: Path) -> None:
    """Write 2 * ROWS rows, of which any two but no three fit into PACKED_TOKENS, so that packing gives ROWS sequences."""
    sums = [(10 + row, 99 - row) for row in range(2 * ROWS)]
    chats = [
        [
            {"role": "user", "content": f"What is {left} + {right}?"},
            {"role": "assistant", "content": f"It is {left + right}."},
        ]
        for left, right in sums
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer.apply_chat_template(chat, return_dict=False)) for chat in chats]
    assert 2 * max(lengths) <= PACKED_TOKENS < 3 * min(lengths)


@pytest.fixture(scope="module")
def storage(bucket: EmbeddedBucket) -> Iterator[str]:
    """Return the URI of a user's bucket, so that its requests can pass through a proxy."""
    with pytest.MonkeyPatch.context() as patch:
        yield set_up_own_bucket(patch, bucket, f"resume-{secrets.token_hex(6)}")


class Run:
    """A run and its attempts so far."""

    def __init__(self, files: Path, storage: str, name: str, setup: Setup):
        self.setup = setup
        self.directory = files / "attempts" / name
        self.directory.mkdir(parents=True)
        self.scratch = files / "scratch"
        self.uri = join_uri(storage, name)
        self.name = name
        self.ledgers: list[list[ConsumedRow]] = []
        self.config = write_yaml(
            self.directory / "run.yaml",
            {
                "model_id": str(files / ("model-with-dropout" if setup.method == "full" else "model")),
                "train_path": str(files / TRAIN_FILES.get(setup.rows, f"{setup.rows}.jsonl")),
                "valid_path": str(files / VALID_FILES.get(setup.rows, "valid.jsonl")),
                "storage_path": storage,
                "run_name": name,
                "output_dir": str(self.scratch),
                "device": "cpu",
                "dtype": "fp32",
                "num_devices": setup.workers,
                "sequence_parallel_size": setup.sharers,
                "train_batch_size_per_device": ROWS_PER_STEP
                // setup.accumulation
                // (setup.workers // setup.sharers),
                "gradient_accumulation_steps": setup.accumulation,
                "num_epochs": EPOCHS,
                "learning_rate": 1e-2,
                "gradient_checkpointing": False,
                "max_failures": 0,
                "num_checkpoints_to_keep": 1,
                "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": INTERVAL},
            }
            | METHODS[setup.method]
            | ({"deepspeed": setup.parallelism} if setup.parallelism != "ddp" else {})
            | KEYS[setup.rows],
        )

    @property
    def committed_step(self) -> int:
        """Step of the latest committed checkpoint, or 0."""
        manifests = committed(open_store(self.uri))
        return manifests[-1].step if manifests else 0

    def finish(self, *, skip_restore: str = "") -> Outcome:
        """Start an attempt that trains to the end; return the outcome of the run."""
        ledger = self._next_ledger()
        with started(self.config, injection(ledger, skip_restore=skip_restore)) as job:
            finished = job.end()
        assert finished.exit_code == 0, finished.errors
        assert finished.result["train_steps"] == STEPS
        self.ledgers.append(read_ledger(ledger))
        return self._outcome(finished.result["last_checkpoint"])

    def kill(self, kill: Kill, step: int, endpoint: str) -> None:
        """Start an attempt, and kill it and its child processes at this point of a step."""
        checkpoint = checkpoint_key(step)
        traps = {
            Kill.MID_UPLOAD: Trap("midway", checkpoint + self.setup.model_file),
            Kill.BEFORE_MANIFEST: Trap("before", checkpoint + MANIFEST_FILE),
            Kill.AFTER_MANIFEST: Trap("after", checkpoint + MANIFEST_FILE),
        }
        # Steps and saves take milliseconds here, so the attempt is held at this point until it is killed.
        holds = {Kill.AFTER_STEP: f"after_step:{step}", Kill.MID_SAVE: f"in_save:{step}"}
        ledger, trap = self._next_ledger(), traps.get(kill)
        with ExitStack() as stack:
            proxy = stack.enter_context(bucket_proxy(endpoint, trap=trap)).endpoint
            variables = injection(ledger, hold=holds.get(kill, "")) | {"AWS_ENDPOINT_URL_S3": proxy}
            job = stack.enter_context(started(self.config, variables))
            self._wait_for(kill, step, job, trap)
            job.kill_all()
        if kill is Kill.MID_SAVE:
            (directory,) = self._saved_directories(step)
            saved = {path.name for path in directory.iterdir()}
            assert "trainer_state.json" not in saved, "the save was complete before the kill"
        self.ledgers.append(read_ledger(ledger))

    def stop(self, step: int) -> int:
        """Start an attempt, and send SIGTERM to main.py after a step; return the step of the last checkpoint."""
        assert step % INTERVAL != 0, "a run without uncommitted steps stops at once"
        ledger = self._next_ledger()
        # Steps take milliseconds, so without the hold all would finish before the signal arrives.
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
            job.wait_until(lambda: bool(self._saved_directories(step)), f"{kill} at step {step}")
        else:
            job.wait_for_line(f"step {step}/")
        if not trap:
            # Steps take milliseconds: the previous checkpoint may still be uploading and would be lost as well.
            due = (step - 1 if kill is Kill.MID_SAVE else step) // INTERVAL * INTERVAL
            job.wait_until(lambda: self.committed_step >= due, f"the checkpoint of step {due}")

    def _saved_directories(self, step: int) -> list[Path]:
        return list((self.scratch / "runs" / self.name).glob(f"*/node-0/trainer/checkpoint-{step}"))

    def _next_ledger(self) -> Path:
        return self.directory / f"ledger-{len(self.ledgers)}"

    def _outcome(self, checkpoint: str) -> Outcome:
        copy = sync_to_node(checkpoint, self.directory / "last")
        store = open_store(self.uri)
        lines = store.read("metrics.jsonl").decode().splitlines()
        samples = [stored.key for stored in store.list() if stored.key.startswith("samples/")]
        assert bool(samples) == ("eval_samples" in KEYS[self.setup.rows])
        return Outcome(
            [{name: line[name] for name in FIGURES if name in line} for line in map(json.loads, lines)],
            digests(load_file(copy / self.setup.model_file)),
            digests(optimizer_state(copy)),
            read_settings(copy),
            rows_in_weights(self.ledgers),
            {key: store.read(key).decode() for key in samples},
        )


def optimizer_state(checkpoint: Path) -> dict[str, Any]:
    """Return the saved state of the optimizer and scheduler: one file each, or one DeepSpeed file per rank."""
    paths = [
        path
        for path in sorted(checkpoint.rglob("*.pt"))
        if path.name in ("optimizer.pt", "scheduler.pt") or path.name.endswith("_optim_states.pt")
    ]
    assert any("optim" in path.name for path in paths)
    # DeepSpeed pickles its own objects. Loading them is safe, because this test wrote the file.
    return {
        str(path.relative_to(checkpoint)): torch.load(path, map_location="cpu", weights_only=False)
        for path in paths
    }


def read_settings(checkpoint: Path) -> dict[str, str]:
    """Return the text of the JSON files beside the weights, except those that contain times and speeds."""
    timed = (MANIFEST_FILE, "trainer_state.json")
    return {path.name: path.read_text() for path in checkpoint.glob("*.json") if path.name not in timed}


def digests(state: Any, name: str = "") -> dict[str, str]:
    """Return the SHA-256 of every tensor and number in nested state, by path."""
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


def first_step(ledger: Sequence[ConsumedRow]) -> int:
    """Return the first step of an attempt."""
    return min(consumed.step for consumed in ledger)


def rows_in_weights(ledgers: Sequence[Sequence[ConsumedRow]]) -> list[ConsumedRow]:
    """Return the rows that the weights contain: those of each attempt before the first step of the next one that trained."""
    rows: list[ConsumedRow] = []
    for ledger in ledgers:
        if ledger:
            rows = [consumed for consumed in rows if consumed.step < first_step(ledger)] + list(ledger)
    return sorted(rows)


def wrong_rows(ledger: Sequence[ConsumedRow], sharers: int = 1) -> list[str]:
    """Return the rows that the workers did not consume exactly once per epoch, or that not all workers consumed that share them."""
    wrong = []
    for epoch in range(EPOCHS):
        counts = Counter(
            consumed.row
            for consumed in ledger
            if (consumed.step - 1) // STEPS_PER_EPOCH == epoch and consumed.row != PADDING_ROW
        )
        wrong += [
            f"epoch {epoch + 1}: row {row} {counts[row]} times"
            for row in sorted(counts.keys() | set(range(ROWS)))
            if counts[row] != (sharers if row in range(ROWS) else 0)
        ]
    return wrong


def differences(outcome: Outcome, reference: Outcome) -> list[str]:
    """Return the names of the results that differ between two outcomes."""
    pairs = {
        "figures": (outcome.figures, reference.figures),
        "weights": (outcome.weights, reference.weights),
        "optimizer": (outcome.optimizer, reference.optimizer),
        "settings": (outcome.settings, reference.settings),
        "rows": (outcome.ledger, reference.ledger),
        "samples": (outcome.samples, reference.samples),
    }
    return [name for name, (left, right) in pairs.items() if left != right]


class References:
    """The outcomes of uninterrupted runs, one per setup, trained on first access."""

    def __init__(self, files: Path, storage: str):
        self._files = files
        self._storage = storage
        self._outcomes: dict[Setup, Outcome] = {}

    def __getitem__(self, setup: Setup) -> Outcome:
        if setup not in self._outcomes:
            outcome = Run(self._files, self._storage, f"{setup}-reference", setup).finish()
            losses = [line["loss"] for line in outcome.figures if "loss" in line]
            assert len(losses) == STEPS
            assert {consumed.rank for consumed in outcome.ledger} == set(range(setup.workers))
            assert wrong_rows(outcome.ledger, setup.sharers) == []
            self._outcomes[setup] = outcome
        return self._outcomes[setup]


@pytest.fixture(scope="module")
def references(files: Path, storage: str) -> References:
    return References(files, storage)


@pytest.mark.parametrize(
    "chain",
    [pytest.param(chain, marks=[] if chain == FAST else pytest.mark.slow) for chain in CHAINS],
    ids=str,
)
def test_killed_run_ends_bit_for_bit_like_an_uninterrupted_run(
    chain: Chain,
    files: Path,
    storage: str,
    bucket: EmbeddedBucket,
    references: References,
    record_property: Callable[[str, object], None],
):
    """Each epoch also consumes each row once, and no kill costs more steps than one checkpoint interval."""
    run = Run(files, storage, str(chain), chain.setup)
    for kill in chain.kills:
        restored = run.committed_step
        step = (chain.epoch - 1) * STEPS_PER_EPOCH + STEP_IN_EPOCH[kill]
        run.kill(kill, step, bucket.endpoint)
        assert first_step(run.ledgers[-1]) == restored + 1
        last_due = step - step % INTERVAL
        lost = INTERVAL if kill in (Kill.MID_SAVE, Kill.MID_UPLOAD, Kill.BEFORE_MANIFEST) else 0
        assert run.committed_step == last_due - lost
        assert run.committed_step >= step - INTERVAL
    restored = run.committed_step
    outcome = run.finish()
    assert first_step(run.ledgers[-1]) == restored + 1
    assert differences(outcome, references[chain.setup]) == []
    assert wrong_rows(outcome.ledger, chain.setup.sharers) == []
    record_property(KILLS, len(chain.kills))


@pytest.fixture(scope="module")
def stopped(files: Path) -> tuple[Run, int, int]:
    """Stop a run by SIGTERM in the middle of its second epoch; return (run, step before the signal, step of the last checkpoint)."""
    run = Run(files, str(files / "stopped"), "stopped", SABOTAGED)
    signalled_step = STEPS_PER_EPOCH + INTERVAL + 1
    return run, signalled_step, run.stop(signalled_step)


def copy_of(stopped: Run, files: Path, name: str) -> Run:
    """Return a copy of the stopped run under another name."""
    run = Run(files, str(files / "stopped"), name, stopped.setup)
    shutil.copytree(stopped.uri, run.uri)
    run.ledgers = list(stopped.ledgers)
    return run


@pytest.mark.slow
@only_in_test_resume
def test_stopped_run_resumes_after_the_step_of_the_signal(
    stopped: tuple[Run, int, int], files: Path, references: References
):
    """The running step is completed and saved before the run exits; test_run_life stops a run between two intervals."""
    run, signalled_step, last = stopped
    assert last == signalled_step + 1
    resumed = copy_of(run, files, "resumed")
    outcome = resumed.finish()
    assert first_step(resumed.ledgers[-1]) == last + 1
    assert differences(outcome, references[SABOTAGED]) == []
    assert wrong_rows(outcome.ledger) == []


@pytest.mark.slow
@only_in_test_resume
@pytest.mark.parametrize("part", ["rng", "optimizer", "position"])
def test_comparison_detects_state_that_is_not_restored(
    part: str, stopped: tuple[Run, int, int], files: Path, references: References
):
    """If one part of the checkpoint is not restored, the comparisons above fail."""
    run = copy_of(stopped[0], files, f"without-{part}")
    outcome = run.finish(skip_restore=part)
    wrong = set(differences(outcome, references[SABOTAGED]))
    assert wrong - {"rows"} == {"figures", "weights", "optimizer"}
    assert ("rows" in wrong) == (wrong_rows(outcome.ledger) != []) == (part == "position")

"""Runs of the GPU benchmark: our job, our trainer without Ray, and the peers' own scripts, each in its own processes."""

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from tokenizers import Tokenizer

from benchmarks import gpu_processes, gpu_workloads
from benchmarks.gpu_processes import PROJECT
from benchmarks.gpu_workloads import SHAPES, Workload
from benchmarks.report import sha256
from cookbooks.quickstart.word_problems import TRAIN_KINDS, write_problems
from training.launch.cluster import GPU_ALLOCATOR

Shapes = Literal["real", "tiny", "simulated"]
"""`real` shapes run on a GPU; `tiny` ones on CPU, or on a GPU that is simulated."""

RANK, LEARNING_RATE, OPTIMIZER, SEED = 16, 1e-4, "adamw_torch_fused", 42
_CHARACTERS_PER_TOKEN = 8  # above the length of any token: rows are truncated by tokens
# Tokens of 512 rows of GSM8K as chats (the first 256 of each half, SmolLM2's tokenizer): every 16th, from the shortest to the longest.
# fmt: off
GSM8K_LENGTHS = (
    100, 109, 115, 121, 126, 133, 139, 144, 147, 151, 157, 160, 166, 172, 178, 186,
    191, 197, 203, 208, 213, 220, 229, 236, 245, 255, 264, 280, 287, 309, 333, 386,
)
# fmt: on


@dataclass(frozen=True)
class Measured:
    """Measurements of a contestant's steps after the warm-up."""

    step_seconds: float
    """Median seconds per step."""
    every_step_seconds: tuple[float, ...]
    """Seconds of each step, including the warm-up."""
    tokens_per_second: float
    """Median over steps, excluding padding."""
    peak_memory_bytes: int
    losses: tuple[float, ...]
    """Loss of each step."""
    gradient_norms: tuple[float, ...] = ()
    mfu: float | None = None
    estimated_bytes: int | None = None
    """The plan's estimate of the peak memory."""
    weights: str | None = None
    """sha256 of the adapter in the last checkpoint; None in full-parameter training."""
    seconds: float = 0.0
    """Seconds of all its processes."""


@dataclass(frozen=True)
class Setting:
    """The machine or simulation on which the contestants run."""

    shapes: Shapes
    device: Literal["cuda", "cpu"]
    workloads: Mapping[str, Workload]
    time_limit: float
    """Time limit of a contestant, relative to its estimated seconds, which are those of a GPU."""

    @property
    def simulated(self) -> bool:
        """Return whether the GPU is simulated, which only runs without Ray and without the peers' scripts can use."""
        return self.shapes == "simulated"


ON_GPU = Setting("real", "cuda", gpu_workloads.GPU, time_limit=2)
ON_CPU = Setting("tiny", "cpu", gpu_workloads.TINY, time_limit=10)
SIMULATED = Setting("simulated", "cuda", gpu_workloads.TINY, time_limit=30)


class Bench:
    """A runner of contestants in a directory, which keeps models and rows between calls."""

    def __init__(self, setting: Setting, directory: Path, logs: Path):
        self.setting = setting
        self.workloads = setting.workloads
        self.directory = directory
        self.stopped = threading.Event()
        """Set by the caller to stop all processes."""
        self._logs = logs
        # Contestants that run at once share models and rows.
        self._rows_lock = threading.Lock()
        self._model_locks = {shape: threading.Lock() for shape in SHAPES}
        self._of_thread = threading.local()

    def set_deadline(self, deadline: float) -> None:
        """Set the deadline of the processes that this thread starts, by `time.monotonic()`."""
        self._of_thread.deadline = deadline

    def main(self, workload: str, *, estimates: bool = False, **changes: Any) -> Measured:
        """Run main.py as a user would; `changes` override keys of the YAML.

        Args:
            workload: Name of the workload.
            estimates: True to plan the run first, for the estimate of its memory.
            changes: Keys of the YAML.
        """
        config, name = self._config(workload, **changes)
        estimated_bytes = self._plan(config, name)[1] if estimates else None
        self._run([sys.executable, "main.py", str(config), "--json"], name)
        return self._measured(name, workload, estimated_bytes)

    def killed(self, workload: str, **changes: Any) -> Measured:
        """Run main.py, kill it and its workers with SIGKILL after the first checkpoint, and rerun the command."""
        every = max(1, self.workloads[workload].steps // 2)
        changes |= {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": every}}
        config, name = self._config(workload, **changes)
        command = [sys.executable, "main.py", str(config), "--json"]
        checkpoints = self.directory / "runs" / name / "checkpoints"
        first = checkpoints / f"step-{every:06d}" / "MANIFEST.json"
        finished = self._run(command, name, until=first.exists)
        if finished or len([*checkpoints.glob("*/MANIFEST.json")]) > 1:
            raise gpu_processes.ContestantFailedError("the run finished before it could be killed")
        self._run(command, name)
        return self._measured(name, workload, None)

    def used(self, workload: str, **changes: Any) -> Measured:
        """Run main.py on chats, and chat with its checkpoint, evaluate it and export it as a user would."""
        rows = str(self.chats(workload))
        config, name = self._config(workload, task="instruction_tuning", train_path=rows, **changes)
        run = str(self.directory / "runs" / name)
        for arguments in (
            [str(config), "--json"],
            ["chat", run, "--prompt", "Add 1 and 2.", "--max-new-tokens", "8"],
            ["evaluate", run, "--data", rows, "--max-new-tokens", "8"],
            ["export", run, "--verify"],
        ):
            self._run([sys.executable, "main.py", *arguments], name)
        return self._measured(name, workload, None)

    def alone(self, workload: str, **changes: Any) -> Measured:
        """Run our trainer under torchrun: no Ray, no bucket, no checkpoints."""
        config, name = self._config(workload, **changes)
        device = changes.get("device", self.setting.device)
        plan, estimated_bytes = self._plan(config, name, device)
        # A simulated GPU has no NCCL, which torchrun's process group would use.
        simulated = self.setting.simulated and device == "cuda"
        launcher = () if simulated else ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
        report = self._train("alone", name, {"plan": str(plan)}, device, launcher)
        return _measured_of(report, self.workloads[workload], estimated_bytes)

    def peer(
        self, script: Literal["trl", "unsloth"], workload: str, *, load_in_4bit: bool = False
    ) -> Measured:
        """Run a peer's own script with the default settings of `main`."""
        size = self.workloads[workload]
        settings = {
            "model": str(self.model(size.shape)),
            "device": self.setting.device,
            "train_path": str(self._rows(size)),
            "context_length": size.context_length,
            "batch_size": size.batch_size,
            "accumulation": size.accumulation,
            "steps": size.steps,
            "rank": RANK,
            "learning_rate": LEARNING_RATE,
            "optim": OPTIMIZER,
            "load_in_4bit": load_in_4bit,
        }
        report = self._train(script, f"{script}-{time.time_ns()}", settings, self.setting.device)
        return _measured_of(report, size, None)

    def model(self, shape: str) -> Path:
        """Return the directory of a model with random weights, which the first call makes on the device."""
        directory = self.directory / f"model-{shape}"
        settings = {"shape": dict(SHAPES[shape]), "directory": str(directory)}
        device = "cpu" if self.setting.simulated else self.setting.device
        with self._model_locks[shape]:
            if not (directory / "tokenizer.json").exists():  # written last: a call may have been interrupted
                self._run_contestant("make_model", f"model-{shape}", settings, device)
        return directory

    def _plan(
        self, config: Path, name: str, device: Literal["cuda", "cpu"] | None = None
    ) -> tuple[Path, int | None]:
        """Write the plan of a YAML; return its path and the estimated memory in bytes."""
        settings = {"yaml": str(config), "plan": str(self.directory / f"{name}.plan.json")}
        settings["estimate"] = str(self.directory / f"{name}.estimate.json")
        self._run_contestant("plan", name, settings, device or self.setting.device)
        return Path(settings["plan"]), json.loads(Path(settings["estimate"]).read_text())

    def _train(
        self,
        contestant: str,
        name: str,
        settings: dict[str, Any],
        device: Literal["cuda", "cpu"],
        launcher: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Run a contestant that trains, and return its report."""
        report = self.directory / f"{name}.report.json"
        settings |= {"report": str(report), "output_dir": str(self.directory / name)}
        self._run_contestant(contestant, name, settings, device, launcher)
        return json.loads(report.read_text())

    def _run_contestant(
        self,
        contestant: str,
        name: str,
        settings: dict[str, Any],
        device: Literal["cuda", "cpu"],
        launcher: Sequence[str] = (),
    ) -> None:
        file = self.directory / f"{contestant}-{name}.json"
        simulated = self.setting.simulated and device == "cuda"
        file.write_text(json.dumps(settings | {"simulated": simulated}))
        script = str(PROJECT / "benchmarks" / "gpu_contestants.py")
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if device == "cuda" else ""
        # The same allocator as in our workers.
        variables = GPU_ALLOCATOR | {
            "CUDA_VISIBLE_DEVICES": gpus.split(",")[0],  # transformers would use all GPUs
            "TOKENIZERS_PARALLELISM": "false",
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "UNSLOTH_COMPILE_LOCATION": str(self.directory / f"unsloth-{name}"),
            "HF_DATASETS_CACHE": str(self.directory / "datasets"),
        }
        if simulated:
            variables |= {
                "TRITON_INTERPRET": "1",
                "TORCHDYNAMO_DISABLE": "1",
                "HF_DEACTIVATE_ASYNC_LOAD": "1",
            }
        self._run([sys.executable, *launcher, script, contestant, str(file)], name, environment=variables)

    def _run(
        self,
        command: Sequence[str],
        name: str,
        *,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> bool:
        return gpu_processes.run(
            command,
            environment={"HF_HUB_OFFLINE": "1", **(environment or {})},
            directory=self.directory,
            log=self._logs / f"{name}.log",
            deadline=self._of_thread.deadline,
            stopped=self.stopped,
            **options,
        )

    def _measured(self, name: str, workload: str, estimated_bytes: int | None) -> Measured:
        """Return the measurements in metrics.jsonl of a finished run."""
        run = self.directory / "runs" / name
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        steps = [line for line in lines if "loss" in line]
        after_warm_up = steps[self.workloads[workload].warm_up :]
        manifest = max((run / "checkpoints").glob("*/MANIFEST.json"))
        adapter = manifest.with_name("adapter_model.safetensors")
        mfu = [line["mfu"] for line in after_warm_up if "mfu" in line]
        return Measured(
            statistics.median(map(_step_seconds, after_warm_up)),
            tuple(map(_step_seconds, steps)),
            statistics.median(line["tokens_per_second"] for line in after_warm_up),
            max(line["peak_memory_bytes"] for line in steps),
            tuple(line["loss"] for line in steps),
            tuple(line["grad_norm"] for line in steps),
            statistics.median(mfu) if mfu else None,
            estimated_bytes,
            sha256(adapter) if adapter.exists() else None,
        )

    def _config(self, workload: str, **changes: Any) -> tuple[Path, str]:
        """Return (YAML, run name); the default is LoRA on rows that fill the context."""
        size, name = self.workloads[workload], f"{workload}-{time.time_ns()}"
        settings: dict[str, Any] = {
            "model_id": str(self.model(size.shape)),
            "task": "causal_lm",
            "train_path": changes.get("train_path") or str(self._rows(size)),
            "storage_path": str(self.directory / "runs"),
            "output_dir": str(self.directory / "scratch"),
            "run_name": name,
            "device": self.setting.device,
            "context_length": size.context_length,
            "train_batch_size_per_device": size.batch_size,
            "gradient_accumulation_steps": size.accumulation,
            "max_steps": size.steps,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "optim": OPTIMIZER,
            "seed": SEED,
            "lora_config": {"r": RANK, "lora_alpha": RANK},
            "gradient_checkpointing": False,
            "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 10**6},
            "max_failures": 0,
        }
        file = self.directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings | changes))
        return file, name

    def _rows(self, size: Workload) -> Path:
        """Return a file of rows that are truncated to the context."""
        characters = size.context_length * _CHARACTERS_PER_TOKEN
        return self._file(
            f"rows-{size.context_length}-{size.rows}.jsonl",
            lambda: ({"text": _text(characters, seed)} for seed in range(size.rows)),
        )

    def chats(self, workload: str) -> Path:
        """Return a file of word problems with their answers, as chats."""
        size = self.workloads[workload]
        return self._file(f"chats-{size.rows}.jsonl", lambda: _chats(size.rows))

    def pairs(self, workload: str) -> Path:
        """Return a file of word problems, each with its answer and a wrong one."""
        size = self.workloads[workload]

        def pairs() -> Iterator[Mapping[str, Any]]:
            chats = [chat["messages"] for chat in _chats(size.rows)]
            for (*prompt, answer), (*_, other) in zip(chats, chats[1:] + chats[:1], strict=True):
                yield {"prompt": prompt, "chosen": [answer], "rejected": [other]}

        return self._file(f"pairs-{size.rows}.jsonl", pairs)

    def gsm8k_rows(self, workload: str) -> Path:
        """Return a file of rows with the lengths of GSM8K, enough for all steps of packed sequences."""
        size = self.workloads[workload]

        def rows() -> Iterator[Mapping[str, Any]]:
            tokenizer = Tokenizer.from_file(str(self.model(size.shape) / "tokenizer.json"))
            total, seed = 0, 0
            while total < 2 * size.rows * size.context_length:
                tokens = min(size.context_length, GSM8K_LENGTHS[seed * 7 % len(GSM8K_LENGTHS)])
                text = _text(tokens * _CHARACTERS_PER_TOKEN, seed)
                offsets = tokenizer.encode(text, add_special_tokens=False).offsets
                yield {"text": text[: offsets[tokens - 1][1]]}
                total, seed = total + tokens, seed + 1

        return self._file(f"gsm8k-lengths-{workload}.jsonl", rows)

    def _file(self, name: str, rows: Callable[[], Iterable[Mapping[str, Any]]]) -> Path:
        """Return a file of these rows, which the first call writes."""
        file = self.directory / name
        with self._rows_lock:
            if not file.exists():
                partial = file.with_suffix(".partial")
                partial.write_text("".join(json.dumps(row) + "\n" for row in rows()))
                partial.rename(file)
        return file


def _measured_of(report: dict[str, Any], workload: Workload, estimated_bytes: int | None) -> Measured:
    """Return the measurements in the report of a contestant that trains."""
    seconds = statistics.median(report["step_seconds"][workload.warm_up :])
    mfu = [value for value in report.get("mfu", [])[workload.warm_up :] if value is not None]
    return Measured(
        seconds,
        tuple(report["step_seconds"]),
        report["tokens_of_a_step"] / seconds,
        report["peak_memory_bytes"],
        tuple(report["losses"]),
        tuple(report["gradient_norms"]),
        statistics.median(mfu) if mfu else None,
        estimated_bytes,
    )


def _chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in write_problems(TRAIN_KINDS, count, seed).splitlines()]


def _text(characters: int, seed: int) -> str:
    chats = _chats(characters // 100 + 1, seed)
    messages = (message["content"] for chat in chats for message in chat["messages"])
    return "\n".join(messages)[:characters]


def _step_seconds(line: Mapping[str, float]) -> float:
    """Return the seconds of a step, excluding evaluation and saving."""
    return sum(line[f"seconds/{phase}"] for phase in ("data", "forward", "backward", "optimizer", "other"))

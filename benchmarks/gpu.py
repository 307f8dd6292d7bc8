"""Compare speed and memory on one GPU with other trainers: `make bench-gpu`, or one part, `benchmarks/gpu.py --part lora`.

Models have real shapes and random weights, and rows are synthetic, so that nothing is downloaded. In each round every contestant
runs once, in its own process, in rotating order; ratios are taken within a round. Each result is written to
benchmarks/results/gpu.json at once, so the next call continues a round that `--minutes` or a lost machine interrupted.

`--tiny` uses shapes that two CPU cores train in seconds; it only tests the script.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from tokenizers import Tokenizer

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import RESULTS, spread, write_report
from cookbooks.quickstart.word_problems import TRAIN_KINDS, write_problems
from tests.support.jobs import started
from training.launch.cluster import GPU_ALLOCATOR

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
class Scale:
    """Sizes of the model, the rows and the run."""

    device: Literal["cuda", "cpu"]
    shape: Mapping[str, Any]
    """Shape of the model, as arguments of LlamaConfig."""
    context_length: int
    context_length_full: int
    batch_size: int
    accumulation: int
    steps: int
    warm_up: int
    """First steps, excluded because they compile kernels."""
    agreeing_steps: int


LLAMA_3_8B = Scale(
    device="cuda",
    shape={
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    context_length=4096,
    context_length_full=2048,
    batch_size=2,
    accumulation=16,
    steps=6,
    warm_up=2,
    agreeing_steps=50,
)
TINY = Scale(
    device="cpu",
    shape={
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    context_length=256,
    context_length_full=64,
    batch_size=2,
    accumulation=2,
    steps=4,
    warm_up=1,
    agreeing_steps=10,
)


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
    mfu: float | None = None
    weights: str | None = None
    """Checksum of the adapter in the last checkpoint."""


class ContestantFailedError(Exception):
    """An error that contains the output of a failed contestant process."""


class Bench:
    """A runner of contestants in a directory, which keeps the model between calls."""

    def __init__(self, scale: Scale, directory: Path):
        self.scale = scale
        self.directory = directory
        self.model = directory / f"model-{scale.shape['num_hidden_layers']}-layers"
        if not (self.model / "tokenizer.json").exists():  # written last: a call may have been interrupted
            self._run_contestant("make_model", {"shape": dict(scale.shape), "directory": str(self.model)})

    def main(self, **changes: Any) -> Measured:
        """Run main.py as a user would; `changes` override keys of the YAML."""
        config, name = self._config(**changes)
        self._run_main(config)
        return self._measured(name)

    def killed(self, **changes: Any) -> Measured:
        """Run main.py, kill it and its workers with SIGKILL after the first checkpoint, and rerun the command."""
        every = max(1, self.scale.steps // 2)
        changes |= {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": every}}
        config, name = self._config(**changes)
        first = self.directory / "runs" / name / "checkpoints" / f"step-{every:06d}" / "MANIFEST.json"
        with started(config) as job:
            job.wait_until(first.exists, "a first checkpoint")
            assert job.process.poll() is None, "the run finished before it could be killed"
        self._run_main(config)
        return self._measured(name)

    def _run_main(self, config: Path) -> None:
        completed = subprocess.run(
            [sys.executable, "main.py", str(config), "--json"], cwd=PROJECT, capture_output=True, text=True
        )
        if completed.returncode != 0:
            raise ContestantFailedError(f"main.py {config} failed:\n{completed.stderr}")

    def _measured(self, name: str) -> Measured:
        run = self.directory / "runs" / name
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        steps = [line for line in lines if "loss" in line]
        after_warm_up = steps[self.scale.warm_up :]
        manifest = max((run / "checkpoints").glob("*/MANIFEST.json"))
        files = {file["path"]: file["checksum"] for file in json.loads(manifest.read_text())["files"]}
        return Measured(
            statistics.median(map(_step_seconds, after_warm_up)),
            tuple(map(_step_seconds, steps)),
            statistics.median(line["tokens_per_second"] for line in after_warm_up),
            max(line["peak_memory_bytes"] for line in steps),
            tuple(line["loss"] for line in steps),
            weights=files.get("adapter_model.safetensors"),
        )

    def alone(self, **changes: Any) -> Measured:
        """Run our trainer under torchrun: no Ray, no bucket, no checkpoints."""
        config, name = self._config(**changes)
        plan = self.directory / f"{name}.plan.json"
        self._run_contestant("plan", {"yaml": str(config), "plan": str(plan)})
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        return self._peer("alone", {"plan": str(plan)}, launcher)

    def peer(self, name: Literal["trl", "unsloth"], *, load_in_4bit: bool = False) -> Measured:
        """Run a peer's own script with the default settings of `main`."""
        scale = self.scale
        return self._peer(
            name,
            {
                "model": str(self.model),
                "device": scale.device,
                "train_path": str(self._rows(scale.context_length)),
                "context_length": scale.context_length,
                "batch_size": scale.batch_size,
                "accumulation": scale.accumulation,
                "steps": scale.steps,
                "rank": RANK,
                "learning_rate": LEARNING_RATE,
                "optim": OPTIMIZER,
                "load_in_4bit": load_in_4bit,
            },
        )

    def _peer(self, name: str, settings: dict[str, Any], launcher: Sequence[str] = ()) -> Measured:
        run = f"{name}-{time.time_ns()}"
        report = self.directory / f"{run}.report.json"
        settings |= {"report": str(report), "output_dir": str(self.directory / run)}
        self._run_contestant(name, settings, launcher)
        measured = json.loads(report.read_text())
        seconds = statistics.median(measured["step_seconds"][self.scale.warm_up :])
        mfu = [value for value in measured.get("mfu", [])[self.scale.warm_up :] if value is not None]
        return Measured(
            seconds,
            tuple(measured["step_seconds"]),
            measured["tokens_of_a_step"] / seconds,
            measured["peak_memory_bytes"],
            tuple(measured["losses"]),
            statistics.median(mfu) if mfu else None,
        )

    def _run_contestant(self, name: str, settings: dict[str, Any], launcher: Sequence[str] = ()) -> None:
        file = self.directory / f"{name}-{time.time_ns()}.json"
        file.write_text(json.dumps(settings))
        script = str(PROJECT / "benchmarks" / "gpu_contestants.py")
        # The same allocator as in our workers.
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if self.scale.device == "cuda" else ""
        variables = GPU_ALLOCATOR | {
            "CUDA_VISIBLE_DEVICES": gpus.split(",")[0],  # transformers would use all GPUs
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "UNSLOTH_COMPILE_LOCATION": str(self.directory / "unsloth"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.directory / "datasets"),
        }
        completed = subprocess.run(
            [sys.executable, *launcher, script, name, str(file)],
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
        if completed.returncode != 0:
            raise ContestantFailedError(f"{name} {file} failed:\n{completed.stdout}\n{completed.stderr}")

    def _config(self, **changes: Any) -> tuple[Path, str]:
        """Return (YAML, run name); the default workload is LoRA on rows that fill the context."""
        scale, name = self.scale, f"run-{time.time_ns()}"
        context_length = changes.get("context_length", scale.context_length)
        settings: dict[str, Any] = {
            "model_id": str(self.model),
            "task": "causal_lm",
            "train_path": str(self._rows(context_length)),
            "storage_path": str(self.directory / "runs"),
            "output_dir": str(self.directory / "scratch"),
            "run_name": name,
            "device": scale.device,
            "context_length": context_length,
            "train_batch_size_per_device": scale.batch_size,
            "gradient_accumulation_steps": scale.accumulation,
            "max_steps": scale.steps,
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

    def _rows(self, tokens: int) -> Path:
        """Return a file of rows that are truncated to this many tokens."""
        file = self.directory / f"rows-{tokens}.jsonl"
        if not file.exists():
            rows = self.scale.batch_size * self.scale.accumulation * self.scale.steps
            texts = (_text(tokens * _CHARACTERS_PER_TOKEN, seed) for seed in range(rows))
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return file

    def gsm8k_rows(self) -> Path:
        """Return a file of rows with the lengths of GSM8K, enough for all steps."""
        file = self.directory / "gsm8k-lengths.jsonl"
        scale = self.scale
        if not file.exists():
            needed = 2 * scale.steps * scale.batch_size * scale.accumulation * scale.context_length
            tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
            rows, total = [], 0
            while total < needed:
                tokens = GSM8K_LENGTHS[len(rows) * 7 % len(GSM8K_LENGTHS)]
                text = _text(tokens * _CHARACTERS_PER_TOKEN, len(rows))
                offsets = tokenizer.encode(text, add_special_tokens=False).offsets
                rows.append({"text": text[: offsets[tokens - 1][1]]})
                total += tokens
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file


def _text(characters: int, seed: int) -> str:
    lines = write_problems(TRAIN_KINDS, characters // 100 + 1, seed).splitlines()
    messages = (message["content"] for line in lines for message in json.loads(line)["messages"])
    return "\n".join(messages)[:characters]


def _step_seconds(line: Mapping[str, float]) -> float:
    """Return the seconds of a step, excluding evaluation and saving."""
    return sum(line[f"seconds/{phase}"] for phase in ("data", "forward", "backward", "optimizer", "other"))


def _full(bench: Bench, optim: str, batch_size: int) -> Measured:
    """Run full-parameter training without checkpoints, whose 50 GB would dominate a run of main.py."""
    on_gpu = bench.scale.device == "cuda"
    return bench.alone(
        context_length=bench.scale.context_length_full,
        lora_config=None,
        optim=optim if on_gpu else OPTIMIZER,
        train_batch_size_per_device=batch_size,
    )


def _losses(bench: Bench, kernels: str) -> Measured:
    return bench.main(
        context_length=bench.scale.context_length_full,
        max_steps=bench.scale.agreeing_steps,
        gradient_accumulation_steps=1,
        kernels=kernels,
    )


CONTESTANTS: Mapping[str, Callable[[Bench], Measured]] = {
    "lora": Bench.main,
    "lora of Unsloth's own script": lambda bench: bench.peer("unsloth"),
    "lora of TRL and PEFT": lambda bench: bench.peer("trl"),
    "lora under torchrun": Bench.alone,
    "qlora": lambda bench: bench.main(load_in_4bit=True),
    "qlora of Unsloth's own script": lambda bench: bench.peer("unsloth", load_in_4bit=True),
    "packed": lambda bench: bench.main(train_path=str(bench.gsm8k_rows()), packing=True),
    "unpacked": lambda bench: bench.main(train_path=str(bench.gsm8k_rows())),
    # Batch sizes that fit into 140 GB without gradient checkpointing.
    "full, adamw_8bit": lambda bench: _full(bench, "adamw_8bit", 2),
    "full, adafactor": lambda bench: _full(bench, "adafactor", 3),
    "deterministic": lambda bench: bench.main(deterministic=True),
    "deterministic, killed": lambda bench: bench.killed(deterministic=True),
    "losses of torch": lambda bench: _losses(bench, "torch"),
    "losses of unsloth": lambda bench: _losses(bench, "unsloth"),
    "losses of liger": lambda bench: _losses(bench, "liger"),
}

Figures = dict[str, float]
_Round = Mapping[str, Measured]


@dataclass(frozen=True)
class Part:
    """One or more rows of the table."""

    contestants: Sequence[str]
    figures: Callable[[_Round], Figures]
    targets: Mapping[str, tuple[Literal["at least", "at most"], float]]
    """Figure -> bound and target."""


def _lora(measured: _Round) -> Figures:
    speed = {name: measured[name].tokens_per_second for name in PARTS["lora"].contestants}
    return {
        "tokens/s": speed["lora"],
        "tokens/s / Unsloth's own script": speed["lora"] / speed["lora of Unsloth's own script"],
        "tokens/s / TRL and PEFT": speed["lora"] / speed["lora of TRL and PEFT"],
    }


def _mfu(measured: _Round) -> Figures:
    """Return MFU figures; none on CPU."""
    known = {name: measured[name].mfu for name in PARTS["full"].contestants}
    return {f"MFU, {name.removeprefix('full, ')}": mfu for name, mfu in known.items() if mfu is not None}


def _disagreement(measured: _Round) -> Figures:
    """Return the largest relative loss difference from torch, and the growth of its mean from the first to the last ten steps."""
    figures = {}
    for kernels in ("unsloth", "liger"):
        result = measured.get(f"losses of {kernels}")
        if result is None:
            continue  # liger does not run on CPU
        pairs = zip(result.losses, measured["losses of torch"].losses, strict=True)
        differences = [(loss - reference) / reference for loss, reference in pairs]
        figures[f"{kernels}: largest difference of a loss"] = max(map(abs, differences))
        figures[f"{kernels}: drift of the difference"] = abs(
            statistics.mean(differences[-10:]) - statistics.mean(differences[:10])
        )
    return figures


PARTS = {
    "lora": Part(
        ("lora", "lora of Unsloth's own script", "lora of TRL and PEFT"),
        _lora,
        {
            "tokens/s": ("at least", 13_500),
            "tokens/s / Unsloth's own script": ("at least", 1.0),
            "tokens/s / TRL and PEFT": ("at least", 1.3),
        },
    ),
    "packing": Part(
        ("packed", "unpacked"),
        lambda measured: {
            "real tokens/s / unpacked": measured["packed"].tokens_per_second
            / measured["unpacked"].tokens_per_second
        },
        {"real tokens/s / unpacked": ("at least", 2.5)},
    ),
    "full": Part(
        ("full, adamw_8bit", "full, adafactor"),
        _mfu,
        {"MFU, adamw_8bit": ("at least", 0.57), "MFU, adafactor": ("at least", 0.57)},
    ),
    "qlora": Part(
        ("qlora", "qlora of Unsloth's own script", "lora"),
        lambda measured: {
            "peak memory / Unsloth's": measured["qlora"].peak_memory_bytes
            / measured["qlora of Unsloth's own script"].peak_memory_bytes,
            "tokens/s / our LoRA": measured["qlora"].tokens_per_second / measured["lora"].tokens_per_second,
        },
        {"peak memory / Unsloth's": ("at most", 1.05), "tokens/s / our LoRA": ("at least", 0.95)},
    ),
    "ray": Part(
        ("lora", "lora under torchrun"),
        lambda measured: {
            "step time / the same trainer under torchrun": measured["lora"].step_seconds
            / measured["lora under torchrun"].step_seconds
        },
        {"step time / the same trainer under torchrun": ("at most", 1.02)},
    ),
    "resume": Part(
        ("deterministic", "deterministic, killed", "lora"),
        lambda measured: {
            "weights are those of a run that was never killed": float(
                measured["deterministic"].weights is not None
                and measured["deterministic"].weights == measured["deterministic, killed"].weights
            ),
            "step time / not deterministic": measured["deterministic"].step_seconds
            / measured["lora"].step_seconds,
        },
        {
            "weights are those of a run that was never killed": ("at least", 1),
            "step time / not deterministic": ("at most", 1.1),
        },
    ),
    "agreement": Part(
        ("losses of torch", "losses of unsloth", "losses of liger"),
        _disagreement,
        {
            f"{name}: {difference}": ("at most", 1e-2)
            for name in ("unsloth", "liger")
            for difference in ("largest difference of a loss", "drift of the difference")
        },
    ),
}

_NEEDS_A_GPU = "losses of liger"
_FIRST_GUESS_SECONDS = 180.0  # initial estimate per contestant
_RUN_TWICE = "deterministic, killed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="part to run, may be repeated; default: all"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="time limit: start no contestant that may exceed it"
    )
    parser.add_argument("--tiny", action="store_true", help="use shapes for two CPU cores")
    parser.add_argument(
        "--results",
        type=Path,
        help="output directory; default: benchmarks/results, with --tiny a temporary directory",
    )
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    scale = TINY if arguments.tiny else LLAMA_3_8B
    directory = Path(tempfile.gettempdir()) / f"anneal-bench-gpu-{'tiny' if arguments.tiny else 'llama-3-8b'}"
    if scale.device == "cuda" and shutil.which("nvidia-smi") is None:
        raise SystemExit("this machine has no GPU: --tiny runs the same script with shapes for two CPU cores")
    directory.mkdir(exist_ok=True)
    results = arguments.results or (directory / "results" if arguments.tiny else RESULTS)
    failed = measure(Bench(scale, directory), arguments.part or list(PARTS), deadline, results)
    print(table(results))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def measure(bench: Bench, parts: Sequence[str], deadline: float, results: Path) -> list[str]:
    """Run one round of the contestants of these parts, or the rest of an unfinished round. Write each result at once.

    Args:
        bench: Runner of the contestants.
        parts: Names in PARTS.
        deadline: Deadline by `time.monotonic()`; the next call runs the contestants that might exceed it.
        results: Directory with the rounds of earlier calls.

    Returns:
        The contestants that failed; their output is printed. The next call retries them.
    """
    needed = dict.fromkeys(name for part in parts for name in PARTS[part].contestants)
    selected = [name for name in needed if bench.scale.device == "cuda" or name != _NEEDS_A_GPU]
    rounds = _rounds(results)
    round_marker = bench.directory / "round"  # ratios must come from one machine
    if not rounds or not round_marker.exists() or set(selected) <= rounds[-1].keys():
        rounds.append({})
        round_marker.touch()
    first = (len(rounds) - 1) % len(selected)
    longest, failed = _FIRST_GUESS_SECONDS, []
    for name in selected[first:] + selected[:first]:
        if name in rounds[-1]:
            continue
        start, runs = time.monotonic(), 2 if name == _RUN_TWICE else 1
        if start + runs * longest > deadline:
            print(f"no time is left for {name}; the same command continues", file=sys.stderr)
            return failed
        try:
            rounds[-1][name] = CONTESTANTS[name](bench)
        except (ContestantFailedError, AssertionError):  # AssertionError: from a supervised run
            traceback.print_exc()
            failed.append(name)
            continue
        longest = max(longest, (time.monotonic() - start) / runs)
        write_report(
            "gpu",
            _summary(rounds),
            [{name: asdict(result) for name, result in round_.items()} for round_ in rounds],
            directory=results,
        )
    return failed


def _rounds(results: Path) -> list[dict[str, Measured]]:
    """Return the measured rounds: contestant -> measurements, in order of execution."""
    file = results / "gpu.json"
    known = json.loads(file.read_text())["rounds"] if file.exists() else []
    return [{name: Measured(**measured) for name, measured in round_.items()} for round_ in known]


def _summary(rounds: Sequence[_Round]) -> dict[str, dict[str, float]]:
    """Return `part: figure` -> median and range over the rounds in which all contestants of the part ran."""
    values: dict[str, list[float]] = {}
    for measured in rounds:
        for name, part in PARTS.items():
            if set(part.contestants) - {_NEEDS_A_GPU} <= measured.keys():
                for figure, value in part.figures(measured).items():
                    values.setdefault(f"{name}: {figure}", []).append(value)
    return {name: spread(figures) | {"rounds": len(figures)} for name, figures in values.items()}


def table(results: Path) -> str:
    """Return a Markdown table with the measurements and targets of every part."""
    summary = _summary(_rounds(results))
    lines = ["| part | figure | median (range) | rounds | target |", "|---|---|---|---|---|"]
    for name, part in PARTS.items():
        for figure, (bound, target) in part.targets.items():
            values = summary.get(f"{name}: {figure}")
            cell = (
                f"{values['median']:,.4g} ({values['lowest']:,.4g} to {values['highest']:,.4g}) | {values['rounds']}"
                if values
                else "not measured | 0"
            )
            lines.append(f"| {name} | {figure} | {cell} | {bound} {target:,g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

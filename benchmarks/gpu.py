"""Speed and memory on one GPU, beside the best peers: `make bench-gpu`, or a part at a time, `benchmarks/gpu.py --part lora`.

Models have random weights of true shapes and rows are made up, so that nothing is downloaded. The contestants of a part run one after
the other, each in a process of its own, in an order that rotates from round to round; ratios are taken within a round. Each call adds
its rounds to benchmarks/results/gpu_PART.json and prints what all of them come to, beside the targets. A round of any part fits ten
minutes of an H200.

`--tiny` takes shapes that two CPU cores train in seconds; its figures say nothing but that the script works.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import RESULTS, spread, write_report
from cookbooks.quickstart.word_problems import TRAIN_KINDS, write_problems
from tests.support.jobs import started

RANK, LEARNING_RATE, SEED = 16, 1e-4, 42
_CHARACTERS_A_TOKEN = 8  # more than any token has: rows are cut to length by tokens
# Tokens of 512 rows of GSM8K as chats (the first 256 of each half, SmolLM2's tokenizer): every 16th, from the shortest to the longest.
# fmt: off
GSM8K_LENGTHS = (
    100, 109, 115, 121, 126, 133, 139, 144, 147, 151, 157, 160, 166, 172, 178, 186,
    191, 197, 203, 208, 213, 220, 229, 236, 245, 255, 264, 280, 287, 309, 333, 386,
)
# fmt: on


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    device: Literal["cuda", "cpu"]
    shape: Mapping[str, Any]
    """Of the model, by LlamaConfig's names."""
    context_length: int
    context_length_full: int
    batch_size: int
    accumulation: int
    steps: int
    warm_up: int
    """Steps at the beginning that are not counted: kernels are compiled in them."""
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
    steps=8,
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
    """What a contestant's steps behind the warm-up came to."""

    step_seconds: float
    """Median."""
    tokens_per_second: float
    """Median over steps; padding not counted."""
    peak_memory_bytes: int
    losses: tuple[float, ...]
    """Of every step."""
    mfu: float | None = None
    weights: str | None = None
    """Checksum of the adapter in the last checkpoint."""


class Bench:
    """Runs contestants in a directory, which keeps the model between calls."""

    def __init__(self, scale: Scale, directory: Path):
        self.scale = scale
        self.directory = directory
        self.model = directory / f"model-{scale.shape['num_hidden_layers']}-layers"
        if not (self.model / "config.json").exists():
            self._run_contestant("make_model", {"shape": dict(scale.shape), "directory": str(self.model)})

    def main(self, **changes: Any) -> Measured:
        """main.py, as a user starts it; `changes` are of the YAML."""
        config, name = self._config(**changes)
        self._run_main(config)
        return self._measured(name)

    def killed(self, **changes: Any) -> Measured:
        """The same, but main.py and its workers get SIGKILL behind the first checkpoint, and the command is sent again."""
        every = max(1, self.scale.steps // 2)
        changes |= {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": every}}
        config, name = self._config(**changes)
        first = self.directory / "runs" / name / "checkpoints" / f"step-{every:06d}" / "MANIFEST.json"
        with started(config) as job:
            job.wait_until(first.exists, "a first checkpoint")
        self._run_main(config)
        return self._measured(name)

    def _run_main(self, config: Path) -> None:
        done = subprocess.run(
            [sys.executable, "main.py", str(config), "--json"], cwd=PROJECT, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"main.py {config} failed:\n{done.stderr}")

    def _measured(self, name: str) -> Measured:
        run = self.directory / "runs" / name
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        steps = [line for line in lines if "loss" in line]
        counted = steps[self.scale.warm_up :]
        manifest = max((run / "checkpoints").glob("*/MANIFEST.json"))
        files = {file["path"]: file["checksum"] for file in json.loads(manifest.read_text())["files"]}
        return Measured(
            statistics.median(map(_step_seconds, counted)),
            statistics.median(line["tokens_per_second"] for line in counted),
            max(line["peak_memory_bytes"] for line in steps),
            tuple(line["loss"] for line in steps),
            weights=files.get("adapter_model.safetensors"),
        )

    def alone(self, **changes: Any) -> Measured:
        """Our trainer under torchrun: no Ray, no bucket, no checkpoints."""
        config, name = self._config(**changes)
        plan = self.directory / f"{name}.plan.json"
        self._run_contestant("plan", {"yaml": str(config), "plan": str(plan)})
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        return self._peer("alone", {"plan": str(plan)}, launcher)

    def peer(self, name: Literal["trl", "unsloth"], *, load_in_4bit: bool = False) -> Measured:
        """A peer's own script, with the settings that `main` has by default."""
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
        tokens = self.scale.batch_size * self.scale.accumulation * self.scale.context_length
        mfu = [value for value in measured.get("mfu", [])[self.scale.warm_up :] if value is not None]
        return Measured(
            seconds,
            tokens / seconds,
            measured["peak_memory_bytes"],
            tuple(measured["losses"]),
            statistics.median(mfu) if mfu else None,
        )

    def _run_contestant(self, name: str, settings: dict[str, Any], launcher: Sequence[str] = ()) -> None:
        file = self.directory / f"{name}-{time.time_ns()}.json"
        file.write_text(json.dumps(settings))
        script = str(PROJECT / "benchmarks" / "gpu_contestants.py")
        variables = {
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "UNSLOTH_COMPILE_LOCATION": str(self.directory / "unsloth"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.directory / "datasets"),
        }
        done = subprocess.run(
            [sys.executable, *launcher, script, name, str(file)],
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise SystemExit(f"{name} {file} failed:\n{done.stdout}\n{done.stderr}")

    def _config(self, **changes: Any) -> tuple[Path, str]:
        """(the YAML, the run's name); the workload is LoRA on rows that fill the context, unless it is changed."""
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
            "seed": SEED,
            "lora_config": {"r": RANK, "lora_alpha": RANK},
            "gradient_checkpointing": "unsloth" if scale.device == "cuda" else True,
            "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 10**6},
            "max_failures": 0,
        }
        file = self.directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings | changes))
        return file, name

    def _rows(self, tokens: int) -> Path:
        """Rows that are cut off at so many tokens."""
        file = self.directory / f"rows-{tokens}.jsonl"
        if not file.exists():
            rows = self.scale.batch_size * self.scale.accumulation * self.scale.steps
            texts = (_text(tokens * _CHARACTERS_A_TOKEN, seed) for seed in range(rows))
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return file

    def gsm8k_rows(self) -> Path:
        """Rows of GSM8K's lengths, enough for every step."""
        file = self.directory / "gsm8k-lengths.jsonl"
        scale = self.scale
        if not file.exists():
            needed = 2 * scale.steps * scale.batch_size * scale.accumulation * scale.context_length
            rows, total = [], 0
            while total < needed:
                tokens = GSM8K_LENGTHS[len(rows) * 7 % len(GSM8K_LENGTHS)]
                rows.append(
                    {"text": _text(tokens * 2, len(rows))}
                )  # a token has two characters here in the mean
                total += tokens
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file


def _text(characters: int, seed: int) -> str:
    lines = write_problems(TRAIN_KINDS, characters // 100 + 1, seed).splitlines()
    messages = (message["content"] for line in lines for message in json.loads(line)["messages"])
    return "\n".join(messages)[:characters]


def _step_seconds(line: Mapping[str, float]) -> float:
    """Without evaluation and saving."""
    return sum(line[f"seconds/{phase}"] for phase in ("data", "forward", "backward", "optimizer", "other"))


Figures = dict[str, float]
Contestants = Mapping[str, Callable[[], Measured]]


@dataclass(frozen=True)
class Part:
    """A row of the table."""

    contestants: Callable[[Bench], Contestants]
    figures: Callable[[Mapping[str, Measured]], Figures]
    targets: Mapping[str, tuple[Literal["at least", "at most"], float]]
    """Figure -> what it must reach."""


def _lora(bench: Bench) -> Contestants:
    return {
        "anneal": bench.main,
        "unsloth": lambda: bench.peer("unsloth"),
        "trl": lambda: bench.peer("trl"),
    }


def _packing(bench: Bench) -> Contestants:
    rows = {"train_path": str(bench.gsm8k_rows())}
    return {
        "packed": lambda: bench.main(**rows, packing=True),
        "unpacked": lambda: bench.main(**rows),
    }


def _full(bench: Bench) -> Contestants:
    changes = {
        "context_length": bench.scale.context_length_full,
        "lora_config": None,
        "optim": "adamw_8bit" if bench.scale.device == "cuda" else "adamw_torch",
    }
    # A checkpoint of it has 50 GB, which would be most of what is measured under main.py.
    return {"anneal": lambda: bench.alone(**changes)}


def _qlora(bench: Bench) -> Contestants:
    return {
        "qlora": lambda: bench.main(load_in_4bit=True),
        "unsloth": lambda: bench.peer("unsloth", load_in_4bit=True),
        "lora": bench.main,
    }


def _ray(bench: Bench) -> Contestants:
    return {"anneal": bench.main, "torchrun": bench.alone}


def _resume(bench: Bench) -> Contestants:
    return {
        "deterministic": lambda: bench.main(deterministic=True),
        "killed": lambda: bench.killed(deterministic=True),
        "plain": bench.main,
    }


def _agreement(bench: Bench) -> Contestants:
    short = {
        "context_length": bench.scale.context_length_full,
        "max_steps": bench.scale.agreeing_steps,
        "gradient_accumulation_steps": 1,
    }
    checkpointing = {"gradient_checkpointing": True}
    kernels = ("torch", "unsloth", "liger") if bench.scale.device == "cuda" else ("torch", "unsloth")
    return {name: lambda name=name: bench.main(**short, **checkpointing, kernels=name) for name in kernels}


def _disagreement(measured: Mapping[str, Measured]) -> Figures:
    """Largest relative difference of a loss from torch's, and how much the mean one grows between the first ten steps and the last."""
    figures = {}
    for name in measured.keys() - {"torch"}:
        pairs = zip(measured[name].losses, measured["torch"].losses, strict=True)
        apart = [(loss - reference) / reference for loss, reference in pairs]
        figures[f"{name}: largest difference of a loss"] = max(map(abs, apart))
        figures[f"{name}: drift of the difference"] = abs(
            statistics.mean(apart[-10:]) - statistics.mean(apart[:10])
        )
    return figures


PARTS = {
    "lora": Part(
        _lora,
        lambda of: {
            "tokens/s": of["anneal"].tokens_per_second,
            "tokens/s / Unsloth's own script": of["anneal"].tokens_per_second
            / of["unsloth"].tokens_per_second,
            "tokens/s / TRL and PEFT": of["anneal"].tokens_per_second / of["trl"].tokens_per_second,
        },
        {
            "tokens/s": ("at least", 13_500),
            "tokens/s / Unsloth's own script": ("at least", 1.0),
            "tokens/s / TRL and PEFT": ("at least", 1.3),
        },
    ),
    "packing": Part(
        _packing,
        lambda of: {
            "real tokens/s / unpacked": of["packed"].tokens_per_second / of["unpacked"].tokens_per_second
        },
        {"real tokens/s / unpacked": ("at least", 2.5)},
    ),
    "full": Part(
        _full,
        lambda of: {"MFU": mfu} if (mfu := of["anneal"].mfu) is not None else {},
        {"MFU": ("at least", 0.57)},
    ),
    "qlora": Part(
        _qlora,
        lambda of: {
            "peak memory / Unsloth's": of["qlora"].peak_memory_bytes / of["unsloth"].peak_memory_bytes,
            "tokens/s / our LoRA": of["qlora"].tokens_per_second / of["lora"].tokens_per_second,
        },
        {"peak memory / Unsloth's": ("at most", 1.05), "tokens/s / our LoRA": ("at least", 0.95)},
    ),
    "ray": Part(
        _ray,
        lambda of: {
            "step time / the same trainer under torchrun": of["anneal"].step_seconds
            / of["torchrun"].step_seconds
        },
        {"step time / the same trainer under torchrun": ("at most", 1.02)},
    ),
    "resume": Part(
        _resume,
        lambda of: {
            "weights are those of a run that was never killed": float(
                of["killed"].weights == of["deterministic"].weights
            ),
            "step time / not deterministic": of["deterministic"].step_seconds / of["plain"].step_seconds,
        },
        {
            "weights are those of a run that was never killed": ("at least", 1),
            "step time / not deterministic": ("at most", 1.1),
        },
    ),
    "agreement": Part(
        _agreement,
        _disagreement,
        {
            f"{name}: {what}": ("at most", 1e-2)
            for name in ("unsloth", "liger")
            for what in ("largest difference of a loss", "drift of the difference")
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS, help="one part; all of them without it")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="shapes for two CPU cores")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    scale = TINY if arguments.tiny else LLAMA_3_8B
    directory = Path(tempfile.gettempdir()) / f"anneal-bench-gpu-{'tiny' if arguments.tiny else 'llama-3-8b'}"
    directory.mkdir(exist_ok=True)
    bench = Bench(scale, directory)
    for name in [arguments.part] if arguments.part else PARTS:
        measure(bench, name, arguments.rounds, arguments.results)
    print(table(arguments.results))


def measure(bench: Bench, name: str, rounds: int, results: Path) -> None:
    """Add rounds of a part to those that were measured before."""
    part, file = PARTS[name], f"gpu_{name}"
    before = results / f"{file}.json"
    measured = json.loads(before.read_text())["rounds"] if before.exists() else []
    contestants = part.contestants(bench)
    for number in range(len(measured), len(measured) + rounds):
        names = list(contestants)
        order = names[number % len(names) :] + names[: number % len(names)]
        of = {contestant: contestants[contestant]() for contestant in order}
        figures = part.figures(of)
        measured.append({"order": order, "figures": figures} | {one: asdict(of[one]) for one in order})
        print(json.dumps(measured[-1]), flush=True)
        summary = {figure: spread([round_["figures"][figure] for round_ in measured]) for figure in figures}
        write_report(file, summary, measured, directory=results)


def table(results: Path) -> str:
    """What was measured of every part beside its targets, in Markdown."""
    lines = ["| part | figure | median (range) | rounds | target |", "|---|---|---|---|---|"]
    for name, part in PARTS.items():
        file = results / f"gpu_{name}.json"
        known = json.loads(file.read_text()) if file.exists() else {"summary": {}, "rounds": []}
        for figure, (bound, target) in part.targets.items():
            values = known["summary"].get(figure)
            shown = (
                f"{values['median']:,.4g} ({values['lowest']:,.4g} to {values['highest']:,.4g})"
                if values
                else "not measured"
            )
            lines.append(f"| {name} | {figure} | {shown} | {len(known['rounds'])} | {bound} {target:,g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

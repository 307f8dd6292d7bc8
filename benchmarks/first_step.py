"""Measure the time to the first step and to chat's first token: `make bench-first-step BASE=DIRECTORY`.

- SmolLM2-135M with LoRA on 2 workers: from the command to the end of the first step, against a bare Ray TorchTrainer, plain TRL
  under torchrun, and an earlier version of this project in another directory (`git worktree add DIRECTORY COMMIT`).
- A tiny model on one worker: CPU seconds of all processes, against the earlier version.
- `main.py chat`: from the command to the first characters of the answer, against the earlier version, and the time that plain
  transformers and PEFT take for the same adapter, and for the base model alone, also against the earlier version.

Each round runs all of them one after the other, in rotating order; ratios are taken within a round.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.cpu_time import cpu_time
from benchmarks.overhead import BATCH_SIZE, WORKERS, run_peer, write_config
from benchmarks.report import rounds_parser, spread, write_report
from cookbooks.quickstart import prepare
from cookbooks.quickstart.word_problems import TRAIN_KINDS, write_problems
from tests.support.tiny_model import make_model
from utils.storage.bucket import sync_to_node
from utils.storage.embedded_bucket import embedded_bucket

_DTYPE = "fp32"  # a step in bf16 takes a minute on a CPU that emulates it, which is no start
_QUESTION, _ANSWER_TOKENS = "Ada has 3 apples and buys 4 more. How many?", 4
_RATIOS = {
    "start": {
        "first_step_to_bare_torch_trainer": ("first_step_seconds", "anneal", "bare_torch_trainer"),
        "first_step_to_torchrun_trl": ("first_step_seconds", "anneal", "torchrun_trl"),
        "first_step_to_before": ("first_step_seconds", "anneal", "before"),
        "cpu_seconds_to_before": ("cpu_seconds", "anneal", "before"),
    },
    "tiny": {
        "tiny_first_step_to_before": ("first_step_seconds", "tiny", "tiny_before"),
        "tiny_cpu_seconds_to_before": ("cpu_seconds", "tiny", "tiny_before"),
    },
    "chat": {
        "chat_first_token_to_before": ("first_token_seconds", "chat", "chat_before"),
        "chat_cpu_seconds_to_before": ("cpu_seconds", "chat", "chat_before"),
        "plain_chat_first_token_to_before": ("first_token_seconds", "plain_chat", "chat_before"),
        "plain_base_model_first_token_to_before": ("first_token_seconds", "plain_base_model", "chat_before"),
    },
}


def main() -> None:
    parser = rounds_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="directory of the earlier version")
    parser.add_argument("--part", choices=list(_RATIOS), action="append", help="default: all")
    options = parser.parse_args()
    prepare.main()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        with embedded_bucket():
            model = sync_to_node(f"{prepare.HOME}/smollm2-135m", directory / "model")
        tiny = make_model(directory / "tiny")
        rows = directory / "train.jsonl"
        rows.write_text(write_problems(TRAIN_KINDS, BATCH_SIZE * WORKERS, 1))
        runs = {
            tree: store_run(tree, directory / f"runs_of_{tree.name}", model)
            for tree in (PROJECT, options.base)
        }
        contestants: dict[str, Callable[[], dict[str, Any]]] = {
            "anneal": lambda: train(PROJECT, directory, model, rows, WORKERS),
            "before": lambda: train(options.base, directory, model, rows, WORKERS),
            "torchrun_trl": lambda: torchrun(directory, model, rows),
            "bare_torch_trainer": lambda: run_peer(
                [sys.executable], ["--ray"], directory, model, rows, 1, _DTYPE
            ),
            "tiny": lambda: train(PROJECT, directory, tiny, rows, 1),
            "tiny_before": lambda: train(options.base, directory, tiny, rows, 1),
            "chat": lambda: chat(PROJECT, runs[PROJECT]),
            "chat_before": lambda: chat(options.base, runs[options.base]),
            "plain_chat": lambda: plain_chat(adapter_of(runs[PROJECT])),
            "plain_base_model": lambda: plain_chat(model),
        }
        for part in options.part or _RATIOS:
            compare(part, contestants, options.rounds)


def compare(part: str, contestants: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> None:
    """Run the contestants of a part in interleaved rounds, and write the report after each round."""
    ratios = _RATIOS[part]
    names = list(dict.fromkeys(name for _, *both in ratios.values() for name in both))
    measured: list[dict[str, Any]] = []
    for number in range(rounds):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        measured.append({"order": order} | {name: contestants[name]() for name in order})
        print(json.dumps(measured[-1]), flush=True)
        summary = {
            name: spread([r[ours][figure] / r[theirs][figure] for r in measured])
            for name, (figure, ours, theirs) in ratios.items()
        }
        write_report(f"first_step_{part}", summary, measured)


def torchrun(directory: Path, model: Path, rows: Path) -> dict[str, Any]:
    """Run plain TRL for one step."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
    return run_peer(launcher, [], directory, model, rows, 1, _DTYPE)


def train(tree: Path, directory: Path, model: Path, rows: Path, workers: int) -> dict[str, Any]:
    """Run main.py of a directory for one step, as a user would, including all checks."""
    config, name = write_config(directory, model, rows, workers, 1, _DTYPE)
    first_step, cpu_seconds, output = timed(tree, ["main.py", str(config), "--json"], "step 1/")
    result = json.loads(output.splitlines()[-1])
    assert result["status"] == "completed", result
    return {
        "first_step_seconds": first_step,
        "cpu_seconds": cpu_seconds,
        "loss": json.loads((directory / "runs" / name / "metrics.jsonl").read_text().splitlines()[0])["loss"],
    }


def store_run(tree: Path, storage: Path, model: Path) -> str:
    """Let the code of a directory store a run with an adapter; return its URI. Earlier versions cannot read today's checkpoints."""
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    program = (
        "from pathlib import Path; from tests.support.trained_runs import store_adapter_run; "
        "from utils.storage.bucket import open_store; "
        f"print(store_adapter_run(open_store({str(storage)!r}), 'trained', Path({str(model)!r}), {lora}, dtype={_DTYPE!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.check_output(
        [sys.executable, "-c", program], cwd=tree, env=environment, text=True
    ).splitlines()[-1]


def chat(tree: Path, run: str) -> dict[str, Any]:
    """Ask a trained model one question with main.py of a directory."""
    question = ["--prompt", _QUESTION, "--max-new-tokens", str(_ANSWER_TOKENS)]
    first_token, cpu_seconds, _ = timed(tree, ["main.py", "chat", run, *question], None)
    return {"first_token_seconds": first_token, "cpu_seconds": cpu_seconds}


def adapter_of(run: str) -> Path:
    """Return the directory of a run's only checkpoint."""
    (adapter,) = Path(run, "checkpoints").iterdir()
    return adapter


def plain_chat(directory: Path) -> dict[str, Any]:
    """Ask the same question with plain transformers and, for an adapter, PEFT."""
    arguments = ["benchmarks/plain_chat.py", str(directory), _QUESTION, str(_ANSWER_TOKENS)]
    first_token, cpu_seconds, _ = timed(PROJECT, arguments, None)
    return {"first_token_seconds": first_token, "cpu_seconds": cpu_seconds}


def timed(tree: Path, arguments: list[str], line: str | None) -> tuple[float, float, str]:
    """Run a program; return (seconds until a line of stderr begins with `line`, or until stdout has text; CPU seconds; stdout)."""
    with cpu_time() as cpu, tempfile.TemporaryFile("w+") as errors:
        began = time.time()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if line else errors,
            preexec_fn=cpu.join,
        )
        assert process.stdout is not None
        seen, output = 0.0, b""
        if line:
            assert process.stderr is not None
            for each in process.stderr:
                if not seen and each.startswith(line.encode()):
                    seen = time.time() - began
        else:
            output = process.stdout.read(1)
            seen = time.time() - began
        output += process.stdout.read()
        errors.seek(0)
        assert process.wait() == 0 and seen, output.decode() + errors.read()
    return seen, cpu.seconds_at_end, output.decode()


if __name__ == "__main__":
    main()

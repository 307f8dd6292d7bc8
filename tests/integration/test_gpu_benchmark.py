"""Tests of benchmarks/gpu.py: calls continue, time limits hold, and every contestant trains with shapes for two CPU cores.

`make test-kernels` runs every contestant (ALL_KERNELS=1).
"""

import hashlib
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer

from benchmarks import gpu, gpu_processes, gpu_runs
from benchmarks.gpu import measure
from benchmarks.gpu_pages import PAGES, generated, status, table
from benchmarks.gpu_parts import BF16_EPSILON, CONTESTANTS, PARTS, Contestant, Target, number
from benchmarks.gpu_processes import ContestantFailedError, DeadlineError
from benchmarks.gpu_results import Origin, Results, ResultsError, figures, locked
from benchmarks.gpu_runs import GSM8K_LENGTHS, ON_CPU, ON_GPU, Bench, Measured
from benchmarks.gpu_workloads import GPU, SHAPES
from benchmarks.report import RESULTS, find_gpu
from tests.support.grids import only_in_test_kernels
from tests.support.jobs import PROJECT, environment
from tests.support.kernel_processes import triton_directory
from tests.support.tiny_model import make_tokenizer


class FakeRuns:
    """Fake contestants, each with one second per step: `names` holds those of the latest call in order of execution."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch):
        self.names: list[str] = []
        self.outcome = gpu.Outcome()
        self.origin = Origin("real", "NVIDIA H200", "abc", {"torch": "2.11.0"})
        self.directory = directory
        self._patch = monkeypatch
        self.models: list[str] = []
        monkeypatch.setattr(Bench, "model", lambda _, shape: self.models.append(shape))
        for name in CONTESTANTS:
            self.replace(name, lambda name=name: self.measure(name))

    def measure(self, name: str) -> Measured:
        self.names.append(name)
        return Measured(1.0, (1.0,) * 10, 13_512.0 + 100 * len(self.names), 10, (2.0,) * 20, (1.0,) * 20)

    def replace(self, name: str, run: Callable[[], Measured], seconds: float | None = None) -> None:
        old = CONTESTANTS[name]
        fake = Contestant(
            lambda _: run(), old.seconds if seconds is None else seconds, needs_gpu=old.needs_gpu
        )
        self._patch.setitem(gpu.CONTESTANTS, name, fake)

    def run(self, *parts: str, seconds: float = math.inf) -> list[str]:
        self.names.clear()
        self.models.clear()
        bench = Bench(ON_GPU, self.directory, self.directory)
        deadline = time.monotonic() + seconds
        self.outcome = measure(bench, parts or list(PARTS), deadline, self.results, self.origin)
        return list(self.names)

    @property
    def results(self) -> Results:
        return Results(self.directory / "results")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    return FakeRuns(tmp_path, monkeypatch)


def test_each_contestant_runs_once_in_order_of_worth(runs: FakeRuns):
    first = runs.run()
    assert sorted(first) == sorted(CONTESTANTS)
    assert first.index("step of torch") < first.index("lora") < first.index("packed") < first.index("full")
    assert "| qlora | peak memory / Unsloth's | " in table(runs.results)
    assert sorted(runs.run()) == sorted(CONTESTANTS), "a complete round is followed by another"
    assert len(runs.results.rounds) == 2


def test_next_call_continues_where_the_machine_was_lost(runs: FakeRuns):
    def lose() -> Measured:
        raise SystemExit("the machine was terminated")

    runs.replace("lora of TRL and PEFT", lose)
    with pytest.raises(SystemExit):
        runs.run("lora", "packing")
    assert runs.names == ["lora", "lora of Unsloth's own script"]
    lines = table(runs.results).splitlines()
    assert "| lora | tokens/s | 13,612 | 1 | at least 13,500 | hit |" in lines
    assert any("TRL and PEFT" in line and line.endswith("| not measured |") for line in lines)
    runs.replace("lora of TRL and PEFT", lambda: runs.measure("lora of TRL and PEFT"))
    assert runs.run("lora", "packing")[0] == "lora of TRL and PEFT"


def test_failed_contestant_stops_no_other_and_runs_last_in_the_next_call(
    runs: FakeRuns, capsys: pytest.CaptureFixture[str]
):
    def fail() -> Measured:
        raise ContestantFailedError("out of memory\nmore")

    runs.replace("packed", fail)
    assert runs.run("packing", "full", seconds=200) == ["unpacked", "unpacked, 16 rows per batch", "full"]
    assert runs.outcome.failed == ["packed"]
    assert "out of memory" in capsys.readouterr().err
    assert runs.results.rounds[0].failed == {"packed": "out of memory"}
    assert "| failed: packed |" in table(runs.results)
    runs.replace("packed", lambda: runs.measure("packed"))
    assert runs.run("packing", "lora")[-1] == "packed"
    assert runs.results.rounds[0].failed == {}


def test_unreadable_metrics_fail_one_contestant_only(runs: FakeRuns):
    runs.replace("packed", lambda: json.loads("{"))
    assert runs.run("packing") == ["unpacked", "unpacked, 16 rows per batch"]
    assert runs.outcome.failed == ["packed"]
    assert "JSONDecodeError" in runs.results.rounds[0].failed["packed"]


@pytest.mark.parametrize(
    "change", [{"gpu": "NVIDIA H100"}, {"commit": "def"}, {"versions": {"torch": "2.13.0"}}]
)
def test_another_gpu_commit_or_version_starts_its_own_rounds(runs: FakeRuns, change: dict):
    runs.run("packing", "full")
    first = runs.origin
    runs.origin = replace(first, **change)
    assert len(runs.run("packing")) == 3
    assert [round_.origin for round_ in runs.results.latest("real")] == [runs.origin]
    runs.origin = first
    assert runs.run("ray") == ["packed under torchrun"]
    assert [round_.origin for round_ in runs.results.latest("real")] == [first]


def test_oldest_incomplete_round_is_filled_first(runs: FakeRuns):
    runs.run("packing", "full")
    runs.run("full")
    runs.run("full", "ray")
    first, second = runs.results.rounds
    assert {"packed", "full", "packed under torchrun"} <= first.measured.keys()
    assert list(second.measured) == ["full"]


def test_contestant_without_enough_time_is_left_to_the_next_call(
    runs: FakeRuns, capsys: pytest.CaptureFixture[str]
):
    assert runs.run("packing", seconds=25) == []
    assert runs.outcome.left == {"packed": 45, "unpacked": 55, "unpacked, 16 rows per batch": 55}
    assert "packed (about 45 s): rerun the same command" in capsys.readouterr().out
    assert runs.run("lora", "full", seconds=55) == ["lora of TRL and PEFT"], "a shorter one still runs"


def test_contestant_that_the_end_of_the_budget_stops_has_not_failed(runs: FakeRuns):
    def exceed() -> Measured:
        time.sleep(0.4)
        raise DeadlineError("stopped at its time limit")

    runs.replace("full", exceed, seconds=0)
    runs.run("full", seconds=0.2)
    assert (runs.outcome.failed, list(runs.outcome.left)) == ([], ["full"])
    runs.run("full")
    assert runs.outcome.failed == ["full"], "its own time limit"


def test_parts_without_times_run_at_once():
    first, lora, methods = gpu._groups(["resume", "full", "losses", "methods"])
    assert sorted(first) == sorted([*PARTS["resume"].contestants, *PARTS["losses"].contestants])
    assert lora == ["full"]
    assert sorted(methods) == sorted(PARTS["methods"].contestants)
    assert list(gpu._groups(["resume", "full"])) == [["deterministic, killed", "deterministic"], ["full"]]
    assert gpu.estimated_seconds(["deterministic, killed", "deterministic"], 16) == 190
    assert gpu.estimated_seconds(["deterministic, killed", "deterministic"], 2) == 300


def test_models_of_timed_parts_are_made_while_nothing_is_timed(runs: FakeRuns):
    runs.run("step", "lora", "full")
    assert runs.models == ["8b", "3b"]
    runs.run("lora", "full")
    assert runs.models == []
    runs.run("step")
    runs.run("losses", "lora")
    assert runs.models == [], "all contestants of `lora` were measured"


def test_documented_seconds_are_the_estimates():
    page = (PROJECT / "docs" / "performance.md").read_text("utf-8")
    first, methods = (
        gpu.estimated_seconds(group, 16) for group in gpu._groups(list(PARTS)) if len(group) > 1
    )
    assert f"| `step`, `resume`, `losses` | {first:g} |" in page
    assert f"| `methods` | {methods:g} |" in page
    total = first + methods
    seen: set[str] = set()
    for name, part in PARTS.items():
        if part.timed:
            seconds = sum(CONTESTANTS[name].seconds for name in part.contestants if name not in seen)
            seen |= set(part.contestants)
            assert f"| `{name}` | {seconds:g} |" in page
            total += seconds
    assert f"All parts take {total:g} s" in page
    assert f"({total / 60:.0f} minutes, by estimate)" in (PROJECT / "Makefile").read_text("utf-8")


def _run(command: list[str], log: Path, seconds: float, **options: object) -> bool:
    return gpu_processes.run(
        command,
        environment={},
        directory=log.parent,
        log=log,
        deadline=time.monotonic() + seconds,
        stopped=threading.Event(),
        **options,  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.slow
def test_contestant_is_stopped_at_its_time_limit_with_its_daemons(tmp_path: Path):
    daemon = "import subprocess as s; daemon = s.Popen(['sleep', '60'], start_new_session=True)"
    script = f"{daemon}; print('daemon', daemon.pid, flush=True); daemon.wait()"
    with pytest.raises(ContestantFailedError, match=r"(?s)time limit.*\ndaemon \d+$") as raised:
        _run([sys.executable, "-c", script], tmp_path / "log", 10)
    assert not _is_alive(int(str(raised.value).split()[-1]))


def test_process_is_killed_once_a_condition_holds(tmp_path: Path):
    log = tmp_path / "log"
    script = "import os, time; print('ready', os.getpid(), flush=True); time.sleep(60)"
    assert not _run(
        [sys.executable, "-c", script], log, 60, until=lambda: log.exists() and "\nready" in log.read_text()
    )
    assert not _is_alive(int(log.read_text().split()[-1]))
    assert _run([sys.executable, "-c", "print(1)"], log, 60)
    with pytest.raises(ContestantFailedError, match=r"(?s)exit code 3.*\nreason"):
        _run([sys.executable, "-c", "print('reason'); raise SystemExit(3)"], log, 60)


def test_processes_of_a_killed_call_are_killed_by_the_next(tmp_path: Path):
    script = f"""
import sys, threading
from pathlib import Path
from benchmarks.gpu_processes import run
run(["sleep", "60"], environment={{}}, directory=Path({str(tmp_path)!r}), log=Path({str(tmp_path)!r}) / "log",
    deadline=float("inf"), stopped=threading.Event())
"""
    call = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT)
    while not (children := psutil.Process(call.pid).children()):
        time.sleep(0.02)
    call.kill()
    call.wait()
    assert gpu_processes.kill_left(tmp_path / "other") == 0
    assert _is_alive(children[0].pid)
    assert gpu_processes.kill_left(tmp_path) == 1
    assert not _is_alive(children[0].pid)


def test_directory_of_another_call_is_rejected(tmp_path: Path):
    with (
        locked(tmp_path / "results", "--results"),
        pytest.raises(ResultsError, match=r"in use.*--results"),
        locked(tmp_path / "results", "--results"),
    ):
        pass
    with locked(tmp_path / "results", "--results"):
        pass


def test_directory_that_cannot_be_written_is_rejected(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ResultsError, match=r"file.*cannot be written.*--results"),
        locked(tmp_path / "file", "--results"),
    ):
        pass


@pytest.mark.parametrize("content", ["{", "[]", '{"machine": {}, "rounds": [{"gpu": null}]}', "\udce9"])
def test_damaged_or_foreign_results_are_rejected(content: str, tmp_path: Path):
    (tmp_path / "gpu.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ResultsError, match=r"gpu\.json.*restore it") as raised:
        Results(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'No devices were found'", "No devices were found"),
        ("echo 'No devices were found'; exit 6", "No devices were found"),
        ("echo 'driver mismatch' >&2; exit 18", "driver mismatch"),
        ("exit 0", "printed nothing"),
        ("echo 'NVIDIA H200'; echo 'NVIDIA H200'", None),
    ],
)
def test_gpu_is_found_only_if_nvidia_smi_lists_it(
    script: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    name, cause = find_gpu()
    assert name == (None if reason else "NVIDIA H200")
    assert (reason or "") in cause


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "nan"], "--budget"),
        (["--budget", "0"], "--budget"),
        (["--budget", "-3"], "--budget"),
        (["--budget", "inf"], "--budget"),
        (["--simulate", "--part", "lora"], "part step"),
        (["--simulate"], "Triton"),
        (["--tiny", "--simulate"], "not allowed"),
        (["--tiny", "--results", "benchmarks/results"], "figures of a GPU"),
    ],
)
def test_arguments_that_cannot_be_used_are_rejected(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit) as raised:
        gpu.main()
    assert raised.value.code == 2
    assert words in capsys.readouterr().err


def _script(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "benchmarks/gpu.py", "--tiny", "--results", str(directory / "results"), *arguments],
        cwd=PROJECT,
        env=environment() | {"TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_budget_that_is_too_small_is_named(tmp_path: Path):
    call = _script(tmp_path, "--part", "losses", "--budget", "0.0001")
    _, errors = call.communicate()
    assert call.returncode == 1
    assert errors.startswith("nothing was measured: ")
    assert "raise --budget" in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_stopped_call_leaves_no_process(number: int, tmp_path: Path):
    call = _script(tmp_path, "--part", "full")
    assert call.stdout
    assert "started" in call.stdout.readline()
    while not (children := psutil.Process(call.pid).children()):
        time.sleep(0.02)
    call.send_signal(number)
    _, errors = call.communicate()
    assert call.returncode == 128 + number
    assert errors == "stopped: rerun the same command to continue\n"
    assert not _is_alive(children[0].pid)


def _is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_the_figures_of_the_results_file(page: str):
    """If this fails, call `benchmarks/gpu.py --pages`."""
    assert (PROJECT / page).read_text("utf-8") == generated(page, Results(RESULTS))


def test_pages_are_generated_from_results(runs: FakeRuns, tmp_path: Path):
    without = Results(tmp_path / "none")
    assert generated("docs/performance.md", without).count("Not measured") == 1
    assert "**Never run on a GPU**" in generated("README.md", without)
    runs.run("lora", "qlora")
    performance, readme = generated("docs/performance.md", runs.results), generated("README.md", runs.results)
    assert "Not measured" not in performance
    assert "| lora | tokens/s | 13,612 | 1 | at least 13,500 | hit |" in performance
    assert "6 of 45 figures measured" in readme
    assert "3 targets met, 0 failed" in readme
    assert all(len(line) <= 160 for line in (performance + readme).splitlines() if line[:1] != "|")
    assert "**Never run on a GPU**" not in readme
    assert "DeepSpeed" in status(runs.results)
    runs.run("methods")
    assert "DeepSpeed" not in status(runs.results)


@pytest.mark.parametrize("change", [{"shapes": "tiny", "gpu": None}, {"shapes": "simulated"}, {"gpu": None}])
def test_only_figures_of_a_gpu_reach_the_pages(change: dict, runs: FakeRuns):
    runs.origin = replace(runs.origin, **change)
    runs.run("full")
    assert "**Never run on a GPU**" in generated("README.md", runs.results)
    assert generated("docs/performance.md", runs.results).count("Not measured") == 1


def test_failed_contestants_do_not_count_as_a_run_on_a_gpu(runs: FakeRuns):
    def fail() -> Measured:
        raise ContestantFailedError("out of memory")

    for name in CONTESTANTS:
        runs.replace(name, fail)
    runs.run()
    assert "**Never run on a GPU**" in generated("README.md", runs.results)
    runs.replace("lora", lambda: runs.measure("lora"))
    runs.run("lora")
    assert "1 of 45 figures measured" in generated("README.md", runs.results)
    assert "43 failed" in generated("README.md", runs.results)


@pytest.mark.parametrize(
    ("value", "text"),
    [(13612.4, "13,612"), (1234.5, "1,234"), (0.98765, "0.9877"), (3.2e-6, "3.2e-06"), (2**-8, "2^-8")],
)
def test_figures_have_all_digits_before_the_point(value: float, text: str):
    assert number(value) == text


@pytest.mark.parametrize(
    ("target", "text", "inside", "outside"),
    [
        (Target(13_500), "at least 13,500", 13_500, 13_499),
        (Target(most=1.05), "at most 1.05", 1.05, 1.06),
        (Target(0.9, 1.1), "0.9 to 1.1", 1.0, 0.89),
    ],
)
def test_targets_include_the_values_of_their_range(target: Target, text: str, inside: float, outside: float):
    assert str(target) == text
    assert target.includes(inside)
    assert not target.includes(outside)


def test_shapes_have_the_parameters_of_their_models():
    """Billions of parameters, from the model cards of Llama 3.1 and 3.2."""
    assert {name: round(_parameters(name) / 1e9, 2) for name in ("8b", "3b", "1b")} == {
        "8b": 8.03,
        "3b": 3.21,
        "1b": 1.24,
    }
    assert {workload.shape for workload in GPU.values()} <= SHAPES.keys()


def _parameters(name: str) -> int:
    shape = SHAPES[name]
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * shape["intermediate_size"] + 2 * hidden
    return layers * layer + hidden + shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)


def test_rows_have_the_lengths_of_gsm8k(tmp_path: Path):
    model = tmp_path / "model-tiny"
    make_tokenizer().save_pretrained(model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lines = Bench(ON_CPU, tmp_path, tmp_path).gsm8k_rows("rows").read_text().splitlines()
    lengths = [len(tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)) for line in lines]
    longest = ON_CPU.workloads["rows"].context_length
    assert len(lengths) > 10
    assert set(lengths) <= {min(length, longest) for length in GSM8K_LENGTHS}


def test_pairs_prefer_the_answer_to_the_question(tmp_path: Path):
    bench = Bench(ON_CPU, tmp_path, tmp_path)
    chats, pairs = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (bench.chats("methods"), bench.pairs("methods"))
    )
    assert [[*pair["prompt"], *pair["chosen"]] for pair in pairs] == [chat["messages"] for chat in chats]
    assert all(pair["rejected"] != pair["chosen"] for pair in pairs)


@pytest.mark.parametrize(("committed", "exited"), [((2, 4), False), ((2, 4), True), ((2,), True)])
def test_run_that_finished_before_it_was_killed_fails(
    committed: tuple[int, ...], exited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(_: Bench, command: list[str], name: str, **options: object) -> bool:
        for step in committed:
            checkpoint = tmp_path / "runs" / name / "checkpoints" / f"step-{step:06d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "MANIFEST.json").touch()
        return exited

    monkeypatch.setattr(Bench, "model", lambda *_: tmp_path)
    monkeypatch.setattr(Bench, "_run", run)
    with pytest.raises(ContestantFailedError, match="finished before it could be killed"):
        Bench(ON_CPU, tmp_path, tmp_path).killed("methods")


def test_incomplete_model_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model-tiny").mkdir()
    (tmp_path / "model-tiny" / "config.json").touch()  # transformers writes it before the weights
    made: list[str] = []
    monkeypatch.setattr(gpu_runs.Bench, "_run_contestant", lambda self, name, *_: made.append(name))
    Bench(ON_CPU, tmp_path, tmp_path).model("tiny")
    assert made == ["make_model"]


def test_measurements_of_a_run_exclude_the_warm_up(tmp_path: Path):
    run = tmp_path / "runs" / "lora-1"
    phases = ("data", "forward", "backward", "optimizer", "evaluation", "saving", "upload_stall", "other")
    steps = [
        {f"seconds/{phase}": step for phase in phases}
        | {"loss": 5 - step, "grad_norm": 0.1 * step, "mfu": 0.1 * step, "tokens_per_second": 10 * step}
        | {"peak_memory_bytes": 100 + step}
        for step in (1, 2, 3, 4)
    ]
    for checkpoint in ("step-000002", "step-000004"):
        (run / "checkpoints" / checkpoint).mkdir(parents=True)
        (run / "checkpoints" / checkpoint / "MANIFEST.json").write_text("{}")
        (run / "checkpoints" / checkpoint / "adapter_model.safetensors").write_text(checkpoint)
    lines = [{"eval_loss": 1.0, "step": 0}, *steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bench = Bench(ON_CPU, tmp_path, tmp_path)
    measured = bench._measured("lora-1", "lora", 90)
    assert measured.step_seconds == 3 * 5
    assert measured.every_step_seconds == (5, 10, 15, 20)
    assert (measured.tokens_per_second, measured.peak_memory_bytes, measured.mfu) == (
        30,
        104,
        pytest.approx(0.3),
    )
    assert measured.estimated_bytes == 90
    assert measured.weights == hashlib.sha256(b"step-000004").hexdigest()
    assert measured.losses == (4, 3, 2, 1)


def _benchmark(directory: Path, *arguments: str, **variables: str) -> tuple[dict[str, dict], str]:
    """Run the script; return the measurements of its round, and its output."""
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--results", str(directory), *arguments],
        cwd=PROJECT,
        # Ray's sockets need short paths.
        env=environment() | {"TMPDIR": str(directory), "RAY_TMPDIR": "/tmp"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (round_,) = json.loads((directory / "gpu.json").read_text())["rounds"]
    return round_["measured"], done.stdout


@only_in_test_kernels
@pytest.mark.timeout(3600)
def test_every_contestant_runs_and_appears_in_the_table(tmp_path: Path):
    measured, output = _benchmark(tmp_path, "--tiny")
    on_cpu = {name for name, contestant in CONTESTANTS.items() if not contestant.needs_gpu}
    assert measured.keys() == on_cpu
    for result in measured.values():
        assert result["step_seconds"] > 0
        assert result["losses"]
    unmeasured = [line for line in output.splitlines() if line.endswith("| not measured |")]
    # MFU and the memory of a GPU are not measured on CPU, and Liger's kernels need a GPU.
    assert all("MFU" in line or "estimated memory" in line or "liger" in line.lower() for line in unmeasured)
    assert measured["lora"]["estimated_bytes"] > 0
    assert measured["deterministic"]["weights"] == measured["deterministic, killed"]["weights"]
    for part, figure, values in figures(Results(tmp_path).latest("tiny")):
        if part == "methods" and values:
            assert figure.target.includes(values["median"]), figure.name


@only_in_test_kernels
@pytest.mark.timeout(3600)
def test_first_step_on_a_simulated_gpu_has_the_loss_of_the_cpu(tmp_path: Path):
    measured, _ = _benchmark(tmp_path, "--simulate", PYTHONPATH=str(triton_directory()))
    assert measured.keys() == set(PARTS["step"].contestants)
    rounds = Results(tmp_path).latest("simulated")
    values_of = {figure.name: values for part, figure, values in figures(rounds) if part == "step"}
    for name, values in values_of.items():
        assert values
        assert values["median"] <= (BF16_EPSILON if name.startswith("loss") else 0.1), name

"""Tests of benchmarks/gpu.py: rounds continue across calls, and every contestant trains with shapes for two CPU cores.

`make test-kernels` runs every contestant (ALL_KERNELS=1).
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks import gpu
from benchmarks.gpu import (
    CONTESTANTS,
    GSM8K_LENGTHS,
    PARTS,
    TINY,
    Bench,
    ContestantFailedError,
    Measured,
    measure,
    table,
)
from tests.support.jobs import PROJECT, environment
from tests.support.tiny_model import make_tokenizer


class FakeRounds:
    """Rounds of fake contestants: `names` holds those of the latest call in order of execution, each with one second per step."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch):
        self.names: list[str] = []
        self.failed: list[str] = []
        self.results = directory / "results"
        (directory / "model-2-layers").mkdir(parents=True)
        (directory / "model-2-layers" / "tokenizer.json").touch()
        self.bench = Bench(TINY, directory)
        for name in CONTESTANTS:
            monkeypatch.setitem(gpu.CONTESTANTS, name, lambda _, name=name: self._run(name))

    def _run(self, name: str) -> Measured:
        self.names.append(name)
        return Measured(1.0, (1.0,) * 10, 100.0 * len(self.names), 10, (2.0,) * 10)

    def run_round(self, *parts: str, ends: float = math.inf) -> list[str]:
        self.names.clear()
        self.failed = measure(self.bench, parts or list(PARTS), ends, self.results)
        return list(self.names)


@pytest.fixture
def rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRounds:
    return FakeRounds(tmp_path, monkeypatch)


def test_round_runs_each_contestant_once_in_rotated_order(rounds: FakeRounds):
    on_cpu = [name for name in CONTESTANTS if name != "losses of liger"]
    first, second = rounds.run_round(), rounds.run_round()
    assert sorted(first) == sorted(second) == sorted(on_cpu)
    assert second == first[1:] + first[:1]
    assert "| qlora | tokens/s / our LoRA | " in table(rounds.results)
    assert "not measured" not in "".join(
        line for line in table(rounds.results).splitlines() if "MFU" not in line and "liger" not in line
    )


def test_interrupted_round_continues_with_the_remaining_contestants(
    rounds: FakeRounds, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(_: Bench) -> Measured:
        raise SystemExit("the machine was terminated")

    monkeypatch.setitem(gpu.CONTESTANTS, "lora of TRL and PEFT", interrupt)
    with pytest.raises(SystemExit):
        rounds.run_round("lora", "packing")
    assert rounds.names == ["lora", "lora of Unsloth's own script"]
    assert "| lora | tokens/s | not measured" in table(rounds.results)
    monkeypatch.setitem(
        gpu.CONTESTANTS, "lora of TRL and PEFT", lambda _: rounds._run("lora of TRL and PEFT")
    )
    assert rounds.run_round("lora", "packing") == ["lora of TRL and PEFT", "packed", "unpacked"]
    assert "| lora | tokens/s | 100 (100 to 100) | 1 | at least 13,500 |" in table(rounds.results)


def test_failed_contestant_does_not_stop_the_others(
    rounds: FakeRounds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(_: Bench) -> Measured:
        raise ContestantFailedError("it ran out of memory")

    monkeypatch.setitem(gpu.CONTESTANTS, "packed", fail)
    assert rounds.run_round("packing", "ray") == ["unpacked", "lora", "lora under torchrun"]
    assert rounds.failed == ["packed"]
    assert "out of memory" in capsys.readouterr().err
    monkeypatch.setitem(gpu.CONTESTANTS, "packed", lambda _: rounds._run("packed"))
    assert (rounds.run_round("packing", "ray"), rounds.failed) == (["packed"], [])


def test_another_machine_starts_its_own_round(
    rounds: FakeRounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rounds.run_round("packing")
    other_machine = FakeRounds(tmp_path / "other-machine", monkeypatch)
    other_machine.results = rounds.results
    assert sorted(other_machine.run_round("packing", "ray")) == sorted([
        "packed", "unpacked", "lora", "lora under torchrun",
    ])  # fmt: skip


def test_contestant_without_enough_time_is_not_started(
    rounds: FakeRounds, capsys: pytest.CaptureFixture[str]
):
    assert rounds.run_round("packing", ends=time.monotonic() + 60) == []
    assert "no time" in capsys.readouterr().err
    assert rounds.run_round("packing", ends=time.monotonic() + 600) == ["packed", "unpacked"]
    # This contestant consists of two runs.
    assert "deterministic, killed" not in rounds.run_round("resume", ends=time.monotonic() + 300)


def test_rows_have_the_lengths_of_gsm8k(tmp_path: Path):
    model = tmp_path / "model-2-layers"
    make_tokenizer().save_pretrained(model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lines = Bench(TINY, tmp_path).gsm8k_rows().read_text().splitlines()
    lengths = [len(tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)) for line in lines]
    assert len(lengths) > len(GSM8K_LENGTHS)
    assert sorted(lengths[: len(GSM8K_LENGTHS)]) == sorted(GSM8K_LENGTHS)


def test_incomplete_model_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model-2-layers").mkdir()
    (tmp_path / "model-2-layers" / "config.json").touch()  # transformers writes it before the weights
    made: list[str] = []
    monkeypatch.setattr(Bench, "_run_contestant", lambda self, name, settings: made.append(name))
    Bench(TINY, tmp_path)
    assert made == ["make_model"]


@pytest.mark.skipif(not os.environ.get("ALL_KERNELS"), reason="`make test-kernels` runs it")
def test_every_contestant_runs_and_appears_in_the_table(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--tiny", "--results", str(tmp_path)],
        cwd=PROJECT,
        env=environment() | {"TMPDIR": str(tmp_path), "RAY_TMPDIR": "/tmp"},  # Ray's sockets need short paths
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (round_,) = json.loads((tmp_path / "gpu.json").read_text())["rounds"]
    assert round_.keys() == CONTESTANTS.keys() - {"losses of liger"}
    for measured in round_.values():
        assert measured["step_seconds"] > 0
        assert measured["losses"]
    table_lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    # MFU is not measured on CPU, and Liger's kernels need a GPU.
    unmeasured = [line for line in table_lines if "not measured" in line]
    assert all("| MFU" in line or "| liger" in line for line in unmeasured)
    assert len(table_lines) > len(unmeasured)

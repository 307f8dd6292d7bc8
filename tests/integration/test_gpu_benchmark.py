"""benchmarks/gpu.py: how its rounds go on from call to call, and with shapes that two CPU cores train every contestant.

`make test-kernels` runs the latter (ALL_KERNELS=1).
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


class Ran:
    """Which contestants ran, in their order; each a second a step, but the first of all."""

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

    def again(self, *parts: str, ends: float = math.inf) -> list[str]:
        self.names.clear()
        self.failed = measure(self.bench, parts or list(PARTS), ends, self.results)
        return list(self.names)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ran:
    return Ran(tmp_path, monkeypatch)


def test_a_round_has_each_contestant_once_and_begins_with_another(ran: Ran):
    on_cpu = [name for name in CONTESTANTS if name != "losses of liger"]
    first, second = ran.again(), ran.again()
    assert sorted(first) == sorted(second) == sorted(on_cpu)
    assert second == first[1:] + first[:1]
    assert "| qlora | tokens/s / our LoRA | " in table(ran.results)
    assert "not measured" not in "".join(
        line for line in table(ran.results).splitlines() if "MFU" not in line and "liger" not in line
    )


def test_a_round_that_was_cut_short_is_gone_on_with(ran: Ran, monkeypatch: pytest.MonkeyPatch):
    def breaks(_: Bench) -> Measured:
        raise SystemExit("the machine was taken away")

    monkeypatch.setitem(gpu.CONTESTANTS, "lora of TRL and PEFT", breaks)
    with pytest.raises(SystemExit):
        ran.again("lora", "packing")
    assert ran.names == ["lora", "lora of Unsloth's own script"]
    assert "| lora | tokens/s | not measured" in table(ran.results)
    monkeypatch.setitem(gpu.CONTESTANTS, "lora of TRL and PEFT", lambda _: ran._run("lora of TRL and PEFT"))
    assert ran.again("lora", "packing") == ["lora of TRL and PEFT", "packed", "unpacked"]
    assert "| lora | tokens/s | 100 (100 to 100) | 1 | at least 13,500 |" in table(ran.results)


def test_one_that_fails_keeps_no_other_from_being_measured(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fails(_: Bench) -> Measured:
        raise ContestantFailedError("it ran out of memory")

    monkeypatch.setitem(gpu.CONTESTANTS, "packed", fails)
    assert ran.again("packing", "ray") == ["unpacked", "lora", "lora under torchrun"]
    assert ran.failed == ["packed"]
    assert "out of memory" in capsys.readouterr().err
    monkeypatch.setitem(gpu.CONTESTANTS, "packed", lambda _: ran._run("packed"))
    assert (ran.again("packing", "ray"), ran.failed) == (["packed"], [])


def test_another_machine_begins_a_round_of_its_own(ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran.again("packing")
    elsewhere = Ran(tmp_path / "elsewhere", monkeypatch)
    elsewhere.results = ran.results
    assert sorted(elsewhere.again("packing", "ray")) == sorted([
        "packed", "unpacked", "lora", "lora under torchrun",
    ])  # fmt: skip


def test_nothing_is_begun_that_has_no_time(ran: Ran, capsys: pytest.CaptureFixture[str]):
    assert ran.again("packing", ends=time.monotonic() + 60) == []
    assert "no time" in capsys.readouterr().err
    assert ran.again("packing", ends=time.monotonic() + 600) == ["packed", "unpacked"]
    assert "deterministic, killed" not in ran.again("resume", ends=time.monotonic() + 300)  # it is two runs


def test_rows_are_as_long_as_those_of_gsm8k(tmp_path: Path):
    model = tmp_path / "model-2-layers"
    make_tokenizer().save_pretrained(model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lines = Bench(TINY, tmp_path).gsm8k_rows().read_text().splitlines()
    lengths = [len(tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)) for line in lines]
    assert len(lengths) > len(GSM8K_LENGTHS)
    assert sorted(lengths[: len(GSM8K_LENGTHS)]) == sorted(GSM8K_LENGTHS)


def test_a_model_that_was_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model-2-layers").mkdir()
    (tmp_path / "model-2-layers" / "config.json").touch()  # transformers writes it before the weights
    made: list[str] = []
    monkeypatch.setattr(Bench, "_run_contestant", lambda self, name, settings: made.append(name))
    Bench(TINY, tmp_path)
    assert made == ["make_model"]


@pytest.mark.skipif(not os.environ.get("ALL_KERNELS"), reason="`make test-kernels` runs it")
def test_every_contestant_runs_and_is_shown(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--tiny", "--results", str(tmp_path)],
        cwd=PROJECT,
        env=environment() | {"TMPDIR": str(tmp_path), "RAY_TMPDIR": "/tmp"},  # Ray's sockets want short paths
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (round_,) = json.loads((tmp_path / "gpu.json").read_text())["rounds"]
    assert round_.keys() == CONTESTANTS.keys() - {"losses of liger"}
    for measured in round_.values():
        assert measured["step_seconds"] > 0
        assert measured["losses"]
    shown = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    # No MFU on CPU, and Liger's kernels need a GPU.
    unmeasured = [line for line in shown if "not measured" in line]
    assert all("| MFU" in line or "| liger" in line for line in unmeasured)
    assert len(shown) > len(unmeasured)

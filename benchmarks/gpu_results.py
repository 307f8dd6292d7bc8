"""Results of the GPU benchmark in benchmarks/results/gpu.json: rounds, each with the GPU, the packages and the commit it ran with."""

import fcntl
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from benchmarks.gpu_parts import PARTS, Figure
from benchmarks.gpu_processes import PROJECT
from benchmarks.gpu_runs import Measured, Shapes
from benchmarks.report import spread, write_whole

_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "ray",
    "unsloth",
    "liger-kernel",
    "bitsandbytes",
    "triton",
)
# A commit of results or of documentation does not start a round.
_MEASURED_CODE = (
    "main.py",
    "benchmarks/*.py",
    "configs",
    "pyproject.toml",
    "requirements",
    "runs",
    "training",
    "utils",
)


class ResultsError(Exception):
    """An error of a directory or file of results, with its fix, in one line."""


@dataclass(frozen=True)
class Origin:
    """The conditions of a round: only rounds with the same ones may be shown together."""

    shapes: Shapes
    gpu: str | None
    commit: str | None
    """The last commit of the measured code, with "-dirty" after a change of it; None without git."""
    versions: Mapping[str, str]


@dataclass
class Round:
    """The measurements of contestants under the same conditions."""

    origin: Origin
    updated: str
    """UTC time of the last measurement."""
    measured: dict[str, Measured] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Contestant -> the first line of its last error."""


@dataclass
class _File:
    rounds: list[Round]


class Results:
    """The rounds of all calls, in a directory; each change is written at once.

    Raises:
        ResultsError: The file has other content.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._file = directory / "gpu.json"
        self.rounds = _read(self._file)

    def current_round(self, origin: Origin, contestants: Sequence[str]) -> Round:
        """Return the oldest round of this origin that lacks one of these contestants, or a new one."""
        for round_ in self.rounds:
            if round_.origin == origin and not set(contestants) <= round_.measured.keys():
                return round_
        self.rounds.append(Round(origin, _now()))
        return self.rounds[-1]

    def add(self, round_: Round, name: str, measured: Measured) -> None:
        """Add the measurements of a contestant to a round."""
        round_.measured[name] = measured
        round_.failed.pop(name, None)
        self._write(round_)

    def add_failure(self, round_: Round, name: str, error: str) -> None:
        """Add a contestant's error, which the table names."""
        round_.failed[name] = error.splitlines()[0]
        self._write(round_)

    def _write(self, round_: Round) -> None:
        round_.updated = _now()
        shown = figures(self.latest("real"))
        report = {
            "summary": {f"{part}: {figure.name}": values for part, figure, values in shown if values},
            "rounds": [asdict(round_) for round_ in self.rounds],
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps(report, indent=2) + "\n")

    def latest(self, shapes: Shapes) -> list[Round]:
        """Return the rounds with measurements that share the origin of the latest; real shapes count on a real GPU only."""
        rounds = [
            round_
            for round_ in self.rounds
            if round_.measured and round_.origin.shapes == shapes and (shapes != "real" or round_.origin.gpu)
        ]
        latest = max(rounds, key=lambda round_: round_.updated, default=None)
        return [round_ for round_ in rounds if latest and round_.origin == latest.origin]


def figures(rounds: Sequence[Round]) -> Iterator[tuple[str, Figure, dict[str, float] | None]]:
    """Yield (part, figure, its median and range over the rounds, or None if it was not measured)."""
    for name, part in PARTS.items():
        for figure in part.figures:
            values = [
                value
                for round_ in rounds
                if set(figure.needs) <= round_.measured.keys()
                and (value := figure.value(*map(round_.measured.get, figure.needs))) is not None
            ]
            yield name, figure, spread(values) | {"rounds": len(values)} if values else None


def _read(file: Path) -> list[Round]:
    if not file.exists():
        return []
    try:
        return TypeAdapter(_File).validate_json(file.read_bytes()).rounds
    except OSError as error:
        cause = str(error.strerror)
    except ValidationError as error:
        first = error.errors()[0]
        cause = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")
    raise ResultsError(
        f"{file} has no results of this benchmark ({cause}): restore it from git, or move it away"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat()


def origin_of(shapes: Shapes, gpu: str | None) -> Origin:
    """Return the conditions of a round that runs now."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Origin(shapes, gpu, _commit(), versions)


def _commit() -> str | None:
    try:
        commit = _git("log", "-1", "--format=%h", "--", *_MEASURED_CODE)
        changes = _git("status", "--porcelain", "--", *_MEASURED_CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit or None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.check_output(command, cwd=PROJECT, text=True, stderr=subprocess.DEVNULL).strip()


@contextmanager
def locked(directory: Path, option: str) -> Iterator[None]:
    """Hold the lock of a directory, which is created if it is missing.

    Args:
        directory: The directory.
        option: How the user chooses another one, for the errors.

    Raises:
        ResultsError: It cannot be written, or another call uses it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise ResultsError(
            f"{directory} cannot be written ({error.strerror}): choose another directory with {option}"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResultsError(
                f"{directory} is in use by another call: wait for its end, or choose another directory with {option}"
            ) from error
        yield
    finally:
        os.close(handle)

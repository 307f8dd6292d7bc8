"""Install the pieces beside this file into a directory, without an index: `python3 install.py DIRECTORY`.

benchmarks/gpu_wheels.py copies this file as install.py. It runs on the bare machine: with Python and pip, and nothing else.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def read_manifest(here: Path) -> dict:
    """Return the manifest, after checking it, the Python version, and that every piece is there."""
    file = here / "manifest.json"
    if not file.exists():
        raise SystemExit(f"{file} is missing: copy it here")
    try:
        manifest = json.loads(file.read_text())
        python = manifest["python"]
        pieces = [(here / piece["name"], piece["sha256"]) for piece in manifest["pieces"]]
        total = sum(wheel["bytes"] for wheel in manifest["wheels"] if wheel["name"] and wheel["sha256"])
        if total != sum(piece["bytes"] for piece in manifest["pieces"]):
            raise ValueError("the pieces have another size than the wheels")
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{file} is damaged ({error!r}): copy it again") from error
    running = ".".join(map(str, sys.version_info[:2]))
    if running != python:
        raise SystemExit(
            f"the wheels are for Python {python}, and this is {running}: run python{python} install.py"
        )
    missing = [path.name for path, _ in pieces if not path.exists()]
    if missing:
        raise SystemExit(f"missing in {here}: {', '.join(missing)}. Copy every file of manifest.json here")
    return manifest


def join(here: Path, directory: Path) -> list[Path]:
    """Verify the pieces, write the wheels into a directory, verify them, and return their paths."""
    manifest = read_manifest(here)
    for piece in manifest["pieces"]:
        _verify(here / piece["name"], piece["sha256"])
    stream = (chunk for piece in manifest["pieces"] for chunk in _chunks(here / piece["name"]))
    wheels, rest = [], b""
    for wheel in manifest["wheels"]:
        path, missing = directory / wheel["name"], wheel["bytes"]
        with path.open("wb") as file:
            while missing:
                rest = rest or next(stream)
                taken = file.write(rest[:missing])
                rest, missing = rest[taken:], missing - taken
        _verify(path, wheel["sha256"])
        wheels.append(path)
    return wheels


def _chunks(path: Path):
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            yield chunk


def _verify(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    if digest.hexdigest() != expected:
        raise SystemExit(
            f"{path} is damaged: its sha256 is {digest.hexdigest()}, not {expected}. Copy it again"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Install the pieces beside this file, without an index.")
    parser.add_argument(
        "directory", metavar="DIRECTORY", help="directory for the packages; PYTHONPATH then names it"
    )
    target = Path(parser.parse_args().directory)
    if target.exists() and not target.is_dir():
        raise SystemExit(f"{target} is no directory: choose another")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        wheels = join(Path(__file__).resolve().parent, Path(temporary))
        # --target leaves the machine's own packages untouched: PYTHONPATH puts these first.
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-compile", "--upgrade", "--target", str(target)]
        if subprocess.call([*command, *map(str, wheels)]) != 0:
            raise SystemExit(f"pip could not install the wheels into {target}; its message is above")
    print(f"{len(wheels)} packages in {target}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

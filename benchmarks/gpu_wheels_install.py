"""Install the pieces beside this file into a directory, without an index: `python3 install.py DIRECTORY`.

benchmarks/gpu_wheels.py copies this file as install.py. It runs on the bare machine: with Python and pip, and nothing else.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def join(here: Path, directory: Path) -> list[Path]:
    """Verify the pieces, write the wheels into a directory, verify them, and return their paths."""
    manifest = json.loads((here / "manifest.json").read_text())
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
    if not path.exists():
        raise SystemExit(f"{path} is missing: copy every file of manifest.json here")
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    if digest.hexdigest() != expected:
        raise SystemExit(
            f"{path} is damaged: its sha256 is {digest.hexdigest()}, not {expected}. Copy it again"
        )


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python3 install.py DIRECTORY")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        wheels = join(Path(__file__).resolve().parent, Path(temporary))
        # --target leaves the machine's own packages untouched: PYTHONPATH puts these first.
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-compile", "--upgrade", "--target", sys.argv[1]]
        subprocess.run([*command, *map(str, wheels)], check=True)
    print(f"{len(wheels)} packages in {sys.argv[1]}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

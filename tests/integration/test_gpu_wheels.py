"""Tests of benchmarks/gpu_wheels.py: pieces install without an index, and damaged or missing ones do not."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_wheels
from benchmarks.gpu_wheels import VERSIONS, parse_names, parse_pins, requirements, resolve, write_pieces
from tests.support.jobs import PROJECT


def make_wheel(directory: Path, name: str, size: int) -> Path:
    """Write a wheel with one module of about this many bytes."""
    wheel = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", f"text = {'x' * size!r}\n")
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    output = tmp_path / "pieces"
    output.mkdir()
    wheels = [make_wheel(tmp_path, "anneal_large", 3000), make_wheel(tmp_path, "anneal_small", 10)]
    write_pieces(wheels, output, piece_bytes=1000)
    return output


def install(pieces: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(pieces / "install.py"), str(target)]
    return subprocess.run(command, capture_output=True, text=True, cwd=pieces.parent)


def test_wheels_in_pieces_install_without_an_index(pieces: Path, tmp_path: Path):
    files = sorted(pieces.glob("piece-*"))
    assert len(files) > 3
    assert all(file.stat().st_size == 1000 for file in files[:-1])
    done = install(pieces, tmp_path / "packages")
    assert done.returncode == 0, done.stderr
    assert "2 packages" in done.stdout
    assert {path.name for path in (tmp_path / "packages").glob("*.py")} == {
        "anneal_large.py",
        "anneal_small.py",
    }
    assert "x" * 3000 in (tmp_path / "packages" / "anneal_large.py").read_text()


@pytest.mark.parametrize(("change", "message"), [("damage", "damaged"), ("remove", "missing")])
def test_bad_piece_installs_nothing(change: str, message: str, pieces: Path, tmp_path: Path):
    piece = pieces / "piece-01"
    if change == "damage":
        content = bytearray(piece.read_bytes())
        content[500] ^= 1
        piece.write_bytes(content)
    else:
        piece.unlink()
    done = install(pieces, tmp_path / "packages")
    assert done.returncode != 0
    assert "piece-01" in done.stderr
    assert message in done.stderr
    assert not (tmp_path / "packages").exists()


def test_installed_packages_are_read_from_a_freeze():
    lines = ["torch==2.11.0+cu130", "Jinja2==3.1.6", "pandas", "# note", "-e git+https://x/y.git"]
    assert parse_pins(lines) == {"torch": "2.11.0", "jinja2": "3.1.6"}
    assert parse_names(lines) == {"pandas"}


def test_only_what_is_missing_is_brought(monkeypatch: pytest.MonkeyPatch):
    def compile_requirements(command: list[str], **_: object) -> None:
        output = Path(command[-1])
        preferred = parse_pins(output.read_text().splitlines())
        assert preferred["numpy"] == "2.5.2", "the machine's version comes before the lock's"
        output.write_text("numpy==2.5.2\ntrl==1.15.0\npandas==3.1.1\npeft==0.21.2\n")

    monkeypatch.setattr(gpu_wheels.subprocess, "run", compile_requirements)
    assert resolve("3.12", ["numpy==2.5.2", "peft==0.20.0", "pandas"]) == {"trl": "1.15.0", "peft": "0.21.2"}


def test_listed_versions_are_those_of_the_project():
    listed = parse_pins(VERSIONS.read_text().splitlines())
    pinned = parse_pins(line.replace("[train]", "").replace("[crt]", "") for line in requirements())
    assert {name: listed[name] for name in pinned.keys() & listed.keys()} == {
        name: pinned[name] for name in pinned.keys() & listed.keys()
    }
    assert {"ray", "trl", "bitsandbytes", "unsloth", "liger-kernel"} <= listed.keys()
    assert not {"torch", "triton", "torchvision", "deepspeed"} & listed.keys()


def test_manifest_names_every_piece(pieces: Path):
    manifest = json.loads((pieces / "manifest.json").read_text())
    assert [piece["name"] for piece in manifest["pieces"]] == [
        file.name for file in sorted(pieces.glob("piece-*"))
    ]
    assert (PROJECT / "benchmarks" / "gpu_wheels_install.py").read_bytes() == (
        pieces / "install.py"
    ).read_bytes()

"""Tests of benchmarks/gpu_wheels.py: pieces install without an index, and damaged or missing ones do not."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_wheels
from benchmarks.gpu_wheels import VERSIONS, parse_pins, read_freeze, requirements, resolve, write_pieces
from tests.support.jobs import PROJECT

PYTHON = ".".join(map(str, sys.version_info[:2]))


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
    write_pieces(wheels, output, PYTHON, piece_bytes=1000)
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


def test_every_missing_piece_is_named(pieces: Path, tmp_path: Path):
    for name in ("piece-00", "piece-02"):
        (pieces / name).unlink()
    done = install(pieces, tmp_path / "packages")
    assert done.returncode == 1
    assert "piece-00, piece-02" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{", "", "damaged"),
        ('"pieces"', '"parts"', "damaged"),
        ('"bytes": 10', '"bytes": 11', "damaged"),
        (f'"python": "{PYTHON}"', '"python": "3.99"', "for Python 3.99"),
    ],
)
def test_manifest_that_does_not_fit_is_named(old: str, new: str, words: str, pieces: Path, tmp_path: Path):
    manifest = pieces / "manifest.json"
    assert old in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    done = install(pieces, tmp_path / "packages")
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_installer_has_help(pieces: Path):
    done = install(pieces, Path("--help"))
    assert done.returncode == 0
    assert "DIRECTORY" in done.stdout


def test_earlier_pieces_are_removed(pieces: Path, tmp_path: Path):
    write_pieces([make_wheel(tmp_path, "anneal_small", 10)], pieces, PYTHON)
    assert [piece.name for piece in pieces.glob("piece-*")] == ["piece-00"]


def test_installed_packages_are_read_from_a_freeze(tmp_path: Path):
    file = tmp_path / "freeze.txt"
    file.write_text(
        "torch==2.11.0+cu130\nJinja2==3.1.6\npandas\n# note\n-e git+https://token@x/y.git\n\n"
        "rich @ file:///builds/rich.whl\n-e git+https://token@x/z.git#egg=Our_Tool\n--extra-index-url https://token@x\n"
    )
    pins, names = read_freeze(file)
    assert pins == {"torch": "2.11.0", "jinja2": "3.1.6"}
    assert names == {"pandas", "rich", "our-tool"}


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_wheels.py", *map(str, arguments)])
    gpu_wheels.main()


def test_files_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, output = tmp_path / "freeze.txt", tmp_path / "pieces"
    with pytest.raises(SystemExit, match=r"freeze\.txt.*pip freeze"):
        _main(monkeypatch, "--installed", file, "--output", output)
    file.write_text("torch==2.11.0\nPackage    Version\n")
    with pytest.raises(SystemExit, match=r"freeze\.txt:2.*pip freeze"):
        _main(monkeypatch, "--installed", file, "--output", output)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit, match=r"freeze\.txt.*pip freeze"):
        _main(monkeypatch, "--installed", file, "--output", output)
    file.write_text("torch==2.11.0\n")
    with pytest.raises(SystemExit, match="no directory"):
        _main(monkeypatch, "--installed", file, "--output", file)
    assert not output.exists()


@pytest.mark.parametrize("python", ["3", "3.9", "3.12.1", "twelve"])
def test_unsupported_python_is_rejected(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        _main(monkeypatch, "--python", python, "--installed", tmp_path / "x", "--output", tmp_path)
    assert "none of 3.11, 3.12, 3.13" in capsys.readouterr().err


def test_list_is_written_after_success_only_and_without_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, versions = tmp_path / "freeze.txt", tmp_path / "versions.txt"
    file.write_text("torch==2.11.0+cu130\nrich @ https://token@host/rich.whl\n")
    monkeypatch.setattr(gpu_wheels, "VERSIONS", versions)
    monkeypatch.setattr(gpu_wheels, "resolve", lambda *_: {"anneal-small": "1.0"})
    monkeypatch.setattr(gpu_wheels, "_run", lambda *_: sys.exit("no index"))
    with pytest.raises(SystemExit, match="no index"):
        _main(monkeypatch, "--installed", file, "--output", tmp_path / "pieces")
    assert not versions.exists()
    monkeypatch.setattr(gpu_wheels, "download", lambda *_: [make_wheel(tmp_path, "anneal_small", 10)])
    _main(monkeypatch, "--installed", file, "--output", tmp_path / "pieces")
    assert versions.read_text().splitlines()[1:] == ["#   rich", "#   torch==2.11.0", "anneal-small==1.0"]


def test_only_what_is_missing_is_brought(monkeypatch: pytest.MonkeyPatch):
    def compile_requirements(command: list[str], **_: object) -> None:
        output = Path(command[-1])
        preferred = parse_pins(output.read_text().splitlines())
        assert preferred["numpy"] == "2.5.2", "the machine's version comes before the lock's"
        output.write_text("numpy==2.5.2\ntrl==1.15.0\npandas==3.1.1\npeft==0.21.2\n")

    monkeypatch.setattr(gpu_wheels.subprocess, "run", compile_requirements)
    assert resolve("3.12", {"numpy": "2.5.2", "peft": "0.20.0"}, {"pandas"}) == {
        "trl": "1.15.0",
        "peft": "0.21.2",
    }


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

"""Tests of benchmarks/gpu_packages.py: the archive has the missing packages, without what the benchmark never imports."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_packages
from benchmarks.gpu_packages import (
    NEVER_IMPORTED,
    VERSIONS,
    cuda_of,
    install,
    pack,
    parse_pins,
    read_freeze,
    remove,
    requirements,
    resolve,
)


def make_wheel(directory: Path, name: str) -> None:
    """Write a wheel with one module."""
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "text = 'packed'\n")
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory of wheels that uv uses instead of an index."""
    directory = tmp_path / "index"
    directory.mkdir()
    make_wheel(directory, "anneal_small")
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", directory), ("CACHE_DIR", tmp_path / "cache")):
        monkeypatch.setenv(f"UV_{name}", str(value))
    return directory


def make_files(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)


def files_of(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("index")
def test_archive_is_unpacked_by_tar_and_imported(tmp_path: Path):
    packages, unpacked, archive = (tmp_path / name for name in ("packages", "unpacked", "packages.tar.xz"))
    install({"anneal-small": "1.0"}, "3.12", packages)
    archive.write_text("of an earlier call")
    pack(packages, archive)
    unpacked.mkdir()
    subprocess.run(["tar", "-xJf", archive, "-C", unpacked], check=True)
    command = [sys.executable, "-c", "import anneal_small; print(anneal_small.text)"]
    done = subprocess.run(command, env={"PYTHONPATH": str(unpacked)}, capture_output=True, text=True)
    assert done.stdout == "packed\n", done.stderr
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("index")
def test_package_that_cannot_be_installed_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match=r"pip install.*no archive was written"):
        install({"anneal-missing": "1.0"}, "3.12", tmp_path / "packages")
    assert "anneal-missing" in capfd.readouterr().err


def test_removed_files_are_those_that_the_benchmark_never_imports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    retained = (
        "bitsandbytes/libbitsandbytes_cpu.so",
        "bitsandbytes/libbitsandbytes_cuda130.so",
        "bitsandbytes/functional.py",
        "botocore/data/endpoints.json",
        "botocore/data/s3/2006-03-01/service-2.json",
        "botocore/data/sso-oidc/2019-06-10/service-2.json",
        "ray/dashboard/utils.py",
    )
    removed = (
        "bin/ray",
        "bitsandbytes/libbitsandbytes_cuda121.so",
        "bitsandbytes/libbitsandbytes_rocm70.so",
        "botocore/data/ec2/2016-11-15/service-2.json",
        "ray/dashboard/client/build/index.html",
        "ray/rllib/algorithms/ppo.py",
        "studio/app.py",
    )
    make_files(tmp_path, *retained, *removed)
    remove(tmp_path, "130")
    assert files_of(tmp_path) == set(retained)
    output = capsys.readouterr().out
    assert all(f"{glob} ({what})" in output for glob, what in NEVER_IMPORTED.items())


def test_without_cuda_toolkit_every_cuda_version_is_retained(tmp_path: Path):
    assert cuda_of({"cuda-toolkit": "13.0.2"}) == "130"
    make_files(tmp_path, "bitsandbytes/libbitsandbytes_cuda121.so", "bitsandbytes/libbitsandbytes_rocm70.so")
    remove(tmp_path, cuda_of({"torch": "2.5.0"}))
    assert files_of(tmp_path) == {"bitsandbytes/libbitsandbytes_cuda121.so"}


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
    monkeypatch.setattr(sys, "argv", ["gpu_packages.py", *map(str, arguments)])
    gpu_packages.main()


def test_files_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, output = tmp_path / "freeze.txt", tmp_path / "packages.tar.xz"
    with pytest.raises(SystemExit, match=r"freeze\.txt.*pip freeze"):
        _main(monkeypatch, "--installed", file, "--output", output)
    file.write_text("torch==2.11.0\nPackage    Version\n")
    with pytest.raises(SystemExit, match=r"freeze\.txt:2.*pip freeze"):
        _main(monkeypatch, "--installed", file, "--output", output)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit, match=r"freeze\.txt.*pip freeze"):
        _main(monkeypatch, "--installed", file, "--output", output)
    file.write_text("torch==2.11.0\n")
    with pytest.raises(SystemExit, match="does not exist"):
        _main(monkeypatch, "--installed", file, "--output", tmp_path / "missing" / "packages.tar.xz")
    assert not output.exists()


@pytest.mark.parametrize("python", ["3", "3.9", "3.12.1", "twelve"])
def test_unsupported_python_is_rejected(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        _main(monkeypatch, "--python", python, "--installed", tmp_path / "x", "--output", tmp_path)
    assert "none of 3.11, 3.12, 3.13" in capsys.readouterr().err


def test_list_is_written_after_success_only_and_without_urls(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file, versions, archive = (tmp_path / name for name in ("freeze.txt", "versions.txt", "packages.tar.xz"))
    file.write_text("torch==2.11.0+cu130\nrich @ https://token@host/rich.whl\n")
    monkeypatch.setattr(gpu_packages, "VERSIONS", versions)
    monkeypatch.setattr(gpu_packages, "resolve", lambda *_: {"anneal-small": "1.0", "anneal-other": "1.0"})
    with pytest.raises(SystemExit, match="no archive was written"):
        _main(monkeypatch, "--installed", file, "--output", archive)
    assert not versions.exists()
    assert not archive.exists()
    make_wheel(index, "anneal_other")
    _main(monkeypatch, "--installed", file, "--output", archive)
    assert versions.read_text().splitlines()[1:] == [
        "#   rich",
        "#   torch==2.11.0",
        "anneal-other==1.0",
        "anneal-small==1.0",
    ]
    with tarfile.open(archive) as tar:
        assert {"./anneal_small.py", "./anneal_other.py"} <= set(tar.getnames())
    assert "2 packages, 0.0 MiB" in capsys.readouterr().out


def test_only_missing_packages_are_downloaded(monkeypatch: pytest.MonkeyPatch):
    def compile_requirements(command: list[str], **_: object) -> None:
        output = Path(command[-1])
        preferred = parse_pins(output.read_text().splitlines())
        assert preferred["numpy"] == "2.5.2", "the machine's version comes before the lock's"
        output.write_text("numpy==2.5.2\ntrl==1.15.0\npandas==3.1.1\npeft==0.21.2\n")

    monkeypatch.setattr(gpu_packages.subprocess, "run", compile_requirements)
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
    assert {"ray", "trl", "bitsandbytes", "unsloth", "liger-kernel", "deepspeed"} <= listed.keys()
    assert not {"torch", "triton", "torchvision"} & listed.keys()

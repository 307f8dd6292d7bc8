"""Commands, pins, locks, image, workflows and cookbooks of the project are consistent."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from configs.loading import load_config
from service.config import load_service

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SERVICES = sorted((ROOT / "cookbooks" / "fine_tuning_service").glob("*.yaml"))
COOKBOOKS = sorted({*(ROOT / "cookbooks").rglob("*.yaml")} - {*SERVICES})
NOWHERE = "sys_platform == 'never'"
PLATFORM_SPECIFIC = re.compile(r"(torch|torchvision|torchaudio|triton|xformers|nvidia-.*|cuda-.*)$")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def pins(lock: Path) -> list[tuple[str, str, str, str]]:
    """Return the name, version, marker and hashes of every package in a lock."""
    text = re.sub(r"^#.*\n", "", lock.read_text(encoding="utf-8"), flags=re.M)
    found = []
    for entry in re.split(r"\n(?=\S)", text.replace("\\\n", " ").strip()):
        match = re.fullmatch(r"([\w.-]+)==(\S+)(?: ; (.*?))?((?: +--hash=sha256:[0-9a-f]{64})*) *", entry)
        assert match, f"{lock.name}: not a pinned package: {entry[:80]}"
        found.append((match[1], match[2], match[3] or "", match[4]))
    return found


def make(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("make") or "make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_make_help_lists_every_mentioned_target():
    output = make("help").stdout
    help_targets = {line.split()[0] for line in output.splitlines()}
    phony = re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.M)
    assert phony and help_targets == set(phony[1].split())
    sources = [".ci/run", *(str(workflow.relative_to(ROOT)) for workflow in WORKFLOWS), *markdown_pages()]
    for path in sources:
        # Search code only (spans, indented and fenced lines), since prose may say "make sure".
        for target in re.findall(r"(?:`|^ {4}|^ *run: |- run: )make ([a-z][a-z-]*)", read(path), re.M):
            assert target in help_targets, f"{path} mentions `make {target}`"
    assert {"lint", "test"} <= help_targets


def markdown_pages() -> list[str]:
    paths = [*ROOT.glob("*.md"), *(ROOT / "cookbooks").rglob("*.md")]
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_lock_has_hashes_and_excludes_platform_specific_packages(lock):
    for name, version, marker, hashes in pins(lock):
        assert hashes, f"{name}=={version} has no hash"
        if PLATFORM_SPECIFIC.match(name) and lock.stem != "interpreter":
            assert marker == NOWHERE, f"{name}=={version} has the marker {marker!r} instead of {NOWHERE!r}"


def test_pyproject_pins_match_the_locks():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    for lock in ("runtime", *extras):
        locked = {(name, version) for name, version, _, _ in pins(ROOT / "requirements" / f"{lock}.lock")}
        for requirement in [*project["dependencies"], *extras.get(lock, [])]:
            match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?==(\S+)", requirement)
            assert match, f"{requirement} is not an exact pin"
            name = match[1].replace("_", "-").lower()
            if name != "torch":
                assert (name, match[2]) in locked, f"{requirement} is not in {lock}.lock"


def test_locks_agree_on_versions():
    by_package: dict[tuple[str, str], set[str]] = {}
    for lock in LOCKS:
        for name, version, marker, _ in pins(lock):
            if NOWHERE not in marker:
                by_package.setdefault((name, marker), set()).add(version)
    assert not {package: versions for package, versions in by_package.items() if len(versions) > 1}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_workflow_pins_actions_by_commit_and_has_read_only_permissions(workflow):
    text = workflow.read_text(encoding="utf-8")
    uses = re.findall(r"uses: (.*)", text)
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}


def test_nightly_workflow_runs_every_target_that_the_other_workflow_does_not_run():
    targets = yaml.safe_load(read(".github/workflows/nightly.yml"))["jobs"]["grid"]["strategy"]["matrix"][
        "target"
    ]
    # test-image installs the packages of the image anew: 3 GB.
    others = re.findall(r"^(test-[a-z]+|fuzz):", read("Makefile"), re.M)
    assert {*targets, "test-all", "test-image"} == set(others)


def test_project_workflow_and_makefile_name_the_same_pythons():
    tested = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]["strategy"]["matrix"]["python"]
    minors = [int(version.removeprefix("3.")) for version in tested]
    project = tomllib.loads(read("pyproject.toml"))
    assert project["project"]["requires-python"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"
    assert project["tool"]["pyright"]["pythonVersion"] == tested[0]
    assert f"not (3, {minors[0]}) <= sys.version_info[:2] <= (3, {minors[-1]})" in read("Makefile")
    assert f"uv pip compile --quiet --universal --python-version {tested[0]} " in read("Makefile")


def test_make_without_a_supported_python_names_the_supported_ones(tmp_path):
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    for command in ("sh", "sed", "uname", "rm", "mkdir", "test"):
        (bin_directory / command).symlink_to(shutil.which(command))
    (bin_directory / "python3").write_text("#!/bin/sh\nexit 1\n")
    (bin_directory / "python3").chmod(0o755)
    completed = make("setup", f"VENV={tmp_path}/venv", environment={"PATH": str(bin_directory)})
    assert completed.returncode == 2
    assert "3.11, 3.12 or 3.13" in completed.stderr and "make PYTHON=" in completed.stderr
    assert not (tmp_path / "venv").exists()


def test_image_installs_the_locks_and_runs_as_a_non_root_user():
    dockerfile = read("Dockerfile")
    lock_names = set(re.findall(r"requirements/([\w-]+)\.lock", dockerfile))
    assert lock_names == {"bootstrap", "runtime", "cluster", "unsloth", "trackers", "service"}
    assert {f"{name}.lock" for name in lock_names} <= {lock.name for lock in LOCKS}
    assert "--require-hashes" in dockerfile
    users = re.findall(r"^USER (.*)$", dockerfile.rpartition("\nFROM ")[2], re.M)
    assert users and re.fullmatch(r"[1-9]\d*(:\d+)?", users[-1])


def test_image_contains_every_package():
    dockerfile, ignored = read("Dockerfile"), read(".dockerignore").splitlines()
    for package in tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["root_packages"]:
        assert f"COPY {package} {package}" in dockerfile
        assert f"!{package}/" in ignored


def test_cookbooks_exist():
    assert COOKBOOKS


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_service_yaml_loads_and_shows_its_command(path):
    assert load_service(path).bases
    assert f"main.py serve {path.relative_to(ROOT)}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", COOKBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_cookbook_loads_without_warnings_and_shows_its_command(path):
    loaded = load_config(path)
    assert loaded.warnings == ()
    assert loaded.rejections == ()
    opening = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert opening, "the file has no opening comment"
    assert re.search(rf"python main\.py {re.escape(str(path.relative_to(ROOT)))}(\s|$)", opening[0])
    assert (path.parent / "README.md").is_file()

"""The project's own files agree with one another: commands, pins, locks, image, workflow, cookbooks."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from configs.loading import load_config

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
COOKBOOKS = sorted((ROOT / "cookbooks").rglob("*.yaml"))
NOWHERE = "sys_platform == 'never'"
CHOSEN_BY_THE_MACHINE = re.compile(r"(torch|torchvision|torchaudio|triton|xformers|nvidia-.*|cuda-.*)$")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def pins(lock: Path) -> list[tuple[str, str, str, str]]:
    """Name, version, marker and the rest (its hashes) of every package in a lock."""
    text = re.sub(r"^#.*\n", "", lock.read_text(encoding="utf-8"), flags=re.M)
    found = []
    for entry in re.split(r"\n(?=\S)", text.replace("\\\n", " ").strip()):
        match = re.fullmatch(r"([\w.-]+)==(\S+)(?: ; (.*?))?((?: +--hash=sha256:[0-9a-f]{64})*) *", entry)
        assert match, f"{lock.name}: not a pinned package: {entry[:80]}"
        found.append((match[1], match[2], match[3] or "", match[4]))
    return found


def test_make_help_lists_every_command_that_is_written_anywhere():
    said = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    listed = {line.split()[0] for line in said.splitlines()}
    phony = re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.M)
    assert phony and listed == set(phony[1].split())
    written = [".ci/run", ".github/workflows/ci.yml", *documents()]
    for path in written:
        # In code only: spans and indented or fenced lines, not "make sure" in a sentence.
        for target in re.findall(
            r"(?:`|^ {4}|^- run: |^ *run: |- run: )make ([a-z][a-z-]*)", read(path), re.M
        ):
            assert target in listed, f"{path} says `make {target}`"
    assert {"lint", "test"} <= listed


def documents() -> list[str]:
    paths = [*ROOT.glob("*.md"), *(ROOT / "cookbooks").rglob("*.md")]
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_lock_has_a_hash_for_every_file_and_leaves_the_machines_builds_out(lock):
    for name, version, marker, hashes in pins(lock):
        assert hashes, f"{name}=={version} has no hash"
        if CHOSEN_BY_THE_MACHINE.match(name) and lock.stem != "interpreter":
            assert marker == NOWHERE, f"{name}=={version} would be installed where {marker or 'ever'}"


def test_pins_of_pyproject_are_the_locks():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    for lock in ("runtime", *extras):
        locked = {(name, version) for name, version, _, _ in pins(ROOT / "requirements" / f"{lock}.lock")}
        for requirement in [*project["dependencies"], *extras.get(lock, [])]:
            match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?==(\S+)", requirement)
            assert match, f"{requirement} is no exact pin"
            name = match[1].replace("_", "-").lower()
            if name != "torch":
                assert (name, match[2]) in locked, f"{requirement} is not what {lock}.lock holds"


def test_locks_agree_on_versions():
    by_package: dict[tuple[str, str], set[str]] = {}
    for lock in LOCKS:
        for name, version, marker, _ in pins(lock):
            if NOWHERE not in marker:
                by_package.setdefault((name, marker), set()).add(version)
    assert not {package: versions for package, versions in by_package.items() if len(versions) > 1}


def test_workflow_pins_actions_by_commit_and_may_only_read():
    text = read(".github/workflows/ci.yml")
    uses = re.findall(r"uses: (.*)", text)
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}


def test_image_installs_the_locks_and_ends_as_an_ordinary_user():
    dockerfile = read("Dockerfile")
    named = set(re.findall(r"requirements/([\w-]+)\.lock", dockerfile))
    assert named == {"bootstrap", "runtime", "cluster", "unsloth", "trackers"}
    assert {f"{name}.lock" for name in named} <= {lock.name for lock in LOCKS}
    assert "--require-hashes" in dockerfile
    users = re.findall(r"^USER (.*)$", dockerfile.rpartition("\nFROM ")[2], re.M)
    assert users and re.fullmatch(r"[1-9]\d*(:\d+)?", users[-1])


def test_image_holds_every_room():
    dockerfile, ignored = read("Dockerfile"), read(".dockerignore").splitlines()
    for room in tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["root_packages"]:
        assert f"COPY {room} {room}" in dockerfile
        assert f"!{room}/" in ignored


def test_there_are_cookbooks():
    assert COOKBOOKS


@pytest.mark.parametrize("path", COOKBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_cookbook_loads_without_a_warning_and_says_how_to_run_it(path):
    loaded = load_config(path)
    assert loaded.warnings == ()
    assert loaded.refusals == ()
    opening = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert opening, "opens with no comment"
    assert re.search(rf"python main\.py {re.escape(str(path.relative_to(ROOT)))}(\s|$)", opening[0])
    assert (path.parent / "README.md").is_file()

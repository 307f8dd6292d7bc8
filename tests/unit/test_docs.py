"""README.md, docs/, CONTRIBUTING.md and cookbook pages have valid links, limited length and tested commands."""

import importlib
import re
from pathlib import Path

import pytest

from runs import commands as run_records
from tests.support.jobs import PROJECT
from tests.support.shown_commands import (
    DOCS,
    PAGES,
    main_commands,
    make_targets,
    migrating_commands,
    quickstart_commands,
    run_commands,
    service_commands,
    split_code,
    submit_commands,
)
from training.inference import commands as inference

LINKED_PAGES = [*PAGES, *sorted((PROJECT / "cookbooks").rglob("*.md"))]
PACKAGES = "benchmarks|configs|cookbooks|runs|service|tests|training|utils"
MAX_LINES = {PROJECT / "README.md": 200, PROJECT / "CONTRIBUTING.md": 60} | dict.fromkeys(DOCS, 250)
MAX_WIDTH = 160
WEB = re.compile(r"https?://|mailto:")


def name(page: Path) -> str:
    return str(page.relative_to(PROJECT))


def links(page: Path) -> list[str]:
    """Return the targets of the Markdown links in a page's prose."""
    return re.findall(r"\]\(([^)\s]+)\)", "\n".join(split_code(page)[1]))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+)$", "\n".join(split_code(page)[1]), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.add(slug)
    return found


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in links(page):
        if WEB.match(link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", LINKED_PAGES, ids=name)
def test_relative_links_and_anchors_resolve(page: Path):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# The title\n[a](#the-title) [b](page.md#the-title) [`c`](https://x.y)\n"
        "[d](#no-title) [e](missing.md) [`f`](page.md#none)\n"
    )
    assert broken_links(page) == ["#no-title", "missing.md", "page.md#none"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_have_at_most_their_number_of_lines(page: Path):
    lines = page.read_text("utf-8").splitlines()
    assert len(lines) <= MAX_LINES[page]
    wide = [number for number, line in enumerate(lines, 1) if len(line) > MAX_WIDTH and line[:1] != "|"]
    assert wide == []


def test_imports_in_python_blocks_resolve():
    """Only imports of the project's own names are checked."""
    found = 0
    for page in PAGES:
        for line in split_code(page)[0]:
            if match := re.fullmatch(rf"from ((?:{PACKAGES})[\w.]*) import (\w+)", line):
                assert hasattr(importlib.import_module(match[1]), match[2]), f"{name(page)}: {line}"
                found += 1
    assert found


@pytest.mark.parametrize("page", LINKED_PAGES, ids=name)
def test_paths_in_backticks_exist(page: Path):
    paths = re.findall(rf"`((?:{PACKAGES})/[\w./-]*)`", "\n".join(split_code(page)[1]))
    assert [path for path in paths if not (PROJECT / path).exists()] == []


def test_readme_links_every_page_of_docs():
    readme = PROJECT / "README.md"
    linked = {(readme.parent / link.partition("#")[0]).resolve() for link in links(readme)}
    assert set(DOCS) - linked == set()
    assert PROJECT / "CONTRIBUTING.md" in linked


def test_every_shown_command_is_run_by_a_test():
    """test_quickstart, test_submission, test_migrating and test_service run the commands of these lists."""
    names = (*run_records.COMMANDS, *inference.COMMANDS)
    run = {
        *quickstart_commands(),
        *run_commands(names),
        *submit_commands(),
        *migrating_commands(),
        *service_commands(),
    }
    assert [shown for shown in main_commands(PAGES) if shown not in run] == []


@pytest.mark.parametrize("page", LINKED_PAGES, ids=name)
def test_shown_make_targets_exist(page: Path):
    defined = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text("utf-8"), re.M))
    assert set(make_targets(page)) - defined == set()

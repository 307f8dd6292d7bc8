"""Commands that README.md, docs/ and CONTRIBUTING.md show, grouped by the test that runs them."""

import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.support.jobs import PROJECT

DOCS = sorted((PROJECT / "docs").glob("*.md"))
PAGES = (PROJECT / "README.md", *DOCS, PROJECT / "CONTRIBUTING.md")
QUICKSTART = "cookbooks/quickstart/smollm2-135m.yaml"
QUICKSTART_README = PROJECT / "cookbooks" / "quickstart" / "README.md"
SUBMIT_README = PROJECT / "cookbooks" / "launch_as_job" / "README.md"
MIGRATING = PROJECT / "docs" / "migrating.md"

_MAIN = re.compile(r"(?:\.venv/bin/)?python main\.py (.+)")


def split_code(page: Path) -> tuple[list[str], list[str]]:
    """Return the lines of a Markdown page's code blocks, without indentation, and the lines of its prose."""
    code, prose, fenced = [], [], False
    for line in page.read_text("utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            code.append(line.strip())
        else:
            prose.append(line)
    return code, prose


def main_commands(pages: Iterable[Path]) -> list[tuple[str, ...]]:
    """Return the arguments of each `main.py` command in the code blocks of pages: in order, without comments or duplicates."""
    lines = [line for page in pages for line in split_code(page)[0]]
    shown = [
        tuple(shlex.split(match[1], comments=True)) for line in lines if (match := _MAIN.fullmatch(line))
    ]
    return list(dict.fromkeys(shown))


def quickstart_commands() -> list[tuple[str, ...]]:
    """Return the commands that test_quickstart runs on the quickstart YAML: those that need no file from the reader."""
    return [
        shown
        for shown in main_commands((*PAGES, QUICKSTART_README))
        if shown[0] == QUICKSTART and not any("my" in argument for argument in shown)
    ]


def run_commands(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the commands that test_quickstart runs on its trained run: those whose first argument is one of `names`."""
    return [shown for shown in main_commands(PAGES) if shown[0] in names]


def service_commands() -> list[tuple[str, ...]]:
    """Return the commands of the fine-tuning service, which test_service runs."""
    return [shown for shown in main_commands(PAGES) if shown[0] in ("serve", "keys")]


def submit_commands() -> list[tuple[str, ...]]:
    """Return the commands that test_submission runs on a cluster of this machine."""
    return [
        shown
        for shown in main_commands([SUBMIT_README])
        if any("8265" in argument and "HEAD" not in argument for argument in shown)
    ]


def migrating_commands() -> list[tuple[str, ...]]:
    """Return the commands that test_migrating runs on a YAML of Axolotl."""
    return main_commands([MIGRATING])


def make_targets(page: Path) -> Iterator[str]:
    """Yield each make target that a page names in code blocks or in backticks."""
    code, prose = split_code(page)
    for line in code:
        yield from re.findall(r"^make ([a-z-]+)", line)
    yield from re.findall(r"`make ([a-z-]+)`", "\n".join(prose))

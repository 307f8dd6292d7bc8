"""The commands that look at runs: main.py runs, show and compare."""

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from runs import screen
from runs.comparison import compare_runs, draw
from runs.layout import default_storage
from runs.listing import RunSummary, list_runs, read_run, run_uri
from utils.bucket import BucketError, uses_embedded_bucket
from utils.console import open_consoles
from utils.embedded_bucket import embedded_bucket
from utils.files import write_atomically
from utils.store import explained

COMMANDS = ("runs", "show", "compare")
"""What may stand where else a YAML does; a file of that name is written ./runs."""

_PICTURE = "comparison.png"


def run_command(arguments: list[str]) -> None:
    """Carry out one of COMMANDS; a wrong command line ends the process with code 2.

    Raises:
        BucketError: there is no such run, it cannot be read, or the picture cannot be written.
    """
    options = _parse(arguments)
    output, _ = open_consoles()
    match options.command:
        case "runs":
            text = _list(output, options.storage_path or default_storage(), options.json)
        case "show":
            text = _show(output, run_uri(options.run), options.json)
        case _:
            text = _compare(output, [run_uri(run) for run in options.runs], options.picture, options.json)
    if options.json:
        output.print(text, soft_wrap=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="main.py", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    a_run = "a run's URI, or run:NAME for one where runs go by default"

    listing = commands.add_parser("runs", help="list the runs below a place, those heard of last first")
    listing.add_argument(
        "storage_path", nargs="?", metavar="STORAGE_PATH", help="default: where runs go by default"
    )
    showing = commands.add_parser("show", help="show one run")
    showing.add_argument("run", metavar="RUN", help=a_run)
    comparing = commands.add_parser("compare", help="compare runs, and draw their eval losses in one picture")
    comparing.add_argument("runs", nargs="+", metavar="RUN", help=a_run)
    comparing.add_argument(
        "--picture",
        type=Path,
        default=Path(_PICTURE),
        metavar="FILE.png",
        help="where the curves are drawn; default: %(default)s, in the working directory",
    )
    for command in (listing, showing, comparing):
        command.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    return parser.parse_args(arguments)


def _list(output: Console, storage: str, as_json: bool) -> str:
    if storage.startswith("run:"):
        raise BucketError(f"{storage} is one run, and no place where runs are: main.py show {storage}")
    with _reach([storage]):
        runs = list_runs(storage)
    if not as_json:
        screen.show_runs(output, runs)
    return TypeAdapter(list[RunSummary]).dump_json(runs).decode()


def _show(output: Console, uri: str, as_json: bool) -> str:
    with _reach([uri]):
        run = read_run(uri)
    if not as_json:
        screen.show_run(output, run)
    return run.model_dump_json()


def _compare(output: Console, uris: Sequence[str], path: Path, as_json: bool) -> str:
    _check_picture(path)
    with _reach(uris):
        comparison = compare_runs(uris)
    picture = draw(comparison)
    if picture:
        with explained("write", str(path)):
            write_atomically(path, picture)
    if not as_json:
        screen.show_comparison(output, comparison, path if picture else None)
    return comparison.model_dump_json()


def _check_picture(path: Path) -> None:
    """Refuse, before runs are read, a file that cannot be made."""
    with explained("write", str(path)):
        if path.is_dir():
            raise BucketError(f"cannot write {path}: it is a directory; name a file in it: {path / _PICTURE}")
        if path.suffix != ".png":
            raise BucketError(f"cannot write {path}: the picture is a PNG; name a file that ends with .png")
        if not path.parent.is_dir():
            wrong = "is a file" if path.parent.exists() else "is no directory that exists"
            raise BucketError(f"cannot write {path}: {path.parent} {wrong}; name a file in a directory")


def _reach(uris: Sequence[str]) -> AbstractContextManager[object]:
    """The embedded bucket, where one of the places lies in it."""
    return embedded_bucket() if any(map(uses_embedded_bucket, uris)) else nullcontext()

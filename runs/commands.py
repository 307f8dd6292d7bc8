"""The `runs`, `show`, `compare`, `stop` and `remove` commands."""

import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from runs import display
from runs.comparison import compare_runs, draw
from runs.layout import default_storage
from runs.stop_and_remove import check_removable, find_run, remove_run, stop_run
from runs.summaries import RunSummary, list_runs, read_run, run_uri
from utils.arguments import add_json_option
from utils.command_line import main_line
from utils.console import Output, open_consoles
from utils.files import write_atomically
from utils.storage.bucket import BucketError, uses_embedded_bucket
from utils.storage.embedded_bucket import embedded_bucket
from utils.storage.store import explained

COMMANDS = {
    "runs": "list the runs in a storage path, the most recently active first",
    "show": "show one run",
    "compare": "compare runs and plot their eval losses in one chart",
    "stop": "stop a run on any machine: its driver commits a checkpoint and exits",
    "remove": "delete a run with all its checkpoints",
}
"""Help text of each command. A YAML file with such a name must be given with a path, such as ./runs."""

PICTURE = "comparison.png"
A_RUN = "URI of a run, or run:NAME for a run in the default storage path"


def add_arguments(commands: Mapping[str, ArgumentParser]) -> None:
    """Add the commands' arguments to their parsers."""
    listing, showing, comparing = commands["runs"], commands["show"], commands["compare"]
    listing.set_defaults(run_command=list_command)
    listing.add_argument(
        "storage_path",
        nargs="?",
        metavar="STORAGE_PATH",
        help="bucket prefix or directory of the runs; default: the default storage path",
    )
    showing.set_defaults(run_command=show_command)
    showing.add_argument("run", metavar="RUN", help=A_RUN)
    comparing.set_defaults(run_command=compare_command)
    comparing.add_argument("runs", nargs="+", metavar="RUN", help=A_RUN)
    comparing.add_argument(
        "--picture",
        type=Path,
        default=Path(PICTURE),
        metavar="FILE.png",
        help="write the eval loss curves to this file; default: %(default)s in the working directory",
    )
    stopping, removing = commands["stop"], commands["remove"]
    stopping.set_defaults(run_command=stop_command)
    stopping.add_argument("run", metavar="RUN", help=A_RUN)
    removing.set_defaults(run_command=remove_command)
    removing.add_argument("run", metavar="RUN", help=A_RUN)
    removing.add_argument("--yes", dest="is_confirmed", action="store_true", help="do not ask")
    for command in (listing, showing, comparing, stopping):
        add_json_option(command)


def list_command(storage_path: str | None, as_json: bool) -> None:
    """List the runs in a storage path."""
    storage = storage_path or default_storage()
    if storage.startswith("run:"):
        raise BucketError(
            f"{storage} is a run, not a storage path; show it with: {main_line('show', storage)}"
        )
    with _reach([storage]):
        runs = list_runs(storage)
    output = _output()
    if as_json:
        _print_json(output, TypeAdapter(list[RunSummary]).dump_json(runs).decode())
    else:
        display.show_runs(output, runs)


def show_command(run: str, as_json: bool) -> None:
    """Show one run."""
    uri = run_uri(run)
    with _reach([uri]):
        details = read_run(uri)
    output = _output()
    if as_json:
        _print_json(output, details.model_dump_json())
    else:
        display.show_run(output, details)


def compare_command(runs: list[str], picture: Path, as_json: bool) -> None:
    """Compare runs, and plot their eval losses to a PNG file."""
    _check_picture(picture)
    uris = list(dict.fromkeys(run_uri(run) for run in runs))
    if len(uris) < 2:
        raise BucketError(f"compare needs at least two different runs; it got only {uris[0]}")
    with _reach(uris):
        comparison = compare_runs(uris)
    drawn = draw(comparison)
    if drawn:
        with explained("write", str(picture)):
            write_atomically(picture, drawn)
    output = _output()
    if as_json:
        _print_json(output, comparison.model_dump_json())
    else:
        display.show_comparison(output, comparison, picture if drawn else None)


def stop_command(run: str, as_json: bool) -> None:
    """Stop a run, and wait until its driver has exited."""
    uri = run_uri(run)
    output, errors = open_consoles()
    with _reach([uri]):
        stopped = stop_run(uri, lambda line: errors.print(f"… {line}"))
    if as_json:
        _print_json(output, stopped.model_dump_json())
    else:
        then = ". The command that started it resumes it" if stopped.status == "stopped" else ""
        output.print(
            f"{uri}: {display.describe_status(stopped)}, at step {stopped.steps:,}{then}", soft_wrap=True
        )


def remove_command(run: str, is_confirmed: bool) -> None:
    """Delete a run after the user has confirmed it."""
    uri = run_uri(run)
    output, errors = open_consoles()
    with _reach([uri]):
        found = find_run(uri)
        for line in check_removable(found):
            display.show_warning(errors, f"cannot check whether a run needs {found.run_name}: {line}")
        if not is_confirmed:
            _confirm(found, errors)
        removed = remove_run(found)
    output.print(f"removed {uri} ({removed:,} objects)", soft_wrap=True)


def _confirm(run: RunSummary, errors: Output) -> None:
    """Ask whether to remove a run; raise an error unless the answer is yes."""
    if not sys.stdin.isatty():
        raise BucketError(f"{run.run_uri}: not removed. Add --yes to confirm")
    errors.write(f"Remove {run.run_uri} ({run.status}, {run.steps:,} steps) with all its checkpoints? [y/N] ")
    answer = sys.stdin.readline()
    if not answer:  # Ctrl-D leaves the cursor in the question's line
        errors.write("\n")
    if answer.strip().lower() not in ("y", "yes"):
        raise BucketError(f"{run.run_uri}: not removed")


def _output() -> Console:
    output, _ = open_consoles()
    return output


def _print_json(output: Console, text: str) -> None:
    output.print(text, soft_wrap=True)


def _check_picture(path: Path) -> None:
    """Reject a file that cannot be written, before any run is read."""
    with explained("write", str(path)):
        if path.is_dir():
            raise BucketError(f"cannot write {path}: it is a directory; name a file in it: {path / PICTURE}")
        if path.suffix != ".png":
            raise BucketError(
                f"cannot write {path}: the chart is a PNG file; give a name that ends with .png"
            )
        if not path.parent.is_dir():
            wrong = "is a file" if path.parent.exists() else "is not an existing directory"
            raise BucketError(f"cannot write {path}: {path.parent} {wrong}; give a file in a directory")


def _reach(uris: Sequence[str]) -> AbstractContextManager[object]:
    """Start the embedded bucket if one of the URIs is in it."""
    return embedded_bucket() if any(map(uses_embedded_bucket, uris)) else nullcontext()

"""Command line entry point: parses the arguments and runs a command.

    python main.py CONFIG.yaml [key=value ...]      train
    python main.py convert OTHER.yaml               translate another tool's YAML (configs/convert.py)
    python main.py runs | show | compare ...        list, show and compare runs (runs/commands.py)
    python main.py stop | remove RUN                stop a run on any machine, or delete it
    python main.py export | chat | evaluate ...     use a trained checkpoint (training/inference/commands.py)
    python main.py serve | keys ...                 run the fine-tuning service (service/commands.py)

Exit codes: 0 success; 1 training failed or the cluster was lost; 2 rejected before training; 128+signal stopped.
"""

import argparse
import os
import platform
import signal
import sys
import time
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    from utils.processes import Stopped, ignore_signals, raise_signals, record_signals

    if __name__ == "__main__":
        raise_signals()  # the other imports take seconds on a busy machine
    from configs import convert
    from configs.arguments import REJECTED, Parser, describe_surplus, explain_first
    from runs import commands as run_commands
    from service import commands as service_commands
    from training import train
    from training.inference import commands as model_commands
    from utils.errors import AnnealError
except ModuleNotFoundError as error:
    print(
        f"error: {sys.executable} has no package {error.name}. Run main.py with the Python of the project's environment (.venv/bin/python, "
        "made by `make setup`); on a cluster, `python` must be that Python on every node.",
        file=sys.stderr,
    )
    sys.exit(2)
except KeyboardInterrupt as stopped:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    number = signal.Signals(stopped.args[0] if stopped.args else signal.SIGINT)
    print(f"error: stopped by {number.name}", file=sys.stderr)
    sys.exit(128 + number)

_EXAMPLES = """\
examples:
  main.py cookbooks/quickstart/smollm2-135m.yaml                    train
  main.py cookbooks/quickstart/smollm2-135m.yaml lora_config.r=16   override a key of the YAML
  main.py cookbooks/quickstart/smollm2-135m.yaml --dry-run          check everything without training
  main.py convert OTHER.yaml --to run.yaml                          translate another tool's YAML
  main.py runs s3://my-bucket/runs                                  list runs
  main.py chat run:NAME                                             chat with a run's best checkpoint

Options of a command: main.py COMMAND --help. Training options: main.py CONFIG.yaml --help."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code; print an error in one line."""
    raise_signals()
    try:
        code = run_command(arguments)
        sys.stdout.flush()  # while the interpreter shuts down, a closed pipe would be an error
        return code
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except AnnealError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        record_signals()
        print(f"error: stopped by {stopped.name}", file=sys.stderr)
        return stopped.exit_code


def run_command(arguments: list[str]) -> int:
    """Parse the arguments, run the command and return its exit code."""
    began = time.monotonic()
    if "" in arguments:  # an empty path would mean the working directory
        print("error: an argument is empty. Check for an unset shell variable.", file=sys.stderr)
        return REJECTED
    parser, commands = build_parser()
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help(None if arguments else sys.stderr)
        return 0 if arguments else REJECTED
    if arguments[0] == "--version":
        print(describe_version())
        return 0
    if error := explain_first(arguments, commands):
        print(f"error: {error}", file=sys.stderr)
        return REJECTED
    name = arguments[0] if arguments[0] in commands else "train"
    command = commands[name]
    # Options may be mixed with positional arguments, which subparsers do not support.
    given = arguments[name != "train" :]
    command.reject_unknown(given)
    parsed, surplus = command.parse_known_intermixed_args(given)
    if surplus:
        command.error(describe_surplus(name, given, surplus))
    values = vars(parsed)
    if name == "train":
        check_train_options(command, values)
        return train.run(train.Options(**values), began)
    return values.pop("run_command")(**values) or 0


def describe_version() -> str:
    """Return the version of the project and of the packages that decide most about a run."""
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text("utf-8"))["project"]
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "ray", "transformers", "trl", "peft")
    )
    return f"{project['name']} {project['version']} (Python {platform.python_version()}, {packages})"


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the top-level parser and the parser of each command."""
    parser = Parser(
        prog="main.py",
        usage="main.py CONFIG.yaml [key=value ...] [options]\n       main.py COMMAND ... [options]",
        description="Fine-tune an LLM as a Ray TorchTrainer job described by a YAML file, and use the trained model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="store_true", help="print the versions of Anneal and its packages"
    )
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", parser_class=Parser, prog="main.py"
    )
    commands = {"train": _train_parser()}
    for module in (convert, run_commands, model_commands, service_commands):
        for name, text in module.COMMANDS.items():
            commands[name] = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        module.add_arguments(commands)
    return parser, commands


def check_train_options(parser: Parser, values: dict[str, Any]) -> None:
    """Reject incompatible training options."""
    if values["config"] is None:
        parser.error("no YAML file given: main.py CONFIG.yaml")
    if values["detach"] and not values["job_server"]:
        parser.error("--detach requires --submit URL")


def _train_parser() -> Parser:
    parser = Parser(
        prog="main.py CONFIG.yaml",
        usage="main.py CONFIG.yaml [key=value ...] [--print-config | --dry-run | --submit URL [--detach]] [--json]",
        description="Train as a Ray TorchTrainer job described by a YAML file.",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a YAML key; use dots for nested keys: lora_config.r=16",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--print-config",
        action="store_true",
        help="validate only the YAML and print the resolved configuration",
    )
    mode.add_argument(
        "--dry-run",
        action="store_true",
        help="run every check that needs no workers, print the plan and exit",
    )
    mode.add_argument(
        "--submit",
        dest="job_server",
        metavar="http://HEAD:8265",
        help="submit the run to this cluster's job server and follow its output; Ctrl-C leaves the job running",
    )
    parser.add_argument("--detach", action="store_true", help="with --submit: exit without following the job")
    parser.add_argument(
        "--json",
        dest="as_json",
        action="store_true",
        help="print the result (or the plan) as JSON on the last line of standard output",
    )
    return parser


if __name__ == "__main__":
    code = main(sys.argv[1:])
    ignore_signals()
    sys.exit(code)

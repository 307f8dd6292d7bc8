"""Command line entry point: parses the arguments and runs a command.

    python main.py CONFIG.yaml [key=value ...]      train
    python main.py convert OTHER.yaml               translate another tool's YAML (configs/convert.py)
    python main.py runs | show | compare ...        list, show and compare runs (runs/commands.py)
    python main.py stop | remove RUN                stop a run on any machine, or delete it
    python main.py export | chat | evaluate ...     use a trained checkpoint (training/inference/commands.py)
    python main.py serve | keys ...                 run the fine-tuning service (service/commands.py)

Exit codes: 0 success; 1 failed after training started; 2 rejected before training; 128+signal stopped.
"""

import argparse
import platform
import re
import shlex
import signal
import sys
import time
import tomllib
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, get_args

try:
    from utils.processes import Stopped, ignore_signals, raise_signals, record_signals

    if __name__ == "__main__":
        raise_signals()  # the other imports take seconds on a busy machine
    from configs import convert
    from configs.explain import meant_key, other_tools_key
    from configs.loading import ConfigError, load_config
    from configs.other_tools import find
    from configs.schema import Column, FinetuneConfig
    from configs.yaml_source import SECRETS_COME_FROM, looks_secret, names_secret, plain_scalar
    from runs import commands as run_commands
    from service import commands as service_commands
    from training import train
    from training.inference import commands as model_commands
    from utils.command_line import main_line
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

REJECTED = 2
COMMANDS_OF_OTHERS = {
    "preprocess": ["CONFIG.yaml", "--dry-run"],
    "inference": ["chat", "RUN"],
    "merge-lora": ["export", "RUN"],
    "merge": ["export", "RUN"],
    "eval": ["evaluate", "RUN", "--data", "FILE"],
}
"""Commands of Axolotl and LLaMA-Factory -> arguments of main.py."""
TAKES_SURPLUS = {"chat": "--prompt", "convert": "--to", "export": "--to"}
"""Command -> option for a text or a path that follows its argument without an option."""

_EXAMPLES = """\
examples:
  main.py cookbooks/quickstart/smollm2-135m.yaml                    train
  main.py cookbooks/quickstart/smollm2-135m.yaml lora_config.r=16   override a key of the YAML
  main.py cookbooks/quickstart/smollm2-135m.yaml --dry-run          check everything without training
  main.py convert OTHER.yaml --to run.yaml                          translate another tool's YAML
  main.py runs s3://my-bucket/runs                                  list runs
  main.py chat run:NAME                                             chat with a run's best checkpoint

Options of a command: main.py COMMAND --help. Training options: main.py CONFIG.yaml --help."""
_A_RUN = "URI of a run, or run:NAME for a run in the default storage path"


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line and suggests the closest option."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        print(f"error: {message} (options: {self.prog} --help)", file=sys.stderr)
        sys.exit(REJECTED)

    def reject_unknown(self, given: list[str]) -> None:
        """Reject unknown options, all in one message: first those that resemble an option, which decide what the command does."""
        unknown = [place for place, argument in enumerate(given) if self._is_unknown(argument)]
        if not unknown or {"-h", "--help"} & set(given):
            return
        errors = [self._explain_unknown(given, place) for place in unknown]
        ordered = dict.fromkeys(text for _, text in sorted(errors, key=lambda error: error[0]))
        self.error("\n".join(f"unknown argument {text}" for text in ordered))

    def _is_unknown(self, argument: str) -> bool:
        is_option = re.fullmatch(r"--?[A-Za-z][^\s=]*(=.*)?", argument, re.DOTALL)
        return is_option is not None and argument.partition("=")[0] not in self._option_string_actions

    def _explain_unknown(self, given: list[str], place: int) -> tuple[int, str]:
        """Return (rank of the error, the unknown option at this place of the command line with its fix)."""
        option, separator, value = given[place].partition("=")
        if not separator:
            following = next(iter(given[place + 1 :]), "")
            value = "" if following.startswith("-") or "=" in following else following
        name = option.lstrip("-").replace("_", "-")
        own = [known.removeprefix("--") for known in self._option_string_actions if known.startswith("--")]
        nearest = next(iter(get_close_matches(name, own, n=1)), None)
        if name in own or not self.prog.endswith(".yaml"):
            return (0, f"{option}: did you mean --{nearest}?") if nearest else (3, option)
        key = name.replace("-", "_")
        if names_secret(key) or looks_secret(value):
            return 0, f"{option}: {SECRETS_COME_FROM}"
        if key == "config":
            return 0, f"{option}: the path of the YAML needs no option: main.py {value}"
        if key in FinetuneConfig.model_fields:
            return 1, f"{option}: keys of the YAML are written without dashes: {key}={value or 'VALUE'}"
        if row := find(key):
            advice = other_tools_key(key, plain_scalar(value or "true"), as_overrides=True)
            return 1 if row.ours else 2, f"{option}: {advice}"
        if nearest:
            return 0, f"{option}: did you mean --{nearest}?"
        if ours := meant_key(key):
            setting = (
                shlex.quote(ours.replace(": ", "=", 1)) if ": " in ours else f"{ours}={value or 'VALUE'}"
            )
            return 1, f"{option}: did you mean {setting}? Keys of the YAML are written without dashes"
        return 3, option


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code; print an error in one line."""
    raise_signals()
    try:
        return run_command(arguments)
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
    if arguments[0] == "train" and not Path("train").exists():
        print(f"error: train: {describe_training(arguments[1:])}", file=sys.stderr)
        return REJECTED
    if arguments[0] == "--version":
        print(describe_version())
        return 0
    if other := COMMANDS_OF_OTHERS.get(arguments[0].replace("_", "-")):
        print(
            f"error: {arguments[0]}: a command of another tool. Here it is: {main_line(*other)}",
            file=sys.stderr,
        )
        return REJECTED
    if meant := behind_its_argument(arguments, commands):
        print(
            f"error: {meant[0]}: a command goes before its arguments: did you mean {main_line(*meant)}?",
            file=sys.stderr,
        )
        return REJECTED
    if meant := nearest_command(arguments[0], commands):
        print(
            f"error: {arguments[0]}: no such file or command: did you mean main.py {meant}?",
            file=sys.stderr,
        )
        return REJECTED
    if is_neither_file_nor_command(arguments[0], commands):
        known = ", ".join(name for name in commands if name != "train")
        print(
            f"error: {arguments[0]}: no such file or command. Write the path of a YAML to train, or a command: {known}",
            file=sys.stderr,
        )
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


def describe_training(arguments: list[str]) -> str:
    """Return the command that trains, for arguments that follow `train`; if it would be rejected, the error of their YAML."""
    yaml = Path(next(iter(arguments), ""))
    if yaml.suffix in (".yaml", ".yml"):
        try:
            load_config(yaml, [argument for argument in arguments[1:] if not argument.startswith("-")])
        except ConfigError as error:
            return f"training needs no command. {error}"
    return f"training needs no command: {main_line(*arguments or ['CONFIG.yaml'])}"


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
    commands = {
        "train": _train_parser(),
        **{
            name: subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
            for name, text in {
                **convert.COMMANDS,
                **run_commands.COMMANDS,
                **model_commands.COMMANDS,
                **service_commands.COMMANDS,
            }.items()
        },
    }
    _add_convert_arguments(commands["convert"])
    _add_run_arguments(commands)
    _add_export_arguments(commands["export"])
    _add_chat_arguments(commands["chat"])
    _add_evaluate_arguments(commands["evaluate"])
    _add_service_arguments(commands["serve"], commands["keys"])
    return parser, commands


def behind_its_argument(arguments: list[str], commands: dict[str, Parser]) -> list[str] | None:
    """Return the arguments in the right order if a command follows its run or YAML; None if they are in order."""
    first, *others = arguments
    name = next((word for word in others if word in commands), None)
    if name is None or first in commands or first.startswith("-"):
        return None
    others.remove(name)
    if name == "train":
        return [first, *others]
    if Path(first).suffix in (".yaml", ".yml") and name not in ("convert", "serve"):
        first = "STORAGE_PATH" if name == "runs" else "RUN"
    return [name, first, *others]


def describe_surplus(name: str, given: list[str], surplus: list[str]) -> str:
    """Return the error of arguments that a command does not take, with the option that takes them."""
    option = TAKES_SURPLUS.get(name)
    if option is None or option in given:
        return f"unrecognized arguments: {' '.join(surplus)}"
    kept = [argument for argument in given if argument not in surplus]
    return f"{surplus[0]}: did you mean {main_line(name, *kept, option, ' '.join(surplus))}?"


def nearest_command(word: str, commands: dict[str, Parser]) -> str | None:
    """Return the closest command to a misspelled first argument; None for a file, an option or a command."""
    path = Path(word)
    if word in commands or word.startswith("-") or path.suffix in (".yaml", ".yml") or path.exists():
        return None
    return next(iter(get_close_matches(word, [name for name in commands if name != "train"], n=1)), None)


def is_neither_file_nor_command(word: str, commands: dict[str, Parser]) -> bool:
    """Return whether the first argument is a word that names neither a command nor a file that could be a YAML."""
    path = Path(word)
    return not (word in commands or word.startswith("-") or path.suffix or "/" in word or path.exists())


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


def _add_convert_arguments(command: Parser) -> None:
    command.set_defaults(run_command=convert.convert_command)
    command.add_argument("source", type=Path, metavar="OTHER.yaml", help="the other tool's YAML")
    command.add_argument(
        "--to", dest="target", type=Path, metavar="FILE", help="new file to write; default: standard output"
    )


def _add_run_arguments(commands: dict[str, Parser]) -> None:
    listing, showing, comparing = commands["runs"], commands["show"], commands["compare"]
    listing.set_defaults(run_command=run_commands.list_command)
    listing.add_argument(
        "storage_path",
        nargs="?",
        metavar="STORAGE_PATH",
        help="bucket prefix or directory of the runs; default: the default storage path",
    )
    showing.set_defaults(run_command=run_commands.show_command)
    showing.add_argument("run", metavar="RUN", help=_A_RUN)
    comparing.set_defaults(run_command=run_commands.compare_command)
    comparing.add_argument("runs", nargs="+", metavar="RUN", help=_A_RUN)
    comparing.add_argument(
        "--picture",
        type=Path,
        default=Path(run_commands.PICTURE),
        metavar="FILE.png",
        help="write the eval loss curves to this file; default: %(default)s in the working directory",
    )
    stopping, removing = commands["stop"], commands["remove"]
    stopping.set_defaults(run_command=run_commands.stop_command)
    stopping.add_argument("run", metavar="RUN", help=_A_RUN)
    removing.set_defaults(run_command=run_commands.remove_command)
    removing.add_argument("run", metavar="RUN", help=_A_RUN)
    removing.add_argument("--yes", dest="is_confirmed", action="store_true", help="do not ask")
    for command in (listing, showing, comparing, stopping):
        _add_json(command)


def _add_json(command: Parser) -> None:
    command.add_argument("--json", dest="as_json", action="store_true", help="print only one line of JSON")


def _add_checkpoint(command: Parser) -> None:
    command.add_argument("run", metavar="RUN", help=f"{_A_RUN}, or the URI of one of its checkpoints")
    command.add_argument(
        "--base",
        metavar="URI",
        help="base model of the adapter, if it is no longer where the run was trained: hub id, directory or URI",
    )


def _add_max_new_tokens(command: Parser) -> None:
    command.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=512,
        metavar="N",
        help="maximum number of tokens per answer; default: %(default)s",
    )


def _add_export_arguments(command: Parser) -> None:
    command.set_defaults(run_command=model_commands.export_command)
    _add_checkpoint(command)
    command.add_argument(
        "--to",
        metavar="URI",
        help="empty bucket prefix or directory to export to; default: exports/ in the run",
    )
    command.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="dtype of the weights; default: %(default)s",
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--no-merge",
        dest="merge",
        action="store_false",
        help="export only the adapter, in the format that vLLM loads",
    )
    form.add_argument(
        "--gguf",
        action="store_true",
        help="also write a GGUF file with llama.cpp's converter (make setup-gguf)",
    )
    command.add_argument(
        "--gguf-type",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="type of the weights in the GGUF file; default: that of --dtype",
    )
    command.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare the export with the model as trained before it is published; default: if memory suffices",
    )
    command.add_argument(
        "--push",
        type=_hub_id,
        metavar="ORG/NAME",
        help="push the export to this model repository of the Hugging Face Hub; HF_TOKEN needs write access",
    )
    command.add_argument(
        "--private", action="store_true", help="make a repository that --push creates private"
    )
    _add_json(command)


def _add_chat_arguments(command: Parser) -> None:
    command.set_defaults(run_command=model_commands.chat_command)
    _add_checkpoint(command)
    command.add_argument("--prompt", metavar="TEXT", help="answer this prompt and exit")
    _add_max_new_tokens(command)


def _add_evaluate_arguments(command: Parser) -> None:
    command.set_defaults(run_command=model_commands.evaluate_command)
    _add_checkpoint(command)
    command.add_argument(
        "--data", required=True, metavar="URI", help="held-out rows in the format of the training data"
    )
    command.add_argument(
        "--match",
        choices=("number", "text"),
        help="compare the final number (GSM8K: #### 18) or the complete text; default: number, or text for classification",
    )
    command.add_argument(
        "--column",
        dest="columns",
        action="append",
        type=_column,
        default=[],
        metavar="OURS=THEIRS",
        help="map our column to the file's column, such as prompt=question; repeatable; default: the run's columns",
    )
    command.add_argument(
        "--name",
        type=_name,
        metavar="NAME",
        help="write evaluations/NAME.jsonl in the run; default: name of the data file and the step",
    )
    command.add_argument(
        "--num-devices",
        type=_positive,
        default=1,
        metavar="N",
        help="number of Ray workers, with one device per worker; default: 1",
    )
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), help="default: the run's device")
    command.add_argument(
        "--batch-size",
        type=_positive,
        default=8,
        metavar="N",
        help="rows per batch on each worker; default: 8",
    )
    _add_max_new_tokens(command)
    _add_json(command)


def _add_service_arguments(serving: Parser, keys: Parser) -> None:
    serving.set_defaults(run_command=service_commands.serve_command)
    serving.add_argument("config", type=Path, metavar="SERVICE.yaml")
    serving.add_argument(
        "--port", type=_port, metavar="PORT", help="port to listen on; default: the service YAML's"
    )
    serving.add_argument(
        "--dry-run",
        action="store_true",
        help="check the service YAML, the bucket, the models and the memory of jobs, and exit",
    )
    _add_json(serving)
    keys.set_defaults(run_command=service_commands.keys_command)
    keys.add_argument("action", choices=("create", "list", "revoke"))
    keys.add_argument(
        "project", metavar="PROJECT", help="project whose files, jobs and models the key accesses"
    )
    keys.add_argument(
        "--id", dest="key_id", metavar="KEY_ID", help="with revoke: the only key to revoke; default: all"
    )
    keys.add_argument(
        "--service",
        type=Path,
        default=service_commands.DEFAULT_SERVICE,
        metavar="SERVICE.yaml",
        help="service YAML, which names the bucket; default: %(default)s",
    )
    _add_json(keys)


def _port(text: str) -> int:
    port = _positive(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"{text}: the highest port is 65535")
    return port


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: write an integer of at least 1")
    return int(text)


def _column(text: str) -> tuple[str, str]:
    ours, separator, theirs = text.partition("=")
    if not separator or not theirs or ours not in get_args(Column):
        raise argparse.ArgumentTypeError(
            f"{text}: write OURS=THEIRS, with OURS one of {', '.join(get_args(Column))}"
        )
    return ours, theirs


def _hub_id(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text):
        raise argparse.ArgumentTypeError(
            f"{text}: write ORG/NAME, a model repository of the Hugging Face Hub"
        )
    return text


def _name(text: str) -> str:
    if not text.replace("-", "").replace("_", "").replace(".", "").isalnum() or text.startswith("."):
        raise argparse.ArgumentTypeError(
            f"{text}: use letters, digits, '.', '_' and '-', without a leading '.'"
        )
    return text


if __name__ == "__main__":
    code = main(sys.argv[1:])
    ignore_signals()
    sys.exit(code)

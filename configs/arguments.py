"""The parser of command lines: it rejects a mistyped one in one line, with the command that was meant."""

import argparse
import re
import shlex
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from configs.explain import meant_key, other_tools_key
from configs.loading import ConfigError, load_config
from configs.other_tools import find
from configs.schema import FinetuneConfig
from configs.yaml_source import SECRETS_COME_FROM, looks_secret, names_secret, plain_scalar
from utils.command_line import main_line

REJECTED = 2
"""Exit code of a rejected command line."""
_RESUMING = ("resume", "continue", "restart")
"""Words for which there is no command; `remove` resembles one of them."""
_COMMANDS_OF_OTHERS = {
    "preprocess": ["CONFIG.yaml", "--dry-run"],
    "inference": ["chat", "RUN"],
    "merge-lora": ["export", "RUN"],
    "merge": ["export", "RUN"],
    "eval": ["evaluate", "RUN", "--data", "FILE"],
}
"""Commands of Axolotl and LLaMA-Factory -> arguments of main.py."""
_TAKES_SURPLUS = {"chat": "--prompt", "convert": "--to", "export": "--to"}
"""Command -> option for a text or a path that follows its argument without an option."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line and suggests the closest option."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(REJECTED, f"error: {message} (options: {self.prog} --help)\n")

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


def explain_first(arguments: list[str], commands: Collection[str]) -> str | None:
    """Return the error of a command line that begins with neither a YAML, an option nor a command; None if it does."""
    first, *others = arguments
    if first == "train" and not Path("train").exists():
        return f"train: {_describe_training(others)}"
    if first in _RESUMING and not Path(first).exists():
        config = [argument for argument in others if argument.endswith((".yaml", ".yml"))][:1]
        return f"{first}: the command that started a run also resumes it: {main_line(*config or ['CONFIG.yaml'])}"
    if other := _COMMANDS_OF_OTHERS.get(first.replace("_", "-")):
        return f"{first}: a command of another tool. Here it is: {main_line(*other)}"
    if meant := _behind_its_argument(arguments, commands):
        return f"{meant[0]}: a command goes before its arguments: did you mean {main_line(*meant)}?"
    path = Path(first)
    if first in commands or first.startswith("-") or path.suffix in (".yaml", ".yml") or path.exists():
        return None
    known = [name for name in commands if name != "train"]
    if nearest := next(iter(get_close_matches(first, known, n=1)), None):
        return f"{first}: no such file or command: did you mean main.py {nearest}?"
    if path.suffix or "/" in first:  # a file, which loading reports
        return None
    return f"{first}: no such file or command. Write the path of a YAML to train, or a command: {', '.join(known)}"


def describe_surplus(name: str, given: list[str], surplus: list[str]) -> str:
    """Return the error of arguments that a command does not take, with the option that takes them."""
    option = _TAKES_SURPLUS.get(name)
    if option is None or option in given:
        return f"unrecognized arguments: {' '.join(surplus)}"
    kept = [argument for argument in given if argument not in surplus]
    return f"{surplus[0]}: did you mean {main_line(name, *kept, option, ' '.join(surplus))}?"


def _describe_training(arguments: list[str]) -> str:
    """Return the command that trains, for arguments that follow `train`; if it would be rejected, the error of their YAML."""
    yaml = Path(next(iter(arguments), ""))
    if yaml.suffix in (".yaml", ".yml"):
        try:
            load_config(yaml, [argument for argument in arguments[1:] if not argument.startswith("-")])
        except ConfigError as error:
            return f"training needs no command. {error}"
    return f"training needs no command: {main_line(*arguments or ['CONFIG.yaml'])}"


def _behind_its_argument(arguments: list[str], commands: Collection[str]) -> list[str] | None:
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

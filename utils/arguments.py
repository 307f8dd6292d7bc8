"""Options that several commands have, and the types of their values."""

import argparse


def add_json_option(command: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    command.add_argument("--json", dest="as_json", action="store_true", help="print only one line of JSON")


def positive(text: str) -> int:
    """Return the integer of at least 1 that an argument has; raise ArgumentTypeError for another value."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: write an integer of at least 1")
    return int(text)

#!/usr/bin/env bash
# ray.init() and ray.shutdown() replace the SIGTERM handler of a driver behind Python's back.
#
# ray.init() installs a Python handler that exits with code 15. One would expect that a handler
# which the program installs afterwards stays installed. But ray.shutdown() restores the kernel's default action in C++, for SIGTERM and the
# fatal signals, and not what was there before. Python does not notice: signal.getsignal() still returns the program's handler.
# From then on, SIGTERM terminates the process at once: `finally` blocks, atexit handlers and locks are skipped, such as the upload
# of a result after the cluster is gone. SIGINT keeps its handler. Installing the handler again after ray.shutdown() helps.
#
# Seen with ray==2.60.0 and Python 3.11 on Linux, local cluster.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check ray==2.60.0
"$directory/venv/bin/python" - <<'PYTHON'
import re
import signal
from pathlib import Path

import ray


def handled() -> list[str]:
    """Return which of SIGINT and SIGTERM the kernel delivers to a handler of this process."""
    caught = int(re.search(r"^SigCgt:\s*(\w+)", Path("/proc/self/status").read_text(), re.M)[1], 16)
    return [number.name for number in (signal.SIGINT, signal.SIGTERM) if caught >> (number - 1) & 1]


def own_handler(number: int, frame: object) -> None:
    print("cleaning up")


ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
signal.signal(signal.SIGTERM, own_handler)
signal.signal(signal.SIGINT, own_handler)
before = handled()
ray.shutdown()
after = handled()
print(f"handled before ray.shutdown(): {before}, after: {after}")
assert signal.getsignal(signal.SIGTERM) is own_handler, "Python still believes in the handler"
assert before == ["SIGINT", "SIGTERM"]
assert after == ["SIGINT"], "ray.shutdown() keeps the handler now"
PYTHON

#!/usr/bin/env bash
# A Ray worker that shares a CPU core with one other process gets 3% of it, not half, and so do the processes that it starts.
#
# Ray gives each worker a niceness of 15, so that raylets and the GCS answer under load. One would expect a training worker, and the
# loader processes that it starts, to share the cores of a node fairly with an exporter, an editor or a second driver. Under Linux's
# scheduler, a process of niceness 15 has a weight of 36 and one of niceness 0 has 1024. Nothing is logged, and `ray status` shows the
# core as the worker's. Where training reads, tokenizes or augments on the CPU, the GPU waits for it. The driver itself keeps its
# niceness, so the same code is fast outside Ray. RAY_worker_niceness=0 in the environment of the node's `ray start`, or of the driver
# that starts a local cluster, shares the cores equally.
#
# Here, a worker and then a process that it starts share one core with a busy process, and their CPU seconds are compared.
#
# Seen with ray==2.60.0 and Python 3.11 on Linux: niceness 15 and 0.04 of the CPU seconds; 0 and 1.0 with RAY_worker_niceness=0.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check ray==2.60.0
cat > "$directory/share.py" <<'PYTHON'
import json
import os
import subprocess
import sys
import time

import ray

SECONDS = 5
FAIR = os.environ.get("RAY_worker_niceness") == "0"


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compete(busy: int) -> list[float]:
    """Return the niceness of this process, and its CPU seconds for each one of the busy process on the same core."""
    began, used = cpu_seconds(busy), time.process_time()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        pass
    return [
        os.getpriority(os.PRIO_PROCESS, 0),
        (time.process_time() - used) / (cpu_seconds(busy) - began),
    ]


@ray.remote
def in_worker(core: int, busy: int, script: str) -> dict[str, list[float]]:
    os.sched_setaffinity(0, {core})
    child = subprocess.run([sys.executable, script, str(busy)], capture_output=True, text=True, check=True)
    return {"worker": compete(busy), "process that it starts": json.loads(child.stdout)}


if sys.argv[1:]:
    print(json.dumps(compete(int(sys.argv[1]))))
else:
    core = min(os.sched_getaffinity(0))
    busy = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"]
    )
    try:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        measured = ray.get(in_worker.remote(core, busy.pid, os.path.abspath(__file__)))
    finally:
        busy.kill()
    for who, (niceness, part) in measured.items():
        print(f"{who}: niceness {niceness}, {part:.2f} CPU seconds for each one of the busy process")
        assert (niceness == 0 and part > 0.7) if FAIR else (niceness == 15 and part < 0.1), "this has changed"
PYTHON
"$directory/venv/bin/python" "$directory/share.py"
RAY_worker_niceness=0 "$directory/venv/bin/python" "$directory/share.py"

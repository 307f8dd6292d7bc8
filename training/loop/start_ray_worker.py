"""Start a worker process of a local cluster, as Ray's setup_worker.py does, but without importing Ray only for that.

The raylet runs this file; see `lean_head_node`. Its first argument is Ray's worker script. A worker with a runtime environment
gets Ray's own setup.
"""

import os
import sys

script, *arguments = sys.argv[1:]
if any(argument.startswith("--serialized-runtime-env-context") for argument in arguments):
    arguments.insert(0, script)
    script = os.path.join(os.path.dirname(script), "setup_worker.py")  # noqa: PTH118, PTH120  # pathlib takes time to import
else:
    arguments.remove("--language=PYTHON")
os.execv(sys.executable, [sys.executable, script, *arguments])

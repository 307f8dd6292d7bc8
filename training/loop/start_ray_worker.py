"""Start a worker process of a local cluster, as Ray's setup_worker.py does, but without importing Ray only for that.

The raylet runs this file; see `lean_head_node`. Its first argument is Ray's worker script. The variables and the working directory
of a runtime environment, such as that of a service's jobs, are set as Ray's RuntimeEnvContext.exec_worker does.
"""

import json
import os
import re
import shlex
import sys

_CONTEXT = "--serialized-runtime-env-context="

script, *arguments = sys.argv[1:]
arguments.remove("--language=PYTHON")
contexts = [argument for argument in arguments if argument.startswith(_CONTEXT)]
if not contexts:
    os.execv(sys.executable, [sys.executable, script, *arguments])
arguments.remove(contexts[0])
context = json.loads(contexts[0].removeprefix(_CONTEXT))
for name, value in context["env_vars"].items():
    os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
command = [*context["command_prefix"], "exec", context["py_executable"], shlex.join([script, *arguments])]
os.execvp("bash", ["bash", "-c", " ".join(command)])

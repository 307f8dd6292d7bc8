"""The front door: a YAML becomes a Ray TorchTrainer job.

    python main.py CONFIG.yaml [key=value ...] [--print-config | --dry-run | --submit URL [--detach]] [--json]
    python main.py runs | show | compare ...      looks at what was trained; see runs/commands.py
    python main.py export | chat | evaluate ...   uses it; see training/commands.py

Exit codes: 0 done; 2 config or data refused; 1 training failed; 128+signal stopped.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from configs.loading import LoadedConfig, default_keys, load_config, to_marked_yaml
from configs.schema import ExportConfig
from runs import commands as looking
from training import commands as using
from training.addresses import ClusterTarget, target_cluster
from utils.console import library_output_in, open_consoles
from utils.errors import AnnealError
from utils.processes import FORWARDED, importing, run_in_own_session

DONE, FAILED, REJECTED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str]) -> int:
    """Check the file, then plan and run; returns the exit code."""
    began = time.monotonic()
    if "" in arguments:  # it would mean the working directory, or nothing
        print("error: an argument is empty: was a variable not set?", file=sys.stderr)
        return REJECTED
    if arguments and arguments[0] in looking.COMMANDS:
        return look(arguments)
    if arguments and arguments[0] in using.COMMANDS:
        return use(arguments)
    if arguments and (meant := misspelt_command(arguments[0])):
        print(
            f"error: {arguments[0]}: there is no such file, and no such command: did you mean main.py {meant}?",
            file=sys.stderr,
        )
        return REJECTED
    options = parse_arguments(arguments)
    try:
        loaded = load_config(options.config, options.overrides)
    except AnnealError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    output, errors = open_consoles()
    for warning in loaded.warnings:
        errors.write(f"warning: {warning}\n")
    if options.print_config:
        output.write(f"{json.dumps(resolved(loaded))}\n" if options.json else to_marked_yaml(loaded))
        return DONE
    command = ["python", "main.py", str(options.config), *options.overrides]
    if options.submit:
        return submit(loaded, options, [*command, "--submit", options.submit])
    target = target_cluster()
    if options.dry_run or not target.is_local:
        return plan_and_run(loaded, options, command, began, target)
    # Ray's own processes must outlive a signal to the process group, until the checkpoint is committed. Those of a cluster do,
    # and its job server signals each of a job's processes by itself.
    return run_in_own_session(lambda: plan_and_run(loaded, options, command, began, target))


def look(arguments: list[str]) -> int:
    """Carry out a command that looks at runs; returns the exit code."""
    try:
        looking.run_command(arguments)
    except AnnealError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def use(arguments: list[str]) -> int:
    """Carry out a command that uses what was trained; returns the exit code."""
    options = using.parse_arguments(arguments)
    set_ray_up(target_cluster())
    try:
        using.run_command(options)
    except AnnealError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def misspelt_command(word: str) -> str | None:
    """The command that a first argument may mean that is neither a command nor a file."""
    path = Path(word)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return None
    return next(iter(get_close_matches(word, (*looking.COMMANDS, *using.COMMANDS), n=1)), None)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; a wrong one ends the process with code 2."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="main.py CONFIG.yaml [key=value ...] [--print-config | --dry-run | --submit URL [--detach]] [--json]",
        description="Fine-tune an LLM as a Ray TorchTrainer job that a YAML describes.",
        epilog=f"Look at runs with main.py {', '.join(looking.COMMANDS)}, use what they trained with "
        f"{', '.join(using.COMMANDS)}; each says how under --help.",
    )
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the YAML; dotted for sections: lora_config.r=16",
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--print-config", action="store_true", help="check the file alone and print the resolved YAML"
    )
    depth.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that needs no workers, print the plan, and stop",
    )
    depth.add_argument(
        "--submit",
        metavar="http://HEAD:8265",
        help="run as a job of this cluster's job server, and follow it; Ctrl-C leaves the job running",
    )
    parser.add_argument("--detach", action="store_true", help="with --submit: do not follow the job")
    parser.add_argument(
        "--json",
        action="store_true",
        help="end standard output with the result (or the plan) as JSON on its last line",
    )
    options = parser.parse_intermixed_args(arguments)  # options may stand before overrides
    if options.config is None:
        parser.error("name a YAML file: main.py CONFIG.yaml")
    if options.detach and not options.submit:
        parser.error("--detach goes with --submit URL")
    return options


def set_ray_up(target: ClusterTarget) -> None:
    """Settings that Ray reads when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The cluster of one machine gets no notice of preemption; watching for it is a process on cores that train.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0" if target.is_local else "1")
    # A report waits for the next health check.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Its patch of print breaks the hashing of datasets.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")


def plan_and_run(
    loaded: LoadedConfig,
    options: argparse.Namespace,
    command: list[str],
    began: float,
    target: ClusterTarget,
) -> int:
    """Everything behind the file: the plan, the run, the report."""
    set_ray_up(target)
    with importing():
        from training.addresses import check_cluster_answers
        from training.data.report import to_html
        from training.devices import check_devices_are_here
        from training.display import Watch, show_completed, show_error, show_page, show_plan, show_result
        from training.paths import make_scratch_directory, needs_embedded_bucket
        from training.planner import make_plan
        from utils.embedded_bucket import embedded_bucket
        from utils.files import write_atomically

    output, progress = open_consoles()
    screen = progress if options.json else output
    try:
        logs = make_scratch_directory(loaded.config) / "logs"
        driver_log = logs / f"{loaded.path.stem}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
        with ExitStack() as stack:
            stack.enter_context(library_output_in(driver_log))
            watch = stack.enter_context(Watch(progress))
            check_cluster_answers(target)
            if needs_embedded_bucket(loaded.config):
                watch.phase("starting the embedded bucket")
                stack.enter_context(embedded_bucket())
            plan, report, prepared = make_plan(loaded, target=target, progress=watch.checking)
            if options.dry_run and target.address:
                watch.phase("asking the cluster")
                from training.cluster import ask_cluster, workers_of

                report = report.model_copy(update={"cluster": ask_cluster(workers_of(plan), target.address)})
            if not options.dry_run and not report.completed:
                check_devices_are_here(plan.config, plan.device, target)
            if options.dry_run or not report.completed:
                show_plan(screen, report)
            if report.completed:
                show_completed(screen)
            if options.dry_run:
                page = make_scratch_directory(loaded.config) / "reports" / f"{report.run_name}.html"
                write_atomically(page, to_html(report, report.run_name).encode())
                show_page(screen, page)
                print_json(output, json.dumps(report.model_dump(mode="json") | resolved(loaded)), options)
                return DONE
            if report.completed:
                result = report.completed
            else:
                watch.phase("starting the workers")
                with importing():
                    from training.job import run_job

                result = run_job(
                    plan,
                    prepared,
                    report,
                    command=command,
                    began=began,
                    driver_log=driver_log,
                    on_event=watch.on_event,
                )
    except AnnealError as error:
        show_error(progress, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        show_error(progress, "interrupted before training began; nothing was written")
        return INTERRUPTED
    show_result(screen, result, command, trains_adapter=loaded.config.trains_adapter)
    if result.status == "failed":
        show_error(progress, result.reason)
    exported = DONE
    if result.status == "completed" and loaded.config.export:
        exported = export_completed(result.run_uri, loaded.config.export, screen, progress)
    print_json(output, result.model_dump_json(), options)
    return exported or result.exit_code


def submit(loaded: LoadedConfig, options: argparse.Namespace, command: list[str]) -> int:
    """Check the run from here, hand it over as a job, and follow it; returns the exit code of the job's own main.py."""
    target = ClusterTarget(options.submit)
    # Ray's client prefers the variable to the address it is handed.
    os.environ["RAY_ADDRESS"] = options.submit
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)
    set_ray_up(target)
    from training import submission
    from training.addresses import check_job_server_answers
    from training.display import (
        Watch,
        show_completed,
        show_error,
        show_submitted,
        show_warning,
    )
    from training.paths import make_scratch_directory
    from training.travel import pack

    output, progress = open_consoles()
    job = None
    try:
        with ExitStack() as stack:
            # output_dir is a place on the nodes.
            logs = make_scratch_directory(loaded.config.model_copy(update={"output_dir": None})) / "logs"
            log = logs / f"submit-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
            stack.enter_context(library_output_in(log))
            with Watch(progress) as watch, TemporaryDirectory(prefix="anneal-") as directory:
                check_job_server_answers(options.submit)
                watch.phase("packing")
                packed = pack(loaded, Path(directory))
                checked = submission.check_from_here(packed, target, watch.checking)
                report = None if isinstance(checked, str) else checked
                if report and report.completed and not loaded.config.export:  # an export may be left to do
                    show_completed(progress)
                    print_json(output, report.completed.model_dump_json(), options)
                    return DONE
                watch.phase("submitting")
                job = submission.submit(submission.connect(options.submit), options.submit, packed)
            for warning in (
                report.warnings if report else [f"not checked from here, but by the job: {checked}"]
            ):
                show_warning(progress, warning)
            screen = output if options.detach and not options.json else progress
            show_submitted(screen, job, report.run_uri if report else None, command)
            if options.detach:
                print_json(output, job.to_json(), options)
                return DONE
            end = submission.follow(job, lambda line: progress.out(line, highlight=False))
    except AnnealError as error:
        show_error(progress, str(error))
        return FAILED if job else error.exit_code
    except KeyboardInterrupt:
        fate = (
            f"the job goes on; to stop it: {shlex.join(job.stop_command)}" if job else "nothing was submitted"
        )
        show_error(progress, f"interrupted: {fate}")
        return INTERRUPTED
    if end.reason:
        show_error(progress, end.reason)
    if end.result:
        print_json(output, end.result.model_dump_json(), options)
    return end.exit_code


def export_completed(run_uri: str, settings: ExportConfig, screen: Console, progress: Console) -> int:
    """What the YAML's `export` asks for, behind a completed run; returns the exit code."""
    from training.display import show_error

    received: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in FORWARDED:  # the run's end kept them for itself
        signal.signal(number, interrupt)
    try:
        using.export_run(run_uri, settings, screen, progress)
    except AnnealError as error:
        show_error(progress, f"the run is completed, and not exported: {error}")
        return FAILED
    except KeyboardInterrupt:
        show_error(
            progress, "interrupted: the run is completed, and not exported; the same command exports it"
        )
        return 128 + received[0]
    return DONE


def resolved(loaded: LoadedConfig) -> dict[str, Any]:
    """What a plan's JSON says of the file: the configuration, and which of its keys are defaults."""
    return {"config": loaded.config.model_dump(mode="json"), "defaults": default_keys(loaded)}


def print_json(output: Console, text: str, options: argparse.Namespace) -> None:
    """The last line of standard output under --json."""
    if options.json:
        output.print(text, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The train command: validate a YAML and plan the run, then train, print the plan, or submit the run as a job."""

import json
import os
import shlex
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console

from configs.loading import LoadedConfig, default_keys, load_config, to_marked_yaml, with_written
from configs.schema import FinetuneConfig
from training.inference import commands as model_commands
from training.launch.reachability import check_cluster_answers
from training.models.libraries import block_imports, unused_packages
from training.planning.endpoints import (
    AUTH_VARIABLES,
    WRITTEN_VARIABLE,
    ClusterTarget,
    set_ray_environment,
    target_cluster,
)
from utils.command_line import ADDRESS_VARIABLE, COMMAND_VARIABLE, main_command
from utils.console import Output, library_output_in, open_consoles
from utils.errors import AnnealError
from utils.processes import Stopped, importing, raise_signals, record_signals, run_in_own_session

if TYPE_CHECKING:
    from runs.layout import RunResult
    from training.data.prepared import PreparedData
    from training.data.shards import ShardMap
    from training.launch.display import Watch
    from training.loop.ray_internals import LocalWorkers
    from training.planning.plan import RunPlan
    from training.planning.report import PlanReport

DONE, FAILED = 0, 1


@dataclass(frozen=True)
class Options:
    """The train command's arguments."""

    config: Path
    overrides: list[str]
    print_config: bool
    dry_run: bool
    job_server: str | None
    """URL of the job server to submit to."""
    detach: bool
    as_json: bool
    target: ClusterTarget = field(default_factory=target_cluster)
    """Where a run trains that is not submitted."""

    @property
    def command(self) -> list[str]:
        """Return the command that reruns the training, for messages and the report; in a job, the one that submitted it."""
        if submitted := os.environ.get(COMMAND_VARIABLE):
            return json.loads(submitted)
        submit = ["--submit", self.job_server] if self.job_server else []
        address = None if self.job_server else self.target.address
        # In a shell without the variables, the command would start a local cluster or be denied access.
        variables = [f"{ADDRESS_VARIABLE}={address}"] if address else []
        if address or self.job_server:
            variables += [f"{name}={os.environ[name]}" for name in AUTH_VARIABLES if name in os.environ]
        return [*variables, *main_command(str(self.config), *self.overrides, *submit)]


@dataclass(frozen=True)
class Screen:
    """The consoles of a run: with --json, standard output contains only JSON and everything else goes to standard error."""

    output: Output
    progress: Output
    as_json: bool

    @property
    def main(self) -> Console:
        """Return the console for plans and results."""
        return self.progress if self.as_json else self.output

    def print_json(self, text: str) -> None:
        """Print the last line of standard output with --json."""
        if self.as_json:
            self.output.print(text, soft_wrap=True)


def run(options: Options, began: float) -> int:
    """Load the YAML, then print it, plan, train or submit the run; return the exit code.

    Args:
        options: The command line.
        began: time.monotonic() when the process started.
    """
    loaded = load_config(options.config, options.overrides)
    if written := os.environ.get(WRITTEN_VARIABLE):
        loaded = with_written(loaded, load_config(Path(written)))
    screen = Screen(*open_consoles(), options.as_json)
    for warning in loaded.warnings:
        screen.progress.write(f"warning: {warning}\n")
    if options.print_config:
        text = f"{json.dumps(_resolved(loaded))}\n" if options.as_json else to_marked_yaml(loaded)
        screen.output.write(text)
        return DONE
    if options.job_server:
        return submit(loaded, options, options.job_server, screen)
    if options.dry_run or not options.target.is_local:
        return plan_and_train(loaded, options, screen, began)
    # A signal to the process group must not terminate the local cluster before the checkpoint is committed. It does not reach a
    # remote cluster, and a job server signals each process of a job separately.
    return run_in_own_session(
        lambda: plan_and_train(loaded, options, screen, began),
        on_lost=lambda how: _report_lost_driver(loaded, options, screen, how),
    )


def _report_lost_driver(loaded: LoadedConfig, options: Options, screen: Screen, how: str) -> None:
    """Report that the driver process was terminated and could not report anything itself."""
    from training.launch.display import show_error
    from training.planning.paths import scratch_directory

    causes = {
        "SIGKILL": "SIGKILL usually comes from the kernel when memory runs out. ",
        "exit code 1": "Ray ends a process whose raylet has exited. ",
    }
    show_error(
        screen.progress,
        f"the driver process was terminated ({how}). {causes.get(how, '')}Its library output is in "
        f"{scratch_directory(loaded.config) / 'logs'}. The same command resumes from the latest checkpoint, or starts again if there "
        f"is none: {shlex.join(options.command)}",
    )


def plan_and_train(loaded: LoadedConfig, options: Options, screen: Screen, began: float) -> int:
    """Plan the run, train it unless this is a dry run, and print the result; return the exit code."""
    set_ray_environment(options.target)
    block_imports(unused_packages(loaded.config))
    with importing():
        from training.launch.display import show_error

    try:
        result = _plan_and_train(loaded, options, screen, began)
    except AnnealError as error:
        show_error(screen.progress, str(error))
        return error.exit_code
    except Stopped as stopped:
        record_signals()  # another signal must not interrupt this report
        show_error(
            screen.progress,
            f"stopped by {stopped.name} before training started. Nothing was trained; the same command starts again.",
        )
        return stopped.exit_code
    return DONE if result is None else _finish(result, loaded.config, options, screen)


def _plan_and_train(
    loaded: LoadedConfig, options: Options, screen: Screen, began: float
) -> "RunResult | None":
    """Plan the run and train it, unless it is completed, and return its result. In a dry run, print the plan and return None."""
    with importing():
        from training.launch.display import Watch, show_completed
        from training.planning.paths import make_scratch_directory, scratch_errors

    target = options.target
    scratch = make_scratch_directory(loaded.config)
    driver_log = scratch / "logs" / f"{loaded.path.stem}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    with ExitStack() as stack:
        stack.enter_context(scratch_errors(scratch))
        stack.enter_context(library_output_in(driver_log))
        watch = stack.enter_context(Watch(screen.progress))
        _reach_cluster_and_bucket(loaded, target, stack, watch)
        workers = on_cluster = None
        if not options.dry_run:
            workers = stack.enter_context(_head_start(loaded, target))
            on_cluster = stack.enter_context(_rows_on_cluster(loaded, target))
        with importing():
            from training.planning.planner import make_plan

        plan, report, prepared = make_plan(
            loaded, target=target, progress=watch.checking, on_cluster=on_cluster
        )
        if options.dry_run:
            _show_dry_run(loaded, _with_cluster(plan, report, watch), options, screen, watch)
            return None
        if report.completed:
            with watch.paused():
                show_completed(screen.main)
            return report.completed
        return _train(plan, report, prepared, options, screen, watch, began, driver_log, workers)


def _finish(result: "RunResult", config: FinetuneConfig, options: Options, screen: Screen) -> int:
    """Print the result, and export a completed run if the YAML says so; return the exit code."""
    from training.launch.display import show_error, show_result

    show_result(screen.main, result, options.command, trains_adapter=config.trains_adapter)
    if result.status == "failed":
        show_error(screen.progress, result.reason)
    exported = DONE
    if result.status == "completed" and config.final_export:
        exported = export_completed(result.run_uri, config, screen)
    screen.print_json(result.model_dump_json())
    return exported or result.exit_code


def _reach_cluster_and_bucket(
    loaded: LoadedConfig, target: ClusterTarget, stack: ExitStack, watch: "Watch"
) -> None:
    """Check that the cluster answers, and start the embedded bucket if the YAML uses it."""
    from training.planning.paths import needs_embedded_bucket
    from utils.storage.embedded_bucket import embedded_bucket

    check_cluster_answers(target)
    if needs_embedded_bucket(loaded.config):
        watch.phase("starting the embedded bucket")
        stack.enter_context(embedded_bucket())


def _head_start(loaded: LoadedConfig, target: ClusterTarget) -> "AbstractContextManager[LocalWorkers | None]":
    with importing():
        from training.launch.head_start import head_start

    return head_start(loaded.config, target)


def _rows_on_cluster(
    loaded: LoadedConfig, target: ClusterTarget
) -> "AbstractContextManager[ShardMap | None]":
    with importing():
        from training.launch.row_tasks import rows_on_cluster

    return rows_on_cluster(loaded.config, target)


def _train(
    plan: "RunPlan",
    report: "PlanReport",
    prepared: "list[PreparedData]",
    options: Options,
    screen: Screen,
    watch: "Watch",
    began: float,
    driver_log: Path,
    local_workers: "LocalWorkers | None",
) -> "RunResult":
    from training.checkpoints.lease import check_not_held
    from training.launch.display import show_plan
    from training.planning.devices import check_devices_are_here
    from utils.storage.bucket import open_store

    check_devices_are_here(plan.config, plan.device, plan.resolved.target)
    check_not_held(open_store(plan.run_uri))  # before the plan is printed
    with watch.paused():
        show_plan(screen.main, report)
    watch.phase("starting the workers")
    with importing():
        from training.launch.driver import run_job

    return run_job(
        plan,
        prepared,
        report,
        command=options.command,
        began=began,
        driver_log=driver_log,
        local_workers=local_workers,
        on_event=watch.on_event,
    )


def _with_cluster(plan: "RunPlan", report: "PlanReport", watch: "Watch") -> "PlanReport":
    """Return the report with the resources that the target cluster has for the workers."""
    address = plan.resolved.target.address
    if not address:
        return report
    watch.phase("checking the cluster")
    from training.launch.cluster import ask_cluster, workers_of

    return report.model_copy(update={"cluster": ask_cluster(workers_of(plan), address)})


def _show_dry_run(
    loaded: LoadedConfig, report: "PlanReport", options: Options, screen: Screen, watch: "Watch"
) -> None:
    """Print the plan, and write the data report of its rows as a page."""
    from training.data.report_page import to_html
    from training.launch.display import show_completed, show_page, show_plan
    from training.planning.paths import make_scratch_directory
    from utils.files import write_atomically

    with watch.paused():
        show_plan(screen.main, report)
        if report.completed:
            show_completed(screen.main)
        page = make_scratch_directory(loaded.config) / "reports" / f"{report.run_name}.html"
        write_atomically(page, to_html(report, report.run_name).encode())
        show_page(screen.main, page, options.command)
        screen.print_json(json.dumps(report.model_dump(mode="json") | _resolved(loaded)))


def submit(loaded: LoadedConfig, options: Options, job_server: str, screen: Screen) -> int:
    """Check the run locally, submit it as a job and follow it; return the exit code of the job's main.py."""
    target = ClusterTarget(job_server)
    set_ray_environment(target)
    from training.launch import submission
    from training.launch.display import Watch, show_completed, show_error, show_submitted, show_warning
    from training.launch.packaging import pack
    from training.planning.endpoints import check_job_server_answers
    from training.planning.paths import make_scratch_directory
    from training.planning.report import CheckedSample, PlanReport

    progress = screen.progress
    job = None
    try:
        with ExitStack() as stack:
            # output_dir names a directory on the nodes.
            logs = make_scratch_directory(loaded.config.model_copy(update={"output_dir": None})) / "logs"
            log = logs / f"submit-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
            stack.enter_context(library_output_in(log))
            with Watch(progress) as watch, TemporaryDirectory(prefix="anneal-") as directory:
                check_job_server_answers(job_server)
                watch.phase("packaging the job")
                packed = pack(loaded, Path(directory))
                checked = submission.check_from_here(packed, target, watch.checking)
                report = checked if isinstance(checked, PlanReport) else None
                if (
                    report and report.completed and not loaded.config.final_export
                ):  # an export may still be pending
                    show_completed(progress)
                    screen.print_json(report.completed.model_dump_json())
                    return DONE
                watch.phase("submitting")
                job = submission.submit(submission.connect(job_server), job_server, packed, options.command)
            if isinstance(checked, str):
                show_warning(progress, f"not checked locally; the job will check it: {checked}")
            for warning in report.warnings if report else []:
                show_warning(progress, warning)
            shown_on = screen.output if options.detach and not options.as_json else progress
            run_uri = None if isinstance(checked, str) else checked.run_uri
            sample = checked.rows if isinstance(checked, CheckedSample) else None
            show_submitted(shown_on, job, run_uri or packed.results, options.command, sample=sample)
            if options.detach:
                screen.print_json(job.to_json())
                return DONE
            end = submission.follow(job, lambda line: progress.out(line, highlight=False))
    except AnnealError as error:
        show_error(progress, str(error))
        return FAILED if job else error.exit_code
    except Stopped as stopped:
        record_signals()
        state = (
            f"the job keeps running; to stop it: {shlex.join(job.stop_command)}"
            if job
            else "nothing was submitted"
        )
        show_error(progress, f"interrupted by {stopped.name}: {state}")
        return stopped.exit_code
    if end.reason:
        show_error(progress, end.reason)
    if end.result:
        screen.print_json(end.result.model_dump_json())
    return end.exit_code


def export_completed(run_uri: str, config: FinetuneConfig, screen: Screen) -> int:
    """Export a completed run with the settings of the YAML, and push it to the Hub if it says so; return the exit code."""
    from training.launch.display import show_error

    settings = config.final_export
    assert settings is not None
    raise_signals()  # until now, the driver only recorded them
    what, again = "exported", "rerun the same command to export it"
    try:
        exported = model_commands.export_run(run_uri, settings, screen.main, screen.progress)
        if config.hub_model_id:
            what = "pushed"
            again = f"push it again with {shlex.join(_push_command(run_uri, config))}"
            model_commands.push_export(
                exported, config.hub_model_id, config.hub_private_repo, screen.main, screen.progress
            )
    except AnnealError as error:
        failed = "export" if what == "exported" else "push"
        advice = "" if what == "exported" else f" To {again}"
        show_error(screen.progress, f"the run completed, but the {failed} failed: {error}{advice}")
        return FAILED
    except Stopped as stopped:
        record_signals()
        show_error(
            screen.progress,
            f"stopped by {stopped.name}: the run completed but is not {what}; {again}",
        )
        return stopped.exit_code
    return DONE


def _push_command(run_uri: str, config: FinetuneConfig) -> list[str]:
    """Return the command that exports and pushes a completed run as its YAML says."""
    settings = config.final_export
    assert settings is not None
    assert config.hub_model_id is not None
    command = main_command("export", run_uri, "--push", config.hub_model_id)
    command += ["--private"] if config.hub_private_repo else []
    command += ["--to", settings.to] if settings.to else []
    if not settings.merge:
        return [*command, "--no-merge"]
    command += ["--gguf"] if settings.gguf else []
    command += ["--gguf-type", settings.gguf_type] if settings.gguf_type else []
    return [*command, *(["--dtype", settings.dtype] if config.export else [])]


def _resolved(loaded: LoadedConfig) -> dict[str, Any]:
    """Return the configuration and the list of its keys that have default values, as JSON data."""
    return {"config": loaded.config.model_dump(mode="json"), "defaults": default_keys(loaded)}

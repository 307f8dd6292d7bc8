"""Lines that are printed during a run and at its end."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from runs.display import log_facts
from runs.layout import RunResult, Speed
from tests.support.messages import assert_names
from tests.support.stored_runs import eval_losses, make_result
from training.events import Evaluated, Event, Notice, StepDone
from training.launch.display import Watch, _describe_memory, _describe_speed, _describe_step, show_result
from training.launch.driver import stopping
from training.planning.memory import MemoryEstimate, MemoryReport
from training.planning.report import PlanReport


def printed(event: Event) -> str:
    console = Console(file=StringIO(), width=200)
    Watch(console).on_event(event)
    return console.file.getvalue()


@pytest.mark.parametrize(("mfu", "mfu_text"), [(0.4567, "  MFU 45.7%"), (None, "")])
def test_step_line_shows_loss_metrics_throughput_mfu_and_memory(mfu: float | None, mfu_text: str):
    event = StepDone(3, 10, 0.5, 1.25, 12345.6, mfu, 5 * 2**29, {"rewards/margins": 0.5})
    assert (
        printed(event) == f"step 3/10  loss 1.2500  margins 0.5000  12,346 tokens/s{mfu_text}  peak 2.5 GiB\n"
    )


def test_evaluation_prints_step_epoch_eval_loss_and_metrics():
    event = Evaluated(10, 1.5, 1.25, {"rewards/margins": 0.5})
    assert printed(event) == "step 10  epoch 1.50  eval loss 1.2500  margins 0.5000\n"


def test_notice_is_printed_as_a_warning():
    assert printed(Notice("running with 2 of 3 workers")) == "warning: running with 2 of 3 workers\n"


def test_stop_is_announced_in_full_in_80_columns():
    """Beside the progress bar, its end would be cut: that a second signal stops at once."""
    terminal = StringIO()
    with Watch(Console(file=terminal, width=80, force_terminal=True, color_system=None)) as watch:
        watch.on_event(StepDone(3, 10, 0.5, 1.25, 12345.6, 0.4567, 5 * 2**29, {}))
        watch.on_event(stopping(None))
    said = "warning: stopping after the next checkpoint; a second signal stops at once\n"
    assert said in terminal.getvalue().replace("\r", "")


def test_requested_stop_names_no_second_signal():
    """`main.py stop` has sent none that the user knows of."""
    assert "second" not in stopping("ann@elsewhere").text


def test_progress_bar_is_off_the_terminal_while_another_console_prints():
    """The plan goes to standard output and the progress to standard error, which are one terminal."""
    terminal = StringIO()
    progress, output = (Console(file=terminal, width=80, force_terminal=True) for _ in range(2))
    with Watch(progress) as watch:
        watch.phase("checking the rows")
        with watch.paused():
            output.print("the plan")
        watch.phase("starting the workers")
    before, _, after = terminal.getvalue().partition("the plan")
    assert before.endswith("\x1b[2K"), "the line of the progress bar is erased"
    assert "starting the workers" in after
    assert "0/?" not in terminal.getvalue(), "a phase without steps has no number of steps"


def result_lines(result: RunResult) -> list[str]:
    console = Console(file=StringIO(), width=1000)
    show_result(console, result, ["python", "main.py", "a.yaml"], trains_adapter=True)
    return console.file.getvalue().splitlines()


def test_line_to_copy_from_a_result_is_not_broken_in_80_columns():
    console = Console(file=StringIO(), width=80, force_terminal=True, color_system=None)
    name = "a-run-with-a-name-of-some-length"
    result = make_result(f"/runs/{name}", eval_losses(2.0))
    show_result(console, result, ["python", "main.py", "a.yaml"], trains_adapter=True)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert f"initial_adapter_model_ckpt_path: run:{name}" in lines


@pytest.mark.parametrize(
    ("count", "packing", "text"),
    [(1, None, "1 row"), (2, None, "2 rows"), (1, "1.5 rows per pack", "1 pack")],
)
def test_plan_counts_the_rows_or_packs_of_a_step(count: int, packing: str | None, text: str):
    assert _describe_step(PlanReport.model_construct(sequences_per_step=count, packing=packing)) == text


def test_result_names_best_and_last_checkpoint_or_only_the_latest():
    evaluated = result_lines(make_result("/runs/a", eval_losses(2.0, 1.5)))
    checkpoint = "/runs/a/checkpoints/step-000010"
    assert [line.split()[0] for line in evaluated if line.endswith((checkpoint, "the same"))] == [
        "best",
        "last",
    ]
    latest = "/runs/a/checkpoints/step-000015"
    lines = result_lines(make_result("/runs/a", [], best_checkpoint=latest, last_checkpoint=latest))
    (line,) = [line for line in lines if line.endswith(f"  {latest}")]
    assert not line.startswith(("best", "last"))


@pytest.mark.parametrize(
    ("checkpoint", "resumes"), [(None, False), ("/runs/a/checkpoints/step-000005", True)]
)
def test_result_of_a_stopped_run_ends_with_the_resume_command(checkpoint: str | None, resumes: bool):
    result = make_result(
        "/runs/a", [], status="stopped", best_checkpoint=checkpoint, last_checkpoint=checkpoint
    )
    line = result_lines(result)[-1]
    assert line.endswith("python main.py a.yaml")
    assert ("last checkpoint" in line) == resumes


def test_result_shows_throughput_and_the_share_of_each_phase():
    speed = Speed(
        tokens_per_second=1234.5,
        trained_tokens_per_second=617.2,
        mfu=0.5,
        peak_memory_bytes=2**30,
        seconds={"data": 0.1, "forward": 30.0, "backward": 60.0, "upload_stall": 9.9},
    )
    (_, rate), (_, time) = _describe_speed(speed)
    assert_names(rate, "1,234 tokens/s", "617", "MFU 50.0%", "1.0 GiB")
    assert_names(time, "100 s", "forward 30%", "backward 60%", "upload stall 10%")
    assert "data" not in time, "phases below one percent are omitted"
    assert _describe_speed(Speed()) == [], "nothing was trained"
    assert _describe_speed(Speed(seconds={"other": 0.01})) == [], "a restored checkpoint has no trained step"


def test_run_without_a_checkpoint_has_trained_no_step_that_counts():
    """The steps after the latest checkpoint are lost, so they are no result."""
    lost = make_result("/runs/a", eval_losses(2.0), last_checkpoint=None, train_steps=0)
    (line,) = [line for line in result_lines(lost) if line.startswith("trained")]
    assert_names(line, "no step", "checkpoint")
    kept = make_result("/runs/a", eval_losses(2.0), train_steps=50)
    (line,) = [line for line in result_lines(kept) if line.startswith("trained")]
    assert_names(line, "50 steps", "latest checkpoint")


def test_log_files_are_listed_one_per_line_and_many_by_their_directory(tmp_path: Path):
    (tmp_path / "driver.log").touch()
    workers = [f"/node/logs/run/worker-{rank}.log" for rank in range(8)]
    assert log_facts([str(tmp_path / "driver.log"), *workers]) == [
        ("library output", str(tmp_path / "driver.log")),
        ("", "/node/logs/run/*.log (8 files), on the machine of the worker"),
    ]
    assert [text for _, text in log_facts([str(tmp_path / "driver.log"), "/node/a.log", "/node/b.log"])] == [
        str(tmp_path / "driver.log"),
        "/node/a.log, on the machine of the worker",
        "/node/b.log, on the machine of the worker",
    ]


def test_memory_estimate_without_a_known_device_says_what_it_excludes():
    estimate = MemoryEstimate(weights=1, gradients=1, optimizer=1, activations=1, logits=1)
    report = MemoryReport(
        estimate, estimate.total, "torch", accelerator=None, available=None, verdict=None, savings=[]
    )
    assert_names(_describe_memory(report), "of tensors", "beside", "libraries")

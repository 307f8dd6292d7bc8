"""The lines that a person reads while a run goes on."""

from io import StringIO

import pytest
from rich.console import Console

from runs.layout import RunResult, Speed
from tests.support.stored_runs import eval_losses, result_of
from training.display import Watch, _describe_speed, show_result
from training.events import StepDone


def line_of(mfu: float | None) -> str:
    console = Console(file=StringIO(), width=200)
    Watch(console).on_event(StepDone(3, 10, 0.5, 1.25, 12345.6, mfu, 5 * 2**29, {"rewards/margins": 0.5}))
    return console.file.getvalue()


@pytest.mark.parametrize(("mfu", "shown"), [(0.4567, "  MFU 45.7%"), (None, "")])
def test_a_step_has_its_loss_its_speed_and_the_memory(mfu: float | None, shown: str):
    assert line_of(mfu) == f"step 3/10  loss 1.2500  margins 0.5000  12,346 tokens/s{shown}  2.5 GiB\n"


def shown(result: RunResult) -> list[str]:
    console = Console(file=StringIO(), width=1000)
    show_result(console, result, ["python", "main.py", "a.yaml"], trains_adapter=True)
    return console.file.getvalue().splitlines()


def test_the_end_names_the_best_checkpoint_or_the_newest_where_none_was_evaluated():
    evaluated = shown(result_of("/runs/a", eval_losses(2.0, 1.5)))
    assert "best checkpoint  /runs/a/checkpoints/step-000010" in evaluated
    assert "last checkpoint  /runs/a/checkpoints/step-000010" in evaluated
    newest = "/runs/a/checkpoints/step-000015"
    lines = shown(result_of("/runs/a", [], best_checkpoint=newest, last_checkpoint=newest))
    assert f"latest checkpoint  {newest}" in lines
    assert not [line for line in lines if line.startswith(("best", "last"))]


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [(None, "begin again with"), ("/runs/a/checkpoints/step-000005", "go on from the last checkpoint with")],
)
def test_the_end_of_a_stopped_run_says_how_to_go_on(checkpoint: str | None, said: str):
    result = result_of(
        "/runs/a", [], status="stopped", best_checkpoint=checkpoint, last_checkpoint=checkpoint
    )
    assert shown(result)[-1].split(maxsplit=1)[1] == f"{said} the same command: python main.py a.yaml"


def test_the_end_says_where_the_time_went():
    speed = Speed(
        tokens_per_second=1234.5,
        trained_tokens_per_second=617.2,
        mfu=0.5,
        peak_memory_bytes=2**30,
        seconds={"data": 0.1, "forward": 30.0, "backward": 60.0, "upload_stall": 9.9},
    )
    assert _describe_speed(speed) == [
        ("speed", "1,234 tokens/s (617 trained), MFU 50.0%, 1.0 GiB of memory at most"),
        ("time in training", "100 s: forward 30%, backward 60%, upload stall 10%"),
    ]
    assert _describe_speed(Speed()) == [], "nothing was trained"

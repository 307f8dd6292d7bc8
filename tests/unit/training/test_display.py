"""The lines that a person reads while a run goes on."""

from io import StringIO

import pytest
from rich.console import Console

from runs.layout import Speed
from training.display import Watch, _describe_speed
from training.events import StepDone


def line_of(mfu: float | None) -> str:
    console = Console(file=StringIO(), width=200)
    Watch(console).on_event(StepDone(3, 10, 0.5, 1.25, 12345.6, mfu, 5 * 2**29, {"rewards/margins": 0.5}))
    return console.file.getvalue()


@pytest.mark.parametrize(("mfu", "shown"), [(0.4567, "  MFU 45.7%"), (None, "")])
def test_a_step_has_its_loss_its_speed_and_the_memory(mfu: float | None, shown: str):
    assert line_of(mfu) == f"step 3/10  loss 1.2500  margins 0.5000  12,346 tokens/s{shown}  2.5 GiB\n"


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

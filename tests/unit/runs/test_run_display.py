"""The table of runs as a terminal and a pipe show it."""

from io import StringIO

from rich.console import Console

from runs.display import print_facts, print_samples, show_run, show_runs
from runs.layout import EvalSample
from runs.summaries import CheckpointSummary, RunDetails, RunSummary

LONG_REASON = "out of memory: the node has none\nleft for what " + "it was asked for " * 20


def summary(name: str, reason: str = "") -> RunSummary:
    return RunSummary(
        run_name=name,
        run_uri=f"/runs/{name}",
        status="failed" if reason else "completed",
        reason=reason,
        best_eval_loss=1.5,
        steps=20,
        age_seconds=7200.0,
    )


def printed_lines(*, width: int, is_terminal: bool) -> list[str]:
    console = Console(
        file=StringIO(), width=width, force_terminal=is_terminal, color_system=None, highlight=False
    )
    show_runs(console, [summary("a-run-of-some-kind"), summary("another", LONG_REASON)])
    return console.file.getvalue().splitlines()


def test_long_reason_is_a_line_of_its_own_truncated_to_the_terminal_width():
    _, completed, failed, reason = printed_lines(width=80, is_terminal=True)
    assert completed.split() == ["a-run-of-some-kind", "completed", "1.5000", "20", "2", "h"]
    assert failed.split() == ["another", "failed", "1.5000", "20", "2", "h"]
    assert reason.startswith("  out of memory: the node has none left ")
    assert reason.endswith("…")
    assert len(reason) == 80


def test_run_name_is_not_wrapped_in_a_narrow_table():
    """It is copied into the next command."""
    name = "a-run-with-" + "a-long-name-" * 6
    console = Console(file=StringIO(), width=80, force_terminal=True, color_system=None)
    show_runs(console, [summary(name)])
    assert name in console.file.getvalue()


def test_a_run_is_shown_in_80_columns():
    """No checkpoint, URI or line of a YAML is folded; several sources are a line each."""
    uri = "s3://my-bucket/fine-tuning/runs/smollm2-135m-gsm8k"
    checkpoint = CheckpointSummary(
        uri=f"{uri}/checkpoints/step-001000",
        step=1000,
        epoch=10.25,
        eval_loss=1.2,
        size=26_000_000,
        created="2026-11-29T10:10:10+00:00",
    )
    sources = ["a.jsonl", {"path": "b.jsonl", "weight": 2.0}]
    run = RunDetails(
        **dict(summary("a", "SIGTERM")) | {"run_uri": uri, "status": "stopped"},
        train_loss=None,
        eval_losses=[],
        samples=[],
        checkpoints=[checkpoint],
        valid_rows=None,
        tokens_per_second=None,
        damage=[],
        config={"train_path": sources, "valid_path": {"math": "v.jsonl"}},
        result=None,
    )
    console = Console(file=StringIO(), width=80, force_terminal=True, color_system=None)
    show_run(console, run)
    lines = console.file.getvalue().splitlines()
    assert any(line.rstrip().endswith(" checkpoints/step-001000") for line in lines)
    values = [line[17:] for line in lines]
    for value in (
        "a.jsonl",
        "b.jsonl (weight 2)",
        "math: v.jsonl",
        f"resume_from_checkpoint: {checkpoint.uri}",
    ):
        assert value in values


def test_piped_lines_are_complete_without_trailing_spaces():
    _, completed, failed = printed_lines(width=100_000, is_terminal=False)
    assert completed.endswith("2 h")
    assert failed.endswith("2 h  " + " ".join(LONG_REASON.split()))


def test_facts_are_wrapped_between_words_on_a_terminal_only():
    path = "/runs/" + "long-name" * 9
    command = "resume with the same command: python main.py " + "run.yaml " * 9
    facts = [("memory", "weights and gradients " * 6), ("run", path), ("next", command)]

    def printed(*, is_terminal: bool) -> list[str]:
        console = Console(file=StringIO(), width=80, force_terminal=is_terminal, color_system=None)
        print_facts(console, facts)
        return console.file.getvalue().splitlines()

    *memory, run, following = printed(is_terminal=True)
    assert len(memory) == 3
    assert all(len(line) <= 80 for line in memory)
    assert all(line.startswith(" " * 17) for line in memory[1:])
    assert run.endswith(path), "a path is copied as one line"
    assert following.endswith(command), "and a command"
    assert len(printed(is_terminal=False)) == len(facts)


def test_samples_are_printed_as_single_lines_without_control_characters():
    texts = {"prompt": "a " * 400 + "2 + 2?", "completion": "first\nsecond \x1b[31mred", "reference": ""}
    sample = EvalSample(step=40, row="f:1", tokens=7, ended=False, **texts)
    output = StringIO()
    print_samples(Console(file=output, width=80, color_system=None, highlight=False), [sample])
    printed = output.getvalue()
    title, prompt, answer = printed.splitlines()
    assert "1 validation prompt at step 40" in title
    assert prompt.endswith("2 + 2?")
    assert len(prompt) < 400
    assert answer.split(maxsplit=1)[1] == "first second �[31mred … (cut after 7 tokens)"
    assert "\x1b" not in printed

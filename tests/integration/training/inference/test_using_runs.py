"""Tests of a trained run: its automatic export, and main.py chat and evaluate."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cookbooks.quickstart.word_problems import TRAIN_KINDS, write_problems
from runs.layout import EXPORT_FILE, Export
from tests.support.front_door import run_command_quickly
from tests.support.jobs import PROJECT, environment, read_metrics, run_main, tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.tiny_model import make_model, write_data

pytestmark = pytest.mark.slow

ROWS, NEW_TOKENS = 12, 24


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and export a run called `run`; return its directory of files."""
    directory = tmp_path_factory.mktemp("using")
    make_model(directory / "model")
    write_data(directory, train_rows=ROWS, valid_rows=4)
    config = write_yaml(
        directory / "run.yaml",
        tiny_settings(directory)
        | {
            "run_name": "run",
            "num_epochs": 1,
            "train_batch_size_per_device": 4,
            "learning_rate": 1e-2,
            "lora_config": {"r": 8},
            "export": {"dtype": "fp32", "to": str(directory / "exported")},
        },
    )
    finished = run_main(config, "--json")
    assert finished.exit_code == 0, finished.errors
    assert re.search(r"merged model.* fp32", finished.errors)
    return directory


@pytest.fixture(scope="module")
def model(files: Path) -> Any:
    """Return the best checkpoint, loaded with PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    (checkpoint,) = (files / "runs" / "run" / "checkpoints").iterdir()
    return peft.PeftModel.from_pretrained(base, checkpoint).eval()


@pytest.fixture(scope="module")
def tokenizer(files: Path) -> Any:
    return AutoTokenizer.from_pretrained(files / "model")


def greedy(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return a greedy answer, generated with transformers alone."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    generated = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(generated[0, tokens.shape[1] :], skip_special_tokens=True)


def user_messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture
def rejected(files: Path, tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a command on the run, expects an error, and returns its message."""

    def run(name: str, *arguments: str) -> str:
        finished = run_command_quickly(command_line(name, files, *arguments)[2:], tmp_path / "command.txt")
        assert finished.exit_code == 2, finished
        assert finished.output == ""
        assert "Traceback" not in finished.errors
        assert finished.errors.count("error: ") == 1, finished.errors
        return finished.errors.partition("error: ")[2]

    return run


def run_command(files: Path, name: str, *arguments: str, stdin: str = "") -> str:
    """Run a command on the run; return its output."""
    done = subprocess.run(
        command_line(name, files, *arguments),
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        input=stdin,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command_line(name: str, files: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(PROJECT / "main.py"), name, str(files / "runs" / "run"), *arguments]


def test_run_exports_itself_and_its_rerun_completes_the_export(files: Path, model: Any):
    to = files / "exported"
    exported = Export.model_validate_json((to / EXPORT_FILE).read_text())
    assert exported.checkpoint == str(next((files / "runs" / "run" / "checkpoints").iterdir()))
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(to)(input_ids=tokens).logits
        torch.testing.assert_close(merged, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    (to / EXPORT_FILE).unlink()
    (to / "EXPORT.unfinished").write_text("\n".join(["Its files:", *(file.path for file in exported.files)]))
    losses = read_metrics(files / "runs" / "run")
    rerun = run_main(files / "run.yaml", "--json")
    assert rerun.exit_code == 0, rerun.errors
    assert (to / EXPORT_FILE).exists()
    assert read_metrics(files / "runs" / "run") == losses, "the rerun trains nothing"


def test_chat_answers_a_prompt_option_and_standard_input(files: Path, model: Any, tokenizer: Any):
    question = "Ada has 3 apples and buys 4. How many?"
    expected = greedy(model, tokenizer, user_messages(question))
    assert expected.strip(), "the model generates text"
    limit = ("--max-new-tokens", str(NEW_TOKENS))
    assert run_command(files, "chat", "--prompt", question, *limit) == expected + "\n"
    assert run_command(files, "chat", *limit, stdin=question + "\n") == expected + "\n"


def test_chat_on_a_terminal_continues_the_conversation(files: Path, model: Any, tokenizer: Any):
    """Each answer takes the previous turns into account."""
    questions = ["Ada has 3 apples.", "How many?"]
    messages: list[dict[str, str]] = []
    answers = []
    for question in questions:
        messages += user_messages(question)
        answers.append(greedy(model, tokenizer, messages))
        messages.append({"role": "assistant", "content": answers[-1]})
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        command_line("chat", files, "--max-new-tokens", str(NEW_TOKENS)),
        cwd=PROJECT,
        env=environment(),
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        os.write(controller, "".join(f"{question}\n" for question in [*questions, ""]).encode())
        output, errors = process.communicate(timeout=120)
    os.close(controller)
    os.close(terminal)
    assert process.returncode == 0, errors
    assert output.decode() == "".join(answer + "\n" for answer in answers)
    assert errors.decode().count("> ") == len(questions) + 1


@pytest.fixture(scope="module")
def held_out(files: Path, model: Any, tokenizer: Any) -> Path:
    """Write rows of many lengths: two from the training data, and four whose answer is the model's own."""
    trained = (files / "train.jsonl").read_text().splitlines()[:2]
    other_rows = [json.loads(line)["messages"] for line in write_problems(TRAIN_KINDS, 9, 77).splitlines()]
    for position, messages in enumerate(other_rows):
        messages[0]["content"] += " Please." * position
    for messages in other_rows[:4]:
        messages[1]["content"] = f" {greedy(model, tokenizer, messages[:1])}\n"
    path = files / "test.jsonl"
    path.write_text(
        "".join(f"{line}\n" for line in [*trained, *(json.dumps({"messages": m}) for m in other_rows)])
    )
    return path


def evaluate(files: Path, data: Path, *arguments: str) -> str:
    limit = ("--max-new-tokens", str(NEW_TOKENS))
    return run_command(files, "evaluate", "--data", str(data), "--match", "text", *limit, *arguments)


def answers_in(files: Path, name: str) -> list[dict[str, Any]]:
    path = files / "runs" / "run" / "evaluations" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluate_answers_like_transformers_for_any_batch_size_and_workers(
    files: Path, held_out: Path, model: Any, tokenizer: Any
):
    (line,) = evaluate(files, held_out, "--batch-size", "4", "--name", "batched", "--json").splitlines()
    result, answers = json.loads(line), answers_in(files, "batched")
    rows = [json.loads(row)["messages"] for row in held_out.read_text().splitlines()]
    assert [answer["answer"] for answer in answers] == [greedy(model, tokenizer, row[:1]) for row in rows]
    assert [answer["row"] for answer in answers] == [f"{held_out}:{number}" for number in range(1, 12)]
    assert [answer["expected"] for answer in answers] == [row[1]["content"] for row in rows]
    correct = [answer["correct"] for answer in answers]
    assert correct == [False] * 2 + [True] * 4 + [False] * 5, (
        "only the rows whose answer is the model's own are correct"
    )
    assert [answer["trained"] for answer in answers] == [True] * 2 + [False] * 9
    assert {key: result[key] for key in ("rows", "correct", "exact_match", "trained_rows")} == {
        "rows": 11,
        "correct": 4,
        "exact_match": 4 / 11,
        "trained_rows": 2,
    }
    assert result["exact_match_of_others"] == 4 / 9
    assert result["answers"] == str(files / "runs" / "run" / "evaluations" / "batched.jsonl")

    output = evaluate(files, held_out, "--num-devices", "2", "--batch-size", "3")
    assert answers_in(files, "test-step-000003") == answers
    assert_names(output, "36.4% (4 of 11 rows)", "44.4% of 9 rows", "warning: 2 ")


# --- Errors --------------------------------------------------------------------------------------------------------


def test_evaluate_rejects_rows_that_it_cannot_compare(
    files: Path, rejected: Callable[..., str], tmp_path: Path
):
    rows = [
        {"messages": [*user_messages("2 + 2?"), {"role": "assistant", "content": "four"}]},
        {"text": "no answer"},
        {"messages": [*user_messages("2 + 2? " * 200), {"role": "assistant", "content": "4"}]},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = rejected("evaluate", "--data", str(data))
    assert_names(message, "3 of 3 rows ", f"{data}:2: ", "512")
    (line,) = [line for line in message.splitlines() if f"{data}:1: " in line]
    assert_names(line, "number", "'four'")
    assert not (files / "runs" / "run" / "evaluations" / "rows-step-000003.jsonl").exists()


def test_chat_without_a_prompt_is_an_error(rejected: Callable[..., str]):
    assert_names(rejected("chat"), "no prompt")

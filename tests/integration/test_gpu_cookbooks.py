"""Tests of the cookbooks that need GPUs: with rows of the maximum length, each plan fits its accelerator. No GPU is needed."""

import json
from pathlib import Path

import pytest

from configs.loading import load_config
from configs.schema import FinetuneConfig
from tests.support.architectures import ARCHITECTURES, write_model_files
from tests.support.front_door import run_main_quickly
from tests.support.jobs import PROJECT
from tests.support.tiny_model import make_tokenizer

COOKBOOKS = [
    path
    for path in sorted((PROJECT / "cookbooks").rglob("*.yaml"))
    if "accelerator_type:" in path.read_text("utf-8")
]
ROWS = 4


class Models:
    """Directories with the files of each model, created on first access."""

    def __init__(self, directory: Path):
        self._directory = directory

    def __getitem__(self, model_id: str) -> Path:
        directory = self._directory / model_id.replace("/", "--")
        return directory if directory.exists() else write_model_files(directory, model_id)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("architectures"))


def write_rows(path: Path, config: FinetuneConfig) -> Path:
    """Write rows for the task of a config, as long as its context_length."""
    limit = config.context_length or 0
    tokens_per_word = len(make_tokenizer()("so " * 100)["input_ids"]) / 100
    fitting_words = int((limit - 60) / tokens_per_word)  # leaves room for the roles and a label
    # Rows exceed the context if the config truncates long rows, and just fit otherwise.
    words = limit if config.long_rows == "truncate" else fitting_words
    answers = [f"{'so ' * words}{number}" for number in range(ROWS)]
    if config.columns:
        question, answer = config.columns["prompt"], config.columns["completion"]
        rows = [{question: "Why?", answer: text} for text in answers]
    elif config.task == "causal_lm":
        rows = [{"text": text} for text in answers]
    elif config.task == "instruction_tuning":
        rows = [
            {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]}
            for text in answers
        ]
    elif config.task == "preference_tuning":
        rows = [{"prompt": "Why?", "chosen": text, "rejected": text + "!"} for text in answers]
    else:
        assert config.classifier_config is not None
        labels = config.classifier_config.label_tokens
        # These rows always fit, because truncation would remove the label.
        rows = [{"text": "so " * fitting_words, "label": label} for label in labels]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_architecture_has_a_cookbook():
    assert {load_config(path).config.model_id for path in COOKBOOKS} == set(ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize("path", COOKBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_cookbook_fits_the_accelerator_that_it_requests(path: Path, models: Models, tmp_path: Path):
    config = load_config(path).config
    data = write_rows(tmp_path / "rows.jsonl", config)
    copy = tmp_path / path.name
    copy.write_text(path.read_text("utf-8"))
    overrides = [
        f"model_id={models[config.model_id]}",
        f"train_path={data}",
        f"valid_path={data}",
        f"storage_path={tmp_path / 'runs'}",
        f"output_dir={tmp_path / 'scratch'}",
        "initial_adapter_model_ckpt_path=null",  # the previous run's adapter is missing here; r=8 gives its shape
        *(["lora_config.r=8"] if config.initial_adapter_model_ckpt_path else []),
    ]
    finished = run_main_quickly(copy, *overrides, "--dry-run", "--json")
    assert finished.exit_code == 0, finished.errors
    report = finished.result
    assert report["device"].startswith("cuda")
    assert f"accelerator_type:{report['memory']['accelerator']}" in config.worker_resources
    assert report["train"]["lengths"]["longest"] >= 0.95 * (config.context_length or 0)
    assert report["memory"]["verdict"] == "fits", report["memory"]

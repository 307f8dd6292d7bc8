"""The way of a user who knows Axolotl: their YAML converted, checked, trained, continued and exported, as docs/migrating.md shows."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.jobs import PROJECT, environment
from tests.support.messages import assert_names
from tests.support.shown_commands import migrating_commands
from tests.support.tiny_model import make_model, write_data

pytestmark = pytest.mark.slow

AXOLOTL = """\
base_model: model
datasets:
  - path: train.jsonl
    type: chat_template
dataset_prepared_path: prepared
val_set_size: 0.1
output_dir: ./outputs/lora
adapter: lora
sequence_len: 512
sample_packing: false
lora_r: 4
lora_alpha: 8
lora_dropout: 0.05
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 1
num_epochs: 3
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.0002
bf16: false
tf32: false
gradient_checkpointing: false
flash_attention: true
warmup_steps: 2
evals_per_epoch: 2
saves_per_epoch: 1
"""


def main_in(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROJECT / "main.py"), *arguments],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_axolotl_yaml_is_converted_trained_and_exported(tmp_path: Path):
    make_model(tmp_path / "model")
    write_data(tmp_path, train_rows=60, valid_rows=1)
    (tmp_path / "axolotl.yaml").write_text(AXOLOTL)

    as_it_is = main_in(tmp_path, "axolotl.yaml")
    assert as_it_is.returncode == 2
    assert_names(as_it_is.stderr, "Axolotl", "main.py convert axolotl.yaml --to")

    printed = []
    for shown in migrating_commands():
        finished = main_in(tmp_path, *shown)
        assert finished.returncode == 0, f"{shown}: {finished.stderr}"
        printed.append(finished.stdout + finished.stderr)
    assert_names(printed[0], "main.py run.yaml --dry-run")
    (result,) = (tmp_path / "outputs" / "lora").glob("*/result.json")
    run = result.parent
    exported = main_in(tmp_path, "export", str(run))
    assert exported.returncode == 0, exported.stderr
    (model,) = (run / "exports").iterdir()
    AutoModelForCausalLM.from_pretrained(model)

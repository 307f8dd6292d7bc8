#!/usr/bin/env bash
# Trainer logs a loss of 0.0, or an ordinary one, while every step of the training is NaN.
#
# A diverged run is expected to show NaN, which alerts, early stopping and sweeps watch for. logging_nan_inf_filter is on by default:
# a NaN loss is replaced by the mean of those of the current logging window. At the first step of a window there are none, so with
# logging_steps=1 the best loss of all is logged, 0.0, from the moment on in which the model is lost. A sweep that takes the lowest
# train loss takes that run. With logging_steps=10, a window whose last nine steps are NaN logs a loss that is merely lower. The
# train_loss of the result contains the zeros. Only grad_norm says nan.
#
# Seen with transformers==5.17.0, accelerate==1.15.0 and torch==2.13.0.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 accelerate==1.15.0
"$directory/venv/bin/python" - "$directory/out" 2>/dev/null <<'PYTHON'
import math
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

torch.set_num_threads(1)


class Diverge(TrainerCallback):
    """After three steps, one weight of the head becomes NaN, as after a step that was too large."""

    def on_step_begin(self, args, state, control, model, **others):
        if state.global_step == 3:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = math.nan


def train(logging_steps: int):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(64, (64, 8))]
    arguments = TrainingArguments(
        sys.argv[1],
        max_steps=6,
        logging_steps=logging_steps,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(AutoModelForCausalLM.from_config(config), arguments, train_dataset=rows, callbacks=[Diverge()])
    result = trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines], result.training_loss


losses, norms, mean = train(logging_steps=1)
window, _, _ = train(logging_steps=6)
print("logged every step:", ", ".join(f"{loss:.2f}" for loss in losses), f"; train_loss {mean:.2f}")
print(f"logged once for the same six steps: {window[0]:.2f}")
if losses[3:] != [0, 0, 0] or not all(map(math.isnan, norms[3:])) or not (math.isfinite(mean) and 1 < window[0] < 6):
    sys.exit("this has changed")
PYTHON

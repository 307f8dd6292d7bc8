#!/usr/bin/env bash
# After a resume, the training_loss and train_samples_per_second that Trainer.train() returns are those of no run.
#
# One expects the mean loss of the run, or of the steps since the resume. Trainer divides the losses since the resume by all
# steps, those before it included. A run that is resumed for its last tenth returns a tenth of its loss, and a speed ten
# times its own; train_runtime is that of the last part alone. train_results.json, model cards and sweeps that compare by train_loss
# take these: the run that was interrupted latest wins. The log_history of the same object has the right losses.
#
# Seen with transformers==5.17.0, accelerate==1.15.0 and torch==2.13.0.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 accelerate==1.15.0
"$directory/venv/bin/python" - "$directory/out" 2>/dev/null <<'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PrinterCallback, Trainer, TrainingArguments

STEPS = 200
torch.set_num_threads(1)


def train(resume: str | None):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(64, (64, 16))]
    arguments = TrainingArguments(
        sys.argv[1],
        max_steps=STEPS,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=STEPS * 9 // 10,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    result = trainer.train(resume_from_checkpoint=resume)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"mean of the {len(losses)} losses in the log: {sum(losses) / len(losses):.3f}; training_loss: {result.training_loss:.3f}")
    return result.training_loss, sum(losses) / len(losses)


returned, mean = train(None)
resumed, same_mean = train(f"{sys.argv[1]}/checkpoint-{STEPS * 9 // 10}")
if abs(returned - mean) > 0.01 or abs(same_mean - mean) > 0.01 or not 0.05 < resumed / mean < 0.11:
    sys.exit("this has changed")
PYTHON

#!/usr/bin/env bash
# transformers' Trainer resumes with other rows if it groups rows by length: some are trained twice in an epoch, others never.
#
# A checkpoint has the states of all random number generators, and the Trainer skips the batches that were trained in the epoch. So one
# expects the rest of the epoch after a resume, which is what the default order gives. The order by length (group_by_length; in
# transformers 5 train_sampling_strategy="group_by_length") has no generator of its own: it is drawn from torch's global one at the start
# of the epoch. A resumed process has drawn nothing there before, and restores the state only after the first batch was fetched. So it
# skips and continues in the order of the first epoch, whatever the epoch is; a resume in the first epoch is right, which hides this from
# a short test. There is no warning, and the loss looks as usual.
#
# Seen with transformers==5.17.0, accelerate==1.15.0 and torch==2.13.0.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" - "$directory" 2>/dev/null <<'PYTHON'
import sys
from collections import Counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

ROWS, BATCH = 40, 4
STEPS_PER_EPOCH = ROWS // BATCH
torch.set_num_threads(1)
# The first token of a row is its number; the lengths are from 4 to 26 tokens.
rows = [{"input_ids": [number, *range(50, 53 + number * 7 % 23)]} for number in range(ROWS)]


def collate(batch):
    length = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [99] * (length - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "labels": ids.masked_fill(ids == 99, -100)}


class Recorded(Trainer):
    def training_step(self, model, inputs, *rest, **named):
        trained.extend(inputs["input_ids"][:, 0].tolist())
        return super().training_step(model, inputs, *rest, **named)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_save = control.should_training_stop = state.global_step == self.step


def train(output, strategy, *callbacks, resume=None):
    """Train two epochs; return the numbers of the trained rows in their order."""
    trained.clear()
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=100)
    arguments = TrainingArguments(
        output,
        num_train_epochs=2,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy=strategy,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Recorded(LlamaForCausalLM(config), arguments, collate, rows, callbacks=[*callbacks])
    trainer.train(resume_from_checkpoint=resume)
    return list(trained)


trained = []
seen = {}
for strategy in ("random", "group_by_length"):
    whole = train(f"{sys.argv[1]}/whole", strategy)
    for step in (5, 15):
        output = f"{sys.argv[1]}/{strategy}-{step}"
        stopped = train(output, strategy, StopAt(step))
        resumed = train(output, strategy, resume=f"{output}/checkpoint-{step}")
        assert stopped == whole[: step * BATCH], "the first part is that of the uninterrupted run"
        epoch = step // STEPS_PER_EPOCH
        counts = Counter((stopped + resumed)[epoch * ROWS : (epoch + 1) * ROWS])
        twice, never = sum(count > 1 for count in counts.values()), ROWS - len(counts)
        print(f"{strategy}, resumed in epoch {epoch + 1}: {twice} of {ROWS} rows trained twice, {never} never")
        seen[strategy, epoch + 1] = twice
if [bool(twice) for twice in seen.values()] != [False, False, False, True]:
    sys.exit("this has changed")
PYTHON

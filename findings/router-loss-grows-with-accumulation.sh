#!/usr/bin/env bash
# Trainer multiplies the load-balancing loss of a mixture of experts by the number of micro-batches of a step, over all GPUs.
#
# Since transformers divides the loss of a step by its number of tokens (num_items_in_batch), gradient accumulation and the
# number of GPUs are expected to change nothing. This holds for the cross-entropy. But the model adds router_aux_loss_coef times the
# mean router loss of a micro-batch to it, and nothing divides that: accumulation adds it up, and the factor for
# average_tokens_across_devices multiplies it by the number of processes. With 8 GPUs and accumulation 16, a coefficient of 0.001
# is 0.128, and experts are balanced instead of trained. The logged loss contains it, and looks like a worse model. TRL's
# SFTTrainer divides it by the accumulation steps, and evaluation contains it once, so eval loss looks normal.
#
# Seen with transformers==5.17.0, accelerate==1.15.0 and torch==2.13.0, Qwen 3 MoE with output_router_logits, on CPU with gloo.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 accelerate==1.15.0
cat >"$directory/train.py" <<'PYTHON'
import os
import sys

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainingArguments

torch.set_num_threads(1)
directory, batch, accumulation = sys.argv[1], *map(int, sys.argv[2:])


def loss(coefficient: float) -> float:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=coefficient,
    )
    model = AutoModelForCausalLM.from_config(config)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(64, (8, 32))]
    arguments = TrainingArguments(
        directory,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


without, with_router = loss(0.0), loss(1.0)
if os.environ["RANK"] == "0":
    print("losses", without, with_router)
PYTHON

losses() { # processes, rows of a micro-batch, accumulation
  "$directory/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node "$1" \
    "$directory/train.py" "$directory/out" "$2" "$3" 2>"$directory/log" | awk '/^losses/ {print $2, $3}'
}
echo "eight rows in one step, by processes x accumulation"
"$directory/venv/bin/python" - $(losses 1 8 1) $(losses 1 1 8) $(losses 2 1 4) <<'PYTHON'
import sys

losses = list(map(float, sys.argv[1:]))
router = [with_router - without for without, with_router in zip(losses[::2], losses[1::2])]
for name, without, added in zip(("1 x 1", "1 x 8", "2 x 4"), losses[::2], router):
    print(f"{name}: cross-entropy {without:.3f}, router loss {added:.2f}, {added / router[0]:.1f} times that of 1 x 1")
if max(losses[::2]) - min(losses[::2]) > 0.01 or not all(7 < added / router[0] < 9 for added in router[1:]):
    sys.exit("this has changed")
PYTHON

#!/usr/bin/env bash
# In transformers 5, TrainingArguments(bf16=True) leaves most weights of a full fine-tuning exactly where they were.
#
# bf16=True is expected to keep fp32 weights and to compute in bf16 (mixed precision), and with transformers 4 it does, because
# from_pretrained returned fp32. transformers 5 returns the dtype of the files, which is bf16 for today's models. The flag then only
# adds an autocast, and the optimizer updates bf16 weights in place: at a learning rate of 1e-5, an update is smaller than half the
# distance to the next bf16 number for most weights, so they round back to their old value at every step. The loss still falls a
# little, because norms and small weights move. from_pretrained(..., dtype=torch.float32) restores what the flag meant.
#
# Seen with transformers==5.17.0 beside transformers==4.57.1, accelerate==1.15.0 and 1.10.1, torch==2.13.0, on CPU.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cat >"$directory/train.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

directory, *named_dtype = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, **({"dtype": torch.float32} if named_dtype else {}))
before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
arguments = TrainingArguments(
    directory,
    max_steps=20,
    learning_rate=1e-5,
    bf16=True,
    per_device_train_batch_size=8,
    logging_steps=20,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(256, (64, 32))]
Trainer(model, arguments, train_dataset=rows).train()
unchanged = sum(int((before[name] == weight).sum()) for name, weight in model.named_parameters())
share = unchanged / sum(weight.numel() for weight in before.values())
print(f"RESULT transformers {transformers.__version__} {model.dtype} {share:.3f}")
PYTHON
share() { # share PYTHON [dtype]: the share of weights that 20 steps left unchanged
  "$1" "$directory/train.py" "$directory/model" "${@:2}" 2>/dev/null | tee -a "$directory/log" | awk '/^RESULT/ {print $NF}'
}
for pins in "5 transformers==5.17.0 accelerate==1.15.0" "4 transformers==4.57.1 accelerate==1.10.1"; do
  read -r name packages <<<"$pins"
  python3 -m venv "$directory/$name"
  "$directory/$name/bin/pip" install -q --disable-pip-version-check torch==2.13.0
  # shellcheck disable=SC2086
  "$directory/$name/bin/pip" install -q --disable-pip-version-check $packages
done
new=$(share "$directory/5/bin/python")
old=$(share "$directory/4/bin/python")
named=$(share "$directory/5/bin/python" float32)
grep ^RESULT "$directory/log"
awk "BEGIN {exit !($new > 0.7 && $old < 0.01 && $named < 0.01)}" || { echo "this has changed" >&2; exit 1; }

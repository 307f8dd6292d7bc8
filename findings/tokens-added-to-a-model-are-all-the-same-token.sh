#!/usr/bin/env bash
# LoRA cannot tell apart the tokens that resize_token_embeddings() added: it reads them all as one and the same token.
#
# New tokens, as <|user|> and <|assistant|>, are expected to start from vectors of their own. transformers logs that they are drawn
# "from a multivariate normal distribution that has old embeddings' mean and covariance". It draws from a billionth of the
# covariance: all of them are the mean, here up to 0.1% of its length. A full fine-tuning, or one with trained embeddings, pulls
# them apart. LoRA on the linear layers leaves embeddings as they are: rows that differ in such a token alone stay guesses, after
# 600 steps as after 100. Nothing warns. With `mean_resizing=False`, the same training learns the rows.
#
# Here, LoRA learns which of 4 answers belongs to each of 4 new tokens: 1 of 4 answers is right, and 4 of 4 with mean_resizing=False.
#
# Seen with transformers==5.17.0, peft==0.21.2 and torch==2.13.0, on CPU.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 transformers==5.17.0
"$directory/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

OLD, NEW, STEPS = 512, 4, 200
torch.set_num_threads(1)


def train(mean_resizing: bool) -> tuple[float, int]:
    """Return how far the new vectors are apart (relative to their length), and how many answers LoRA learned."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=OLD,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.resize_token_embeddings(OLD + NEW, mean_resizing=mean_resizing)
    vectors = model.get_input_embeddings().weight.detach()[OLD:]
    distance = float((vectors[1] - vectors[0]).norm() / vectors[0].norm())

    rows = torch.randint(OLD, (1, 12)).repeat(NEW, 1)
    rows[:, 5] = torch.arange(OLD, OLD + NEW)  # all that is different
    answers = torch.arange(NEW)
    rows[:, -1] = answers
    labels = torch.full_like(rows, -100)
    labels[:, -1] = answers
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=3e-3)
    for _ in range(STEPS):
        output = model(input_ids=rows, labels=labels)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = int((output.logits[:, -2].argmax(-1) == answers).sum())
    print(f"mean_resizing={mean_resizing}: vectors {distance:.1%} apart, {right} of {NEW} answers are right, loss {output.loss:.2f}")
    return distance, right


(same, guessed), (apart, learned) = train(True), train(False)
if same > 0.02 or guessed > 1 or apart < 0.5 or learned < NEW:
    sys.exit("this has changed")
PYTHON

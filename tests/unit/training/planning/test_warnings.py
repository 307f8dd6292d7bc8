"""Warnings of a plan."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs.loading import load_config
from configs.schema import FinetuneConfig
from tests.support.messages import assert_names
from tests.support.tiny_model import make_tokenizer
from training.data.batches import BatchShape
from training.data.report import DataReport
from training.data.summary import DataSummary, SourceSummary
from training.models.architecture import ModelShape
from training.models.attention import Attention, AttentionTraits
from training.models.files import ModelFacts, read_model_facts
from training.models.kernels import Device, Provider
from training.models.tokenizer import load_tokenizer
from training.planning.warnings import (
    accelerator_warnings,
    attention_warnings,
    data_warnings,
    dtype_warnings,
    expert_warnings,
    gpu_dtype_warnings,
    learning_rate_warnings,
    length_warnings,
    overlap_warnings,
    rope_warnings,
    row_warnings,
    schedule_warnings,
    storage_warnings,
    template_warnings,
    tensor_warnings,
    tokenizer_warnings,
)


@pytest.fixture
def large_model(tiny_model: Path) -> ModelFacts:
    facts = read_model_facts(str(tiny_model))
    return replace(facts, parameter_shapes={"model.embed_tokens.weight": (50_000, 576)})


def empty_summary() -> DataSummary:
    zeros: dict[str, Any] = {field.name: 0 for field in fields(DataSummary)}
    return DataSummary(**{**zeros, "notes": {}, "sources": [], "files": []})


def config(**keys: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"model_id": "a/b", "train_path": "t.jsonl", **keys})


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (("data/a.jsonl", "data/test.jsonl", "data/val-1.jsonl"), ("data/test.jsonl", "data/val-1.jsonl")),
        (("s3://b/x/train/1.jsonl", "s3://b/x/test/1.jsonl"), ("s3://b/x/test/1.jsonl",)),
        (("test/a.jsonl", "test/b.jsonl"), ()),
        (("test.jsonl",), ()),
        (("test-1.jsonl", "test-2.jsonl"), ()),
    ],
)
def test_files_of_several_splits_under_one_pattern_give_a_warning(
    files: tuple[str, ...], named: tuple[str, ...]
):
    source = SourceSummary("data/*.jsonl", "messages", len(files), 5, 5)
    first = SourceSummary("first.jsonl", "messages", 1, 5, 5)
    read = replace(empty_summary(), sources=[first, source], files=["first.jsonl", *files])
    found = [warning for warning in row_warnings("train_path", read) if "splits" in warning]
    assert bool(found) == bool(named)
    if named:
        assert_names(found[0], "train_path: data/*.jsonl", f": {', '.join(named)}. ", "pattern")


def test_emulated_bf16_gives_a_warning(large_model: ModelFacts):
    """torch 2.13 on a CPU without AVX-512 took 367 ms for a bf16 matmul that takes 8.4 ms in fp32."""
    (warning,) = dtype_warnings(config(dtype="bf16"), large_model, "cpu", has_bf16=False)
    assert_names(warning, "dtype: bf16", "dtype: fp32")


def test_bf16_in_hardware_on_a_gpu_or_for_a_tiny_model_gives_no_warning(
    large_model: ModelFacts, tiny_model: Path
):
    assert not list(dtype_warnings(config(dtype="bf16"), large_model, "cpu", has_bf16=True))
    assert not list(dtype_warnings(config(dtype="bf16"), large_model, "cuda", has_bf16=False))
    assert not list(dtype_warnings(config(dtype="fp32"), large_model, "cpu", has_bf16=False))
    tiny = read_model_facts(str(tiny_model))
    assert not list(dtype_warnings(config(dtype="bf16"), tiny, "cpu", has_bf16=False))


@pytest.mark.parametrize(
    ("name", "warns"),
    [
        ("T4", True),
        ("V100", True),
        ("Tesla V100-SXM2-16GB", True),
        ("NVIDIA GeForce RTX 2080 Ti", True),
        ("NVIDIA GeForce RTX 3090", False),
        ("A10G", False),
        ("NVIDIA L4", False),
        ("NVIDIA H100 80GB HBM3", False),
        (None, False),
    ],
)
def test_bf16_on_a_gpu_without_its_units_gives_a_warning(name: str | None, warns: bool):
    found = list(gpu_dtype_warnings(config(dtype="bf16"), name))
    assert bool(found) == warns
    for warning in found:
        assert_names(warning, "bf16", str(name), "dtype: fp32")
    assert not list(gpu_dtype_warnings(config(dtype="fp32"), name))


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"num_warmup_steps": 10}, ("num_warmup_steps: 10", "8 steps", "warmup_ratio")),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 9}},
            ("num_decay_steps: 9", "8 steps"),
        ),
        ({"valid_path": "v", "eval_steps": 2, "save_steps": 3}, ("save_steps", "multiple of eval_steps")),
        ({"valid_path": "v", "save_steps": 5}, ("every 5 steps", "every 4")),
        ({"eval_steps": 2, "save_steps": 3}, None),
        ({"valid_path": "v", "eval_steps": 2, "save_steps": 4}, None),
        ({"valid_path": "v"}, None),
        ({"num_warmup_steps": 7}, None),
    ],
)
def test_schedule_that_does_not_fit_gives_a_warning(settings: dict[str, Any], facts: tuple[str, ...] | None):
    warnings = list(schedule_warnings(config(**settings), 4, 8))
    assert len(warnings) == (facts is not None)
    if facts:
        assert_names(warnings[0], *facts)


OLD_EXPRESSION = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
NEW_EXPRESSION = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+"


@pytest.mark.parametrize(
    ("expression", "model_type", "warns"),
    [
        (OLD_EXPRESSION, "mistral", True),
        (NEW_EXPRESSION, "mistral", False),
        (OLD_EXPRESSION, "llama", False),
    ],
)
def test_old_expression_of_mistral_gives_a_warning(
    expression: str, model_type: str, warns: bool, tmp_path: Path
):
    """transformers 5.17 flags such tokenizers in `_patch_mistral_regex`, for vocabularies of more than 100,000 tokens."""
    backend = Tokenizer(models.BPE({f"token{number}": number for number in range(100_001)}, []))
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="token0").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": model_type, "transformers_version": "4.57.0"})
    )
    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False, chat_template=None)
    warnings = list(tokenizer_warnings(tokenizer))
    assert bool(warnings) == warns
    assert all("tokenizer.json" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("written", "meant"), [("A100-80", "A100-80G"), ("h100", "H100"), ("H100", None), ("TPU-v5", None)]
)
def test_misspelled_accelerator_gives_a_warning_with_the_nearest_name(written: str, meant: str | None):
    warnings = list(accelerator_warnings(config(worker_resources={f"accelerator_type:{written}": 0.001})))
    assert len(warnings) == (meant is not None)
    for warning in warnings:
        assert_names(warning, "worker_resources", f"accelerator_type:{written} ", f"did you mean {meant}?")


def test_run_without_a_named_accelerator_gives_no_accelerator_warning():
    assert not list(accelerator_warnings(config()))


def shape_with(experts: int) -> ModelShape:
    return ModelShape(
        layers=1,
        hidden=64,
        intermediate=128,
        heads=4,
        key_value_heads=2,
        head_dim=16,
        vocabulary=512,
        windows=(None,),
        experts=experts,
        experts_per_token=min(experts, 2),
    )


def expert_warnings_of(
    large_model: ModelFacts,
    shape: ModelShape | None,
    device: Device,
    kernels: Provider,
    *,
    load_in_4bit: bool = True,
) -> list[str]:
    settings = config(load_in_4bit=load_in_4bit, lora_config={"r": 4})
    return list(expert_warnings(settings, large_model, shape, device, kernels))


@pytest.mark.parametrize(
    ("device", "kernels"), [("cuda", "liger"), ("cuda", "torch"), ("cpu", "torch"), ("cpu", "unsloth")]
)
def test_experts_that_4_bit_loading_leaves_in_16_bits_give_a_warning(
    large_model: ModelFacts, device: Device, kernels: Provider
):
    (warning,) = expert_warnings_of(large_model, shape_with(8), device, kernels)
    assert_names(warning, "load_in_4bit", large_model.source, "experts", "16 bits")


def test_dense_unquantized_or_unsloth_models_give_no_expert_warning(large_model: ModelFacts):
    assert not expert_warnings_of(large_model, shape_with(8), "cuda", "unsloth")
    assert not expert_warnings_of(large_model, shape_with(8), "cuda", "torch", load_in_4bit=False)
    assert not expert_warnings_of(large_model, shape_with(0), "cuda", "torch")
    assert not expert_warnings_of(large_model, None, "cuda", "torch")


WITHOUT_END_TOKEN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


EMPTY_THOUGHTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize("task", ["instruction_tuning", "preference_tuning"])
def test_chat_template_without_an_end_token_gives_a_warning(task: str):
    tokenizer = make_tokenizer()
    assert not list(template_warnings(config(task=task), tokenizer))
    tokenizer.chat_template = WITHOUT_END_TOKEN
    (warning,) = template_warnings(config(task=task), tokenizer)
    assert_names(warning, "chat template", "end token", "set chat_template")


def test_rows_without_reasoning_for_a_template_that_asks_for_it_give_a_warning():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = EMPTY_THOUGHTS
    (warning,) = template_warnings(config(), tokenizer, has_reasoning=False)
    assert_names(warning, "no row has reasoning", "chat_template_kwargs: {enable_thinking: false}")
    assert not list(template_warnings(config(), tokenizer))
    off = config(chat_template_kwargs={"enable_thinking": False})
    assert not list(template_warnings(off, tokenizer, has_reasoning=False))


def test_rows_with_reasoning_for_a_template_that_asks_for_none_give_a_warning():
    tokenizer = make_tokenizer()
    path = Path(trl.__file__).parent / "chat_templates/qwen3_5_nothink.jinja"
    tokenizer.chat_template = path.read_text()
    (warning,) = template_warnings(config(), tokenizer, has_reasoning=True)
    assert_names(warning, "rows have reasoning", "chat_template_kwargs: {enable_thinking: true}")
    assert not list(template_warnings(config(), tokenizer, has_reasoning=False))
    assert not list(template_warnings(config(), tokenizer))
    on = config(chat_template_kwargs={"enable_thinking": True})
    assert not list(template_warnings(on, tokenizer, has_reasoning=True))
    tokenizer.chat_template = path.with_name("qwen3_5_think.jinja").read_text()
    assert not list(template_warnings(config(), tokenizer, has_reasoning=True))


@pytest.mark.parametrize(
    ("end", "warns"), [("\n### End\n", True), ("\n<|im_end|>\n", False), ("<|endoftext|>", False)]
)
def test_chat_template_whose_end_marker_is_plain_text_gives_a_warning(end: str, warns: bool):
    """Generation stops at a token, so it does not stop at a text of several tokens."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = WITHOUT_END_TOKEN.replace("'\n' }}{% endfor", f"{end!r} }}}}{{% endfor")
    found = list(template_warnings(config(), tokenizer))
    assert len(found) == warns
    for warning in found:
        assert_names(warning, "'### End'", "tokens)", "EOS", "new_special_tokens: ['### End']")
    if warns:
        tokenizer.add_tokens(["### End"], special_tokens=True)
        assert not list(template_warnings(config(), tokenizer))


@pytest.mark.parametrize(
    "keys",
    [
        {"task": "causal_lm"},
        {"prompt_template": "Question: {prompt} Answer: {completion}"},
    ],
)
def test_unused_chat_template_gives_no_warning(keys: dict[str, Any]):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = WITHOUT_END_TOKEN
    assert not list(template_warnings(config(**keys), tokenizer))


@pytest.mark.parametrize(
    ("keys", "warns"),
    [
        ("", True),
        ("learning_rate: 1e-5", False),
        ("lora_config: {r: 4}", False),
    ],
)
def test_default_learning_rate_with_full_parameter_training_gives_a_warning(
    tmp_path: Path, keys: str, warns: bool
):
    path = tmp_path / "config.yaml"
    path.write_text(f"model_id: org/name\ntrain_path: train.jsonl\n{keys}\n")
    loaded = load_config(path)
    warnings = list(learning_rate_warnings(loaded))
    assert len(warnings) == warns
    for warning in warnings:
        assert_names(warning, "learning_rate ", f"{loaded.config.learning_rate:g}", "LoRA", "1e-5")


def test_output_dir_without_storage_path_names_the_place_of_the_results():
    (warning,) = storage_warnings(config(output_dir="out"), "s3://anneal/runs")
    assert_names(warning, "output_dir: out ", "scratch", " s3://anneal/runs;", "storage_path")
    assert not list(storage_warnings(config(output_dir="out", storage_path="runs"), "/home/ada/runs"))
    assert not list(storage_warnings(config(), "s3://anneal/runs"))


def test_warnings_of_validation_rows_name_the_key_that_they_come_from():
    train = empty_summary()
    valid = replace(train, truncated_rows=3)
    for key in ("valid_path", "valid_split"):
        (warning,) = data_warnings(train, valid, key)
        assert warning.startswith(f"{key}: 3 rows")


def test_validation_rows_that_are_training_rows_give_a_warning():
    place = "valid.jsonl:12 is the same as train.jsonl:7"
    (warning,) = overlap_warnings(DataReport.model_construct(in_both=1234, first_in_both=[place]))
    assert_names(warning, "valid_path: 1,234 ", "training rows", place)
    assert not list(overlap_warnings(DataReport.model_construct(in_both=0, first_in_both=[])))


@pytest.mark.parametrize(("packing", "what"), [(False, "rows"), (True, "packs")])
def test_step_larger_than_an_epoch_gives_a_warning(packing: bool, what: str):
    settings = config(packing=packing, num_epochs=1)
    (warning,) = length_warnings(settings, BatchShape(15, 4, 2, 2))
    assert_names(warning, f"16 {what} ", "batch size", "accumulation", "train_path", "15")
    assert not list(length_warnings(settings, BatchShape(16, 4, 2, 2)))


@pytest.mark.parametrize("key", ["num_epochs", "max_steps", "min_update_steps"])
def test_run_length_that_the_yaml_does_not_set_gives_a_warning(key: str):
    shape = BatchShape(96, 4, 2, 1)
    (warning,) = length_warnings(config(), shape)
    assert_names(warning, key, "9 epochs", "100 steps")
    assert not list(length_warnings(config(**{key: 1}), shape))


@pytest.mark.parametrize(
    ("has_sdpa", "cause", "hint"),
    [(True, "softcapping", True), (False, "transformers does not implement", False)],
)
def test_eager_attention_warns_of_its_cause(has_sdpa: bool, cause: str, hint: bool, tiny_model: Path):
    traits = AttentionTraits(has_softcapping=has_sdpa, needs_mask=False, fits_varlen=False, has_sdpa=has_sdpa)
    facts = read_model_facts(str(tiny_model))
    (text,) = attention_warnings(config(), facts, traits, Attention("eager", mask=False), "cuda")
    assert cause in text
    assert ("flash_attention_2: true" in text) == hint


PAIRS = {"task": "preference_tuning"}


@pytest.mark.parametrize(
    ("keys", "train", "valid"),
    [
        ({"train_batch_size_per_device": 2}, 5000, 0),
        ({"train_batch_size_per_device": 2}, 0, 5000),
        ({"train_batch_size_per_device": 1, "eval_batch_size_per_device": 2}, 0, 5000),
        ({"train_batch_size_per_device": 1, "packing": True}, 5000, 0),
        ({"train_batch_size_per_device": 1, **PAIRS}, 5000, 0),
    ],
)
def test_rows_that_change_the_frequencies_of_others_give_a_warning(
    keys: dict[str, Any], train: int, valid: int
):
    (text,) = rope_warnings(config(**keys), "a/phi", 4096, train, valid)
    assert_names(text, "a/phi", "RoPE", "4,096", "5,000", "context_length: 4096")
    assert ("batch sizes of 1" in text) == ("packing" not in keys and "task" not in keys)
    assert not list(rope_warnings(config(**keys), "a/phi", 4096, 4096, 4096))
    assert not list(rope_warnings(config(**keys), "a/llama", None, 5000, 5000))


def test_rows_that_are_computed_alone_give_no_rope_warning():
    alone, evaluated_together = {"train_batch_size_per_device": 1}, {"eval_batch_size_per_device": 2}
    assert not list(rope_warnings(config(**alone), "a/phi", 4096, 5000, 5000))
    assert not list(rope_warnings(config(**alone, **evaluated_together), "a/phi", 4096, 5000, 4096))


def test_padding_above_the_rope_limit_gives_a_warning():
    padded = {"train_batch_size_per_device": 1, "padding": "max_length"}
    (text,) = rope_warnings(config(**padded, context_length=8192), "a/phi", 4096, 100, 100)
    assert_names(text, "a/phi", "4,096", "8,192", "padding: longest", "context_length: 4096")
    assert not list(rope_warnings(config(**padded, context_length=4096), "a/phi", 4096, 100, 100))


def test_tensors_that_are_not_loaded_are_named():
    (text,) = tensor_warnings("a/tiny", ["a.weight", "b.weight", "c.weight"])
    assert_names(text, "a/tiny", "a.weight and 2 more tensors", "config.json")
    assert list(tensor_warnings("a/tiny", [])) == []

"""YAMLs of other tools, translated: the shapes that each tool documents, in our own words."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import configs.convert
import main
from configs.convert import SAME, TOOL_NAMES, Conversion, convert, nested_settings, translate
from configs.loading import load_config
from configs.other_tools import SAME_NAME, TABLE, Tool, detect, find, tools_of
from configs.schema import FinetuneConfig, sections_of
from tests.support.messages import assert_names

AXOLOTL = """\
base_model: org/small-1b
load_in_8bit: false
load_in_4bit: false
strict: false
datasets:
  - path: org/rows
    type: alpaca
dataset_prepared_path: prepared
val_set_size: 0.1
output_dir: ./outputs/lora
adapter: lora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
wandb_project:
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
flash_attention: true
loss_watchdog_threshold: 5.0
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
deepspeed:
weight_decay: 0.0
special_tokens:
  pad_token: <|pad|>
"""

LLAMAFACTORY = """\
model_name_or_path: org/chat-4b
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: one, two
dataset_dir: rows
template: chatml
cutoff_len: 1024
max_samples: 1000
preprocessing_num_workers: 16
output_dir: saves/sft
logging_steps: 10
plot_loss: true
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
deepspeed: examples/deepspeed/ds_z3_config.json
ray_num_workers: 4
resources_per_worker: {GPU: 1}
"""

TRL = """\
model_name_or_path: org/chat-4b
dataset_name: org/chats
eval_strategy: epoch
eval_steps: 100
max_steps: -1
warmup_steps: 0.05
use_peft: true
report_to: [wandb]
save_total_limit: 2
"""

TORCHTUNE = """\
output_dir: /tmp/out
model:
  _component_: torchtune.models.llama3_2.qlora_llama3_2_1b
  lora_attn_modules: [q_proj, output_proj]
  apply_lora_to_mlp: true
  lora_rank: 64
  lora_alpha: 128
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  max_seq_len: 4096
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /models/llama
  output_dir: ${output_dir}
dataset:
  _component_: torchtune.datasets.chat_dataset
  source: json
  data_files: rows.json
  split: train
  packed: false
batch_size: 4
optimizer:
  _component_: torch.optim.AdamW
  fused: true
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
epochs: 1
gradient_accumulation_steps: 8
device: cuda
dtype: bf16
metric_logger:
  log_dir: ${output_dir}/logs
"""

EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "axolotl": (
        AXOLOTL,
        {
            "model_id": "org/small-1b",
            "train_path": "hf://datasets/org/rows",
            "data_format": "instruction",
            "valid_split": 0.1,
            "context_length": 2048,
            "long_rows": "drop",
            "packing": True,
            "num_epochs": 2,
            "train_batch_size_per_device": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 2e-4,
            "num_warmup_steps": 10,
            "optim": "adamw_8bit",
            "lora_config.r": 16,
            "lora_config.target_modules": ["q_proj", "v_proj"],
            "eval_steps": 0.125,
            "save_steps": 0.5,
            "storage_path": "./outputs/lora",
        },
    ),
    "llamafactory": (
        LLAMAFACTORY,
        {
            "model_id": "org/chat-4b",
            "train_path": ["rows/one.json", "rows/two.json"],
            "max_train_rows": 1000,
            "lora_config.lora_alpha": 16,
            "lora_config.target_modules": "all-linear",
            "deepspeed": "zero_3",
            "num_devices": 4,
            "storage_path": "saves/sft",
        },
    ),
    "huggingface": (
        TRL,
        {
            "valid_path": "hf://datasets/org/chats?split=test",
            "warmup_ratio": 0.05,
            "num_epochs": 3,
            "train_batch_size_per_device": 8,
            "lr_scheduler_type": "linear",
            "lora_config.r": 16,
            "lora_config.target_modules": None,
            "num_checkpoints_to_keep": 2,
            "logger.provider": "wandb",
        },
    ),
    "torchtune": (
        TORCHTUNE,
        {
            "model_id": "/models/llama",
            "train_path": "rows.json",
            "load_in_4bit": True,
            "lora_config.target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "context_length": 4096,
            "optim": "adamw_torch_fused",
            "lr_scheduler_type": "cosine",
            "num_warmup_steps": 100,
            "max_grad_norm": 0.0,
            "storage_path": "/tmp/out",
        },
    ),
}


def converted(text: str, directory: Path = Path()) -> Conversion:
    return convert(text, directory / "other.yaml")


@pytest.mark.parametrize("tool", EXPECTED)
def test_documented_shape_of_each_tool_is_translated(tool: str, tmp_path: Path):
    text, expected = EXPECTED[tool]
    conversion = converted(text, tmp_path)
    assert conversion.tool == tool
    assert {key: conversion.ours.get(key, "absent") for key in expected} == expected


@pytest.mark.parametrize("tool", EXPECTED)
def test_written_file_loads_and_names_every_key(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Each of their keys stands in the file: as the comment of a line, or in the list of omitted keys and changes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text(EXPECTED[tool][0])
    assert main.main(["convert", "other.yaml", "--to", "ours.yaml"]) == 0
    written = (tmp_path / "ours.yaml").read_text()
    errors = capsys.readouterr().err
    assert_names(errors, "main.py ours.yaml --dry-run")
    assert "to do:" not in errors
    loaded = load_config(tmp_path / "ours.yaml")
    assert loaded.rejections == ()
    keys = re.findall(r"^(\w+):(?! *$)", EXPECTED[tool][0], re.MULTILINE)
    assert [key for key in keys if not re.search(rf"\b{key}\b", written)] == []
    assert max(map(len, written.splitlines())) <= 110


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "rl: ipo\nrl_beta: 0.3",
            {"preference_tuning_config.loss": "ipo", "preference_tuning_config.beta": 0.3},
        ),
        ("adapter: qlora", {"load_in_4bit": True, "lora_config": {}}),
        ("max_steps: 30\nnum_epochs: 4", {"max_steps": 30, "num_epochs": None}),
        ("fsdp: [full_shard]\nfsdp_config: {reshard: true}", {"deepspeed": "zero_3"}),
        ("deepspeed: deepspeed_configs/zero2.json", {"deepspeed": "zero_2"}),
        (
            "deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json",
            {"deepspeed": "zero_3_offload_optim+param"},
        ),
        ("deepspeed: mine.json", {"deepspeed": {"config_path": "mine.json"}}),
        ("cosine_min_lr_ratio: 0.1\nlr_scheduler: cosine", {"lr_scheduler_type": "cosine_with_min_lr"}),
        ("wandb_project: p", {"logger.provider": "wandb", "logger.project": "p"}),
        ("train_on_inputs: true", {"task": "causal_lm"}),
        ("batch_size: 16", {"train_batch_size": 16, "train_batch_size_per_device": "auto"}),
        ("plugins: [axolotl.integrations.liger.LigerPlugin]", {"kernels": "liger"}),
        (
            "test_datasets: [{path: valid.jsonl}]\nval_set_size: 0.1",
            {"valid_path": "valid.jsonl", "valid_split": None},
        ),
        ("bf16: false\nfp16: true", {"dtype": "fp32"}),
        ("bf16: false\nfp16: false", {"dtype": "fp32"}),
        ("bf16: true\nfp16: false", {"dtype": "bf16"}),
        ("attn_implementation: flash_attention_2", {"flash_attention_2": True}),
        (
            "context_parallel_size: 4\nattn_implementation: flash_attention_2",
            {"sequence_parallel_size": 4, "num_devices": 4, "flash_attention_2": None},
        ),
        (
            "context_parallel_size: 2\nray_num_workers: 8",
            {"sequence_parallel_size": 2, "num_devices": 8},
        ),
        ("context_parallel_size: 1", {"sequence_parallel_size": None, "num_devices": None}),
        ("lora_r: 8", {"lora_config.r": None}),
        ("learning_rate: '2e-4'\nsave_strategy: epoch", {"learning_rate": 2e-4}),
        ("warmup_steps: 0", {"num_warmup_steps": None, "warmup_ratio": None}),
        ("warmup_ratio: 0.0", {"num_warmup_steps": None, "warmup_ratio": None}),
        (
            "save_strategy: epoch\nsave_steps: 10",
            {"checkpoint_and_evaluation_frequency.unit": "epochs", "save_steps": None},
        ),
        ("wandb_project: p\nwandb_name: n", {"logger.provider": "wandb", "logger.name": "n"}),
        ("wandb_name: n", {"logger.name": None}),
        (
            "adapter: lora\nlora_target_modules: [q_proj]\nlora_target_linear: true\nlora_target_parameters: [a]",
            {"lora_config.target_modules": "all-linear", "lora_config.target_parameters": ["a"]},
        ),
        ("tokens: {bos_token: x}", {"new_tokens": None}),
        ("lr_scheduler: constant", {"lr_scheduler_type": "constant", "warmup_ratio": None}),
        (
            "ray_num_workers: 4\nresources_per_worker: {GPU: 1, CPU: 8}",
            {"num_devices": 4, "worker_resources": {"CPU": 8}},
        ),
    ],
)
def test_axolotl_values_are_translated(lines: str, expected: dict[str, Any]):
    conversion = converted(
        f"base_model: org/m\ndatasets: [{{path: rows.jsonl, type: chat_template}}]\n{lines}\n"
    )
    assert {key: conversion.ours.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "beta: 0.2",
            {"task": "preference_tuning", "preference_tuning_config.beta": 0.2, "learning_rate": 1e-6},
        ),
        (
            "loss_type: [ipo]\nlearning_rate: 1e-5",
            {"preference_tuning_config.loss": "ipo", "learning_rate": 1e-5},
        ),
        ("loss_type: nll", {"task": None, "learning_rate": 2e-5}),
        ("assistant_only_loss: true", {"task": "instruction_tuning"}),
        ("assistant_only_loss: false", {"task": None}),
        ("eval_on_start: false", {"eval_first": False}),
        ("hub_model_id: org/n", {"hub_model_id": None}),
        ("hub_model_id: org/n\npush_to_hub: true", {"hub_model_id": "org/n"}),
        ("dtype: bfloat16\nuse_cpu: true", {"dtype": "bf16", "device": "cpu"}),
        ("lr_scheduler_type: reduce_lr_on_plateau", {"lr_scheduler_type": None}),
    ],
)
def test_trl_values_are_translated(lines: str, expected: dict[str, Any]):
    conversion = converted(f"model_name_or_path: org/m\ndataset_name: org/rows\n{lines}\n")
    assert {key: conversion.ours.get(key) for key in expected} == expected


def test_mixtures_of_data_sets_are_translated():
    items = "[{id: org/a, config: c, split: train_sft, weight: 0.5}, {id: org/b, weight: 1.0}]"
    mixture = converted(
        f"model_name_or_path: org/m\ndataset_mixture: {{datasets: {items}, test_split_size: 500}}\n"
    )
    assert mixture.ours["train_path"] == ["hf://datasets/org/a/c?split=train_sft", "hf://datasets/org/b"]
    assert_names(
        "\n".join(mixture.changes), "datasets.weight: [0.5, 1.0]", "test_split_size: 500", "valid_split"
    )
    trl = converted("model_name_or_path: org/m\ndatasets: [{path: org/a, name: c}]\ntest_split_size: 0.1\n")
    assert (trl.ours["train_path"], trl.ours["valid_split"]) == ("hf://datasets/org/a/c", 0.1)


def test_share_of_validation_rows_is_listed_as_a_change():
    """Other tools draw the exact number of rows."""
    assert_names("\n".join(converted(AXOLOTL).changes), "val_set_size", "hash", "share")
    replaced = AXOLOTL + "test_datasets: [{path: valid.jsonl}]\n"
    assert "val_set_size" not in "\n".join(converted(replaced).changes)


def test_loss_and_devices_that_a_file_does_not_set_are_listed_as_changes():
    for text in (TRL, TRL + "assistant_only_loss: false\n"):
        changes = "\n".join(converted(text).changes)
        assert_names(changes, "assistant_only_loss", "task: causal_lm", "num_devices: 8")
    assert "num_devices" not in "\n".join(converted(LLAMAFACTORY).changes)


def test_torchtune_alpaca_trains_on_the_prompt_as_well():
    text = TORCHTUNE.replace("chat_dataset", "alpaca_cleaned_dataset").replace(
        "  source: json\n  data_files: rows.json\n", ""
    )
    ours = converted(text).ours
    assert (ours["train_path"], ours["task"]) == ("hf://datasets/yahma/alpaca-cleaned", "causal_lm")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{path: org/rows, name: main, split: 'train[:90%]'}",
            {"train_path": "hf://datasets/org/rows/main?split=train[:90%]"},
        ),
        ("{path: json, data_files: a.jsonl}", {"train_path": "a.jsonl"}),
        ("{path: s3://bucket/rows/}", {"train_path": "s3://bucket/rows/"}),
        ("{path: rows.jsonl, type: completion, field: body}", {"task": "causal_lm", "columns.text": "body"}),
        ("{path: rows.jsonl, type: sharegpt}", {"data_format": "conversations"}),
        ("{path: rows.jsonl, type: chat_template, field_messages: chat}", {"columns.messages": "chat"}),
        (
            "{path: r.jsonl, type: {field_instruction: q, field_output: a, format: '[INST] {instruction} [/INST]'}}",
            {"prompt_template": "[INST] {q} [/INST] {a}"},
        ),
    ],
)
def test_axolotl_datasets_are_translated(source: str, expected: dict[str, Any]):
    conversion = converted(f"base_model: org/m\ndatasets: [{source}]\n")
    assert {key: conversion.ours.get(key) for key in expected} == expected


SAME_AS_HERE = {
    "axolotl": (
        "base_model: org/m",
        "tokenizer_config: org/m, revision_of_model: main, chat_template: tokenizer_default, roles_to_train: [assistant], "
        "train_on_eos: turn, shuffle_merged_datasets: true, metric_for_best_model: eval_loss, max_steps: -1, fsdp: [], fp16: false, "
        "load_in_8bit: false, neftune_noise_alpha: 0, tensor_parallel_size: 1, eval_strategy: steps",
    ),
    "huggingface": (
        "model_name_or_path: org/m",
        "model_revision: main, packing_strategy: bfd, truncation_mode: keep_start, label_smoothing_factor: 0.0, report_to: none, "
        "load_in_4bit: true, bnb_4bit_quant_type: nf4, use_bnb_nested_quant: true, bnb_4bit_compute_dtype: bfloat16",
    ),
    "llamafactory": (
        "model_name_or_path: org/m\nfinetuning_type: full",
        "mix_strategy: concat, quantization_type: nf4, double_quantization: true, quantization_method: bnb, mask_history: false, "
        "train_on_prompt: false, val_size: 0, resume_from_checkpoint: false, loraplus_lr_ratio: 0, pure_bf16: false",
    ),
    "torchtune": ("model: {_component_: x}", "shuffle: true, resume_from_checkpoint: false"),
}


@pytest.mark.parametrize("tool", SAME_AS_HERE)
def test_values_that_match_our_behavior_are_listed_as_the_same(tool: str):
    model, settings = SAME_AS_HERE[tool]
    lines = settings.replace(", ", "\n")
    conversion = converted(f"{model}\n{lines}\n")
    assert conversion.tool == tool
    given = {line.partition(":")[0] for line in lines.splitlines()} - {"load_in_4bit"}
    assert set(conversion.unneeded[SAME]) == given
    assert [change for change in conversion.changes if change.partition(":")[0] in given] == []


def test_default_settings_of_axolotls_datasets_are_listed_as_the_same_and_others_as_changes():
    same = (
        "chat_template: tokenizer_default, field_messages: messages, message_field_role: from, message_field_content: value, "
        "roles_to_train: [assistant], train_on_eos: turn, message_property_mappings: {role: role, content: content}, split_thinking: true"
    )
    conversion = converted(f"base_model: org/m\ndatasets: [{{path: a.jsonl, type: chat_template, {same}}}]\n")
    assert len(conversion.unneeded[SAME]) == 8
    assert not any(change.startswith("datasets") for change in conversion.changes)
    other = "roles_to_train: [user], train_on_eos: all, shards: 10, field_tools: functions, message_field_role: who"
    changes = "\n".join(
        converted(f"base_model: org/m\ndatasets: [{{path: a.jsonl, {other}, ds_type: json}}]\n").changes
    )
    assert_names(
        changes,
        *(f"datasets.{key}:" for key in re.findall(r"(\w+):", other)),
        "turns: last",
        "max_train_rows",
    )
    differ = converted(
        "base_model: org/m\ndatasets: [{path: a.jsonl, field_messages: chat}, {path: b.jsonl}]\n"
    )
    assert_names("\n".join(differ.changes), "datasets.field_messages:", "chat", "columns")
    assert "columns.messages" not in differ.ours


def test_llamafactory_rows_are_found_in_dataset_info(tmp_path: Path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "dataset_info.json").write_text(
        '{"one": {"file_name": "first.json", "columns": {"prompt": "q", "response": "a", "system": "s", "history": "h"}}, '
        '"two": {"hf_hub_url": "org/second", "columns": {"prompt": "q", "response": "a"}}}'
    )
    ours = converted(LLAMAFACTORY, tmp_path).ours
    assert ours["train_path"] == ["rows/first.json", "hf://datasets/org/second"]
    assert (ours["columns.instruction"], ours["columns.output"]) == ("q", "a")
    assert (ours["columns.system"], ours["columns.history"]) == ("s", "h")


@pytest.mark.parametrize("key", ["columns", "tags", "hf_hub_url", "file_name", "ranking", "formatting"])
@pytest.mark.parametrize("value", ["null", "[]"])
def test_llamafactory_entry_with_empty_values_is_read(key: str, value: str, tmp_path: Path):
    (tmp_path / "rows").mkdir()
    entry = f'{{"formatting": "sharegpt", "{key}": {value}}}'
    (tmp_path / "rows" / "dataset_info.json").write_text(f'{{"one": {entry}, "two": {entry}}}')
    assert converted(LLAMAFACTORY, tmp_path).ours["train_path"] == ["rows/one.json", "rows/two.json"]


def test_llamafactory_rank_from_a_variable_is_kept():
    conversion = converted(LLAMAFACTORY.replace("lora_rank: 8", "lora_rank: ${RANK}"))
    assert conversion.ours["lora_config.r"] == "${RANK}"
    assert "lora_config.lora_alpha" not in conversion.ours
    assert_names(" ".join(conversion.changes), "lora_alpha", "twice lora_rank", "`lora_config.lora_alpha`")
    assert "lora_rank: " not in " ".join(conversion.changes)
    with_alpha = converted(LLAMAFACTORY.replace("lora_rank: 8", "lora_rank: ${RANK}\nlora_alpha: 4"))
    assert (with_alpha.ours["lora_config.r"], with_alpha.ours["lora_config.lora_alpha"]) == ("${RANK}", 4)
    assert "lora_alpha" not in " ".join(with_alpha.changes)


@pytest.mark.parametrize(
    "rows", ["[{path: '${DATA}/a.jsonl'}]", "[{path: '${DATA}/a.jsonl'}, {path: b.jsonl}]"]
)
def test_variables_in_texts_are_kept_for_any_number_of_data_sets(
    rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "other.yaml").write_text(f"base_model: org/m\ndatasets: {rows}\noutput_dir: runs\n")
    assert main.main(["convert", str(tmp_path / "other.yaml"), "--to", str(tmp_path / "ours.yaml")]) == 0
    monkeypatch.setenv("DATA", "/data")
    paths = load_config(tmp_path / "ours.yaml").config.train_path
    assert (paths[0] if isinstance(paths, list) else paths) == "/data/a.jsonl"


@pytest.mark.parametrize(
    ("lines", "facts"),
    [
        ("load_in_8bit: true", ("load_in_8bit", "load_in_4bit")),
        ("fp16: true", ("fp16", "dtype: bf16", "dtype: fp32")),
        ("neftune_noise_alpha: 5", ("neftune_noise_alpha: 5", "not supported")),
        ("lr_scheduler: rex", ("rex", "cosine")),
        ("optimizer: muon", ("muon", "adamw_torch_fused")),
        ("rl: grpo", ("grpo", "dpo")),
        ("val_set_size: 500", ("val_set_size: 500", "valid_split")),
        (
            "special_tokens: {eos_token: x, pad_token: y}",
            (
                'special_tokens: {"eos_token": "x"}: ',
                "if they differ",
                "tokenizer_config.json",
                "`new_special_tokens`",
            ),
        ),
        ("chat_template: llama3", ("chat_template", "model's own")),
        ("roles_to_train: [user, assistant]", ("roles_to_train", "turns: last")),
        ("resume_from_checkpoint: out/checkpoint-9", ("out/checkpoint-9", "cannot be resumed")),
        ("metric_for_best_model: accuracy", ("accuracy", "lowest eval loss")),
    ],
)
def test_keys_without_a_counterpart_are_listed_as_changes(lines: str, facts: tuple[str, ...]):
    conversion = converted(f"base_model: org/m\ndatasets: [{{path: rows.jsonl}}]\n{lines}\n")
    assert_names("\n".join(conversion.changes), *facts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("made_up: 3", "made_up: 3: is no known key of Axolotl"),
        (
            "micro_batch_sise: 3",
            "micro_batch_sise: 3: is no known key of Axolotl: did you mean `micro_batch_size`?",
        ),
        ("lora_rr: 3\nlora_r: 8", "lora_rr: 3: is no known key of Axolotl"),  # lora_r is in the file
        ("model.lora_rnk: 3", "model.lora_rnk: 3: is no known key of Axolotl"),
    ],
)
def test_unknown_keys_are_listed_first_with_the_nearest(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = tmp_path / "other.yaml"
    source.write_text(
        f"base_model: org/m\nadapter: lora\ndatasets: [{{path: rows.jsonl}}]\n{text}\nneftune_noise_alpha: 5\n"
    )
    assert main.main(["convert", str(source)]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines()[1] == f"not translated: {expected}"
    assert shown.out.splitlines()[1:4] == ["#", "# Not translated:", f"# - {expected}"]


def test_unknown_key_of_a_data_set_is_named_with_the_nearest():
    conversion = converted("base_model: m\ndatasets: [{path: rows.jsonl, feild_messages: chat}]\n")
    assert conversion.unknown == [
        "datasets.feild_messages: 'chat': is no known key of Axolotl: did you mean `datasets.field_messages`?"
    ]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("model_id: a\ntrain_path: b\n", ("other.yaml", "Axolotl", "--print-config")),
        ("- a\n", ("other.yaml", "Axolotl")),
        ("base_model: [\n", ("other.yaml:2", "YAML")),
        ("base_model: !!x a\n", ("other.yaml:1", "tag")),
    ],
)
def test_other_files_are_rejected(
    text: str, facts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "other.yaml").write_text(text)
    assert main.main(["convert", str(tmp_path / "other.yaml")]) == 2
    assert_names(capsys.readouterr().err, *facts)


def test_columns_and_template_variables_are_written(tmp_path: Path):
    (tmp_path / "axolotl.yaml").write_text(
        "base_model: org/m\ndatasets: [{path: rows.jsonl, type: chat_template, field_messages: chat}]\n"
    )
    (tmp_path / "lf.yaml").write_text(f"{LLAMAFACTORY}enable_thinking: false\n")
    for name in ("axolotl", "lf"):
        assert (
            main.main(
                ["convert", str(tmp_path / f"{name}.yaml"), "--to", str(tmp_path / f"{name}-ours.yaml")]
            )
            == 0
        )
    assert load_config(tmp_path / "axolotl-ours.yaml").config.columns == {"messages": "chat"}
    assert load_config(tmp_path / "lf-ours.yaml").config.chat_template_kwargs == {"enable_thinking": False}


def test_existing_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "other.yaml").write_text(AXOLOTL)
    assert main.main(["convert", str(tmp_path / "other.yaml"), "--to", str(tmp_path / "other.yaml")]) == 2
    assert_names(capsys.readouterr().err, "other.yaml", "exists already. Remove it", "--to")
    assert (tmp_path / "other.yaml").read_text() == AXOLOTL


def test_every_counterpart_is_a_key_of_ours():
    """The table names no key that the schema does not have."""
    known = set(FinetuneConfig.model_fields)
    for name, declared in FinetuneConfig.model_fields.items():
        known |= {
            f"{name}.{key}" for section in sections_of(declared.annotation) for key in section.model_fields
        }
    named = {
        row.ours
        for row in TABLE
        if row.ours and not row.ours.startswith(("columns.", "chat_template_kwargs."))
    }
    assert named - known == set()


def test_table_covers_each_tool_and_says_why_a_key_has_no_counterpart():
    assert {
        tool: sum(tool in tools_of(row) for row in TABLE) >= 30 for tool in TOOL_NAMES if tool != "torchtune"
    } == dict.fromkeys(("huggingface", "axolotl", "llamafactory"), True)
    assert [row.theirs for row in TABLE if row.ours is None and not row.note] == []
    pairs = [(tool, row.theirs) for row in TABLE for tool in tools_of(row)]
    assert len(pairs) == len(set(pairs))


def test_keys_of_our_own_yamls_are_no_other_tools():
    """No cookbook is taken for another tool's YAML."""
    assert (
        detect(
            {
                "model_id": "a",
                "train_path": "b",
                "gradient_accumulation_steps": 2,
                "lr_scheduler_type": "cosine",
            }
        )
        is None
    )
    row = find("micro_batch_size")
    assert row is not None and row.settings(4) == {"train_batch_size_per_device": 4}


VALUES: tuple[Any, ...] = (
    "0.05", "text", "${VAR}", 3, 0.5, 0, -1, 10**40, float("nan"), None, True, [], [3], [None], [[]], {}, {"a": 1}, [{}],
    [{"path": None}],
)  # fmt: skip
READ = set(re.findall(r'(?:take|take_items|number|get)\(\s*"([\w.]+)"', inspect.getsource(configs.convert)))
"""Keys that the conversion reads itself, of data sets and prompts as well."""


def with_value(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return settings in which one key, dotted in a section or in each data set, has a value."""
    section, _, inner = key.partition(".")
    if not inner:
        return data | {key: value}
    if section == "datasets":
        prompt = {"field_instruction": "q", "format": "{instruction}"}
        row = {"path": "rows.jsonl", "type": prompt if inner == "format" else "chat_template"}
        return data | {"datasets": [row | {inner: value}]}
    below = data.get(section)
    return data | {section: (below if isinstance(below, dict) else {}) | {inner: value}}


@pytest.mark.slow
@pytest.mark.parametrize("tool", EXPECTED)
def test_any_value_of_any_key_is_converted(tool: Tool, tmp_path: Path):
    """The values of other YAMLs may be texts, numbers, null, lists, sections and variables."""
    given = yaml.safe_load(EXPECTED[tool][0])
    rows = {row.theirs for row in TABLE if tool in tools_of(row)}
    for key in sorted(
        rows | READ | SAME_NAME | set(given) | {f"datasets.{key}" for key in (*READ, "field", "type")}
    ):
        for value in VALUES:
            conversion = translate(with_value(given, key, value), tool, tmp_path / "other.yaml")
            assert nested_settings(conversion), (key, value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('val_set_size: "0.05"', {"valid_split": 0.05}),
        ("learning_rate: ${LR}", {"learning_rate": "${LR}"}),
        ("learning_rate: '2e-4'", {"learning_rate": 2e-4}),
        ("warmup_steps: ${STEPS}", {"num_warmup_steps": "${STEPS}"}),
        ('val_set_size: 0.1\nnum_epochs: "3"\nevals_per_epoch: "2"', {"num_epochs": 3, "eval_steps": 1 / 6}),
        (
            "num_epochs: ${EPOCHS}\nevals_per_epoch: 2",
            {
                "num_epochs": "${EPOCHS}",
                "checkpoint_and_evaluation_frequency": {"unit": "epochs", "frequency": 0.5},
            },
        ),
        *(
            (
                f'num_epochs: ${{EPOCHS}}\n{key}: "{none}"',
                {"num_epochs": "${EPOCHS}", "checkpoint_and_evaluation_frequency": None},
            )
            for key in ("evals_per_epoch", "saves_per_epoch")
            for none in ("0", "0.0")
        ),
        ("test_datasets: []", {"valid_path": None}),
        ('trl: {beta: "0.2"}', {"preference_tuning_config.beta": 0.2}),
        ("trl: {beta: many}", {"preference_tuning_config.beta": None}),
        ("bf16: ${BF16}", {"dtype": None}),
        ("lora_r: '16'\nadapter: lora", {"lora_config.r": 16}),
    ],
)
def test_texts_and_variables_for_numbers_are_translated(line: str, expected: dict[str, Any]):
    conversion = converted(f"base_model: org/m\ndatasets: [{{path: rows.jsonl}}]\n{line}\n")
    assert {key: conversion.ours.get(key) for key in expected} == expected


def test_variable_for_a_number_is_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "base_model: org/m\ndatasets: [{path: rows.jsonl}]\nlearning_rate: ${LR}\noutput_dir: ${OUT}/x\n"
    (tmp_path / "other.yaml").write_text(text)
    assert main.main(["convert", str(tmp_path / "other.yaml"), "--to", str(tmp_path / "ours.yaml")]) == 0
    monkeypatch.setenv("LR", "3e-5")
    monkeypatch.setenv("OUT", "/runs")
    loaded = load_config(tmp_path / "ours.yaml").config
    assert (loaded.learning_rate, loaded.storage_path) == (3e-5, "/runs/x")


@pytest.mark.parametrize(
    "line",
    [
        "wandb_api_key: SECRET",
        "hub_token: SECRET",
        "env: {WANDB_API_KEY: SECRET}",
        "aws_secret_access_key: SECRET",
        "made_up: hf_SECRET",
        "output_dir: s3://user:SECRET@host/x",
        "dataset_prepared_path: [{token: SECRET}]",
    ],
)
def test_secret_is_neither_printed_nor_written(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    secret = "0123456789abcdef" * 2
    given = f"base_model: org/m\ndatasets: [{{path: rows.jsonl}}]\n{line.replace('SECRET', secret)}\n"
    assert secret in given
    (tmp_path / "other.yaml").write_text(given)
    assert main.main(["convert", str(tmp_path / "other.yaml"), "--to", str(tmp_path / "ours.yaml")]) == 0
    printed = capsys.readouterr()
    ours = (tmp_path / "ours.yaml").read_text()
    assert secret not in printed.out + printed.err + ours
    assert line.partition(":")[0] in printed.err + ours
    assert "${" not in ours


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("output_dir: s3://user:SECRET@host/x", "output_dir"),
        ("dataset_prepared_path: [a, 's3://user:SECRET@host/x']", "dataset_prepared_path"),
        ("test_datasets: [{path: 's3://user:SECRET@host/x'}]", "test_datasets"),
        ("test_datasets: [{path: v.jsonl, token: SECRET}]", "test_datasets.token"),
        ("env: {WANDB_API_KEY: SECRET}", "env.WANDB_API_KEY"),
        ("trl: {beta: 0.1, ref: 's3://user:SECRET@host/x'}", "trl.ref"),
    ],
)
def test_key_with_a_secret_is_left_out_and_reported(line: str, place: str):
    secret = "0123456789abcdef" * 2
    conversion = converted(
        f"base_model: org/m\ndatasets: [{{path: rows.jsonl}}]\n{line.replace('SECRET', secret)}\n"
    )
    (change,) = [change for change in conversion.changes if change.startswith(f"{place}: ")]
    assert_names(change, "contains a secret", "left out", "environment")
    assert secret not in str(conversion)
    assert "${" not in str(conversion.ours)


@pytest.mark.parametrize(
    ("text", "train_path"),
    [
        ("base_model: m\ndatasets: [{path: json, data_files: [a.jsonl, b.jsonl]}]\n", ["a.jsonl", "b.jsonl"]),
        (
            "base_model: m\ndatasets: [{path: rows, data_files: [a.jsonl, b.jsonl]}]\n",
            ["rows/a.jsonl", "rows/b.jsonl"],
        ),
        ("base_model: m\npretraining_dataset: [a.jsonl, {path: b.jsonl}]\n", ["a.jsonl", "b.jsonl"]),
        ("model_name_or_path: m\ndatasets: [{path: json, data_files: a.jsonl}]\n", "a.jsonl"),
        ("model_name_or_path: m\ndatasets: [{path: json, data_files: {train: a.jsonl}}]\n", "a.jsonl"),
        (
            "dataset: {_component_: x.chat_dataset, source: json, data_files: [a.jsonl, b.jsonl]}\n",
            ["a.jsonl", "b.jsonl"],
        ),
    ],
)
def test_all_files_of_a_data_set_are_named(text: str, train_path: str | list[str]):
    assert converted(text).ours["train_path"] == train_path


@pytest.mark.parametrize(
    "text",
    [
        "base_model: m\ndatasets: [{path: org/rows, data_files: a.jsonl}]\n",
        "base_model: m\ntest_datasets: [{path: org/rows, data_files: a.jsonl}]\n",
        "base_model: m\npretraining_dataset: [{path: org/rows, data_files: a.jsonl}]\n",
        "model_name_or_path: m\ndatasets: [{path: org/rows, data_files: a.jsonl}]\n",
        "dataset: {_component_: x.chat_dataset, source: org/rows, data_files: a.jsonl}\n",
    ],
)
def test_files_of_a_hub_dataset_are_listed_as_a_change(text: str):
    conversion = converted(text)
    assert "hf://datasets/org/rows" in conversion.ours.values()
    assert_names("\n".join(conversion.changes), "data_files:", "a.jsonl", "all files of org/rows", "download")


@pytest.mark.parametrize(
    "text",
    [
        "base_model: m\ndatasets: [{path: rows.jsonl, split: 'train[:90%]'}]\n",
        "base_model: m\ntest_datasets: [{path: json, data_files: a.jsonl, split: 'train[:90%]'}]\n",
        "model_name_or_path: m\ndatasets: [{path: rows.jsonl, split: 'train[:90%]'}]\n",
        "dataset: {_component_: x.chat_dataset, source: json, data_files: a.jsonl, split: 'train[:90%]'}\n",
    ],
)
def test_part_of_a_local_file_is_listed_as_a_change(text: str):
    assert_names("\n".join(converted(text).changes), "split:", "train[:90%]", "all rows are read")


@pytest.mark.parametrize(
    ("entry", "stage", "columns"),
    [
        (
            '"ranking": true, "columns": {"prompt": "q", "query": "c", "chosen": "good", "rejected": "bad"}',
            "dpo",
            {"instruction": "q", "input": "c", "chosen": "good", "rejected": "bad"},
        ),
        (
            '"ranking": true, "formatting": "sharegpt", "columns": {"messages": "chat", "chosen": "a", "rejected": "b"}',
            "dpo",
            {"conversations": "chat", "chosen": "a", "rejected": "b"},
        ),
        (
            '"columns": {"prompt": "q", "response": "a", "kto_tag": "good"}',
            "kto",
            {"instruction": "q", "output": "a", "label": "good"},
        ),
        ('"columns": {"prompt": "instruction", "kto_tag": "kto_tag"}', "kto", {}),
        ('"columns": {"prompt": "body"}', "pt", {"text": "body"}),
        ('"columns": {"prompt": "text"}', "pt", {}),
        (
            '"formatting": "sharegpt", "columns": {"messages": "chat", "tools": "functions"}',
            "sft",
            {"conversations": "chat", "tools": "functions"},
        ),
    ],
)
def test_llamafactory_columns_of_each_stage_are_translated(
    entry: str, stage: str, columns: dict[str, str], tmp_path: Path
):
    (tmp_path / "dataset_info.json").write_text(f'{{"one": {{{entry}}}}}')
    text = f"model_name_or_path: m\nfinetuning_type: lora\nstage: {stage}\ndataset: one\ndataset_dir: {tmp_path}\n"
    ours = converted(text).ours
    assert {key: name for key, name in ours.items() if key.startswith("columns.")} == {
        f"columns.{key}": name for key, name in columns.items()
    }


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ('"columns": {"images": "pictures"}', "dataset.columns.images:"),
        ('"formatting": "sharegpt", "tags": {"role_tag": "speaker", "content_tag": "says"}', "dataset.tags:"),
    ],
)
def test_llamafactory_columns_that_are_not_read_are_listed_as_changes(entry: str, named: str, tmp_path: Path):
    (tmp_path / "dataset_info.json").write_text(f'{{"one": {{{entry}}}}}')
    text = f"model_name_or_path: m\nfinetuning_type: lora\ndataset: one\ndataset_dir: {tmp_path}\n"
    assert named in "\n".join(converted(text).changes)


def test_llamafactory_columns_that_differ_between_sources_are_listed_as_a_change(tmp_path: Path):
    (tmp_path / "dataset_info.json").write_text(
        '{"one": {"columns": {"prompt": "q", "query": "c"}}, "two": {"columns": {"query": "c"}}, "chat": {"formatting": "sharegpt"}}'
    )
    text = f"model_name_or_path: m\nfinetuning_type: lora\ndataset: one,chat\neval_dataset: two\ndataset_dir: {tmp_path}\n"
    conversion = converted(text)
    assert "columns.instruction" not in conversion.ours
    assert conversion.ours["columns.input"] == "c"
    assert_names("\n".join(conversion.changes), "dataset.columns:", '["q", "instruction"]', "differs")


@pytest.mark.parametrize(
    ("lines", "stage"),
    [
        ("fsdp: [full_shard, auto_wrap]", "zero_3"),
        ("fsdp: full_shard offload", "zero_3_offload_optim+param"),
        ("fsdp: [full_shard]\nfsdp_config: {fsdp_offload_params: true}", "zero_3_offload_optim+param"),
        ("fsdp: [full_shard]\nfsdp_config: {offload_params: false}", "zero_3"),
        ("fsdp: [shard_grad_op, auto_wrap]", "zero_2"),
        ("fsdp_config: {reshard_after_forward: false}", "zero_2"),
        ("fsdp_config: {offload_params: true, reshard_after_forward: true}", "zero_3_offload_optim+param"),
    ],
)
@pytest.mark.parametrize("model", ["base_model: m", "model_name_or_path: m"])
def test_fsdp_shards_and_offloads_as_before(model: str, lines: str, stage: str):
    conversion = converted(f"{model}\n{lines}\n")
    assert conversion.ours["deepspeed"] == stage
    assert "fsdp" not in "\n".join(conversion.changes)


def test_switched_off_fsdp_and_deepspeed_give_nothing():
    for line in ("fsdp: no_shard", "deepspeed: none", "fsdp: []"):
        assert "deepspeed" not in converted(f"base_model: m\n{line}\n").ours

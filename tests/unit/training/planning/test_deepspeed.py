"""DeepSpeed strategies: ZeRO stage, limits of optimizers and offloading, and the dtype of the base weights."""

import json
from pathlib import Path

import pytest
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from configs.schema import FinetuneConfig
from tests.support.messages import assert_names
from training.models.files import ModelError
from training.planning.deepspeed import StrategyError, check_optimizer, check_resharding, resolve_execution
from utils.errors import AnnealError

LLAMA_3_8B = 8_030_261_248


def config(optim: str, num_devices: int) -> FinetuneConfig:
    return FinetuneConfig.model_validate(
        {"model_id": "a/b", "train_path": "t.jsonl", "optim": optim, "num_devices": num_devices}
    )


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
@pytest.mark.parametrize("stage", [1, 2])
def test_partitions_too_large_for_bitsandbytes_raise_an_error(optim: str, stage: int):
    with pytest.raises(StrategyError, match=r"2,147,483,647.*num_devices: 4\b"):
        check_optimizer(config(optim, 3), stage, LLAMA_3_8B)
    check_optimizer(config(optim, 4), stage, LLAMA_3_8B)


@pytest.mark.parametrize(
    ("optim", "stage"),
    [
        ("adamw_8bit", 0),  # one state per matrix
        ("adamw_8bit", 3),  # partitions of a billion elements
        ("adamw_torch", 2),
        ("adafactor", 2),
    ],
)
def test_partition_limit_applies_only_to_bitsandbytes_with_zero_1_and_2(optim: str, stage: int):
    check_optimizer(config(optim, 1), stage, LLAMA_3_8B)
    with pytest.raises(StrategyError):
        check_optimizer(config("adamw_8bit", 1), 2, LLAMA_3_8B)


def test_zero_stage_is_read_from_the_deepspeed_file_not_its_name(tmp_path: Path):
    file = tmp_path / "my_zero_2.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    keys = {"model_id": "a/b", "train_path": "t.jsonl", "deepspeed": {"config_path": str(file)}}
    assert resolve_execution(FinetuneConfig.model_validate(keys), "cpu").zero_stage == 3
    with pytest.raises(ModelError, match=r"ZeRO-3 .*4-bit weights"):
        resolve_execution(
            FinetuneConfig.model_validate(keys | {"load_in_4bit": True, "lora_config": {"r": 8}}), "cpu"
        )


@pytest.mark.parametrize("file", [{}, {"bf16": {"enabled": "auto"}}, {"gradient_clipping": 0.3}])
def test_values_of_the_yaml_reach_deepspeed_if_its_file_has_no_keys_for_them(
    file: dict[str, object], tmp_path: Path
):
    """`fill_match` of transformers 5.17 skips missing keys, and DeepSpeed 0.19.8 then clips at 1.0 (integrations/deepspeed.py)."""
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | file))
    keys = {"model_id": "a/b", "train_path": "t.jsonl", "deepspeed": {"config_path": str(path)}}
    settings = resolve_execution(FinetuneConfig.model_validate(keys), "cpu").deepspeed
    arguments = TrainingArguments(
        str(tmp_path),
        max_grad_norm=0.3,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        bf16=True,
        use_cpu=True,
    )
    filled = HfTrainerDeepSpeedConfig(settings)
    filled.trainer_config_process(arguments)
    assert not filled.mismatches
    assert filled.get_value("gradient_clipping") == 0.3
    assert filled.get_value("gradient_accumulation_steps") == 4
    assert filled.get_value("train_micro_batch_size_per_gpu") == 2
    assert filled.get_value("train_batch_size") == 8
    assert filled.get_value("bf16.enabled") is True


@pytest.mark.parametrize(
    ("keys", "weights_dtype"),
    [
        ({}, "fp32"),  # fp32 master weights and autocast
        ({"deepspeed": "zero_2"}, "bf16"),  # DeepSpeed holds the fp32 master weights
        ({"lora_config": {"r": 8}}, "bf16"),
        ({"lora_config": {"r": 8}, "dtype": "fp32"}, "fp32"),
        ({"deepspeed": "zero_2", "dtype": "fp32"}, "fp32"),
    ],
)
def test_base_model_is_loaded_in_bf16_unless_fp32_is_required(keys: dict[str, object], weights_dtype: str):
    defaults = {"model_id": "a/b", "train_path": "t.jsonl"}
    execution = resolve_execution(FinetuneConfig.model_validate(defaults | keys), "cpu")
    assert execution.weights_dtype == weights_dtype


@pytest.mark.parametrize(
    ("file", "keys", "fix"),
    [
        ({"zero_optimization": {"stage": 2}}, {}, None),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, {}, None),
        ({"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}}, {"num_devices": 2}, None),
        ({"zero_optimization": {"stage": 1}}, {"optim": "adamw_8bit"}, "optim: adamw_torch"),
        ({"zero_optimization": {"stage": 3}}, {"optim": "adafactor"}, "optim: adamw_torch"),
        ({"zero_optimization": {"stage": 0}}, {}, "deepspeed: zero_1"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, {}, "round_robin_gradients"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, {}, "cpu"),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}},
            {},
            "deepspeed: zero_2",
        ),
        ({"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}}, {}, '"auto"'),
    ],
)
def test_settings_that_tie_checkpoints_to_a_number_of_devices_raise_an_error(
    file: dict[str, object], keys: dict[str, object], fix: str | None, tmp_path: Path
):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(file))
    defaults = {
        "model_id": "a/b",
        "train_path": "t.jsonl",
        "deepspeed": {"config_path": str(path)},
        "num_devices": {"min": 1, "max": 2},
    }
    config = FinetuneConfig.model_validate(defaults | keys)
    execution = resolve_execution(config, "cuda")
    if fix is None:
        check_resharding(config, execution)
        return
    with pytest.raises(StrategyError) as caught:
        check_resharding(config, execution)
    assert_names(str(caught.value), "num_devices", fix)


@pytest.mark.parametrize("name", ["zero_3.json", "offload.json"])
@pytest.mark.parametrize(
    ("zero", "keys", "fix"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, {"optim": "adamw_8bit"}, "optim: adamw_torch"),
        ({"offload_optimizer": {"device": "nvme"}}, {"optim": "adafactor"}, "offload_optimizer"),
        ({"offload_optimizer": {"device": "cpu"}}, {"device": "cpu"}, "offload_optimizer"),
        ({"offload_param": {"device": "cpu"}}, {"device": "cpu"}, "offload_param"),
        ({"offload_param": {"device": "cpu"}}, {"optim": "adamw_8bit"}, None),
        ({"offload_optimizer": {"device": "none"}}, {"optim": "adamw_8bit", "device": "cpu"}, None),
        ({}, {"optim": "adamw_8bit", "device": "cpu"}, None),
    ],
)
def test_offloading_is_read_from_the_deepspeed_file_not_its_name(
    zero: dict[str, object], keys: dict[str, object], fix: str | None, name: str, tmp_path: Path
):
    file = tmp_path / name
    file.write_text(json.dumps({"zero_optimization": {"stage": 3} | zero}))
    defaults = {"model_id": "a/b", "train_path": "t.jsonl", "deepspeed": {"config_path": str(file)}}
    config = FinetuneConfig.model_validate(defaults | keys)
    if fix is None:
        assert resolve_execution(config, "cuda").zero_stage == 3
        return
    with pytest.raises(StrategyError) as caught:
        resolve_execution(config, "cuda")
    assert_names(str(caught.value), "deepspeed", name, fix)


@pytest.mark.parametrize(
    ("keys", "facts"),
    [
        ({"deepspeed": "zero_3_offload_optim", "optim": "adamw_8bit"}, ("adamw_8bit", "optim: adamw_torch")),
        (
            {"deepspeed": "zero_3_offload_optim+param", "optim": "adafactor"},
            ("adafactor", "optim: adamw_torch"),
        ),
        ({"deepspeed": "zero_3_offload_optim", "device": "cpu"}, ("device: cpu", "deepspeed: zero_3")),
        (
            {"deepspeed": "zero_3", "load_in_4bit": True, "lora_config": {"r": 8}},
            ("ZeRO-3", "load_in_4bit: false"),
        ),
        ({"deepspeed": "zero_3", "kernels": "unsloth"}, ("kernels: unsloth", "ZeRO-3", "liger")),
        ({"kernels": "unsloth", "packing": True}, ("kernels: unsloth", "packed", "liger")),
        (
            {"kernels": "unsloth", "task": "preference_tuning"},
            ("kernels: unsloth", "log-probabilities", "torch"),
        ),
    ],
)
def test_settings_that_exclude_each_other_raise_an_error_with_the_fix(
    keys: dict[str, object], facts: tuple[str, ...]
):
    config = FinetuneConfig.model_validate({"model_id": "a/b", "train_path": "t.jsonl"} | keys)
    with pytest.raises(AnnealError) as caught:
        resolve_execution(config, "cuda")
    assert_names(str(caught.value), *facts)


def test_liger_without_a_gpu_raises_an_error():
    config = FinetuneConfig.model_validate({"model_id": "a/b", "train_path": "t.jsonl", "kernels": "liger"})
    with pytest.raises(ModelError, match=r"kernels: liger.*GPU.*torch"):
        resolve_execution(config, "cpu")

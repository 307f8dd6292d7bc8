import json
from typing import Any

import pytest
from pydantic import ValidationError

from configs.schema import (
    DEEPSPEED_DIRECTORY,
    DEEPSPEED_PRESETS,
    FinetuneConfig,
    LoraConfig,
    config_hash,
    deepspeed_preset_path,
    uri_fields,
)
from tests.support.messages import assert_names

LORA: dict[str, Any] = {"lora_config": {"r": 8}}
AUTO: dict[str, Any] = {"train_batch_size_per_device": "auto"}


def config(**settings: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"model_id": "org/model", "train_path": "train.jsonl", **settings})


def error_message(**settings: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        config(**settings)
    # Not str(): that repeats the input, so any key that was passed would be found in it.
    return "\n".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in caught.value.errors())


def test_config_with_only_the_two_required_keys_has_defaults():
    parsed = config()
    assert (parsed.task, parsed.learning_rate, parsed.num_checkpoints_to_keep) == (
        "instruction_tuning",
        1e-4,
        1,
    )
    assert parsed.checkpoint_and_evaluation_frequency.unit == "epochs"
    assert not parsed.trains_adapter


def test_chosen_batch_size_preserves_the_rows_per_step():
    chosen = config(num_devices=2, train_batch_size=24, seed=7, **AUTO).with_batch_size(4)
    assert (chosen.batch_size, chosen.gradient_accumulation_steps, chosen.num_devices) == (4, 3, 2)
    assert (chosen.train_batch_size, chosen.seed) == (None, 7)
    assert FinetuneConfig.model_validate(chosen.model_dump(mode="json")) == chosen


def test_batch_sizes_of_the_largest_step_are_found_without_trying_every_number():
    parsed = config(train_batch_size=73_513_440, num_devices={"min": 1, "max": 2}, **AUTO)
    found = list(parsed.possible_batch_sizes())
    assert (found[0], found[-1], len(found)) == (36_756_720, 1, 640)
    assert found == sorted(found, reverse=True)


def test_every_device_count_has_the_same_rows_per_step():
    """Device counts that do not divide the batches of a step evenly are excluded."""
    parsed = config(
        num_devices={"min": 1, "max": 6}, train_batch_size_per_device=4, gradient_accumulation_steps=2
    )
    assert parsed.device_counts == (1, 2, 3, 4, 6)
    assert [parsed.accumulation_on(devices) for devices in parsed.device_counts] == [12, 6, 4, 3, 2]
    assert config(num_devices=5).device_counts == (5,)
    assert config(num_devices=5, gradient_accumulation_steps=3).accumulation_on(5) == 3


def test_workers_that_share_sequences_share_the_rows_of_a_step():
    parsed = config(
        num_devices={"min": 2, "max": 8},
        sequence_parallel_size=2,
        train_batch_size_per_device=3,
        gradient_accumulation_steps=3,
    )
    assert parsed.device_counts == (2, 4, 6, 8)
    assert [parsed.accumulation_on(devices) for devices in parsed.device_counts] == [12, 6, 4, 3]
    assert parsed.rows_per_step == 3 * 4 * 3
    automatic = config(num_devices=4, sequence_parallel_size=2, train_batch_size=12, **AUTO)
    assert list(automatic.possible_batch_sizes()) == [6, 3, 2, 1]
    assert {automatic.with_batch_size(rows).rows_per_step for rows in (6, 3, 2, 1)} == {12}


def test_possible_batch_sizes_work_on_every_device_count():
    automatic = config(num_devices={"min": 3, "max": 4}, train_batch_size=24, **AUTO)
    # Batches of 6 or 3 rows are excluded: 3 devices cannot share 4 or 8 batches evenly.
    assert list(automatic.possible_batch_sizes()) == [2, 1]
    for rows in automatic.possible_batch_sizes():
        chosen = automatic.with_batch_size(rows)
        assert chosen.device_counts == (3, 4)
        assert all(rows * chosen.accumulation_on(count) * count == 24 for count in (3, 4))


def test_every_field_has_help():
    schema = FinetuneConfig.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    undescribed = [
        f"{section['title']}.{name}"
        for section in sections
        for name, described in section["properties"].items()
        if not described.get("description")
    ]
    assert undescribed == []


def test_config_round_trips_through_json():
    parsed = config(
        deepspeed={"config_path": "mine.json"},
        lora_config={"target_modules": ["q_proj"], "rank_pattern": {"a": 4}},
        worker_resources={"memory": "50GiB", "accelerator_type:A10G": 0.001},
        logger={"provider": "mlflow", "experiment_name": "e"},
        num_epochs=2,
    )
    decoded = json.loads(json.dumps(parsed.model_dump(mode="json")))
    assert FinetuneConfig.model_validate(decoded) == parsed


def test_config_is_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        config().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"load_in_4bit": True}, ("`load_in_4bit`", "`lora_config`")),
        (
            {"gradient_checkpointing": "unsloth", "kernels": "torch"},
            ("`gradient_checkpointing: unsloth`", "`kernels: unsloth`", "`true`"),
        ),
        (
            {"worker_resources": {"GPU": 0}, "device": "cuda", "num_devices": 2},
            ("`worker_resources.GPU`", "`device: cuda`"),
        ),
        ({"worker_resources": {"GPU": 2}}, ("`worker_resources.GPU`", "`GPU: 1`", "`num_devices`")),
        ({"worker_resources": {"GPU": 1}, "device": "cpu"}, ("`worker_resources.GPU`", "`device: cpu`")),
        (
            {"worker_resources": {"accelerator_type:A10G": 0.001, "accelerator_type:H100": 0.001}},
            ("`worker_resources`", "accelerator_type:A10G", "accelerator_type:H100"),
        ),
        ({"worker_resources": {"accelerator_type:H100": 4}}, ("`accelerator_type:A10G: 0.001`",)),
        ({"worker_resources": {"accelerator_type:": 0.001}}, ("`accelerator_type:A10G: 0.001`",)),
        ({"preference_tuning_config": {}}, ("`preference_tuning_config`", "`task: preference_tuning`")),
        (
            {"classifier_config": {"label_tokens": ["a", "b"]}},
            ("`classifier_config`", "`task: classification`"),
        ),
        ({"task": "classification"}, ("`task: classification`", "label_tokens")),
        (
            {"initial_adapter_model_ckpt_path": "a", "resume_from_checkpoint": "b"},
            ("`initial_adapter_model_ckpt_path`", "`resume_from_checkpoint`"),
        ),
        (
            {"initial_base_model_ckpt_path": "a", "resume_from_checkpoint": "b"},
            ("`initial_base_model_ckpt_path`", "`resume_from_checkpoint`"),
        ),
        ({"packing": True, "padding": "max_length"}, ("`padding: longest`", "`packing: false`")),
        ({"export": {"merge": False}}, ("`export.merge: false`", "adapter")),
        ({"export": {"merge": False, "gguf": True}, **LORA}, ("`gguf`", "`merge: true`")),
        ({"export": {"gguf_type": "q8_0"}, **LORA}, ("`gguf_type`", "`gguf: true`")),
        ({"packing": True, "task": "preference_tuning"}, ("`task: preference_tuning`", "`packing: false`")),
        ({"prompt_template": "{instruction}"}, ("`prompt_template`", "two")),
        (
            {"prompt_template": 'Answer as {"a": 1}. {instruction} {output}'},
            ("`prompt_template`", '{"a"', "{{ and }}"),
        ),
        (
            {"prompt_template": "{ {instruction} {output}"},
            ("`prompt_template`", "unexpected '{'", "{{ and }}"),
        ),
        ({"prompt_template": "} {instruction} {output}"}, ("`prompt_template`", "'}'", "{{ and }}")),
        ({"prompt_template": "{0} {output}"}, ("`prompt_template`", "{0", "{{ and }}")),
        ({"prompt_template": "{} {instruction} {output}"}, ("`prompt_template`", "{…}", "{{ and }}")),
        (
            {"prompt_template": "{instruction!r} {input} {output}"},
            ("`prompt_template`", "{instruction", "{{ and }}"),
        ),
        (
            {"prompt_template": "{instruction:>9} {input} {output}"},
            ("`prompt_template`", "{instruction", "{{ and }}"),
        ),
        ({"prompt_template": "{instruction} {output} {output}"}, ("`prompt_template`", "`output`", "twice")),
        ({"dtype": "fp32", "flash_attention_2": True}, ("`flash_attention_2`", "`dtype: bf16`")),
        ({"valid_path": "v.jsonl", "valid_split": 0.1}, ("`valid_path`", "`valid_split`")),
        (
            {"valid_path": {"math": [{"path": "v.jsonl", "weight": 2}], "chat": "w.jsonl"}},
            ("`valid_path`", "weights"),
        ),
        ({"early_stopping_patience": 2}, ("`early_stopping_patience`", "`valid_path`", "`valid_split`")),
        (
            {"early_stopping_threshold": 0.1, "valid_split": 0.1},
            ("`early_stopping_threshold`", "`early_stopping_patience`"),
        ),
        ({"loss_watchdog_patience": 5}, ("`loss_watchdog_patience`", "`loss_watchdog_threshold`")),
        (
            {"columns": {"prompt": "question"}, "ignore_columns": ["question"]},
            ("`ignore_columns`", "`question`", "`columns`", "`prompt`"),
        ),
        (
            {"task": "preference_tuning", "preference_tuning_config": {"desirable_weight": 2.0}},
            ("`desirable_weight`", "`loss: kto`"),
        ),
        (
            {"task": "preference_tuning", "data_format": "messages"},
            ("`data_format: messages`", "`preference`", "loss: kto"),
        ),
        (
            {"task": "classification", "data_format": "tokens"},
            ("`data_format: tokens`", "`classification`"),
        ),
        (
            {"data_format": "tokens", "prompt_template": "{prompt} {completion}"},
            ("`prompt_template`", "`data_format: tokens`"),
        ),
        ({"num_warmup_steps": 5, "warmup_ratio": 0.1}, ("`num_warmup_steps`", "`warmup_ratio`")),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
            ("`warmup_ratio`", "`constant_with_warmup`"),
        ),
        ({"num_epochs": 1, "min_update_steps": 5}, ("`num_epochs`", "`min_update_steps`")),
        ({"num_epochs": 1, "max_steps": 5}, ("`num_epochs`", "`max_steps`")),
        ({"max_steps": 1, "min_update_steps": 5}, ("`max_steps`", "`min_update_steps`")),
        (
            {"train_batch_size_per_device": "auto"},
            ("`train_batch_size_per_device: auto`", "`train_batch_size`"),
        ),
        ({"train_batch_size": 8}, ("`train_batch_size`", "`train_batch_size_per_device: auto`")),
        (
            {"train_batch_size": 9, "num_devices": 2, **AUTO},
            ("`train_batch_size`", "9", "2 devices", "multiple of 2"),
        ),
        (
            {"train_batch_size": 8, "gradient_accumulation_steps": 2, **AUTO},
            ("`gradient_accumulation_steps`", "`train_batch_size_per_device: auto`"),
        ),
        (
            {"num_devices": {"min": 77, "max": 100_000}},
            ("`num_devices.min`", "use 32 or 40 or 50 or 80 or 100,"),
        ),
        ({"num_devices": {"min": 3, "max": 2}}, ("num_devices", "`max`", "`min`", "3")),
        ({"num_devices": {"min": 2, "max": 2}}, ("num_devices", "`num_devices: 2`")),
        (
            {"num_devices": {"min": 3, "max": 4}},
            ("`num_devices.min`", "3", "1 or 2", "`gradient_accumulation_steps`"),
        ),
        (
            {
                "num_devices": {"min": 1, "max": 2},
                "task": "preference_tuning",
                "preference_tuning_config": {"loss": "kto"},
            },
            ("`num_devices`", "`loss: kto`", "`num_devices: 2`"),
        ),
        (
            {"num_devices": {"min": 3, "max": 4}, "train_batch_size": 8, **AUTO},
            ("`train_batch_size`", "8", "3 devices", "multiple of 3"),
        ),
        (
            {"sequence_parallel_size": 3, "num_devices": 4},
            ("`sequence_parallel_size`", "3", "`num_devices` (4)", "1 or 2 or 4", "multiple of 3"),
        ),
        ({"sequence_parallel_size": 2}, ("`sequence_parallel_size`", "`num_devices` (1)", "multiple of 2")),
        (
            {"sequence_parallel_size": 2, "num_devices": {"min": 1, "max": 4}},
            ("`sequence_parallel_size`", "`num_devices` (1)", "multiple of 2"),
        ),
        (
            {"sequence_parallel_size": 2, "num_devices": 4, "train_batch_size": 9, **AUTO},
            ("`train_batch_size`", "9", "2 groups of 2 devices", "multiple of 2"),
        ),
        (
            {"sequence_parallel_size": 2, "num_devices": {"min": 4, "max": 6}},
            ("`num_devices.min`", "4", "use 2", "`gradient_accumulation_steps`"),
        ),
        (
            {"sequence_parallel_size": 2, "num_devices": 2, "task": "preference_tuning"},
            ("`sequence_parallel_size`", "`task: preference_tuning`", "remove"),
        ),
        (
            {
                "sequence_parallel_size": 2,
                "num_devices": 2,
                "task": "classification",
                "classifier_config": {"label_tokens": ["a", "b"]},
            },
            ("`sequence_parallel_size`", "`task: classification`", "remove"),
        ),
        (
            {"sequence_parallel_size": 2, "num_devices": 2, "eval_samples": 2, "valid_path": "v.jsonl"},
            ("`sequence_parallel_size`", "`eval_samples`", "remove"),
        ),
        (
            {"sequence_parallel_size": 2, "num_devices": 2, "flash_attention_2": True},
            ("`sequence_parallel_size`", "`flash_attention_2`", "remove"),
        ),
        (
            {"lr_scheduler_kwargs": {"power": 2.0}},
            ("`lr_scheduler_kwargs.power`", "polynomial", "remove"),
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ("lr_scheduler_kwargs", "min_lr_rate")),
        ({"lr_scheduler_type": "warmup_stable_decay"}, ("lr_scheduler_kwargs", "num_decay_steps")),
        (
            {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 0.5}},
            ("`frequency`", "`unit: epochs`"),
        ),
        (
            {"lr_scheduler_type": "constant", "num_warmup_steps": 5},
            ("`lr_scheduler_type: constant`", "`constant_with_warmup`"),
        ),
        (
            {"task": "classification", "classifier_config": {"label_tokens": ["a", "a"]}},
            ("`label_tokens`", "twice"),
        ),
        ({"new_tokens": ["<a>", "<b>", "<a>"]}, ("`new_tokens`", "'<a>'", "twice")),
        ({"new_tokens": ["<a>"], "new_special_tokens": ["<a>"]}, ("`new_tokens`", "'<a>'", "twice")),
        (
            {"new_special_tokens": ["<a>"], "initial_adapter_model_ckpt_path": "run:first"},
            ("`new_special_tokens`", "`initial_adapter_model_ckpt_path`", "merge"),
        ),
        (
            {"new_tokens": ["<a>"], "lora_config": {"trainable_token_indices": {"lm_head": [1]}}},
            ("`lora_config.trainable_token_indices`", "list"),
        ),
        ({"push_to_hub": True}, ("`push_to_hub`", "`hub_model_id: ORG/NAME`")),
        ({"hub_model_id": "org/model"}, ("`hub_model_id`", "`push_to_hub: true`")),
        ({"hub_private_repo": True}, ("`hub_private_repo`", "`push_to_hub: true`")),
        ({"eval_samples": 4}, ("`eval_samples`", "`valid_path`")),
        (
            {"eval_samples": 4, "valid_path": "v.jsonl", "task": "causal_lm"},
            ("`eval_samples`", "`task: causal_lm`", "prompt"),
        ),
        ({"eval_max_new_tokens": 64}, ("`eval_max_new_tokens`", "`eval_samples`")),
        ({"lora_config": {"layers_to_transform": [1]}}, ("`layers_to_transform`", "`target_modules`")),
        ({"lora_config": {"layers_pattern": "h"}}, ("`layers_pattern`", "`layers_to_transform`")),
        (
            {"lora_config": {"init_lora_weights": "orthogonal", "r": 3}},
            ("`init_lora_weights: orthogonal`", "3"),
        ),
        (
            {"lora_config": {"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 5}}},
            ("`init_lora_weights: orthogonal`", "5"),
        ),
        ({"lora_config": {"target_modules": "(q_proj"}}, ("`target_modules`", "'(q_proj'")),
        ({"lora_config": {"exclude_modules": "*q_proj"}}, ("`exclude_modules`", "'*q_proj'")),
        ({"lora_config": {"rank_pattern": {"q_proj(": 2}}}, ("`rank_pattern`", "'q_proj('")),
        ({"lora_config": {"alpha_pattern": {"[q": 2}}}, ("`alpha_pattern`", "'[q'")),
        ({"lora_config": {"lora_bias": True, "use_dora": True}}, ("`lora_bias`", "`use_dora`")),
        ({"lora_config": {"lora_alpha": 10**40}}, ("`lora_alpha`", "fp32")),
        (
            {"load_in_4bit": True, "lora_config": {"init_lora_weights": "orthogonal"}},
            ("`lora_config.init_lora_weights: orthogonal`", "`load_in_4bit`", "`gaussian`"),
        ),
        (
            {"task": "preference_tuning", "lora_config": {"init_lora_weights": False}},
            ("`lora_config.init_lora_weights: false`", "`loss: dpo`", "`loss: orpo`"),
        ),
        (
            {"task": "preference_tuning", "lora_config": {"init_lora_weights": "orthogonal"}},
            ("`lora_config.init_lora_weights: orthogonal`", "`loss: dpo`", "`dtype: fp32`"),
        ),
        ({"lora_config": {"alpha_pattern": {"q_proj": 10**40}}}, ("`alpha_pattern`", "fp32")),
        ({"lora_config": {"trainable_token_indices": [5, 6, 5]}}, ("`trainable_token_indices`", "5")),
    ],
)
def test_conflicting_settings_raise_an_error_that_names_them(
    settings: dict[str, Any], facts: tuple[str, ...]
):
    assert_names(error_message(**settings), *facts)


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "initial_adapter_model_ckpt_path": "s3://b/adapter"},
        {"load_in_4bit": True, "deepspeed": "zero_2", **LORA},
        {"export": {}},
        {"export": {"merge": False, "to": "s3://elsewhere/adapter"}, **LORA},
        {"flash_attention_2": True, "device": "cpu"},
        {"deepspeed": "zero_3", "device": "cpu"},
        {"kernels": "auto", "gradient_checkpointing": "unsloth"},
        {"worker_resources": {"GPU": 0}, "device": "auto"},
        {"worker_resources": {"anyscale/accelerator_shape:4xA10G": 0.001}},
        {"task": "preference_tuning", "preference_tuning_config": {"loss": "kto"}},
        {"num_devices": {"min": 1, "max": 3}, "task": "preference_tuning"},
        {
            "task": "preference_tuning",
            "lora_config": {"init_lora_weights": False},
            "preference_tuning_config": {"loss": "orpo"},
        },
        {"task": "preference_tuning", "lora_config": {"init_lora_weights": "gaussian"}},
        {"num_devices": {"min": 1, "max": 2}, "deepspeed": "zero_3"},
        {"num_devices": {"min": 3, "max": 4}, "gradient_accumulation_steps": 3},
        {"initial_adapter_model_ckpt_path": "run:first", **LORA},
        {"lora_config": {"layers_to_transform": [1], "target_modules": ["q_proj"]}},
        {"eval_first": True, "valid_path": None},
        {"train_path": "hf://datasets/openai/gsm8k/main?split=train[50%:]"},
        {"columns": {"prompt": "question", "completion": "answer"}},
        {"prompt_template": 'As {{"a": 1}}: {instruction} {instruction} {output}\n'},
    ],
)
def test_compatible_settings_are_stored_as_given(settings: dict[str, Any]):
    parsed = config(**settings).model_dump()
    for key, value in settings.items():
        stored = parsed[key]
        assert {name: stored[name] for name in value} == value if isinstance(value, dict) else stored == value


@pytest.mark.parametrize(
    "settings",
    [
        {"num_devices": 0},
        {"num_devices": {"min": 0, "max": 2}},
        {"num_devices": {"max": 2}},
        {"num_devices": True},
        {"num_devices": "4"},
        {"learning_rate": 0},
        {"learning_rate": float("inf")},
        {"weight_decay": float("nan")},
        {"seed": 2**32},
        {"run_name": "a/b"},
        {"run_name": ".."},
        {"run_name": "ü"},
        {"train_path": "hdfs://bucket/x"},
        {"train_path": "s3://"},
        {"train_path": "hf://models/x"},
        {"train_path": ""},
        {"storage_path": "hf://datasets/a/b"},
        {"deepspeed": "zero_4"},
        {"deepspeed": {}},
        {"columns": {"answer": "completion"}},
        {"worker_resources": {"CPU": -1}},
        {"worker_resources": {"memory": "much"}},
        {"worker_resources": {"memory": "-1GiB"}},
        {"lora_config": {"init_lora_weights": "pissa"}},
        {"lora_config": {"task_type": "SEQ_CLS"}},
        {"logger": {"provider": "wandb", "experiment_name": "e"}},
        {"hub_model_id": "https://huggingface.co/org/model"},
        {"hub_model_id": "org/model/file"},
        {"new_tokens": [""]},
        {"new_tokens": ["<a>", " \n"]},
        {"new_special_tokens": "<a>"},
        {"colour": "blue"},
    ],
)
def test_values_out_of_range_raise_an_error_at_their_key(settings: dict[str, Any]):
    (key,) = settings
    assert all(line.startswith((f"{key}.", f"{key}: ")) for line in error_message(**settings).splitlines())


@pytest.mark.parametrize(
    ("text", "amount"),
    [("50GiB", 50 * 2**30), ("50GB", 50 * 10**9), ("512MiB", 512 * 2**20), ("1.5 GiB", 3 * 2**29), (7, 7)],
)
def test_memory_is_converted_to_bytes(text: str | int, amount: int):
    memory = config(worker_resources={"memory": text}).worker_resources["memory"]
    assert memory == amount
    assert isinstance(memory, int)


@pytest.mark.parametrize(
    ("settings", "steps_per_epoch", "epochs"),
    [
        ({}, 100, 1),
        ({}, 99, 2),
        ({"min_update_steps": 10}, 3, 4),
        ({"num_epochs": 0.5}, 1000, 0.5),
        ({"max_steps": 7}, 3, None),
    ],
)
def test_number_of_epochs_follows_from_the_length_settings(
    settings: dict[str, Any], steps_per_epoch: int, epochs: float | None
):
    assert config(**settings).number_of_epochs(steps_per_epoch) == epochs


@pytest.mark.parametrize(
    "settings",
    [
        {"storage_path": "s3://elsewhere/runs"},
        {"export": {"dtype": "fp16"}},
        {"run_name": "other"},
        {"output_dir": "/scratch"},
        {"max_failures": 0},
        {"num_checkpoints_to_keep": 5},
        {"logger": {"provider": "tensorboard"}},
        {"resume": "never"},
        {"push_to_hub": True, "hub_model_id": "org/model", "hub_private_repo": True},
        {"eval_samples": 4, "eval_max_new_tokens": 64, "valid_split": 0.1},
        {"worker_resources": {"CPU": 2}},
        {"trainer_resources": {"CPU": 2}},
    ],
)
def test_the_hash_excludes_settings_that_do_not_affect_training(settings: dict[str, Any]):
    kept = {key: settings[key] for key in ("valid_split",) if key in settings}
    assert config_hash(config(**settings)) == config_hash(config(**kept))


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 1},
        {"model_id": "org/other"},
        LORA,
        {"num_devices": 2},
        {"deepspeed": "zero_2"},
        {"max_steps": 3},
    ],
)
def test_the_hash_includes_settings_that_affect_training(settings: dict[str, Any]):
    assert config_hash(config(**settings)) != config_hash(config())


def test_hash_of_an_earlier_version_is_unchanged():
    """Run names default to the hash, so a hash that changes turns every unnamed run into a new one."""
    expected = "31e81f77790722a19a2a6f5f1e9ce231dd16dfafbf5ad6dd3d7356b72cd4e94f"
    assert config_hash(config(num_epochs=1, seed=7)) == expected


@pytest.mark.parametrize(
    "later_key",
    [
        {"turns": "last"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"valid_split": 0.1},
        {"ignore_columns": ["score"]},
        {"early_stopping_patience": 3, "valid_path": "v.jsonl"},
        {"max_train_rows": 10},
        {"max_valid_rows": 10},
        {"new_tokens": ["<a>"]},
        {"new_special_tokens": ["<a>"]},
        {"warmup_ratio": 0.1},
        {"adam_beta1": 0.8},
        {"adam_beta2": 0.95},
        {"adam_epsilon": 1e-6},
        {"eval_steps": 10},
        {"save_steps": 0.1},
        {"lr_scheduler_kwargs": {"num_cycles": 1.0}},
    ],
)
def test_keys_of_later_versions_change_the_hash_only_if_they_are_set(later_key: dict[str, Any]):
    assert config_hash(config(**later_key)) != config_hash(config())


@pytest.mark.parametrize(
    ("settings", "steps", "warmup"),
    [({}, 100, 0), ({"num_warmup_steps": 7}, 100, 7), ({"warmup_ratio": 0.03}, 110, 4)],
)
def test_warm_up_is_a_number_of_steps_or_a_share_of_them(settings: dict[str, Any], steps: int, warmup: int):
    """transformers rounds a share up, too (get_warmup_steps in its training arguments)."""
    assert config(**settings).warmup_steps(steps) == warmup


def test_a_split_takes_its_validation_rows_from_the_training_sources():
    sources = config(
        valid_split=0.1, train_path=[{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl", "weight": 1}]
    ).valid_sources
    assert [(source.path, source.weight) for source in sources] == [("a.jsonl", None), ("b.jsonl", None)]


def test_hash_does_not_depend_on_key_order():
    reordered = config(worker_resources={"CPU": 1}, lora_config={"lora_alpha": 16, "r": 8})
    assert config_hash(reordered) == config_hash(config(lora_config={"r": 8, "lora_alpha": 16}))
    assert len(config_hash(reordered)) == 64


def test_deepspeed_presets_match_the_files():
    assert sorted(path.stem for path in DEEPSPEED_DIRECTORY.glob("*.json")) == sorted(DEEPSPEED_PRESETS)


@pytest.mark.parametrize("preset", DEEPSPEED_PRESETS)
def test_a_preset_leaves_the_optimizer_to_the_yaml(preset: Any):
    preset_settings = json.loads(deepspeed_preset_path(preset).read_text())
    zero = preset_settings["zero_optimization"]
    assert config(deepspeed=preset).deepspeed == preset
    assert "optimizer" not in preset_settings
    assert "scheduler" not in preset_settings
    assert zero["stage"] == int(preset.split("_")[1])
    assert "auto" not in zero.values()
    assert preset_settings["bf16"] == {"enabled": "auto"}
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert preset_settings[key] == "auto"
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)
    assert ("offload_optimizer" in zero, "offload_param" in zero) == ("optim" in preset, "param" in preset)


def test_lora_fields_exist_in_peft():
    """Parse PEFT's source, since importing it takes seconds."""
    import ast
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("peft")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "tuners" / "lora" / "config.py").read_text()
    [class_node] = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "LoraConfig"
    ]
    names = {
        node.target.id
        for node in class_node.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert set(LoraConfig.model_fields) - names == {"task_type"}


def test_uri_fields_are_found_by_their_types():
    found = uri_fields(
        config(
            model_id="s3://b/model",
            train_path=["a.jsonl", "s3://b/c.jsonl"],
            valid_path="hf://datasets/o/n",
            initial_adapter_model_ckpt_path="run:one",
            export={"merge": True, "to": "s3://b/exports"},
            storage_path="s3://b/runs",
        )
    )
    assert [(field.key, field.kind, field.uri) for field in found] == [
        ("model_id", "model", "s3://b/model"),
        ("initial_adapter_model_ckpt_path", "model", "run:one"),
        ("train_path", "data", "a.jsonl"),
        ("train_path", "data", "s3://b/c.jsonl"),
        ("valid_path", "data", "hf://datasets/o/n"),
        ("storage_path", "storage", "s3://b/runs"),
        ("export.to", "storage", "s3://b/exports"),
    ]


def test_validation_sets_keep_their_order_and_are_uri_fields():
    read = config(valid_path={"math": "s3://b/math.jsonl", "chat": ["a.jsonl", "b.jsonl"]})
    assert {name: [source.path for source in sources] for name, sources in read.valid_sets.items()} == {
        "math": ["s3://b/math.jsonl"],
        "chat": ["a.jsonl", "b.jsonl"],
    }
    assert next(iter(read.valid_sets)) == "math"
    found = [field.uri for field in uri_fields(read) if field.key == "valid_path"]
    assert found == ["s3://b/math.jsonl", "a.jsonl", "b.jsonl"]
    assert config(valid_path="v.jsonl").valid_sets.keys() == {""}
    assert config().valid_sets == {}


def test_weighted_sources_are_uri_fields():
    sources = [{"path": "a.jsonl", "weight": 1.0}, {"path": "s3://b/c.jsonl", "weight": 2.0}]
    found = [field.uri for field in uri_fields(config(train_path=sources)) if field.key == "train_path"]
    assert found == ["a.jsonl", "s3://b/c.jsonl"]


@pytest.mark.parametrize(
    ("written", "same"),
    [
        ("models/a/", "models/a"),
        ("s3://bucket/a//", "s3://bucket/a"),
        ("file:///a/", "file:///a"),
        ("/", "/"),
    ],
)
def test_trailing_slash_of_a_model_does_not_change_the_run(written: str, same: str):
    """A run's name is derived from this value."""
    one, other = (
        FinetuneConfig.model_validate({"model_id": model, "train_path": "a.jsonl"})
        for model in (written, same)
    )
    assert one.model_id == same
    assert config_hash(one) == config_hash(other)

from pathlib import Path

import pytest

from configs.loading import ConfigError, LoadedConfig, load_config, to_yaml
from configs.schema import DeepspeedFile, MlflowLogger
from tests.support.messages import assert_names

BASE = "model_id: org/model\ntrain_path: train.jsonl\ntask: instruction_tuning\n"

# The keys of the reference cookbook, in its order.
COOKBOOK = """\
model_id: meta-llama/Meta-Llama-3-8B-Instruct
# initial_base_model_ckpt_path: ...
initial_adapter_model_ckpt_path: s3://bucket/first_half
train_path: s3://bucket/train_2.jsonl
valid_path: s3://bucket/test.jsonl
context_length: 512
num_devices: 16
num_epochs: 3
train_batch_size_per_device: 16
eval_batch_size_per_device: 16
learning_rate: 1e-4
padding: "longest"
num_checkpoints_to_keep: 1
dataset_size_scaling_factor: 10000
output_dir: /mnt/local_storage
deepspeed:
  config_path: ../../deepspeed_configs/zero_3_offload_optim+param.json
dataset_size_scaling_factor: 10000
flash_attention_2: true
trainer_resources:
  memory: 53687091200
worker_resources:
  accelerator_type:A10G: 0.001
lora_config:
  r: 8
  lora_alpha: 16
  lora_dropout: 0.05
  target_modules: [q_proj, v_proj, k_proj, o_proj, gate_proj, up_proj, down_proj, embed_tokens, lm_head]
  task_type: "CAUSAL_LM"
  modules_to_save: []
  bias: "none"
  fan_in_fan_out: false
  init_lora_weights: true
"""


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str, *overrides: str) -> LoadedConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


def without_path(lines: tuple[str, ...]) -> list[str]:
    return [line.split("run.yaml:")[-1] for line in lines]


def test_reference_cookbook_loads_unchanged_with_warnings(load):
    loaded = load(COOKBOOK)
    assert loaded.rejections == ()
    assert [line[: line.index("`", line.index("`") + 1) + 1] for line in without_path(loaded.warnings)] == [
        "1: `task`",
        "17: `deepspeed.config_path`",
        "18: `dataset_size_scaling_factor`",
        "20: `trainer_resources`",
    ]
    config = loaded.config
    assert config.deepspeed == "zero_3_offload_optim+param"
    assert config.worker_resources == {"accelerator_type:A10G": 0.001}
    assert config.trainer_resources == {"memory": 53687091200}
    assert config.output_dir == "/mnt/local_storage"
    assert "dataset_size_scaling_factor" not in loaded.given_keys


def test_current_keys_load_without_warnings(load):
    loaded = load(BASE + "output_dir: /mnt/local_storage\nworker_resources: {accelerator_type:A10G: 0.001}\n")
    assert (loaded.warnings, loaded.rejections) == ((), ())


@pytest.mark.parametrize(
    ("text", "key", "value", "replacement"),
    [
        ("no_gradient_checkpoint: true", "gradient_checkpointing", False, "`gradient_checkpointing: false`"),
        ("no_gradient_checkpoint: False", "gradient_checkpointing", True, "`gradient_checkpointing: true`"),
        ("max_num_checkpoints: 4", "num_checkpoints_to_keep", 4, "`num_checkpoints_to_keep: 4`"),
        ("liger_kernel: {enabled: true}", "kernels", "liger", "`kernels: liger`"),
        ("liger_kernel: {enabled: true, kwargs: {rope: true}}", "kernels", "liger", "`kernels: liger`"),
        ("liger_kernel: {enabled: false, kwargs: {rope: false}}", "kernels", "torch", "`kernels: torch`"),
        (
            "initial_adapter_model_ckpt_path: {uri: s3://b/a}",
            "initial_adapter_model_ckpt_path",
            "s3://b/a",
            "`uri:`",
        ),
        (
            "initial_base_model_ckpt_path: {uri: s3://b/a}",
            "initial_base_model_ckpt_path",
            "s3://b/a",
            "`uri:`",
        ),
        (
            "deepspeed: {config_path: deepspeed_configs/zero_3.json}",
            "deepspeed",
            "zero_3",
            "`deepspeed: zero_3`",
        ),
        (
            "deepspeed: {config_path: ./deepspeed_configs/zero_2.json}",
            "deepspeed",
            "zero_2",
            "`deepspeed: zero_2`",
        ),
        (
            "deepspeed: {config_path: configs/deepspeed/zero_1.json}",
            "deepspeed",
            "zero_1",
            "`deepspeed: zero_1`",
        ),
        ("generation_config: {prompt_format: , stopping_sequences: [a]}", "seed", 42, "`generation_config`"),
        ("generation_config:", "seed", 42, "`generation_config`"),
        ("num_data_blocks_per_device: 16", "seed", 42, "`num_data_blocks_per_device`"),
        ("data_processor_config: {a: 1}", "seed", 42, "`data_processor_config`"),
        ("trainer_resources: {memory: 1}", "trainer_resources", {"memory": 1}, "`trainer_resources`"),
        ("embedding_scaling_technique:", "seed", 42, "`embedding_scaling_technique`"),
        ("dataset_size_scaling_factor: 1e10", "seed", 42, "`dataset_size_scaling_factor`"),
    ],
)
def test_old_key_gives_one_warning_and_sets_the_current_key(
    load, text: str, key: str, value: object, replacement: str
):
    loaded = load(BASE + text + "\n")
    [warning] = without_path(loaded.warnings)
    assert warning.startswith("4: `")
    assert replacement in warning
    assert loaded.rejections == ()
    assert getattr(loaded.config, key) == value


def test_checkpoint_every_n_epochs_sets_the_frequency_in_epochs(load):
    loaded = load(BASE + "checkpoint_every_n_epochs: 2\n")
    frequency = loaded.config.checkpoint_and_evaluation_frequency
    assert (frequency.unit, frequency.frequency, len(loaded.warnings)) == ("epochs", 2, 1)


def test_provider_config_keys_move_up_to_logger(load):
    text = """\
logger:
  provider: mlflow
  provider_config:
    tracking_uri: https://example.com
    experiment_name: /Users/me/runs
    create_experiment_if_not_exists: True
"""
    loaded = load(BASE + text)
    assert loaded.config.logger == MlflowLogger(
        provider="mlflow", tracking_uri="https://example.com", experiment_name="/Users/me/runs"
    )
    [warning] = without_path(loaded.warnings)
    assert warning.startswith("6: `logger.provider_config`")
    assert loaded.rejections == ()


def test_unknown_logger_key_raises_an_error_with_its_line(load):
    with pytest.raises(ConfigError, match=r"run\.yaml:6: `logger\.colour`"):
        load(BASE + "logger:\n  provider: wandb\n  provider_config: {colour: red}\n")


def test_task_is_derived_from_its_section(load):
    loaded = load("model_id: a\ntrain_path: b\nclassifier_config:\n  label_tokens: ['[[1]]', '[[2]]']\n")
    assert loaded.config.task == "classification"
    [warning] = without_path(loaded.warnings)
    assert "`task: classification`" in warning


def test_old_preference_tuning_config_loads_with_warnings(load):
    text = """\
model_id: mistralai/Mistral-7B-Instruct-v0.1
train_path: s3://bucket/train.jsonl
num_data_blocks_per_device: 16
deepspeed:
  config_path: deepspeed_configs/zero_3.json
worker_resources:
  accelerator_type:A10G: 1
preference_tuning_config:
  beta: 0.01
  logprob_processor_scaling_config:
    custom_resources:
      accelerator_type:A10G: 1
    concurrency: 2
    batch_size: 2
"""
    loaded = load(text)
    assert loaded.config.task == "preference_tuning"
    assert loaded.config.preference_tuning_config is not None
    assert loaded.config.preference_tuning_config.beta == 0.01
    assert loaded.rejections == ()
    assert [line.split(":")[0] for line in without_path(loaded.warnings)] == ["3", "5", "8", "10"]


@pytest.mark.parametrize(
    ("text", "key", "fact"),
    [
        ("generation_config: {prompt_format: {user: '{instruction}'}}", "prompt_format", "`system`"),
        (
            "liger_kernel: {enabled: true, kwargs: {rope: false}}",
            "liger_kernel.kwargs.rope",
            "`kernels: liger`",
        ),
        (
            "liger_kernel: {enabled: true, kwargs: {warp: true}}",
            "liger_kernel.kwargs.warp",
            "`kernels: liger`",
        ),
        ("embedding_scaling_technique: linear", "embedding_scaling_technique", "embeddings"),
        ("vision_language_config: {}", "vision_language_config", "text"),
        (
            "logger: {provider: mlflow, provider_config: {create_experiment_if_not_exists: false}}",
            "create_experiment_if_not_exists",
            "false",
        ),
    ],
)
def test_old_settings_without_an_equivalent_are_rejected(load, text: str, key: str, fact: str):
    loaded = load(BASE + text + "\n")
    [error] = without_path(loaded.rejections)
    assert error.startswith("4: `")
    assert_names(error, key, fact)
    assert len(loaded.warnings) == 1


PROMPT_FORMAT = """\
generation_config:
  prompt_format:
    system: "{instruction} + "
    user: "[INST] {system}{instruction} [/INST]"
    assistant: "{instruction}</s> "
    trailing_assistant: ""
    system_in_user: true
"""


def test_prompt_format_becomes_a_chat_template(load, tmp_path: Path):
    loaded = load(BASE + PROMPT_FORMAT)
    [warning] = without_path(loaded.warnings)
    assert warning.startswith("4: `generation_config`")
    assert_names(warning, "`chat_template`", "--print-config")
    assert loaded.rejections == ()
    template = loaded.config.chat_template
    assert template is not None
    assert '{{ "[INST] " }}' in template
    assert load(to_yaml(loaded.config)).config == loaded.config
    assert load(BASE + PROMPT_FORMAT, "chat_template=mine.jinja").config.chat_template == "mine.jinja"
    with_stop = load(BASE + PROMPT_FORMAT + "  stopping_sequences: ['</s>']\n")
    assert with_stop.config.chat_template == template
    assert any("`generation_config.stopping_sequences`" in line for line in with_stop.warnings)
    with pytest.raises(ConfigError, match=r"`chat_template`.*`generation_config`"):
        load(BASE + PROMPT_FORMAT + "chat_template: mine.jinja\n")


@pytest.mark.parametrize(
    ("metrics", "rejected"), [("[accuracy, f1]", False), ("accuracy", False), ("[accuracy, prauc]", True)]
)
def test_only_accuracy_and_f1_are_accepted_as_eval_metrics(load, metrics: str, rejected: bool):
    text = "model_id: a\ntrain_path: b\ntask: classification\n"
    loaded = load(text + f"classifier_config:\n  label_tokens: [a, b]\n  eval_metrics: {metrics}\n")
    assert any("`classifier_config.eval_metrics`" in warning for warning in loaded.warnings)
    errors = without_path(loaded.rejections)
    assert bool(errors) == rejected
    if rejected:
        assert errors[0].startswith("6: `classifier_config.eval_metrics`")
        assert "'prauc'" in errors[0]


@pytest.mark.parametrize(
    "text",
    [
        "no_gradient_checkpoint: maybe",
        "max_num_checkpoints: many",
        "max_num_checkpoints: true",
        "checkpoint_every_n_epochs: 1.5",
        "liger_kernel: true",
        "liger_kernel: {enabled: 1}",
        "liger_kernel: {on: true}",
        "generation_config: [a]",
        "generation_config: {format: a}",
        "initial_adapter_model_ckpt_path: {uri: 3}",
        "initial_adapter_model_ckpt_path: {uri: a, region: b}",
        "logger: {provider: wandb, provider_config: 3}",
        "logger: {provider: wandb, project: a, provider_config: {project: b}}",
        "preference_tuning_config: {gamma: 1}",
        "max_num_checkpoints: 0",
        "max_num_checkpoints: 3\nnum_checkpoints_to_keep: 2",
    ],
)
def test_old_key_with_an_invalid_value_raises_an_error_with_its_line(load, text: str):
    with pytest.raises(ConfigError, match=r"run.yaml:[45]: `"):
        load(BASE + text + "\n")


def test_duplicate_old_key_raises_an_error(load):
    with pytest.raises(ConfigError, match="twice"):
        load(BASE + "max_num_checkpoints: 1\nmax_num_checkpoints: 1\n")


def test_overrides_of_old_keys_replace_current_keys_and_vice_versa(load):
    loaded = load(BASE + "liger_kernel: {enabled: true}\n", "liger_kernel.enabled=false")
    assert loaded.config.kernels == "torch"
    loaded = load(BASE + "kernels: liger\n", "liger_kernel={enabled: false}")
    assert loaded.config.kernels == "torch"
    assert loaded.warnings[0].startswith("override 'liger_kernel={enabled: false}': `liger_kernel`")
    loaded = load(BASE + "liger_kernel: {enabled: false}\n", "kernels=liger")
    assert loaded.config.kernels == "liger"


def test_custom_deepspeed_file_is_retained_without_a_warning(load):
    loaded = load(BASE + "deepspeed: {config_path: mine/zero_3.json}\n")
    assert loaded.config.deepspeed == DeepspeedFile(config_path="mine/zero_3.json")
    assert loaded.warnings == ()

"""The service YAML and the training configuration of jobs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.loading import ConfigError, load_config
from configs.schema import DeepspeedFile, FinetuneConfig
from service.config import BaseModelSettings, load_service
from service.job_config import JobConfigError, check_settings, resolve_hyperparameters, training_config
from service.vllm_engine import vllm_python
from tests.support.jobs import PROJECT
from tests.support.service import write_service
from tests.support.tiny_model import CHAT_TEMPLATE

PATHS = {"train": "s3://b/train.jsonl", "valid": None, "storage": "s3://b/runs", "publish": None}


def base_config(**keys: Any) -> FinetuneConfig:
    settings = {"model_id": "org/model", "train_path": "x.jsonl", "lora_config": {"r": 4}, **keys}
    return FinetuneConfig.model_validate(settings)


def job(**changes: Any) -> dict[str, Any]:
    hyperparameters = {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 0.5, "beta": 0.2}
    record = {"id": "ftjob-1", "seed": 5, "method": "supervised", "hyperparameters": hyperparameters}
    return record | {"parent_checkpoint": None, "integrations": None} | changes


def test_service_yaml_has_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    service = load_service(write_service(tmp_path, "s3://bucket/service", "weights/x/y"), port=9)
    assert service.config.port == 9
    assert service.config.models["tiny"].config == str(tmp_path / "base.yaml")
    assert service.bases["tiny"].config.model_id == str(tmp_path / "weights/x/y")


def test_local_paths_of_the_base_are_valid_in_every_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    template = CHAT_TEMPLATE + "{# a comment #}"
    (tmp_path / "chat.jinja").write_text(template)
    base = {
        "chat_template": "chat.jinja",
        "deepspeed": {"config_path": "zero.json"},
        "initial_base_model_ckpt_path": "weights/base/1",
        "initial_adapter_model_ckpt_path": "weights/adapter/1",
        "lora_config": None,
    }
    monkeypatch.chdir(tmp_path)
    path = write_service(tmp_path, "s3://bucket/service", base=base)
    config = load_service(path).bases["tiny"].config
    assert config.chat_template == template
    assert config.deepspeed == DeepspeedFile(config_path=str(tmp_path / "zero.json"))
    assert config.initial_base_model_ckpt_path == str(tmp_path / "weights/base/1")
    assert config.initial_adapter_model_ckpt_path == str(tmp_path / "weights/adapter/1")
    (tmp_path / "chat.jinja").unlink()
    with pytest.raises(ConfigError, match=r"service\.yaml:.*models\.tiny\.config.*chat\.jinja"):
        load_service(path)


@pytest.mark.parametrize("uri", ["run:first", "org/adapter", "s3://bucket/adapter"])
def test_remote_models_of_the_base_are_unchanged(tmp_path: Path, uri: str):
    base = {"initial_adapter_model_ckpt_path": uri, "lora_config": None}
    loaded = load_service(write_service(tmp_path, "s3://bucket/service", base=base))
    assert loaded.bases["tiny"].config.initial_adapter_model_ckpt_path == uri


@pytest.mark.parametrize("key", ["load_in_4bit", "trust_remote_code"])
def test_setting_that_vllm_ignores_is_an_error(tmp_path: Path, key: str):
    models = {"tiny": {"config": "base.yaml", "engine": "vllm"}}
    path = write_service(tmp_path, "s3://bucket/service", base={key: True}, models=models)
    with pytest.raises(
        ConfigError, match=rf"service\.yaml:\d+: `models\.tiny\.engine`.*`{key}: true`.*base\.yaml"
    ):
        load_service(path)
    write_service(tmp_path, "s3://bucket/service", models=models)
    assert load_service(path).config.models["tiny"].engine == "vllm"


@pytest.mark.parametrize("is_packaged", [True, False])
def test_missing_python_of_vllm_names_a_fix_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_packaged: bool
):
    monkeypatch.setenv("ANNEAL_VLLM_PYTHON", str(tmp_path / "python"))
    if is_packaged:
        monkeypatch.setattr("service.vllm_engine._PROJECT", tmp_path)
    with pytest.raises(ConfigError, match=r"python does not exist.*et ANNEAL_VLLM_PYTHON") as raised:
        vllm_python()
    assert ("make setup-vllm" in str(raised.value)) is not is_packaged


@pytest.mark.parametrize(
    ("changes", "place", "key"),
    [
        ({"storage_path": "/local"}, ":", "storage_path"),
        ({"models": {}}, ":", "models"),
        ({"models": {"a:b": {"config": "base.yaml"}}}, ":", "models"),
        ({"models": {"a": {"config": "none.yaml"}}}, ":", "models.a.config"),
        ({"models": {"a": {"config": "base.yaml", "engine": "x"}}}, ":", "models.a.engine"),
        ({"unknown": 1}, ":", "unknown"),
        ({"limits": {"jobs": 0}}, ":", "limits.jobs"),
        ({"port": 70000}, ":", "port"),
    ],
)
def test_wrong_service_yaml_names_file_line_and_key(
    tmp_path: Path, changes: dict[str, Any], place: str, key: str
):
    path = write_service(tmp_path, "s3://bucket/service")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))
    with pytest.raises(ConfigError) as raised:
        load_service(path)
    message = str(raised.value)
    assert message.startswith(f"{path}{place}")
    assert key in message


@pytest.mark.parametrize(
    ("base", "fix"),
    [
        ({"task": "causal_lm"}, "instruction_tuning"),
        ({"num_devices": 2, "sequence_parallel_size": 2}, "remove `sequence_parallel_size`"),
    ],
)
def test_base_model_must_train_every_kind_of_job(base: dict[str, Any], fix: str, tmp_path: Path):
    path = write_service(tmp_path, "s3://bucket/service", base=base)
    with pytest.raises(ConfigError, match=fix):
        load_service(path)


@pytest.mark.parametrize(
    ("base", "batch_size", "devices", "per_device", "accumulation"),
    [
        ({"num_devices": 2, "train_batch_size_per_device": 4}, 8, 2, 4, 1),
        ({"num_devices": 2, "train_batch_size_per_device": 4}, 1, 1, 1, 1),
        ({"num_devices": 2, "train_batch_size_per_device": 4}, 24, 2, 4, 3),
        ({"num_devices": 4, "train_batch_size_per_device": 4}, 6, 3, 2, 1),
        ({"train_batch_size_per_device": 2, "gradient_accumulation_steps": 4}, 8, 1, 2, 4),
    ],
)
def test_batch_size_is_shared_by_the_devices(
    base: dict[str, Any], batch_size: int, devices: int, per_device: int, accumulation: int
):
    record = job(hyperparameters={"n_epochs": 1, "batch_size": batch_size, "learning_rate_multiplier": 1.0})
    config = training_config(record, base_config(**base), PATHS)
    assert (config.most_devices, config.batch_size, config.gradient_accumulation_steps) == (
        devices,
        per_device,
        accumulation,
    )


def test_automatic_batch_size_of_the_base_stays_automatic():
    base = base_config(train_batch_size_per_device="auto", train_batch_size=16, num_devices=4)
    config = training_config(job(), base, PATHS)
    assert (config.train_batch_size_per_device, config.train_batch_size, config.most_devices) == (
        "auto",
        8,
        4,
    )


def test_job_replaces_the_data_length_and_learning_rate_of_the_base():
    base = base_config(
        learning_rate=1e-3, valid_path="v.jsonl", max_steps=7, bad_rows="skip", num_checkpoints_to_keep=1
    )
    config = training_config(job(), base, PATHS)
    assert (config.train_path, config.valid_path, config.run_name) == ("s3://b/train.jsonl", None, "ftjob-1")
    assert (config.num_epochs, config.max_steps, config.learning_rate, config.seed) == (2.0, None, 5e-4, 5)
    assert (config.bad_rows, config.data_format, config.num_checkpoints_to_keep) == ("error", "messages", 3)


def test_published_job_exports_its_adapter(tmp_path: Path):
    config = training_config(job(), base_config(), PATHS | {"publish": "s3://b/loras/ftjob-1"})
    assert config.export
    assert (config.export.merge, config.export.to) == (False, "s3://b/loras/ftjob-1")
    path = write_service(tmp_path, "s3://b/service", base={"lora_config": None}, publish_path="s3://b/loras")
    with pytest.raises(ConfigError, match=r"publish_path.*lora_config"):
        load_service(path)


def test_dpo_job_trains_preferences():
    config = training_config(job(method="dpo"), base_config(), PATHS)
    assert (config.task, config.data_format) == ("preference_tuning", "preference")
    assert config.preference_tuning_config
    assert config.preference_tuning_config.beta == 0.2


def test_job_continues_a_fine_tuned_model():
    config = training_config(
        job(parent_checkpoint="s3://b/runs/a/checkpoints/step-000004"), base_config(), PATHS
    )
    assert config.initial_adapter_model_ckpt_path == "s3://b/runs/a/checkpoints/step-000004"
    assert config.lora_config is None


def test_auto_is_resolved_from_service_and_base(tmp_path: Path):
    settings = BaseModelSettings.model_validate({"config": "x", "hyperparameters": {"dpo": {"n_epochs": 1}}})
    base = base_config(num_epochs=2.5, train_batch_size_per_device=3, num_devices=2)
    assert resolve_hyperparameters("supervised", {"n_epochs": "auto"}, settings, base) == {
        "n_epochs": 3,
        "batch_size": 6,
        "learning_rate_multiplier": 1.0,
    }
    assert resolve_hyperparameters("dpo", {"batch_size": 2}, settings, base) == {
        "n_epochs": 1,
        "batch_size": 2,
        "learning_rate_multiplier": 1.0,
        "beta": 0.1,
    }


def test_quickstart_service_trains_the_quickstart_model():
    service = load_service(Path("cookbooks/fine_tuning_service/service.yaml"))
    quickstart = load_config(Path("cookbooks/quickstart/smollm2-135m.yaml")).config
    assert service.bases["smollm2-135m"].config.model_id == quickstart.model_id


@pytest.mark.parametrize("method", ["supervised", "dpo"])
@pytest.mark.parametrize("valid", [None, "s3://b/valid.jsonl"])
def test_keys_of_the_base_that_a_job_cannot_have_do_not_reach_it(method: str, valid: str | None):
    """Early stopping requires validation rows, packing is not for preferences, and columns and named sets are those of other rows."""
    base = base_config(
        valid_path={"a": "a.jsonl", "b": "b.jsonl"},
        early_stopping_patience=2,
        early_stopping_threshold=0.1,
        packing=True,
        context_length=64,
        ignore_columns=["source"],
    )
    config = training_config(job(method=method), base, PATHS | {"valid": valid})
    assert config.valid_path == valid
    assert config.early_stopping_patience == (2 if valid else None)
    assert config.early_stopping_threshold == (0.1 if valid else 0)
    assert config.packing == (method == "supervised")
    assert config.ignore_columns == []


@pytest.mark.parametrize("valid", [None, "s3://b/valid.jsonl"])
@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_cookbooks_are_bases_of_every_kind_of_job(method: str, valid: str | None):
    """A combination of keys that is rejected would end the scheduler."""
    bases = [
        load_config(path).config for path in sorted((PROJECT / "cookbooks").rglob("*.yaml")) if _trains(path)
    ]
    assert len(bases) > 10
    for base in bases:
        training_config(job(method=method), base, PATHS | {"valid": valid})


def _trains(path: Path) -> bool:
    keys = yaml.safe_load(path.read_text())
    trains_chats = keys.get("task", "instruction_tuning") == "instruction_tuning"
    return "train_path" in keys and trains_chats and "sequence_parallel_size" not in keys


def test_job_does_not_inherit_the_push_or_samples_of_its_base():
    base = base_config(
        push_to_hub=True,
        hub_model_id="org/repository",
        hub_private_repo=True,
        valid_split=0.1,
        eval_samples=2,
        eval_max_new_tokens=9,
    )
    config = training_config(job(), base, PATHS)
    assert (config.push_to_hub, config.hub_model_id, config.hub_private_repo) == (False, None, None)
    assert (config.eval_samples, config.eval_max_new_tokens) == (None, 128)


def test_job_with_an_invalid_setting_raises_one_error():
    hyperparameters = job()["hyperparameters"] | {"learning_rate_multiplier": 5e-324}
    record = job(hyperparameters=hyperparameters, validation_file=None)
    with pytest.raises(JobConfigError, match="learning_rate"):
        training_config(record, base_config(), PATHS)
    with pytest.raises(JobConfigError, match="learning_rate"):
        check_settings(record, base_config())


@pytest.mark.parametrize("method", ["supervised", "dpo"])
@pytest.mark.parametrize("valid", [None, "s3://b/valid.jsonl"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"early_stopping_patience": 2, "valid_path": "v.jsonl"},
        {"kernels": "unsloth"},
        {"packing": True, "context_length": 64},
        {"lora_config": None},
        {"valid_split": 0.1},
    ],
)
def test_settings_are_accepted_exactly_if_the_job_has_a_configuration(
    keys: dict[str, Any], valid: str | None, method: str
):
    base = base_config(**keys)
    record = job(method=method, validation_file="file-1" if valid else None)
    try:
        training_config(record, base, PATHS | {"valid": valid})
    except JobConfigError as error:
        with pytest.raises(JobConfigError) as raised:
            check_settings(record, base)
        assert str(raised.value) == str(error)
    else:
        check_settings(record, base)

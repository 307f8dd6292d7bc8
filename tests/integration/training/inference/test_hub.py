"""Pushes to a Hub on this machine: what is in the repository, what can be trained from it, and errors."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api
from transformers import AutoTokenizer

from configs.loading import ConfigError
from configs.schema import ExportConfig
from runs.layout import Export
from tests.support.adapters import meta_model
from tests.support.hub import TOKEN, Hub, running_hub
from tests.support.messages import assert_names
from tests.support.trained_runs import store_adapter_run, store_full_run
from training.checkpoints.weights import fetch_model
from training.inference.checkpoint_model import trained_model
from training.inference.export import export, push
from training.models.adapter import continued_adapter
from training.models.files import ModelError, is_model_file, read_adapter_facts, read_hub_facts
from training.models.hub import check_hub_access
from utils.storage.bucket import open_store

pytestmark = pytest.mark.slow

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
REPOSITORY = "ann/tuned"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Run a Hub that this process uses, with the token."""
    with running_hub() as running:
        # huggingface_hub has read these from the environment.
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        files = f"{running.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(hf_api.api, "endpoint", running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def pushed(run: str, settings: ExportConfig, private: bool | None = None) -> Export:
    with trained_model(run) as trained:
        exported = export(trained, settings, progress=lambda _: None)
        url = push(exported, trained.cache, REPOSITORY, private=private)
    assert url == f"{constants.ENDPOINT}/{REPOSITORY}"
    return exported


@pytest.mark.parametrize("in_bucket", [False, True])
def test_repository_has_the_files_of_the_export(
    in_bucket: bool, hub: Hub, tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    storage = request.getfixturevalue("bucket_uri") if in_bucket else str(tmp_path / "runs")
    run = store_adapter_run(
        open_store(storage), "tuned", tiny_model, LORA, output_dir=str(tmp_path / "scratch")
    )
    exported = pushed(run, ExportConfig(merge=False, verify=False), private=True)
    stored = hub.repositories[f"models/{REPOSITORY}"]
    assert stored.files.keys() == {file.path for file in exported.files}
    files = open_store(exported.uri)
    assert all(files.read(name) == content for name, content in stored.files.items())
    assert stored.is_private
    assert stored.commits == ["Upload the adapter of tuned"]
    assert hub.blobs.keys(), "weights are sent as large files"

    pushed(run, ExportConfig(merge=False, verify=False))
    assert len(stored.commits) == 1, "a second push sends nothing"


def test_adapter_is_read_from_the_hub(hub: Hub, tiny_model: Path, tmp_path: Path):
    run = store_adapter_run(
        open_store(str(tmp_path / "runs")), "tuned", tiny_model, LORA, output_dir=str(tmp_path / "scratch")
    )
    pushed(run, ExportConfig(merge=False, verify=False))
    adapter = read_adapter_facts(REPOSITORY)
    assert (adapter.source, adapter.has_tokenizer) == (REPOSITORY, True)
    _, wrong = continued_adapter(meta_model(tiny_model), adapter)
    assert wrong is None
    directory = fetch_model(REPOSITORY, tmp_path / "cache", is_model_file)
    checkpoint = Path(run) / "checkpoints" / "step-000010"
    name = "adapter_model.safetensors"
    assert (directory / name).read_bytes() == (checkpoint / name).read_bytes()


def test_model_is_read_from_the_hub(hub: Hub, tiny_model: Path, tmp_path: Path):
    run = store_full_run(
        open_store(str(tmp_path / "runs")), "tuned", tiny_model, output_dir=str(tmp_path / "scratch")
    )
    pushed(run, ExportConfig(verify=False))
    facts = read_hub_facts(REPOSITORY)
    assert facts.architecture == "LlamaForCausalLM"
    assert facts.parameter_shapes["lm_head.weight"] == (512, 64)
    directory = fetch_model(REPOSITORY, tmp_path / "cache", is_model_file)
    assert len(AutoTokenizer.from_pretrained(directory)) == 512
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 512


@pytest.mark.parametrize("route", ["/repos/create", "/preupload/", "/lfs/", "/commit/"])
def test_failed_push_names_repository_and_token(route: str, hub: Hub, tiny_model: Path, tmp_path: Path):
    run = store_adapter_run(
        open_store(str(tmp_path / "runs")), "tuned", tiny_model, LORA, output_dir=str(tmp_path / "scratch")
    )
    hub.broken = route
    with pytest.raises(ModelError) as caught:
        pushed(run, ExportConfig(merge=False, verify=False))
    assert_names(str(caught.value), REPOSITORY, hub.endpoint, "broken", "HF_TOKEN")
    assert TOKEN not in str(caught.value)
    hub.broken = None
    pushed(run, ExportConfig(merge=False, verify=False))
    assert hub.repositories[f"models/{REPOSITORY}"].files


def test_token_is_checked_before_training(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    check_hub_access("push_to_hub")

    def message() -> str:
        with pytest.raises(ConfigError) as caught:
            check_hub_access("push_to_hub")
        assert str(caught.value).startswith("push_to_hub: ")
        return str(caught.value)

    wrong = f"hf_{'w' * 34}"
    monkeypatch.setenv("HF_TOKEN", wrong)
    assert_names(message(), hub.endpoint, "does not accept", "write access")
    assert wrong not in message()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_names(message(), "http://127.0.0.1:9", "HF_ENDPOINT")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_names(message(), "HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    assert_names(message(), "HF_TOKEN", "write access")

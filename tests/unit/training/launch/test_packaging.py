"""Packages for a cluster: the code, the YAML and local files up to a size limit, and nothing else."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.loading import ConfigError, load_config
from tests.support.jobs import PROJECT, write_yaml
from tests.support.own_buckets import set_up_own_bucket
from training.launch import packaging
from training.launch.packaging import CODE, Package, pack
from utils.storage.bucket import NotFoundError, open_store
from utils.storage.embedded_bucket import EmbeddedBucket


@pytest.fixture
def local_files(tmp_path: Path) -> Path:
    """Write local files of data and a model, and return their directory."""
    for name in (
        "day-1/train.jsonl",
        "day-2/train.jsonl",
        "valid.jsonl",
        "model/config.json",
        "model/sub/x.json",
    ):
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "local"


@pytest.fixture
def pack_run(tmp_path: Path, local_files: Path):
    """Return a function that packs a run with the given settings."""

    def run(**settings: Any) -> Package:
        defaults = {
            "model_id": "org/name",
            "train_path": "s3://bucket/train.jsonl",
            "storage_path": "s3://bucket/runs",
        }
        yaml = write_yaml(tmp_path / "config.yaml", defaults | settings)
        (tmp_path / "packed").mkdir()
        return pack(load_config(yaml), tmp_path / "packed")

    return run


def contents(package: Package) -> dict[str, str]:
    """Return the packed local files: path to content."""
    files = package.directory / "files"
    return {str(path.relative_to(files)): path.read_text() for path in files.rglob("*") if path.is_file()}


def test_package_contains_only_the_code_and_the_yaml(pack_run):
    directory = pack_run().directory
    assert {path.name for path in directory.iterdir()} == {*CODE, "config.yaml", "as_written"}
    code = {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
    assert not [path for path in code if "__pycache__" in path.parts or path.name.startswith(".")]
    assert {path.relative_to(PROJECT) for path in (PROJECT / "training").rglob("*.py")} <= code
    templates = {path.relative_to(PROJECT) for name in CODE for path in (PROJECT / name).rglob("*.html.j2")}
    assert len(templates) >= 3
    assert templates <= code, "the cluster renders pages"


def test_packed_code_starts_without_the_project(pack_run):
    """A job's entrypoint is main.py in the package's directory, which imports every package."""
    directory = pack_run().directory
    done = subprocess.run(
        [sys.executable, "main.py", "config.yaml", "--print-config"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "model_id" in done.stdout


def test_packed_yaml_loads_as_the_checked_config(pack_run):
    package = pack_run(learning_rate="5e-4", lora_config={"r": 16})
    assert load_config(package.directory / package.yaml).config == package.loaded.config
    assert package.loaded.written == {}


def test_local_files_are_packed_and_the_yaml_has_their_packed_paths(pack_run, local_files: Path):
    package = pack_run(
        model_id=str(local_files / "model"),
        train_path=[
            {"path": str(local_files / "day-*/*.jsonl")},
            {"path": str(local_files / "day-1")},
            {"path": "s3://bucket/x"},
        ],
        valid_path=str(local_files / "valid.jsonl"),
    )
    config = package.loaded.config
    assert config.model_id == "files/model_id"
    assert [source.path for source in config.train_sources] == [
        "files/train_path/0",
        "files/train_path/1",
        "s3://bucket/x",
    ]
    assert config.valid_path == "files/valid_path/valid.jsonl"
    assert package.loaded.written["model_id"] == str(local_files / "model")
    assert package.loaded.written.keys() == {"model_id", "train_path", "valid_path"}
    assert load_config(package.directory / package.written).config.valid_path == str(
        local_files / "valid.jsonl"
    )
    assert contents(package) == {
        "model_id/config.json": "model/config.json",
        "model_id/sub/x.json": "model/sub/x.json",
        "train_path/0/day-1/train.jsonl": "day-1/train.jsonl",
        "train_path/0/day-2/train.jsonl": "day-2/train.jsonl",
        "train_path/1/train.jsonl": "day-1/train.jsonl",
        "valid_path/valid.jsonl": "valid.jsonl",
    }
    assert package.on_the_cluster == ()


def test_templates_and_deepspeed_files_are_packed(pack_run, local_files: Path):
    (local_files / "chat.jinja").write_text("{{ messages }}")
    (local_files / "zero.json").write_text("{}")
    package = pack_run(
        chat_template=str(local_files / "chat.jinja"),
        deepspeed={"config_path": str(local_files / "zero.json")},
    )
    assert package.loaded.config.chat_template == "files/chat_template/chat.jinja"
    assert contents(package) == {"chat_template/chat.jinja": "{{ messages }}", "deepspeed/zero.json": "{}"}


def test_paths_on_the_cluster_are_listed_and_unchanged(pack_run):
    package = pack_run(train_path="file:///mnt/rows.jsonl", storage_path="/mnt/shared/runs")
    assert package.loaded.config.train_path == "file:///mnt/rows.jsonl"
    assert package.on_the_cluster == ("train_path", "storage_path")


def test_local_files_above_the_size_limit_raise_an_error(
    pack_run, local_files: Path, monkeypatch: pytest.MonkeyPatch
):
    (local_files / "large.jsonl").write_bytes(b"x" * 2000)
    monkeypatch.setattr(packaging, "MAX_PACKED_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"\b1000 B\b.*/large\.jsonl.*bucket"):
        pack_run(train_path=str(local_files / "large.jsonl"))


def test_missing_file_raises_an_error_with_its_key_and_path(pack_run, local_files: Path):
    with pytest.raises(NotFoundError, match=r"^train_path: .*none\.jsonl"):
        pack_run(train_path=str(local_files / "none.jsonl"))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"storage_path": None}, "storage_path"),
        ({"model_id": "s3://anneal/model"}, "model_id"),
        ({"valid_path": ["s3://anneal/x.jsonl"]}, "valid_path"),
    ],
)
def test_uri_in_the_embedded_bucket_raises_an_error_with_its_key(pack_run, changes: dict[str, Any], key: str):
    with pytest.raises(ConfigError, match=rf"^{key}: .*embedded bucket.*this machine"):
        pack_run(**changes)


@pytest.mark.parametrize(
    ("settings", "results"),
    [
        ({"run_name": "a", "storage_path": "file:///mnt/runs/"}, "/mnt/runs/a"),
        ({"run_name": "a"}, "s3://bucket/runs/a"),
        ({}, "s3://bucket/runs (the job's output has the name of the run)"),
    ],
)
def test_results_go_to_the_storage_path_under_the_name_if_it_is_known(
    pack_run, settings: dict[str, Any], results: str
):
    assert pack_run(**settings).results == results


def test_relative_storage_path_raises_an_error(pack_run):
    with pytest.raises(ConfigError, match=r"^storage_path: runs .*cluster"):
        pack_run(storage_path="runs")


def test_base_model_of_an_adapter_is_uploaded_to_the_storage_path(
    pack_run, local_files: Path, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch
):
    """The job's directory is deleted after the job, but chat and export need the base model."""
    storage = f"{set_up_own_bucket(monkeypatch, bucket, 'packed')}/runs"
    package = pack_run(
        model_id=f"{local_files / 'model'}/", storage_path=storage, lora_config={"r": 4}, learning_rate=1e-3
    )
    uri = package.loaded.config.model_id
    assert uri.startswith(f"{storage}/models/model-")
    assert open_store(uri).read("config.json") == b"model/config.json"
    assert contents(package) == {}
    written = yaml.safe_load((package.directory / package.yaml).read_text())
    assert set(written) == {"model_id", "train_path", "storage_path", "lora_config", "learning_rate"}, (
        "a key that the user did not write would be warned about in the job"
    )


def test_base_model_of_an_adapter_must_exist_after_the_job(pack_run, local_files: Path):
    with pytest.raises(ConfigError, match=r"^model_id: .*after the job.*file:///"):
        pack_run(model_id=str(local_files / "model"), storage_path="/mnt/shared", lora_config={"r": 4})


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_base_model_with_code_of_its_own_is_rejected_for_an_adapter(pack_run, local_files: Path, file: str):
    model = local_files / "model"
    (model / "modeling_own.py").write_text("")
    (model / "config.json").write_text("{}")
    (model / file).write_text('{"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}')
    settings = {"model_id": str(model), "trust_remote_code": True}
    with pytest.raises(ConfigError, match=r"^model_id: .*modeling_own\.py.*file:///absolute/path"):
        pack_run(**settings, lora_config={"r": 4}, learning_rate=1e-3)
    (model.parent.parent / "packed").rmdir()
    assert "model_id/modeling_own.py" in contents(pack_run(**settings, learning_rate=1e-3))


@pytest.mark.parametrize("config", ["{}", None])
def test_base_model_with_code_that_its_config_does_not_name_is_uploaded_for_an_adapter(
    pack_run, local_files: Path, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch, config: str | None
):
    storage = f"{set_up_own_bucket(monkeypatch, bucket, 'served')}/runs"
    model = local_files / "model"
    (model / "handler.py").write_text("")
    if config is None:
        (model / "config.json").unlink()
        (model / "generation_config.json").write_text("{}")
    else:
        (model / "config.json").write_text(config)
    package = pack_run(
        model_id=str(model),
        trust_remote_code=True,
        storage_path=storage,
        lora_config={"r": 4},
        learning_rate=1e-3,
    )
    names = {item.key for item in open_store(package.loaded.config.model_id).list()}
    assert names and "handler.py" not in names

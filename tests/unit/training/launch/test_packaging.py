"""What travels to a cluster with a job: the code, the YAML, local files of a bearable size, and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from configs.loading import ConfigError, load_config
from tests.support.jobs import PROJECT, write_yaml
from training.launch import packaging as travel
from training.launch.packaging import CODE, Package, pack
from utils.storage.bucket import NotFoundError


@pytest.fixture
def rows(tmp_path: Path) -> Path:
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
def packed(tmp_path: Path, rows: Path):
    def run(**settings: Any) -> Package:
        plain = {
            "model_id": "org/name",
            "train_path": "s3://bucket/train.jsonl",
            "storage_path": "s3://bucket/runs",
        }
        yaml = write_yaml(tmp_path / "config.yaml", plain | settings)
        (tmp_path / "packed").mkdir()
        return pack(load_config(yaml), tmp_path / "packed")

    return run


def contents(packed: Package) -> dict[str, str]:
    below = packed.directory / "files"
    return {str(path.relative_to(below)): path.read_text() for path in below.rglob("*") if path.is_file()}


def test_the_code_and_the_yaml_and_nothing_else(packed):
    directory = packed().directory
    assert {path.name for path in directory.iterdir()} == {*CODE, "config.yaml"}
    code = {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
    assert not [path for path in code if "__pycache__" in path.parts or path.name.startswith(".")]
    assert {path.relative_to(PROJECT) for path in (PROJECT / "training").rglob("*.py")} <= code
    templates = {path.relative_to(PROJECT) for name in CODE for path in (PROJECT / name).rglob("*.html.j2")}
    assert len(templates) >= 3
    assert templates <= code, "pages are rendered on the cluster"


def test_the_yaml_reads_back_as_what_was_checked(packed):
    job = packed(learning_rate="5e-4", lora_config={"r": 16})
    assert load_config(job.directory / job.yaml).config == job.loaded.config


def test_local_files_go_along_and_are_named_by_where_they_lie(packed, rows: Path):
    job = packed(
        model_id=str(rows / "model"),
        train_path=[
            {"path": str(rows / "day-*/*.jsonl")},
            {"path": str(rows / "day-1")},
            {"path": "s3://bucket/x"},
        ],
        valid_path=str(rows / "valid.jsonl"),
    )
    config = job.loaded.config
    assert config.model_id == "files/model_id"
    assert [source.path for source in config.train_sources] == [
        "files/train_path/0",
        "files/train_path/1",
        "s3://bucket/x",
    ]
    assert config.valid_path == "files/valid_path/valid.jsonl"
    assert contents(job) == {
        "model_id/config.json": "model/config.json",
        "model_id/sub/x.json": "model/sub/x.json",
        "train_path/0/day-1/train.jsonl": "day-1/train.jsonl",
        "train_path/0/day-2/train.jsonl": "day-2/train.jsonl",
        "train_path/1/train.jsonl": "day-1/train.jsonl",
        "valid_path/valid.jsonl": "valid.jsonl",
    }
    assert job.on_the_cluster == ()


def test_templates_and_deepspeed_files_go_along(packed, rows: Path):
    (rows / "chat.jinja").write_text("{{ messages }}")
    (rows / "zero.json").write_text("{}")
    job = packed(chat_template=str(rows / "chat.jinja"), deepspeed={"config_path": str(rows / "zero.json")})
    assert job.loaded.config.chat_template == "files/chat_template/chat.jinja"
    assert contents(job) == {"chat_template/chat.jinja": "{{ messages }}", "deepspeed/zero.json": "{}"}


def test_the_clusters_own_paths_stay(packed):
    job = packed(train_path="file:///mnt/rows.jsonl", storage_path="/mnt/shared/runs")
    assert job.loaded.config.train_path == "file:///mnt/rows.jsonl"
    assert job.on_the_cluster == ("train_path", "storage_path")


def test_too_much_to_travel(packed, rows: Path, monkeypatch: pytest.MonkeyPatch):
    (rows / "large.jsonl").write_bytes(b"x" * 2000)
    monkeypatch.setattr(travel, "MAX_PACKED_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"\b1000 B\b.*/large\.jsonl.*bucket"):
        packed(train_path=str(rows / "large.jsonl"))


def test_a_file_that_is_not_there(packed, rows: Path):
    with pytest.raises(NotFoundError, match=r"^train_path: .*none\.jsonl"):
        packed(train_path=str(rows / "none.jsonl"))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"storage_path": None}, "storage_path"),
        ({"model_id": "s3://anneal/model"}, "model_id"),
        ({"valid_path": ["s3://anneal/x.jsonl"]}, "valid_path"),
    ],
)
def test_the_embedded_bucket_serves_one_machine(packed, changes: dict[str, Any], key: str):
    with pytest.raises(ConfigError, match=rf"^{key}: .*embedded bucket.*this machine"):
        packed(**changes)


def test_a_relative_storage_path_is_another_place_there(packed):
    with pytest.raises(ConfigError, match=r"^storage_path: runs .*cluster"):
        packed(storage_path="runs")

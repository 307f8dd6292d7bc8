"""The JSON schema for editors covers the current keys and agrees with the loader."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from configs.json_schema import (
    KEYS_FILE,
    OTHER_KEYS_FILE,
    SCHEMA_FILE,
    json_schema,
    keys_page,
    other_keys_page,
)
from configs.loading import load_config
from configs.schema import FinetuneConfig
from configs.yaml_source import Origin, parse_yaml

ROOT = Path(__file__).resolve().parents[3]
SERVICES = {*(ROOT / "cookbooks" / "fine_tuning_service").glob("*.yaml")}
COOKBOOKS = sorted({*(ROOT / "cookbooks").rglob("*.yaml")} - SERVICES)
BASE = "model_id: a/b\ntrain_path: rows.jsonl\n"


def schema_errors(text: str) -> list[str]:
    """Validate a YAML against the JSON schema and return the error messages."""
    data: Any = parse_yaml(text, lambda line: Origin(f"line {line}", line)).data
    return [
        error.message
        for error in jsonschema.Draft202012Validator(json.loads(json_schema())).iter_errors(data)
    ]


def test_committed_schema_and_key_pages_are_up_to_date():
    assert SCHEMA_FILE.read_text("utf-8") == json_schema(), "run make schema"
    assert KEYS_FILE.read_text("utf-8") == keys_page(), "run make schema"
    assert OTHER_KEYS_FILE.read_text("utf-8") == other_keys_page(), "run make schema"


def test_schema_is_valid_and_describes_every_key():
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"].keys() == FinetuneConfig.model_fields.keys()
    for section in (schema, *schema["$defs"].values()):
        for key, field in section.get("properties", {}).items():
            assert field.get("description"), f"{section['title']}.{key}"


@pytest.mark.parametrize("path", COOKBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_cookbook_passes_the_schema_and_links_to_it(path: Path):
    text = path.read_text("utf-8")
    assert schema_errors(text) == []
    (schema_path,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, re.M)
    assert (path.parent / schema_path).resolve() == SCHEMA_FILE


@pytest.mark.parametrize(
    "line",
    [
        "worker_resources: {memory: 50GiB, 'accelerator_type:A10G': 0.001}",
        "learning_rate: 5e-6",
        "deepspeed: zero_2",
        "export: {merge: true, dtype: fp16, to: s3://bucket/model}",
        "deepspeed: {config_path: mine.json}",
        "logger: {provider: mlflow, tags: {a: b}}",
        "train_path: [{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]",
    ],
)
def test_yaml_that_loads_passes_the_schema(line: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        BASE.replace("train_path: rows.jsonl\n", "") + line if "train_path" in line else BASE + line
    )
    load_config(path)
    assert schema_errors(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "learning_rat: 1e-4",
        "learning_rate: fast",
        "num_devices: 0",
        "lora_config: {rank: 8}",
        "worker_resources: {GPU: one}",
        "task: tuning",
    ],
)
def test_invalid_yaml_fails_the_schema(line: str):
    assert schema_errors(BASE) == []
    assert schema_errors(BASE + line)

"""The schema that editors use: made from today's keys, and of one mind with what is loaded."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from configs.json_schema import KEYS_FILE, SCHEMA_FILE, json_schema, keys_page
from configs.loading import load_config
from configs.schema import FinetuneConfig
from configs.yaml_source import Origin, parse_yaml

ROOT = Path(__file__).resolve().parents[3]
COOKBOOKS = sorted((ROOT / "cookbooks").rglob("*.yaml"))
BASE = "model_id: a/b\ntrain_path: rows.jsonl\n"


def problems(text: str) -> list[str]:
    data: Any = parse_yaml(text, lambda line: Origin(f"line {line}", line)).data
    return [
        error.message
        for error in jsonschema.Draft202012Validator(json.loads(json_schema())).iter_errors(data)
    ]


def test_the_files_are_what_make_schema_writes():
    assert SCHEMA_FILE.read_text("utf-8") == json_schema(), "run make schema"
    assert KEYS_FILE.read_text("utf-8") == keys_page(), "run make schema"


def test_it_is_a_schema_and_every_key_has_its_help():
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"].keys() == FinetuneConfig.model_fields.keys()
    for section in (schema, *schema["$defs"].values()):
        for key, field in section.get("properties", {}).items():
            assert field.get("description"), f"{section['title']}.{key}"


@pytest.mark.parametrize("path", COOKBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_cookbooks_fit_it_and_tell_editors_where_it_is(path: Path):
    text = path.read_text("utf-8")
    assert problems(text) == []
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, re.M)
    assert (path.parent / named).resolve() == SCHEMA_FILE


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
def test_what_loads_fits_it(line: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(
        BASE.replace("train_path: rows.jsonl\n", "") + line if "train_path" in line else BASE + line
    )
    load_config(path)
    assert problems(path.read_text()) == []


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
def test_what_is_refused_does_not_fit_it(line: str):
    assert problems(BASE) == []
    assert problems(BASE + line)

"""The plan resumes a run on another number of devices if every step has the same rows, and names what cannot change."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.loading import load_config
from configs.schema import DEVICE_KEYS, config_hash
from runs.layout import MANIFEST_FILE, checkpoint_key
from tests.support.front_door import run_main_quickly
from tests.support.jobs import PROJECT
from tests.support.messages import assert_names

STORED = PROJECT / "tests" / "data" / "run_of_before"
"""A run on one worker, with 2 x 2 rows per step."""
RUN = Path("runs", "stored")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a copy of the run in the working directory, because paths in its YAML are relative."""
    shutil.copytree(STORED, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    yield tmp_path / "home"


def change(home: Path, manifest: dict[str, Any], settings: dict[str, Any]) -> None:
    """Store the run as if it had these settings and this manifest; the YAML gets the settings, too."""
    for path in (home / "run.yaml", home / RUN / "config.yaml"):
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))
    (path,) = (home / RUN).glob(checkpoint_key(0, MANIFEST_FILE).replace("000000", "*"))
    hashes = {"config_hash": config_hash(load_config(home / "run.yaml").config)}
    path.write_text(json.dumps(json.loads(path.read_text()) | hashes | manifest))


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["num_devices=2", "gradient_accumulation_steps=1"], None),
        (["num_devices={min: 1, max: 2}", "gradient_accumulation_steps=1"], None),
        (["num_devices=4", "train_batch_size_per_device=1", "gradient_accumulation_steps=1"], None),
        (["num_devices=2"], ("num_devices: 1 -> 2", "rows per step: 4 -> 8")),
        (["num_devices=2", "sequence_parallel_size=2"], ("sequence_parallel_size: 1 -> 2",)),
        (["gradient_accumulation_steps=1", "train_batch_size_per_device=4"], ("accumulation_steps: 2 -> 1",)),
        (["num_devices=2", "gradient_accumulation_steps=1", "seed=8"], ("seed: 7 -> 8",)),
        (["deepspeed=zero_2"], ("deepspeed: None -> zero_2",)),
    ],
)
def test_number_of_devices_may_change_if_the_rows_per_step_do_not(
    overrides: list[str], facts: tuple[str, ...] | None, home: Path
):
    checked = run_main_quickly(home / "run.yaml", *overrides, "--dry-run")
    if facts is None:
        assert checked.exit_code == 0, checked.errors
        assert "step-000002" in checked.output + checked.errors
        return
    assert checked.exit_code == 2, checked.output
    assert_names(checked.errors, "different settings", *facts)


def test_attempt_on_other_devices_may_be_repeated_before_its_first_checkpoint(home: Path):
    """It has already stored its settings, but the latest checkpoint still has the hash of the earlier ones."""
    without_devices = config_hash(load_config(home / "run.yaml").config, without=DEVICE_KEYS)
    change(home, {"hash_without_devices": without_devices}, {})
    stored = home / RUN / "config.yaml"
    devices = {"num_devices": 2, "gradient_accumulation_steps": 1}
    stored.write_text(yaml.safe_dump(yaml.safe_load(stored.read_text()) | devices))
    overrides = [f"{key}={value}" for key, value in devices.items()]
    checked = run_main_quickly(home / "run.yaml", *overrides, "--dry-run")
    assert checked.exit_code == 0, checked.errors


@pytest.mark.parametrize(
    ("manifest", "file", "overrides", "facts"),
    [
        ({"zero_stage": 2}, {"stage": 3}, [], ("different settings", "ZeRO stage 2 -> 3")),
        (
            {"zero_stage": 3, "offload": ["optimizer: cpu"]},
            {"stage": 3},
            [],
            ("different settings", "deepspeed: offloads ['optimizer: cpu'] -> []"),
        ),
        (
            {"zero_stage": 2, "offload": []},
            {"stage": 2, "round_robin_gradients": True},
            ["num_devices=2", "gradient_accumulation_steps=1"],
            ("num_devices", "round_robin_gradients"),
        ),
        ({"zero_stage": 2}, {"stage": 2}, ["num_devices=2", "gradient_accumulation_steps=1"], None),
    ],
)
def test_change_of_a_custom_deepspeed_file_is_named(
    manifest: dict[str, Any],
    file: dict[str, Any],
    overrides: list[str],
    facts: tuple[str, ...] | None,
    home: Path,
):
    (home / "zero.json").write_text(json.dumps({"zero_optimization": file}))
    change(home, manifest, {"deepspeed": {"config_path": "zero.json"}})
    checked = run_main_quickly(home / "run.yaml", *overrides, "--dry-run")
    if facts is None:
        assert checked.exit_code == 0, checked.errors
        return
    assert checked.exit_code == 2, checked.output
    assert_names(checked.errors, *facts)

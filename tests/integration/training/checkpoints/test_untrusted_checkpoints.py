"""Test that resuming from an untrusted checkpoint executes none of its code."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from runs.layout import MANIFEST_FILE
from tests.support.jobs import run_main, tiny_settings, write_yaml
from tests.support.tiny_model import make_model, write_data
from utils.files import checksum

pytestmark = pytest.mark.slow


class Canary:
    """An object that creates a file when it is unpickled, as a stand-in for any code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("untrusted")
    make_model(directory / "model")
    write_data(directory, train_rows=8, valid_rows=3)
    return directory


def settings(files: Path, **changes: Any) -> dict[str, Any]:
    return tiny_settings(files) | {
        "train_batch_size_per_device": 4,
        "num_epochs": 2,
        "lora_config": {"r": 4},
        **changes,
    }


@pytest.fixture(scope="module")
def checkpoints(files: Path) -> dict[str, Path]:
    """Train one run without and one with DeepSpeed; return their last checkpoints."""
    by_kind = {}
    for name, changes in (("plain", {}), ("zero", {"deepspeed": "zero_2"})):
        config = write_yaml(
            files / f"{name}.yaml", settings(files, run_name=name, max_steps=2, num_epochs=None, **changes)
        )
        finished = run_main(config, "--json")
        assert finished.exit_code == 0, finished.errors
        by_kind[name] = Path(finished.result["last_checkpoint"])
    return by_kind


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("plain", "optimizer.pt"),
        ("plain", "rng_state.pth"),
        ("zero", "*_optim_states.pt"),
        ("zero", "*_model_states.pt"),
    ],
)
def test_resume_does_not_execute_a_pickle(files: Path, checkpoints: dict[str, Path], kind: str, file: str):
    """The manifest matches the planted file, because an attacker who can write the file can write the manifest as well."""
    name = f"untrusted-{kind}-{file.strip('*_').partition('.')[0]}"
    checkpoint = Path(
        shutil.copytree(checkpoints[kind], files / "runs" / name / "checkpoints" / checkpoints[kind].name)
    )
    canary = files / f"{name}.canary"
    (planted,) = checkpoint.rglob(file)
    torch.save({"state": Canary(canary)}, planted)
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    for record in manifest["files"]:
        if record["path"] == str(planted.relative_to(checkpoint)):
            record |= {"size": planted.stat().st_size, "checksum": checksum(planted)}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))

    changes = {"deepspeed": "zero_2"} if kind == "zero" else {}
    config = write_yaml(
        files / f"{name}.yaml",
        settings(files, run_name=f"on-{name}", resume_from_checkpoint=str(checkpoint), **changes),
    )
    finished = run_main(config, "--json")
    assert not canary.exists(), "code from the checkpoint was executed"
    assert finished.exit_code == 1
    assert re.search(rf"{re.escape(str(checkpoint))} .*tensors", finished.errors)
    torch.load(planted, weights_only=False)
    assert canary.exists(), "an unrestricted load executes the planted pickle"

"""An untrusted checkpoint may contain anything: no code of it is executed."""

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
    """Unpickled, it leaves a file behind: it could have done anything."""

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


def settings(files: Path, **more: Any) -> dict[str, Any]:
    return tiny_settings(files) | {
        "train_batch_size_per_device": 4,
        "num_epochs": 2,
        "lora_config": {"r": 4},
        **more,
    }


@pytest.fixture(scope="module")
def checkpoint_of(files: Path) -> dict[str, Path]:
    """The last checkpoint of a run, with and without DeepSpeed."""
    checkpoints = {}
    for name, more in (("plain", {}), ("zero", {"deepspeed": "zero_2"})):
        config = write_yaml(
            files / f"{name}.yaml", settings(files, run_name=name, max_steps=2, num_epochs=None, **more)
        )
        finished = run_main(config, "--json")
        assert finished.exit_code == 0, finished.errors
        checkpoints[name] = Path(finished.result["last_checkpoint"])
    return checkpoints


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("plain", "optimizer.pt"),
        ("plain", "rng_state.pth"),
        ("zero", "*_optim_states.pt"),
        ("zero", "*_model_states.pt"),
    ],
)
def test_a_pickle_is_not_executed(files: Path, checkpoint_of: dict[str, Path], kind: str, file: str):
    """Its manifest is in order: whoever can write there can write that as well."""
    name = f"strangers-{kind}-{file.strip('*_').partition('.')[0]}"
    checkpoint = Path(
        shutil.copytree(checkpoint_of[kind], files / "runs" / name / "checkpoints" / checkpoint_of[kind].name)
    )
    canary = files / f"{name}.canary"
    (planted,) = checkpoint.rglob(file)
    torch.save({"state": Canary(canary)}, planted)
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    for record in manifest["files"]:
        if record["path"] == str(planted.relative_to(checkpoint)):
            record |= {"size": planted.stat().st_size, "checksum": checksum(planted)}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))

    more = {"deepspeed": "zero_2"} if kind == "zero" else {}
    config = write_yaml(
        files / f"{name}.yaml",
        settings(files, run_name=f"on-{name}", resume_from_checkpoint=str(checkpoint), **more),
    )
    finished = run_main(config, "--json")
    assert not canary.exists(), "the checkpoint was executed"
    assert finished.exit_code == 1
    assert re.search(rf"{re.escape(str(checkpoint))} .*tensors", finished.errors)
    torch.load(planted, weights_only=False)
    assert canary.exists(), "the canary would have sung"

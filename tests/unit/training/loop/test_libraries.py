"""Imports of a run's processes: what a run does not use is not imported."""

import subprocess
import sys
from typing import Any

import pytest

from configs.schema import FinetuneConfig
from tests.support.jobs import PROJECT, environment
from training.models.libraries import unused_packages

PLAIN: dict[str, Any] = {
    "model_id": "m",
    "train_path": "rows.jsonl",
    "lora_config": {"r": 4},
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("keys", "used"),
    [
        ({}, set()),
        ({"load_in_4bit": True}, {"bitsandbytes"}),
        ({"optim": "paged_adamw_8bit"}, {"bitsandbytes"}),
        ({"optim": "lion_32bit"}, {"bitsandbytes"}),
        ({"deepspeed": "zero_2"}, {"deepspeed"}),
        ({"logger": {"provider": "wandb"}}, {"wandb"}),
        ({"logger": {"provider": "mlflow"}}, {"mlflow"}),
        ({"logger": {"provider": "tensorboard"}}, set()),
    ],
    ids=str,
)
def test_packages_that_a_run_uses_are_not_withheld(keys: dict[str, Any], used: set[str]):
    unused = unused_packages(FinetuneConfig.model_validate(PLAIN | keys))
    assert set(unused) == {"bitsandbytes", "deepspeed", "mlflow", "wandb"} - used


def imported(script: str) -> set[str]:
    """Run a script in a new process and return the modules that it has imported."""
    show = "\nimport sys\nprint(*(name for name, module in sys.modules.items() if module is not None))"
    done = subprocess.run(
        [sys.executable, "-c", script + show],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.slow
def test_worker_of_a_lora_run_imports_no_package_that_it_does_not_use():
    unused = ["bitsandbytes", "deepspeed", "mlflow", "wandb"]
    modules = imported(
        f"from training.loop.libraries import import_libraries\nimport_libraries({unused}, False)\n"
        "from accelerate.utils.other import extract_model_from_parallel\n"
        "import torch\nextract_model_from_parallel(torch.nn.Linear(1, 1))"
    )
    assert {"trl.trainer.sft_trainer", "peft", "training.loop.worker"} <= modules
    assert not modules & {*unused, "fastapi", "torch._inductor.codecache", "torch._inductor.lowering"}


def test_driver_starts_the_cluster_before_it_imports_torch():
    modules = imported("import training.launch.display, training.launch.head_start")
    assert "ray" in modules
    assert not modules & {"torch", "transformers", "datasets"}

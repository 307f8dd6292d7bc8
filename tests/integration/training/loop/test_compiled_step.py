"""The trainer's steps under torch.compile, which Unsloth uses on a GPU, have the losses of eager steps.

`make test-kernels` runs it (ALL_KERNELS=1): compiling takes minutes.
"""

from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_config
from tests.support.grids import only_in_test_kernels
from tests.support.jobs import tiny_settings, write_yaml
from tests.support.kernel_processes import run_without_triton
from tests.support.tiny_model import make_model, write_data
from training.planning.endpoints import ClusterTarget
from training.planning.planner import make_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    only_in_test_kernels,
]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = tmp_path_factory.mktemp("compiled")
    make_model(files / "model", layers=1)
    write_data(files, train_rows=8, valid_rows=2)
    settings = {
        "lora_config": {"r": 8},
        "padding": "max_length",  # each shape would be compiled again
        "train_batch_size_per_device": 2,
        "max_steps": 3,
        "learning_rate": 0.01,
    }
    config = write_yaml(files / "config.yaml", tiny_settings(files) | settings)
    run_plan, _, _ = make_plan(load_config(config), target=ClusterTarget(None))
    (files / "plan.json").write_text(run_plan.model_dump_json())
    return files / "plan.json"


def steps(mode: str, plan: Path) -> dict[str, Any]:
    output = plan.parent / mode
    cache = str(plan.parent / "inductor")
    return run_without_triton(
        "tests.support.compiled_steps", mode, str(plan), str(output), TORCHINDUCTOR_CACHE_DIR=cache
    )


def test_compiled_steps_have_the_losses_of_eager_steps(plan: Path):
    eager, compiled = steps("eager", plan), steps("compiled", plan)
    assert eager["graphs"] == 0
    assert compiled["graphs"] > 0
    assert len(compiled["losses"]) == 3
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    assert compiled["gradient_norms"] == pytest.approx(eager["gradient_norms"], rel=1e-4)
    for evaluated, expected in zip(compiled["evaluations"], eager["evaluations"], strict=True):
        assert evaluated["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)

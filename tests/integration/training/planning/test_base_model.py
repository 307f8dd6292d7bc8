"""The plan builds the base model once, whatever it compares with it."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from configs.loading import load_config
from tests.support.adapters import write_adapter
from tests.support.jobs import tiny_settings, write_yaml
from tests.support.tiny_model import make_model_and_data
from training.planning.endpoints import ClusterTarget
from training.planning.planner import make_plan

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that grows with each model that transformers builds from a config."""
    built: list[Any] = []
    from_config = AutoModelForCausalLM.from_config

    def recorded(*arguments: Any, **settings: Any) -> Any:
        built.append(from_config(*arguments, **settings))
        return built[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", recorded)
    return built


@pytest.mark.parametrize("continued", [False, True], ids=["new adapter", "continued adapter"])
def test_base_model_is_built_once(continued: bool, tmp_path: Path, builds: list[Any]):
    files = make_model_and_data(tmp_path)
    changes: dict[str, Any] = {"lora_config": LORA, "new_tokens": ["<work>"]}
    if continued:
        adapter = write_adapter(tmp_path / "adapter", files / "model", **LORA)
        changes = {"lora_config": LORA, "initial_adapter_model_ckpt_path": str(adapter)}
    builds.clear()
    config = write_yaml(files / "run.yaml", tiny_settings(files) | changes)
    _, report, _ = make_plan(load_config(config), target=ClusterTarget(None))
    assert len(builds) == 1
    # Rank 4 in two layers of 64 x 64, and a row of 64 for the token in the embedding and in the head.
    assert report.trainable_parameters == 2 * 4 * (64 + 64) + (0 if continued else 2 * 64)
    assert not any("lora_" in name for name, _ in builds[0].named_parameters()), (
        "adapters are added to copies"
    )

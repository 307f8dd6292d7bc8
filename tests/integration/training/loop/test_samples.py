"""Runs that answer validation prompts at each evaluation, on two workers with sharded weights.

`make test-kernels` runs it (ALL_KERNELS=1).
"""

import json
from pathlib import Path

import pytest

from runs.summaries import read_run
from tests.support.grids import only_in_test_kernels
from tests.support.jobs import PROJECT, run_main, tiny_settings, write_yaml
from tests.support.tiny_model import make_model, write_data
from utils.files import checksum

pytestmark = [
    pytest.mark.slow,
    only_in_test_kernels,
]


def test_samples_of_a_sharded_model_do_not_change_its_weights(tmp_path: Path):
    """Three prompts on two ranks: one rank has a prompt more, and forward passes are collective under ZeRO-3."""
    make_model(tmp_path / "model")
    write_data(tmp_path, train_rows=24, valid_rows=5)
    zero_3 = json.loads((PROJECT / "configs/deepspeed/zero_3.json").read_text("utf-8"))
    zero_3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero_3.json").write_text(json.dumps(zero_3))
    settings = tiny_settings(tmp_path) | {
        "num_devices": 2,
        "max_steps": 2,
        "eval_steps": 1,
        "learning_rate": 1e-2,
        "gradient_checkpointing": True,
        "lora_config": {"r": 4, "lora_dropout": 0.1},
        "deepspeed": {"config_path": str(tmp_path / "zero_3.json")},
    }
    weights = []
    for samples in (None, 3):
        name = f"samples-{samples}"
        config = write_yaml(
            tmp_path / f"{name}.yaml",
            settings | {"run_name": name, "eval_samples": samples},
        )
        finished = run_main(config, *(["eval_max_new_tokens=8"] if samples else []))
        assert finished.exit_code == 0, finished.errors
        run = tmp_path / "runs" / name
        weights.append(checksum(run / "checkpoints" / "step-000002" / "adapter_model.safetensors"))
    assert weights[0] == weights[1]

    run = tmp_path / "runs" / "samples-3"
    kept = sorted(path.name for path in (run / "samples").iterdir())
    assert kept == ["step-000000.jsonl", "step-000001.jsonl", "step-000002.jsonl"]
    samples = read_run(str(run)).samples
    assert [sample.step for sample in samples] == [2, 2, 2]
    assert len({sample.row for sample in samples}) == 3
    page = (run / "report.html").read_text()
    assert page.count('class="samples"') == 3
    assert "step 0" in page
    assert not (tmp_path / "runs" / "samples-None" / "samples").exists()

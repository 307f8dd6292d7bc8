"""A run whose base model on the Hub changes later: its adapter keeps the commit that it was trained on."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from runs.layout import Export
from tests.support.grids import only_in_test_resume
from tests.support.hub import Repository, running_hub
from tests.support.jobs import run_main, tiny_settings, write_yaml
from tests.support.tiny_model import make_model_and_data

pytestmark = pytest.mark.slow
BASE = "org/base"


@only_in_test_resume
def test_adapter_is_used_and_trained_on_the_commit_that_it_was_trained_on(tmp_path: Path):
    make_model_and_data(tmp_path)
    model = tmp_path / "model"
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    settings = tiny_settings(tmp_path) | {
        "model_id": BASE,
        "max_steps": 2,
        "lora_config": {"r": 4},
        "lr_scheduler_type": "constant",
        "eval_first": True,
    }
    with running_hub() as hub:
        hub.repositories[f"models/{BASE}"] = repository = Repository(dict(files))
        variables = hub.variables(tmp_path / "hub")
        trained = run_main(write_yaml(tmp_path / "run.yaml", settings), "--json", variables=variables)
        assert trained.exit_code == 0, trained.errors
        first = repository.sha
        weights = load_file(model / "model.safetensors")
        changed = {name: 2 * weight for name, weight in weights.items()}
        repository.commit({"model.safetensors": save(changed, {"format": "pt"})}, "Change the weights")
        assert repository.sha != first

        def export(*arguments: str) -> Export:
            run = str(trained.result["run_uri"])
            finished = run_main(Path("export"), run, "--json", *arguments, variables=variables)
            assert finished.exit_code == 0, finished.errors
            return Export.model_validate_json(finished.output)

        adapter = Path(export("--no-merge").uri)
        merged = Path(export("--dtype", "fp32").uri)

        checkpoint = trained.result["last_checkpoint"]
        starts = {
            "more": {"initial_adapter_model_ckpt_path": checkpoint, "lora_config": None},
            "longer": {"resume_from_checkpoint": checkpoint, "max_steps": 4},
        }
        runs = {}
        for name, start in starts.items():
            config = write_yaml(tmp_path / f"{name}.yaml", settings | {"run_name": name} | start)
            runs[name] = run_main(config, "--json", variables=variables)
            assert runs[name].exit_code == 0, runs[name].errors
    last = trained.result["eval_losses"][-1]["eval_loss"]
    assert runs["more"].result["eval_losses"][0]["eval_loss"] == pytest.approx(last, abs=1e-5)
    for name, finished in runs.items():
        written = json.loads(Path(finished.result["last_checkpoint"], "adapter_config.json").read_text())
        assert written["revision"] == first, name
    assert json.loads((adapter / "adapter_config.json").read_text())["revision"] == first
    card = (adapter / "README.md").read_text()
    assert f"vllm serve {BASE} --revision {first} " in card
    assert f'revision="{first}"' in card
    found = load_file(merged / "model.safetensors")["model.embed_tokens.weight"]
    assert found.equal(weights["model.embed_tokens.weight"])

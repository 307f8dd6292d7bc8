"""Exports that real vLLM on CPU serves: its greedy tokens equal those of transformers and PEFT, for each kind of adapter it loads."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.schema import ExportConfig
from runs.layout import Export
from service.vllm_engine import vllm_python
from tests.support.adapter_uses import rejection
from tests.support.adapters import KINDS, make_models, write_adapter
from tests.support.engines import needs_vllm
from tests.support.jobs import PROJECT
from tests.support.messages import assert_names
from tests.support.tiny_model import make_model
from tests.support.trained_runs import store_adapter_run
from training.inference import verifying
from training.inference.checkpoint_model import trained_model
from training.inference.export import export
from training.models.files import ModelError
from training.models.torch_provider import attach_adapter
from utils.storage.bucket import open_store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),
    needs_vllm,
]
PROMPTS = [[1, 7, 300, 42, 11], [1, 5, 5, 90], [2, 100, 200, 300, 400, 17, 33]]
TOKENS = 16
# An adapter of these differs from PEFT's of the same name; it is written by PEFT itself, as other trainers do.
OF_OTHER_TRAINERS = {"init_lora_weights: eva"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the models of KINDS with heads of 64, as vLLM's attention on CPU needs them."""
    directory = tmp_path_factory.mktemp("vllm")
    models = make_models(directory, make_model(directory / "llama", head_dim=64))
    models["tied"] = make_model(directory / "tied-64", head_dim=64, tie_word_embeddings=True)
    return models


@pytest.fixture(scope="module")
def exported(models: dict[str, Path]) -> dict[str, Path]:
    """Return the export without the base of each kind that the plan does not reject."""
    directory = models["llama"].parent
    exports = {}
    for kind, (name, lora) in KINDS.items():
        if rejection(kind, "vLLM", models):
            continue
        slug = f"kind-{len(exports)}"
        if kind in OF_OTHER_TRAINERS:
            exports[kind] = write_adapter(directory / slug, models[name], **lora)
            continue
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
        run = stored_run(directory, slug, models[name], settings)
        exports[kind] = exported_run(run, directory / f"{slug}-export", merge=False)
    return exports


def stored_run(directory: Path, name: str, model: Path, lora: dict[str, Any]) -> str:
    scratch = str(directory / "scratch")
    return store_adapter_run(open_store(str(directory / "runs")), name, model, lora, output_dir=scratch)


def exported_run(run: str, to: Path, **settings: Any) -> Path:
    export_run(run, dtype="fp32", to=str(to), **settings)
    return to


def export_run(run: str, **settings: Any) -> Export:
    with trained_model(run) as trained:
        return export(trained, ExportConfig(**settings), progress=lambda _: None)


def answers_of_vllm(directory: Path, model: Path, adapters: dict[str, Path]) -> dict[str, list[list[int]]]:
    """Return the greedy tokens of real vLLM by adapter; those of the model alone have the name ""."""
    asked = {
        "model": str(model),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "rank": 8,
    }
    question, answer = directory / "asked.json", directory / "answers.json"
    question.write_text(json.dumps(asked))
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    finished = subprocess.run(
        [str(vllm_python()), str(PROJECT / "tests/support/vllm_answers.py"), str(question), str(answer)],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert finished.returncode == 0, finished.stderr[-6000:]
    return json.loads(answer.read_text())


def answers_of_transformers(model: Any) -> list[list[int]]:
    """Return the greedy tokens of `generate`, which no token ends."""
    model.eval()
    model.config.use_cache = True
    found = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        generated = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        found.append(generated[0, len(prompt) :].tolist())
    return found


def loaded(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_exported_adapters_answer_in_vllm_as_in_peft(
    name: str, models: dict[str, Path], exported: dict[str, Path], tmp_path: Path
):
    adapters = {kind: path for kind, path in exported.items() if KINDS[kind][0] == name}
    assert adapters
    found = answers_of_vllm(tmp_path, models[name], adapters)
    plain = answers_of_transformers(loaded(models[name]))
    assert found[""] == plain
    for kind, path in adapters.items():
        expected = answers_of_transformers(attach_adapter(loaded(models[name]), path))
        assert expected != plain, "the adapter changes the answers"
        assert found[kind] == expected, kind


def test_every_kind_that_vllm_loads_is_tested(exported: dict[str, Path]):
    assert {KINDS[kind][0] for kind in exported} == {"llama", "tied"}


@pytest.mark.parametrize(
    ("name", "lora"),
    [("llama", {"use_dora": True}), ("tied", {"target_modules": ["q_proj", "embed_tokens"]})],
    ids=["dora", "separated embeddings"],
)
def test_merged_export_answers_in_vllm_as_the_adapter_in_peft(
    name: str, lora: dict[str, Any], models: dict[str, Path], tmp_path: Path
):
    run = stored_run(tmp_path, "run", models[name], {"r": 4, "target_modules": "all-linear", **lora})
    merged = exported_run(run, tmp_path / "merged", merge=True)
    with trained_model(run) as trained:
        expected = answers_of_transformers(attach_adapter(loaded(models[name]), trained.weights()))
    assert answers_of_vllm(tmp_path, merged, {})[""] == expected


@pytest.mark.parametrize(
    "settings", [{"merge": False}, {"dtype": "fp32"}, {"dtype": "bf16"}], ids=["adapter", "fp32", "bf16"]
)
def test_verification_compares_vllm_with_the_model_as_trained(
    settings: dict[str, Any], models: dict[str, Path], tmp_path: Path
):
    run = stored_run(tmp_path, "run", models["llama"], {"r": 12, "target_modules": "all-linear"})
    exported = export_run(run, to=str(tmp_path / "export"), **settings)
    assert exported.verification
    assert exported.verification.vllm is None, "it starts vLLM only where `verify` is set"
    verified = export_run(run, to=str(tmp_path / "export"), verify=True, **settings).verification
    assert verified
    assert verified.vllm
    assert verified.vllm.error is None
    assert verified.vllm.version in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_export_that_vllm_computes_otherwise_is_not_published(
    merge: bool, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One tensor of the export is doubled after transformers has verified it."""
    run = stored_run(tmp_path, "run", models["llama"], {"r": 4, "target_modules": "all-linear"})
    compare = verifying._compare_in_vllm

    def doubled(trained: Any, planned: Export, directory: Path, *rest: Any) -> Any:
        (file,) = directory.glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
        save_file(tensors | {name: tensors[name] * 2}, file, {"format": "pt"})
        return compare(trained, planned, directory, *rest)

    monkeypatch.setattr(verifying, "_compare_in_vllm", doubled)
    with pytest.raises(ModelError, match=r"in transformers, but not in vLLM.*Nothing was exported\."):
        export_run(run, to=str(tmp_path / "export"), merge=merge, dtype="fp32", verify=True)
    assert not (tmp_path / "export").exists()


def test_model_that_vllm_cannot_load_is_exported_with_the_reason(tmp_path: Path):
    """vLLM's attention on CPU has no heads of 16."""
    model = make_model(tmp_path / "model")
    run = stored_run(tmp_path, "run", model, {"r": 4, "target_modules": "all-linear"})
    verified = export_run(run, to=str(tmp_path / "export"), verify=True).verification
    assert verified
    assert verified.vllm
    assert_names(verified.vllm.error or "", "head")
    print(verified.vllm)

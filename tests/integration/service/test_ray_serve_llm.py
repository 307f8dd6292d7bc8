"""Published adapters in Ray Serve LLM: its own code lists and downloads them."""

import asyncio
import hashlib
from pathlib import Path

import pytest
from safetensors.torch import load_file

from runs.layout import checkpoint_uri
from tests.support.front_door import RunCommand
from tests.support.jobs import error_of
from tests.support.trained_runs import STEP, store_adapter_run
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import EmbeddedBucket, embedded_endpoint

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_ray_serve_llm_lists_and_loads_an_exported_adapter(
    run_command: RunCommand,
    bucket: EmbeddedBucket,
    bucket_uri: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    # Seconds, which every collection of tests would take at the top of the file.
    from ray.llm._internal.common.utils.lora_utils import get_lora_model_ids
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    from ray.llm._internal.serve.utils.lora_serve_utils import LoraModelLoader

    storage, loras = open_store(str(tmp_path / "runs")), f"{bucket_uri}/loras"
    for name in ("first", "second"):
        run = store_adapter_run(storage, name, tiny_model, {"r": 4}, output_dir=str(tmp_path / "scratch"))
        source = run if name == "first" else checkpoint_uri(run, STEP)
        done = run_command("export", source, "--layout", "ray-serve-llm", "--to", loras, "--json")
        assert done.exit_code == 0, done.errors
    server = embedded_endpoint()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert sorted(get_lora_model_ids(loras, "tiny")) == ["tiny:first", "tiny:second"]
    config = LLMConfig(
        model_loading_config={"model_id": "tiny"}, lora_config={"dynamic_lora_loading_path": loras}
    )
    loader = LoraModelLoader(str(tmp_path / "loaded"))
    for name in ("first", "second"):
        loaded = Path(asyncio.run(loader.load_model_from_config(f"tiny:{name}", config)).local_path)
        trained = tmp_path / "runs" / name / "checkpoints" / f"step-{STEP:06d}"
        assert sha256(loaded / WEIGHTS) == sha256(next(trained.rglob(WEIGHTS)))
        assert load_file(loaded / WEIGHTS)
        assert (loaded / CONFIG).exists()


@pytest.mark.parametrize("to", [[], ["--to", "local/loras"]])
def test_layout_needs_a_bucket_prefix(
    run_command: RunCommand, tiny_model: Path, tmp_path: Path, to: list[str]
):
    run = store_adapter_run(open_store(str(tmp_path / "runs")), "first", tiny_model, {"r": 4})
    message = error_of(run_command("export", run, "--layout", "ray-serve-llm", *to))
    assert "--to" in message
    assert "dynamic_lora_loading_path" in message

"""Runs of the tiny model with real checkpoints of random weights, written without training."""

import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema import LoraConfig
from runs.layout import CONFIG_FILE, METRICS_FILE, RESULT_FILE
from tests.support.stored_runs import eval_losses, make_manifest, make_result
from training.checkpoints import store as checkpoints
from utils.storage.bucket import Store, open_store

STEP = 10


def store_adapter_run(storage: Store, name: str, model: Path, lora: dict[str, Any], **settings: Any) -> str:
    """Write a run with an adapter for the model in a directory; return the run's URI."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = {"lora_alpha": 8, **lora}
    written: dict[str, Any] = LoraConfig(**lora).model_dump() | {"init_lora_weights": False}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**written))
    for parameter in adapted.parameters():
        # Change all trained weights, also those outside the adapter, by enough to change the outputs.
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    return _store(storage, name, model, adapted, lora_config=lora, **settings)


def store_full_run(storage: Store, name: str, model: Path, **settings: Any) -> str:
    """Write a full-parameter run of the model in a directory; return the run's URI."""
    torch.manual_seed(2)
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for parameter in trained.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    trained.config.use_cache = False  # as after training
    return _store(storage, name, model, trained, **settings)


def _store(storage: Store, name: str, model: Path, trained: Any, **settings: Any) -> str:
    uri = storage.uri_of(name)
    store = open_store(uri)
    losses = eval_losses(2.0, 1.5)
    config = {
        "model_id": str(model),
        "train_path": "rows.jsonl",
        "device": "cpu",
        "dtype": "fp32",
        **settings,
    }
    store.write(CONFIG_FILE, yaml.safe_dump(config, sort_keys=False).encode())
    lines = [loss.model_dump(exclude={"figures"}) for loss in losses]
    store.write(METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines).encode())
    with tempfile.TemporaryDirectory() as directory:
        trained.save_pretrained(directory)
        AutoTokenizer.from_pretrained(model).save_pretrained(directory)
        files = checkpoints.checkpoint_files(Path(directory))
        records = checkpoints.upload_files(store, STEP, Path(directory), files)
    checkpoints.commit(store, make_manifest(STEP, 1.0, losses[-1].eval_loss, records))
    store.write(RESULT_FILE, make_result(uri, losses).model_dump_json().encode())
    return uri

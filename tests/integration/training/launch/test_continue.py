"""Runs continue from adapters, full weights and complete trainer states; incompatible settings raise errors."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.support.front_door import run_main_quickly
from tests.support.grids import only_in_test_resume
from tests.support.jobs import read_metrics, run_main, tiny_settings, write_yaml
from tests.support.messages import assert_names
from tests.support.tiny_model import make_model, write_data, write_preference_pairs
from utils.storage.bucket import open_store
from utils.storage.embedded_bucket import EmbeddedBucket

pytestmark = pytest.mark.slow

# A random base model learns nothing from adapters alone, so lm_head is trained in full.
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("continue")
    make_model(directory / "model")
    write_data(directory, train_rows=40, valid_rows=11)
    write_preference_pairs(directory, train_rows=24, valid_rows=11)
    (directory / "more").mkdir()
    write_data(directory / "more", train_rows=24, valid_rows=3)
    return directory


def settings(files: Path, **more: Any) -> dict[str, Any]:
    return tiny_settings(files) | {
        "train_batch_size_per_device": 8,
        "num_epochs": 2,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        **more,
    }


@pytest.fixture(scope="module")
def adapter_run(files: Path) -> dict[str, Any]:
    """Train the LoRA run `first` and return its result."""
    config = write_yaml(files / "first.yaml", settings(files, run_name="first", lora_config=LORA))
    finished = run_main(config, "--json")
    assert finished.exit_code == 0, finished.errors
    return finished.result


@pytest.fixture(scope="module")
def full_run(files: Path) -> dict[str, Any]:
    """Train the full-parameter run `full` and return its result."""
    config = write_yaml(files / "full.yaml", settings(files, run_name="full", learning_rate=2e-3))
    finished = run_main(config, "--json")
    assert finished.exit_code == 0, finished.errors
    return finished.result


def best_loss(result: dict[str, Any]) -> float:
    return min(loss["eval_loss"] for loss in result["eval_losses"])


def error_of(files: Path, name: str, **more: Any) -> str:
    """Return the error that a dry run prints for these settings."""
    config = write_yaml(files / f"{name}.yaml", settings(files, **more))
    finished = run_main_quickly(config, "--dry-run")
    assert finished.exit_code == 2, finished.output
    assert "Traceback" not in finished.errors
    return finished.errors


def test_first_eval_loss_from_an_initial_adapter_is_the_best_of_its_run(
    files: Path, adapter_run: dict[str, Any], bucket: EmbeddedBucket, bucket_uri: str
):
    """The child run retains r, alpha and target modules, and plain PEFT loads its checkpoint."""
    store = open_store(bucket_uri)
    best = Path(adapter_run["best_checkpoint"])
    store.upload_many({f"adapter/{path.name}": path for path in best.iterdir()})
    child = settings(
        files,
        run_name="second",
        train_path=str(files / "more" / "train.jsonl"),
        initial_adapter_model_ckpt_path=f"{bucket_uri}/adapter",
    )
    finished = run_main(write_yaml(files / "second.yaml", child), "--json")
    assert finished.exit_code == 0, finished.errors
    first = finished.result["eval_losses"][0]
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(best_loss(adapter_run), rel=1e-2)
    assert first["eval_loss"] < 0.8 * adapter_run["eval_losses"][0]["eval_loss"]
    assert finished.result["parent"] == f"{bucket_uri}/adapter"
    assert finished.result["trainable_parameters"] == adapter_run["trainable_parameters"]
    last = finished.result["last_checkpoint"]
    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, last)
    trained = model.peft_config["default"]
    assert isinstance(trained, peft.LoraConfig)
    assert (trained.r, trained.lora_alpha, set(trained.target_modules or ())) == (4, 8, {"q_proj", "v_proj"})


def tune_preferences(files: Path, name: str, **more: Any) -> dict[str, Any]:
    """Run preference tuning under this run name and return its result."""
    config = settings(
        files,
        run_name=name,
        task="preference_tuning",
        train_path=str(files / "train-pairs.jsonl"),
        valid_path=str(files / "valid-pairs.jsonl"),
        **more,
    )
    finished = run_main(write_yaml(files / f"{name}.yaml", config), "--json")
    assert finished.exit_code == 0, finished.errors
    return finished.result


def test_preference_tuning_uses_the_initial_adapter_as_its_reference(
    files: Path, adapter_run: dict[str, Any]
):
    """Before the first step, every reward is 0 and the loss is log 2. The reference is in no checkpoint."""
    result = tune_preferences(
        files, "preference", initial_adapter_model_ckpt_path="run:first", learning_rate=1e-3
    )
    first, *_, last = result["eval_losses"]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["figures"]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last["eval_loss"] < first["eval_loss"]
    assert last["figures"]["rewards/margins"] > 0.01
    page = (files / "runs" / "preference" / "report.html").read_text()
    assert page.index("parent run, evaluation") < page.index(">evaluation</text>")
    checkpoint = Path(result["last_checkpoint"])
    assert not list(checkpoint.glob("reference*"))
    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    assert list(peft.PeftModel.from_pretrained(base, checkpoint).peft_config) == ["default"]


@only_in_test_resume
def test_extended_preference_tuning_equals_an_uninterrupted_run(files: Path):
    """The reference is the base model in both runs."""
    lora = {"lora_config": {"r": 4}, "learning_rate": 1e-2}
    tune_preferences(files, "preference-short", num_epochs=1, **lora)
    extended = tune_preferences(
        files, "preference-extended", resume_from_checkpoint="run:preference-short", **lora
    )
    uninterrupted = tune_preferences(files, "preference-uninterrupted", **lora)
    assert extended["train_steps"] == uninterrupted["train_steps"] == 6
    assert extended["eval_losses"] == uninterrupted["eval_losses"]


@pytest.mark.parametrize("kind", ["name", "run", "checkpoint"])
def test_initial_adapter_may_be_a_run_or_a_checkpoint(files: Path, adapter_run: dict[str, Any], kind: str):
    initial = {
        "name": "run:first",
        "run": adapter_run["run_uri"],
        "checkpoint": adapter_run["best_checkpoint"],
    }[kind]
    config = write_yaml(files / f"{kind}.yaml", settings(files, initial_adapter_model_ckpt_path=initial))
    finished = run_main_quickly(config, "--dry-run", "--json")
    assert finished.exit_code == 0, finished.errors
    assert finished.result["starts_from"] == adapter_run["best_checkpoint"]
    assert finished.result["trainable_parameters"] == adapter_run["trainable_parameters"]


def test_lora_config_that_differs_from_the_adapter_raises_an_error(files: Path, adapter_run: dict[str, Any]):
    same = write_yaml(
        files / "same.yaml", settings(files, initial_adapter_model_ckpt_path="run:first", lora_config=LORA)
    )
    assert run_main_quickly(same, "--dry-run").exit_code == 0
    message = error_of(
        files,
        "other",
        initial_adapter_model_ckpt_path="run:first",
        lora_config={"r": 16, "target_modules": "all-linear"},
    )
    assert re.search(r"lora_config\.r: .*\b4\b.*\b16\b", message)
    assert_names(message, "lora_config.target_modules: ")
    assert "lora_alpha" not in message, "a key that the YAML omits must not be compared"


def test_adapter_for_another_hidden_size_raises_an_error_with_both_shapes(
    files: Path, adapter_run: dict[str, Any]
):
    wider = files / "wider"
    model = AutoModelForCausalLM.from_config(
        AutoModelForCausalLM.from_pretrained(files / "model").config.__class__.from_pretrained(
            files / "model", hidden_size=96
        )
    )
    shutil.copytree(files / "model", wider)
    model.save_pretrained(wider)
    message = error_of(files, "wider", model_id=str(wider), initial_adapter_model_ckpt_path="run:first")
    assert re.search(r"model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight is 4 x 64 .* 4 x 96", message)


def test_adapter_for_fewer_layers_raises_an_error_with_the_first_missing_layer(
    files: Path, adapter_run: dict[str, Any]
):
    """All its matrices fit, so the upper layers would silently stay without an adapter."""
    deeper = files / "deeper"
    make_model(deeper, layers=3)
    message = error_of(files, "deeper", model_id=str(deeper), initial_adapter_model_ckpt_path="run:first")
    assert_names(message, "adapter", "model.layers.2.self_attn.q_proj")
    assert "model.layers.1." not in message


def copy_run(files: Path, result: dict[str, Any], name: str) -> Path:
    """Copy a run under another name and return the directory of the copy."""
    return Path(shutil.copytree(result["run_uri"], files / "runs" / name))


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file; its size does not change."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["adapter", "base"])
def test_damaged_initial_weights_raise_an_error(
    files: Path, adapter_run: dict[str, Any], full_run: dict[str, Any], kind: str
):
    """A run that starts from damaged weights would look healthy; only the checksums reveal the damage."""
    result = adapter_run if kind == "adapter" else full_run
    run = copy_run(files, result, f"damaged-{kind}")
    weights = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    flip_bit(run / "checkpoints" / Path(result["best_checkpoint"]).name / weights)
    child = settings(
        files, run_name=f"on-damaged-{kind}", **{f"initial_{kind}_model_ckpt_path": f"run:damaged-{kind}"}
    )
    finished = run_main(write_yaml(files / f"on-damaged-{kind}.yaml", child), "--json")
    assert finished.exit_code == 1
    assert re.search(rf"/{weights}: .*content", finished.errors)
    assert finished.result["last_checkpoint"] is None


def test_initial_run_with_a_damaged_checkpoint_raises_an_error(files: Path, adapter_run: dict[str, Any]):
    """The damaged checkpoint may be the best one; the second best must not be used silently."""
    best = Path(adapter_run["best_checkpoint"]).name
    run = copy_run(files, adapter_run, "truncated")
    truncated = run / "checkpoints" / best / "adapter_model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-8])
    message = error_of(files, "from_truncated", initial_adapter_model_ckpt_path="run:truncated")
    assert re.search(rf"{best}/adapter_model\.safetensors .*\d+ bytes", message)

    run = copy_run(files, adapter_run, "half-removed")
    (run / "checkpoints" / best / "MANIFEST.json").unlink()
    result = json.loads((run / "result.json").read_text())
    result["run_uri"] = str(run)
    for key in ("best_checkpoint", "last_checkpoint"):
        result[key] = result[key].replace("/first/", "/half-removed/")
    (run / "result.json").write_text(json.dumps(result))
    message = error_of(files, "from_half_removed", initial_adapter_model_ckpt_path="run:half-removed")
    assert_names(message, f"{best} ", "result.json", "no MANIFEST.json")
    message = error_of(
        files,
        "from_uncommitted",
        initial_adapter_model_ckpt_path=str(run / "checkpoints" / best),
    )
    assert_names(message, best, "no MANIFEST.json")
    assert "result.json, and" not in message
    message = error_of(files, "half_removed_again", run_name="half-removed", lora_config=LORA)
    assert_names(message, "half-removed ", "completed", "damaged")
    message = error_of(files, "typo", initial_adapter_model_ckpt_path="run:frist")
    assert_names(message, "run:frist", "no run")


def test_run_with_only_damaged_checkpoints_does_not_restart(files: Path, adapter_run: dict[str, Any]):
    """A restart would delete checkpoints that may still be recoverable."""
    run = copy_run(files, adapter_run, "all-damaged")
    (run / "result.json").unlink()
    for manifest in run.glob("checkpoints/*/MANIFEST.json"):
        manifest.write_bytes(manifest.read_bytes()[:-8])
    message = error_of(files, "all_damaged", run_name="all-damaged", lora_config=LORA)
    assert_names(message, "all-damaged ", "checkpoints")
    assert list(run.glob("checkpoints/*/adapter_model.safetensors")), "no weights may be deleted"


def losses_of(metrics: list[dict[str, Any]]) -> list[tuple[int, float, float, float]]:
    """Return step, loss, gradient norm and learning rate of each step; these do not depend on speed."""
    return [
        (line["step"], line["loss"], line["grad_norm"], line["learning_rate"])
        for line in metrics
        if "loss" in line
    ]


def test_resume_skips_damaged_checkpoints_with_a_warning(files: Path):
    """The rerun gives the same losses and weights, and deletes files that belong to no checkpoint."""
    name = "skips-damaged"
    every_4 = {"unit": "steps", "frequency": 4}
    config = write_yaml(
        files / f"{name}.yaml",
        settings(
            files,
            run_name=name,
            lora_config=LORA,
            num_checkpoints_to_keep=5,
            checkpoint_and_evaluation_frequency=every_4,
        ),
    )
    first = run_main(config, "--json")
    assert first.exit_code == 0, first.errors
    run = Path(first.result["run_uri"])
    metrics = read_metrics(run)
    intact, previous, latest = sorted((run / "checkpoints").iterdir())
    weights = (latest / "adapter_model.safetensors").read_bytes()
    (run / "result.json").unlink()
    (latest / "MANIFEST.json").write_text("{")
    flip_bit(previous / "optimizer.pt")
    orphan = run / "checkpoints" / "step-000007" / "optimizer.pt"
    orphan.parent.mkdir()
    orphan.write_bytes(b"of a killed attempt")

    again = run_main(config, "--json")
    assert again.exit_code == 0, again.errors
    for damaged in (latest / "MANIFEST.json", previous / "optimizer.pt"):
        assert f"{damaged.parent.name}/{damaged.name}" in again.errors, (
            "a warning must name each damaged file"
        )
    assert intact.name in again.errors
    assert losses_of(read_metrics(run)) == losses_of(metrics)
    assert (latest / "adapter_model.safetensors").read_bytes() == weights
    assert not orphan.exists()


@pytest.mark.parametrize("kernels", ["torch", "unsloth"])
def test_run_starts_from_an_adapter_saved_by_plain_peft(files: Path, kernels: str):
    """The YAML's model is used, even if the base model in adapter_config.json has another path."""
    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    saved = files / f"plain_peft_{kernels}"
    peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(saved)
    adapter = json.loads((saved / "adapter_config.json").read_text())
    # Older PEFT versions wrote only these keys.
    old_keys = (
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "bias",
        "fan_in_fan_out",
        "inference_mode",
        "modules_to_save",
        "init_lora_weights",
    )
    other_path = {"base_model_name_or_path": str(files / "moved")}
    (saved / "adapter_config.json").write_text(
        json.dumps({key: adapter[key] for key in old_keys} | other_path)
    )
    child = settings(
        files,
        run_name=f"plain-{kernels}",
        initial_adapter_model_ckpt_path=str(saved),
        kernels=kernels,
        max_steps=2,
        num_epochs=None,
    )
    finished = run_main(write_yaml(files / f"plain_{kernels}.yaml", child), "--json")
    assert finished.exit_code == 0, finished.errors
    last = Path(finished.result["last_checkpoint"])
    assert json.loads((last / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        files / "model"
    )


def test_initial_full_weights_train_in_full_and_warn_with_an_adapter(files: Path, full_run: dict[str, Any]):
    child = settings(files, run_name="full-2", initial_base_model_ckpt_path="run:full", num_epochs=1)
    finished = run_main(write_yaml(files / "full_2.yaml", child), "--json")
    assert finished.exit_code == 0, finished.errors
    assert finished.result["eval_losses"][0]["eval_loss"] == pytest.approx(best_loss(full_run), rel=1e-4)
    assert finished.result["trainable_parameters"] == full_run["trainable_parameters"]

    adapter_config = write_yaml(
        files / "on_top.yaml", settings(files, initial_base_model_ckpt_path="run:full", lora_config=LORA)
    )
    dry_run = run_main_quickly(adapter_config, "--dry-run")
    assert dry_run.exit_code == 0
    assert_names(dry_run.output, "serving", "checkpoint")


def test_extended_run_has_the_losses_of_an_uninterrupted_run(files: Path):
    """One epoch is extended to two with the complete trainer state, dropout included."""
    lora = LORA | {"lora_dropout": 0.2}
    losses = {}
    for name, more in (
        ("uninterrupted", {"num_epochs": 2}),
        ("short", {"num_epochs": 1}),
        ("extended", {"num_epochs": 2, "resume_from_checkpoint": "run:short"}),
    ):
        config = write_yaml(files / f"{name}.yaml", settings(files, run_name=name, lora_config=lora, **more))
        finished = run_main(config, "--json")
        assert finished.exit_code == 0, finished.errors
        lines = read_metrics(files / "runs" / name)
        losses[name] = [
            (line["step"], line.get("loss"), line.get("eval_loss"))
            for line in lines
            if "loss" in line or "eval_loss" in line
        ]
    assert len(losses["short"]) < len(losses["uninterrupted"])
    assert losses["extended"] == losses["uninterrupted"]


@only_in_test_resume
def test_extended_run_takes_its_schedule_over_the_new_length(files: Path):
    """The shorter run's cosine has ended at 0, but no further step is taken at rate 0."""
    rates: dict[str, list[float]] = {}
    for name, more in (
        ("cosine-short", {"num_epochs": 1}),
        ("cosine-extended", {"num_epochs": 2, "resume_from_checkpoint": "run:cosine-short"}),
    ):
        cosine = settings(files, run_name=name, lora_config=LORA, lr_scheduler_type="cosine", **more)
        finished = run_main(write_yaml(files / f"{name}.yaml", cosine), "--json")
        assert finished.exit_code == 0, finished.errors
        lines = read_metrics(files / "runs" / name)
        rates[name] = [line["learning_rate"] for line in lines if "loss" in line]

    def cosine_rates(steps: int) -> list[float]:
        return [2e-2 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]

    assert rates["cosine-short"] == pytest.approx(cosine_rates(5))
    assert rates["cosine-extended"] == pytest.approx(cosine_rates(5) + cosine_rates(10)[5:])


def test_resume_from_checkpoint_reports_each_incompatible_setting(files: Path, adapter_run: dict[str, Any]):
    extension = {
        "run_name": "extension",
        "resume_from_checkpoint": "run:first",
        "lora_config": LORA,
        "num_epochs": 3,
    }
    unchanged = write_yaml(files / "fits.yaml", settings(files, **extension))
    assert run_main_quickly(unchanged, "--dry-run").exit_code == 0

    message = error_of(
        files,
        "changed",
        **extension | {"learning_rate": 1e-3, "num_devices": 2, "lora_config": LORA | {"r": 8}},
    )
    for difference in ("learning_rate: 0.02 -> 0.001", "num_devices: 1 -> 2", "lora_config.r: 4 -> 8"):
        assert difference in message
    message = error_of(files, "rows", **extension, train_path=str(files / "more" / "train.jsonl"))
    assert_names(message, "train_path: ", "initial_adapter_model_ckpt_path: run:first")
    message = error_of(files, "done", **extension | {"num_epochs": 2})
    assert_names(message, "step 10 ")


def test_resume_reports_each_incompatible_setting(files: Path, adapter_run: dict[str, Any]):
    message = error_of(
        files, "same_run", run_name="first", lora_config=LORA, learning_rate=1e-3, num_devices=2
    )
    assert "learning_rate: 0.02 -> 0.001" in message
    assert "num_devices: 1 -> 2" in message


def test_nan_loss_stops_the_run_and_reports_the_rows(files: Path):
    """The step is not retried, and nothing is committed."""
    config = write_yaml(
        files / "diverging.yaml",
        settings(files, run_name="diverging", learning_rate=1e30, max_failures=3),
    )
    finished = run_main(config, "--json")
    assert finished.exit_code == 1
    reason = finished.result["reason"]
    assert "loss nan" in reason or "grad_norm" in reason
    assert re.search(rf"rows [\d, ]+.* {files / 'train.jsonl'}", reason)
    assert "checkpoint" in reason
    assert finished.result["last_checkpoint"] is None
    assert finished.result["failures"] == []
    assert finished.errors.count("step 1/") <= 1, "the step must not be retried"


@pytest.mark.parametrize("base_format", ["16bit", "4bit"])
def test_qlora_adapter_loads_on_a_16bit_base(files: Path, base_format: str):
    """QLoRA runs on CPU here, from a base model that is stored in 16 or in 4 bits."""
    model = files / "model"
    if base_format == "4bit":
        model = files / "model-4bit"
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained(
            files / "model", quantization_config=quantization, dtype=torch.bfloat16
        ).save_pretrained(model)
        AutoTokenizer.from_pretrained(files / "model").save_pretrained(model)
    qlora = {
        "model_id": str(model),
        "load_in_4bit": True,
        "optim": "adamw_8bit",
        "gradient_checkpointing": "unsloth",
        "dtype": "bf16",
        "lora_config": LORA,
        "run_name": f"qlora-{base_format}",
        "num_epochs": 1,
    }
    config = write_yaml(files / f"qlora-{base_format}.yaml", settings(files, **qlora))
    finished = run_main(config, "--json")
    assert finished.exit_code == 0, finished.errors
    first, last = (finished.result["eval_losses"][index]["eval_loss"] for index in (0, -1))
    assert last < 0.9 * first
    base = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    peft.PeftModel.from_pretrained(base, finished.result["last_checkpoint"])

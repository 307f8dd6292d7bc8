"""Every wrong input ends main.py with code 2 and one message: what, where, what to do. Nothing else is left behind."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config

from main import main
from tests.support.faults import on_a_small_disk, require_small_disks
from tests.support.front_door import run_main_quickly
from tests.support.jobs import PROJECT, Finished, command, environment, run_main, write_yaml
from tests.support.tiny_model import make_model, write_data
from utils.bucket import open_store, upload_directory
from utils.embedded_bucket import EmbeddedBucket

USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}

Refused = Callable[..., str]


def config_file(directory: Path, tiny_model: Path, **changes: Any) -> Path:
    """A config that trains, with some keys changed. Its runs would go to `directory`/runs."""
    train, valid = directory / "train.jsonl", directory / "valid.jsonl"
    if not train.exists():
        write_data(directory)
    plain = {
        "model_id": str(tiny_model),
        "train_path": str(train),
        "valid_path": str(valid),
        "context_length": 256,
        "num_epochs": 1,
        "device": "cpu",
        "storage_path": str(directory / "runs"),
        "output_dir": str(directory / "scratch"),
    }
    return write_yaml(directory / "config.yaml", plain | changes)


def message_of(finished: Finished) -> str:
    """The one message of a refusal."""
    assert "Traceback" not in finished.output + finished.errors
    assert finished.exit_code == 2, finished
    assert finished.output == ""
    lines = [line for line in finished.errors.splitlines() if not line.startswith("… ")]
    assert sum("error: " in line for line in lines) == 1, finished.errors
    assert lines[0].startswith("error: ")
    return "\n".join(lines).removeprefix("error: ")


@pytest.fixture
def refused(tiny_model: Path, tmp_path: Path) -> Refused:
    """Run main.py with keys changed and expect a refusal that leaves no run: returns its message."""

    def run(*arguments: str, variables: Mapping[str, str] | None = None, **changes: Any) -> str:
        config = config_file(tmp_path, tiny_model, **changes)
        finished = run_main_quickly(config, "--dry-run", *arguments, variables=variables)
        storage = changes.get("storage_path", str(tmp_path / "runs"))
        if storage.startswith("s3://anneal/"):
            assert open_store(storage).list() == []
        assert not (tmp_path / "runs").exists()
        return message_of(finished)

    return run


@pytest.fixture
def own_bucket(bucket: EmbeddedBucket) -> dict[str, str]:
    """The environment of somebody who has an S3 server of their own."""
    return {
        "AWS_ENDPOINT_URL_S3": bucket.endpoint,
        "AWS_ACCESS_KEY_ID": bucket.access_key,
        "AWS_SECRET_ACCESS_KEY": bucket.secret_key,
        "AWS_REGION": "us-east-1",
    }


@pytest.fixture
def damaged_model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def rows(directory: Path, *lines: Any) -> str:
    path = directory / "rows.jsonl"
    texts = [line if isinstance(line, str) else json.dumps({"messages": line}) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return str(path)


# --- The reference: nothing wrong, nothing refused ------------------------------------------------------------------


def test_a_right_config_passes_and_leaves_no_run_either(tiny_model: Path, tmp_path: Path):
    finished = run_main_quickly(config_file(tmp_path, tiny_model), "--dry-run", "--json")
    assert finished.exit_code == 0
    assert finished.result["train"]["rows"] == 40
    assert not (tmp_path / "runs").exists()


# --- Buckets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["train_path", "valid_path", "model_id", "storage_path"])
def test_a_bucket_that_does_not_exist(refused: Refused, own_bucket: dict[str, str], key: str):
    message = refused(variables=own_bucket, **{key: "s3://no-such-bucket/x"})
    assert message.startswith(f"{key}: ")
    assert "s3://no-such-bucket/x" in message
    assert "there is no bucket 'no-such-bucket'; create it, or correct the URI" in message


@pytest.mark.parametrize(
    "key",
    [
        "train_path",
        "model_id",
        "initial_base_model_ckpt_path",
        "initial_adapter_model_ckpt_path",
        "resume_from_checkpoint",
    ],
)
def test_an_object_that_does_not_exist(refused: Refused, bucket_uri: str, key: str):
    message = refused(storage_path=f"{bucket_uri}/runs", **{key: f"{bucket_uri}/nothing"})
    assert message.startswith(f"{key}: {bucket_uri}/nothing: the bucket exists, but has no such object")
    assert "Look at its spelling" in message


@pytest.mark.parametrize("key", ["train_path", "model_id", "storage_path"])
def test_an_access_key_that_nobody_knows(refused: Refused, own_bucket: dict[str, str], key: str):
    message = refused(variables=own_bucket | {"AWS_ACCESS_KEY_ID": "nobody"}, **{key: "s3://theirs/x"})
    assert message.startswith(f"{key}: ")
    assert "s3://theirs/x" in message
    assert "the access key is not known there; check AWS_ACCESS_KEY_ID or AWS_PROFILE" in message


def test_a_wrong_secret_key_is_told_and_not_repeated(refused: Refused, own_bucket: dict[str, str]):
    message = refused(
        variables=own_bucket | {"AWS_SECRET_ACCESS_KEY": "hunter2"}, train_path="s3://theirs/train.jsonl"
    )
    assert "s3://theirs/train.jsonl: the secret key is wrong; check AWS_SECRET_ACCESS_KEY" in message
    assert "hunter2" not in message


def test_no_credentials(refused: Refused, own_bucket: dict[str, str]):
    nowhere = {"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_CONFIG_FILE": "/dev/null"}
    message = refused(
        variables={"AWS_ENDPOINT_URL_S3": own_bucket["AWS_ENDPOINT_URL_S3"], **nowhere},
        train_path="s3://theirs/train.jsonl",
    )
    assert "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in message


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"AWS_PROFILE": "nobody"}, "AWS_PROFILE names 'nobody', and there is no such profile"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:99999"}, "check AWS_ENDPOINT_URL_S3"),
        ({"AWS_ENDPOINT_URL_S3": "127.0.0.1:9000"}, "check AWS_ENDPOINT_URL_S3"),
    ],
    ids=["profile", "port", "scheme"],
)
def test_a_variable_that_says_what_cannot_be(
    refused: Refused, own_bucket: dict[str, str], variables: dict[str, str], told: str
):
    message = refused(variables=own_bucket | variables, train_path="s3://theirs/train.jsonl")
    assert message.startswith("train_path: ")
    assert told in message


@pytest.mark.parametrize("key", ["train_path", "model_id", "storage_path", "resume_from_checkpoint"])
def test_an_endpoint_that_does_not_answer_is_told_within_seconds(
    refused: Refused, own_bucket: dict[str, str], key: str
):
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    began = time.monotonic()
    message = refused(
        variables=own_bucket | {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}"}, **{key: "s3://theirs/x"}
    )
    assert time.monotonic() - began < 20
    assert message.startswith(f"{key}: ")
    assert (
        f"the storage server 127.0.0.1:{port} does not answer; check the network and AWS_ENDPOINT" in message
    )


def test_a_storage_path_that_cannot_be_written(refused: Refused, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    message = refused(storage_path=str(tmp_path / "file" / "runs"))
    assert message.startswith(
        f"storage_path: cannot write to {tmp_path}/file/runs: {tmp_path}/file is a file"
    )
    assert "choose another place" in message


def test_an_output_dir_that_cannot_be_written(refused: Refused, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    message = refused(output_dir=str(tmp_path / "file" / "scratch"))
    assert message.startswith(f"output_dir: {tmp_path}/file/scratch cannot be made")
    assert "Name a directory that you may write to" in message


def test_target_modules_that_the_model_has_not(refused: Refused):
    message = refused(lora_config={"target_modules": ["nope"]})
    assert message.startswith("lora_config.target_modules: ['nope'] matches no matrix of ")
    assert "It has: " in message
    assert "q_proj" in message


def test_a_target_module_that_is_misspelt(tiny_model: Path, tmp_path: Path):
    changed = config_file(tmp_path, tiny_model, lora_config={"target_modules": ["q_proj", "v_porj"]})
    finished = run_main_quickly(changed, "--dry-run", "--json")
    assert finished.exit_code == 0
    assert "v_porj matches nothing in" in "".join(finished.result["warnings"])


def test_a_step_larger_than_the_data(tiny_model: Path, tmp_path: Path):
    changed = config_file(tmp_path, tiny_model, train_batch_size_per_device=64)
    finished = run_main_quickly(changed, "--dry-run", "--json")
    assert "a step takes 64 rows" in "".join(finished.result["warnings"])


# --- Data -------------------------------------------------------------------------------------------------------


def test_a_file_that_does_not_exist(refused: Refused, tmp_path: Path):
    message = refused(train_path=str(tmp_path / "nothing.jsonl"))
    assert message.startswith(f"train_path: cannot read {tmp_path}/nothing.jsonl: no such file")
    assert "Look at its spelling" in message


def test_a_directory_without_rows(refused: Refused, tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.md").write_text("# Notes")
    message = refused(train_path=str(tmp_path / "notes"))
    assert message.startswith(f"{tmp_path}/notes: none of the files there is read. Rows are in .jsonl")


def test_a_format_that_is_not_read(refused: Refused, tmp_path: Path):
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    assert "rows.xlsx: .xlsx files are not read. Write JSONL" in refused(
        train_path=str(tmp_path / "rows.xlsx")
    )


def test_an_empty_file(refused: Refused, tmp_path: Path):
    message = refused(train_path=rows(tmp_path))
    assert f"{tmp_path}/rows.jsonl: holds no rows. Name files with at least one row" in message


@pytest.mark.parametrize("key", ["train_path", "valid_path"])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{bad", "is not JSON"),
        ([ASSISTANT, USER, ASSISTANT], "message 1: an assistant message answers a user message"),
        ([USER, USER, ASSISTANT], "messages 1 and 2 are both from the user: roles take turns"),
        ([USER], "has no assistant turn: there is nothing to learn from it"),
    ],
)
def test_a_wrong_row(refused: Refused, tmp_path: Path, key: str, row: Any, reason: str):
    message = refused(**{key: rows(tmp_path, [USER, ASSISTANT], row)})
    assert message.startswith("1 of 2 rows cannot be trained on (1 ")
    assert f"{tmp_path}/rows.jsonl:2: {reason}" in message
    assert message.endswith("Mend or remove them, or leave them out with bad_rows: skip.")


def test_a_row_over_context_length(refused: Refused, tmp_path: Path):
    long = [USER, {"role": "assistant", "content": "1 2 3 " * 500}]
    message = refused(train_path=rows(tmp_path, [USER, ASSISTANT], long), long_rows="error")
    assert "long_rows is error, and of its rows 1 exceed 256 tokens" in message
    assert f"{tmp_path}/rows.jsonl:2: " in message
    assert "Raise context_length, shorten them, or set long_rows to truncate or drop" in message


def test_no_row_that_fits(refused: Refused):
    message = refused(context_length=4)
    assert "no row has a trained token within 4 tokens (40 rows dropped). Raise context_length" in message


@pytest.mark.parametrize(
    ("key", "uri", "advice"),
    [
        ("model_id", "nobody/no-such-model", "without a network, name a directory or an s3:// prefix"),
        (
            "train_path",
            "hf://datasets/nobody/no-such-rows",
            "to take what was loaded here before, or name a JSONL file",
        ),
    ],
)
def test_a_hub_that_cannot_be_reached(refused: Refused, key: str, uri: str, advice: str):
    message = refused(**{key: uri})
    assert f"{uri}: cannot be read from the Hugging Face hub (" in message
    assert advice in message


# --- Models -----------------------------------------------------------------------------------------------------


def test_a_model_without_weights(refused: Refused, damaged_model: Path):
    (damaged_model / "model.safetensors").unlink()
    message = refused(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: no weights (*.safetensors) beside config.json")
    assert "Copy them there" in message


def test_a_model_with_pickled_weights_only(refused: Refused, damaged_model: Path):
    (damaged_model / "model.safetensors").rename(damaged_model / "pytorch_model.bin")
    message = refused(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: its weights are pickled only (pytorch_model.bin)")
    assert "Save it as safetensors" in message


def test_cut_off_weights(refused: Refused, damaged_model: Path):
    weights = damaged_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refused(model_id=str(damaged_model))
    assert message.startswith(f"{weights}: has {weights.stat().st_size} bytes where its header asks for ")
    assert "cut off. Upload it again" in message


def test_cut_off_weights_in_a_bucket(refused: Refused, damaged_model: Path, bucket_uri: str):
    weights = damaged_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    store = open_store(f"{bucket_uri}/model")
    upload_directory(damaged_model, store, "", [path.name for path in damaged_model.iterdir()])
    message = refused(model_id=f"{bucket_uri}/model", storage_path=f"{bucket_uri}/runs")
    assert message.startswith(f"{bucket_uri}/model/model.safetensors: has ")
    assert "cut off. Upload it again" in message


def test_a_model_without_tokenizer(refused: Refused, damaged_model: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (damaged_model / name).unlink()
    message = refused(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: no tokenizer (tokenizer.json or tokenizer.model)")
    assert "Copy it there from where the model came from" in message


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"added_tokens": [], "model": {"type": "x"}}'])
def test_a_damaged_tokenizer(refused: Refused, damaged_model: Path, content: str):
    (damaged_model / "tokenizer.json").write_text(content)
    message = refused(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: its tokenizer cannot be loaded (")
    assert "Copy its tokenizer files again" in message


def test_a_model_without_chat_template(refused: Refused, damaged_model: Path):
    (damaged_model / "chat_template.jinja").unlink()
    message = refused(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: its tokenizer has no chat template")
    assert "Write chat_template (Jinja text or a file of it) or prompt_template" in message


def test_a_model_that_transformers_does_not_know(refused: Refused, damaged_model: Path):
    (damaged_model / "config.json").write_text('{"model_type": "nonesuch"}')
    message = refused(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: transformers cannot read its config.json (")
    assert "`nonesuch`" in message
    assert "Name a model that the installed transformers knows" in message


def test_an_adapter_in_the_models_place(refused: Refused, tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    message = refused(model_id=str(tmp_path / "adapter"))
    assert message.startswith(
        f"model {tmp_path}/adapter: config.json is missing (found: adapter_config.json)"
    )
    assert "name it as initial_adapter_model_ckpt_path" in message


def test_a_model_in_the_adapters_place(refused: Refused, tiny_model: Path):
    message = refused(initial_adapter_model_ckpt_path=str(tiny_model))
    assert message.startswith(f"adapter {tiny_model}: adapter_config.json is missing")
    assert "name it as initial_base_model_ckpt_path" in message


def test_a_run_that_is_not_there(refused: Refused):
    message = refused(initial_adapter_model_ckpt_path="run:nothing")
    assert message.startswith("run:nothing: there is no run ")
    assert "Look at its spelling and at storage_path" in message


def test_a_checkpoint_that_was_never_committed(refused: Refused, tiny_model: Path):
    message = refused(resume_from_checkpoint=str(tiny_model))
    assert message.startswith(f"{tiny_model}: no MANIFEST.json, so no committed checkpoint")
    assert "Name one that result.json or the end of a run named" in message


# --- Settings ---------------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there(refused: Refused):
    message = refused(device="cuda", variables={"CUDA_VISIBLE_DEVICES": ""})
    assert message.startswith("device: cuda, and this machine has no CUDA device")
    assert "Write device: cpu, or set RAY_ADDRESS" in message


@pytest.mark.parametrize(
    ("resource", "planned_for", "needed"),
    [("accelerator_type:H100", "fits H100 (79.0 GiB)", "H100"), ("GPU", "cuda, 2 workers", "CUDA device")],
)
def test_a_gpu_that_workers_ask_for_is_planned_for_and_not_trained_without(
    resource: str, planned_for: str, needed: str, tiny_model: Path, tmp_path: Path
):
    asks = {"device": "auto", "worker_resources": {resource: 0.001}, "num_devices": 2}
    config = config_file(tmp_path, tiny_model, **asks)
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    planned = run_main_quickly(config, "--dry-run", variables=no_gpu)
    assert planned.exit_code == 0, planned.errors
    assert planned_for in planned.output
    message = message_of(run_main_quickly(config, variables=no_gpu))
    assert message.startswith(
        f"the run needs 2 x {needed}, and this machine has 0 CUDA devices. Set RAY_ADDRESS"
    )
    assert not (tmp_path / "runs" / "config").exists()


def test_a_length_that_nobody_gave_is_said(tiny_model: Path, tmp_path: Path):
    planned = run_main_quickly(config_file(tmp_path, tiny_model, num_epochs=None), "--dry-run", "--json")
    assert planned.exit_code == 0, planned.errors
    report = planned.result
    epochs = report["steps"] // report["steps_per_epoch"]
    assert report["steps"] >= 100 > (epochs - 1) * report["steps_per_epoch"]
    said = f"none of num_epochs, max_steps and min_update_steps is given: {epochs} epochs, the fewest that make 100 steps"
    assert said in report["warnings"]


def test_attention_that_torch_cannot_compute_is_said(tmp_path: Path):
    gemma = make_model(tmp_path / "gemma", kind=Gemma2Config, head_dim=16, query_pre_attn_scalar=16)
    planned = run_main_quickly(config_file(tmp_path, gemma), "--dry-run", "--json")
    assert planned.exit_code == 0, planned.errors
    said = "caps the scores of its attention, which torch's own kernels leave out"
    assert sum(said in warning for warning in planned.result["warnings"]) == 1


def test_an_unknown_key(refused: Refused, tmp_path: Path):
    message = refused(epochs=3)
    assert message == f"{tmp_path}/config.yaml:9: `epochs` is not a key: did you mean `num_epochs`?"


def test_a_deepspeed_file_that_does_not_exist(refused: Refused, tmp_path: Path):
    message = refused(deepspeed={"config_path": str(tmp_path / "ds.json")})
    assert message.startswith(f"deepspeed: {tmp_path}/ds.json does not exist. Name a preset")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is no DeepSpeed configuration"),
        ('{"zero_optimization": 3}', "is no DeepSpeed configuration"),
        (
            '{"zero_optimization": {"stage": "three"}}',
            "has `zero_optimization.stage` 'three'. Write 0, 1, 2 or 3",
        ),
        ('{"optimizer": {}}', "has a block `optimizer`. Take it out, and say it in the YAML"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used(refused: Refused, tmp_path: Path, content: str, reason: str):
    (tmp_path / "ds.json").write_text(content)
    message = refused(deepspeed={"config_path": str(tmp_path / "ds.json")})
    assert message.startswith(f"deepspeed: {tmp_path}/ds.json {reason}")


def test_with_json_a_refusal_prints_no_json(refused: Refused, tmp_path: Path):
    assert "is not JSON" in refused("--json", train_path=rows(tmp_path, "{bad"))


@pytest.mark.parametrize(
    "arguments",
    [
        [""],
        ["a.yaml", "--submit", ""],
        ["show", ""],
        ["export", "run:a", "--to", ""],
        ["compare", "run:a", "--picture", ""],
    ],
    ids=str,
)
def test_an_argument_from_a_variable_that_is_not_set(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    """It would mean the working directory, or nothing."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: an argument is empty: is a shell variable unset?\n")


# --- Real starts of the interpreter: what the others leave out ------------------------------------------------------


def test_an_unknown_option(tiny_model: Path, tmp_path: Path):
    finished = run_main(config_file(tmp_path, tiny_model), "--dryrun")
    assert (finished.exit_code, finished.output) == (2, "")
    assert len(finished.errors.splitlines()) == 1
    assert "--dryrun" in finished.errors and "did you mean --dry-run" in finished.errors
    assert not (tmp_path / "runs").exists()


def test_a_refusal_of_a_run_comes_before_any_cluster(tiny_model: Path, tmp_path: Path):
    config = config_file(tmp_path, tiny_model, valid_path=rows(tmp_path, [USER]))
    finished = run_main(config, "--json")
    assert f"{tmp_path}/rows.jsonl:1: has no assistant turn" in message_of(finished)
    assert "starting the workers" not in finished.errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("port", "told"),
    [
        (1, "nothing answers at 127.0.0.1:1"),
        (99999, "127.0.0.1:99999 names the port 99999, and ports end at 65535"),
    ],
)
def test_a_cluster_that_does_not_answer(tiny_model: Path, tmp_path: Path, port: int, told: str):
    config = config_file(tmp_path, tiny_model)
    cluster = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    finished = run_main(config, "--json", "device=cpu", variables=cluster, timeout=60)
    assert finished.exit_code == 2
    assert f"error: RAY_ADDRESS: {told}" in finished.errors.splitlines()[-1]
    assert "Traceback" not in finished.errors
    assert not (tmp_path / "runs").exists()


def on_a_disk_of_300_kb(directory: Path, config: Path) -> Finished:
    """Run main.py --dry-run where `directory` is a disk of its own, which only that process sees."""
    directory.mkdir()
    require_small_disks(directory)
    done = subprocess.run(
        [*on_a_small_disk(directory, "300k"), *command(config, "--dry-run")],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def test_a_disk_that_is_too_small_for_the_model(tiny_model: Path, tmp_path: Path, bucket_uri: str):
    store = open_store(f"{bucket_uri}/model")
    upload_directory(tiny_model, store, "", [path.name for path in tiny_model.iterdir()])
    config = config_file(
        tmp_path, tiny_model, model_id=f"{bucket_uri}/model", output_dir=str(tmp_path / "small")
    )
    message = message_of(on_a_disk_of_300_kb(tmp_path / "small", config))
    assert message.startswith(f"model {bucket_uri}/model: needs ")
    assert f"{tmp_path}/small has " in message
    assert "Free some, or set output_dir to a larger disk" in message
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_is_too_small_for_the_tokens(tiny_model: Path, tmp_path: Path):
    write_data(tmp_path, train_rows=1500)
    config = config_file(tmp_path, tiny_model, output_dir=str(tmp_path / "small"))
    message = message_of(on_a_disk_of_300_kb(tmp_path / "small", config))
    assert message.startswith(f"{tmp_path}/train.jsonl: the tokens cannot be written to {tmp_path}/small/")
    assert "Free some space, or set output_dir to another disk" in message
    assert not (tmp_path / "runs").exists()

"""Tests of invalid input: main.py exits with code 2 and one error that says what failed, where, and the fix. It creates no run."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, GPTNeoXConfig, MixtralConfig, Phi3Config, Qwen2Config

from main import main
from tests.support.adapters import change_tensors, write_adapter
from tests.support.faults import require_small_disks, small_disk_prefix
from tests.support.front_door import run_main_quickly
from tests.support.grids import only_in_test_resume
from tests.support.jobs import PROJECT, CompletedCommand, command, environment, run_main, write_yaml
from tests.support.messages import assert_names
from tests.support.tiny_model import make_model, make_tokenizer, write_data, write_preference_pairs
from utils.storage.bucket import open_store, upload_directory
from utils.storage.embedded_bucket import EmbeddedBucket

USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}

Rejected = Callable[..., str]


def config_file(directory: Path, tiny_model: Path, **changes: Any) -> Path:
    """Write a valid config with some keys changed, whose runs would be stored in `directory`/runs; return its path."""
    train, valid = directory / "train.jsonl", directory / "valid.jsonl"
    if not train.exists():
        write_data(directory)
    defaults = {
        "model_id": str(tiny_model),
        "train_path": str(train),
        "valid_path": str(valid),
        "context_length": 256,
        "num_epochs": 1,
        "device": "cpu",
        "storage_path": str(directory / "runs"),
        "output_dir": str(directory / "scratch"),
    }
    return write_yaml(directory / "config.yaml", defaults | changes)


def message_of(finished: CompletedCommand) -> str:
    """Return the message of the only error that main.py printed."""
    assert "Traceback" not in finished.output + finished.errors
    assert finished.exit_code == 2, finished
    assert finished.output == ""
    lines = [line for line in finished.errors.splitlines() if not line.startswith("… ")]
    assert sum("error: " in line for line in lines) == 1, finished.errors
    assert lines[0].startswith("error: ")
    return "\n".join(lines).removeprefix("error: ")


@pytest.fixture
def rejected(tiny_model: Path, tmp_path: Path) -> Rejected:
    """Return a function that runs main.py with changed keys, expects an error and no run, and returns the message."""

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
    """Return the environment variables for a user's own S3 server."""
    return {
        "AWS_ENDPOINT_URL_S3": bucket.endpoint,
        "AWS_ACCESS_KEY_ID": bucket.access_key,
        "AWS_SECRET_ACCESS_KEY": bucket.secret_key,
        "AWS_REGION": "us-east-1",
    }


@pytest.fixture
def damaged_model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def write_rows(directory: Path, *lines: Any) -> str:
    """Write rows.jsonl from raw lines or lists of messages; return its path."""
    path = directory / "rows.jsonl"
    texts = [line if isinstance(line, str) else json.dumps({"messages": line}) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return str(path)


# --- A valid config, for reference --------------------------------------------------------------------------


def test_valid_config_passes_without_creating_a_run(tiny_model: Path, tmp_path: Path):
    finished = run_main_quickly(config_file(tmp_path, tiny_model), "--dry-run", "--json")
    assert finished.exit_code == 0
    assert finished.result["train"]["rows"] == 40
    assert not (tmp_path / "runs").exists()


# --- Workers ----------------------------------------------------------------------------------------------------


def test_workers_that_cannot_share_the_heads_raise_an_error(rejected: Rejected, tiny_model: Path):
    message = rejected(sequence_parallel_size=3, num_devices=3)
    assert_names(message, "`sequence_parallel_size`", "3 workers", "4 heads", str(tiny_model), "1 or 2 or 4")


def test_workers_that_cannot_be_divided_into_groups_raise_an_error(rejected: Rejected):
    message = rejected(sequence_parallel_size=2, num_devices=3)
    assert_names(message, "config.yaml:", "`sequence_parallel_size` is 2", "`num_devices` (3)", "1 or 3")


# --- Buckets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["train_path", "valid_path", "model_id", "storage_path"])
def test_missing_bucket_raises_an_error_with_key_and_uri(
    rejected: Rejected, own_bucket: dict[str, str], key: str
):
    message = rejected(variables=own_bucket, **{key: "s3://no-such-bucket/x"})
    assert message.startswith(f"{key}: ")
    assert_names(message, "s3://no-such-bucket/x", "no bucket", "'no-such-bucket'")


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
def test_missing_object_raises_an_error_with_key_and_uri(rejected: Rejected, bucket_uri: str, key: str):
    message = rejected(storage_path=f"{bucket_uri}/runs", **{key: f"{bucket_uri}/nothing"})
    assert message.startswith(f"{key}: {bucket_uri}/nothing: ")
    assert_names(message, "no such object", "spelling")


@pytest.mark.parametrize("key", ["train_path", "model_id", "storage_path"])
def test_unknown_access_key_raises_an_error_with_the_variables(
    rejected: Rejected, own_bucket: dict[str, str], key: str
):
    message = rejected(variables=own_bucket | {"AWS_ACCESS_KEY_ID": "nobody"}, **{key: "s3://theirs/x"})
    assert message.startswith(f"{key}: ")
    assert_names(message, "s3://theirs/x", "access key", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")


def test_wrong_secret_key_error_does_not_contain_the_key(rejected: Rejected, own_bucket: dict[str, str]):
    message = rejected(
        variables=own_bucket | {"AWS_SECRET_ACCESS_KEY": "hunter2"}, train_path="s3://theirs/train.jsonl"
    )
    assert_names(message, "s3://theirs/train.jsonl: ", "AWS_SECRET_ACCESS_KEY")
    assert "hunter2" not in message


def test_missing_credentials_raise_an_error_with_the_variables(
    rejected: Rejected, own_bucket: dict[str, str]
):
    no_files = {"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_CONFIG_FILE": "/dev/null"}
    message = rejected(
        variables={"AWS_ENDPOINT_URL_S3": own_bucket["AWS_ENDPOINT_URL_S3"], **no_files},
        train_path="s3://theirs/train.jsonl",
    )
    assert_names(message, "no credentials", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE")


@pytest.mark.parametrize(
    ("variables", "facts"),
    [
        ({"AWS_PROFILE": "nobody"}, ("AWS_PROFILE", "'nobody'")),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:99999"}, ("AWS_ENDPOINT_URL_S3",)),
        ({"AWS_ENDPOINT_URL_S3": "127.0.0.1:9000"}, ("AWS_ENDPOINT_URL_S3",)),
    ],
    ids=["profile", "port", "scheme"],
)
def test_invalid_aws_variable_raises_an_error_with_its_name(
    rejected: Rejected, own_bucket: dict[str, str], variables: dict[str, str], facts: tuple[str, ...]
):
    message = rejected(variables=own_bucket | variables, train_path="s3://theirs/train.jsonl")
    assert message.startswith("train_path: ")
    assert_names(message, *facts)


@pytest.mark.parametrize(
    "key",
    [
        "train_path",
        *(
            pytest.param(key, marks=pytest.mark.slow)
            for key in ("model_id", "storage_path", "resume_from_checkpoint")
        ),
    ],
)
def test_unreachable_endpoint_raises_an_error_within_20_seconds(
    rejected: Rejected, own_bucket: dict[str, str], key: str
):
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    started = time.monotonic()
    message = rejected(
        variables=own_bucket | {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}"}, **{key: "s3://theirs/x"}
    )
    assert time.monotonic() - started < 20
    assert message.startswith(f"{key}: ")
    assert_names(message, f"127.0.0.1:{port}", "AWS_ENDPOINT")


def test_unwritable_storage_path_raises_an_error_with_the_obstructing_file(
    rejected: Rejected, tmp_path: Path
):
    (tmp_path / "file").write_text("a file instead of a directory")
    message = rejected(storage_path=str(tmp_path / "file" / "runs"))
    assert message.startswith("storage_path: ")
    assert_names(message, f"{tmp_path}/file/runs", f"{tmp_path}/file is a file")


def test_unwritable_output_dir_raises_an_error_with_its_path(rejected: Rejected, tmp_path: Path):
    (tmp_path / "file").write_text("a file instead of a directory")
    message = rejected(output_dir=str(tmp_path / "file" / "scratch"))
    assert message.startswith(f"output_dir: {tmp_path}/file/scratch ")


def test_read_only_output_dir_raises_an_error_with_its_path(tiny_model: Path, tmp_path: Path):
    config = config_file(tmp_path, tiny_model, output_dir=str(tmp_path / "small"))
    finished = dry_run_on_disk(tmp_path / "small", config, "300k,ro")
    assert_names(message_of(finished), f"output_dir: {tmp_path}/small ", "Read-only", "write permission")


def test_full_output_dir_raises_an_error_with_its_path(tiny_model: Path, tmp_path: Path):
    config = config_file(tmp_path, tiny_model, output_dir=str(tmp_path / "small"))
    finished = dry_run_on_disk(tmp_path / "small", config, "16k")
    assert_names(message_of(finished), f"output_dir: {tmp_path}/small ", "No space left", "larger disk")


@pytest.mark.parametrize("name", ["logs", "cache", "cache/prepared"])
def test_file_in_the_place_of_a_scratch_directory_raises_an_error_with_its_path(
    rejected: Rejected, tmp_path: Path, name: str
):
    file = tmp_path / "scratch" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    assert_names(rejected(), f"output_dir: {file}", "write permission")


@pytest.mark.slow
@only_in_test_resume
def test_worker_that_cannot_write_its_log_fails_the_run_once(tiny_model: Path, tmp_path: Path):
    config = config_file(tmp_path, tiny_model, run_name="one")
    log = tmp_path / "scratch" / "logs" / "one"
    log.parent.mkdir(parents=True)
    log.write_text("")
    finished = run_main(config)
    assert finished.exit_code == 1
    assert "Traceback" not in finished.errors
    assert "restart" not in finished.errors
    assert_names(finished.errors, f"output_dir: {log}", "write permission")


def test_invalid_cache_limit_is_rejected_before_anything_is_read(rejected: Rejected):
    message = rejected(model_id="s3://nowhere/x", variables={"ANNEAL_CACHE_LIMIT": "lots"})
    assert_names(message, "ANNEAL_CACHE_LIMIT=lots", "200GiB")


def test_unknown_target_modules_raise_an_error_with_modules_of_the_model(rejected: Rejected):
    message = rejected(lora_config={"target_modules": ["nope"]})
    assert message.startswith("lora_config.target_modules: ['nope'] ")
    assert "q_proj" in message


def test_one_misspelt_target_module_is_a_warning(tiny_model: Path, tmp_path: Path):
    changed = config_file(tmp_path, tiny_model, lora_config={"target_modules": ["q_proj", "v_porj"]})
    finished = run_main_quickly(changed, "--dry-run", "--json")
    assert finished.exit_code == 0
    assert sum("v_porj" in warning for warning in finished.result["warnings"]) == 1


def test_excluded_module_that_does_not_exist_is_a_warning(tiny_model: Path, tmp_path: Path):
    lora = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["qproj", "v_proj"]}
    changed = config_file(tmp_path, tiny_model, lora_config=lora)
    finished = run_main_quickly(changed, "--dry-run", "--json")
    assert finished.exit_code == 0
    (warning,) = [each for each in finished.result["warnings"] if "exclude_modules" in each]
    assert warning.startswith("lora_config.exclude_modules: qproj matches no module ")


def test_adapter_on_the_head_is_an_error_however_it_is_named(rejected: Rejected, tmp_path: Path):
    """GPT-NeoX's files call the head embed_out, and transformers calls it lm_head. The files of a tied model have no head."""
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    neox = make_model(tmp_path / "neox", kind=GPTNeoXConfig)
    for model, module in ((tied, "q_proj"), (neox, "query_key_value")):
        for targets in ([module, "lm_head"], f".*({module}|lm_head)"):
            message = rejected(model_id=str(model), lora_config={"target_modules": targets})
            assert_names(message, "lora_config: target_modules ", "lm_head, the LM head", "modules_to_save")
    changed = config_file(tmp_path, neox, lora_config={"target_modules": ["query_key_value", "embed_out"]})
    finished = run_main_quickly(changed, "--dry-run", "--json")
    assert sum("embed_out matches no module" in warning for warning in finished.result["warnings"]) == 1


def test_step_larger_than_the_data_is_a_warning(tiny_model: Path, tmp_path: Path):
    changed = config_file(tmp_path, tiny_model, train_batch_size_per_device=64)
    finished = run_main_quickly(changed, "--dry-run", "--json")
    assert sum("64 rows" in warning for warning in finished.result["warnings"]) == 1


# --- Data -------------------------------------------------------------------------------------------------------


def test_missing_data_file_raises_an_error_with_its_path(rejected: Rejected, tmp_path: Path):
    message = rejected(train_path=str(tmp_path / "nothing.jsonl"))
    assert message.startswith("train_path: ")
    assert_names(message, f"{tmp_path}/nothing.jsonl: no such file", "spelling")


def test_directory_without_rows_raises_an_error_with_the_formats(rejected: Rejected, tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.md").write_text("# Notes")
    message = rejected(train_path=str(tmp_path / "notes"))
    assert message.startswith(f"{tmp_path}/notes: ")
    assert_names(message, ".jsonl")


def test_unsupported_format_raises_an_error_with_supported_formats(rejected: Rejected, tmp_path: Path):
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    message = rejected(train_path=str(tmp_path / "rows.xlsx"))
    assert_names(message, f"{tmp_path}/rows.xlsx: ", ".xlsx ", "JSONL")


def test_empty_data_file_raises_an_error_with_its_path(rejected: Rejected, tmp_path: Path):
    message = rejected(train_path=write_rows(tmp_path))
    assert_names(message, f"{tmp_path}/rows.jsonl: ", "no rows")


@pytest.mark.parametrize("key", ["train_path", "valid_path"])
@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ("{bad", ("JSON",)),
        ([{"role": "tool", "content": "4"}, USER, ASSISTANT], ("message 1:", "tool_calls")),
        ([USER, {"role": "robot", "content": "4"}], ("message 2 ", "'robot'")),
        ([USER], ("no assistant",)),
    ],
)
def test_invalid_row_raises_an_error_with_file_line_and_reason(
    rejected: Rejected, tmp_path: Path, key: str, row: Any, facts: tuple[str, ...]
):
    message = rejected(**{key: write_rows(tmp_path, [USER, ASSISTANT], row)})
    assert message.startswith("1 of 2 rows ")
    (line,) = [line for line in message.splitlines() if line.startswith(f"{tmp_path}/rows.jsonl:2: ")]
    assert_names(line, *facts)
    assert "bad_rows: skip" in message.splitlines()[-1]


def test_too_long_row_raises_an_error_with_the_limit_and_the_options(rejected: Rejected, tmp_path: Path):
    long = [USER, {"role": "assistant", "content": "1 2 3 " * 500}]
    message = rejected(train_path=write_rows(tmp_path, [USER, ASSISTANT], long), long_rows="error")
    assert_names(message, "long_rows", "256 tokens", f"{tmp_path}/rows.jsonl:2: ")
    assert_names(message, "context_length", "truncate", "drop")


def test_context_length_that_no_row_fits_is_an_error(rejected: Rejected):
    message = rejected(context_length=4)
    assert_names(message, "4 tokens", "40 rows", "context_length")


@pytest.mark.parametrize(
    ("key", "uri", "advice"),
    [
        ("model_id", "nobody/no-such-model", "s3://"),
        (
            "train_path",
            "hf://datasets/nobody/no-such-rows",
            "HF_HUB_OFFLINE=1",
        ),
    ],
)
def test_unreachable_hub_raises_an_error_with_advice(rejected: Rejected, key: str, uri: str, advice: str):
    message = rejected(**{key: uri})
    assert_names(message, f"{uri}: ", "Hugging Face")
    assert advice in message


# --- Models -----------------------------------------------------------------------------------------------------


def test_model_without_weights_raises_an_error_with_the_expected_files(
    rejected: Rejected, damaged_model: Path
):
    (damaged_model / "model.safetensors").unlink()
    message = rejected(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: ")
    assert_names(message, "no weights", "*.safetensors")


def test_model_with_only_pickled_weights_is_an_error(rejected: Rejected, damaged_model: Path):
    (damaged_model / "model.safetensors").rename(damaged_model / "pytorch_model.bin")
    message = rejected(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: ")
    assert_names(message, "pytorch_model.bin", "safetensors")


def test_truncated_weights_raise_an_error_with_both_sizes(rejected: Rejected, damaged_model: Path):
    weights = damaged_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = rejected(model_id=str(damaged_model))
    assert message.startswith(f"{weights}: ")
    assert_names(message, f"{weights.stat().st_size} bytes", f"{weights.stat().st_size + 1000}")


def test_truncated_weights_in_a_bucket_raise_an_error_with_both_sizes(
    rejected: Rejected, damaged_model: Path, bucket_uri: str
):
    weights = damaged_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    store = open_store(f"{bucket_uri}/model")
    upload_directory(damaged_model, store, "", [path.name for path in damaged_model.iterdir()])
    message = rejected(model_id=f"{bucket_uri}/model", storage_path=f"{bucket_uri}/runs")
    assert message.startswith(f"{bucket_uri}/model/model.safetensors: ")
    assert_names(message, f"{weights.stat().st_size} bytes", f"{weights.stat().st_size + 1000}")


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"vocab_size": 600}, ("lm_head.weight", "[600, 64]", "[512, 64]", "model.safetensors")),
        ({"num_hidden_layers": 3}, ("model.layers.2.", "missing", "model.safetensors")),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            ("quantization_config", "gptq", "16-bit"),
        ),
        ({"quantization_config": {"load_in_8bit": True}}, ("quantization_config", "8 bits", "16-bit")),
        ({"quantization_config": {"load_in_4bit": True}}, ("4 bits", "load_in_4bit: true")),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
            ("own.Own", "trust_remote_code: true"),
        ),
        ({"hidden_act": "nonesuch"}, ("config.json", "nonesuch")),
        ({"quantization_config": {}}, ("quantization_config", "does not name", "remove quantization_config")),
        ({"return_dict": False}, ("config.json: return_dict", "Remove return_dict")),
        ({"text_config": {"hidden_size": 5}}, ("config.json: text_config", "Remove text_config")),
        ({"architectures": 5}, ("config.json", "architectures")),
    ],
    ids=str,
)
def test_model_that_the_worker_could_not_load_is_rejected(
    settings: dict[str, Any], facts: tuple[str, ...], rejected: Rejected, damaged_model: Path
):
    config = json.loads((damaged_model / "config.json").read_text())
    (damaged_model / "config.json").write_text(json.dumps(config | settings))
    message = rejected(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: ")
    assert_names(message, *facts)


def test_index_without_shards_is_rejected_with_its_key(rejected: Rejected, damaged_model: Path):
    index = damaged_model / "model.safetensors.index.json"
    index.write_text("{}")
    message = rejected(model_id=str(damaged_model))
    assert message.startswith(f"{index}: weight_map ")


@pytest.mark.parametrize(
    "key", ["initial_adapter_model_ckpt_path", "initial_base_model_ckpt_path", "resume_from_checkpoint"]
)
def test_file_in_the_place_of_a_checkpoint_is_named(rejected: Rejected, tiny_model: Path, key: str):
    message = rejected(**{key: str(tiny_model / "model.safetensors")})
    assert_names(message, f"{tiny_model}/model.safetensors is a file", f"such as {tiny_model}")


def test_adapter_beside_the_base_model_is_rejected(rejected: Rejected, damaged_model: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", damaged_model)
    for file in adapter.iterdir():
        shutil.copy(file, damaged_model)
    message = rejected(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: ")
    assert_names(
        message, "adapter_config.json", "adapter_model.safetensors", "initial_adapter_model_ckpt_path"
    )


def test_nan_in_the_base_model_is_rejected_with_file_and_tensor(rejected: Rejected, damaged_model: Path):
    weights = damaged_model / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][5] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    message = rejected(model_id=str(damaged_model))
    assert message.startswith(f"{weights}: the tensor model.norm.weight contains NaN")


def test_model_without_tokenizer_raises_an_error_with_the_expected_files(
    rejected: Rejected, damaged_model: Path
):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (damaged_model / name).unlink()
    message = rejected(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: ")
    assert_names(message, "no tokenizer", "tokenizer.json", "tokenizer.model")


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"added_tokens": [], "model": {"type": "x"}}'])
def test_damaged_tokenizer_raises_an_error_with_its_model(
    rejected: Rejected, damaged_model: Path, content: str
):
    (damaged_model / "tokenizer.json").write_text(content)
    message = rejected(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: ")
    assert_names(message, "tokenizer", "loaded (")


def test_model_without_chat_template_raises_an_error_with_alternatives(
    rejected: Rejected, damaged_model: Path
):
    (damaged_model / "chat_template.jinja").unlink()
    message = rejected(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: ")
    assert_names(message, "no chat template", "chat_template", "prompt_template")


def test_unknown_model_type_raises_an_error_with_the_type(rejected: Rejected, damaged_model: Path):
    (damaged_model / "config.json").write_text('{"model_type": "nonesuch"}')
    message = rejected(model_id=str(damaged_model))
    assert message.startswith(f"model {damaged_model}: ")
    assert_names(message, "transformers", "config.json", "`nonesuch`")


def test_adapter_as_model_id_raises_an_error_with_the_adapter_key(rejected: Rejected, tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    message = rejected(model_id=str(tmp_path / "adapter"))
    assert message.startswith(f"model {tmp_path}/adapter: ")
    assert_names(message, "config.json is missing", "adapter_config.json", "initial_adapter_model_ckpt_path")


def test_adapter_whose_file_differs_from_its_config_raises_an_error_with_the_tensor(
    rejected: Rejected, tiny_model: Path, tmp_path: Path
):
    adapter = write_adapter(tmp_path / "adapter", tiny_model)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    change_tensors(adapter, lambda tensors: {name: value for name, value in tensors.items() if name != first})
    message = rejected(initial_adapter_model_ckpt_path=str(adapter))
    assert message.startswith(f"initial_adapter_model_ckpt_path: {adapter}/adapter_model.safetensors ")
    assert_names(message, first, "missing", "model_id")
    change_tensors(adapter, lambda tensors: {**tensors, first: torch.full((64, 4), float("nan"))})
    message = rejected(initial_adapter_model_ckpt_path=str(adapter))
    assert_names(message, f"{adapter}/adapter_model.safetensors", first, "NaN")


@pytest.mark.parametrize(
    ("changes", "place", "fix"),
    [
        ({"new_tokens": ["<|im_end|>"]}, "new_tokens: '<|im_end|>' ", "Remove"),
        ({"new_tokens": ["<a>"], "lora_config": {}, "deepspeed": "zero_3"}, "new_tokens: ", "zero_2"),
        (
            {"lora_config": {"trainable_token_indices": [1]}, "deepspeed": "zero_3"},
            "trainable_token_indices: ",
            "zero_2",
        ),
        (
            {"new_tokens": ["<a>"], "lora_config": {"modules_to_save": ["lm_head"]}},
            "lora_config.modules_to_save: lm_head ",
            "new_tokens",
        ),
        (
            {"new_tokens": ["<a>"], "lora_config": {}, "export": {"merge": False}},
            "merge: false ",
            "trainable_token_indices",
        ),
        ({"new_tokens": ["<a>"], "kernels": "unsloth"}, "kernels: unsloth: ", "new_tokens"),
        ({"eval_samples": 2, "kernels": "unsloth"}, "kernels: unsloth: ", "eval_samples"),
        (
            {"push_to_hub": True, "hub_model_id": "org/model"},
            "push_to_hub: HF_HUB_OFFLINE ",
            "remove push_to_hub",
        ),
    ],
    ids=str,
)
def test_new_tokens_samples_and_pushes_that_cannot_work_are_rejected(
    rejected: Rejected, changes: dict[str, Any], place: str, fix: str
):
    message = rejected(**changes)
    assert message.startswith(place)
    assert fix in message


@pytest.mark.parametrize(
    ("lora", "place", "fix"),
    [
        ({"modules_to_save": ["lm_heda"]}, "lora_config.modules_to_save: lm_heda ", "Correct the name"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lora_config: target_modules ", "modules_to_save"),
        ({"lora_bias": True}, "lora_config: lora_bias ", "Remove lora_bias"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, "lora_config: PEFT ", "not supported"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 5]},
            "lora_config.layers_to_transform: 5 ",
            "Correct the name",
        ),
        ({"trainable_token_indices": [600]}, "lora_config: trainable_token_indices ", "new_tokens"),
        ({"exclude_modules": ["mlp"]}, "lora_config.exclude_modules: ['mlp'] does not exclude ", "list"),
        (
            {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 64, "layers.0.self_attn.q_proj": 2}},
            "lora_config: alpha_pattern: q_proj and layers.0.self_attn.q_proj ",
            "different modules",
        ),
    ],
    ids=str,
)
def test_adapter_that_would_train_nothing_raises_an_error_with_the_key(
    rejected: Rejected, lora: dict[str, Any], place: str, fix: str
):
    message = rejected(lora_config=lora)
    assert message.startswith(place)
    assert fix in message


def test_adapter_that_vllm_does_not_load_raises_an_error_before_training(rejected: Rejected, tmp_path: Path):
    """`all-linear` adapts a mixture's fused experts, which no key of the YAML names."""
    model = make_model(tmp_path / "mixtral", kind=MixtralConfig, num_local_experts=4)
    message = rejected(model_id=str(model), lora_config={"r": 4}, export={"merge": False})
    assert_names(message, "merge: false ", "vLLM", "target_parameters", "merge: true")
    adapter = write_adapter(
        tmp_path / "adapter", model, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    message = rejected(
        model_id=str(model), initial_adapter_model_ckpt_path=str(adapter), export={"merge": False}
    )
    assert_names(message, "merge: false ", "modules_to_save")
    adapter = write_adapter(tmp_path / "dora", model, r=4, target_modules=["q_proj"], use_dora=True)
    message = rejected(
        model_id=str(model),
        initial_adapter_model_ckpt_path=str(adapter),
        lora_config={"r": 4},
        export={"merge": False},
    )
    assert_names(message, "merge: false ", "use_dora")


def test_plan_warns_of_rows_that_change_the_rotary_frequencies_of_others(tmp_path: Path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = make_model(
        tmp_path / "phi",
        kind=Phi3Config,
        original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4} | factors,
    )
    config = config_file(tmp_path, model, train_batch_size_per_device=2)
    planned = run_main_quickly(config, "--dry-run", "--json")
    (warning,) = [text for text in planned.result["warnings"] if "RoPE" in text]
    assert_names(warning, "phi", "16 tokens", "context_length: 16")


def test_kernels_are_chosen_after_the_continued_adapter_is_read(
    rejected: Rejected, tiny_model: Path, tmp_path: Path
):
    gpu = {"device": "auto", "worker_resources": {"accelerator_type:H100": 0.001}}
    for name, provider in (("use_rslora", "unsloth"), ("use_dora", "liger")):
        adapter = write_adapter(tmp_path / name, tiny_model, target_modules=["q_proj"], **{name: True})
        config = config_file(tmp_path, tiny_model, initial_adapter_model_ckpt_path=str(adapter), **gpu)
        planned = run_main_quickly(config, "--dry-run", "--json", variables={"CUDA_VISIBLE_DEVICES": ""})
        assert planned.result["kernels"].startswith(f"{provider} (auto: "), planned.result["kernels"]
    message = rejected(initial_adapter_model_ckpt_path=str(tmp_path / "use_dora"), kernels="unsloth")
    assert_names(message, "kernels: unsloth: ", "the continued adapter's use_dora", "kernels: auto")


def test_unsloth_is_not_chosen_where_it_would_change_rope(
    rejected: Rejected, tiny_model: Path, tmp_path: Path
):
    """Above the model's positions, it divides those of all sequences (`_extended_rope_scaling` in unsloth/models/llama.py)."""
    gpu = {"device": "auto", "worker_resources": {"accelerator_type:H100": 0.001}, "lora_config": {"r": 4}}
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    for tokens, provider in ((512, "unsloth"), (520, "liger")):
        config = config_file(tmp_path, tiny_model, context_length=tokens, **gpu)
        planned = run_main_quickly(config, "--dry-run", "--json", variables=hidden)
        assert planned.result["kernels"].startswith(f"{provider} (auto: "), planned.result["kernels"]
    message = rejected(context_length=520, kernels="unsloth", variables=hidden, **gpu)
    assert_names(message, "kernels: unsloth: ", "RoPE", "512 tokens", "context_length", "liger")


@pytest.mark.parametrize("lora", [{}, {"bias": "all"}], ids=["embedding", "bias"])
def test_base_weights_beside_a_continued_adapter_are_an_error_under_zero_3(
    rejected: Rejected, tmp_path: Path, lora: dict[str, Any]
):
    """PEFT saves biases with an adapter, and embeddings that equal the base model's with save_embedding_layers."""
    model = make_model(tmp_path / "biased", kind=Qwen2Config)
    adapter = write_adapter(tmp_path / "adapter", model, target_modules=["q_proj"], **lora)
    tensor = ".bias, which"
    if not lora:
        tensor = "base_model.model.model.embed_tokens.weight"
        embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
        change_tensors(adapter, lambda tensors: tensors | {tensor: embedding})
    keys = {"model_id": str(model), "initial_adapter_model_ckpt_path": str(adapter)}
    message = rejected(**keys, deepspeed="zero_3")
    assert_names(message, f"{adapter}/adapter_model.safetensors ", tensor, "ZeRO-3", "deepspeed: zero_2")
    config = config_file(tmp_path, model, **keys, deepspeed="zero_2")
    assert run_main_quickly(config, "--dry-run").exit_code == 0


def test_tokenizer_of_the_adapter_is_used(rejected: Rejected, tiny_model: Path, tmp_path: Path):
    """Its chat template is that of the training before; the YAML's replaces it."""
    adapter = write_adapter(tmp_path / "adapter", tiny_model, target_modules=["q_proj"])
    tokenizer = make_tokenizer()
    template = (
        "{% for message in messages %}<|im_start|>THE PARENT'S {{ message['content'] }}<|im_end|>{% endfor %}"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(adapter)
    initial = {"initial_adapter_model_ckpt_path": str(adapter)}
    trained = run_main_quickly(config_file(tmp_path, tiny_model, **initial), "--dry-run")
    assert "THE PARENT'S" in trained.output
    own = config_file(tmp_path, tiny_model, **initial, chat_template=template.replace("PARENT", "CHILD"))
    assert "THE CHILD'S" in run_main_quickly(own, "--dry-run").output
    (adapter / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert_names(rejected(**initial), f"adapter {adapter}: ", "but tokenizer.json ")
    tokenizer.add_tokens([f"<added-{number}>" for number in range(3)])
    tokenizer.save_pretrained(adapter)
    assert_names(rejected(**initial), f"adapter {adapter}: ", "515 tokens", "512 rows", "model_id")


def with_rows(model: Path, rows: int) -> None:
    """Change a model to the first rows of its vocabulary."""
    tensors = load_file(model / "model.safetensors")
    ends = {name: tensors[name][:rows].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors | ends, model / "model.safetensors", {"format": "pt"})
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"vocab_size": rows}))


def test_rows_with_token_ids_beyond_the_embedding_raise_an_error_with_the_tensor(
    rejected: Rejected, damaged_model: Path, tmp_path: Path
):
    """A tokenizer may have more tokens than the embedding has rows, as long as no row uses them."""
    with_rows(damaged_model, 400)
    message = rejected(model_id=str(damaged_model))
    assert_names(
        message,
        f"model {damaged_model}: model.safetensors: model.embed_tokens.weight ",
        "400 rows",
        "train_path",
    )
    assert_names(message, "the token id 511 (")
    keys = {"model_id": str(damaged_model), "data_format": "tokens", "valid_path": None}
    used = write_rows(tmp_path, *[json.dumps({"input_ids": [1, 399, 2], "labels": [1, 399, 2]})] * 8)
    config = config_file(tmp_path, damaged_model, **keys, train_path=used)
    finished = run_main_quickly(config, "--dry-run")
    assert finished.exit_code == 0, finished.errors
    beyond = write_rows(tmp_path, *[json.dumps({"input_ids": [1, 450, 2], "labels": [1, 450, 2]})] * 8)
    assert_names(rejected(**keys, train_path=beyond), "embed_tokens.weight ", "the token id 450 (")
    used = write_rows(tmp_path, *[json.dumps({"input_ids": [1, 399, 2], "labels": [1, 399, 2]})] * 8)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(450)
    tokenizer.save_pretrained(damaged_model)
    assert_names(rejected(**keys, train_path=used), "the tokenizer pads rows with the token id 450 (")


def test_generation_settings_that_cannot_be_saved_are_reported_or_raise_an_error(
    rejected: Rejected, damaged_model: Path, tmp_path: Path
):
    file = damaged_model / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"temperature": 0.6}))
    config = config_file(tmp_path, damaged_model)
    finished = run_main_quickly(config, "--dry-run", "--json")
    (warning,) = [line for line in finished.result["warnings"] if "generation config" in line]
    assert_names(warning, str(damaged_model), "temperature", "do_sample")
    file.write_text(json.dumps(settings | {"num_return_sequences": 2}))
    for changes in ({}, {"lora_config": {"r": 4}}):
        message = rejected(model_id=str(damaged_model), **changes)
        assert_names(message, f"model {damaged_model}: generation_config.json ", "num_return_sequences")


def test_preference_tuning_without_a_right_reference_raises_an_error(rejected: Rejected, tmp_path: Path):
    """PEFT disables an adapter without restoring the biases, so the reference would hold the trained ones."""
    model = make_model(tmp_path / "biased", kind=Qwen2Config)
    train, valid = write_preference_pairs(tmp_path)
    settings = {
        "model_id": str(model),
        "task": "preference_tuning",
        "train_path": str(train),
        "valid_path": str(valid),
    }
    message = rejected(**settings, lora_config={"bias": "lora_only"})
    assert_names(message, "lora_config: bias ", "dpo", "bias: none")
    adapter = write_adapter(tmp_path / "adapter", model, bias="all")
    message = rejected(**settings, initial_adapter_model_ckpt_path=str(adapter))
    assert_names(message, f"adapter {adapter}: bias ", "orpo")
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    adapter = write_adapter(
        tmp_path / "tied-adapter", tied, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    message = rejected(**{**settings, "model_id": str(tied)}, initial_adapter_model_ckpt_path=str(adapter))
    assert_names(message, f"adapter {adapter}: ensure_weight_tying ", "dpo", "main.py export")


def test_model_as_adapter_raises_an_error_with_the_model_key(rejected: Rejected, tiny_model: Path):
    message = rejected(initial_adapter_model_ckpt_path=str(tiny_model))
    assert message.startswith(f"adapter {tiny_model}: adapter_config.json ")
    assert_names(message, "initial_base_model_ckpt_path")


def test_unknown_run_raises_an_error_with_storage_path(rejected: Rejected):
    message = rejected(initial_adapter_model_ckpt_path="run:nothing")
    assert message.startswith("initial_adapter_model_ckpt_path: run:nothing: ")
    assert_names(message, "no run", "storage_path")


def test_resuming_from_an_uncommitted_checkpoint_is_an_error(rejected: Rejected, tiny_model: Path):
    message = rejected(resume_from_checkpoint=str(tiny_model))
    assert message.startswith(f"{tiny_model}: ")
    assert_names(message, "no MANIFEST.json", "result.json")


# --- Settings ---------------------------------------------------------------------------------------------------


def test_missing_gpu_raises_an_error_with_alternatives(rejected: Rejected):
    message = rejected(device="cuda", variables={"CUDA_VISIBLE_DEVICES": ""})
    assert message.startswith("device: cuda")
    assert_names(message, "no CUDA device", "device: cpu", "RAY_ADDRESS")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resource", "planned", "needed"),
    [("accelerator_type:H100", ("H100", "79.0 GiB"), "H100"), ("GPU", ("cuda", "2 workers"), "CUDA device")],
)
def test_requested_gpu_can_be_planned_but_not_trained_without_one(
    resource: str, planned: tuple[str, ...], needed: str, tiny_model: Path, tmp_path: Path
):
    settings = {"device": "auto", "worker_resources": {resource: 0.001}, "num_devices": 2}
    config = config_file(tmp_path, tiny_model, **settings)
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    dry_run = run_main_quickly(config, "--dry-run", variables=no_gpu)
    assert dry_run.exit_code == 0, dry_run.errors
    assert_names(dry_run.output, *planned)
    message = message_of(run_main_quickly(config, variables=no_gpu))
    assert_names(message, f"2 x {needed}", "0 CUDA devices", "RAY_ADDRESS")
    assert not (tmp_path / "runs" / "config").exists()


def test_default_training_length_is_a_warning(tiny_model: Path, tmp_path: Path):
    planned = run_main_quickly(config_file(tmp_path, tiny_model, num_epochs=None), "--dry-run", "--json")
    assert planned.exit_code == 0, planned.errors
    report = planned.result
    epochs = report["steps"] // report["steps_per_epoch"]
    assert report["steps"] >= 100 > (epochs - 1) * report["steps_per_epoch"]
    (warning,) = [text for text in report["warnings"] if "num_epochs" in text]
    assert_names(warning, "max_steps", "min_update_steps", f"{epochs} epochs", "100 steps")


def test_attention_without_a_torch_kernel_is_a_warning(tmp_path: Path):
    gemma = make_model(tmp_path / "gemma", kind=Gemma2Config, head_dim=16, query_pre_attn_scalar=16)
    planned = run_main_quickly(config_file(tmp_path, gemma), "--dry-run", "--json")
    assert planned.exit_code == 0, planned.errors
    assert sum("attention" in warning and "torch" in warning for warning in planned.result["warnings"]) == 1


def test_unknown_key_raises_an_error_with_line_and_nearest_key(rejected: Rejected, tmp_path: Path):
    message = rejected(epochs=3)
    assert message.startswith(f"{tmp_path}/config.yaml:9: `epochs` ")
    assert_names(message, "`num_epochs: 3`")


def test_missing_deepspeed_file_raises_an_error_with_its_path(rejected: Rejected, tmp_path: Path):
    message = rejected(deepspeed={"config_path": str(tmp_path / "ds.json")})
    assert message.startswith(f"deepspeed: {tmp_path}/ds.json ")
    assert_names(message, "not exist", "preset")


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("{", ("JSON",)),
        ("[]", ("DeepSpeed configuration",)),
        ('{"zero_optimization": 3}', ("DeepSpeed configuration",)),
        (
            '{"zero_optimization": {"stage": "three"}}',
            ("`zero_optimization.stage`", "'three'", "0, 1, 2 or 3"),
        ),
        ('{"optimizer": {}}', ("`optimizer`", "YAML")),
    ],
)
def test_invalid_deepspeed_file_raises_an_error_with_path_and_reason(
    rejected: Rejected, tmp_path: Path, content: str, facts: tuple[str, ...]
):
    (tmp_path / "ds.json").write_text(content)
    message = rejected(deepspeed={"config_path": str(tmp_path / "ds.json")})
    assert message.startswith(f"deepspeed: {tmp_path}/ds.json ")
    assert_names(message, *facts)


def test_error_with_json_option_prints_no_json(rejected: Rejected, tmp_path: Path):
    assert f"{tmp_path}/rows.jsonl:1: " in rejected("--json", train_path=write_rows(tmp_path, "{bad"))


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
def test_empty_argument_is_an_error(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    """An empty path would mean the working directory."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert_names(captured.err, "argument", "empty", "variable")
    assert captured.err.count("\n") == 1


def test_detach_without_submit_is_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["a.yaml", "--detach"])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert_names(captured.err, "--detach", "--submit URL")
    assert captured.err.count("\n") == 1


# --- In a new Python process; the tests above fork from one with imported packages -----------------------------------


def test_unknown_option_raises_an_error_with_the_nearest_option(tiny_model: Path, tmp_path: Path):
    finished = run_main(config_file(tmp_path, tiny_model), "--dryrun")
    assert (finished.exit_code, finished.output) == (2, "")
    assert len(finished.errors.splitlines()) == 1
    assert "--dryrun" in finished.errors and "did you mean --dry-run" in finished.errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_data_error_is_reported_before_a_cluster_starts(tiny_model: Path, tmp_path: Path):
    config = config_file(tmp_path, tiny_model, valid_path=write_rows(tmp_path, [USER]))
    finished = run_main(config, "--json")
    assert_names(message_of(finished), f"{tmp_path}/rows.jsonl:1: ", "no assistant")
    assert "workers" not in finished.errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("port", "facts", "options"),
    [
        (1, ("127.0.0.1:1",), []),
        (1, ("127.0.0.1:1",), ["--dry-run"]),
        (99999, ("127.0.0.1:99999", "65535"), []),
    ],
)
def test_unreachable_cluster_raises_an_error_before_anything_is_read(
    tiny_model: Path, tmp_path: Path, port: int, facts: tuple[str, ...], options: list[str]
):
    config = config_file(tmp_path, tiny_model)
    cluster = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    finished = run_main(config, "--json", "device=cpu", *options, variables=cluster)
    assert finished.exit_code == 2
    (line,) = finished.errors.splitlines()
    assert_names(line, "error: RAY_ADDRESS: ", *facts)
    assert not (tmp_path / "runs").exists()


def dry_run_on_disk(directory: Path, config: Path, size: str = "300k") -> CompletedCommand:
    """Run main.py --dry-run with a file system of this size mounted at `directory`, visible only to that process."""
    directory.mkdir(exist_ok=True)
    require_small_disks(directory)
    done = subprocess.run(
        [*small_disk_prefix(directory, size), *command(config, "--dry-run")],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return CompletedCommand(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_disk_too_small_for_the_model_raises_an_error_with_output_dir(
    tiny_model: Path, tmp_path: Path, bucket_uri: str
):
    store = open_store(f"{bucket_uri}/model")
    upload_directory(tiny_model, store, "", [path.name for path in tiny_model.iterdir()])
    config = config_file(
        tmp_path, tiny_model, model_id=f"{bucket_uri}/model", output_dir=str(tmp_path / "small")
    )
    message = message_of(dry_run_on_disk(tmp_path / "small", config))
    assert message.startswith(f"model {bucket_uri}/model: ")
    assert_names(message, f"{tmp_path}/small ", "KiB", "output_dir")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_disk_too_small_for_the_tokens_raises_an_error_with_output_dir(tiny_model: Path, tmp_path: Path):
    write_data(tmp_path, train_rows=1500)
    config = config_file(tmp_path, tiny_model, output_dir=str(tmp_path / "small"))
    message = message_of(dry_run_on_disk(tmp_path / "small", config))
    assert message.startswith(f"{tmp_path}/train.jsonl: ")
    assert_names(message, f"{tmp_path}/small/", "output_dir")
    assert not (tmp_path / "runs").exists()

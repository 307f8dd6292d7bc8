"""Tests of main.py export: exports load in transformers and PEFT as the same model, and a partial export is never visible."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from configs.loading import ConfigError
from configs.schema import ExportConfig
from runs.layout import EXPORT_FILE, Export
from tests.support.bucket_proxy import bucket_proxy
from tests.support.front_door import RunCommand
from tests.support.jobs import CompletedCommand, error_of
from tests.support.live_memory import LiveMemory
from tests.support.messages import assert_names
from tests.support.own_buckets import set_up_own_bucket
from tests.support.tiny_model import make_longrope_model, make_model
from tests.support.trained_runs import store_adapter_run, store_full_run
from training.checkpoints.weights import fetch_weights
from training.data.records import Chat
from training.data.renderer import Renderer
from training.inference import export as exporting
from training.inference.checkpoint_model import trained_model
from training.inference.vllm_environment import PYTHON_VARIABLE
from training.models.files import is_tokenizer_file
from training.models.tokenizer import load_tokenizer
from training.planning import exportable
from training.planning.exportable import GGUF_TOOL
from utils.files import checksum
from utils.storage.bucket import Store, open_store
from utils.storage.embedded_bucket import EmbeddedBucket

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify without vLLM, even where it is installed: test_vllm_exports.py starts it."""
    monkeypatch.setenv(PYTHON_VARIABLE, "/nonexistent/python")


@pytest.fixture
def storage(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "runs"))


@pytest.fixture
def scratch(tmp_path: Path) -> dict[str, str]:
    return {"output_dir": str(tmp_path / "scratch")}


@pytest.fixture
def run(storage: Store, tiny_model: Path, scratch: dict[str, str]) -> str:
    """Store a run that trained an adapter; return its URI."""
    return store_adapter_run(storage, "adapter", tiny_model, LORA, **scratch)


def parse_export(finished: CompletedCommand) -> Export:
    """Return the export that a successful command printed as JSON."""
    assert finished.exit_code == 0, finished.errors
    (line,) = finished.output.splitlines()
    return Export.model_validate_json(line)


def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def adapter_on_base(run: str, model: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, f"{run}/checkpoints/step-000010")


@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        {**LORA, "use_dora": True},
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 8},
            "modules_to_save": ["lm_head"],
        },
    ],
    ids=["lora", "dora", "rslora with modules_to_save"],
)
def test_merged_model_equals_the_adapter_on_its_base(
    run_command: RunCommand,
    storage: Store,
    tiny_model: Path,
    tmp_path: Path,
    scratch: dict[str, str],
    lora: dict[str, Any],
):
    run = store_adapter_run(storage, "run", tiny_model, lora, **scratch)
    to = tmp_path / "exported"
    exported = parse_export(run_command("export", run, "--to", str(to), "--dtype", "fp32", "--json"))
    merged = AutoModelForCausalLM.from_pretrained(to)
    assert merged.dtype == torch.float32
    expected = logits_of(adapter_on_base(run, tiny_model))
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    base = logits_of(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    assert (base - expected).abs().max() > 0.1, "the adapter changes the logits"
    assert (exported.kind, exported.dtype, exported.uri) == ("merged", "fp32", str(to))


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_further_chat_templates_reach_checkpoint_and_export(
    run_command: RunCommand,
    storage: Store,
    tiny_model: Path,
    tmp_path: Path,
    scratch: dict[str, str],
    merge: bool,
):
    """A model may have a template of its own for rows with tools; from a bucket it comes along as well."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    templates = {
        "default": tokenizer.chat_template,
        "tool_use": "{{ tools[0].name }}" + tokenizer.chat_template,
    }
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(model)
    assert (model / "additional_chat_templates" / "tool_use.jinja").exists()
    run = store_adapter_run(storage, "run", model, LORA, **scratch)
    checkpoint = f"{run}/checkpoints/step-000010"
    merged = [] if merge else ["--no-merge"]
    exported = parse_export(run_command("export", run, *merged, "--no-verify", "--json"))
    for source in (checkpoint, exported.uri):
        node = fetch_weights(source, tmp_path / "node", is_tokenizer_file)
        loaded = load_tokenizer(node, trust_remote_code=False, chat_template=None)
        assert loaded.chat_template == templates
        chat = Chat([{"role": "user", "content": "2 + 2?"}], [{"name": "add"}])
        assert Renderer(loaded, whole_text=False).prompt(chat).startswith("add<|im_start|>")


def test_export_contains_everything_that_a_server_needs(run_command: RunCommand, run: str, tiny_model: Path):
    exported = parse_export(run_command("export", run, "--json"))
    directory = Path(exported.uri)
    assert directory == Path(run) / "exports" / "step-000010-merged-bf16"
    assert json.loads((directory / EXPORT_FILE).read_text()) == exported.model_dump()
    assert {path.name for path in directory.iterdir()} == {file.path for file in exported.files} | {
        EXPORT_FILE
    }
    assert all(checksum(directory / file.path) == file.checksum for file in exported.files)
    with safe_open(directory / "model.safetensors", "pt") as weights:
        assert {str(weights.get_tensor(name).dtype) for name in weights.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    settings = json.loads((directory / "config.json").read_text())
    assert settings["dtype"] == "bfloat16"
    assert settings["use_cache"] is True
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"], "as earlier readers need it"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    original = AutoTokenizer.from_pretrained(tiny_model)
    chat = [{"role": "user", "content": "2 + 2?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(
        chat, tokenize=False
    )
    assert GenerationConfig.from_pretrained(directory).eos_token_id == tokenizer.eos_token_id
    card = ModelCard.load(directory / "README.md")
    assert (card.data.base_model, card.data.library_name) == (None, "transformers"), "the Hub takes ids only"
    for text in (
        f"| base model | {tiny_model} |",
        "| before the first step | 2.0000 |",
        "after step 10 | 1.5000 |",
        "rows.jsonl",
        "lora_config.r | 4",
    ):
        assert text in card.text, text


@pytest.mark.slow
def test_generation_config_contains_all_end_of_turn_tokens(
    run_command: RunCommand, storage: Store, tiny_model: Path, tmp_path: Path, scratch: dict[str, str]
):
    """The EOS token of the base model differs from the end-of-turn token of the chat template."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
        ("config.json", "eos_token_id", 0),
        ("generation_config.json", "eos_token_id", 0),
    ):
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | {key: value}))
    run = store_adapter_run(storage, "run", model, LORA, **scratch)
    exported = parse_export(run_command("export", run, "--json"))
    tokenizer = AutoTokenizer.from_pretrained(exported.uri)
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert sorted(GenerationConfig.from_pretrained(exported.uri).eos_token_id) == sorted(stops)


@pytest.mark.slow
def test_full_parameter_model_is_cast_to_the_requested_dtype(
    run_command: RunCommand, storage: Store, tiny_model: Path, scratch: dict[str, str]
):
    run = store_full_run(storage, "full", tiny_model, **scratch)
    exported = parse_export(run_command("export", run, "--dtype", "fp16", "--json"))
    assert (exported.kind, exported.dtype) == ("model", "fp16")
    model = AutoModelForCausalLM.from_pretrained(exported.uri)
    assert model.dtype == torch.float16
    assert model.config.use_cache is True
    trained = AutoModelForCausalLM.from_pretrained(f"{run}/checkpoints/step-000010")
    for (name, ours), theirs in zip(model.state_dict().items(), trained.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.half()), name


def test_no_merge_exports_only_the_adapter(run_command: RunCommand, run: str, tiny_model: Path):
    exported = parse_export(run_command("export", run, "--no-merge", "--json"))
    assert (exported.kind, exported.dtype) == ("adapter", None)
    directory = Path(exported.uri)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in directory.iterdir()
    }
    settings = json.loads((directory / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, directory)
    assert torch.equal(logits_of(adapted), logits_of(adapter_on_base(run, tiny_model)))


def test_card_of_an_adapter_has_the_command_that_serves_what_was_trained(
    run_command: RunCommand, storage: Store, tiny_model: Path, scratch: dict[str, str]
):
    lora = {**LORA, "rank_pattern": {"q_proj": 20}, "alpha_pattern": {"v_proj": 3}}
    run = store_adapter_run(storage, "run", tiny_model, lora, **scratch)
    exported = parse_export(run_command("export", run, "--no-merge", "--json"))
    text = (Path(exported.uri) / "README.md").read_text()
    (command,) = [line for line in text.splitlines() if "vllm serve" in line]
    assert_names(command, str(tiny_model), "--max-lora-rank 32", "--tokenizer DIRECTORY", "--dtype float32")
    tokenizer = AutoTokenizer.from_pretrained(exported.uri)
    assert GenerationConfig.from_pretrained(exported.uri).eos_token_id == tokenizer.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["--dtype=fp32", "--no-merge"])
def test_longest_sequence_with_the_ordinary_rope_is_reported_for_servers(
    run_command: RunCommand, storage: Store, tmp_path: Path, scratch: dict[str, str], merge: str
):
    """vLLM 0.32 chooses longrope's frequencies by --max-model-len, not by the length of a sequence (phi3_long_rope_scaled_rope.py)."""
    model = make_longrope_model(tmp_path / "phi", 128)
    run = store_adapter_run(storage, "run", model, {"r": 4, "target_modules": ["qkv_proj"]}, **scratch)
    exported = parse_export(run_command("export", run, merge, "--json"))
    (note,) = exported.notes
    assert_names(note, "RoPE", "128 tokens", "--max-model-len 128")
    text = (Path(exported.uri) / "README.md").read_text()
    (command,) = [line for line in text.splitlines() if "vllm serve" in line]
    assert "--max-model-len 128" in command
    again = parse_export(run_command("export", run, merge, "--verify", "--json"))
    assert again.notes == exported.notes


def test_merge_needs_memory_for_one_copy_of_the_model(
    tiny_model: Path, storage: Store, scratch: dict[str, str]
):
    from configs.schema import ExportConfig
    from training.inference.checkpoint_model import trained_model
    from training.inference.export import export

    small = {"r": 1, "target_modules": ["q_proj"]}
    run = store_adapter_run(storage, "run", tiny_model, small, **scratch)
    size = (tiny_model / "model.safetensors").stat().st_size
    with trained_model(run) as trained, LiveMemory([]) as memory:
        export(trained, ExportConfig(dtype="fp32", verify=False), progress=lambda _: None)
    assert size * 0.9 < memory.peak < size * 1.5


@pytest.mark.slow
def test_4_bit_adapter_is_merged_into_16_bit_weights_and_the_card_says_why(
    run_command: RunCommand, storage: Store, tiny_model: Path, scratch: dict[str, str]
):
    run = store_adapter_run(storage, "run", tiny_model, LORA, load_in_4bit=True, **scratch)
    exported = parse_export(run_command("export", run, "--dtype", "fp32", "--json"))
    (note,) = exported.notes
    assert "16-bit" in note
    assert note in (Path(exported.uri) / "README.md").read_text()
    merged = AutoModelForCausalLM.from_pretrained(exported.uri)
    expected = logits_of(adapter_on_base(run, tiny_model))
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)


# --- Complete or not visible ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_config_json_and_the_manifest_are_written_last(
    run_command: RunCommand, bucket: EmbeddedBucket, run: str, monkeypatch: pytest.MonkeyPatch
):
    uri = f"{set_up_own_bucket(monkeypatch, bucket, 'exports')}/model"
    with bucket_proxy(bucket.endpoint) as proxy:
        parse_export(run_command("export", run, "--to", uri, "--json", AWS_ENDPOINT_URL_S3=proxy.endpoint))
        written = [request.path.rpartition("/")[2] for request in proxy.requests if request.method == "PUT"]
    assert [name for name in written if not name.startswith(".write-probe")][-2:] == [
        "config.json",
        EXPORT_FILE,
    ]
    assert {"model.safetensors", "tokenizer.json"} <= set(written[:-2])


@pytest.mark.slow
def test_rerun_export_changes_nothing_and_a_different_one_is_an_error(
    run_command: RunCommand, run: str, tmp_path: Path
):
    to = tmp_path / "exported"
    first = parse_export(run_command("export", run, "--to", str(to), "--json"))
    before = {path: path.stat().st_mtime_ns for path in to.iterdir()}
    assert parse_export(run_command("export", run, "--to", str(to), "--json")) == first
    assert {path: path.stat().st_mtime_ns for path in to.iterdir()} == before
    message = error_of(run_command("export", run, "--to", str(to), "--dtype", "fp16"))
    assert_names(message, f"{to} ", "merged model", "bf16")
    (to / "tokenizer.json").write_text("{}")
    assert f"{to}/tokenizer.json: " in error_of(run_command("export", run, "--to", str(to)))


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["--dtype=bf16", "--no-merge"])
def test_unverified_export_is_verified_in_place(
    run_command: RunCommand, run: str, tmp_path: Path, merge: str
):
    to = tmp_path / "unverified"
    command = ("export", run, "--to", str(to), merge, "--json")
    unverified = parse_export(run_command(*command, "--no-verify"))
    assert unverified.verification is None
    before = {path.name: path.stat().st_mtime_ns for path in to.iterdir()}
    verified = parse_export(run_command(*command, "--verify"))
    assert verified.verification is not None
    assert Export.model_validate_json((to / EXPORT_FILE).read_text()) == verified
    assert "verified in fp32" in (to / "README.md").read_text()
    changed = {path.name for path in to.iterdir() if path.stat().st_mtime_ns != before.get(path.name)}
    assert changed == {EXPORT_FILE, "README.md"}
    assert parse_export(run_command(*command, "--verify")) == verified, "the record fits the new card"
    (weights,) = to.glob("*.safetensors")
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert f"{weights}: changed since the export" in error_of(run_command(*command, "--verify"))
    (to / "README.md").write_text("another card")
    assert f"{to}/README.md: " in error_of(run_command(*command, "--verify"))


@pytest.mark.slow
def test_wrong_export_is_not_verified_in_place(run_command: RunCommand, run: str, tmp_path: Path):
    to = tmp_path / "wrong"
    exported = parse_export(run_command("export", run, "--to", str(to), "--no-verify", "--json"))
    tensors = load_file(to / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] * 2}, to / "model.safetensors", {"format": "pt"})
    record = {file.path: file for file in exported.files}["model.safetensors"]
    files = [
        file.model_copy(update={"checksum": checksum(to / file.path)}) if file is record else file
        for file in exported.files
    ]
    content = exported.model_copy(update={"files": files}).model_dump_json()
    (to / EXPORT_FILE).write_text(content)
    message = error_of(run_command("export", run, "--to", str(to), "--verify"))
    assert_names(
        message, "does not compute what was trained", "layer 1", f"{to} and its record are unchanged"
    )
    assert (to / EXPORT_FILE).read_text() == content


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["--dtype=fp32", "--no-merge"])
def test_sampling_settings_that_reach_a_server_are_reported(
    run_command: RunCommand,
    storage: Store,
    tiny_model: Path,
    tmp_path: Path,
    scratch: dict[str, str],
    merge: str,
):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7}
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    run = store_adapter_run(storage, "run", model, LORA, **scratch)
    exported = parse_export(run_command("export", run, merge, "--no-verify", "--json"))
    (note,) = exported.notes
    facts = ("temperature: 0.6", "top_p: 0.9", "max_new_tokens: 7", "--generation-config vllm")
    assert_names(note, *facts)
    usage = (Path(exported.uri) / "README.md").read_text().partition("## Usage")[2]
    assert_names(usage, *facts)
    screen = run_command("export", run, merge, "--no-verify")
    assert "--generation-config vllm" in " ".join((screen.output + screen.errors).split())


@pytest.mark.slow
def test_interrupted_export_is_completed_by_a_rerun(run_command: RunCommand, run: str, tmp_path: Path):
    to = tmp_path / "exported"
    complete = parse_export(run_command("export", run, "--to", str(to), "--json"))
    (to / EXPORT_FILE).unlink()
    (to / "model.safetensors").write_bytes(b"half")
    shard = to / "model-00001-of-00002.safetensors"
    shard.write_bytes(b"from an export with other settings")
    names = [shard.name, *(file.path for file in complete.files)]
    (to / "EXPORT.unfinished").write_text("\n".join(["Its files:", *names]))
    notes = to / "notes.txt"
    notes.write_text("of the user")
    assert_names(error_of(run_command("export", run, "--to", str(to))), "not empty", "notes.txt")
    assert shard.exists()
    notes.unlink()
    again = parse_export(run_command("export", run, "--to", str(to), "--json"))
    checksums = {file.path: file.checksum for file in complete.files}
    assert {file.path: file.checksum for file in again.files if file.path != "README.md"} == {
        name: found for name, found in checksums.items() if name != "README.md"
    }
    assert {path.name for path in to.iterdir()} == {*checksums, EXPORT_FILE}
    assert checksum(to / "model.safetensors") == checksums["model.safetensors"]


def test_file_that_appears_during_a_merge_is_kept(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    to, write_model = tmp_path / "exported", exporting._write_model

    def with_a_file_of_another_program(*arguments: Any) -> None:
        write_model(*arguments)
        to.mkdir(exist_ok=True)
        (to / "results.txt").write_text("of another program")

    monkeypatch.setattr(exporting, "_write_model", with_a_file_of_another_program)
    with trained_model(run) as trained, pytest.raises(ConfigError, match=r"results\.txt"):
        exporting.export(trained, ExportConfig(to=str(to), verify=False), progress=lambda _: None)
    assert [path.name for path in to.iterdir()] == ["results.txt"]


@pytest.mark.parametrize("arguments", [(), ("--no-merge",)], ids=["merged", "adapter"])
def test_checkpoint_with_nan_is_not_exported(
    run_command: RunCommand,
    storage: Store,
    tiny_model: Path,
    scratch: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda tensor: torch.full_like(tensor, torch.nan))
        run = store_adapter_run(storage, "run", tiny_model, LORA, **scratch)
    rejected = run_command("export", run, "--no-verify", *arguments)
    assert_names(error_of(rejected), "step-000010/adapter_model.safetensors", "lora_A.weight", "NaN")
    assert not Path(run, "exports").exists()


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_head_of_a_base_that_is_said_to_be_tied_is_exported_untied(
    run_command: RunCommand,
    storage: Store,
    tiny_model: Path,
    tmp_path: Path,
    scratch: dict[str, str],
    full: bool,
):
    """transformers 5.17 loads a head that differs from the embedding; other programs tie it because of the config."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "lm_head.weight" in load_file(model / "model.safetensors")
    run = (
        store_full_run(storage, "run", model, **scratch)
        if full
        else store_adapter_run(storage, "run", model, LORA, **scratch)
    )
    exported = parse_export(run_command("export", run, "--dtype", "fp32", "--json"))
    assert json.loads(Path(exported.uri, "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(Path(exported.uri, "model.safetensors"))


def test_weights_that_a_dtype_cannot_hold_are_not_exported(
    run_command: RunCommand, storage: Store, tiny_model: Path, tmp_path: Path, scratch: dict[str, str]
):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 70_000
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    run = store_adapter_run(storage, "run", model, LORA, **scratch)
    rejected = run_command("export", run, "--dtype", "fp16", "--no-verify")
    assert_names(error_of(rejected), "model.layers.1.mlp.down_proj.weight", "fp16", "--dtype bf16")


# --- GGUF ---------------------------------------------------------------------------------------------------------


def install_converter(directory: Path, code: str) -> dict[str, str]:
    """Write a shell script in place of llama.cpp's converter; return the PATH on which main.py finds it."""
    tool = directory / "tools" / GGUF_TOOL
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{code}\n")
    tool.chmod(0o755)
    return {"PATH": f"{tool.parent}:{os.environ['PATH']}"}


def test_gguf_file_is_written_by_llama_cpp(run_command: RunCommand, run: str, tmp_path: Path):
    variables = install_converter(tmp_path, 'ls "$1"/model.safetensors && echo "$2 $4 $5" > "$3"')
    exported = parse_export(run_command("export", run, "--gguf", "--dtype", "fp16", "--json", **variables))
    assert exported.gguf == "adapter-fp16.gguf"
    assert exported.gguf in {file.path for file in exported.files}
    assert (Path(exported.uri) / exported.gguf).read_text() == "--outfile --outtype f16\n"


def test_missing_gguf_converter_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exportable, "_GGUF_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError) as caught:
        exportable.gguf_converter("LlamaForCausalLM")
    assert_names(str(caught.value), "make setup-gguf", GGUF_TOOL, "PATH")


@pytest.mark.slow
def test_failing_gguf_converter_is_an_error(run_command: RunCommand, run: str, tmp_path: Path):
    variables = install_converter(tmp_path, "echo 'Model TinyForCausalLM is not supported' >&2; exit 1")
    message = error_of(run_command("export", run, "--gguf", **variables))
    assert_names(message, GGUF_TOOL, "(Model TinyForCausalLM is not supported)")
    assert not (Path(run) / "exports").exists()


# --- Errors: one message, exit code 2, nothing written -----------------------------------------------------------


@pytest.mark.slow
def test_merge_into_weights_that_exist_only_in_4_bits_is_an_error(
    run_command: RunCommand, storage: Store, tiny_model: Path, tmp_path: Path, scratch: dict[str, str]
):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    run = store_adapter_run(storage, "run", model, LORA, load_in_4bit=True, **scratch)
    settings = json.loads((model / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(settings))
    message = error_of(run_command("export", run))
    assert_names(message, f"model {model}: ", "4 bits")
    assert parse_export(run_command("export", run, "--no-merge", "--json")).kind == "adapter"


def test_no_merge_of_an_adapter_that_vllm_cannot_load_is_an_error(
    run_command: RunCommand, storage: Store, tiny_model: Path, scratch: dict[str, str]
):
    run = store_adapter_run(storage, "run", tiny_model, {**LORA, "use_dora": True}, **scratch)
    message = error_of(run_command("export", run, "--no-merge"))
    assert_names(message, "vLLM", "use_dora", "Omit --no-merge")
    assert "push_to_hub" not in message


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_no_merge_of_an_adapter_on_the_embedding_is_an_error(
    run_command: RunCommand, storage: Store, tiny_model: Path, scratch: dict[str, str]
):
    """vLLM skips such tensors without a warning."""
    lora = {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}
    run = store_adapter_run(storage, "run", tiny_model, lora, **scratch)
    assert_names(error_of(run_command("export", run, "--no-merge")), "vLLM", "embeddings")


def test_no_merge_of_a_full_parameter_run_is_an_error(
    run_command: RunCommand, storage: Store, tiny_model: Path, scratch: dict[str, str]
):
    run = store_full_run(storage, "full", tiny_model, **scratch)
    assert_names(error_of(run_command("export", run, "--no-merge")), run, "no adapter")


def test_target_directory_with_other_files_is_an_error(run_command: RunCommand, run: str, tmp_path: Path):
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("mine")
    message = error_of(run_command("export", run, "--to", str(tmp_path / "occupied")))
    assert_names(message, str(tmp_path / "occupied"), "thesis.txt")
    assert [path.name for path in (tmp_path / "occupied").iterdir()] == ["thesis.txt"]


def test_damaged_checkpoint_or_missing_base_raises_an_error_with_its_path(
    run_command: RunCommand,
    storage: Store,
    tiny_model: Path,
    run: str,
    scratch: dict[str, str],
    tmp_path: Path,
):
    weights = Path(run) / "checkpoints" / "step-000010" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert_names(error_of(run_command("export", run)), f"{weights}: ", "content")
    deleted_model = Path(shutil.copytree(tiny_model, tmp_path / "deleted"))
    run = store_adapter_run(storage, "other", deleted_model, LORA, **scratch)
    shutil.rmtree(deleted_model)
    assert_names(error_of(run_command("export", run)), str(deleted_model), "--base")


@pytest.mark.slow
def test_base_names_the_base_model_that_has_moved(
    run_command: RunCommand, storage: Store, tiny_model: Path, scratch: dict[str, str], tmp_path: Path
):
    original = Path(shutil.copytree(tiny_model, tmp_path / "original"))
    run = store_adapter_run(storage, "moved", original, LORA, **scratch)
    shutil.rmtree(original)
    exported = parse_export(run_command("export", run, "--no-merge", "--base", str(tiny_model), "--json"))
    settings = json.loads((Path(exported.uri) / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model)
    assert f"| base model | {tiny_model} |" in (Path(exported.uri) / "README.md").read_text()
    other = make_model(tmp_path / "other", layers=1)
    message = error_of(run_command("export", run, "--base", str(other), "--to", str(tmp_path / "to")))
    assert_names(message, "--base", str(other), "does not fit")

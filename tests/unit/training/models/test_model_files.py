"""Facts that are read from model and adapter files, and errors for damaged files."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.schema import LoraConfig
from tests.support.adapters import change_config
from tests.support.hub import Repository, running_hub
from training.models import files
from training.models.files import (
    ModelError,
    ModelFacts,
    check_finite_weights,
    check_weight_files,
    count_lora_parameters,
    fetch_hub_model,
    is_hub_id,
    is_model_file,
    is_tokenizer_file,
    only_indexed_weights,
    read_adapter_facts,
    read_hub_facts,
    read_model_facts,
)
from training.models.torch_provider import load_weights, peft_config
from utils.storage.bucket import open_store, upload_directory
from utils.storage.s3 import S3Store

HEAD = "lm_head.weight"  # the first tensor of the file
NORM = "model.norm.weight"  # the last one
DTYPES = [
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    peft.get_peft_model(base, peft_config(LoraConfig(r=4))).save_pretrained(directory)
    return directory


def test_facts_equal_those_of_the_loaded_model(tiny_model: Path):
    facts = read_model_facts(str(tiny_model))
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert facts.parameter_shapes == {name: tuple(value.shape) for name, value in loaded.named_parameters()}
    assert facts.parameters == loaded.num_parameters()
    assert (facts.architecture, facts.max_context, facts.quantization) == ("LlamaForCausalLM", 512, None)
    assert not facts.tie_word_embeddings


def test_sharded_model_has_the_same_shapes_and_needs_every_shard(tiny_model: Path, model: Path):
    (model / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(model, max_shard_size="200KB")
    assert len(list(model.glob("*.safetensors"))) > 1
    assert read_model_facts(str(model)).parameter_shapes == read_model_facts(str(tiny_model)).parameter_shapes
    (model / "consolidated.safetensors").write_bytes(b"stray")
    assert read_model_facts(str(model)).parameter_shapes == read_model_facts(str(tiny_model)).parameter_shapes
    wanted = only_indexed_weights(str(model), is_model_file)
    assert not wanted("consolidated.safetensors")
    assert all(map(wanted, ("config.json", *(path.name for path in model.glob("model-*.safetensors")))))
    shutil.copy(tiny_model / "model.safetensors", model)
    with pytest.raises(ModelError, match=r"both model\.safetensors and model\.safetensors\.index\.json"):
        read_model_facts(str(model))
    (model / "model.safetensors").unlink()
    next(model.glob("model-00002-*")).unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-\d+\.safetensors"):
        read_model_facts(str(model))


@pytest.mark.parametrize(
    "keys",
    [
        {"r": 8},
        {"r": 16, "target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.mlp\.(up|down)_proj"},
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens"]},
        {"exclude_modules": ["down_proj"]},
        {"rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"exclude_modules": r".*\.self_attn\..*"},
    ],
    ids=str,
)
def test_lora_parameter_count_equals_that_of_peft(tiny_model: Path, keys: dict[str, Any]):
    lora = LoraConfig(**keys)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), peft_config(lora))
    assert (
        count_lora_parameters(read_model_facts(str(tiny_model)), lora)
        == adapted.get_nb_trainable_parameters()[0]
    )


def remove_files(*names: str) -> Callable[[Path], None]:
    return lambda directory: [(directory / name).unlink() for name in names] and None


def truncate_to(size: int) -> Callable[[Path], None]:
    def truncate(directory: Path) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return truncate


def overwrite_file(name: str, content: bytes) -> Callable[[Path], None]:
    def overwrite(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return overwrite


def pickle_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def header(content: Any) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (remove_files("config.json"), r"/model: .*config\.json .*found: .*tokenizer\.json"),
        (remove_files("model.safetensors"), r"/model: .*weights.*\*\.safetensors.*config\.json"),
        (
            pickle_weights,
            r"/model: .*pytorch_model\.bin.* code .*safetensors",
        ),
        (
            remove_files("tokenizer.json", "tokenizer_config.json"),
            r"/model: .*tokenizer\.json or tokenizer\.model",
        ),
        (overwrite_file("config.json", b"{"), r"/model/config\.json: .*JSON"),
        (overwrite_file("config.json", b"[]"), r"/model/config\.json: .*list.*object"),
        (
            overwrite_file(
                "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
            ),
            r"/model\.safetensors: .*Git LFS pointer.*git lfs pull",
        ),
        (truncate_to(0), r"/model\.safetensors: .*\b0 bytes"),
        (truncate_to(100), r"/model\.safetensors: .*header .*\d+ bytes.* 100\b"),
        (truncate_to(3000), r"/model\.safetensors: .*\b3000 bytes.*header.*\d+"),
        (truncate_to(-1), r"/model\.safetensors: .*\b\d+ bytes.*header.*\d+"),
        (overwrite_file("model.safetensors", b"PK\x03\x04" + bytes(400)), r"/model\.safetensors: .*header"),
        (
            overwrite_file("model.safetensors", struct.pack("<Q", 9) + b"not json!"),
            r"/model\.safetensors: .*header",
        ),
        (overwrite_file("model.safetensors", header([1])), r"/model\.safetensors: .*header"),
        (
            overwrite_file("model.safetensors", header({"weight": {"shape": [2]}})),
            r"/model\.safetensors: .*header",
        ),
        (overwrite_file("model.safetensors", header({"weight": 3})), r"/model\.safetensors: .*header"),
        (
            overwrite_file("model.safetensors", header({"weight": {"shape": 3, "data_offsets": [0, 0]}})),
            r"/model\.safetensors: .*header",
        ),
    ],
)
def test_a_damaged_model_raises_an_error_that_names_the_file(
    model: Path, damage: Callable[[Path], None], pattern: str
):
    damage(model)
    with pytest.raises(ModelError, match=pattern):
        read_model_facts(str(model))


METADATA: dict[str, Any] = {"metadata": {"total_size": 1}}
LISTED = {"weight_map": {"lm_head.weight": "weights.safetensors"}}


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        ({}, "weight_map must be a JSON object"),
        *(
            (METADATA | {"weight_map": value}, "weight_map must be a JSON object")
            for value in ([], None, {}, 5, "x", {HEAD: 5}, {HEAD: ["weights.safetensors"]}, {HEAD: {}})
        ),
        (LISTED, r'metadata must be .*Add "metadata": \{\}'),
        (LISTED | {"metadata": None}, "metadata must be"),
        (LISTED | {"metadata": []}, "metadata must be"),
        ([], "contains list, not a JSON object"),
    ],
    ids=str,
)
def test_an_index_that_transformers_cannot_read_raises_an_error_with_the_key(
    index: Any, fault: str, model: Path
):
    (model / "model.safetensors").rename(model / "weights.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((LookupError, TypeError, AttributeError, OSError)):
        load_weights(model, dtype="fp32")
    where = rf"^{model}/model\.safetensors\.index\.json: "
    with pytest.raises(ModelError, match=where + fault):
        read_model_facts(str(model))
    with pytest.raises(ModelError, match=where + fault):
        only_indexed_weights(str(model), is_model_file)
    (model / "model.safetensors.index.json").write_text(json.dumps(METADATA | LISTED))
    assert read_model_facts(str(model)).tensors[HEAD].file == "weights.safetensors"


@pytest.mark.parametrize("file", ["weights.safetensors", "model-00001-of-00002.safetensors"])
def test_weight_files_that_transformers_does_not_load_raise_an_error_with_their_names(file: str, model: Path):
    (model / "model.safetensors").rename(model / file)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(model, use_safetensors=True)
    names = (
        rf"^model {model}: has neither model\.safetensors nor model\.safetensors\.index\.json.*{file}\. Copy "
    )
    with pytest.raises(ModelError, match=names):
        read_model_facts(str(model))


def test_only_the_file_that_transformers_loads_counts(tiny_model: Path, model: Path):
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    (model / "broken.safetensors").write_bytes(b"x")
    assert read_model_facts(str(model)).tensors == read_model_facts(str(tiny_model)).tensors
    config = json.loads((model / "config.json").read_text())
    named = config | {"transformers_weights": "consolidated.safetensors"}
    (model / "config.json").write_text(json.dumps(named))
    with pytest.raises(
        ModelError, match=r"config\.json names 'consolidated\.safetensors' as transformers_weights"
    ):
        read_model_facts(str(model))


@pytest.mark.parametrize("in_shards", [False, True])
def test_the_workers_check_the_weight_files_that_are_loaded(in_shards: bool, model: Path):
    """A stray file may be a Git LFS pointer, which the plan and transformers ignore."""
    (model / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    file = model / "model.safetensors"
    if in_shards:
        file = file.rename(model / "weights.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps(METADATA | LISTED))
    read_model_facts(str(model))
    check_weight_files(model)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=rf"^{file}: .*truncated or corrupt"):
        check_weight_files(model)


def test_an_adapter_beside_the_model_raises_an_error_with_its_files(
    model: Path, adapter: Path, bucket_uri: str, monkeypatch: pytest.MonkeyPatch
):
    """transformers would load it into the model without a word."""
    shutil.copy(adapter / "adapter_config.json", model)
    message = r"has an adapter beside the model \(adapter_config\.json\).*initial_adapter_model_ckpt_path"
    with pytest.raises(ModelError, match=f"^model {model}: {message}"):
        read_model_facts(str(model))
    with pytest.raises(ModelError, match=f"^model {model}: {message}"):
        load_weights(model, dtype="fp32")
    upload_directory(model, open_store(bucket_uri), "", [path.name for path in model.iterdir()])
    with pytest.raises(ModelError, match=f"^model {bucket_uri}: {message}"):
        read_model_facts(bucket_uri)
    shutil.copy(adapter / "adapter_model.safetensors", model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    assert any("lora_A" in name for name, _ in loaded.named_parameters())
    with running_hub() as hub:
        files = {path.name: path.read_bytes() for path in model.iterdir()}
        hub.repositories["models/org/base"] = Repository(files)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        with pytest.raises(ModelError, match=f"^model org/base: {message}"):
            read_hub_facts("org/base")


def test_shards_on_the_hub_are_counted_by_their_index(
    tiny_model: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A stale single file beside the shards is neither counted nor downloaded."""
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(model, max_shard_size="200KB")
    save_file({"stale": torch.zeros(3)}, model / "model.safetensors", {"format": "pt"})
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with running_hub() as hub:
        repository = hub.repositories["models/org/base"] = Repository(dict(files))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        served = template.replace(huggingface_hub.constants.ENDPOINT, hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", served)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        assert (
            read_hub_facts("org/base").parameter_shapes == read_model_facts(str(tiny_model)).parameter_shapes
        )
        assert not (fetch_hub_model("org/base", is_model_file) / "model.safetensors").exists()
        config = json.dumps(json.loads(files["config.json"]) | {"transformers_weights": "other.safetensors"})
        repository.commit({"config.json": config.encode()}, "name another file")
        with pytest.raises(ModelError, match=r"^model org/base: config\.json names 'other\.safetensors'"):
            read_hub_facts("org/base")
        repository.commit({"config.json": files["config.json"]}, "name no file")
        repository.files = {name: content for name, content in files.items() if "-00002-" not in name}
        with pytest.raises(ModelError, match=r"^model org/base: .*lists missing weight files \(model-00002-"):
            read_hub_facts("org/base")


@pytest.fixture
def hub_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Repository, Path]]:
    """Yield org/base on a Hub that this process uses, which a test may change, and the directory of its cache."""
    with running_hub() as hub:
        repository = Repository({path.name: path.read_bytes() for path in model.iterdir()})
        hub.repositories["models/org/base"] = repository
        constants, cache = huggingface_hub.constants, tmp_path / "hub"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        served = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        yield repository, cache


def with_header(content: Any) -> bytes:
    header = json.dumps(content).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "content",
    [
        b"short",
        struct.pack("<Q", 2**40),
        struct.pack("<Q", 8) + b"{not json",
        *map(
            with_header,
            (
                [],
                {"weight": 5},
                {"weight": {}},
                {"weight": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}},
                {"weight": {"dtype": "F32", "shape": [1], "data_offsets": 4}},
                {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
                {"weight": {"dtype": "float", "shape": [1], "data_offsets": [0, 4]}},
                {"__metadata__": {"format": 5}},
            ),
        ),
    ],
    ids=repr,
)
@pytest.mark.parametrize("in_shards", [False, True])
def test_damaged_weights_on_the_hub_raise_an_error_with_model_and_file(
    in_shards: bool, content: bytes, hub_files: tuple[Repository, Path]
):
    on_hub = hub_files[0].files
    file = "weights.safetensors" if in_shards else "model.safetensors"
    if in_shards:
        on_hub["model.safetensors.index.json"] = json.dumps(METADATA | LISTED).encode()
    on_hub[file] = content
    with pytest.raises(ModelError, match=rf"^model org/base: {file}: .*Upload it again\.$"):
        read_hub_facts("org/base")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{no json", "not valid JSON"),
        (b"[]", "contains list, not a JSON object"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_a_damaged_config_on_the_hub_raises_an_error_with_the_file(
    content: bytes, fault: str, hub_files: tuple[Repository, Path]
):
    repository, cache = hub_files
    repository.files["config.json"] = content
    with pytest.raises(ModelError, match=rf"^{cache}/models--org--base/.*/config\.json: {fault}"):
        read_hub_facts("org/base")


@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize("change", [-1000, -1, 1])
def test_weights_on_the_hub_of_another_size_than_their_header_requires_raise_an_error(
    in_shards: bool, change: int, hub_files: tuple[Repository, Path]
):
    on_hub = hub_files[0].files
    file = "weights.safetensors" if in_shards else "model.safetensors"
    if in_shards:
        on_hub["model.safetensors.index.json"] = json.dumps(METADATA | LISTED).encode()
    complete = on_hub["model.safetensors"]
    on_hub[file] = complete[:change] if change < 0 else complete + bytes(change)
    sizes = rf"has {len(complete) + change} bytes, but its header requires {len(complete)}"
    with pytest.raises(ModelError, match=rf"^model org/base: {file}: {sizes}; .*Upload it again\.$"):
        read_hub_facts("org/base")


@pytest.mark.parametrize(("stated", "stored"), [(0, -1), (-1, 0), (-1, -2)])
def test_weights_on_the_hub_of_another_size_than_stated_raise_an_error(
    stated: int, stored: int, hub_files: tuple[Repository, Path]
):
    """The Hub states the size of the file that was uploaded, and a worker could not download another one."""
    repository, _ = hub_files
    content = repository.files["model.safetensors"]
    size = len(content)
    repository.sizes["model.safetensors"] = size + stated
    repository.files["model.safetensors"] = content[: size + stored]
    sizes = f"states {size + stated} bytes, but stores {size + stored}"
    with pytest.raises(ModelError, match=rf"^model org/base: model\.safetensors: the Hub {sizes};"):
        read_hub_facts("org/base")


def test_a_long_header_on_the_hub_is_read(
    hub_files: tuple[Repository, Path], monkeypatch: pytest.MonkeyPatch
):
    expected = read_hub_facts("org/base")
    monkeypatch.setattr(files, "_BYTES_ON_THE_HUB", 16)
    assert read_hub_facts("org/base") == expected


def test_a_hub_model_without_safetensors_raises_an_error(hub_files: tuple[Repository, Path]):
    on_hub = hub_files[0].files
    assert read_hub_facts("org/base").tensors
    on_hub["pytorch_model.bin"] = on_hub.pop("model.safetensors")
    with pytest.raises(ModelError, match=r"^model org/base: has no safetensors weights on the Hub"):
        read_hub_facts("org/base")


def with_value(model: Path, name: str, place: int, value: float, dtype: torch.dtype = torch.float32) -> str:
    """Write a value into a tensor of a model whose weights have this dtype; return the URI of the model."""
    tensors = {key: each.to(dtype) for key, each in load_file(model / "model.safetensors").items()}
    tensors[name].view(-1)[place] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return str(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_infinite_weights_raise_an_error_with_file_and_tensor(model: Path, dtype: torch.dtype):
    check_finite_weights(read_model_facts(with_value(model, HEAD, -1, torch.finfo(dtype).max, dtype)), [])
    for value in (float("nan"), float("inf"), float("-inf")):
        facts = read_model_facts(with_value(model, HEAD, -1, value, dtype))
        with pytest.raises(ModelError, match=rf"^{model}/model\.safetensors: the tensor {HEAD} .*NaN"):
            check_finite_weights(facts, [])
        check_finite_weights(facts, [HEAD])


def test_beginning_of_every_tensor_in_a_large_directory_is_checked(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "_BYTES_OF_DIRECTORY", 21 * 64)  # 64 bytes for each of 21 tensors
    assert len(read_model_facts(str(model)).tensors) == 21
    check_finite_weights(read_model_facts(with_value(model, HEAD, 16, float("nan"))), [])
    for name in (NORM, HEAD):
        with pytest.raises(ModelError, match=name):
            check_finite_weights(read_model_facts(with_value(model, name, 15, float("nan"))), [])
        with_value(model, name, 15, 1.0)


def test_beginning_of_every_file_in_a_bucket_is_checked_with_one_request(
    model: Path, bucket_uri: str, monkeypatch: pytest.MonkeyPatch
):
    read_range, requests = S3Store.read_range, []

    def counted(store: S3Store, *arguments: Any) -> bytes:
        requests.append(arguments)
        return read_range(store, *arguments)

    def facts_with(name: str) -> ModelFacts:
        with_value(model, name, 0, float("nan"))
        upload_directory(model, open_store(bucket_uri), "", ["model.safetensors"])
        with_value(model, name, 0, 1.0)
        return read_model_facts(bucket_uri)

    upload_directory(model, open_store(bucket_uri), "", [path.name for path in model.iterdir()])
    monkeypatch.setattr(S3Store, "read_range", counted)
    with pytest.raises(ModelError, match=rf"^{bucket_uri}/model\.safetensors: the tensor {NORM} "):
        check_finite_weights(facts_with(NORM), [])
    monkeypatch.setattr(files, "_BYTES_OF_FILE_IN_BUCKET", 1000)
    far = facts_with(NORM)
    requests.clear()
    check_finite_weights(far, [])
    assert len(requests) == 1
    with pytest.raises(ModelError, match=rf"the tensor {HEAD} "):
        check_finite_weights(facts_with(HEAD), [])


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        (None, None),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes (8 bits)"),
        ({"bits": 4}, "a method that it does not name"),
        ({}, "a method that it does not name"),
        ("gptq", "a method that it does not name"),
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True], ids=["", "of the text model"])
def test_quantization_is_read_from_config_json(settings: Any, method: str | None, nested: bool, model: Path):
    config = json.loads((model / "config.json").read_text())
    quantized = {"quantization_config": settings}
    (model / "config.json").write_text(
        json.dumps(config | ({"text_config": quantized} if nested else quantized))
    )
    assert read_model_facts(str(model)).quantization == method


def tensor(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"a": tensor(), "b": tensor()}, "b has the data_offsets 0, 8"),
        ({"a": tensor(shape=[3])}, "a has the data_offsets 0, 8"),
        ({"a": tensor(data_offsets=[8, 16])}, "a has the data_offsets 8, 16"),
        ({"a": tensor(dtype="F33")}, "unknown dtype F33"),
        ({"a": tensor(), "__metadata__": {"format": 1}}, "__metadata__"),
        ({"a": tensor(shape=[-2])}, r"a has the shape \[-2\]"),
        ({"a": tensor(shape=["2"])}, r"a has the shape \['2'\]"),
    ],
    ids=str,
)
def test_header_that_the_safetensors_library_rejects_is_an_error(
    adapter: Path, tmp_path: Path, content: dict[str, Any], named: str
):
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    start = header(content)
    end = max(value["data_offsets"][1] for value in content.values() if "data_offsets" in value)
    (copy / "adapter_model.safetensors").write_bytes(start + bytes(end))
    with pytest.raises(SafetensorError):
        load_file(copy / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=rf"adapter_model\.safetensors: the header .*{named}"):
        read_adapter_facts(str(copy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_each_dtype_are_accepted(adapter: Path, tmp_path: Path, dtype: Any):
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    save_file({"a": torch.zeros(2, 3).to(dtype), "b": torch.zeros(5)}, copy / "adapter_model.safetensors")
    assert read_adapter_facts(str(copy)).parameter_shapes == {"a": (2, 3), "b": (5,)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": 1e40}, "lora_alpha is 1e\\+40"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"alpha_pattern": {"q_proj": 10**40}}, "q_proj is 10"),
        ({"trainable_token_indices": [5, 6, 5]}, "trainable_token_indices.* lists 5 twice"),
        ({"trainable_token_indices": {"embed_tokens": [5, 5]}}, "trainable_token_indices.* lists 5 twice"),
        ({"lora_alpha": -8}, "lora_alpha is -8"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"alpha_pattern": {"q_proj": 0}}, "q_proj is 0"),
        ({"rank_pattern": None}, "rank_pattern: .*None"),
        ({"r": "8"}, "r: .*'8'"),
        ({"trainable_token_indices": "1"}, "trainable_token_indices: .*'1'"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices: .*-1"),
        ({"target_modules": "(q_proj"}, "target_modules.*regular expression"),
        (
            {"layers_to_transform": [0], "target_modules": ["q_proj"], "layers_pattern": "("},
            "layers_pattern.*regular",
        ),
        (
            {"layers_to_transform": [0], "target_modules": ["q_proj"], "layers_pattern": ["h", "("]},
            "layers_pattern.*regular",
        ),
        ({"modules_to_save": ["("]}, "modules_to_save.*regular expression"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7"),
        ({"revision": 7}, "revision is 7"),
        ({"eva_config": 7}, "eva_config is 7"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: .*'lm_head'"),
    ],
    ids=str,
)
def test_invalid_setting_of_an_adapter_is_named(
    adapter: Path, tmp_path: Path, changes: dict[str, Any], named: str
):
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change_config(copy, **changes)
    with pytest.raises(ModelError, match=rf"adapter_config\.json: .*{named}"):
        read_adapter_facts(str(copy))


def test_fractional_alpha_and_empty_layers_pattern_are_accepted(adapter: Path, tmp_path: Path):
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change_config(copy, lora_alpha=22.6, alpha_pattern={"q_proj": 0.5}, layers_pattern=[])
    assert read_adapter_facts(str(copy)).lora["lora_alpha"] == 22.6


def test_null_is_read_as_a_setting_that_is_off(adapter: Path, tmp_path: Path):
    """Axolotl writes `fan_in_fan_out: null`, and PEFT takes null for false."""
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    switches = ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")
    change_config(copy, **dict.fromkeys(switches))
    assert read_adapter_facts(str(copy)).lora.keys().isdisjoint(switches)


def test_config_in_utf_16_is_rejected(adapter: Path, tmp_path: Path):
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    path = copy / "adapter_config.json"
    path.write_text(path.read_text(), "utf-16")
    with pytest.raises(ModelError, match=r"adapter_config\.json: not valid JSON"):
        read_adapter_facts(str(copy))


def test_empty_directory_raises_an_error_with_example_ids(tmp_path: Path):
    with pytest.raises(ModelError, match=r"org/name.*s3://"):
        read_model_facts(str(tmp_path))


def test_adapter_facts_equal_those_of_peft(tiny_model: Path, adapter: Path):
    facts = read_adapter_facts(str(adapter))
    assert facts.base_model == str(tiny_model)
    assert facts.lora["r"] == 4
    assert not facts.has_tokenizer
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), adapter, is_trainable=True
    )
    total = sum(rows * columns for rows, columns in facts.parameter_shapes.values())
    assert total == loaded.get_nb_trainable_parameters()[0]


def test_a_swapped_model_or_adapter_raises_an_error_with_the_right_key(tiny_model: Path, adapter: Path):
    with pytest.raises(ModelError, match=r"adapter.*initial_adapter_model_ckpt_path"):
        read_model_facts(str(adapter))
    with pytest.raises(ModelError, match=r"model.*initial_base_model_ckpt_path"):
        read_adapter_facts(str(tiny_model))


def test_adapter_in_a_subdirectory_is_named(adapter: Path, tmp_path: Path):
    shutil.copytree(adapter, tmp_path / "saved" / "default")
    with pytest.raises(ModelError, match=rf"use {tmp_path}/saved/default\.$"):
        read_adapter_facts(str(tmp_path / "saved"))


def test_adapter_in_several_files_is_an_error_that_names_them(adapter: Path, tmp_path: Path):
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model-00001-of-00001.safetensors")
    with pytest.raises(ModelError, match=r"several files \(found: .*adapter_model-00001-of-00001") as error:
        read_adapter_facts(str(copy))
    assert "ickle" not in str(error.value)


def test_an_adapter_that_cannot_be_trained_further_raises_an_error(adapter: Path, tmp_path: Path):
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ModelError, match=r"peft_type.*'PREFIX_TUNING'.*LORA"):
        read_adapter_facts(str(copy))
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors.*adapter_model\.bin"):
        read_adapter_facts(str(copy))
    (copy / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config\.json.*/checkpoints/step-"):
        read_adapter_facts(str(copy))


@pytest.mark.parametrize(
    ("key", "for_model", "for_tokenizer"),
    [
        ("config.json", True, True),
        ("tokenizer.json", True, True),
        ("chat_template.jinja", True, True),
        ("tokenizer.model", True, True),
        ("additional_chat_templates/tool_use.jinja", True, True),
        ("other/tool_use.jinja", False, False),
        ("model-00001-of-00002.safetensors", True, False),
        ("model.safetensors.index.json", True, False),
        ("pytorch_model.bin", False, False),
        ("optimizer.pt", False, False),
        ("trainer_state.json", False, False),
        ("MANIFEST.json", False, False),
        ("original/consolidated.safetensors", False, False),
        ("modeling.py", False, False),
    ],
)
def test_only_model_and_tokenizer_files_are_downloaded_to_a_node(
    key: str, for_model: bool, for_tokenizer: bool
):
    assert is_model_file(key) == for_model
    assert is_tokenizer_file(key) == for_tokenizer


def test_existing_directory_takes_precedence_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    for hub_id in ("gpt2", "org/name", "meta-llama/Llama-3.1-8B"):
        assert is_hub_id(hub_id)
    for other in ("org/here", "s3://bucket/model", "./org/name", "/models/llama", "a/b/c", "run:name"):
        assert not is_hub_id(other)

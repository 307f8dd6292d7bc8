"""Model files: read shapes and sizes from safetensors headers and detect faults, without torch or weights."""

import json
import math
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from configs.schema import LARGEST_ALPHA, LoraConfig
from utils.errors import AnnealError, first_line
from utils.storage.bucket import Store, is_remote, join_uri, open_store

# Every file type that from_pretrained reads; excludes pickle, optimizer state and other frameworks' weights.
_MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken")
_OUR_FILES = {"trainer_state.json", "MANIFEST.json", "EXPORT.json"}
_PICKLED_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
"""PEFT's name of an adapter's weights."""
_ADAPTER_CONFIG = "adapter_config.json"
_SWITCHES = {name for name, entry in LoraConfig.model_fields.items() if entry.annotation is bool}
ALL_WEIGHTS = "its *.safetensors"
"""The weight files of a model in messages that cannot name one."""
_SINGLE = "model.safetensors"
_REQUESTS = 16  # to the Hub at a time
_BYTES_ON_THE_HUB = 100_000
"""Bytes that one request reads of a weight file on the Hub; most headers are shorter."""
CHAT_TEMPLATE_FILE = "chat_template.jinja"
COMPLETE_TOKENIZER = frozenset({"tokenizer.json", "tokenizer_config.json"})
"""Files without which a tokenizer beside an adapter is not used."""
_TOKENIZER_FILES = COMPLETE_TOKENIZER | {"tokenizer.model", "vocab.json", CHAT_TEMPLATE_FILE}
_MORE_TEMPLATES = "additional_chat_templates"
"""Directory of a tokenizer's chat templates beside the default one, such as tool_use.jinja."""
_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the safetensors format's own limit
_LFS_POINTER = b"version "
"""First bytes of the text that Git stores instead of a large file."""
_BITS_OF_DTYPE = (
    dict.fromkeys(("F64", "I64", "U64", "C64"), 64)
    | dict.fromkeys(("F32", "I32", "U32"), 32)
    | dict.fromkeys(("BF16", "F16", "I16", "U16"), 16)
    | dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8)
    | {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
)
"""The safetensors format's dtypes."""
_EXPONENTS = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}
"""Dtype -> the integer of the same size, and the bits of the exponent, which are all 1 in NaN and infinity alone."""
_BYTES_OF_DIRECTORY = 256 * 1024 * 1024
_BYTES_OF_FILE_IN_BUCKET = 1024 * 1024
_BYTES_COMPARED = 16 * 1024 * 1024


class ModelError(AnnealError):
    """A fault in a model or adapter; the message names the source, the fault and the fix."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, as the file's header describes it."""

    file: str
    """Name of the file."""
    dtype: str
    """A key of `_BITS_OF_DTYPE`."""
    shape: tuple[int, ...]
    size: int
    """Number of bytes."""
    start: int | None
    """Position of its first byte in the file; None for models on the Hub, whose weights are not read."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a base model, read from its files."""

    source: str
    """Hub id, directory or URI of the model."""
    architecture: str
    parameter_shapes: dict[str, tuple[int, ...]]
    """Shapes as stored, where 4-bit weights are packed two per byte. See architecture.py for the real shapes."""
    max_context: int | None
    """Longest supported sequence in tokens (`max_position_embeddings`)."""
    quantization: str | None
    """Method by which the weights are quantized, as transformers names it; None for plain weights."""
    tie_word_embeddings: bool
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Name -> tensor of its weight files."""

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(math.prod(shape) for shape in self.parameter_shapes.values())

    @cached_property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Return module -> (outputs, inputs) for modules whose weight is a matrix."""
        return {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self.parameter_shapes.items()
            if len(shape) == 2 and name.endswith(".weight")
        }

    def file_of(self, parameter: str) -> str:
        """Return the weight file that has a parameter, or that lacks it if there is only one; else a pattern of all."""
        if parameter in self.tensors:
            return self.tensors[parameter].file
        files = {tensor.file for tensor in self.tensors.values()}
        return files.pop() if len(files) == 1 else ALL_WEIGHTS


def is_model_file(key: str) -> bool:
    """Return whether `from_pretrained` needs the file: safetensors weights, config or tokenizer."""
    path = PurePosixPath(key)
    if path.parts[:-1] == (_MORE_TEMPLATES,):
        return path.suffix == ".jinja"
    return len(path.parts) == 1 and path.suffix in _MODEL_FILES and path.name not in _OUR_FILES


def is_tokenizer_file(key: str) -> bool:
    """Return whether the tokenizer or the model config needs the file; a dry run reads only these files."""
    return is_model_file(key) and not key.endswith((".safetensors", ".safetensors.index.json"))


def only_indexed_weights(source: str, wanted: Callable[[str], bool]) -> Callable[[str], bool]:
    """Return `wanted` without the weight files that the index of a model does not list, such as Mistral's consolidated ones.

    Args:
        source: Directory or URI of a model or an adapter.
        wanted: Returns whether a file is needed.
    """
    store = open_store(source)
    if store.read_if_exists(_INDEX) is None:
        return wanted
    listed = _read_index(store) | {ADAPTER_FILE}
    return lambda key: wanted(key) and (not key.endswith(".safetensors") or key in listed)


def is_hub_id(model_id: str) -> bool:
    """Return whether this is a Hub repository id (`org/name` or `name`); an existing directory takes precedence."""
    return (
        not is_remote(model_id)
        and not Path(model_id).exists()
        and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id) is not None
    )


def base_model_facts(source: str) -> ModelFacts:
    """Read the facts of a base model: a Hub id, a directory or a URI."""
    return read_hub_facts(source) if is_hub_id(source) else read_model_facts(source)


def read_model_facts(source: str) -> ModelFacts:
    """Read a model's config and the headers of its safetensors files."""
    store = open_store(source)
    names = {stored.key: stored.size for stored in store.list() if "/" not in stored.key}
    if not names:
        raise ModelError(
            f"model {source}: no files found. Use a Hub id (org/name), a directory or an s3:// prefix that contains "
            "config.json, the tokenizer and *.safetensors."
        )
    if "config.json" not in names:
        hint = (
            " It contains a LoRA adapter; set initial_adapter_model_ckpt_path to it instead."
            if _ADAPTER_CONFIG in names
            else " Copy it there from the original model."
        )
        raise ModelError(f"model {source}: config.json is missing (found: {_some(names)}).{hint}")
    check_no_adapter(source, names)
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if not weights:
        pickled = sorted(name for name in names if name.endswith(_PICKLED_WEIGHTS))
        if pickled:
            raise ModelError(
                f"model {source}: the weights are only available as pickle ({_some(pickled)}), which can execute code when loaded. "
                "Convert them to safetensors with save_pretrained and use that copy."
            )
        raise ModelError(
            f"model {source}: no weights (*.safetensors) next to config.json (found: {_some(names)}). Copy them there, or use another path."
        )
    config = _read_json(store, "config.json")
    if not {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"} & names.keys():
        raise ModelError(
            f"model {source}: no tokenizer (tokenizer.json or tokenizer.model) next to config.json. Copy it there from the original model."
        )
    weights = _loaded_weights(store, source, config, weights)
    tensors: dict[str, StoredTensor] = {}
    for name in weights:
        tensors.update(_read_header(store, name, names[name]))
    return _facts(source, config, tensors)


def check_no_adapter(source: str, names: Iterable[str]) -> None:
    """Check that no adapter is stored beside a model: transformers would load it into the model without a word.

    Args:
        source: Name of the model in messages.
        names: Names of the model's files.
    """
    if _ADAPTER_CONFIG in names:
        raise ModelError(
            f"model {source}: has an adapter beside the model ({_ADAPTER_CONFIG}), which transformers would load with it. Use a copy of the "
            f"model without {_ADAPTER_CONFIG} and {ADAPTER_FILE}. To continue the adapter, write its directory as "
            "initial_adapter_model_ckpt_path."
        )


def _loaded_weights(store: Store, source: str, config: dict[str, Any], found: list[str]) -> list[str]:
    """Return the weight files that transformers loads: model.safetensors, or the shards that the index lists.

    Args:
        store: The model's files.
        source: Name of the model in messages.
        config: Content of config.json.
        found: Names of all weight files.
    """
    _check_named_weights(source, config)
    if store.read_if_exists(_INDEX) is None:
        if _SINGLE in found:
            return [_SINGLE]
        raise ModelError(
            f"model {source}: has neither {_SINGLE} nor {_INDEX}, so transformers does not load {_some(found)}. Copy the index from the "
            f"original model, or rename a file that has all weights to {_SINGLE}."
        )
    shards = _read_shards(store, source, found)
    if _SINGLE in set(found) - shards and not is_remote(source):
        raise ModelError(
            f"model {source}: has both {_SINGLE} and {_INDEX}, and transformers would load the former. Delete the stale one."
        )
    return sorted(shards)


def _check_named_weights(source: str, config: dict[str, Any]) -> None:
    """Raise ModelError if config.json names a weight file of its own."""
    named = config.get("transformers_weights")
    if named not in (None, _SINGLE, _INDEX):
        raise ModelError(
            f"model {source}: config.json names {named!r} as transformers_weights, but only {_SINGLE} and {_INDEX} are supported. Rename "
            "the file in a copy of the model, and remove transformers_weights."
        )


def _read_shards(store: Store, source: str, found: Collection[str]) -> set[str]:
    """Return the weight files that the index of a model lists; raise ModelError if one is missing."""
    shards = _read_index(store)
    if missing := shards.difference(found):
        raise ModelError(
            f"model {source}: {_INDEX} lists missing weight files ({_some(missing)}). Copy them there, or use another path."
        )
    return shards


def _read_index(store: Store) -> set[str]:
    """Return the weight files that the index of a model lists; raise ModelError if transformers cannot read it."""
    index = _read_json(store, _INDEX)
    where, files = join_uri(store.uri, _INDEX), index.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ModelError(
            f"{where}: weight_map must be a JSON object with the weight file of each tensor. Copy the index again from the original model."
        )
    if not isinstance(index.get("metadata"), dict):
        raise ModelError(
            f'{where}: metadata must be a JSON object, or transformers cannot read the index. Add "metadata": {{}} in a copy of the model.'
        )
    return set(files.values())


def _facts(source: str, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> ModelFacts:
    # load_config rejects values of other types.
    text_config = _mapping(config.get("text_config")) or config
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        architectures = [config.get("model_type", "unknown")]
    quantization = config.get("quantization_config")
    return ModelFacts(
        source=source,
        architecture=architectures[0],
        parameter_shapes={name: tensor.shape for name, tensor in tensors.items()},
        max_context=text_config.get("max_position_embeddings"),
        quantization=_quantization(
            text_config.get("quantization_config") if quantization is None else quantization
        ),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        tensors=tensors,
    )


def _quantization(settings: Any) -> str | None:
    """Return the quantization method of a config's quantization_config; bitsandbytes is that with 4 bits."""
    if settings is None:
        return None
    settings = _mapping(settings)
    if settings.get("load_in_4bit"):
        return "bitsandbytes"
    if settings.get("load_in_8bit"):
        return "bitsandbytes (8 bits)"
    return settings.get("quant_method") or "a method that it does not name"


def check_finite_weights(facts: ModelFacts, unused: Collection[str]) -> None:
    """Check weights of a model for NaN and infinite values, without reading all of a large one.

    - In a directory: the beginning of every tensor, 256 MiB in total, which is all of a small model.
    - In a bucket: the first MiB of the weights in each file, with one request.
    - On the Hub: none.

    A run notices other values by the loss of its first step.

    Args:
        facts: The model.
        unused: Names of the tensors that the model does not load.
    """
    store = open_store(facts.source)
    checked = {
        name: tensor
        for name, tensor in facts.tensors.items()
        if tensor.dtype in _EXPONENTS and tensor.size and name not in unused
    }
    beginnings = _beginnings_of_files if is_remote(facts.source) else _beginnings_of_tensors
    for name, content in beginnings(store, checked):
        if not _is_finite(content, checked[name].dtype):
            raise ModelError(
                f"{join_uri(store.uri, checked[name].file)}: the tensor {name} contains NaN or infinite values. Copy the file again, or "
                "use an earlier checkpoint of the run that trained it."
            )


def have_equal_bytes(facts: ModelFacts, first: str, second: str) -> bool:
    """Return whether two stored tensors are the same; those of a model on the Hub, which are not read, count as the same.

    Args:
        facts: The model.
        first: Name of a tensor of its weight files.
        second: Name of another one.
    """
    one, other = facts.tensors[first], facts.tensors[second]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.start is None or other.start is None:
        return True
    store = open_store(facts.source)
    for done in range(0, one.size, _BYTES_COMPARED):
        length = min(_BYTES_COMPARED, one.size - done)
        read = store.read_range(one.file, one.start + done, length)
        if read != store.read_range(other.file, other.start + done, length):
            return False
    return True


def check_dtypes(facts: ModelFacts, parameters: Collection[str], unused: Collection[str]) -> None:
    """Check that no weight of a plain model is quantized: transformers would cast the raw integers or fp8 numbers.

    Args:
        facts: The model.
        parameters: Names of the model's parameters. Buffers, such as masks in older files, may be integers.
        unused: Names of the tensors that the model does not load.
    """
    if facts.quantization is not None:
        return
    for name, tensor in facts.tensors.items():
        is_weight = name in parameters or name.endswith(".weight")
        if is_weight and name not in unused and tensor.dtype not in _EXPONENTS:
            raise ModelError(
                f"{join_uri(facts.source, tensor.file)}: the tensor {name} is stored as {_dtype_name(tensor.dtype)}, but weights must be "
                "bf16, fp16 or fp32. Save it in one of these."
            )


def _dtype_name(dtype: str) -> str:
    """Return torch's name of a safetensors dtype, such as int8 or float8_e4m3."""
    kinds = {"I": "int", "U": "uint", "F": "float", "C": "complex"}
    return re.sub(r"^([IUFC])(?=\d)", lambda kind: kinds[kind[1]], dtype).lower()


def _beginnings_of_tensors(store: Store, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the first bytes of each tensor."""
    share = _BYTES_OF_DIRECTORY // max(len(tensors), 1)
    for name, tensor in tensors.items():
        if tensor.start is not None:
            yield name, store.read_range(tensor.file, tensor.start, min(tensor.size, share))


def _beginnings_of_files(store: Store, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each tensor at the beginning of its file."""
    places = sorted(
        (tensor.file, tensor.start, name) for name, tensor in tensors.items() if tensor.start is not None
    )
    for file, group in groupby(places, key=lambda place: place[0]):
        starts = {name: start for _, start, name in group}
        first = min(starts.values())
        content = store.read_range(file, first, _BYTES_OF_FILE_IN_BUCKET)
        for name, start in starts.items():
            yield name, content[start - first : start - first + tensors[name].size]


def _is_finite(content: bytes, dtype: str) -> bool:
    """Return whether floating-point numbers are finite; a last one that is not complete is not looked at."""
    import numpy

    kind, exponent = _EXPONENTS[dtype]
    bits = numpy.frombuffer(content, kind, count=len(content) // numpy.dtype(kind).itemsize)
    return not bool(((bits & exponent) == exponent).any())


def read_hub_facts(model_id: str) -> ModelFacts:
    """Read the facts of a Hugging Face Hub model through the Hub API, without downloading weights."""
    import huggingface_hub

    with _hub_errors(model_id):
        info = huggingface_hub.model_info(model_id)
        names = [sibling.rfilename for sibling in info.siblings or []]
        check_no_adapter(model_id, names)
        config_file = Path(huggingface_hub.hf_hub_download(model_id, "config.json"))
        config = _read_json(open_store(str(config_file.parent)), config_file.name)
        _check_named_weights(model_id, config)
        if _INDEX in names:
            index = Path(huggingface_hub.hf_hub_download(model_id, _INDEX))
            files = sorted(_read_shards(open_store(str(index.parent)), model_id, names))
        elif _SINGLE in names:
            files = [_SINGLE]
        else:
            raise ModelError(
                f"model {model_id}: has no safetensors weights on the Hub. Convert it with save_pretrained and use that copy."
            )
        tensors: dict[str, StoredTensor] = {}
        with ThreadPoolExecutor(_REQUESTS) as threads:
            for found in threads.map(partial(_read_hub_header, model_id), files):
                tensors.update(found)
    return _facts(model_id, config, tensors)


def _read_hub_header(model_id: str, file: str) -> dict[str, StoredTensor]:
    """Read the header of a weight file on the Hub with the Hub's client, and check it as that of a local file."""
    import huggingface_hub

    where, url = f"model {model_id}: {file}", huggingface_hub.hf_hub_url(model_id, file)
    stated = huggingface_hub.get_hf_file_metadata(url).size
    if stated is None:
        raise ModelError(f"{where}: the Hub does not state its size, without which it cannot be downloaded.")
    beginning = b""

    def read(start: int, length: int) -> bytes:
        nonlocal beginning
        if start + length > len(beginning):
            beginning, size = _read_hub_beginning(url, max(start + length, _BYTES_ON_THE_HUB))
            if size not in (None, stated):
                raise ModelError(
                    f"{where}: the Hub states {stated} bytes, but stores {size}; the file is truncated or corrupt. Upload it again."
                )
        return beginning[start : start + length]

    tensors = _parse_header(file, where, stated, read)
    return {name: replace(tensor, start=None) for name, tensor in tensors.items()}


def _read_hub_beginning(url: str, length: int) -> tuple[bytes, int | None]:
    """Return the first bytes of a file on the Hub and the size of the file; None if the server does not send it with them."""
    from huggingface_hub import constants, utils

    headers = utils.build_hf_headers() | {"Range": f"bytes=0-{length - 1}"}
    response = utils.get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    utils.hf_raise_for_status(response)
    size = response.headers.get("Content-Range", "").rpartition("/")[2]
    return response.content, int(size) if size.isdigit() else None


def fetch_hub_model(model_id: str, wanted: Callable[[str], bool], revision: str | None = None) -> Path:
    """Download the wanted files of a Hub model into the Hub cache of this node and return their directory.

    Args:
        model_id: Id of the repository.
        wanted: Returns whether a file is needed.
        revision: Commit or branch; None: the latest commit.
    """
    import huggingface_hub

    with _hub_errors(model_id):
        info = huggingface_hub.model_info(model_id, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        if _INDEX in names:
            index = Path(huggingface_hub.hf_hub_download(model_id, _INDEX, revision=revision))
            wanted = only_indexed_weights(str(index.parent), wanted)
        patterns = [name for name in names if wanted(name)]
        directory = huggingface_hub.snapshot_download(model_id, revision=revision, allow_patterns=patterns)
    return Path(directory)


def hub_revision(model: str, directory: Path) -> str | None:
    """Return the commit of a Hub model whose files `fetch_hub_model` has downloaded; None for other models.

    Args:
        model: Hub id, directory or URI of the model.
        directory: Local directory of its files.
    """
    return directory.name if is_hub_id(model) and directory.parent.name == "snapshots" else None


@contextmanager
def _hub_errors(model_id: str) -> Iterator[None]:
    import httpx
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (httpx.HTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"model {model_id}: cannot be read from the Hugging Face Hub ({first_line(error)}). If it is gated, accept its "
            "license and set HF_TOKEN. Without network access, use a directory or an s3:// prefix that contains the model."
        ) from error


@dataclass(frozen=True)
class AdapterFacts:
    """Facts about a LoRA adapter, read from its files."""

    source: str
    base_model: str
    lora: dict[str, Any]
    """Content of adapter_config.json, without switches that are null."""
    parameter_shapes: dict[str, tuple[int, ...]]
    """Name -> shape of each tensor in adapter_model.safetensors."""
    tokenizer_files: frozenset[str] = frozenset()
    """Names of the tokenizer's files beside the adapter."""

    @property
    def has_tokenizer(self) -> bool:
        """Return whether a tokenizer is stored beside the adapter, with the chat template and added tokens that it was trained with."""
        return self.tokenizer_files >= COMPLETE_TOKENIZER

    @property
    def base_revision(self) -> str | None:
        """Return the commit of a base model on the Hub that it was trained on, if it is recorded."""
        return self.lora.get("revision")

    @property
    def largest_rank(self) -> int:
        """Return the largest rank of its matrices, which `rank_pattern` may set above `r`."""
        return max(
            (shape[0] for name, shape in self.parameter_shapes.items() if ".lora_A." in name), default=0
        )


def read_adapter_facts(source: str) -> AdapterFacts:
    """Read an adapter's config and shapes. An adapter on the Hub is downloaded, since it is small."""
    store = open_store(str(fetch_hub_model(source, is_model_file)) if is_hub_id(source) else source)
    stored_sizes = {stored.key: stored.size for stored in store.list()}
    names = {key: size for key, size in stored_sizes.items() if "/" not in key}
    if "adapter_config.json" not in names:
        nested = sorted(key for key in stored_sizes if re.fullmatch(r"[^/]+/adapter_config\.json", key))
        if "config.json" in names:
            hint = " It contains a full model; set initial_base_model_ckpt_path to it instead."
        elif nested:  # PEFT saves an adapter that is not named default in a subdirectory
            hint = f" It is in a subdirectory: use {join_uri(source, nested[0].rpartition('/')[0])}."
        else:
            hint = " Use the path of a checkpoint (…/checkpoints/step-000120) or of a completed run."
        raise ModelError(f"adapter {source}: adapter_config.json is missing (found: {_some(names)}).{hint}")
    if ADAPTER_FILE not in names and any(name.startswith("adapter_model-") for name in names):
        raise ModelError(
            f"adapter {source}: its weights are in several files (found: {_some(names)}), which PEFT does not load. Join them in one "
            f"{ADAPTER_FILE}, with safetensors' load_file and save_file."
        )
    if ADAPTER_FILE not in names:
        raise ModelError(
            f"adapter {source}: {ADAPTER_FILE} is missing (found: {_some(names)}). Pickled adapters (.bin) are "
            "rejected because unpickling can execute code. If you trust the file, load it and save it again with save_pretrained()."
        )
    config = _read_json(store, "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"adapter {source}: peft_type is {config.get('peft_type')!r}, but only LORA is supported. Use a LoRA adapter."
        )
    # Axolotl writes null for a switch that is off, and PEFT reads it so.
    config = {key: value for key, value in config.items() if value is not None or key not in _SWITCHES}
    _check_values(config, f"adapter {source}: adapter_config.json")
    tensors = _read_header(store, ADAPTER_FILE, names[ADAPTER_FILE])
    return AdapterFacts(
        source=source,
        base_model=config.get("base_model_name_or_path") or "",
        lora=config,
        parameter_shapes={name: tensor.shape for name, tensor in tensors.items()},
        tokenizer_files=frozenset(names.keys() & _TOKENIZER_FILES),
    )


def _check_values(config: dict[str, Any], where: str) -> None:
    """Check an adapter's settings as the YAML's lora_config is checked, with fractional alphas, which PEFT accepts."""
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            raise ModelError(
                f"{where}: {key} is {config[key]!r}, but must be text. Write that of the model that it was trained on, or null."
            )
    for key in ("eva_config", "corda_config", "lora_ga_config"):
        if not isinstance(config.get(key), dict | None):
            raise ModelError(f"{where}: {key} is {config[key]!r}, but must be a JSON object. Write null.")
    alphas = {"lora_alpha": config.get("lora_alpha", 8), **_mapping(config.get("alpha_pattern"))}
    for key, alpha in alphas.items():
        if type(alpha) not in (int, float) or not 0 < alpha <= LARGEST_ALPHA:
            raise ModelError(
                f"{where}: the scaling factor {key} is {alpha!r}, but must be a number above 0 that fp32 can hold. Write the value that it "
                "was trained with."
            )
    others = ("task_type", "init_lora_weights", "lora_alpha")
    settings = {
        name: value
        for name, value in config.items()
        if name in LoraConfig.model_fields and name not in others
    }
    if "alpha_pattern" in settings and isinstance(settings["alpha_pattern"], dict):
        settings["alpha_pattern"] = dict.fromkeys(settings["alpha_pattern"], 1)
    if not settings.get("layers_pattern"):  # some trainers write an empty list
        settings.pop("layers_pattern", None)
    try:
        LoraConfig.model_validate(settings)
    except ValidationError as error:
        fault = error.errors()[0]
        key = f"{fault['loc'][0]}: " if fault["loc"] else ""
        found = f" (found: {settings[str(fault['loc'][0])]!r})" if fault["loc"] else ""
        raise ModelError(
            f"{where}: {key}{fault['msg']}{found}. Restore the file as PEFT's save_pretrained wrote it."
        ) from error


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def count_lora_parameters(facts: ModelFacts, lora: LoraConfig) -> int:
    """Count LoRA's trainable parameters: `r * (inputs + outputs)` per matched matrix, plus `modules_to_save`.

    Biases, experts and trainable tokens are not included; `new_adapter` (training/models/adapter.py) counts them.
    """
    total = 0
    for module in targeted_modules(facts, lora):
        outputs, inputs = facts.matrix_shapes[module]
        total += _rank(lora, module) * (outputs + inputs)
        if lora.use_dora:
            total += outputs
    for module in lora.modules_to_save or []:
        total += sum(
            math.prod(shape)
            for name, shape in facts.parameter_shapes.items()
            if name.split(".")[-2:-1] == [module]
        )
    return total


def targeted_modules(facts: ModelFacts, lora: LoraConfig) -> list[str]:
    """Return the modules that get an adapter."""
    return [module for module in facts.matrix_shapes if is_targeted(lora, module)]


def lora_ranks(facts: ModelFacts, lora: LoraConfig) -> dict[str, int]:
    """Return the rank of each module that gets an adapter."""
    return {module: _rank(lora, module) for module in targeted_modules(facts, lora)}


def is_fully_trained(lora: LoraConfig | None, parameter: str) -> bool:
    """Return whether `modules_to_save` makes a base parameter fully trainable."""
    return any(f".{module}." in f".{parameter}" for module in (lora.modules_to_save or [] if lora else []))


def untargeted_names(facts: ModelFacts, lora: LoraConfig) -> list[str]:
    """Return the listed target modules that match no module. A tied lm_head has no matrix of its own and is accepted."""
    if not isinstance(lora.target_modules, list):
        return []
    return [
        name
        for name in lora.target_modules
        if not any(is_named([name], module) for module in facts.matrix_shapes)
        and not (name == "lm_head" and facts.tie_word_embeddings)
    ]


def is_targeted(lora: LoraConfig, module: str) -> bool:
    """Return whether a module gets an adapter, if it is a layer that can have one."""
    if lora.exclude_modules and is_named(lora.exclude_modules, module):
        return False
    if lora.layers_to_transform is not None:
        layer = re.match(r".*\.[^.]*\.(\d+)\.", module)
        wanted = (
            lora.layers_to_transform
            if isinstance(lora.layers_to_transform, list)
            else [lora.layers_to_transform]
        )
        if layer is None or int(layer[1]) not in wanted:
            return False
    if lora.target_modules == "all-linear" or lora.target_modules is None:
        return not re.search(r"(embed|wte|wpe|lm_head|norm|embed_out)", module.split(".")[-1])
    return is_named(lora.target_modules, module)


def is_named(names: list[str] | str, module: str) -> bool:
    """Match a module as PEFT does: a regular expression for the full name, or a list of name suffixes."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _rank(lora: LoraConfig, module: str) -> int:
    ranks = (rank for pattern, rank in lora.rank_pattern.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(ranks, lora.r)


def check_weight_files(directory: Path) -> None:
    """Check the local weight files that a model is loaded from, since a run may start again after a file has changed."""
    store = open_store(str(directory))
    found = [path.name for path in directory.glob("*.safetensors")]
    for name in _loaded_weights(store, str(directory), _read_json(store, "config.json"), found):
        _read_header(store, name, (directory / name).stat().st_size)


def _read_header(store: Store, name: str, size: int) -> dict[str, StoredTensor]:
    return _parse_header(name, join_uri(store.uri, name), size, partial(store.read_range, name))


def _parse_header(
    name: str, where: str, size: int, read: Callable[[int, int], bytes]
) -> dict[str, StoredTensor]:
    """Read the header of a weight file, and check that it fits the size of the file.

    Args:
        name: Name of the file.
        where: Its name in messages.
        size: Its size in bytes.
        read: Returns the bytes of a range, given its start and its length.
    """
    if size < 8:
        raise ModelError(f"{where}: {size} bytes is too short for a safetensors file. Upload it again.")
    beginning = read(0, 8)
    if beginning == _LFS_POINTER:
        raise ModelError(
            f"{where}: is a Git LFS pointer instead of the weights. Run `git lfs pull` in the repository, and upload the file again."
        )
    (length,) = struct.unpack("<Q", beginning)
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise ModelError(
            f"{where}: header length is {length} bytes but the file has {size}; it is corrupt or not a safetensors file. Upload it again."
        )
    try:
        header = json.loads(read(8, length))
        described = {key: value for key, value in header.items() if key != "__metadata__"}
        end = max((value["data_offsets"][1] for value in described.values()), default=0)
        _check_header(header)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{where}: the header cannot be parsed ({first_line(error)}). Upload it again."
        ) from error
    if 8 + length + end != size:
        raise ModelError(
            f"{where}: has {size} bytes, but its header requires {8 + length + end}; the file is truncated or corrupt. Upload it again."
        )
    return {
        key: StoredTensor(
            file=name,
            dtype=value["dtype"],
            shape=tuple(value["shape"]),
            size=value["data_offsets"][1] - value["data_offsets"][0],
            start=8 + length + value["data_offsets"][0],
        )
        for key, value in described.items()
    }


def _check_header(header: dict[str, Any]) -> None:
    """Check what the safetensors library checks when it opens a file; raise ValueError otherwise."""
    metadata = header.get("__metadata__") or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ has values that are not text")
    tensors = [(name, value) for name, value in header.items() if name != "__metadata__"]
    position = 0
    for name, tensor in sorted(tensors, key=lambda entry: entry[1]["data_offsets"]):
        start, end = tensor["data_offsets"]
        if tensor["dtype"] not in _BITS_OF_DTYPE:
            raise ValueError(f"{name} has the unknown dtype {tensor['dtype']}")
        if not all(type(size) is int and size >= 0 for size in tensor["shape"]):
            raise ValueError(f"{name} has the shape {tensor['shape']}")
        if (
            start != position
            or 8 * (end - start) != math.prod(tensor["shape"]) * _BITS_OF_DTYPE[tensor["dtype"]]
        ):
            raise ValueError(
                f"{name} has the data_offsets {start}, {end}, which do not fit its shape or its neighbors"
            )
        position = end


def _read_json(store: Store, name: str) -> dict[str, Any]:
    try:
        value = json.loads(store.read(name).decode("utf-8"))  # transformers and PEFT read no other encoding
    except ValueError as error:
        raise ModelError(
            f"{join_uri(store.uri, name)}: not valid JSON ({first_line(error)}). Upload it again."
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{join_uri(store.uri, name)}: contains {type(value).__name__}, not a JSON object. Upload it again."
        )
    return value


def _some(names) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") or "nothing"

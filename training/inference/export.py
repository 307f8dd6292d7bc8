"""Export of a checkpoint as a merged model or only its adapter, with tokenizer and model card.

The config file, which every program needs to load the export, is uploaded after all other files, and EXPORT.json last.
An incomplete export therefore never looks complete. Until then, EXPORT.unfinished marks the export as unfinished.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
from pydantic import ValidationError

from configs.loading import ConfigError
from configs.schema import ExportConfig
from runs.layout import EXPORT_FILE, Export, FileRecord, Verification, export_uri
from runs.reading import read_metrics, read_result, sizes
from training.checkpoints.weights import fetch_weights
from training.data.prompting import stop_tokens
from training.inference.model_card import Card, describe_sampling
from training.inference.vllm_environment import python_of_vllm
from training.models.files import (
    ADAPTER_FILE,
    ModelError,
    ModelFacts,
    base_model_facts,
    is_tokenizer_file,
    read_adapter_facts,
    read_model_facts,
)
from training.models.hub import push_directory
from training.planning.exportable import (
    FROM_COMMAND,
    GGUF_TOOL,
    check_mergeable,
    check_vllm_adapter,
    check_vllm_base,
    gguf_converter,
)
from utils.files import checksum, checksum_bytes, first_changed, format_bytes, free_bytes
from utils.storage.bucket import (
    DamagedError,
    Store,
    check_writable,
    is_remote,
    join_uri,
    local_path,
    open_store,
    sync_to_node,
    upload_directory,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from training.inference.checkpoint_model import TrainedModel

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_LARGEST_SHARD = "5GB"
_UNFINISHED = "EXPORT.unfinished"
_CARD = "README.md"
_NOT_VERIFIED = "The export was not verified"
_ROUNDING = "Rounding the weights to"
_NOTED_RISE = 0.01
"""Rise of the loss in nats from which the rounding of the weights is noted: 1 % of the perplexity."""
_SERVED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
"""Settings of a generation config that vLLM uses for requests without them."""
_LONGROPE_OF_PHI_3 = {"short_factor", "long_factor"}
_LONGROPE_KEYS = {
    "phi3": _LONGROPE_OF_PHI_3,
    "phi4_multimodal": _LONGROPE_OF_PHI_3,
    "phimoe": _LONGROPE_OF_PHI_3 | {"short_mscale", "long_mscale", "original_max_position_embeddings"},
}
"""`model_type` -> the keys of rope_scaling that transformers 4 requires beside `type`; it rejects others."""
_ALSO_IN_LONGROPE = {"rope_type", "type", "original_max_position_embeddings"}
# The config file that every program needs to load an export.
_LOADED_BY = {"merged": "config.json", "model": "config.json", "adapter": "adapter_config.json"}


def export(trained: "TrainedModel", settings: ExportConfig, *, progress: Callable[[str], None]) -> Export:
    """Write an export atomically, or return an identical existing one; with `verify`, verify that one in place.

    Args:
        trained: The checkpoint to export.
        settings: Kind, dtype and destination of the export.
        progress: Called with a description of each phase.
    """
    planned = _plan(trained, settings)
    store = open_store(planned.uri)
    check_writable(planned.uri)
    if (written := _read_export(store)) is not None:
        verifies = bool(settings.verify) and _lacks_verification(written)
        _check_same(written, planned, store, {_CARD} if verifies else set())
        if verifies:
            return _verify_in_place(trained, written, settings, store, progress)
        if settings.verify:
            progress("reading the export")
            _ = _fetch(written, trained.cache)
        return written
    _ = _files_to_replace(store)
    _check_tools_and_weights(trained, planned)
    scratch = trained.cache.parent / "exports"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        staged = Path(temporary)
        if planned.kind == "adapter":
            progress("copying the adapter")
            _copy_adapter(trained, staged)
        else:
            progress("loading the weights")
            _write_model(trained, planned, staged, progress)
        trained.tokenizer().save_pretrained(staged)
        sampling, limit = _sampling_settings(staged), _rope_limit(trained)
        notes = [*planned.notes, *_sampling_notes(sampling), *_rope_notes(limit)]
        planned = planned.model_copy(update={"notes": notes})
        planned = _verified(trained, planned, settings, staged, progress, "Nothing was exported.")
        if planned.gguf:
            progress("writing the GGUF file")
            _write_gguf(planned, settings, staged)
        (staged / _CARD).write_text(_card(trained, planned, sampling, limit).to_markdown(), "utf-8")
        progress(f"writing to {planned.uri}")
        return _publish(store, planned, staged)


def push(exported: Export, cache: Path, repository: str, *, private: bool | None) -> str:
    """Push the files of an export to a model repository on the Hub, and return its URL.

    Args:
        exported: The export.
        cache: Node cache, to which an export in a bucket is downloaded.
        repository: Id of the repository.
        private: Whether a new repository is private; None: the default of the account.
    """
    files = [file.path for file in exported.files]
    directory = _fetch(exported, cache)
    message = f"Upload {describe(exported)} of {exported.checkpoint.split('/')[-3]}"
    return push_directory(directory, files, repository, private=private, message=message)


def _fetch(exported: Export, cache: Path) -> Path:
    """Return a directory of this node with the files of an export, verified against its record."""
    checksums = {file.path: file.checksum for file in exported.files}
    try:
        directory = sync_to_node(exported.uri, cache / "exports", lambda key: key in checksums, checksums)
    except DamagedError as error:
        raise _changed(exported.uri, error.key) from error
    # sync_to_node has verified a download.
    if not is_remote(exported.uri) and (file := first_changed(directory, checksums)):
        raise _changed(exported.uri, file)
    return directory


def _changed(uri: str, file: str) -> ConfigError:
    return ConfigError(
        f"{join_uri(uri, file)}: changed since the export. Delete {uri}, or choose another destination."
    )


def _plan(trained: "TrainedModel", settings: ExportConfig) -> Export:
    is_adapter = trained.base is not None
    if not settings.merge and not is_adapter:
        raise ConfigError(
            f"{trained.checkpoint}: a full-parameter model has no adapter to export. Remove merge: false or --no-merge."
        )
    kind: Literal["model", "merged", "adapter"] = (
        "model" if not is_adapter else "merged" if settings.merge else "adapter"
    )
    dtype = None if kind == "adapter" else settings.dtype
    name = f"{kind}-{dtype}" if dtype else kind
    uri = settings.to or export_uri(trained.run_uri, trained.manifest.step, name)
    run_name = trained.run_uri.rpartition("/")[2]
    return Export(
        checkpoint=trained.checkpoint,
        uri=uri if is_remote(uri) else str(local_path(uri)),
        kind=kind,
        dtype=dtype,
        gguf=f"{run_name}-{settings.gguf_type or dtype}.gguf" if settings.gguf else None,
        notes=list(_notes(trained, kind)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=trained.manifest.versions,
        files=[],
    )


def _notes(trained: "TrainedModel", kind: str) -> Iterator[str]:
    if trained.config.load_in_4bit and kind == "merged":
        yield (
            "The adapter was trained on the base model in 4 bits (NF4) and is merged into the 16-bit weights, because quantizing the "
            "merged weights to 4 bits would lose most of the adapter's effect. The eval loss is that of the adapter on the 16-bit base."
        )
    if trained.config.load_in_4bit and kind == "adapter":
        yield "The adapter was trained on the base model in 4 bits (bitsandbytes NF4, double quantization)."


def _sampling_settings(directory: Path) -> dict[str, float]:
    """Return the settings of an export's generation config that change what a vLLM server answers."""
    file = directory / "generation_config.json"
    settings = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return {name: settings[name] for name in _SERVED if settings.get(name) is not None}


def _sampling_notes(sampling: Mapping[str, float]) -> Iterator[str]:
    if sampling:
        yield (
            f"The base model's generation config sets {describe_sampling(sampling)}. vLLM uses this for requests that do not set it; "
            "`vllm serve` with `--generation-config vllm` does not."
        )


def _rope_limit(trained: "TrainedModel") -> int | None:
    """Return the longest sequence with RoPE's ordinary frequencies; see `rope_limit` in training/models/attention.py."""
    from training.models.architecture import load_config
    from training.models.attention import rope_limit

    source = trained.base or trained.checkpoint
    directory = (
        trained.fetch_base(is_tokenizer_file)
        if trained.base
        else fetch_weights(source, trained.cache, is_tokenizer_file)
    )
    return rope_limit(load_config(directory, source, trained.config.trust_remote_code))


def _rope_notes(limit: int | None) -> Iterator[str]:
    if limit is not None:
        yield (
            f"RoPE of this model has other frequencies above {limit:,} tokens. transformers chooses them by the length of each sequence, but "
            f"vLLM by --max-model-len: serve it with --max-model-len {limit}. A larger value changes the answers to shorter requests."
        )


def _read_export(store: Store) -> Export | None:
    content = store.read_if_exists(EXPORT_FILE)
    if content is None:
        return None
    try:
        return Export.model_validate_json(content)
    except ValidationError as error:
        raise ConfigError(
            f"{store.uri_of(EXPORT_FILE)}: damaged. Delete this export, or choose another destination."
        ) from error


def _check_same(written: Export, planned: Export, store: Store, rewritten: Collection[str]) -> None:
    """Check that an existing export is the planned one, and complete but for the files that are written again."""
    if any(getattr(written, key) != getattr(planned, key) for key in ("checkpoint", "kind", "dtype", "gguf")):
        raise ConfigError(
            f"{planned.uri} already contains another export: {describe(written)} of {written.checkpoint}. Choose another destination, "
            "or delete that export."
        )
    stored = sizes(store, "")
    checked = [file for file in written.files if file.path not in rewritten]
    if wrong := [file.path for file in checked if stored.get(file.path) != file.size]:
        raise _changed(planned.uri, wrong[0])


def _lacks_verification(written: Export) -> bool:
    verified = written.verification
    if verified is None:
        return True
    return python_of_vllm().is_file() and (verified.vllm is None or verified.vllm.error is not None)


def _verify_in_place(
    trained: "TrainedModel",
    written: Export,
    settings: ExportConfig,
    store: Store,
    progress: Callable[[str], None],
) -> Export:
    """Verify an existing export, and add the result to its record and its model card."""
    progress("reading the export")
    # Without the card: it is written again before the record, and an interruption may have come between.
    kept = [file for file in written.files if file.path != _CARD]
    directory = _fetch(written.model_copy(update={"files": kept}), trained.cache)
    notes = [note for note in written.notes if not note.startswith((_NOT_VERIFIED, _ROUNDING))]
    unverified = written.model_copy(update={"notes": notes})
    verified = _verified(
        trained, unverified, settings, directory, progress, f"{written.uri} and its record are unchanged."
    )
    sampling, limit = _sampling_settings(directory), _rope_limit(trained)
    card = _card(trained, verified, sampling, limit).to_markdown().encode()
    record = FileRecord(path=_CARD, size=len(card), checksum=checksum_bytes(card))
    files = [record if file.path == _CARD else file for file in written.files]
    exported = verified.model_copy(update={"files": files})
    store.write(_CARD, card)
    store.write(EXPORT_FILE, exported.model_dump_json(indent=2).encode())
    return exported


def _files_to_replace(store: Store) -> set[str]:
    """Return the files at a destination: those of an unfinished export.

    Raises:
        ConfigError: There are other files.
    """
    stored = set(sizes(store, ""))
    unfinished = store.read_if_exists(_UNFINISHED)
    replaced = {_UNFINISHED, *unfinished.decode("utf-8", "replace").splitlines()} if unfinished else set()
    if others := stored - replaced:
        raise ConfigError(
            f"{store.uri} is not empty: it contains {min(others)}. Choose an empty destination."
        )
    return stored


def describe(exported: Export) -> str:
    """Return a short description of an export."""
    kind = {"merged": "the merged model", "model": "the model", "adapter": "the adapter"}[exported.kind]
    return f"{kind} in {exported.dtype}" if exported.dtype else kind


# --- Checks -------------------------------------------------------------------------------------------------------


def _check_tools_and_weights(trained: "TrainedModel", planned: Export) -> None:
    facts = base_model_facts(trained.base) if trained.base else read_model_facts(trained.checkpoint)
    if planned.gguf:
        gguf_converter(facts.architecture)
    if trained.base is None:
        _check_memory_and_disk(facts, planned, trained.cache)
    elif planned.kind == "adapter":
        adapter = read_adapter_facts(trained.checkpoint)
        # The plan has checked an export that the YAML describes.
        check_vllm_base(facts, FROM_COMMAND)
        check_vllm_adapter(adapter.lora, adapter.parameter_shapes, FROM_COMMAND)
    else:
        check_mergeable(facts)
        _check_memory_and_disk(facts, planned, trained.cache)


def _check_memory_and_disk(facts: ModelFacts, planned: Export, cache: Path) -> None:
    """Check that memory holds one copy of the weights, and that the disk holds the staged files."""
    assert planned.dtype is not None
    need = facts.parameters * _BYTES[planned.dtype]
    memory, disk = psutil.virtual_memory().available, free_bytes(cache)
    if need > memory:
        raise ModelError(
            f"model {facts.source}: requires {format_bytes(need)} of memory in {planned.dtype}, but this machine has "
            f"{format_bytes(memory)} free. Run main.py export on a larger machine; it needs only access to the bucket."
        )
    staged = need * (2 if planned.gguf else 1)
    if staged > disk:
        raise ModelError(
            f"model {facts.source}: the export requires {format_bytes(staged)} of disk space, but {cache.parent} has {format_bytes(disk)} "
            "free. Free up disk space."
        )


def _verified(
    trained: "TrainedModel",
    planned: Export,
    settings: ExportConfig,
    directory: Path,
    progress: Callable[[str], None],
    if_wrong: str,
) -> Export:
    """Return the export with its verification.

    Raises:
        ModelError: The export does not compute what was trained. The message ends with `if_wrong`.
    """
    from training.inference.verifying import fits_in_memory, memory_needed, verify_export

    if settings.verify is False:
        return planned
    source = trained.base or trained.checkpoint
    facts = base_model_facts(source)
    reason = None
    if facts.quantization is not None:
        reason = f"a base model in 16 bits or more, but {source} is stored in 4 bits"
    elif not fits_in_memory(facts.parameters):
        reason = f"{format_bytes(memory_needed(facts.parameters))} of memory for the model in fp32"
    if reason:
        if settings.verify:
            raise ModelError(
                f"verify: requires {reason}. Remove verify: true, or run main.py export where this is available."
            )
        note = f"{_NOT_VERIFIED}, which requires {reason}."
        return planned.model_copy(update={"notes": [*planned.notes, note]})
    in_vllm = settings.verify is True and python_of_vllm().is_file()
    try:
        verification = verify_export(trained, planned, directory, in_vllm=in_vllm, progress=progress)
    except ModelError as error:
        raise ModelError(f"{error} {if_wrong}") from error
    notes = [*planned.notes, *_rounding_note(planned, verification, merges=trained.base is not None)]
    return planned.model_copy(update={"verification": verification, "notes": notes})


def _rounding_note(planned: Export, verified: Verification, *, merges: bool) -> list[str]:
    """Return a note about a rise of the loss that the dtype of an export causes, with what to do; none for a small rise."""
    if planned.dtype in (None, "fp32") or verified.loss is None or verified.loss_as_trained is None:
        return []
    rise = verified.loss - verified.loss_as_trained
    otherwise = ", or the adapter by itself with --no-merge" if merges else ""
    advice = (
        f"{_ROUNDING} {planned.dtype} raises the loss by {rise:.2g}: export with --dtype fp32{otherwise}."
    )
    return [advice] if rise >= _NOTED_RISE else []


# --- Conversion ---------------------------------------------------------------------------------------------------


def _write_model(
    trained: "TrainedModel", planned: Export, directory: Path, progress: Callable[[str], None]
) -> None:
    """Write the model with one copy in memory: modules are merged one at a time, and files written shard by shard."""
    from training.inference.merging import merge_adapter, record_tying
    from training.models.torch_provider import load_weights

    assert planned.dtype is not None
    weights, base = trained.weights(), trained.base_weights()
    if base is not None:
        _check_adapter(trained, weights)
    model: PreTrainedModel = load_weights(
        base or weights, dtype=planned.dtype, trust_remote_code=trained.config.trust_remote_code
    )
    if base is not None:
        progress("merging")
        model = merge_adapter(model, base, weights)
    model.config.use_cache = True  # disabled during training
    record_tying(model)
    if model.generation_config is not None:
        _set_stop_tokens(model.generation_config, trained)
    _check_finite(model, planned)
    progress("writing the weights")
    model.save_pretrained(directory, max_shard_size=_LARGEST_SHARD)
    write_earlier_rope_keys(directory / "config.json")


def _check_finite(model: "PreTrainedModel", planned: Export) -> None:
    """Check that no weight is NaN or infinite in the dtype of the export."""
    for name, weight in model.named_parameters():
        lowest, highest = weight.detach().aminmax()  # without a copy; both are NaN if any value is
        if not (lowest.isfinite() and highest.isfinite()):
            fix = (
                "fp16 holds values up to 65,504: export with --dtype bf16 or --dtype fp32."
                if planned.dtype == "fp16"
                else "Export an earlier checkpoint."
            )
            raise ModelError(
                f"{planned.checkpoint}: the tensor {name} has NaN or infinite values in {planned.dtype}. {fix}"
            )


def write_earlier_rope_keys(file: Path) -> None:
    """Repeat `rope_parameters` of a config.json under the keys from before transformers 5, which reads both.

    Readers that do not know `rope_parameters` (transformers 4, most models of mlx-lm) use their default frequencies otherwise,
    without a warning. Models with parameters per kind of layer had no common keys.
    """
    settings = json.loads(file.read_text("utf-8"))
    scaling = dict(settings.get("rope_parameters") or {})
    if "rope_theta" not in scaling:
        return
    # GPT-NeoX has names of its own.
    is_neox = settings.get("model_type") == "gpt_neox"
    base, part = ("rotary_emb_base", "rotary_pct") if is_neox else ("rope_theta", "partial_rotary_factor")
    settings[base] = scaling.pop("rope_theta")
    if "partial_rotary_factor" in scaling:
        settings[part] = scaling.pop("partial_rotary_factor")
    kind = scaling.get("rope_type", "default")
    keys = _LONGROPE_KEYS.get(settings.get("model_type", ""), set()) if kind == "longrope" else set()
    if keys and scaling.keys() <= keys | _ALSO_IN_LONGROPE:
        scaling = {"type": kind} | {key: scaling[key] for key in scaling.keys() & keys}
    settings["rope_scaling"] = scaling if kind != "default" else None
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def _set_stop_tokens(settings: "GenerationConfig", trained: "TrainedModel") -> None:
    """Make generation end answers where the training data ended them."""
    stops = stop_tokens(settings, trained.tokenizer())
    settings.eos_token_id = stops if len(stops) > 1 else stops[0] if stops else None


def _check_adapter(trained: "TrainedModel", weights: Path) -> None:
    from training.models.adapter import check_finite

    check_finite(weights / ADAPTER_FILE, join_uri(trained.checkpoint, ADAPTER_FILE))


def _copy_adapter(trained: "TrainedModel", directory: Path) -> None:
    """Copy the adapter, and write the base model's generation config beside it, which a server then reads."""
    from training.models.architecture import load_config
    from training.models.generation import correct, read_generation_config

    weights = trained.weights()
    _check_adapter(trained, weights)
    assert trained.base is not None
    base = trained.fetch_base(is_tokenizer_file)
    generation = read_generation_config(base)
    correct(generation, load_config(base, trained.base, trained.config.trust_remote_code))
    _set_stop_tokens(generation, trained)
    generation.save_pretrained(directory)
    shutil.copyfile(weights / ADAPTER_FILE, directory / ADAPTER_FILE)
    settings = json.loads((weights / "adapter_config.json").read_text("utf-8"))
    settings |= {"base_model_name_or_path": trained.base, "revision": trained.base_revision}
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), "utf-8")


def _write_gguf(planned: Export, settings: ExportConfig, directory: Path) -> None:
    assert planned.gguf is not None and settings.gguf_name is not None
    file = directory / planned.gguf
    (architecture,) = json.loads((directory / "config.json").read_text("utf-8"))["architectures"]
    done = subprocess.run(
        [
            *gguf_converter(architecture),
            str(directory),
            "--outfile",
            str(file),
            "--outtype",
            settings.gguf_name,
        ],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0 or not file.exists():
        last = (done.stderr.strip().splitlines() or ["it wrote no file"])[-1]
        raise ModelError(
            f"gguf: {GGUF_TOOL} cannot convert {planned.checkpoint} ({last}). Remove gguf, or check whether this llama.cpp supports the "
            "architecture."
        )


def _card(trained: "TrainedModel", planned: Export, sampling: Mapping[str, float], limit: int | None) -> Card:
    run = open_store(trained.run_uri)
    return Card(
        export=planned,
        base=trained.base or trained.config.initial_base_model_ckpt_path or trained.config.model_id,
        revision=trained.base_revision,
        config=trained.config,
        manifest=trained.manifest,
        sampling=sampling,
        rope_limit=limit,
        rank=read_adapter_facts(trained.checkpoint).largest_rank if trained.base else 0,
        result=read_result(run),
        metrics=read_metrics(run),
    )


# --- Upload -------------------------------------------------------------------------------------------------------


def _publish(store: Store, planned: Export, directory: Path) -> Export:
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    last = _LOADED_BY[planned.kind]
    # Read again, since merging takes minutes in which others may have written there.
    earlier = _files_to_replace(store)
    explanation = (
        "This export is in progress or was interrupted; rerun the same command to complete it. Its files:"
    )
    store.write(_UNFINISHED, "\n".join([explanation, *sorted({*earlier, *names})]).encode())
    store.delete([last])
    store.delete(earlier - {_UNFINISHED, last})
    records = [
        FileRecord(path=name, size=(directory / name).stat().st_size, checksum=checksum(directory / name))
        for name in names
    ]
    upload_directory(directory, store, "", [name for name in names if name != last])
    store.upload(directory / last, last)
    exported = planned.model_copy(update={"files": records})
    store.write(EXPORT_FILE, exported.model_dump_json(indent=2).encode(), only_if_absent=True)
    store.delete([_UNFINISHED])
    return exported

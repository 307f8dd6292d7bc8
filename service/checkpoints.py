"""Checkpoints that an engine serves: their verified files on this node, their chat format, and what they share with the base."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from configs.schema import FinetuneConfig
from service.engine import EngineSettings, Failed
from service.errors import ApiError
from service.prompts import ChatFormat
from training.checkpoints.weights import fetch_model, verify_local_weights
from training.inference.checkpoint_model import TrainedModel, trained_model
from training.models.architecture import load_config
from training.models.attention import rope_limit
from training.models.files import (
    AdapterFacts,
    check_no_adapter,
    is_hub_id,
    is_model_file,
    is_tokenizer_file,
    read_adapter_facts,
    read_model_facts,
)
from training.models.tokenizer import load_tokenizer, read_chat_template
from training.planning.paths import make_scratch_directory
from utils.errors import AnnealError
from utils.storage.bucket import is_remote, local_path, uses_embedded_bucket
from utils.storage.embedded_bucket import embedded_bucket

_DEFAULT_CONTEXT = 4096
"""Context of models whose config states none."""
_MAX_CHECKPOINTS = 64
"""Checkpoints that an engine remembers."""
_UNMIXED = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias")
"""LoRA settings that PEFT does not support in a batch with rows of other adapters."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The base model or a committed checkpoint, on this node."""

    uri: str | None
    """URI of the checkpoint; None for the base model."""
    directory: Path
    """Its model files, verified against its manifest."""
    format: ChatFormat
    trained: TrainedModel | None
    """None for the base model."""
    adapter: AdapterFacts | None
    """None for a complete model."""


def base_checkpoint(settings: EngineSettings) -> Checkpoint:
    """Download the base model once per node, and read its tokenizer with the chat template of the training YAML."""
    config, uri = settings.config, settings.model_uri
    with embedded_bucket() if uses_embedded_bucket(uri) else nullcontext():
        directory = fetch_model(uri, make_scratch_directory(config) / "cache", is_model_file)
        if not is_hub_id(uri):
            verify_local_weights(uri, directory, is_model_file)
    check_no_adapter(uri, [path.name for path in directory.iterdir()])
    tokenizer = load_tokenizer(
        directory,
        source=uri,
        trust_remote_code=config.trust_remote_code,
        chat_template=read_chat_template(config),
    )
    form = ChatFormat(
        tokenizer,
        variables=config.chat_template_kwargs or {},
        context=_context(directory, settings),
        model=settings.base,
    )
    return Checkpoint(None, directory, form, None, None)


def read_checkpoint(uri: str, settings: EngineSettings, formats: dict[Hashable, ChatFormat]) -> Checkpoint:
    """Download a committed checkpoint once per node, verify it against its manifest, and read its tokenizer.

    Args:
        uri: URI of the checkpoint.
        settings: Settings of the engine.
        formats: Known formats, to which this adds the checkpoint's. Checkpoints of one base usually have the same tokenizer
            files, and reading those takes longer than attaching an adapter.

    Raises:
        CheckpointError: It is not committed, or a file does not match its checksum.
    """
    with trained_model(uri) as trained:
        directory = trained.weights()
        context = _context(trained.base_weights() or directory, settings)
        variables = trained.config.chat_template_kwargs or {}
        files = [
            (file.path, file.checksum)
            for file in trained.manifest.files
            if is_tokenizer_file(file.path) and file.path != "adapter_config.json"
        ]
        key = (*sorted(files), context, repr(variables), trained.config.trust_remote_code)
        if key not in formats:
            formats[key] = ChatFormat(
                trained.tokenizer(), variables=variables, context=context, model=settings.base
            )
        adapter = read_adapter_facts(uri) if trained.base is not None else None
    return Checkpoint(uri, directory, formats[key], trained, adapter)


class CheckpointCache:
    """The checkpoints that requests named last."""

    def __init__(self, settings: EngineSettings):
        """Start empty."""
        self._settings = settings
        self._known: OrderedDict[str, Checkpoint] = OrderedDict()
        self._formats: dict[Hashable, ChatFormat] = {}
        self._reading: dict[str, asyncio.Lock] = {}

    async def get(self, uri: str) -> Checkpoint:
        """Return a checkpoint whose files are on this node and match its manifest; see `read_checkpoint`."""
        async with self._reading.setdefault(uri, asyncio.Lock()):
            if uri not in self._known:
                self._known[uri] = await asyncio.to_thread(
                    read_checkpoint, uri, self._settings, self._formats
                )
            self._known.move_to_end(uri)
            found = self._known[uri]
        if len(self._known) > _MAX_CHECKPOINTS:
            self._known.popitem(last=False)
            self._formats.clear()  # they are kept by the checkpoints that use them
        return found


def _context(directory: Path, settings: EngineSettings) -> int:
    """Return the longest sequence that an engine computes as the model was trained."""
    context = read_model_facts(str(directory)).max_context or _DEFAULT_CONTEXT
    if not settings.has_fixed_rope:
        return context
    config = load_config(directory, settings.model_uri, settings.config.trust_remote_code)
    return min(context, rope_limit(config) or context)


def shares_base(checkpoint: Checkpoint, settings: EngineSettings) -> bool:
    """Return whether a checkpoint is an adapter for the weights that the engine holds."""
    trained = checkpoint.trained
    return (
        trained is not None
        and trained.base is not None
        and _place(trained.base) == _place(settings.model_uri)
        and _form_of_weights(trained.config) == _form_of_weights(settings.config)
    )


def mixes_with_others(checkpoint: Checkpoint, settings: EngineSettings) -> bool:
    """Return whether a checkpoint is an adapter of plain LoRA matrices, which PEFT computes beside rows of other adapters."""
    adapter = checkpoint.adapter
    if adapter is None or not shares_base(checkpoint, settings):
        return False
    has_other_settings = (
        any(adapter.lora.get(key) for key in _UNMIXED) or adapter.lora.get("bias", "none") != "none"
    )
    matrices = (".lora_A.weight", ".lora_B.weight")
    return not has_other_settings and all(name.endswith(matrices) for name in adapter.parameter_shapes)


def _form_of_weights(config: FinetuneConfig) -> tuple[str, bool]:
    return config.dtype, config.load_in_4bit


def _place(model: str) -> str:
    return model.rstrip("/") if is_remote(model) or is_hub_id(model) else str(local_path(model))


def failed_event(error: BaseException) -> Failed:
    """Return the event for an error; unexpected ones are logged and not shown to the client."""
    if isinstance(error, ApiError):
        return Failed.of(error)
    if isinstance(error, AnnealError):
        _log.error("%s", error)
        return Failed(
            500, f"The model cannot be loaded: {error}", "server_error", "model", "model_unavailable"
        )
    _log.error("a chat request failed", exc_info=error)
    return Failed(500, "The server had an error while processing your request.", "server_error")

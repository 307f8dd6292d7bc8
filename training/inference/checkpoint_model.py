"""What a run has trained, for those who use it: its best checkpoint, and what that sits on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.loading import ConfigError
from configs.schema import FinetuneConfig
from runs.layout import CONFIG_FILE, MANIFEST_FILE, Manifest, default_storage, run_of
from runs.listing import check_run, run_uri
from runs.reading import best, read_config
from training.checkpoints.store import describe_no_checkpoint, read_manifest, resolve_start
from training.checkpoints.weights import fetch_model, fetch_weights, verify_local_weights
from training.models.files import is_hub_id, is_model_file, is_tokenizer_file, read_adapter_facts
from training.models.kernels import Device
from training.models.tokenizer import load_tokenizer
from training.planning.paths import make_scratch_directory, needs_embedded_bucket
from utils.processes import importing
from utils.storage.bucket import NotFoundError, check_readable, open_store, uses_embedded_bucket
from utils.storage.embedded_bucket import embedded_bucket

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint of a run, and what is needed to use it. It travels to Ray's workers."""

    checkpoint: str
    """URI."""
    manifest: Manifest
    config: FinetuneConfig
    base: str | None
    """Hub id, directory or URI of what the adapter sits on; None: the checkpoint is a whole model."""
    cache: Path
    """Where a node keeps what it downloads."""

    @property
    def run_uri(self) -> str:
        """The run that it belongs to."""
        return run_of(self.checkpoint)

    def weights(self) -> Path:
        """The checkpoint's model files as a directory on this node, compared with its manifest.

        Raises:
            CheckpointError, BucketError: it is damaged, or cannot be read.
        """
        directory = fetch_weights(self.checkpoint, self.cache, is_model_file)
        verify_local_weights(self.checkpoint, directory, is_model_file)
        return directory

    def base_weights(self) -> Path | None:
        """The same of the model that an adapter sits on, if it is one.

        Raises:
            ModelError, CheckpointError, BucketError: it is damaged, or cannot be read.
        """
        if self.base is None:
            return None
        directory = fetch_model(self.base, self.cache, is_model_file)
        if not is_hub_id(self.base):
            verify_local_weights(self.base, directory, is_model_file)
        return directory

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """As the checkpoint has it, with the chat template that was trained.

        Raises:
            ModelError, CheckpointError, BucketError: it is damaged, or cannot be read.
        """
        return load_tokenizer(
            fetch_weights(self.checkpoint, self.cache, is_tokenizer_file),
            source=self.checkpoint,
            trust_remote_code=self.config.trust_remote_code,
            chat_template=None,
        )

    def load(self, device: Device) -> "PreTrainedModel":
        """The model, ready to generate.

        Raises:
            ModelError, CheckpointError, BucketError: see `weights` and `base_weights`.
        """
        with importing():
            import peft
            import torch

            from training.models.torch_provider import load_weights

        weights, base = self.weights(), self.base_weights()
        model = load_weights(
            base or weights,
            dtype=self.config.dtype,
            device=device,
            load_in_4bit=self.config.load_in_4bit,
            trust_remote_code=self.config.trust_remote_code,
        )
        if base is not None:
            model = peft.PeftModel.from_pretrained(model, weights)  # pyright: ignore[reportArgumentType]
        model.config.use_cache = True
        if device == "cuda" and not self.config.load_in_4bit:
            model.to(torch.device(device))  # pyright: ignore[reportArgumentType, reportCallIssue]
        return model.eval()  # pyright: ignore[reportReturnType]


@contextmanager
def trained_model(run: str, *others: str) -> Iterator[TrainedModel]:
    """The best checkpoint of a run, or the one that is named; the embedded bucket runs meanwhile where it is needed.

    Args:
        run: A run's URI, `run:NAME` where runs go by default, or the URI of a checkpoint.
        others: Places that will be read or written as well.

    Raises:
        NotFoundError: there is no such run.
        ConfigError: it has committed no checkpoint, or its configuration cannot be read.
        ModelError, CheckpointError, BucketError: the checkpoint is damaged, or cannot be read.
    """
    uri = run_uri(run)
    with ExitStack() as stack:
        if any(uses_embedded_bucket(place) for place in (uri, *others)):
            stack.enter_context(embedded_bucket())
        check_run(uri)
        checkpoint = _checkpoint(run, uri)
        config = _config_of(run_of(checkpoint))
        if needs_embedded_bucket(config):
            stack.enter_context(embedded_bucket())
        yield TrainedModel(
            checkpoint=checkpoint,
            manifest=read_manifest(checkpoint),
            config=config,
            base=_base_of(checkpoint) if config.trains_adapter else None,
            cache=make_scratch_directory(config) / "cache",
        )


def _checkpoint(run: str, uri: str) -> str:
    store = open_store(uri)
    if run_of(uri) and store.read_if_exists(MANIFEST_FILE) is not None:
        return uri.rstrip("/")
    if store.read_if_exists(CONFIG_FILE) is None:
        raise NotFoundError(
            f"{uri}: there is no run, and no {CONFIG_FILE}. Name a run's URI, run:NAME, or one of its checkpoints."
        )
    checkpoint = resolve_start(uri, default_storage(), choose=best)
    if not run_of(checkpoint):
        raise ConfigError(f"{run}: {describe_no_checkpoint(store)}")
    return checkpoint.rstrip("/")


def _config_of(run: str) -> FinetuneConfig:
    store = open_store(run)
    stored = read_config(store)
    if stored is None:
        raise NotFoundError(
            f"{store.uri_of(CONFIG_FILE)}: there is no such file. Copy it from where the run was trained."
        )
    if stored.config is None:
        raise ConfigError(
            f"{store.uri_of(CONFIG_FILE)}: is damaged, or of another version of this project. Use the one that trained the run."
        )
    return stored.config


def _base_of(checkpoint: str) -> str:
    base = read_adapter_facts(checkpoint).base_model
    if not is_hub_id(base):
        check_readable(base)
    return base

"""Loading of a trained checkpoint and, for an adapter, its base model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.loading import ConfigError
from configs.schema import FinetuneConfig
from runs.layout import CONFIG_FILE, MANIFEST_FILE, Manifest, default_storage, run_of
from runs.reading import best, read_config
from runs.summaries import check_run, no_run, run_uri
from training.checkpoints.store import describe_no_checkpoint, read_manifest, resolve_start
from training.checkpoints.weights import fetch_model, fetch_weights, verify_local_weights
from training.models.adapter import continued_adapter
from training.models.architecture import build_on_meta_device
from training.models.files import is_hub_id, is_model_file, is_tokenizer_file, read_adapter_facts
from training.models.kernels import Device
from training.models.tokenizer import load_tokenizer
from training.planning.paths import absolute, make_scratch_directory, needs_embedded_bucket
from utils.processes import importing
from utils.storage.bucket import NotFoundError, check_readable, open_store, uses_embedded_bucket
from utils.storage.embedded_bucket import embedded_bucket

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint of a run, with everything needed to load it; Ray sends it to workers."""

    checkpoint: str
    """URI of the checkpoint."""
    manifest: Manifest
    config: FinetuneConfig
    base: str | None
    """Hub id, directory or URI of the adapter's base model; None if the checkpoint is a full-parameter model."""
    base_revision: str | None
    """The commit of a base model on the Hub that the adapter was trained on, if it is recorded."""
    cache: Path
    """The node cache for downloads."""

    @property
    def run_uri(self) -> str:
        """Return the URI of the checkpoint's run."""
        return run_of(self.checkpoint)

    def weights(self) -> Path:
        """Return a local directory with the checkpoint's model files, verified against its manifest."""
        directory = fetch_weights(self.checkpoint, self.cache, is_model_file)
        verify_local_weights(self.checkpoint, directory, is_model_file)
        return directory

    def base_weights(self) -> Path | None:
        """Return a local directory with the base model's files; None for a full-parameter model."""
        if self.base is None:
            return None
        directory = self.fetch_base(is_model_file)
        if not is_hub_id(self.base):
            verify_local_weights(self.base, directory, is_model_file)
        return directory

    def fetch_base(self, wanted: Callable[[str], bool]) -> Path:
        """Download the wanted files of the adapter's base model and return their local directory."""
        assert self.base is not None
        return fetch_model(self.base, self.cache, wanted, self.base_revision)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the checkpoint's tokenizer, with the chat template used in training."""
        return load_tokenizer(
            fetch_weights(self.checkpoint, self.cache, is_tokenizer_file),
            source=self.checkpoint,
            trust_remote_code=self.config.trust_remote_code,
            chat_template=None,
        )

    def load(self, device: Device) -> "PreTrainedModel":
        """Load the model on a device, in evaluation mode and with the KV cache enabled."""
        with importing():
            from training.models.torch_provider import attach_adapter, load_weights

        weights, base = self.weights(), self.base_weights()
        model = load_weights(
            base or weights,
            dtype=self.config.dtype,
            device=device,
            load_in_4bit=self.config.load_in_4bit,
            trust_remote_code=self.config.trust_remote_code,
        )
        if base is not None:
            model = attach_adapter(model, weights)
        model.config.use_cache = True
        return model.eval()


@contextmanager
def trained_model(run: str, *others: str, base: str | None = None) -> Iterator[TrainedModel]:
    """Yield a given checkpoint, or the best checkpoint of a run. Run the embedded bucket in the meantime if a URI uses it.

    Args:
        run: URI of a run, `run:NAME` in the default storage path, or URI of a checkpoint.
        others: Further URIs that the block reads or writes.
        base: The adapter's base model, if it is no longer where the run was trained.
    """
    uri = run_uri(run)
    with ExitStack() as stack:
        if any(uses_embedded_bucket(used) for used in (uri, base or "", *others)):
            stack.enter_context(embedded_bucket())
        check_run(uri)
        checkpoint = _checkpoint(run, uri)
        config = _config_of(run_of(checkpoint))
        if needs_embedded_bucket(config):
            stack.enter_context(embedded_bucket())
        cache = make_scratch_directory(config) / "cache"
        found, revision = _base_of(checkpoint, config, base, cache)
        yield TrainedModel(
            checkpoint=checkpoint,
            manifest=read_manifest(checkpoint),
            config=config,
            base=found,
            base_revision=revision,
            cache=cache,
        )


def _checkpoint(run: str, uri: str) -> str:
    store = open_store(uri)
    if run_of(uri) and store.read_if_exists(MANIFEST_FILE) is not None:
        return uri.rstrip("/")
    if store.read_if_exists(CONFIG_FILE) is None:
        raise no_run(store)
    checkpoint = resolve_start(uri, default_storage(), choose=best)
    if not run_of(checkpoint):
        raise ConfigError(f"{run}: {describe_no_checkpoint(store)}")
    return checkpoint.rstrip("/")


def _config_of(run: str) -> FinetuneConfig:
    store = open_store(run)
    stored = read_config(store)
    if stored is None:
        raise NotFoundError(
            f"{store.uri_of(CONFIG_FILE)}: file not found. Restore it from the original run directory."
        )
    if stored.config is None:
        raise ConfigError(
            f"{store.uri_of(CONFIG_FILE)}: damaged, or written by another version of this project. Use the version that trained the run."
        )
    return stored.config


def _base_of(
    checkpoint: str, config: FinetuneConfig, named: str | None, cache: Path
) -> tuple[str | None, str | None]:
    """Return the base model of an adapter and its commit: the one named by --base, which must fit, or the one it was trained on."""
    if not config.trains_adapter:
        if named:
            raise ConfigError(f"--base: {checkpoint} is a full-parameter model and has no base model")
        return None, None
    adapter = read_adapter_facts(checkpoint)
    if named is None:
        if not is_hub_id(adapter.base_model):
            try:
                check_readable(adapter.base_model)
            except NotFoundError as error:
                raise NotFoundError(
                    f"{checkpoint}: its base model is gone: {error}. Name the place where it is now: --base URI"
                ) from error
        return adapter.base_model, adapter.base_revision
    base = named if is_hub_id(named) else absolute(named)
    directory = fetch_model(base, cache, is_tokenizer_file)
    meta = build_on_meta_device(directory, base, trust_remote_code=config.trust_remote_code)
    _, wrong = continued_adapter(meta, adapter)
    if wrong:
        raise ConfigError(f"--base: {base} does not fit the adapter {checkpoint}: {wrong.lines[0]}")
    return base, None

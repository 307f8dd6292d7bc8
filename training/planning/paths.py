"""Where a run keeps things: its storage, and the scratch directory of a node."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.loading import ConfigError
from configs.schema import FinetuneConfig, uri_fields
from runs.layout import default_storage
from training.data.sources import is_hub_dataset
from utils.storage.bucket import BucketError, NotFoundError, is_remote, uses_embedded_bucket

LOCAL_STORAGE = Path("/mnt/local_storage")
"""An Anyscale node's own fast disks, where it has some."""


def storage_path(config: FinetuneConfig) -> str:
    """Where runs go: the YAML's word, else `default_storage`."""
    if config.storage_path:
        return absolute(config.storage_path)
    return default_storage()


def scratch_directory(config: FinetuneConfig) -> Path:
    """A node's scratch: the YAML's output_dir, else an Anyscale node's own disks, else the user's cache directory."""
    if config.output_dir:
        return Path(config.output_dir).expanduser().absolute()
    if LOCAL_STORAGE.is_dir():
        return LOCAL_STORAGE / "anneal"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anneal"


def make_scratch_directory(config: FinetuneConfig) -> Path:
    """The scratch directory, made if need be.

    Raises:
        ConfigError: it cannot be made.
    """
    directory = scratch_directory(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir: {directory} cannot be made ({error.strerror}). Name a directory that you may write to."
        ) from error

    return directory


def needs_embedded_bucket(config: FinetuneConfig) -> bool:
    """Return whether a URI of the run is in the embedded bucket."""
    uris = (field.uri for field in uri_fields(config))
    return uses_embedded_bucket(storage_path(config)) or any(map(uses_embedded_bucket, uris))


def absolute(uri: str) -> str:
    """A path of the YAML as every process understands it; remote ones as they are."""
    return (
        uri
        if is_remote(uri) or is_hub_dataset(uri)
        else str(Path(uri.removeprefix("file://")).expanduser().absolute())
    )


@contextmanager
def about_key(key: str) -> Iterator[None]:
    """Say which key of the YAML a place that storage refuses stands under."""
    try:
        yield
    except NotFoundError as error:
        raise NotFoundError(f"{key}: {error}. Look at its spelling.") from error
    except BucketError as error:
        raise BucketError(f"{key}: {error}") from error

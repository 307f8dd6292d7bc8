"""The storage of runs and the scratch directory of a node."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.loading import ConfigError
from configs.schema import FinetuneConfig, uri_fields
from runs.layout import default_storage
from training.data.hub import is_hub_dataset
from utils.files import is_disk_full
from utils.storage.bucket import BucketError, NotFoundError, is_remote, uses_embedded_bucket

_PROBE_BYTES = 64 * 1024
LOCAL_STORAGE = Path("/mnt/local_storage")
"""Local SSDs of an Anyscale node, if it has any."""


def storage_path(config: FinetuneConfig) -> str:
    """Return the URI that holds the runs: the YAML's storage_path, else `default_storage`."""
    if config.storage_path:
        return absolute(config.storage_path)
    return default_storage()


def scratch_directory(config: FinetuneConfig) -> Path:
    """Return a node's scratch directory: output_dir, else an Anyscale node's local SSDs, else the user's cache directory."""
    if config.output_dir:
        return Path(config.output_dir).expanduser().absolute()
    if LOCAL_STORAGE.is_dir():
        return LOCAL_STORAGE / "anneal"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anneal"


def make_scratch_directory(config: FinetuneConfig) -> Path:
    """Create the scratch directory if it does not exist, check that files can be written to it, and return it."""
    directory = scratch_directory(config)
    check_scratch(directory)
    return directory


def check_scratch(directory: Path) -> None:
    """Create a scratch directory if it does not exist, and write a file to it; raise a ConfigError if that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise _scratch_error(error, directory) from error


@contextmanager
def scratch_errors(directory: Path) -> Iterator[None]:
    """Convert an OSError of a file in a scratch directory, or of a full disk, into a ConfigError that names output_dir."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error, directory) or (
            error.filename and Path(error.filename).is_relative_to(directory)
        ):
            raise _scratch_error(error, Path(error.filename or directory)) from error
        raise


def _scratch_error(error: OSError, place: Path) -> ConfigError:
    fix = (
        "Free some space, or name a directory on a larger disk."
        if is_disk_full(error, place)
        else "Name a directory with write permission."
    )
    return ConfigError(f"output_dir: {place} cannot be written ({error.strerror}). {fix}")


def needs_embedded_bucket(config: FinetuneConfig) -> bool:
    """Return whether a URI of the configuration is in the embedded bucket."""
    uris = (field.uri for field in uri_fields(config))
    return uses_embedded_bucket(storage_path(config)) or any(map(uses_embedded_bucket, uris))


def absolute(uri: str) -> str:
    """Return a local path of the YAML as an absolute path; return remote URIs unchanged."""
    return (
        uri
        if is_remote(uri) or is_hub_dataset(uri)
        else str(Path(uri.removeprefix("file://")).expanduser().absolute())
    )


@contextmanager
def about_key(key: str) -> Iterator[None]:
    """Add the YAML key to storage errors that are raised within the block."""
    try:
        yield
    except NotFoundError as error:
        raise NotFoundError(f"{key}: {error}. Check the spelling.") from error
    except BucketError as error:
        raise BucketError(f"{key}: {error}") from error

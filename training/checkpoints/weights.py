"""The weights that a run starts from: downloaded once per node, and verified against their manifest."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from runs.layout import MANIFEST_FILE
from training.checkpoints.store import not_as_committed, read_manifest
from training.models.files import fetch_hub_model, is_hub_id, only_indexed_weights
from utils.files import first_changed
from utils.storage.bucket import DamagedError, is_remote, open_store, sync_to_node


def fetch_model(source: str, cache: Path, wanted: Callable[[str], bool], revision: str | None = None) -> Path:
    """Download the wanted files of a model, once per node, and return their local directory.

    Args:
        source: Hub id, directory or URI of the model.
        cache: The node cache.
        wanted: Returns whether a file is needed.
        revision: Commit of a model on the Hub; None: the latest.
    """
    if is_hub_id(source):
        return fetch_hub_model(source, wanted, revision)
    return fetch_weights(source, cache, wanted)


def begin_fetch(
    source: str, cache: Path, wanted: Callable[[str], bool], revision: str | None = None
) -> Callable[[], Path]:
    """Start `fetch_model` in the background, and return a function that waits for its result.

    A model on the Hub is downloaded only by that function: the libraries that the caller imports meanwhile import huggingface_hub,
    and its modules, which import each other, cannot be imported by two threads at a time.
    """
    fetch = partial(fetch_model, source, cache, wanted, revision)
    if is_hub_id(source):
        return fetch
    thread = ThreadPoolExecutor(1, thread_name_prefix="fetch-model")
    running = thread.submit(fetch)
    thread.shutdown(wait=False)
    return running.result


def fetch_weights(uri: str, cache: Path, wanted: Callable[[str], bool]) -> Path:
    """Download the wanted files of a model or an adapter, and return their local directory; see `sync_to_node`.

    Files of a checkpoint are verified against its manifest during the download.
    """
    checksums = _committed_checksums(uri)
    try:
        return sync_to_node(uri, cache / "models", only_indexed_weights(uri, wanted), checksums)
    except DamagedError as error:
        if error.key not in checksums:
            raise
        raise not_as_committed(uri, error.key) from error


def verify_local_weights(uri: str, directory: Path, wanted: Callable[[str], bool]) -> None:
    """Verify the wanted files of a local checkpoint against its manifest; remote ones are verified during the download."""
    if is_remote(uri):
        return
    committed = {file: found for file, found in _committed_checksums(uri).items() if wanted(file)}
    if changed := first_changed(directory, committed):
        raise not_as_committed(uri, changed)


def _committed_checksums(uri: str) -> dict[str, str]:
    """Return the checksums in a checkpoint's manifest; empty for weights without a manifest."""
    if open_store(uri).read_if_exists(MANIFEST_FILE) is None:
        return {}
    return {file.path: file.checksum for file in read_manifest(uri).files}

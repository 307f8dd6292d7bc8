"""Checkpoints in the bucket: the manifest is uploaded last, and files without a manifest are no checkpoint."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from configs.loading import ConfigError
from runs.layout import (
    CHECKPOINTS,
    LEASES,
    MANIFEST_FILE,
    USES,
    CheckpointUse,
    FileRecord,
    Manifest,
    checkpoint_key,
    checkpoint_uri,
    run_of,
    step_of_use,
    use_key,
)
from runs.reading import missing_of_completed, read_result, sizes, survey, wrong_sizes
from utils.errors import AnnealError
from utils.files import checksum, format_bytes, free_bytes, is_disk_full, safe_join
from utils.storage.bucket import (
    AlreadyExistsError,
    BucketError,
    DamagedError,
    Store,
    join_uri,
    open_store,
    upload_directory,
)

# transformers' pickled arguments, DeepSpeed's conversion scripts and the model card are not needed.
_EXCLUDED = {"training_args.bin", "zero_to_fp32.py", "zero_to_torch.py", "README.md"}

_log = logging.getLogger(__name__)


class CheckpointError(AnnealError):
    """A checkpoint that cannot be restored; the message names it, the cause and the fix."""


@contextmanager
def staging(directory: Path) -> Iterator[None]:
    """Save a checkpoint on this node within the block; if the disk is full, delete its files and raise CheckpointError."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error, directory.parent):
            raise
        available = free_bytes(directory.parent)
        for path in directory.rglob("*"):
            if path.is_file():  # directories are kept: other workers of the node may still be writing
                with suppress(FileNotFoundError):  # another worker deleted it
                    available += path.stat().st_size
                    path.unlink()
        raise CheckpointError(
            f"{directory}: the disk is full: a checkpoint needs more than the available {format_bytes(available)}. Free some space, or "
            "set output_dir to a larger disk, and rerun the same command: the run resumes from its latest committed checkpoint."
        ) from error


def checkpoint_files(directory: Path) -> list[str]:
    """Return the files of a local checkpoint to upload, as sorted relative paths."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in _EXCLUDED)
    return [path.relative_to(directory).as_posix() for path in paths]


def upload_files(store: Store, step: int, directory: Path, files: Iterable[str]) -> list[FileRecord]:
    """Upload a node's files of a checkpoint, which does not exist before `commit`."""
    files = list(files)
    records = [
        FileRecord(path=file, size=(directory / file).stat().st_size, checksum=checksum(directory / file))
        for file in files
    ]
    upload_directory(directory, store, checkpoint_key(step), files)
    return records


def commit(store: Store, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint, after checking that the bucket contains every file in its full size."""
    wrong = wrong_sizes(store, manifest, sizes(store, checkpoint_key(manifest.step)))
    if wrong:
        raise CheckpointError(f"step {manifest.step} is not committed: {'; '.join(wrong)}.")
    key, content = checkpoint_key(manifest.step, MANIFEST_FILE), manifest.model_dump_json(indent=2).encode()
    try:
        store.write(key, content, only_if_absent=True)
    except AlreadyExistsError as error:
        if (
            store.read(key) != content
        ):  # else the answer to the first request was lost, and the retry found its object
            raise CheckpointError(
                f"{store.uri_of(key)} was committed by another process: another driver trains this run. Stop one of them."
            ) from error


def remove_leftovers(store: Store, committed: list[Manifest]) -> list[str]:
    """Delete the files of a run's checkpoints that belong to no committed one, and abort unfinished uploads.

    Killed attempts leave files without a manifest, and a damaged checkpoint would block a later commit of its step. Only the
    owner of the run's lease may call this function.

    Returns:
        The deleted keys, manifests first.
    """
    named = {
        checkpoint_key(manifest.step, path)
        for manifest in committed
        for path in (MANIFEST_FILE, *(file.path for file in manifest.files))
    }
    left = [key for key in sizes(store, f"{CHECKPOINTS}/") if key not in named]
    manifests = [key for key in left if key.endswith(f"/{MANIFEST_FILE}")]
    others = [key for key in left if key not in manifests]
    store.delete(manifests)
    store.delete(others)
    store.abort_stale_uploads(f"{CHECKPOINTS}/")
    return [*manifests, *others]


def prune(store: Store, manifests: list[Manifest], keep: int) -> list[Manifest]:
    """Delete all checkpoints except the `keep` best, the latest and those that other runs start from, manifests first.

    Returns:
        The manifests of the retained checkpoints.
    """
    by_loss = sorted(
        manifests, key=lambda manifest: (manifest.eval_loss is None, manifest.eval_loss, -manifest.step)
    )
    kept = {manifest.step for manifest in by_loss[:keep]} | {manifests[-1].step} | _steps_in_use(store)
    for manifest in manifests:
        if manifest.step not in kept:
            store.delete([checkpoint_key(manifest.step, MANIFEST_FILE)])
            store.delete([checkpoint_key(manifest.step, file.path) for file in manifest.files])
    return [manifest for manifest in manifests if manifest.step in kept]


def mark_in_use(checkpoint: str, run_uri: str) -> None:
    """Mark a checkpoint as in use, so that its run does not prune it before the run that starts from it is completed."""
    use = CheckpointUse(run_uri=run_uri)
    store = open_store(run_of(checkpoint))
    store.write(use_key(checkpoint, run_uri), use.model_dump_json(indent=2).encode())


def unmark(checkpoint: str, run_uri: str) -> None:
    """Remove the mark of `mark_in_use`."""
    open_store(run_of(checkpoint)).delete([use_key(checkpoint, run_uri)])


def _steps_in_use(store: Store) -> set[int]:
    """Return the steps that unfinished runs start from; delete the marks of completed and removed runs."""
    steps = set[int]()
    for item in store.list(f"{USES}/"):
        content = store.read_if_exists(item.key)
        if content is None:
            continue
        if _needs_its_start(store.uri_of(item.key), content):
            steps.add(step_of_use(item.key))
        else:
            store.delete([item.key])
    return steps


def _needs_its_start(mark: str, content: bytes) -> bool:
    """Return whether the run that a mark names may still resume; True if that run cannot be read."""
    try:
        child = open_store(CheckpointUse.model_validate_json(content).run_uri)
        result = read_result(child)
        # A run without a result is training, or was killed and may be rerun; without a lease as well, it was removed.
        return result.status != "completed" if result else bool(child.list(f"{LEASES}/"))
    except (BucketError, ValidationError) as error:
        _log.warning(
            "%s: the run that uses this checkpoint cannot be read, so the checkpoint is retained: %s",
            mark,
            error,
        )
        return True


def restore(uri: str, directory: Path) -> Manifest:
    """Download a committed checkpoint into an empty local directory and verify its checksums.

    Raises:
        CheckpointError: it is not committed, or a file does not match its checksum.
    """
    manifest = read_manifest(uri)
    store = open_store(uri)
    stored = {item.key: item for item in store.list()}
    if missing := [file.path for file in manifest.files if file.path not in stored]:
        raise not_as_committed(uri, missing[0])
    expected = {file.path: replace(stored[file.path], checksum=file.checksum) for file in manifest.files}
    try:
        store.download_many({item: safe_join(directory, path) for path, item in expected.items()})
    except DamagedError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise not_as_committed(uri, error.key) from error
    return manifest


def not_as_committed(uri: str, file: str) -> CheckpointError:
    """Return the error for a file whose content differs from its manifest."""
    return CheckpointError(
        f"{join_uri(uri, file)}: its content differs from the committed content. Remove {uri}, or name another checkpoint."
    )


def read_manifest(uri: str) -> Manifest:
    """Read the manifest of a checkpoint."""
    content = open_store(uri).read_if_exists(MANIFEST_FILE)
    if content is None:
        raise CheckpointError(
            f"{uri}: no {MANIFEST_FILE}, so this is not a committed checkpoint. Name a checkpoint from a run's result.json."
        )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(
            f"{join_uri(uri, MANIFEST_FILE)}: damaged ({error.error_count()} errors). Name another checkpoint."
        ) from error


def resolve_start(uri: str, storage: str, *, choose: Callable[[list[Manifest]], Manifest | None]) -> str:
    """Resolve the checkpoint or model that the YAML names: `run:NAME` and a run's URI resolve to one of its checkpoints.

    Args:
        uri: The value in the YAML; local paths are absolute.
        storage: The URI that holds the runs.
        choose: Selects one of a run's committed checkpoints.
    """
    place = join_uri(storage, uri.removeprefix("run:")) if uri.startswith("run:") else uri
    store = open_store(place)
    manifests, damage = survey(store)
    damage = damage or missing_of_completed(store, manifests)
    if damage:
        raise ConfigError(
            f"{uri}: checkpoints of the run {place} are damaged:\n"
            + "\n".join(f"  {line}" for line in damage)
            + "\nRemove those checkpoints, or name the URI of the one to start from."
        )
    found = choose(manifests)
    if found is not None:
        return checkpoint_uri(place, found.step)
    if uri.startswith("run:") and not store.list():
        raise ConfigError(f"{uri}: there is no run {place}. Check the spelling and storage_path.")
    if uri.startswith("run:") or store.list(f"{CHECKPOINTS}/"):
        raise ConfigError(f"{uri}: {describe_no_checkpoint(store)}")
    if run_uri := run_of(place):
        if store.read_if_exists(MANIFEST_FILE) is None:
            raise ConfigError(
                f"{uri}: no {MANIFEST_FILE}, so this checkpoint was not committed. Name a committed checkpoint of {run_uri}."
            )
        run, manifest = open_store(run_uri), read_manifest(place)
        if wrong := wrong_sizes(run, manifest, sizes(run, checkpoint_key(manifest.step))):
            raise ConfigError(f"{uri}: the checkpoint is damaged:\n  {wrong[0]}\nName another.")
    return place


def describe_no_checkpoint(run: Store) -> str:
    """Describe why a run has committed no checkpoint, and the fix."""
    result = read_result(run)
    if result is None:
        return f"the run {run.uri} has committed no checkpoint yet. Run it first, or name another."
    ended = "was stopped" if result.status == "stopped" else result.status
    return (
        f"the run {run.uri} {ended} before its first checkpoint: {result.reason.rstrip('.')}. Rerun the same command, or "
        "name another run."
    )

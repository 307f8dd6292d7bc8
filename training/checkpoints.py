"""What a checkpoint holds, and how it comes to exist: files first, the manifest last; nothing without a manifest counts."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import ValidationError

from configs.loading import ConfigError
from runs.layout import (
    CHECKPOINTS,
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    checkpoint_key,
    checkpoint_uri,
)
from utils.bucket import Store, join_uri, open_store, upload_directory
from utils.files import checksum, safe_join

# transformers pickles its arguments, DeepSpeed copies a script: neither is needed, and no pickle is wanted that is not.
_LEFT_OUT = {"training_args.bin", "zero_to_fp32.py", "README.md"}


class CheckpointError(Exception):
    """A checkpoint that cannot be restored; the message says which, what and what to do."""


def checkpoint_files(directory: Path) -> list[str]:
    """The files of a local checkpoint that belong into the bucket, as relative paths in order."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in _LEFT_OUT)
    return [path.relative_to(directory).as_posix() for path in paths]


def upload_files(store: Store, step: int, directory: Path, files: Iterable[str]) -> list[FileRecord]:
    """Upload a node's files of a checkpoint; they mean nothing until `commit`.

    Raises:
        BucketError: the upload failed.
    """
    files = list(files)
    records = [
        FileRecord(path=file, size=(directory / file).stat().st_size, checksum=checksum(directory / file))
        for file in files
    ]
    upload_directory(directory, store, checkpoint_key(step), files)
    return records


def commit(store: Store, manifest: Manifest) -> None:
    """Make a checkpoint exist: every file it names lies in the bucket already.

    Raises:
        BucketError: the manifest cannot be written.
    """
    store.write(checkpoint_key(manifest.step, MANIFEST_FILE), manifest.model_dump_json(indent=2).encode())


def committed(store: Store) -> list[Manifest]:
    """Every committed checkpoint of a run, by step: those whose manifest can be read and whose files have their sizes.

    Raises:
        BucketError: the run cannot be listed.
    """
    stored = {item.key: item.size for item in store.list(f"{CHECKPOINTS}/")}
    manifests = []
    for key in stored:
        if not key.endswith(f"/{MANIFEST_FILE}"):
            continue
        try:
            manifest = Manifest.model_validate_json(store.read(key))
        except ValidationError:
            continue  # cut off or not ours: such a checkpoint was never committed
        if all(stored.get(checkpoint_key(manifest.step, file.path)) == file.size for file in manifest.files):
            manifests.append(manifest)
    return sorted(manifests, key=lambda manifest: manifest.step)


def best(manifests: list[Manifest]) -> Manifest | None:
    """The lowest eval loss; without any, the newest."""
    evaluated = [manifest for manifest in manifests if manifest.eval_loss is not None]
    if evaluated:
        return min(evaluated, key=lambda manifest: (manifest.eval_loss, manifest.step))
    return manifests[-1] if manifests else None


def prune(store: Store, manifests: list[Manifest], keep: int) -> list[Manifest]:
    """Delete all but the `keep` best checkpoints and the newest, each one's manifest first; returns those kept."""
    by_loss = sorted(
        manifests, key=lambda manifest: (manifest.eval_loss is None, manifest.eval_loss, -manifest.step)
    )
    kept = {manifest.step for manifest in by_loss[:keep]} | {manifests[-1].step}
    for manifest in manifests:
        if manifest.step not in kept:
            store.delete([checkpoint_key(manifest.step, MANIFEST_FILE)])
            store.delete([checkpoint_key(manifest.step, file.path) for file in manifest.files])
    return [manifest for manifest in manifests if manifest.step in kept]


def restore(uri: str, directory: Path) -> Manifest:
    """Bring a committed checkpoint to an empty local directory and verify every byte.

    Raises:
        CheckpointError: it is not committed, or a file does not match its checksum.
        BucketError: it cannot be read.
    """
    manifest = read_manifest(uri)
    store = open_store(uri)
    named = {file.path for file in manifest.files}
    store.download_many({item: safe_join(directory, item.key) for item in store.list() if item.key in named})
    for file in manifest.files:
        if checksum(directory / file.path) != file.checksum:
            shutil.rmtree(directory)
            raise CheckpointError(
                f"{join_uri(uri, file.path)}: its content is not what was committed. Remove {uri} to go on from the checkpoint before."
            )
    return manifest


def read_manifest(uri: str) -> Manifest:
    """A checkpoint's manifest.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    content = open_store(uri).read_if_exists(MANIFEST_FILE)
    if content is None:
        raise CheckpointError(
            f"{uri}: no {MANIFEST_FILE}, so no committed checkpoint. Name one that result.json or the end of a run named."
        )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(
            f"{join_uri(uri, MANIFEST_FILE)}: damaged ({error.error_count()} errors). Name another checkpoint."
        ) from error


def resolve_start(uri: str, storage: str, *, choose: Callable[[list[Manifest]], Manifest | None]) -> str:
    """What a YAML names as a start -> the place itself: `run:NAME` and a run's URI become one of its checkpoints.

    Args:
        uri: As the YAML has it; a local path absolute.
        storage: Where runs of that name are.
        choose: `best` or `newest`, among a run's committed checkpoints.

    Raises:
        ConfigError: the run has no committed checkpoint.
    """
    place = join_uri(storage, uri.removeprefix("run:")) if uri.startswith("run:") else uri
    store = open_store(place)
    manifests = committed(store)
    found = choose(manifests)
    if found is not None:
        return checkpoint_uri(place, found.step)
    if uri.startswith("run:") or store.list(f"{CHECKPOINTS}/"):
        raise ConfigError(
            f"{uri}: the run {place} has no committed checkpoint to start from. Run it first, or name another."
        )
    return place


def newest(manifests: list[Manifest]) -> Manifest | None:
    """The one with the highest step."""
    return manifests[-1] if manifests else None

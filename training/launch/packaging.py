"""Packages for a cluster: the project's code and, for a submitted run, its YAML and the local files that it uses."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.loading import ConfigError, LoadedConfig, to_yaml, with_written
from configs.schema import DataSource, DeepspeedFile, FinetuneConfig, uri_fields
from runs.layout import MODELS
from runs.reading import sizes
from training.data.hub import is_hub_dataset
from training.data.sources import matching_files
from training.models.files import is_hub_id, is_model_file, is_tokenizer_file
from training.models.tokenizer import is_template
from training.planning.paths import about_key, storage_path
from utils.files import checksum, checksum_bytes, format_bytes
from utils.storage.bucket import (
    BucketError,
    check_readable,
    is_remote,
    join_uri,
    local_path,
    open_store,
    uses_embedded_bucket,
)

PROJECT = Path(__file__).resolve().parents[2]
CODE = ("main.py", "configs", "utils", "runs", "training", "service")
"""The code that nodes run: all that main.py imports."""

EVERYTHING_BUT_CODE = [
    "/[!.]*",
    "/.?*",
    *(f"!/{pattern}" for name in CODE for pattern in (name, f"{name}/**")),
    "__pycache__",
]
"""Ray's `excludes`, in .gitignore syntax. Ray also matches them against the directory itself, as "."."""

MAX_PACKED_BYTES = 100 * 1024**2
"""Maximum size of the local files in a job: Ray holds them in the memory of its head node and copies them to every node."""

_FILES = "files"
_AS_WRITTEN = "as_written"


@dataclass(frozen=True)
class Package:
    """A directory with the code, YAML and local files of a job."""

    directory: Path
    loaded: LoadedConfig
    """The configuration for the job: local files have their paths in the directory."""
    on_the_cluster: tuple[str, ...]
    """Keys that have paths of the cluster's machines."""

    @property
    def yaml(self) -> str:
        """Return the file name of the YAML in the directory."""
        return self.loaded.path.name

    @property
    def written(self) -> str:
        """Return the path of the YAML as the user wrote it, relative to the directory."""
        return f"{_AS_WRITTEN}/{self.yaml}"

    @property
    def results(self) -> str:
        """Return where the results go, as far as it is known without a plan."""
        storage = self.loaded.config.storage_path or ""
        name = self.loaded.config.run_name
        return join_uri(storage, name) if name else f"{storage} (the job's output has the name of the run)"


def pack(loaded: LoadedConfig, directory: Path) -> Package:
    """Copy everything that a job needs into an empty directory.

    Paths on this machine are packed. Paths on the cluster's machines, written as `file:///...`, stay unchanged, as does
    an absolute `storage_path`. The local base model of an adapter goes into the storage path instead of the package.
    """
    config = loaded.config
    storage = storage_path(config)
    _reject_embedded_bucket(config, storage)
    if config.storage_path and not is_remote(storage) and not config.storage_path.startswith(("/", "file:")):
        raise ConfigError(
            f"storage_path: {config.storage_path} is a path on this machine, which the cluster does not share. Use a bucket URI, or an "
            "absolute path that all machines of the cluster share."
        )
    local_files = _LocalFiles()
    changes: dict[str, Any] = {}
    if config.trains_adapter:
        config = config.model_copy(update=_store_base_model(config, storage))
    for key, kind in {field.key: field.kind for field in uri_fields(config)}.items():
        if kind == "model":
            changes[key] = local_files.take_model(key, getattr(config, key))
        elif kind == "data":
            changes[key] = local_files.take_data(key, getattr(config, key))
    if config.chat_template and not is_template(config.chat_template):
        changes["chat_template"] = local_files.take_file("chat_template", config.chat_template)
    if isinstance(config.deepspeed, DeepspeedFile):
        name = local_files.take_file("deepspeed", config.deepspeed.config_path)
        changes["deepspeed"] = config.deepspeed.model_copy(update={"config_path": name})
    local_files.check_size()
    for name in CODE:
        _copy_code(PROJECT / name, directory / name)
    local_files.put_into(directory)
    config = config.model_copy(update={**changes, "storage_path": storage})
    packed = with_written(replace(loaded, config=config, path=Path(loaded.path.name)), loaded)
    package = Package(directory, packed, tuple(_keys_on_the_cluster(config)))
    (directory / _AS_WRITTEN).mkdir()
    for path, settings in ((package.yaml, config), (package.written, loaded.config)):
        (directory / path).write_text(to_yaml(settings, only_given=True), encoding="utf-8")
    return package


def _store_base_model(config: FinetuneConfig, storage: str) -> dict[str, Any]:
    """Upload the local base model of an adapter to the storage path, and return its key with the new URI.

    Chat, export and serving need the base model after the job and its directory are gone.
    """
    key = "initial_base_model_ckpt_path" if config.initial_base_model_ckpt_path else "model_id"
    uri: str = getattr(config, key)
    if uri.startswith("run:") or not _is_local(uri) or is_hub_id(uri):
        return {}
    with about_key(key):
        check_readable(uri)
    if not is_remote(storage):
        raise ConfigError(
            f"{key}: {uri} is on this machine, but the adapter needs its base model after the job. Copy the model to the cluster's "
            "machines and write file:///absolute/path, or set storage_path to a bucket: the model is then uploaded there."
        )
    root = local_path(uri)
    code = sorted(path.name for path in root.glob("*.py"))
    if config.trust_remote_code and code and _names_code(root):
        raise ConfigError(
            f"{key}: {uri} has code of its own ({', '.join(code)}), which is not uploaded with the adapter's base model. Copy the model to "
            "the cluster's machines and write file:///absolute/path."
        )
    files = [path for path in _files_below(root) if is_model_file(path.name) or is_tokenizer_file(path.name)]
    names = {path.relative_to(root).as_posix(): path for path in files}
    digest = checksum_bytes("".join(f"{name} {checksum(path)}\n" for name, path in names.items()).encode())
    store = open_store(join_uri(storage, MODELS, f"{root.resolve().name}-{digest[-8:]}"))
    try:
        stored = sizes(store, "")
        store.upload_many(
            {name: path for name, path in names.items() if stored.get(name) != path.stat().st_size}
        )
    except BucketError as error:
        raise ConfigError(
            f"{key}: the adapter needs its base model after the job, but {uri} cannot be uploaded to storage_path: {error}. Upload it "
            "yourself and write its URI."
        ) from error
    return {key: store.uri}


def _names_code(model: Path) -> bool:
    """Return whether a local model has a class of its own: other *.py files, such as handler.py, are not needed to load it."""
    configs = (model / name for name in ("config.json", "tokenizer_config.json"))
    return any(b'"auto_map"' in path.read_bytes() for path in configs if path.exists())


class _LocalFiles:
    """The local files of a run, each with its path in the job's directory: files/<key>/..."""

    def __init__(self):
        self._files: dict[str, Path] = {}

    def take_model(self, key: str, uri: str) -> str:
        """Add a local model, which is a directory or a file; return its packed path. Return other URIs unchanged."""
        if uri.startswith("run:") or not _is_local(uri) or is_hub_id(uri):
            return uri
        root = local_path(uri)
        with about_key(key):
            check_readable(str(root))
        return self._take(key, root, [root] if root.is_file() else _files_below(root))

    def take_data(self, key: str, uri: Any) -> Any:
        """Add the local files of a data key: one URI, a list, or sets by name; return the value with packed paths."""
        if isinstance(uri, dict):
            return {name: self.take_data(f"{key}/{name}", below) for name, below in uri.items()}
        if isinstance(uri, list):
            return [self.take_data(f"{key}/{number}", item) for number, item in enumerate(uri)]
        if isinstance(uri, DataSource):
            return uri.model_copy(update={"path": self.take_data(key, uri.path)})
        if is_hub_dataset(uri) or not _is_local(uri):
            return uri
        with about_key(key.partition("/")[0]):
            files = [Path(file) for file, _ in matching_files(uri)]
        return self._take(key, _common_directory(files, local_path(uri)), files)

    def take_file(self, key: str, name: str) -> str:
        """Add a file and return its packed path; a missing file is left for later checks to report."""
        path = Path(name).expanduser()
        return self._take(key, path, [path]) if path.is_file() else name

    def check_size(self) -> None:
        """Raise an error if the files exceed the maximum size."""
        sizes = {name: path.stat().st_size for name, path in self._files.items()}
        if sum(sizes.values()) <= MAX_PACKED_BYTES:
            return
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
        listed = ", ".join(f"{self._files[name]} ({format_bytes(sizes[name])})" for name in largest)
        raise ConfigError(
            f"--submit: the run uses {format_bytes(sum(sizes.values()))} of local files, but a job can contain at most "
            f"{format_bytes(MAX_PACKED_BYTES)}. Largest files: {listed}. Upload them to a bucket that the cluster can access and use their "
            "URIs. For a path that exists on the cluster's machines, use file:///absolute/path."
        )

    def put_into(self, directory: Path) -> None:
        """Copy the files into the job's directory."""
        for name, path in self._files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / name)

    def _take(self, key: str, root: Path, files: Sequence[Path]) -> str:
        """Add files below a root; return the packed path of the root."""
        if files == [root]:
            self._files[name := f"{_FILES}/{key}/{root.name}"] = root
            return name
        self._files |= {f"{_FILES}/{key}/{file.relative_to(root).as_posix()}": file for file in files}
        return f"{_FILES}/{key}"


def _copy_code(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, target)
    else:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))


def _reject_embedded_bucket(config: FinetuneConfig, storage: str) -> None:
    named = [field.key for field in uri_fields(config) if uses_embedded_bucket(field.uri)]
    if uses_embedded_bucket(storage):  # also if the YAML does not set it
        named.append("storage_path")
    if named:
        raise ConfigError(
            f"{', '.join(dict.fromkeys(named))}: the embedded bucket (s3://anneal) serves only this machine, but the job runs on a cluster. "
            "Use a bucket that the cluster can access, such as storage_path=s3://my-bucket/runs."
        )


def _keys_on_the_cluster(config: FinetuneConfig) -> list[str]:
    """Return the keys that have paths of the cluster's machines, which may differ from this machine's."""
    keys = [field.key for field in uri_fields(config) if field.uri.startswith("file:")]
    if not is_remote(config.storage_path or ""):
        keys.append("storage_path")
    return list(dict.fromkeys(keys))


def _is_local(uri: str) -> bool:
    """Return whether a URI is a path on this machine; `file:` URIs are paths on the cluster's machines."""
    return not is_remote(uri) and not uri.startswith("file:")


def _files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _common_directory(files: Sequence[Path], path: Path) -> Path:
    """Return the directory above a glob pattern, or the existing path itself."""
    if path.exists():
        return path
    above = str(path).split("*")[0].split("?")[0].split("[")[0].rpartition("/")[0]
    return Path(above or "/")

"""What travels to a cluster: the project's code, and with a submitted run its YAML and the local files that it names."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.loading import ConfigError, LoadedConfig, to_yaml
from configs.schema import DataSource, DeepspeedFile, FinetuneConfig, uri_fields
from training.data.sources import is_hub_dataset, matching_files
from training.models.files import is_hub_id
from training.models.tokenizer import is_template
from training.planning.paths import about_key, storage_path
from utils.files import format_bytes
from utils.storage.bucket import check_readable, is_remote, local_path, uses_embedded_bucket

PROJECT = Path(__file__).resolve().parents[2]
CODE = ("main.py", "configs", "utils", "runs", "training")
"""All that a node runs."""

EVERYTHING_BUT_CODE = [
    "/[!.]*",
    "/.?*",
    *(f"!/{pattern}" for name in CODE for pattern in (name, f"{name}/**")),
    "__pycache__",
]
"""For Ray's `excludes`, as lines of a .gitignore. Ray asks them of the directory itself, too, which it calls "."."""

MAX_PACKED_BYTES = 100 * 1024**2
"""Of local files that travel with a job: Ray holds them in the memory of its head, and brings them to every node."""

_FILES = "files"


@dataclass(frozen=True)
class Package:
    """A directory that holds all that a job needs besides what the cluster has."""

    directory: Path
    loaded: LoadedConfig
    """As the job reads it: local files are named by where they lie in the directory."""
    on_the_cluster: tuple[str, ...]
    """Keys whose place only the cluster's machines see."""

    @property
    def yaml(self) -> str:
        """The YAML's name in the directory."""
        return self.loaded.path.name


def pack(loaded: LoadedConfig, directory: Path) -> Package:
    """Bring together what a job needs, in an empty directory.

    A path that exists here is packed. One that is the cluster's own is written as `file:///...` (`storage_path`: any absolute
    path), and stays as it is.

    Raises:
        ConfigError: a place serves this machine only, or the local files are too large to travel.
        BucketError, DataError: a local file is not there, or cannot be read.
    """
    config = loaded.config
    storage = storage_path(config)
    _reject_the_embedded_bucket(config, storage)
    if config.storage_path and not is_remote(storage) and not config.storage_path.startswith(("/", "file:")):
        raise ConfigError(
            f"storage_path: {config.storage_path} means another place on the cluster. Name a bucket, or an absolute path that all its "
            "machines share."
        )
    luggage = _Luggage()
    changes: dict[str, Any] = {}
    for key, kind in {field.key: field.kind for field in uri_fields(config)}.items():
        if kind == "model":
            changes[key] = luggage.take_model(key, getattr(config, key))
        elif kind == "data":
            changes[key] = luggage.take_data(key, getattr(config, key))
    if config.chat_template and not is_template(config.chat_template):
        changes["chat_template"] = luggage.take_file("chat_template", config.chat_template)
    if isinstance(config.deepspeed, DeepspeedFile):
        name = luggage.take_file("deepspeed", config.deepspeed.config_path)
        changes["deepspeed"] = config.deepspeed.model_copy(update={"config_path": name})
    luggage.check_size()
    for name in CODE:
        _copy_code(PROJECT / name, directory / name)
    luggage.put_into(directory)
    config = config.model_copy(update={**changes, "storage_path": storage})
    packed = replace(loaded, config=config, path=Path(loaded.path.name))
    (directory / packed.path).write_text(to_yaml(config), encoding="utf-8")
    return Package(directory, packed, tuple(_keys_on_the_cluster(config)))


class _Luggage:
    """Local files, and where each goes in the job's directory: files/<key>/..."""

    def __init__(self):
        self._files: dict[str, Path] = {}

    def take_model(self, key: str, place: str) -> str:
        """A directory's files, or a file."""
        if place.startswith("run:") or not _is_local(place) or is_hub_id(place):
            return place
        root = local_path(place)
        with about_key(key):
            check_readable(str(root))
        return self._take(key, root, [root] if root.is_file() else _files_below(root))

    def take_data(self, key: str, place: Any) -> Any:
        """Rows as the YAML names them: one place, or a list of them."""
        if isinstance(place, list):
            return [self.take_data(f"{key}/{number}", item) for number, item in enumerate(place)]
        if isinstance(place, DataSource):
            return place.model_copy(update={"path": self.take_data(key, place.path)})
        if is_hub_dataset(place) or not _is_local(place):
            return place
        with about_key(key.partition("/")[0]):
            files = [Path(uri) for uri, _ in matching_files(place)]
        return self._take(key, _common_directory(files, local_path(place)), files)

    def take_file(self, key: str, place: str) -> str:
        """One file, whose absence is somebody else's to explain."""
        path = Path(place).expanduser()
        return self._take(key, path, [path]) if path.is_file() else place

    def check_size(self) -> None:
        """Raises ConfigError when they are too large."""
        sizes = {name: path.stat().st_size for name, path in self._files.items()}
        if sum(sizes.values()) <= MAX_PACKED_BYTES:
            return
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
        listed = ", ".join(f"{self._files[name]} ({format_bytes(sizes[name])})" for name in largest)
        raise ConfigError(
            f"--submit: {format_bytes(sum(sizes.values()))} of local files are named, and at most {format_bytes(MAX_PACKED_BYTES)} travel "
            f"with a job. The largest: {listed}. Put them into a bucket that the cluster reaches, and name them there; a path that the "
            "cluster's machines have themselves is written file:///absolute/path."
        )

    def put_into(self, directory: Path) -> None:
        """Copy them."""
        for name, path in self._files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / name)

    def _take(self, key: str, root: Path, files: Sequence[Path]) -> str:
        """Where the root is found in the directory."""
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


def _reject_the_embedded_bucket(config: FinetuneConfig, storage: str) -> None:
    named = [field.key for field in uri_fields(config) if uses_embedded_bucket(field.uri)]
    if uses_embedded_bucket(storage):  # also where the YAML leaves it out
        named.append("storage_path")
    if named:
        raise ConfigError(
            f"{', '.join(dict.fromkeys(named))}: the embedded bucket (s3://anneal) serves this machine only, and the job runs on a cluster. "
            "Name a bucket that the cluster reaches, such as storage_path=s3://my-bucket/runs."
        )


def _keys_on_the_cluster(config: FinetuneConfig) -> list[str]:
    """Return the keys that a check from here cannot look at."""
    keys = [field.key for field in uri_fields(config) if field.uri.startswith("file:")]
    if not is_remote(config.storage_path or ""):
        keys.append("storage_path")
    return list(dict.fromkeys(keys))


def _is_local(place: str) -> bool:
    """A path of this machine; `file:` is one of the cluster's."""
    return not is_remote(place) and not place.startswith("file:")


def _files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _common_directory(files: Sequence[Path], place: Path) -> Path:
    """Where a directory or a glob begins; the file itself where it is one."""
    if place.exists():
        return place
    above = str(place).split("*")[0].split("?")[0].split("[")[0].rpartition("/")[0]
    return Path(above or "/")

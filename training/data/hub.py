"""Datasets on the Hugging Face Hub: their version, and their JSON, CSV and TSV files.

`datasets` turns ISO dates of such files into datetimes, 3 into 3.0 beside a null, and large integers into floats. The files are
therefore downloaded and read as those of other sources. Parquet files declare the types of their columns, so `datasets` reads them.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.errors import DataError
from utils.files import checksum_bytes, write_atomically

if TYPE_CHECKING:
    from datasets import DatasetBuilder

_PREFIX = "hf://datasets/"
_SECONDS = 10
_TEXT_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv)(\.gz|\.zst)?$")
_TAB_FILE = re.compile(r"\.tsv(\.gz|\.zst)?$")
_OF_EVERY_CONFIG = {"name", "version", "data_dir", "data_files", "description", "features"}


def is_hub_dataset(uri: str) -> bool:
    """Return whether the URI names a dataset on the Hugging Face Hub."""
    return uri.startswith(_PREFIX)


def parse_hub_uri(uri: str) -> tuple[str, str | None, str]:
    """Parse `hf://datasets/ORG/NAME[/CONFIG][?split=SPLIT]` into (ORG/NAME, CONFIG, SPLIT or "train")."""
    path, _, query = uri.removeprefix(_PREFIX).partition("?")
    parts = path.strip("/").split("/")
    split = "train"
    if query:
        key, _, split = query.partition("=")
        if key != "split" or not split:
            raise DataError(
                f"{uri}: only `split=...` is supported after `?`, for example ?split=train[50%:]."
            )
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"{uri}: write hf://datasets/ORG/NAME/CONFIG?split=train (CONFIG is optional).")
    return f"{parts[0]}/{parts[1]}", parts[2] if len(parts) == 3 else None, split


def hub_version(uri: str) -> str:
    """Return the commit of a dataset: the latest, or without network access that of the local cache."""
    from huggingface_hub import HfApi, constants

    name, config, _ = parse_hub_uri(uri)
    with hub_errors(uri):
        if not constants.HF_HUB_OFFLINE:
            return HfApi().dataset_info(name, timeout=_SECONDS).sha or ""
        snapshots = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "snapshots")
        if cached := sorted(snapshots.glob("*"), key=lambda path: path.stat().st_mtime):
            return cached[-1].name
        from datasets import load_dataset_builder

        return load_dataset_builder(name, config).hash or ""


def text_files(uri: str, version: str, cache: Path) -> dict[str, list[Path]] | None:
    """Download the JSON, CSV or TSV files of a dataset, or return None if `datasets` has to read it.

    Args:
        uri: The dataset.
        version: Its commit.
        cache: Directory that keeps the list of files, so that they are found without network access.

    Returns:
        The files of each split that the URI names.
    """
    from huggingface_hub import constants

    listing = cache / f"{checksum_bytes(f'{uri} {version}'.encode()).removeprefix('crc64nvme:')}.hub.json"
    if listing.exists():
        listed = {split: list(map(Path, paths)) for split, paths in json.loads(listing.read_text()).items()}
        if all(path.exists() for paths in listed.values() for path in paths):
            return listed
    if constants.HF_HUB_OFFLINE:
        return None
    with hub_errors(uri):
        found = _download(*parse_hub_uri(uri), version)
    if found is None or not all(_TEXT_FILE.search(path.name) for paths in found.values() for path in paths):
        return None
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(
        listing,
        json.dumps({split: list(map(str, paths)) for split, paths in found.items()}).encode(),
    )
    return found


def parts_of(split: str, rows: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Return the parts of an expression such as `train[:10%]+test` as (split, first row, row after the last).

    Args:
        split: The expression, as `datasets` reads it.
        rows: Rows of each split.
    """
    from datasets import ReadInstruction

    instructions = ReadInstruction.from_spec(split).to_absolute(dict(rows))
    return [(part.splitname, part.from_, part.to) for part in instructions]


def _download(name: str, config: str | None, split: str, version: str) -> dict[str, list[Path]] | None:
    from datasets import DownloadManager, load_dataset_builder

    builder = load_dataset_builder(name, config, revision=version)
    files: Mapping[Any, Any] | None = builder.config.data_files
    if not files or not _is_plain_text(builder, [str(url) for each in files.values() for url in each]):
        return None
    named = {each: files[each] for each in files if split == "all" or _names(split, str(each))}
    if not named:
        raise ValueError(f"unknown split {split!r}; it has {', '.join(map(str, files))}")
    manager = DownloadManager(dataset_name=builder.dataset_name)
    found: dict[str, list[Path]] = {}
    for each, urls in named.items():
        paths: list[Any] = manager.download(list(urls))  # pyright: ignore[reportAssignmentType]
        unpacked: list[Any] = [
            manager.extract(path) if str(path).endswith(".zip") else path for path in paths
        ]
        found[str(each)] = [Path(path) for path in manager.iter_files(unpacked)]
    return found


def _names(expression: str, split: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(split)}(?![\w.-])", expression) is not None


def _is_plain_text(builder: "DatasetBuilder", urls: Iterable[str]) -> bool:
    """Return whether a builder reads JSON, CSV or TSV files without settings of its own."""
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    if not isinstance(builder, Csv | Json):
        return False
    default = type(builder.config)()
    changed = {
        field.name: getattr(builder.config, field.name)
        for field in fields(default)
        if getattr(builder.config, field.name) != getattr(default, field.name)
    }
    settings = {name: value for name, value in changed.items() if name not in _OF_EVERY_CONFIG}
    # `datasets` sets the separator itself for a dataset of TSV files.
    return settings == ({"sep": "\t"} if all(map(_TAB_FILE.search, urls)) else {})


@contextmanager
def hub_errors(uri: str) -> Iterator[None]:
    """Convert the errors of a dataset that cannot be read from the hub."""
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, httpx.HTTPError, DatasetsError) as error:
        raise DataError(
            f"{uri}: cannot be read from the Hugging Face Hub ({(str(error).splitlines() or [''])[0]}). Check its name, config and split. "
            "A gated dataset needs HF_TOKEN. Without network access, set HF_HUB_OFFLINE=1 to use the local cache, or use a JSONL file."
        ) from error

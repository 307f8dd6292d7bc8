"""What a path names: files that can be told apart from their older versions, and the rows in them as they were written."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from utils.bucket import NotFoundError, check_readable, fetch_file, find_objects, is_remote, local_path
from utils.errors import AnnealError
from utils.files import checksum

MAX_ROW_BYTES = 8_000_000  # some two million tokens: more than any model reads at once

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_NOT_READ = (".tsv", ".arrow", ".zip", ".xlsx", ".bz2", ".xz", ".tar", ".tgz", ".7z")
_HUB_PREFIX = "hf://datasets/"
_HUB_SECONDS = 10
_PARQUET_ROWS = 1000
_JSON_BLOCK = 1 << 20  # characters


class DataError(AnnealError):
    """Data that cannot be trained on; the message says where (file, row), what and what to do."""


class RowError(ValueError):
    """What is wrong with one row; who reads adds the file and the row's number."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind
        """A few words that rows of the same fault are counted under."""


@dataclass(frozen=True)
class DataFile:
    """One file of rows, or one dataset of the hub."""

    uri: str
    """As messages name it."""
    version: str
    """Differs whenever the content does: an object's size and ETag, a local file's checksum, a hub dataset's commit."""
    source: int
    """Which of the YAML's sources it belongs to."""


def find_files(path: str, source: int) -> list[DataFile]:
    """The files that a path of the YAML names: itself, all below a directory or prefix, or all that a glob matches.

    Args:
        path: `s3://`, local or `hf://datasets/`.
        source: The source's position in the YAML.

    Raises:
        BucketError: nothing is there, or it cannot be read.
        DataError: nothing there is a file of rows, or the hub does not answer.
    """
    if is_hub_dataset(path):
        return [DataFile(path, _hub_version(path), source)]
    return [
        DataFile(uri, version if is_remote(uri) else checksum(Path(uri)), source)
        for uri, version in matching_files(path)
    ]


def matching_files(path: str) -> list[tuple[str, str]]:
    """(URI, what tells its version without reading it) of each file that a path of the YAML names; not of a hub dataset.

    Raises as `find_files` does.
    """
    place = path if is_remote(path) else str(local_path(path))
    found = _matches(place) if _is_glob(place) else _files_at(place)
    if not found:
        raise DataError(
            f"{place}: none of the files there is read. Rows are in {', '.join(_KINDS)}; all but Parquet also with .gz or .zst behind."
        )
    return found


def _files_at(place: str) -> list[tuple[str, str]]:
    """(URI, version) of the file there, or of all files of rows below."""
    check_readable(place)
    found = find_objects(place)
    is_one_file = [uri for uri, _ in found] == [place]
    return found if is_one_file else [(uri, version) for uri, version in found if _is_data_file(uri, place)]


def _is_glob(place: str) -> bool:
    return any(character in place for character in "*?[") and (is_remote(place) or not Path(place).exists())


def _matches(pattern: str) -> list[tuple[str, str]]:
    """(URI, version) of the files whose path is as the pattern: `*` within a name, `**` for any directories."""
    from fsspec.utils import glob_translate

    directory = re.split(r"[*?[]", pattern)[0].rpartition("/")[0]
    if is_remote(pattern) and directory.count("/") < 2:
        raise DataError(f"{pattern}: a bucket's name cannot be a pattern; name the bucket.")
    try:
        matches = re.compile(glob_translate(pattern)).match
    except ValueError as error:
        raise DataError(
            f"{pattern}: is no pattern ({error}). Write `**` alone between two slashes."
        ) from error
    found = [item for item in find_objects(directory or "/") if matches(item[0])]
    if not _is_hidden(pattern, directory):
        found = [item for item in found if not _is_hidden(item[0], directory)]
    if not found:
        raise NotFoundError(
            f"{pattern}: matches no file below {directory or '/'}; `*` stands for one name, `**` for directories, too"
        )
    return found


def _is_data_file(uri: str, directory: str) -> bool:
    return not _is_hidden(uri, directory) and _kind_of(uri)[0] in _KINDS.values()


def _is_hidden(uri: str, directory: str) -> bool:
    """As Spark's and others' markers are, somewhere below the directory."""
    parts = PurePosixPath(uri.removeprefix(directory)).parts
    return any(part.startswith((".", "_")) for part in parts)


def _kind_of(uri: str) -> tuple[str, str | None]:
    """(jsonl, json, parquet, csv or the unknown ending; compression)."""
    name = PurePosixPath(uri).name.lower()
    compression = _COMPRESSIONS.get(PurePosixPath(name).suffix)
    ending = PurePosixPath(PurePosixPath(name).stem if compression else name).suffix
    return _KINDS.get(ending, ending), compression


# --- Datasets of the hub ----------------------------------------------------------------------------------------


def is_hub_dataset(uri: str) -> bool:
    """Whether the URI names a dataset of the Hugging Face hub."""
    return uri.startswith(_HUB_PREFIX)


def parse_hub_uri(uri: str) -> tuple[str, str | None, str]:
    """`hf://datasets/ORG/NAME[/CONFIG][?split=SPLIT]` -> (ORG/NAME, CONFIG, SPLIT); the split is `train` unless named.

    Raises:
        DataError: the URI has another shape.
    """
    path, _, query = uri.removeprefix(_HUB_PREFIX).partition("?")
    parts = path.strip("/").split("/")
    split = "train"
    if query:
        key, _, split = query.partition("=")
        if key != "split" or not split:
            raise DataError(f"{uri}: after `?` only `split=...` is known, as in ?split=train[50%:].")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"{uri}: write hf://datasets/ORG/NAME/CONFIG?split=train (CONFIG may be left out).")
    return f"{parts[0]}/{parts[1]}", parts[2] if len(parts) == 3 else None, split


def _hub_version(uri: str) -> str:
    from huggingface_hub import HfApi, constants

    name, config, _ = parse_hub_uri(uri)
    with _hub_errors(uri):
        if constants.HF_HUB_OFFLINE:
            from datasets import load_dataset_builder

            return load_dataset_builder(name, config).hash or ""  # the commit it was loaded of
        return HfApi().dataset_info(name, timeout=_HUB_SECONDS).sha or ""


@contextmanager
def _hub_errors(uri: str) -> Iterator[None]:
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, httpx.HTTPError, DatasetsError) as error:
        raise DataError(
            f"{uri}: cannot be read from the Hugging Face hub ({(str(error).splitlines() or [''])[0]}). Check its name, config and split; "
            "a gated one needs HF_TOKEN; without a network, set HF_HUB_OFFLINE=1 to take what was loaded here before, or name a JSONL file."
        ) from error


# --- Rows -------------------------------------------------------------------------------------------------------


@dataclass
class OpenFile:
    """A file that is being read."""

    rows: Iterator[tuple[int, Any]]
    """(line or record, from 1; a dictionary, or a RowError that says why it could not be read)."""
    fraction: Callable[[], float]
    """How much of it has been read, 0 to 1."""


def open_file(file: DataFile, cache: Path) -> OpenFile:
    """Start to read a file; it is brought to this node first. Memory is bounded by a row, or a batch of Parquet.

    Raises:
        BucketError: it cannot be fetched.
        DataError: now or while rows are taken: it is not what its name says, or damaged from some row on.
    """
    if is_hub_dataset(file.uri):
        return _open_hub(file)
    path = fetch_file(file.uri, cache)
    kind, compression = _kind_of(file.uri)
    if kind in _NOT_READ:
        raise DataError(
            f"{file.uri}: {kind} files are not read. Write JSONL (one JSON object a line), JSON, CSV or Parquet, with that extension."
        )
    if kind == "parquet":
        if compression:
            raise DataError(
                f"{file.uri}: Parquet compresses by itself; unpack the file and leave {compression} out."
            )
        return _open_parquet(path, file.uri)
    raw = path.open("rb")
    size = max(path.stat().st_size, 1)
    if fault := None if compression else _other_kind(raw.peek(4)):
        raw.close()
        raise DataError(f"{file.uri}: {fault}.")
    stream = _decompressed(raw, compression) if compression else raw
    reader = {"json": _read_json, "csv": _read_csv}.get(kind, _read_jsonl)
    return OpenFile(
        _closing(raw, _naming_damage(reader(stream, file.uri), file.uri)),
        lambda: 1.0 if raw.closed else raw.tell() / size,
    )


def _other_kind(head: bytes) -> str | None:
    """What a file that begins so is, where it is no text."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "is UTF-16. Save the file as UTF-8"
    for magic, ending in _MAGIC.items():
        if head.startswith(magic):
            return f"is {ending} by its content. Let its name end so"
    return None


def _closing(raw: io.BufferedReader, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    with raw:
        yield from rows


def _decompressed(raw: io.BufferedReader, compression: str) -> io.BufferedReader:
    if compression == "gzip":
        import gzip

        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression), 1 << 20)  # pyright: ignore


def _naming_damage(rows: Iterator[tuple[int, Any]], uri: str) -> Iterator[tuple[int, Any]]:
    """Compressed files break anywhere: say behind which row."""
    import zlib

    number = 0
    try:
        for number, value in rows:
            yield number, value
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{uri}:{number + 1}: the file is damaged or cut off here ({error}). Write it again."
        ) from error


def _read_jsonl(stream: io.BufferedReader, uri: str) -> Iterator[tuple[int, Any]]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            size = len(line)
            while not line.endswith(b"\n") and (line := stream.readline(MAX_ROW_BYTES)):
                size += len(line)
            yield number, _too_large(size)
        elif not line.isspace():
            yield number, _parse_line(line)


def _too_large(size: int) -> RowError:
    return RowError(
        "too large",
        f"is {size / 1e6:.1f} MB, and a row may have {MAX_ROW_BYTES / 1e6:.0f} MB. Is it a whole document, or a JSON array (name it .json)?",
    )


def _parse_line(line: bytes) -> Any:
    try:
        value = json.loads(line.decode("utf-8-sig" if line.startswith(codecs.BOM_UTF8) else "utf-8"))
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", f"is not UTF-8 (byte {error.start + 1}). Save the file as UTF-8")
    except ValueError as error:
        return RowError("not JSON", f"is not JSON ({error}). One JSON object a line is expected")
    except RecursionError:
        return RowError("nested too deeply", "is nested too deeply to be a conversation")
    return _checked_object(
        value, "One JSON object a line is expected; a file of one JSON array is named .json"
    )


def _checked_object(value: Any, expected: str) -> Any:
    if isinstance(value, dict):
        return value
    return RowError("no object", f"is {json_type(value)}. {expected}")


def json_type(value: Any) -> str:
    """What JSON calls a value, for messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"of type {type(value).__name__}")  # Parquet has bytes, dates and others


def _read_json(stream: io.BufferedReader, uri: str) -> Iterator[tuple[int, Any]]:
    """A JSON array of objects, or objects one behind another; JSONL by another name is read as such."""
    head = stream.peek(1 << 16)
    first_line = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[0]
    if first_line.startswith(b"{") and isinstance(_parse_line(first_line), dict):
        yield from _read_jsonl(stream, uri)
        return
    yield from _read_document(stream, uri)


def _read_document(stream: io.BufferedReader, uri: str) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()
    text = _Characters(stream, uri)
    text.skip(" \t\r\n")
    in_array = text.take("[")
    number = 0
    while True:
        text.skip(" \t\r\n")
        if text.at_end():
            if in_array:
                raise DataError(f"{uri}:{number + 1}: the JSON array is cut off here. Write the file again.")
            return
        if in_array and text.take("]"):
            text.skip(" \t\r\n")
            if not text.at_end():
                raise DataError(
                    f"{uri}:{number + 1}: something follows the JSON array's end. Write one array, or JSONL."
                )
            return
        if in_array and number and not text.take(","):
            raise DataError(
                f"{uri}:{number + 1}: is not JSON (a comma or the array's end is missing before it). Write the file again."
            )
        text.skip(" \t\r\n")
        number += 1
        yield number, _checked_object(text.value(decoder, number), "An array of JSON objects is expected")


class _Characters:
    """A window on a long text that grows as far as one value needs."""

    def __init__(self, stream: io.BufferedReader, uri: str):
        self._stream = stream
        self._uri = uri
        # What is no UTF-8 becomes lone surrogates, which the row's check names.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""
        self._position = 0
        self._ended = False

    def _grow(self) -> bool:
        if self._ended:
            return False
        block = self._stream.read(_JSON_BLOCK)
        self._ended = not block
        self._text = self._text[self._position :] + self._decoder.decode(block, final=self._ended)
        self._position = 0
        return True

    def at_end(self) -> bool:
        return self._position >= len(self._text) and not (self._grow() and not self.at_end())

    def skip(self, characters: str) -> None:
        while not self.at_end() and self._text[self._position] in characters:
            self._position += 1

    def take(self, character: str) -> bool:
        if self.at_end() or self._text[self._position] != character:
            return False
        self._position += 1
        return True

    def value(self, decoder: json.JSONDecoder, number: int) -> Any:
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._position)
            except ValueError as error:
                if len(self._text) - self._position > MAX_ROW_BYTES:
                    raise DataError(
                        f"{self._uri}:{number}: no JSON value ends within {MAX_ROW_BYTES / 1e6:.0f} MB ({error}). Shorten or remove the row if it is "
                        "that long; JSONL can leave it out with bad_rows: skip."
                    ) from error
                if not self._grow():
                    raise DataError(
                        f"{self._uri}:{number}: is not JSON ({error}). Write the file again."
                    ) from error
                continue
            except RecursionError as error:
                raise DataError(
                    f"{self._uri}:{number}: is nested too deeply to be a conversation. Mend or remove it."
                ) from error
            if end == len(self._text) and self._grow():
                continue  # a number may go on behind the window's end
            size, self._position = end - self._position, end
            return _too_large(size) if size > MAX_ROW_BYTES else value


def _read_csv(stream: io.BufferedReader, uri: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as lines:
        yield from _csv_records(csv.reader(_bounded(lines, uri), strict=True), uri)


def _bounded(lines: io.TextIOWrapper, uri: str) -> Iterator[str]:
    number = 0
    while line := lines.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(
                f"{uri}:{number}: has no line end within {MAX_ROW_BYTES / 1e6:.0f} MB. Shorten or remove the row if it is that long; JSONL can "
                "leave it out with bad_rows: skip."
            )
        yield line


def _csv_records(reader: Any, uri: str) -> Iterator[tuple[int, Any]]:
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # What follows an open quote cannot be told from the quoted text.
            raise DataError(f"{uri}:{line}: is not CSV ({error}). Write the file again.") from error
        if header is None:
            header = cells
            repeated = sorted({name for name in cells if cells.count(name) > 1})
            if repeated:
                raise DataError(
                    f"{uri}:{line}: the header names {', '.join(map(repr, repeated))} twice. Give each column its own name."
                )
            separators = [
                separator for separator in (";", "\t", "|") if len(cells) == 1 and separator in cells[0]
            ]
            if separators:
                raise DataError(
                    f"{uri}:{line}: the header is one column with {separators[0]!r} in it, and cells are separated by commas here. Write the "
                    "file again with commas, or as Parquet or JSONL."
                )
        elif not cells:
            continue
        elif len(cells) != len(header):
            yield (
                line,
                RowError(
                    "wrong cells", f"has {len(cells)} cells, and the header names {len(header)} columns"
                ),
            )
        else:
            yield line, dict(zip(header, cells, strict=True))


def _open_parquet(path: Path, uri: str) -> OpenFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Damaged names, dates and sizes raise Python's own errors.
    damages = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except damages as error:
        raise _parquet_error(uri, error) from error
    read = 0

    def rows() -> Iterator[tuple[int, Any]]:
        nonlocal read
        try:
            with file:
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                    for value in batch.to_pylist():
                        read += 1
                        yield read, _without_filled_in(value)
        except damages as error:
            raise _parquet_error(f"{uri}:{read + 1}", error) from error

    return OpenFile(rows(), lambda: read / max(file.metadata.num_rows, 1))


def _without_filled_in(row: dict[str, Any]) -> dict[str, Any]:
    """A row of columns: the nulls in it stand for keys that other rows have, and would be printed by templates."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    if isinstance(value, list):
        return [_without_nulls(below) for below in value]
    return value


def _parquet_error(place: str, error: Exception) -> DataError:
    return DataError(
        f"{place}: no Parquet file, or a damaged one ({(str(error).splitlines() or [''])[0]}). Write it again."
    )


def _open_hub(file: DataFile) -> OpenFile:
    import datasets
    from huggingface_hub import constants

    name, config, split = parse_hub_uri(file.uri)
    revision = None if constants.HF_HUB_OFFLINE else file.version
    with _hub_errors(file.uri):
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    read = 0

    def rows() -> Iterator[tuple[int, Any]]:
        nonlocal read
        for row in dataset:
            read += 1
            yield read, _without_filled_in(row)  # pyright: ignore[reportArgumentType]

    return OpenFile(rows(), lambda: read / max(len(dataset), 1))  # pyright: ignore[reportArgumentType]

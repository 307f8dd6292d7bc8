"""Data sources: find the files that a path names, identify their versions, and read their raw rows."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from training.data.class_names import with_names
from training.data.errors import MAX_ROW_BYTES, DataError, RowError, json_type, unique_keys
from training.data.hub import hub_errors, hub_version, is_hub_dataset, parse_hub_uri, parts_of, text_files
from training.data.json_columns import rows_of_batch
from utils.files import checksum
from utils.storage.bucket import (
    NotFoundError,
    check_readable,
    fetch_file,
    find_objects,
    is_remote,
    local_path,
    open_ranges,
    open_store,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_NOT_READ = (".zip", ".xlsx", ".bz2", ".xz", ".tar", ".tgz", ".7z")
# Files that `datasets` writes beside the rows.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SEPARATORS = {"csv": ",", "tsv": "\t"}
_TABLES = {",": "CSV", "\t": "TSV"}
_SPLIT = re.compile(
    r"(?:^|[/_.-])(train|training|valid|validation|val|dev|eval|evaluation|test|holdout|heldout|held_out)(?=[/_.-]|$)"
)
_SAME_SPLIT = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}
_PARQUET_ROWS = 1000
_HEAD_BYTES = 64
_JSON_BLOCK = 1 << 20  # characters


@dataclass(frozen=True)
class DataFile:
    """One file of rows, or one dataset on the Hugging Face Hub."""

    uri: str
    """URI shown in messages."""
    version: str
    """Changes with the content: an object's size and ETag, a local file's checksum, or a Hub dataset's commit."""
    source: int
    """Index of the source in the YAML."""

    @property
    def size(self) -> int:
        """Return the bytes of an object or of a local file. Not for Hub datasets."""
        return int(self.version.split()[0]) if is_remote(self.uri) else local_path(self.uri).stat().st_size

    @property
    def is_divisible(self) -> bool:
        """Return whether a reader can start anywhere in the file: at the next line, or at the next row group."""
        return _kind_of(self.uri) in (("jsonl", None), ("parquet", None))

    @property
    def is_stream(self) -> bool:
        """Return whether the file is read from start to end; Arrow files are memory-mapped, and `datasets` reads those of the Hub."""
        return not is_hub_dataset(self.uri) and _kind_of(self.uri)[0] != "arrow"


@dataclass(frozen=True)
class Piece:
    """A file, or the rows of it that start in a range of its bytes: lines, or the rows of row groups."""

    file: int
    """Index in `DataRequest.files`."""
    begin: int = 0
    end: int | None = None
    """None: the complete file."""


def find_files(path: str, source: int) -> list[DataFile]:
    """Return the data files of a path: one file, all files below a directory or prefix, or a glob's matches.

    Args:
        path: An `s3://` URI, a local path or an `hf://datasets/` URI.
        source: Index of the source in the YAML.
    """
    if is_hub_dataset(path):
        return [DataFile(path, hub_version(path), source)]
    return [
        DataFile(uri, version if is_remote(uri) else checksum(Path(uri)), source)
        for uri, version in matching_files(path)
    ]


def matching_files(path: str) -> list[tuple[str, str]]:
    """Return (URI, version) of each file that a path names, without reading them. Not for Hub datasets."""
    place = path if is_remote(path) else str(local_path(path))
    found = _matches(place) if _is_glob(place) else _files_at(place)
    if not found:
        raise DataError(
            f"{place}: contains no supported data file. Supported: {', '.join(_KINDS)}; all except Parquet may also end in .gz or .zst."
        )
    return found


def _files_at(place: str) -> list[tuple[str, str]]:
    """Return (URI, version) of the file at this path, or of all data files below it."""
    check_readable(place)
    found = find_objects(place)
    if [uri for uri, _ in found] == [place]:
        return found
    files = [(uri, version) for uri, version in found if _is_data_file(uri, place)]
    _reject_several_splits([uri for uri, _ in files], place)
    return files


def _reject_several_splits(uris: list[str], directory: str) -> None:
    """Reject a directory with files of several splits, which would be trained together; a file without a split's name may train."""
    by_split = _by_split(uris, directory)
    if len(by_split) > 1:
        first = {split: files[0] for split, files in by_split.items()}
        chosen = _path_of_split(first.get("train", uris[0]), directory)
        raise DataError(
            f"{directory}: contains files of several splits ({', '.join(sorted(first.values()))}). Name the files of one, such as "
            f"{chosen}; {directory.rstrip('/')}/**/* takes all of them."
        )


def files_of_other_splits(uris: Sequence[str]) -> list[str]:
    """Return the files of a pattern that belong to another split than its training files, or than its first; empty for one split."""
    if len(uris) < 2:
        return []
    folders = zip(*(uri.split("/")[:-1] for uri in uris), strict=False)
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, folders)]
    by_split = _by_split(uris, "/".join(common))
    kept = "train" if "train" in by_split else next(iter(by_split))
    return [uri for split, files in by_split.items() if split != kept for uri in files]


def _by_split(uris: Sequence[str], directory: str) -> dict[str, list[str]]:
    """Return split -> its files; a file without a split's name may train."""
    by_split: dict[str, list[str]] = {}
    for uri in uris:
        found = _SPLIT.search(uri.removeprefix(directory).lower())
        split = _SAME_SPLIT.get(found[1], found[1]) if found else "train"
        by_split.setdefault(split, []).append(uri)
    return by_split


def _path_of_split(uri: str, directory: str) -> str:
    """Return a path that names the files of a file's split: their folder, a pattern of their names, or the file itself."""
    start = len(directory.rstrip("/"))
    found = _SPLIT.search(uri[start:].lower())
    if found is None:
        return uri
    begin, end = start + found.start(1), start + found.end(1)
    folder, slash, _ = uri[end:].partition("/")
    if slash:
        return uri[:end] + folder
    return f"{uri[:begin].rpartition('/')[0]}/*{uri[begin:end]}*"


def _is_glob(place: str) -> bool:
    """Return whether a path is a pattern; a file, an object or a prefix may have `[` or `?` in its name."""
    if not _has_wildcards(place):
        return False
    if is_remote(place) and _has_wildcards(place.split("/")[2]):
        return True  # no bucket has such a name
    return not (find_objects(place) if is_remote(place) else Path(place).exists())


def _has_wildcards(text: str) -> bool:
    return any(character in text for character in "*?[")


def _directory_of(pattern: str) -> str:
    """Return the directory before the first part that is a pattern; one that exists may have `[` or `?` in its name."""
    parts = pattern.split("/")
    for count, part in enumerate(parts[:-1]):
        above = "/".join(parts[:count])
        is_bucket = is_remote(pattern) and count == 2
        if _has_wildcards(part) and (is_bucket or not _has_directory(above, part)):
            return above
    return "/".join(parts[:-1])


def _has_directory(above: str, name: str) -> bool:
    if is_remote(above):
        return open_store(above).first(f"{name}/") is not None
    return Path(f"{above}/{name}").is_dir()


def _matches(pattern: str) -> list[tuple[str, str]]:
    """Return (URI, version) of the files that match a glob: `*` matches within a name, `**` any directories."""
    from fsspec.utils import glob_translate

    directory = _directory_of(pattern)
    if is_remote(pattern) and directory.count("/") < 2:
        raise DataError(f"{pattern}: the bucket name cannot be a glob pattern. Write the bucket's full name.")
    try:
        names = glob_translate(pattern.removeprefix(f"{directory}/"))
        matches = re.compile(re.escape(f"{directory}/") + names).match
    except ValueError as error:
        raise DataError(
            f"{pattern}: invalid glob pattern ({error}). `**` must stand alone between two slashes."
        ) from error
    found = [item for item in find_objects(directory or "/") if matches(item[0])]
    found = [item for item in found if not _is_description(item[0])] or found
    if not _is_hidden(pattern, directory):
        found = [item for item in found if not _is_hidden(item[0], directory)]
    if not found:
        raise NotFoundError(
            f"{pattern}: matches no file below {directory or '/'}; `*` matches within one name, `**` also matches directories"
        )
    return found


def _is_description(uri: str) -> bool:
    return PurePosixPath(uri).name in _DESCRIPTIONS


def _is_data_file(uri: str, directory: str) -> bool:
    return not _is_description(uri) and not _is_hidden(uri, directory) and _kind_of(uri)[0] in _KINDS.values()


def _is_hidden(uri: str, directory: str) -> bool:
    """Return whether a path component below the directory starts with `.` or `_`, like Spark's marker files."""
    parts = PurePosixPath(uri.removeprefix(directory)).parts
    return any(part.startswith((".", "_")) for part in parts)


def _kind_of(uri: str) -> tuple[str, str | None]:
    """Return (format, compression); the format is one of _KINDS or the unknown extension."""
    name = PurePosixPath(uri).name.lower()
    compression = _COMPRESSIONS.get(PurePosixPath(name).suffix)
    ending = PurePosixPath(PurePosixPath(name).stem if compression else name).suffix
    return _KINDS.get(ending, ending), compression


# --- Rows -------------------------------------------------------------------------------------------------------


@dataclass
class OpenFile:
    """A data file that is being read."""

    stored: Iterator[tuple[int, Any]]
    """(line or record number from 1, what is stored there): a line of JSON as bytes, a StoredBatch of rows, or a row."""
    fraction: Callable[[], float]
    """Returns the fraction read so far, 0 to 1."""
    lines: Callable[[], int] = lambda: 0
    """Returns the lines read so far of a range of lines, whose numbers count from its start; otherwise 0."""

    @property
    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield (number, row); the row is a dictionary, or a RowError if it could not be parsed."""
        return parse_rows(self.stored)


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """Consecutive rows of a Parquet or Arrow file."""

    uri: str
    batch: "pa.RecordBatch"

    def __reduce__(self) -> tuple[Callable[[str, bytes], "StoredBatch"], tuple[str, bytes]]:
        import pyarrow as pa

        sink = (
            pa.BufferOutputStream()
        )  # pickle would copy all rows of which this batch is a slice (pyarrow 26)
        with pa.ipc.new_stream(sink, self.batch.schema) as writer:
            writer.write_batch(self.batch)
        return _received, (self.uri, sink.getvalue().to_pybytes())


def _received(uri: str, stream: bytes) -> StoredBatch:
    import pyarrow as pa

    return StoredBatch(uri, pa.ipc.open_stream(stream).read_next_batch())


def parse_rows(stored: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Yield (line or record number, row) of what files store; a row is a dictionary, or a RowError if it cannot be parsed.

    Raises:
        DataError: Values of a Parquet or Arrow file are corrupt.
    """
    for number, value in stored:
        if isinstance(value, bytes):
            yield number, _parse_line(value)
        elif isinstance(value, StoredBatch):
            yield from _rows_in(value, number)
        else:
            yield number, value


def _rows_in(stored: StoredBatch, number: int) -> Iterator[tuple[int, Any]]:
    try:
        for row in rows_of_batch(stored.batch):
            yield number, row
            number += 1
    except _read_errors() as error:
        raise _file_error(f"{stored.uri}:{number}", "a Parquet file", error) from error


def open_file(file: DataFile, cache: Path | None, piece: Piece | None = None) -> OpenFile:
    """Open a file, or a piece of it, for streaming.

    Memory is bounded by one row, or by one batch for Parquet. A corrupt file may raise DataError during iteration.

    Args:
        file: The file.
        cache: Where to keep a copy of a file in a bucket; None: read it from the bucket, without a copy. Not for Hub and Arrow files.
        piece: The piece of the file; None: the complete file.
    """
    if is_hub_dataset(file.uri):
        assert cache
        return _open_hub(file, cache)
    kind, compression = _kind_of(file.uri)
    if kind in _NOT_READ:
        raise DataError(
            f"{file.uri}: {kind} files are not supported. Convert it to JSONL (one JSON object per line), JSON, CSV, TSV or Parquet, with that extension."
        )
    if kind == "parquet" and compression:
        raise DataError(
            f"{file.uri}: {compression} around Parquet is not supported, since Parquet has its own compression. Decompress the file."
        )
    if cache is None and is_remote(file.uri):
        raw, size = open_ranges(file.uri, file.version)
        if kind == "parquet":
            return _open_parquet(raw, file.uri, piece)
        return _open_text(raw, size, file.uri, kind, compression, piece)
    path = fetch_file(file.uri, cache) if cache else local_path(file.uri)
    if kind == "arrow":
        return _open_arrow(path, file.uri)
    if kind == "parquet":
        return _open_parquet(path, file.uri, piece)
    return _open_text(path.open("rb"), path.stat().st_size, file.uri, kind, compression, piece)


def _open_text(
    raw: io.BufferedReader,
    size: int,
    uri: str,
    kind: str,
    compression: str | None,
    piece: Piece | None = None,
) -> OpenFile:
    """Open a JSONL, JSON, CSV or TSV file, or a piece of a JSONL file."""
    if fault := None if compression else _other_kind(raw.peek(4)):
        raw.close()
        raise DataError(f"{uri}: {fault}.")
    if piece and piece.end is not None:
        return _open_lines(raw, uri, piece.begin, piece.end)
    stream = _decompressed(raw, compression) if compression else raw
    if kind in _SEPARATORS:
        rows = _read_table(stream, uri, _SEPARATORS[kind])
    else:
        rows = _read_json(stream, uri) if kind == "json" else _read_jsonl(stream, uri)
    return OpenFile(
        _closing(raw, _naming_damage(rows, uri)),
        lambda: 1.0 if raw.closed else raw.tell() / max(size, 1),
    )


def _open_lines(raw: io.BufferedReader, uri: str, begin: int, end: int) -> OpenFile:
    """Open the lines of a JSONL file that start in a range of bytes."""
    read = 0

    def rows() -> Iterator[tuple[int, Any]]:
        nonlocal read
        if _is_array(raw):  # rows cannot be found from its middle
            yield from _read_json(raw, uri) if begin == 0 else ()
            return
        raw.seek(max(begin - 1, 0))
        while begin and (rest := raw.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
            pass  # a line that starts before the range
        for read, line in _lines(raw, end):
            if isinstance(line, RowError) or not line.isspace():
                yield read, line

    return OpenFile(_closing(raw, _naming_damage(rows(), uri)), lambda: 1.0, lambda: read)


def _other_kind(head: bytes) -> str | None:
    """Return an error message if the first bytes show that the file is not UTF-8 text, else None."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "is encoded as UTF-16. Save the file as UTF-8"
    for magic, ending in _MAGIC.items():
        if head.startswith(magic):
            return f"has {ending} content. Add that extension to its name"
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
    """Add the file and row to decompression errors, which can occur at any row."""
    import zlib

    number = 0
    try:
        for number, value in rows:
            yield number, value
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{uri}:{number + 1}: the file is corrupt or truncated here ({error}). Write or upload the file again."
        ) from error


def _read_jsonl(stream: io.BufferedReader, uri: str) -> Iterator[tuple[int, Any]]:
    if _is_array(stream):
        yield from _read_json(stream, uri)
        return
    for number, line in _lines(stream):
        if isinstance(line, RowError) or not line.isspace():
            yield number, line


def _is_array(stream: io.BufferedReader) -> bool:
    """Return whether a stream has an array under the name of JSON Lines."""
    return stream.peek(_HEAD_BYTES).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"[")


def _lines(stream: io.BufferedReader, end: int | None = None) -> Iterator[tuple[int, bytes | RowError]]:
    """Yield (number from 1, line) of the lines that start before `end`; a RowError for a line that is too long."""
    number = 0
    while (end is None or stream.tell() < end) and (line := stream.readline(MAX_ROW_BYTES + 1)):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            size = len(line)
            while not line.endswith(b"\n") and (line := stream.readline(MAX_ROW_BYTES)):
                size += len(line)
            yield number, _too_large(size)
        else:
            yield number, line


def _too_large(size: int) -> RowError:
    return RowError(
        "too large",
        f"is {size / 1e6:.1f} MB, above the limit of {MAX_ROW_BYTES / 1e6:.0f} MB per row. Split long documents; a JSON array needs the extension .json",
    )


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def _parse_line(line: bytes) -> Any:
    try:
        text = line.decode("utf-8-sig" if line.startswith(codecs.BOM_UTF8) else "utf-8")
        value = _DECODER.decode(text)
    except RowError as error:
        return error
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", f"is not valid UTF-8 (byte {error.start + 1}). Save the file as UTF-8")
    except ValueError as error:
        return RowError("not JSON", f"is not valid JSON ({error}). Write one JSON object per line")
    except RecursionError:
        return RowError("nested too deeply", "is nested too deeply to be a conversation")
    return _checked_object(
        value, "Write one JSON object per line; a file with one JSON array needs the extension .json"
    )


def _checked_object(value: Any, expected: str) -> Any:
    if isinstance(value, dict | RowError):
        return value
    return RowError("no object", f"is {json_type(value)}. {expected}")


def _read_json(stream: io.BufferedReader, uri: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a JSON array, of concatenated objects, or of JSONL with the extension .json."""
    head = stream.peek(1 << 16)
    first_line = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[0]
    if first_line.startswith(b"{") and isinstance(_parse_line(first_line), dict):
        yield from _read_jsonl(stream, uri)
        return
    yield from _read_document(stream, uri)


def _read_document(stream: io.BufferedReader, uri: str) -> Iterator[tuple[int, Any]]:
    text = _Characters(stream, uri)
    text.skip(" \t\r\n")
    in_array = text.take("[")
    number = 0
    while True:
        text.skip(" \t\r\n")
        if text.at_end():
            if in_array:
                raise DataError(
                    f"{uri}:{number + 1}: the JSON array is truncated here. Write or upload the file again."
                )
            return
        if in_array and text.take("]"):
            text.skip(" \t\r\n")
            if not text.at_end():
                raise DataError(
                    f"{uri}:{number + 1}: unexpected content after the end of the JSON array. Write a single array, or JSONL "
                    '(a line with a list of messages is {"messages": [...]}).'
                )
            return
        if in_array and number and not text.take(","):
            raise DataError(
                f"{uri}:{number + 1}: is not valid JSON (missing comma or closing bracket before this value). Fix the file or write it again."
            )
        text.skip(" \t\r\n")
        number += 1
        yield number, _checked_object(text.value(_DECODER, number), "Write an array of JSON objects")


class _Characters:
    """A window over a long text that grows to the length of one JSON value."""

    def __init__(self, stream: io.BufferedReader, uri: str):
        self._stream = stream
        self._uri = uri
        # Invalid UTF-8 becomes lone surrogates, which the row check reports.
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
        fault: RowError | None = None
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._position)
            except RowError as error:  # a key that stands twice: only the end of the value is needed now
                decoder, fault = json.JSONDecoder(), error
                continue
            except ValueError as error:
                if len(self._text) - self._position > MAX_ROW_BYTES:
                    raise DataError(
                        f"{self._uri}:{number}: no complete JSON value within {MAX_ROW_BYTES / 1e6:.0f} MB ({error}). Shorten or remove the row. "
                        "In a JSONL file, bad_rows: skip can exclude it."
                    ) from error
                if not self._grow():
                    raise DataError(
                        f"{self._uri}:{number}: is not valid JSON ({error}). Fix the file or write it again."
                    ) from error
                continue
            except RecursionError as error:
                raise DataError(
                    f"{self._uri}:{number}: is nested too deeply to be a conversation. Fix or remove this row."
                ) from error
            if end == len(self._text) and self._grow():
                continue  # a number may continue after the end of the window
            size, self._position = end - self._position, end
            return _too_large(size) if size > MAX_ROW_BYTES else fault or value


def _read_table(stream: io.BufferedReader, uri: str, separator: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as lines:
        reader = csv.reader(_bounded(lines, uri), delimiter=separator, strict=True)
        yield from _table_records(reader, uri, separator)


def _bounded(lines: io.TextIOWrapper, uri: str) -> Iterator[str]:
    number = 0
    while line := lines.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(
                f"{uri}:{number}: no line end within {MAX_ROW_BYTES / 1e6:.0f} MB. Shorten or remove the row. "
                "In a JSONL file, bad_rows: skip can exclude it."
            )
        yield line


def _table_records(reader: Any, uri: str, separator: str) -> Iterator[tuple[int, Any]]:
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # After an unclosed quote, later rows cannot be separated from the quoted text.
            raise DataError(
                f"{uri}:{line}: is not valid {_TABLES[separator]} ({error}). Fix the file or write it again."
            ) from error
        if header is None:
            header = cells
            repeated = sorted({name for name in cells if cells.count(name) > 1})
            if repeated:
                raise DataError(
                    f"{uri}:{line}: the header repeats {', '.join(map(repr, repeated))}. Give each column a unique name."
                )
            others = [
                other
                for other in (",", ";", "\t", "|")
                if len(cells) == 1 and other != separator and other in cells[0]
            ]
            if others:
                raise DataError(
                    f"{uri}:{line}: the header is a single column that contains {others[0]!r}, but cells of {_TABLES[separator]} are "
                    f"separated by {separator!r}. Give a tab-separated file the extension .tsv, or convert the file to CSV, Parquet or JSONL."
                )
        elif not cells:
            continue
        elif len(cells) != len(header):
            yield (
                line,
                RowError(
                    "wrong cells", f"has {len(cells)} cells, but the header names {len(header)} columns"
                ),
            )
        else:
            yield line, dict(zip(header, cells, strict=True))


def _open_parquet(source: Path | io.BufferedReader, uri: str, piece: Piece | None) -> OpenFile:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source, memory_map=True)
    except _read_errors() as error:
        raise _file_error(uri, "a Parquet file", error) from error
    groups, read = _row_groups(file, piece)

    def batches() -> Iterator[tuple[int, StoredBatch]]:
        nonlocal read
        try:
            with file:
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=groups):
                    read += len(batch)
                    yield read - len(batch) + 1, StoredBatch(uri, batch)
        except _read_errors() as error:
            raise _file_error(f"{uri}:{read + 1}", "a Parquet file", error) from error

    return OpenFile(batches(), lambda: read / max(file.metadata.num_rows, 1))


def _row_groups(file: "pq.ParquetFile", piece: Piece | None) -> tuple[list[int], int]:
    """Return the row groups that start in a piece, and the number of rows before them."""
    every = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    if piece is None or piece.end is None:
        return [*range(len(every))], 0
    # The first page may be a dictionary; files of one writer have no other offset.
    starts = [group.column(0).dictionary_page_offset or group.column(0).data_page_offset for group in every]
    groups = [number for number, start in enumerate(starts) if piece.begin <= start < piece.end]
    return groups, sum(group.num_rows for group in every[: groups[0]]) if groups else 0


def _read_errors() -> tuple[type[Exception], ...]:
    """Return the errors of reading a corrupt file; names, dates and sizes raise built-in errors."""
    import pyarrow as pa

    return pa.ArrowException, OSError, ValueError, OverflowError, MemoryError


def _open_arrow(path: Path, uri: str) -> OpenFile:
    """Open a file of `Dataset.save_to_disk`: a stream of Arrow batches."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise _file_error(
            uri, "a stream of Arrow batches, as Dataset.save_to_disk writes it", error
        ) from error
    read = 0

    def batches() -> Iterator[tuple[int, StoredBatch]]:
        nonlocal read
        for batch in table.to_batches(max_chunksize=_PARQUET_ROWS):
            read += len(batch)
            yield read - len(batch) + 1, StoredBatch(uri, batch)

    return OpenFile(batches(), lambda: read / max(len(table), 1))


def _file_error(place: str, kind: str, error: Exception) -> DataError:
    return DataError(
        f"{place}: not {kind}, or corrupt ({(str(error).splitlines() or [''])[0]}). Write or upload the file again."
    )


def _open_hub(file: DataFile, cache: Path) -> OpenFile:
    import datasets
    from huggingface_hub import constants

    if (files := text_files(file.uri, file.version, cache)) is not None:
        return _open_hub_texts(file.uri, files)
    name, config, split = parse_hub_uri(file.uri)
    revision = None if constants.HF_HUB_OFFLINE else file.version
    with hub_errors(file.uri):
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    names = {
        column: feature.names
        for column, feature in dataset.features.items()  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        if isinstance(feature, datasets.ClassLabel)
    }
    read = 0

    def rows() -> Iterator[tuple[int, Any]]:
        nonlocal read
        for row in dataset:
            read += 1
            yield read, with_names(row, names)  # pyright: ignore[reportArgumentType]

    return OpenFile(rows(), lambda: read / max(len(dataset), 1))  # pyright: ignore[reportArgumentType]


def _open_hub_texts(uri: str, files: Mapping[str, list[Path]]) -> OpenFile:
    """Open the JSON, CSV or TSV files of a dataset on the Hub; rows are numbered from the start of the URI's split."""
    fraction = 0.0

    def rows_of(split: str) -> Iterator[Any]:
        nonlocal fraction
        for number, path in enumerate(files[split]):
            name = f"{uri} ({path.name})"
            opened = _open_text(path.open("rb"), path.stat().st_size, name, *_kind_of(path.name))
            for _, value in opened.stored:
                fraction = (number + opened.fraction()) / len(files[split])
                yield value

    def rows() -> Iterator[tuple[int, Any]]:
        read = 0
        split = parse_hub_uri(uri)[2]
        parts: list[tuple[str, int, int | None]] = [(split, 0, None)]
        if split not in files:
            counts = {each: sum(1 for _ in rows_of(each)) for each in files}
            with hub_errors(uri):
                parts = [*parts_of(split, counts)]
        for each, begin, end in parts:
            for value in islice(rows_of(each), begin, end):
                read += 1
                yield read, value

    return OpenFile(rows(), lambda: fraction)

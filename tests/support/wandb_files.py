"""Offline files of Weights & Biases."""

import struct
import time
from pathlib import Path
from typing import Any

_BLOCK_BYTES, _HEADER_BYTES = 32_768, 7
_FULL, _LAST = 1, 4


def wandb_records(path: Path) -> list[Any]:
    """Return the records of an offline W&B run. W&B's service may still be writing the file after the run has finished."""
    deadline = time.monotonic() + 120
    records = read_wandb_file(path)
    while not any(record.WhichOneof("record_type") == "exit" for record in records):
        assert time.monotonic() < deadline, f"no exit record in {path}: {records}"
        time.sleep(0.1)
        records = read_wandb_file(path)
    return records


def read_wandb_file(path: Path) -> list[Any]:
    """Return the records of a W&B file: LevelDB's log format, in which records are split at the ends of blocks of 32 KiB.

    The first block begins with a W&B header, which is as long as that of a part.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, offset, part, records = path.read_bytes(), _HEADER_BYTES, b"", []
    while offset + _HEADER_BYTES <= len(content):
        if (
            _BLOCK_BYTES - offset % _BLOCK_BYTES < _HEADER_BYTES
        ):  # no part begins so close to the end of a block
            offset += _BLOCK_BYTES - offset % _BLOCK_BYTES
            continue
        _, length, kind = struct.unpack_from("<IHB", content, offset)
        offset += _HEADER_BYTES + length
        part += content[offset - length : offset]
        if kind in (_FULL, _LAST):
            records.append(Record.FromString(part))
            part = b""
    return records


def history_of(records: list[Any]) -> list[dict[str, str]]:
    """Return the logged metrics as JSON values by name."""
    return [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]

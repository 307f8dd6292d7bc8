"""Random data files with damaged rows or bytes, each determined by its number."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_WORDS = ["2 + 2?", "4", "naïve", "🍎 é", "مرحبا", "a\u0301", " ", "\n", "<|im_end|>", "\u200b", "x" * 300]
_HUGE = [10**400, -(10**30), 1e308, float("nan"), float("inf"), 2**64, 0.1]
_SHAPES = 9  # of valid rows
_ODD_TEXT = [
    "",
    "   ",
    "\x00",
    "\ud800",
    "\udcff\udc00",
    "a\x00b",
    "\ufeff",
    "\\",
    '"',
    "[{",
    '{"a": 1}',
    "null",
]


def write_bad_file(directory: Path, number: int) -> Path:
    """Write file `number` with a few valid rows, then damage rows, bytes or both; return its path."""
    rng = random.Random(number)
    shape = rng.randrange(_SHAPES)
    rows: list[Any] = [_valid_row(rng, shape) for _ in range(rng.randint(1, 6))]
    if rng.random() < 0.1:
        rows.append(_valid_row(rng, rng.randrange(_SHAPES)))
    for _ in range(rng.randint(0, 3)):
        rows[rng.randrange(len(rows))] = _damaged_row(rng, rng.choice(rows))
    suffix, write = rng.choice(_FORMATS)
    content = write(rng, rows)
    if rng.random() < 0.5:
        content = rng.choice(_CORRUPTIONS)(rng, content)
    compression = rng.choice(["", "", "", ".gz", ".zst"])
    if compression == ".gz":
        content = gzip.compress(content, mtime=0)
    elif compression == ".zst":
        content = pa.Codec("zstd").compress(content, asbytes=True)
    if compression and rng.random() < 0.5:
        content = rng.choice(_CORRUPTIONS)(rng, content)
    path = directory / f"{number}{suffix}{compression}"
    path.write_bytes(content)
    return path


def _text(rng: random.Random) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(1, 4)))


def _turns(rng: random.Random) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 3)):
        turns.append({"role": "user", "content": _text(rng)})
        turns.append({"role": "assistant", "content": _text(rng)})
    return turns


def _valid_row(rng: random.Random, shape: int) -> dict[str, Any]:
    turns = _turns(rng)
    shapes: list[dict[str, Any]] = [
        {"messages": turns},
        {"messages": [{"role": "system", "content": "Be brief."}, *turns]},
        {"messages": [*turns[:-1], {**turns[-1], "weight": rng.choice([0, 1])}]},
        {
            "conversations": [
                {
                    "from": {"user": "human", "assistant": "gpt"}[turn["role"]],
                    "value": turn["content"],
                }
                for turn in turns
            ]
        },
        {"prompt": _text(rng), "completion": _text(rng)},
        {"instruction": _text(rng), "input": "", "output": _text(rng)},
        {"text": _text(rng)},
        {"prompt": _text(rng), "chosen": _text(rng), "rejected": _text(rng)},
        {"text": _text(rng), "label": rng.choice(["4", "naïve"])},
    ]
    assert len(shapes) == _SHAPES
    return shapes[shape]


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def _odd_value(rng: random.Random) -> Any:
    return rng.choice(
        [
            lambda: None,
            lambda: rng.choice(_ODD_TEXT),
            lambda: rng.choice(_HUGE),
            lambda: rng.choice([True, False, 0, -1]),
            lambda: [],
            lambda: {},
            lambda: _nested(200),
            lambda: [None],
            lambda: {"role": "user"},
            lambda: [{"role": "assistant", "tool_calls": rng.choice([[{}], "[", {"a": 1}, [None]])}],
            lambda: "y" * 20_000,
        ]
    )()


def _damaged_row(rng: random.Random, row: Any) -> Any:
    """Return a copy of a row with one key or value removed, renamed or replaced, or a value that is no row."""
    if rng.random() < 0.15 or not isinstance(row, dict) or not row:
        return _odd_value(rng)
    copy = json.loads(json.dumps(row))
    container: Any = copy
    while True:
        key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        child = container[key]
        if isinstance(child, dict | list) and child and rng.random() < 0.8:
            container = child
            continue
        match rng.randrange(4):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[f"{key}_"] = container.pop(key)
            case _:
                container[key] = _odd_value(rng)
        return copy


def _jsonl(rng: random.Random, rows: list[Any]) -> bytes:
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
    if rng.random() < 0.1:
        lines.insert(0, '{"messages": ' + "[" * 1000)
    if rng.random() < 0.05:
        lines.append('{"prompt": ' + "[" * 100_000)
    line_ends = [rng.choice(["\n", "\r\n", "\n\n", "\r"] if rng.random() < 0.3 else ["\n"]) for _ in lines]
    return "".join(line + end for line, end in zip(lines, line_ends, strict=True)).encode(
        "utf-8", "surrogatepass"
    )


def _json(rng: random.Random, rows: list[Any]) -> bytes:
    document = rows if rng.random() < 0.8 else {"data": rows}
    text = json.dumps(document, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _csv(rng: random.Random, rows: list[Any]) -> bytes:
    objects = [row for row in rows if isinstance(row, dict)] or [{"prompt": "a", "completion": "b"}]
    names = list(objects[0])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=rng.choice(["\n", "\r\n", "\r"]))
    writer.writerow(names)
    for row in objects:
        cells = [row.get(name) for name in names]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return text.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rng: random.Random, rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    objects = [row for row in rows if isinstance(row, dict)] or [{"prompt": "a"}]
    columns = {
        name: [value if isinstance(value := row.get(name), str) else json.dumps(value) for row in objects]
        for name in objects[0]
    } or {"prompt": ["a"]}
    encodable = {
        name: [text.encode("utf-8", "replace").decode() for text in texts] for name, texts in columns.items()
    }
    pq.write_table(pa.table(encodable), sink)
    return sink.getvalue()


_FORMATS: list[tuple[str, Callable[[random.Random, list[Any]], bytes]]] = [
    (".jsonl", _jsonl),
    (".jsonl", _jsonl),
    (".json", _json),
    (".json", _jsonl),
    (".csv", _csv),
    (".parquet", _parquet),
    ("", _jsonl),
]


def _truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randint(0, len(content))]


def _change_bytes(rng: random.Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 8) if damaged else 0):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def _insert(rng: random.Random, content: bytes) -> bytes:
    position = rng.randint(0, len(content))
    inserted = rng.choice(
        [
            b"\x00",
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"\xed\xa0\x80",
            b'"',
            b"{",
            b"]",
            b"\n",
            b"\r",
            b"9" * 5000,
            b"," * 50,
        ]
    )
    return content[:position] + inserted + content[position:]


def _encode_as_utf_16(rng: random.Random, content: bytes) -> bytes:
    return content.decode("utf-8", "replace").encode("utf-16")


_CORRUPTIONS: list[Callable[[random.Random, bytes], bytes]] = [
    _truncate,
    _change_bytes,
    _insert,
    _encode_as_utf_16,
]

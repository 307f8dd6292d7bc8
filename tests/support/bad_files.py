"""Files of rows that are wrong in some way: the same for the same number, made by chance otherwise."""

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
_SHAPES = 9  # of good rows
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
    """Make file `number`: up to six rows, some good, then some damage to rows, to bytes, or to both."""
    chance = random.Random(number)
    shape = chance.randrange(_SHAPES)
    rows: list[Any] = [_good_row(chance, shape) for _ in range(chance.randint(1, 6))]
    if chance.random() < 0.1:
        rows.append(_good_row(chance, chance.randrange(_SHAPES)))
    for _ in range(chance.randint(0, 3)):
        rows[chance.randrange(len(rows))] = _damaged(chance, chance.choice(rows))
    ending, write = chance.choice(_KINDS)
    content = write(chance, rows)
    if chance.random() < 0.5:
        content = chance.choice(_DAMAGES)(chance, content)
    compression = chance.choice(["", "", "", ".gz", ".zst"])
    if compression == ".gz":
        content = gzip.compress(content, mtime=0)
    elif compression == ".zst":
        content = pa.Codec("zstd").compress(content, asbytes=True)
    if compression and chance.random() < 0.5:
        content = chance.choice(_DAMAGES)(chance, content)
    path = directory / f"{number}{ending}{compression}"
    path.write_bytes(content)
    return path


def _text(chance: random.Random) -> str:
    return " ".join(chance.choices(_WORDS, k=chance.randint(1, 4)))


def _turns(chance: random.Random) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for _ in range(chance.randint(1, 3)):
        turns.append({"role": "user", "content": _text(chance)})
        turns.append({"role": "assistant", "content": _text(chance)})
    return turns


def _good_row(chance: random.Random, shape: int) -> dict[str, Any]:
    turns = _turns(chance)
    shapes: list[dict[str, Any]] = [
        {"messages": turns},
        {"messages": [{"role": "system", "content": "Be brief."}, *turns]},
        {"messages": [*turns[:-1], {**turns[-1], "weight": chance.choice([0, 1])}]},
        {
            "conversations": [
                {
                    "from": {"user": "human", "assistant": "gpt"}[turn["role"]],
                    "value": turn["content"],
                }
                for turn in turns
            ]
        },
        {"prompt": _text(chance), "completion": _text(chance)},
        {"instruction": _text(chance), "input": "", "output": _text(chance)},
        {"text": _text(chance)},
        {"prompt": _text(chance), "chosen": _text(chance), "rejected": _text(chance)},
        {"text": _text(chance), "label": chance.choice(["4", "naïve"])},
    ]
    assert len(shapes) == _SHAPES
    return shapes[shape]


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def _odd_value(chance: random.Random) -> Any:
    return chance.choice(
        [
            lambda: None,
            lambda: chance.choice(_ODD_TEXT),
            lambda: chance.choice(_HUGE),
            lambda: chance.choice([True, False, 0, -1]),
            lambda: [],
            lambda: {},
            lambda: _nested(200),
            lambda: [None],
            lambda: {"role": "user"},
            lambda: [{"role": "assistant", "tool_calls": chance.choice([[{}], "[", {"a": 1}, [None]])}],
            lambda: "y" * 20_000,
        ]
    )()


def _damaged(chance: random.Random, row: Any) -> Any:
    """A copy with one value, somewhere, that does not belong there; or no object at all."""
    if chance.random() < 0.15 or not isinstance(row, dict) or not row:
        return _odd_value(chance)
    copy = json.loads(json.dumps(row))
    place: Any = copy
    while True:
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        below = place[key]
        if isinstance(below, dict | list) and below and chance.random() < 0.8:
            place = below
            continue
        match chance.randrange(4):
            case 0:
                del place[key]
            case 1 if isinstance(place, dict):
                place[f"{key}_"] = place.pop(key)
            case _:
                place[key] = _odd_value(chance)
        return copy


def _jsonl(chance: random.Random, rows: list[Any]) -> bytes:
    lines = [json.dumps(row, ensure_ascii=chance.random() < 0.5) for row in rows]
    if chance.random() < 0.1:
        lines.insert(0, '{"messages": ' + "[" * 1000)
    if chance.random() < 0.05:
        lines.append('{"prompt": ' + "[" * 100_000)
    ends = [chance.choice(["\n", "\r\n", "\n\n", "\r"] if chance.random() < 0.3 else ["\n"]) for _ in lines]
    return "".join(line + end for line, end in zip(lines, ends, strict=True)).encode("utf-8", "surrogatepass")


def _json(chance: random.Random, rows: list[Any]) -> bytes:
    document = rows if chance.random() < 0.8 else {"data": rows}
    text = json.dumps(document, indent=chance.choice([None, 1]), ensure_ascii=chance.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _csv(chance: random.Random, rows: list[Any]) -> bytes:
    objects = [row for row in rows if isinstance(row, dict)] or [{"prompt": "a", "completion": "b"}]
    names = list(objects[0])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=chance.choice(["\n", "\r\n", "\r"]))
    writer.writerow(names)
    for row in objects:
        cells = [row.get(name) for name in names]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return text.getvalue().encode("utf-8", "surrogatepass")


def _parquet(chance: random.Random, rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    objects = [row for row in rows if isinstance(row, dict)] or [{"prompt": "a"}]
    columns = {
        name: [value if isinstance(value := row.get(name), str) else json.dumps(value) for row in objects]
        for name in objects[0]
    } or {"prompt": ["a"]}
    clean = {
        name: [text.encode("utf-8", "replace").decode() for text in texts] for name, texts in columns.items()
    }
    pq.write_table(pa.table(clean), sink)
    return sink.getvalue()


_KINDS: list[tuple[str, Callable[[random.Random, list[Any]], bytes]]] = [
    (".jsonl", _jsonl),
    (".jsonl", _jsonl),
    (".json", _json),
    (".json", _jsonl),
    (".csv", _csv),
    (".parquet", _parquet),
    ("", _jsonl),
]


def _cut_off(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randint(0, len(content))]


def _flip(chance: random.Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 8) if damaged else 0):
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    return bytes(damaged)


def _insert(chance: random.Random, content: bytes) -> bytes:
    at = chance.randint(0, len(content))
    piece = chance.choice(
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
    return content[:at] + piece + content[at:]


def _in_utf_16(chance: random.Random, content: bytes) -> bytes:
    return content.decode("utf-8", "replace").encode("utf-16")


_DAMAGES: list[Callable[[random.Random, bytes], bytes]] = [_cut_off, _flip, _insert, _in_utf_16]

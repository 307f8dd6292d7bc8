"""Columns of Arrow's JSON type, in which `datasets` stores values of mixed types as JSON texts."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from training.data.class_names import class_names, with_names
from training.data.errors import RowError

_Decoder = Callable[[Any], Any]


def rows_of_batch(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | RowError]:
    """Yield the rows of a batch, with JSON columns as the values that they hold, and numbers of classes with their names."""
    names = class_names(batch.schema.metadata)
    decoders = {
        field.name: decoder for field in batch.schema if (decoder := _decoder(field.type)) is not None
    }
    for row in batch.to_pylist():
        if names:
            row = with_names(row, names)
        yield _decoded(row, decoders) if decoders else row


def _decoded(row: dict[str, Any], decoders: dict[str, _Decoder]) -> dict[str, Any] | RowError:
    for name, decode in decoders.items():
        try:
            row[name] = decode(row[name])
        except ValueError as error:
            return RowError(
                "not JSON",
                f"`{name}` has the type JSON, but is not valid JSON ({error}). Write the file again",
            )
    return row


def _decoder(kind: pa.DataType) -> _Decoder | None:
    """Return a function that decodes the JSON inside a value of a type, or None if there is none."""
    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_struct(kind):
        inside = {field.name: decoder for field in kind if (decoder := _decoder(field.type)) is not None}
        return (
            (
                lambda value: (
                    value and {key: inside[key](v) if key in inside else v for key, v in value.items()}
                )
            )
            if inside
            else None
        )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        entry = _decoder(kind.value_type)
        return (lambda value: value and [entry(each) for each in value]) if entry else None
    return None

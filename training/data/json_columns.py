"""Columns of Arrow's types JSON, in which `datasets` stores values of mixed types as texts, and map, to which Spark converts dictionaries."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from training.data.class_names import class_names, with_names
from training.data.errors import RowError, unique_keys

_Decoder = Callable[[Any], Any]


def rows_of_batch(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | RowError]:
    """Yield the rows of a batch, with the values that JSON columns hold, maps as dictionaries, and numbers of classes with their names."""
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
        except RowError as error:
            return error  # of a map
        except ValueError as error:
            return RowError(
                "not JSON",
                f"`{name}` has the type JSON, but is not valid JSON ({error}). Write the file again",
            )
    return row


def _decoder(kind: pa.DataType) -> _Decoder | None:
    """Return a function that decodes the JSON and the maps inside a value of a type, or None if there are none."""
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
    if pa.types.is_map(kind):
        entry = _decoder(kind.item_type)
        return lambda value: (
            None
            if value is None
            else unique_keys([(key, entry(each) if entry else each) for key, each in value])
        )
    return None

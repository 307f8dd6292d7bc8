"""Numbers of classes (`datasets.ClassLabel`), whose names are in the description of a dataset."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


class ClassNumber(int):
    """A number of a class, with its name."""

    name: str


def class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return column -> names of its classes, from the metadata that `datasets` writes into Arrow and Parquet files."""
    description = (metadata or {}).get(b"huggingface", b"")
    if b'"ClassLabel"' not in description:
        return {}
    features = json.loads(description).get("info", {}).get("features", {})
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def with_names(row: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Replace the class ids of a row by ClassNumbers, which carry their names; -1 means no class."""
    for column, known in names.items():
        number = row.get(column)
        if isinstance(number, int) and 0 <= number < len(known):
            row[column] = ClassNumber(number)
            row[column].name = known[number]
    return row

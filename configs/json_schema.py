"""Write the JSON schema, with which editors complete and check YAMLs, and the pages of keys (keys.md, other_keys.md).

make schema
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.other_tools import NOT_NEEDED, TABLE, TOOL_NAMES, tools_of
from configs.schema import FinetuneConfig

SCHEMA_FILE = Path(__file__).parent / "schema.json"
KEYS_FILE = Path(__file__).parent / "keys.md"
OTHER_KEYS_FILE = Path(__file__).parent / "other_keys.md"


def json_schema() -> str:
    """Return the JSON schema (draft 2020-12) of a YAML as text. It excludes deprecated keys, which still load."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **FinetuneConfig.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def keys_page() -> str:
    """Return a Markdown page with every key, its values, default and meaning."""
    schema = FinetuneConfig.model_json_schema()
    lines = [
        "# Keys of the YAML",
        "",
        "Generated from `configs/schema.py` by `make schema`.",
        "",
        *_table(schema),
    ]
    for name, section in schema["$defs"].items():
        lines += ["", f"## {name}", "", *_table(section)]
    return "\n".join(lines) + "\n"


def other_keys_page() -> str:
    """Return a Markdown page with the keys of other tools and what replaces them."""
    lines = [
        "# Keys of other tools",
        "",
        "Generated from `configs/other_tools.py` by `make schema`. `main.py convert OTHER.yaml` translates a file with this table.",
        "A key that is not listed and has the same name here means the same.",
    ]
    for tool, name in TOOL_NAMES.items():
        lines += ["", f"## {name}", "", "| key | here | what differs |", "|---|---|---|"]
        for row in TABLE:
            if tool in tools_of(row):
                ours = f"`{row.ours}`" if row.ours else "no counterpart" if row.differs else "not needed"
                lines.append(f"| `{row.theirs}` | {ours} | {row.note} |")
    lines += ["", "## Not needed", "", "| keys | because |", "|---|---|"]
    lines += [
        f"| {', '.join(f'`{key}`' for key in keys.split())} | {reason} |"
        for reason, keys in NOT_NEEDED.items()
    ]
    return "\n".join(lines) + "\n"


def _table(schema: Mapping[str, Any]) -> Iterator[str]:
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in schema["properties"].items():
        default = "required" if key in schema.get("required", ()) else f"`{json.dumps(field.get('default'))}`"
        cells = (f"`{key}`", _values(field), default, " ".join(field.get("description", "").split()))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _values(field: Mapping[str, Any]) -> str:
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        section = field["$ref"].rpartition("/")[2]
        return f"[{section}](#{section.lower()})"
    alternatives = field.get("anyOf") or field.get("oneOf")
    if alternatives:
        return " or ".join(dict.fromkeys(map(_values, alternatives)))
    match field.get("type"):
        case "array":
            return f"list of {_values(field['items'])}"
        case "object" if "patternProperties" in field:
            return f"mapping to {' or '.join(map(_values, field['patternProperties'].values()))}"
        case "object" if isinstance(field["additionalProperties"], Mapping):
            return f"mapping to {_values(field['additionalProperties'])}"
        case "object":
            return "mapping"
        case kind:
            return str(kind)


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json_schema(), "utf-8")
    KEYS_FILE.write_text(keys_page(), "utf-8")
    OTHER_KEYS_FILE.write_text(other_keys_page(), "utf-8")

"""schema.json: what editors complete and check YAMLs by, made from FinetuneConfig.

make schema
"""

import json
from pathlib import Path

from configs.schema import FinetuneConfig

SCHEMA_FILE = Path(__file__).parent / "schema.json"


def json_schema() -> str:
    """The JSON schema (draft 2020-12) of a YAML, as text. Deprecated spellings, which load as well, are not in it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **FinetuneConfig.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json_schema(), "utf-8")

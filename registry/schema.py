"""The manifest's JSON schema, as ``docs/manifest.schema.json`` publishes it: ``python -m registry.schema > FILE``."""

from __future__ import annotations

import json
import sys

from registry.manifest import SCHEMA, Manifest


def schema() -> str:
    """Return the JSON schema of a manifest, laid out for reading.

    It says less than `Manifest.parse` asks for: not the canonical form, nor that cited evidence is among the files.
    """
    document = Manifest.model_json_schema(by_alias=True)
    top = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:{SCHEMA.replace('/', ':')}"}
    return json.dumps(top | document, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema())

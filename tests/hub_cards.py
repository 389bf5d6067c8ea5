"""What the Hugging Face hub documents of a model card's metadata, as a check that needs no hub.

The hub's own check (``/api/validate-yaml``) is not published: what it refuses beyond its documentation is not known.
"""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema_rs
import yaml

_SCHEMA = Path(__file__).parent / "data" / "hub_card.schema.json"


def problems(card: str) -> list[str]:
    """What is wrong with a model card's metadata."""
    begin, metadata, _ = card.split("---\n", 2)
    assert begin == ""
    validator = jsonschema_rs.validator_for(json.loads(_SCHEMA.read_text()))
    return [error.message for error in validator.iter_errors(yaml.safe_load(metadata))]

"""Which backend quantizes which family, as `preflight` answers for two-layer models of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fields import cell, page, row

from pipeline.compatibility import backends, preflight
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.compatibility.scheme import Scheme

_FAMILIES = Path(__file__).resolve().parents[2] / "tests" / "data" / "model_families.json"


def families() -> str:
    """A table of families and schemes, and below it every message of a refusal."""
    described = json.loads(_FAMILIES.read_text(encoding="utf-8"))
    schemes = [_scheme(method, each) for method, named in backends.METHODS.items() for each in named]
    table = [row("family", *(f"`{scheme.method}` by `{scheme.backend}`" for scheme in schemes))]
    table.append("|---" * (len(schemes) + 1) + "|")
    messages: dict[str, int] = {}
    for name, family in described["families"].items():
        problems = [preflight.find_problems(_model(family), scheme) for scheme in schemes]
        numbers = [messages.setdefault(cell("; ".join(found)), len(messages) + 1) if found else 0 for found in problems]
        table.append(row(name.replace("_", "\\_"), *(f"refused ({number})" if number else "yes" for number in numbers)))
    intro = (
        "What `slipway plan` and the first second of `slipway release` answer, for two-layer models as transformers "
        f"{described['transformers']} makes them, with groups of 32 where the method has them. AutoGPTQ runs on a GPU "
        "alone. Which of these answers were put to the test is in "
        "[what is checked in a checkpoint](../explanation/checkpoints.md#model-families)."
    )
    listed = "\n".join(f"{number}. {message}" for message, number in messages.items())
    return page("Model families", intro, ["\n".join(table), "## Messages\n\n" + listed])


def _scheme(method: str, backend: str) -> Scheme:
    sized = {"group_size": 32} if 32 in backends.GROUP_SIZES[method] else {}
    return Scheme.model_validate({"method": method, "backend": backend, **sized})


def _model(family: dict[str, Any]) -> ModelDescription:
    tensors = {
        name: Tensor(dtype, tuple(shape), 0, 0, _FAMILIES) for name, (dtype, *shape) in family["tensors"].items()
    }
    return ModelDescription(family["config"], tensors)


PAGES = {"reference/model-families.md": families}

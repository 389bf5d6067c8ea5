"""The files that people and the stages write: their keys as tables, and as JSON schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from fields import Schema, described, one_line, page, table
from pydantic import BaseModel

from containers.gateway import config as gateway
from containers.image.build import ImageRecord
from containers.kubernetes.cluster import Cluster
from containers.scan.evidence import ScanEvidence
from evals.drift.mixture import Mixture
from evals.drift.pairs import Drift
from evals.drift.suite import load_suite, suite_names
from evals.load.evidence import LoadEvidence
from evals.load.traffic import profile as traffic
from pipeline.spec import ModelSpec
from pipeline.workers.launchers import placement
from registry import schema as manifest_schema
from registry.attestation import Verdicts
from registry.manifest import Manifest


def schema_of(model: type[BaseModel]) -> Schema:
    """Return a file's JSON schema, each key with its meaning."""
    schema = described(model.model_json_schema(), {each.__name__: each for each in sections(model)})
    for each in sections(model):
        properties = (schema if each is model else schema["$defs"][each.__name__])["properties"]
        for key, field in each.model_fields.items():
            name = field.alias or key
            default = field.get_default(call_default_factory=True)
            if isinstance(default, BaseModel):  # its section says what it is
                properties[name].pop("default", None)
            elif field.default_factory is not None or isinstance(default, frozenset):
                properties[name]["default"] = _plain(default)
    schema["title"] = model.__name__
    return schema


def _plain(default: Any) -> Any:  # noqa: ANN401 - any value of a field
    """A default as a file would hold it."""
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json", exclude_unset=True)
    if isinstance(default, Mapping):
        return {key: _plain(value) for key, value in default.items()}
    return sorted(default) if isinstance(default, frozenset) else default


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    """Return a model and every model that its fields hold."""
    found = {model}

    def look(annotation: Any) -> None:  # noqa: ANN401 - any annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in found:
            found.add(annotation)
            for field in annotation.model_fields.values():
                look(field.annotation)
        for part in getattr(annotation, "__args__", ()):
            look(part)

    for field in model.model_fields.values():
        look(field.annotation)
    return found


def model_schema() -> str:
    """Return the JSON schema of ``models/*.yaml``, for editors."""
    schema = schema_of(ModelSpec)
    del schema["properties"]["path"]
    schema["required"].remove("path")
    schema["title"] = "A model's file"
    # What is taken beside the form that it becomes: a suite in place of tasks, names of profiles, a fixed length.
    sections = schema["$defs"]
    sections["DriftLimits"]["required"].remove("tasks")
    sections["DriftLimits"]["anyOf"] = [{"required": ["suite"]}, {"required": ["tasks"]}]
    names = {"type": "array", "items": {"enum": traffic.names()}, "minItems": 1}
    profiles = sections["LoadPlan"]["properties"]["profiles"]
    profiles["anyOf"] = [names, {key: profiles.pop(key) for key in ("type", "additionalProperties", "minProperties")}]
    sections["Lengths"]["type"] = ["object", "integer"]
    return _published(schema, "urn:slipway:model")


def _published(schema: Schema, name: str) -> str:
    top = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": name}
    return json.dumps(top | schema, indent=1, ensure_ascii=False) + "\n"


def model_file() -> str:
    """Every key of a model's file."""
    schema = json.loads(model_schema())
    intro = (
        "`models/NAME.yaml` describes one model. A key that is not here is refused by its name. "
        "[`model.schema.json`](../model.schema.json) is the same for editors; see "
        "[how to use it](../how-to/write-a-model-file.md#let-the-editor-check-it)."
    )
    return page("The model file", intro, _tables(schema, "The file"))


def workers_file() -> str:
    """Every key of the file that says where workers run."""
    parts = []
    for model in (placement.Container, placement.Ray, placement.Kubernetes):
        name = model.__name__.lower()
        parts += _tables(schema_of(model), f"`launcher: {name}`")
    intro = (
        "The file that `SLIPWAY_WORKERS` names. See [how to run workers elsewhere](../how-to/run-workers-elsewhere.md)."
    )
    return page("The workers file", intro, parts)


def cluster_file() -> str:
    """Every key of the file that describes a cluster."""
    intro = "The file of `slipway bundle NAME --out DIR --cluster FILE`. Every key may be left out."
    return page("The cluster file", intro, _tables(schema_of(Cluster), "The file"))


def gateway_files() -> str:
    """Every key of the gateway's settings and routes."""
    intro = "Two JSON files: settings, read once, and routes, which may change while the gateway runs."
    parts = [*_tables(schema_of(gateway.GatewaySettings), "Settings"), *_tables(schema_of(gateway.Routes), "Routes")]
    return page("The gateway's files", intro, parts)


# What stages leave, and a release carries in its folder `release/`.
EVIDENCE: Mapping[str, type[BaseModel]] = {
    "manifest": Manifest,
    "drift": Drift,
    "mixture": Mixture,
    "scan": ScanEvidence,
    "load": LoadEvidence,
    "image": ImageRecord,
    "verdicts": Verdicts,
}


def evidence() -> str:
    """The documents that stages leave and a release carries."""
    parts = []
    for name, model in EVIDENCE.items():
        parts += [re.sub(r"(\(#|\{ #)", rf"\g<1>{name}-", part) for part in _tables(schema_of(model), f"`{name}.json`")]
    intro = (
        "The documents that stages leave. `manifest.json` is signed, and names the files of a release. "
        "`verdicts.json` is not a file: it is the predicate of the statement that is attached to a pushed image "
        "([verify with other tools](../how-to/verify-with-other-tools.md)). "
        f"JSON schemas: {', '.join(f'[`{name}`](../{_schema_file(name)})' for name in EVIDENCE)}."
    )
    return page("Evidence", intro, parts)


def _schema_file(name: str) -> str:
    return f"{name}.schema.json" if name == "manifest" else f"schemas/{name}.schema.json"


def suites() -> str:
    """The evaluation suites and traffic profiles that come with Slipway."""
    parts = []
    for name in suite_names():
        suite = load_suite(name)
        parts += [f"## Suite `{name}`", one_line(suite.about)]
        rows = ["| task | tier | limit | items |", "|---|---|---|---|"]
        for name_of_task, task in suite.tasks.items():
            drop, increase = task.max_drop, task.max_increase
            limit = f"bits per byte: {increase:.1%}" if drop is None else f"accuracy: {drop:g}"
            rows.append(f"| `{name_of_task}` | {task.tier} | {limit} | {task.items or task.size or 'all'} |")
        parts.append("\n".join(rows))
    for name in traffic.names():
        profile = traffic.read_profile(name)
        limits = ", ".join(f"`{key}` {value:g}" for key, value in profile.slo.limits().items())
        parts += [f"## Profile `{name}`", one_line(profile.description)]
        parts.append(
            f"{profile.rate:g} requests/s for {profile.seconds:g} s, {profile.arrivals.process} arrivals; "
            f"prompts of {_lengths(profile.input_tokens)}, answers of {_lengths(profile.output_tokens)}. "
            f"Limits: {limits}."
        )
    return page(
        "Suites and traffic profiles", "What comes with Slipway; a model's file names them and may change them.", parts
    )


def _lengths(lengths: traffic.Lengths) -> str:
    spread = f" (p95 {lengths.p95})" if lengths.p95 is not None else ""
    return f"{lengths.median} tokens{spread}"


def _tables(schema: Schema, title: str) -> Iterator[str]:
    """A table for the file, and one for each of its sections, in the order in which they stand in it."""
    yield from _section(schema, f"## {title}")
    seen: set[str] = set()

    def inner(section: Schema, place: str) -> Iterator[str]:
        for key, field in section.get("properties", {}).items():
            for name, beside in _references(field):
                if name not in seen and "properties" in schema["$defs"][name]:
                    seen.add(name)
                    path = f"{place}{key}{beside}"
                    yield from _section(schema["$defs"][name], f"### `{path}` {{ #{name.lower()} }}")
                    yield from inner(schema["$defs"][name], f"{path}.")

    yield from inner(schema, "")


def _references(field: Any, beside: str = "") -> Iterator[tuple[str, str]]:  # noqa: ANN401 - a part of a schema
    """The sections that a field may hold, and what stands behind its key to get there."""
    if isinstance(field, list):
        for each in field:
            yield from _references(each, beside)
    elif isinstance(field, dict):
        if "$ref" in field:
            yield field["$ref"].rpartition("/")[2], beside
        for key, value in field.items():
            deeper = {"additionalProperties": ".NAME", "patternProperties": ".NAME", "items": "[]"}.get(key, "")
            yield from _references(value, beside + deeper)


def _section(section: Schema, heading: str) -> Iterator[str]:
    yield heading
    if section.get("description"):
        yield section["description"]
    yield table(section)


PAGES = {
    "model.schema.json": model_schema,
    "manifest.schema.json": manifest_schema.schema,
    "reference/model-file.md": model_file,
    "reference/workers-file.md": workers_file,
    "reference/cluster-file.md": cluster_file,
    "reference/gateway-files.md": gateway_files,
    "reference/evidence.md": evidence,
    **{
        _schema_file(name): partial(_published, schema_of(model), f"urn:slipway:{name}")
        for name, model in EVIDENCE.items()
        if name != "manifest"
    },
    "reference/suites.md": suites,
}

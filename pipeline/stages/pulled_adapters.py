"""The adapters that the stage `adapters` has pulled, as later stages read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import BaseModel, ConfigDict

from containers.image.serving import ServedAdapter
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs
from pipeline.store.artifacts import Artifact
from registry.digests import digest_json

RECORD = "adapters.json"


class PulledAdapter(BaseModel):
    """An adapter of the artifact: where it came from, and what the engine must know of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    revision: str
    rank: int
    modules: tuple[str, ...]


class PulledAdapters(BaseModel):
    """What ``adapters.json`` holds, beside a folder for each adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapters: Mapping[str, PulledAdapter]


def read_adapters(artifact: Artifact) -> Mapping[str, PulledAdapter]:
    """Return what was pulled, by name."""
    return PulledAdapters.model_validate(artifact.document(RECORD)).adapters


def files_of(artifact: Artifact, name: str) -> dict[str, str]:
    """The sha256 of an adapter's files, by their path in its folder."""
    inside = f"{name}/"
    return {path.removeprefix(inside): one for path, one in artifact.sha256.items() if path.startswith(inside)}


def with_adapters(context: StageContext, inputs: Inputs) -> StageContext:
    """Let a stage that takes the adapters serve the model together with them."""
    if "adapters" not in inputs:
        return context
    artifact = inputs["adapters"]
    found = {
        name: ServedAdapter(digest=digest_json(files_of(artifact, name)), rank=each.rank, modules=each.modules)
        for name, each in read_adapters(artifact).items()
    }
    return replace(context, served_adapters=found)

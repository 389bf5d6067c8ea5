"""What stages note about their artifacts for later stages; no digest covers it."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from containers.hardware.cpu import InstructionSet
from containers.sandbox.kernels import ComputedOn
from registry.manifest import FileRecord, MergedAdapter


class MergedNotes(BaseModel):
    """What `source` was merged from: the base's files, and the adapter."""

    model_config = ConfigDict(frozen=True)

    base: Mapping[str, FileRecord]
    adapter: MergedAdapter


class SourceNotes(BaseModel):
    """Of `source`: the revision that a release records (`pipeline.sources.source.revision_of`).

    It is the base's where an adapter was merged into it; ``merged`` has both.
    """

    model_config = ConfigDict(frozen=True)

    revision: str
    merged: MergedNotes | None = None


class AnswersNotes(BaseModel):
    """Of `answers`: what computed them, and the fraction of the suite that was asked.

    ``unsupported`` says why nothing was asked: this machine can't serve the configuration.
    """

    model_config = ConfigDict(frozen=True)

    instruction_set: InstructionSet | None = None
    computed_on: ComputedOn | None = None
    fraction: float = 1.0
    unsupported: str | None = None

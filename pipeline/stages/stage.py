"""What a stage of a release is: what determines its artifact, how it is made, and the gate that judges it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from registry.verdict import Verdict

Inputs = Mapping[str, Artifact]
"""Artifacts by the name of the stage that made them."""


@dataclass(frozen=True)
class Gate:
    """Judges a stage's artifact. ``evidence`` are the files of the artifact that the verdict rests on."""

    question: str
    judge: Callable[[Artifact, StageContext], Verdict]
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One stage.

    ``recipe`` is a pure function: it writes nothing and asks no network, engine or registry. What it needs from there,
    ``prepare`` looks up before and puts into the context. ``make`` fills the artifact where the store does not have it.
    """

    name: str
    description: str
    inputs: tuple[str, ...]
    """The stages whose artifacts it takes."""
    recipe: Callable[[StageContext, Inputs], Recipe]
    make: Callable[[StageContext, Inputs, ArtifactDraft], None]
    gate: Gate | None = None
    device: bool = False
    """Whether it runs a model, and so takes turns with others that do."""
    tool: str = "python"
    """The program that does the work; Dagster's UI shows its icon."""
    waits_for: tuple[str, ...] = ()
    """Stages that must have passed, though their artifacts are not taken."""
    prepare: Callable[[StageContext, Inputs], StageContext] = lambda context, _: context
    """Look up what the recipe depends on outside of the inputs. Called in dry runs too, where it writes nothing."""
    parts: tuple[tuple[Stage, ...], ...] = ()
    """Stages within this one: each tuple is made in order, the tuples beside each other. Their artifacts are inputs."""
    stale: Callable[[StageContext, Artifact], str | None] = lambda _context, _artifact: None
    """Say why an artifact that is there must be made again."""
    accept: Callable[[StageContext, Artifact], None] = lambda _context, _artifact: None
    """Check an artifact that was made or found. Called in dry runs too, where it writes nothing."""

    @functools.cached_property
    def code_version(self) -> str:
        """The version of the code that makes the artifact."""
        return code_version(self.recipe.__module__)


def digests(inputs: Inputs) -> dict[str, str]:
    """The digest of each artifact, by stage: what a recipe has of its inputs."""
    return {name: artifact.digest for name, artifact in inputs.items()}

"""The model that drafts tokens, as a model file names it: its source, whether it fits, and the memory it takes."""

from __future__ import annotations

from pathlib import Path

from containers.image.serving import DraftModel
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.draft_models import find_problems, layers_config
from pipeline.errors import PlanError, SourceError, naming
from pipeline.planner.facts import read_facts
from pipeline.planner.memory import Drafting
from pipeline.planner.sources import describe, describe_folder
from pipeline.planner.weights import unquantized
from pipeline.settings import Settings
from pipeline.sources import source as sources
from pipeline.sources.contents import DRAFT_MODEL
from pipeline.spec import ModelSpec


def lock_of(model_lock: Path) -> Path:
    """The lock of a model's draft model. No model's name has an underscore, so it is not the lock of another model."""
    return model_lock.with_name(model_lock.name.replace(".lock.json", ".draft_model.lock.json"))


def source_of(spec: ModelSpec) -> tuple[str, DraftModel] | None:
    """The key that names the draft model, the first of them, and its source; None where no model drafts."""
    return next(((key, each.source) for key, each in spec.drafting.items() if each.source is not None), None)


def resolve(spec: ModelSpec, settings: Settings) -> sources.ResolvedSource | None:
    """Find out what the draft model's source holds, without pulling it; None where no model drafts.

    Raises:
        SourceError: it can't be reached, holds what is refused, or is not what its lock pins; names the key.
    """
    if (found := source_of(spec)) is None:
        return None
    key, drafting = found
    with naming(key):
        return sources.resolve_locked(drafting.uri, drafting.revision, lock_of(spec.lock), settings, DRAFT_MODEL)


def check(
    spec: ModelSpec, resolved: sources.ResolvedSource, model: ModelDescription, pulled: Path | None = None
) -> Drafting:
    """Check from configurations and headers that a draft model is one for the ``model``; before or after it is pulled.

    Raises:
        SourceError: it can't be read, can't draft tokens for the model, or its cache is not known; names the key.
    """
    key, drafting = next(iter(spec.drafting.items()))
    with naming(key):
        try:
            draft = (describe(resolved) if pulled is None else describe_folder(pulled)).model
            if problems := find_problems(drafting.method, draft, model):
                raise SourceError(f"{resolved.uri} can't draft tokens for this model: {'; '.join(problems)}")
            cache = read_facts(layers_config(draft.config)).kv_bytes_per_token()
        except PlanError as error:
            raise SourceError(f"{resolved.uri} can't draft tokens: {error}") from error
    return Drafting(unquantized(draft).bytes, cache, resolved.bytes)

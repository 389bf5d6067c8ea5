"""Which releases a run would change now: a dry run with the stages' own recipes says so, and nothing is made.

The first artifact that is missing is what has changed. A gate that blocks ends the dry run: its verdict stands until
its evidence or its limits change. Where every artifact is there, a run would only promote the release, unless it is the
candidate already: a run always makes its release the candidate, and nothing else does. So a model's file that says
again what it said two releases ago is followed back, and a champion that a person has replaced stays replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from containers.image import profile as profiles
from containers.scan import scan_gate
from containers.scan.evidence import read_scan
from evals.drift import suite
from pipeline.resources import REQUIREMENTS
from pipeline.settings import Settings
from pipeline.spec import ModelSpec
from pipeline.stages.context import StageContext
from pipeline.stages.dry_run import DryRun, Missing
from pipeline.stages.promotion import audit_trail, manifest_digest
from pipeline.stages.stage import Gate, Stage
from pipeline.stages.table import LOAD, SCAN
from pipeline.store.artifacts import Artifact, Recipe, Store
from registry import catalog
from registry.digests import digest_json
from registry.verdict import Verdict


@dataclass(frozen=True)
class Affected:
    """A release that a run would change. ``key`` changes with the first artifact that would be made."""

    model: str
    scheme: str
    stage: str
    key: str
    why: str


class InputsDryRun(DryRun):
    """A dry run that looks at what a release is made from, and not at what changes around it from day to day.

    What today's vulnerability database finds is the rescan's question, and an image that the engine has lost is built
    again when the release is run for another reason.
    """

    def find(self, recipe: Recipe) -> Artifact | None:
        """Return the artifact of a recipe; of a scan, the image's newest, whichever database it used."""
        if recipe.stage != SCAN.name:
            return super().find(recipe)
        for key, record in self.store.records(recipe.stage):
            if record.recipe.inputs == recipe.inputs and record.recipe.code == recipe.code:
                return self.store.find(recipe.stage, key)
        return None

    def stale(self, stage: Stage, artifact: Artifact) -> str | None:
        """Say why a run would make an artifact again; no engine is asked for an image."""
        return super().stale(stage, artifact) if stage is LOAD else None

    def judge(self, stage: str, gate: Gate, evidence: Artifact) -> Verdict:
        """Judge as a run would; a scan as on its own day, since a run would scan with today's database."""
        if stage != SCAN.name:
            return super().judge(stage, gate, evidence)
        scan = read_scan(evidence.folder)
        return scan_gate.judge(scan, self.context.spec.scan, database_at=scan.scanned_at)


def affected(spec: ModelSpec, scheme: str, settings: Settings) -> Affected | None:
    """Return what a run of this release would change; None where it would change nothing.

    Raises:
        SlipwayError, ContainerError, EvaluationError, RegistryError: a look fails, as a run would.
    """
    context = StageContext(spec, scheme, settings, lambda _: None)
    dry_run = InputsDryRun(context)
    found = dry_run.last()
    if isinstance(found, Missing):
        if found.stale:
            return None  # an inconclusive load test was judged as the model's file says: a person asks for another
        recipe = found.recipe
        why = f"{recipe.stage}: {_what_is_new(dry_run.store, recipe)}"
        return Affected(spec.model, scheme, recipe.stage, recipe.key, why)
    if isinstance(found, Verdict):
        return None
    versions = catalog.current(settings.tracking_uri, context.release_name)
    registered = [version for version in versions if version.manifest_digest == manifest_digest(found)]
    if any("candidate" in version.aliases for version in registered):
        return None
    why = "another is candidate" if registered else "not registered"
    # A release can be asked for more than once, each time that the line has moved away from it.
    moves = len(audit_trail(context))
    return Affected(spec.model, scheme, "release", f"{found.key}-{moves}", f"release: signed, and {why}")


def touched(specs: Iterable[ModelSpec], settings: Settings) -> str:
    """Return a digest that changes when any file that these models' releases are made from is written to.

    It reads each file's size and times only, so it says cheaply whether `affected` is worth asking.
    """
    places = {settings.models, REQUIREMENTS, profiles.RUNTIMES, suite.SUITES}
    for spec in specs:
        calibration = (each.path for each in spec.calibration.data if each.is_here)
        data = (*calibration, spec.load.prompts, *(task.data for task in spec.evals.all_tasks))
        places |= {path for path in data if path is not None}
        merged = [] if spec.source.adapter is None else [spec.source.adapter]
        drafting = [each.source.uri for each in spec.drafting.values() if each.source is not None]
        adapters = (adapter.uri for adapter in (*merged, *spec.serve.adapters.values()))
        uris = (spec.source.uri, spec.original.uri, *adapters, *drafting)
        places |= {Path(uri.removeprefix("file:")) for uri in uris if uri.startswith("file:")}
    seen = {}
    for place in places:
        for path in [place, *place.rglob("*")]:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile: the next look sees that
                stat = path.stat()
                seen[str(path)] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return digest_json(seen)


def _what_is_new(store: Store, recipe: Recipe) -> str:
    """The parts of a recipe that differ from the most similar one that was made."""
    wanted = _leaves(asdict(recipe))
    others = [_leaves(asdict(record.recipe)) for _, record in store.records(recipe.stage)]
    if not others:
        return "never made"
    differing = [
        sorted(name for name in wanted.keys() | made.keys() if wanted.get(name) != made.get(name)) for made in others
    ]
    names = [name.removeprefix("inputs.").removeprefix("parameters.") for name in min(differing, key=len)]
    return f"{', '.join(names)} changed"


def _leaves(document: Mapping[str, object], above: str = "") -> dict[str, object]:
    """Flatten a nested mapping: each leaf under its dotted path."""
    found: dict[str, object] = {}
    for name, value in document.items():
        found |= _leaves(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found

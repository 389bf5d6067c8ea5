"""Which releases would make something anew if they were run now: the stages' own recipes say, and nothing is made.

A release is walked as a run would go through it, on a shelf that hands out what was made before and makes nothing. The
first artifact that is not there is what has changed. A gate that refused what is there ends the walk: a verdict stands
until its evidence or its limits are others. Where every artifact is there, the release is only to be promoted, unless
it is the candidate: a run always makes its release that, and nothing else does. So a model's file that is as it was two
releases ago is followed back, and a champion that a person has taken back stays so.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from containers.image import profile as profiles
from containers.image.build import ImageRecord
from containers.scan import scan_gate
from containers.scan.evidence import read_scan
from evals.drift import suite
from pipeline.resources import REQUIREMENTS
from pipeline.settings import Settings
from pipeline.sources.lock import read_lock
from pipeline.spec import ModelSpec
from pipeline.stages.read_only import NotMade, ReadOnlyContext, ReadOnlyStore
from pipeline.stages.standing import acts, manifest_digest
from pipeline.stages.walk import signed
from pipeline.store.artifacts import Artifact, Recipe
from registry import catalog
from registry.digests import digest_json
from registry.verdict import Verdict

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Affected:
    """A release that a run would change. ``key`` is another whenever the first thing to be made is another."""

    model: str
    scheme: str
    stage: str
    key: str
    why: str


class LastScans(ReadOnlyStore):
    """What was made, and of scans the image's newest: what is known today of a champion, the rescan looks up."""

    def made_by(self, recipe: Recipe) -> Artifact | None:
        """Return what was made by the recipe, in a scan with whichever database."""
        if recipe.stage != "scan":
            return super().made_by(recipe)
        for key, record in self.records(recipe.stage):
            if record["recipe"]["inputs"] == recipe.inputs and record["recipe"]["code"] == recipe.code:
                return self.find(recipe.stage, key)
        return None


@dataclass(frozen=True)
class LookingBench(ReadOnlyContext):
    """A bench at which nothing is made, and no engine asked."""

    @property
    def store(self) -> ReadOnlyStore:
        """What was made."""
        return LastScans(self.settings.home / "artifacts")

    def verdict(self, gate: str, evidence: Artifact) -> Verdict:
        """Judge as a run would, but for how old a scan's database has got: a run scans with the one of its own day."""
        if gate != "scan":
            return super().verdict(gate, evidence)
        scan = read_scan(evidence.folder)
        return scan_gate.judge(scan, self.spec.scan, database_at=scan.scanned_at)

    def has_image(self, record: ImageRecord) -> bool:  # noqa: ARG002 - as the bench's
        """Take it for granted: no engine is asked, and what it has lost the stage builds again when it is run."""
        return True


def affected(spec: ModelSpec, scheme: str, settings: Settings) -> Affected | None:
    """Return what a run of this release would change; None where it would change nothing.

    Raises:
        SlipwayError, ContainerError, EvaluationError, RegistryError: it can't be told; a run would fail of the same.
    """
    bench = LookingBench(spec, scheme, settings, lambda _: None)
    try:
        release = signed(bench)
    except NotMade as lacking:
        recipe = lacking.recipe
        if recipe.stage == "load" and lacking.again:
            return None  # it told nothing for sure, and was judged so: to measure again is for a person to ask
        why = "to be made again" if lacking.again else _what_is_new(bench.store, recipe)
        return Affected(spec.model, scheme, recipe.stage, recipe.key, f"{recipe.stage}: {why}")
    if release is None:
        return None
    versions = catalog.current(settings.tracking_uri, bench.release_name)
    registered = [version for version in versions if version.manifest_digest == manifest_digest(release)]
    if any("candidate" in version.aliases for version in registered):
        return None
    why = "another is candidate" if registered else "not registered"
    # What is signed can be asked for more than once, each time that the line has moved away from it.
    moves = len(acts(bench))
    return Affected(spec.model, scheme, "release", f"{release.key}-{moves}", f"release: signed, and {why}")


def moved_upstream(spec: ModelSpec, settings: Settings) -> str | None:
    """Return the commit that the model's branch or tag names now, where the lock holds it to another.

    Raises:
        SourceError: the hub can't be asked.
    """
    lock = read_lock(spec.lock)
    uri, _, named = spec.source.uri.partition("@")
    revision = named or spec.source.revision or "main"
    if lock is None or not uri.startswith("hf://") or _COMMIT.fullmatch(revision):
        return None
    from pipeline.sources.hub import Hub  # noqa: PLC0415 - the hub's client takes a tenth of a second to import

    commit, _ = Hub(settings.hub_endpoint, settings.hub_token).revision(uri.removeprefix("hf://"), revision)
    return None if commit == lock.revision else commit


def touched(specs: Iterable[ModelSpec], settings: Settings) -> str:
    """A digest that is another once any file that these models' releases are made from was written to.

    It costs a look at each file's size and time, and tells where it is worth to look closer.
    """
    places = {settings.models, REQUIREMENTS, profiles.RUNTIMES, suite.SUITES}
    for spec in specs:
        data = (spec.calibration.uri, spec.load.prompts, *(task.data for task in spec.evals.tasks.values()))
        places |= {path for path in data if path is not None}
        if spec.source.uri.startswith("file:"):
            places.add(Path(spec.source.uri.removeprefix("file:")))
    seen = {}
    for place in places:
        for path in [place, *place.rglob("*")]:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile: the next look sees it so
                stat = path.stat()
                seen[str(path)] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return digest_json(seen)


def _what_is_new(shelf: ReadOnlyStore, recipe: Recipe) -> str:
    """What sets a recipe apart from the one nearest to it of those that were made."""
    wanted = _leaves(asdict(recipe))
    others = [_leaves(record["recipe"]) for _, record in shelf.records(recipe.stage)]
    if not others:
        return "never made"
    differing = [
        sorted(name for name in wanted.keys() | made.keys() if wanted.get(name) != made.get(name)) for made in others
    ]
    names = [name.removeprefix("inputs.").removeprefix("parameters.") for name in min(differing, key=len)]
    return f"{', '.join(names)} changed"


def _leaves(document: Mapping[str, Any], above: str = "") -> dict[str, object]:
    """A nested mapping as one, each leaf under its dotted path."""
    found: dict[str, object] = {}
    for name, value in document.items():
        found |= _leaves(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found

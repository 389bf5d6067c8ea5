"""Promotion: register a signed release in MLflow, and move the aliases of its line to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from containers.image.build import read_image
from evals.load.variants import read_variants
from pipeline.publishing.attest import IMAGE, StatedRelease, attest
from pipeline.publishing.promotion_file import follow_promotion
from pipeline.stages.context import StageContext
from pipeline.stages.metadata import ReleasedVersion, figures
from pipeline.store.artifacts import Artifact
from pipeline.trust import signing_key, signing_key_if_any, trust_of
from registry import catalog, journal
from registry.manifest import EVIDENCE, MANIFEST, Manifest
from registry.promote import Champion, PromotedVersion, find_promoted
from registry.promote import promote as promote_folder
from registry.resolve import CANDIDATE, CHAMPION
from registry.signing import SigningKey


@dataclass(frozen=True)
class PromotedRelease:
    """A release as the registry has it; ``report`` is the page's path on MLflow's server, None where it has none."""

    name: str
    version: ReleasedVersion
    report: str | None


def promote(context: StageContext, release: Artifact, *, candidate_only: bool = False) -> PromotedRelease:
    """Register the signed release, and move ``candidate`` to it, and ``champion`` where the model's file says so.

    The champion stays with ``candidate_only``, and where a person has moved it away from this release. The image is
    signed first, so whatever an alias names is (`pipeline.publishing.attest`). The file in Git that names the champion
    follows; where it can't be pushed, the promotion stands.

    Raises:
        DistributionError: the image's registry can't be reached, or has lost it. No alias moved.
        RegistryError: the release is not what was signed, a gate blocks, or MLflow can't be reached. No alias moved.
    """
    settings = context.settings
    champion = _champion(context, release, candidate_only=candidate_only)
    before = {each.version: each.aliases for each in catalog.current(settings.tracking_uri, context.release_name)}
    key = signing_key(settings)
    signed = _attest(context, release, key)
    promotion = promote_folder(
        release.folder,
        settings.tracking_uri,
        trust_of(settings),
        champion=champion,
        key=key,
        progress=context.progress,
    )
    follow_promotion(context.release_name, settings, context.progress, spec=context.spec)
    stood = before.get(promotion.version) == promotion.aliases
    return _described(release, promotion, "up-to-date" if stood else "promoted", signed)


def already_promoted(context: StageContext, release: Artifact) -> PromotedRelease | None:
    """Return what `promote` would, without moving an alias; None where one would move.

    What is not attached to the image is attached, and a file in Git that is behind is pushed. The release's bytes are
    not read again.

    Raises:
        DistributionError: the image's registry can't be reached, or has lost it.
        RegistryError: the release is not what was signed, or the registry can't be read.
    """
    settings = context.settings
    key = signing_key_if_any(settings)
    promotion = find_promoted(
        release.folder,
        settings.tracking_uri,
        trust_of(settings),
        champion=_champion(context, release),
        key=key,
    )
    if promotion is None:
        return None
    follow_promotion(context.release_name, settings, context.progress, spec=context.spec)
    return _described(release, promotion, "up-to-date", _attest(context, release, key))


def manifest_digest(release: Artifact) -> str:
    """The digest by which the registry knows a release."""
    return f"sha256:{release.sha256['release/manifest.json']}"


def audit_trail(context: StageContext) -> Sequence[journal.JournalRecord]:
    """Return who moved the aliases of this release line, in order; nothing where the line does not exist yet.

    Raises:
        TrackingError: the registry can't be read.
    """
    line = catalog.line(context.settings.tracking_uri, context.release_name)
    return [] if line is None else journal.records(line)


def was_manually_demoted(context: StageContext, release: Artifact) -> bool:
    """Whether this very release was champion, and a person has since made another version the champion.

    It is still the candidate then, because nothing was released after it. A run that makes nothing new does not undo
    the person's decision, and says so.

    Raises:
        TrackingError: the registry can't be read.
    """
    versions = catalog.current(context.settings.tracking_uri, context.release_name)
    ours = next((version for version in versions if version.manifest_digest == manifest_digest(release)), None)
    if ours is None or CANDIDATE not in ours.aliases or CHAMPION in ours.aliases:
        return False
    moves = [move for record in audit_trail(context) if record.state == "done" for move in record.entry.moves]
    demoted = any(move.alias == CHAMPION and move.after == ours.version for move in moves)
    if demoted:
        context.progress(
            f"{ours.name} version {ours.version} was champion and a person has replaced it: it stays a candidate "
            "(`slipway promote` makes it champion again)"
        )
    return demoted


def _champion(context: StageContext, release: Artifact, *, candidate_only: bool = False) -> Champion:
    stays = was_manually_demoted(context, release) or candidate_only
    return "manual" if stays else context.spec.registry.champion


def measured(manifest: Manifest) -> dict[str, float]:
    """Return what one line about a release shows, from its manifest."""
    metrics: dict[str, float] = {}
    for gate in manifest.gates:
        metrics |= gate.verdict.metrics
    source = sum(file.size for file in manifest.source.files.values())
    checkpoint = sum(file.size for name, file in manifest.files.items() if not name.startswith("release/"))
    return figures(metrics, source, checkpoint)


def _described(
    release: Artifact,
    promotion: PromotedVersion,
    outcome: Literal["promoted", "up-to-date"],
    signed: Mapping[str, str],
) -> PromotedRelease:
    manifest = Manifest.parse((release.folder / MANIFEST).read_bytes())
    return PromotedRelease(
        name=promotion.name,
        version=ReleasedVersion(
            outcome=outcome,
            version=promotion.version,
            aliases=promotion.aliases,
            manifest_digest=promotion.manifest_digest,
            image=manifest.image.reference,
            weights={about: reference for about, reference in signed.items() if about != IMAGE},
            measured=measured(manifest),
            variants={each.name: str(each) for each in read_variants(release.folder / EVIDENCE)},
        ),
        report=promotion.report,
    )


def _attest(context: StageContext, release: Artifact, key: SigningKey | None) -> dict[str, str]:
    """Sign the release in the registry of its image, if that was pushed; return the references of what is signed."""
    if key is None or not read_image(release.folder / EVIDENCE).pushed:
        return {}
    return attest(StatedRelease.read(release.folder, trust_of(context.settings)), key, context.progress)

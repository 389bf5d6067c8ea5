"""The file in a Git repository that names a release line's champion, as the model's file says under `registry.git`.

It follows every promotion, rollback and rescan. A push that fails changes no alias: it is reported, and tried again by
the next promotion of the line and by `slipway ui` (`pipeline.orchestration.automation`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipeline.errors import PublishError, SlipwayError, SpecError
from pipeline.publishing.git_file import SECONDS, write_file
from pipeline.settings import Settings
from pipeline.spec import GitFile, ModelSpec, find, load
from pipeline.trust import signing_key_if_any, trust_of
from registry import catalog
from registry.backend import MODEL_TAG
from registry.errors import RegistryError, TrackingError
from registry.follow import GitPlace, follow_champion, follows
from registry.journal import current_user
from registry.progress import Progress
from registry.pull import ReleaseMetadata


@dataclass(frozen=True)
class GitPush:
    """What became of a file in Git: the commit that has the champion, or the error."""

    file: str
    commit: str | None
    error: str | None


def place_of(git: GitFile, name: str) -> GitPlace:
    """Return where the file of a release line is."""
    return GitPlace(git.repository, git.branch, git.path.replace("{release}", name))


def spec_of_line(name: str, settings: Settings) -> ModelSpec | None:
    """Return the model's file that a release line was made from; None if it is no longer there.

    The registry only says where to look: the file of another model is not this line's.

    Raises:
        SpecError: the file is not valid.
    """
    line = catalog.line(settings.tracking_uri, name)
    model = None if line is None else line.tags.get(MODEL_TAG)
    if model is None or not (settings.models / f"{model}.yaml").is_file():
        return None
    spec = load(find(model, settings.models))
    return spec if name in {f"{spec.model}-{scheme}" for scheme in spec.schemes} else None


def is_behind(name: str, git: GitFile, settings: Settings) -> bool:
    """Whether the audit trail does not say that the file has the champion; a damaged trail says nothing.

    Raises:
        TrackingError: the registry can't be read.
    """
    line, place = catalog.line(settings.tracking_uri, name), place_of(git, name)
    try:
        return line is not None and not follows(line, place)
    except TrackingError:
        return True


def follow_promotion(
    name: str, settings: Settings, progress: Progress, *, spec: ModelSpec | None = None
) -> GitPush | None:
    """Write the champion to the file in Git that the model's file asks for; None if it asks for none, or has it.

    ``spec`` is the model's file, if it is known. A failure is a warning.
    """
    try:
        spec = spec or spec_of_line(name, settings)
        if spec is None or spec.registry.git is None or not is_behind(name, spec.registry.git, settings):
            return None
    except (SpecError, RegistryError) as error:
        progress(f"warning: whether a file in Git is to name the champion of {name} is unknown: {error}")
        return None
    done = push_champion(name, spec.registry.git, settings, progress)
    if done.error is not None:
        progress(f"warning: {done.error}; the aliases have moved, and the push will be tried again")
    elif done.commit is not None:
        progress(f"{done.file} names the champion of {name}, by commit {done.commit[:12]}")
    return done


def push_champion(name: str, git: GitFile, settings: Settings, progress: Progress, seconds: float = SECONDS) -> GitPush:
    """Write the champion to its file and record it in the audit trail; a failure is in the result."""
    place = place_of(git, name)

    def write(champion: ReleaseMetadata) -> str:
        return write_file(place, _content(git, champion, name), _message(champion, name), settings, seconds)

    progress(f"writing the champion of {name} to {place}")
    try:
        entry = follow_champion(
            name, place, write, settings.tracking_uri, trust_of(settings),
            key=signing_key_if_any(settings), progress=progress,
        )  # fmt: skip
    except (SlipwayError, RegistryError) as error:
        return GitPush(str(place), None, str(error))
    return GitPush(str(place), None if entry is None or entry.pushed is None else entry.pushed.commit, None)


def _content(git: GitFile, champion: ReleaseMetadata, name: str) -> str:
    repository, pushed, digest = champion.manifest.image.reference.partition("@")
    if not pushed:
        raise PublishError(
            f"the image of {name} version {champion.version} was not pushed, so no cluster can pull it: set "
            "SLIPWAY_IMAGE_REGISTRY and release again"
        )
    head = f"# Written by Slipway: {name} version {champion.version}, {champion.manifest.digest}\n"
    quoted, digest = json.dumps(repository), json.dumps(digest)
    if git.format == "values":
        return f"{head}image:\n  repository: {quoted}\n  digest: {digest}\n"
    return (
        f"{head}apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\n"
        f"images:\n  - name: {quoted}\n    digest: {digest}\n"
    )


def _message(champion: ReleaseMetadata, name: str) -> str:
    manifest = champion.manifest
    gates = ", ".join(f"{gate.verdict.gate} {gate.verdict.status}" for gate in manifest.gates)
    return (
        f"Deploy {name} version {champion.version}\n\nImage: {manifest.image.reference}\nManifest: {manifest.digest}\n"
        f"Gates: {gates}\nBy: {current_user()}\n"
    )

"""What a scheme is calibrated with: files of this machine, and data sets of a hub, pinned and locked like weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.quantization import calibration_data
from pipeline.settings import Settings
from pipeline.sources import source as sources
from pipeline.sources.dataset import MOST_BYTES, dataset, lock_of
from pipeline.spec import Calibration, ModelSpec
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, require_room
from registry.digests import digest_file


def resolve(spec: ModelSpec, settings: Settings) -> dict[int, sources.ResolvedSource]:
    """Find out what the calibration's data sets hold, by their place in it; under their locks no hub is asked.

    Raises:
        SourceError: one can't be reached, holds no such file, or too much; names the key.
    """
    found = {}
    for number, source in enumerate(spec.calibration.data):
        if source.is_here:
            continue
        with _named(spec.calibration, number):
            lock, contents = lock_of(spec.lock, number), dataset(source.files or "")
            resolved = sources.resolve_locked(source.uri, source.revision, lock, settings, contents)
            if resolved.bytes > MOST_BYTES:
                raise SourceError(
                    f"`files` name {resolved.bytes / 2**30:.1f} GiB, and {MOST_BYTES >> 30} are the most: name fewer"
                )
        found[number] = resolved
    return found


def identities(context: StageContext) -> list[str]:
    """The content of each source: a file's digest, or a data set's commit and files."""
    resolved = resolve(context.spec, context.settings)
    return [
        f"{resolved[number].fingerprint}:{source.files}" if number in resolved else f"sha256:{digest_file(source.path)}"
        for number, source in enumerate(context.spec.calibration.data)
    ]


def digest(context: StageContext) -> str:
    """Identifies what the samples are drawn from, and in which shares."""
    return calibration_data.digest(context.spec.calibration, identities(context))


def samples(context: StageContext) -> list[calibration_data.Sample]:
    """Draw the samples; data sets are pulled where they are not in the store.

    Raises:
        SourceError: a data set can't be pulled, or is not what its lock pins.
        QuantizeError: a row is not valid, or there are too few; names the key.
    """
    resolved = resolve(context.spec, context.settings)
    files = [
        _files(_pulled(context, number, resolved[number])) if number in resolved else [source.path]
        for number, source in enumerate(context.spec.calibration.data)
    ]
    return calibration_data.draw(context.spec.calibration, files)


def may_hold_conversations(context: StageContext) -> bool:
    """Whether the samples may need a chat template; of data sets, which are pulled only to quantize, it is assumed."""
    is_here = all(each.is_here for each in context.spec.calibration.data)
    return not is_here or calibration_data.holds_conversations(samples(context))


def accept(context: StageContext, _quantized: Artifact) -> None:
    """Lock the data sets that a first release has used."""
    if context.dry or context.calibration is None:
        return
    for number, resolved in resolve(context.spec, context.settings).items():
        if resolved.lock is None:
            _pulled(context, number, resolved)


def _pulled(context: StageContext, number: int, resolved: sources.ResolvedSource) -> Artifact:
    settings = context.settings

    def make(draft: ArtifactDraft) -> None:
        require_room(settings.home, resolved.bytes, settings.disk_floor, f"{resolved.uri} (calibration data)")
        draft.sha256.update(sources.pull(resolved, draft.folder, settings.home / "downloads", context.progress))

    parameters = {
        "uri": resolved.uri,
        "content": resolved.fingerprint,
        "files": [file.path for file in resolved.files],
    }
    recipe = Recipe("dataset", inputs={}, parameters=parameters, code=code_version(__name__))
    with _named(context.spec.calibration, number):
        artifact = context.store.obtain(recipe, make)
        sources.hold_to_lock(lock_of(context.spec.lock, number), resolved, artifact.sha256)
    return artifact


def _files(artifact: Artifact) -> list[Path]:
    return [artifact.folder / name for name in sorted(artifact.files)]


@contextmanager
def _named(calibration: Calibration, number: int) -> Iterator[None]:
    """Let an error within the block begin with the source's key."""
    try:
        yield
    except SourceError as error:
        raise type(error)(f"`{calibration_data.key(calibration, number)}`: {error}") from error

"""From a folder of finished files to a signed release: list, hash, write the manifest, sign it."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from registry import sigstore_bundle
from registry.atomic_write import write_atomically
from registry.errors import ManifestError, Problem, SigningError, VerificationError
from registry.manifest import (
    EVIDENCE,
    MANIFEST,
    PROVENANCE,
    REQUIRED_GATES,
    SIGNATURE,
    Accelerator,
    FileRecord,
    GateRecord,
    Hardware,
    Image,
    Manifest,
    Quantizer,
    ReleasedAdapter,
    ReleasedDraftModel,
    Sbom,
    ServedConfiguration,
    Source,
    utc_now,
)
from registry.provenance import statement
from registry.signing import SigningKey
from registry.verdict import Verdict
from registry.verify import hash_files, plain_files


def place(files: Mapping[str, Path], folder: Path) -> None:
    """Put files (path in the release → where it is now) into ``folder`` by hard link; a copy where none can be made."""
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target, follow_symlinks=True)
        except OSError:
            shutil.copyfile(source, target)


def seal(folder: Path, key: SigningKey, manifest: Manifest) -> Manifest:
    """Write manifest, provenance and the signature over all of the release's files into ``folder``.

    A key on a curve signs as OpenSSF model signing has it (`registry.sigstore_bundle`); an Ed25519 key, of the first
    releases, signs the manifest alone, and there is no provenance then.

    Raises:
        SigningError: A gate blocks, or one of `REQUIRED_GATES` was not run: such a thing is not signed as a release.
    """
    verdicts = {record.verdict.gate: record.verdict for record in manifest.gates}
    absent = [name for name in REQUIRED_GATES if name not in verdicts]
    blocking = [f"{name} ({verdict.status})" for name, verdict in verdicts.items() if verdict.blocks]
    if absent or blocking:
        why = [f"not run: {', '.join(absent)}"] * bool(absent) + [f"not passed: {', '.join(blocking)}"] * bool(blocking)
        raise SigningError(f"`{folder}` can't be signed as a release, for its gates: {'; '.join(why)}")
    _sign(folder, key, manifest)
    return manifest


def _sign(folder: Path, key: SigningKey, manifest: Manifest) -> None:
    data = manifest.canonical()
    (folder / MANIFEST).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MANIFEST, data)
    if not key.signs_models:
        write_atomically(folder / SIGNATURE, key.sign(data).to_bytes())
        return
    provenance = sigstore_bundle.sign_statement(statement(manifest), key)
    write_atomically(folder / PROVENANCE, provenance)
    digests = {name: record.sha256 for name, record in manifest.files.items()}
    for name, content in ((MANIFEST, data), (PROVENANCE, provenance)):
        digests[name] = hashlib.sha256(content).hexdigest()
    write_atomically(
        folder / SIGNATURE, sigstore_bundle.sign_statement(sigstore_bundle.files_statement(manifest.name, digests), key)
    )


def describe(
    folder: Path,
    *,
    model: str,
    scheme: str,
    source: Source,
    baseline: Source | None = None,
    quantizer: Quantizer,
    gates: Sequence[tuple[Verdict, Sequence[str]]],
    image: Image,
    serving: tuple[ServedConfiguration, ...] = (),
    adapters: Mapping[str, ReleasedAdapter] | None = None,
    draft_model: ReleasedDraftModel | None = None,
    sbom: str,
    mlbom: str | None = None,
    hardware: Hardware | None = None,
    created: str | None = None,
    known: Mapping[str, FileRecord] | None = None,
) -> Manifest:
    """Return the manifest of everything in ``folder``.

    ``gates`` gives each verdict with the names of its evidence, which like ``sbom`` are paths in ``folder``
    (``release/evidence/drift.json``). ``hardware`` is this machine where it is not given. Files that are ``known`` by
    path, and still have that size, are not read and hashed again; promotion verifies every file.

    Raises:
        ManifestError: Evidence is not in the folder, the folder is sealed already or holds something but plain files.
    """
    if (folder / MANIFEST).exists() or (folder / SIGNATURE).exists():
        raise ManifestError(f"`{folder}` is sealed already: a release is written once")
    files = _described(folder, known or {})
    cited = [sbom, *([mlbom] if mlbom else []), *(name for _, names in gates for name in names)]
    absent = sorted({name for name in cited if name not in files})
    if absent:
        raise ManifestError(f"evidence is not in `{folder}`: {', '.join(absent)} (it belongs under `{EVIDENCE}/`)")
    digests = {name: f"sha256:{files[name].sha256}" for name in cited}
    return Manifest(
        schema="slipway.release/v1",
        model=model,
        scheme=scheme,
        source=source,
        baseline=baseline,
        quantizer=quantizer,
        gates=tuple(
            GateRecord(verdict=verdict, evidence={name: digests[name] for name in names}) for verdict, names in gates
        ),
        image=image,
        serving=serving,
        adapters=adapters or {},
        draft_model=draft_model,
        sbom=Sbom(path=sbom, digest=digests[sbom]),
        mlbom=Sbom(path=mlbom, digest=digests[mlbom]) if mlbom else None,
        hardware=hardware or this_machine(),
        files=files,
        created=created or utc_now(),
    )


def this_machine(accelerators: Sequence[Accelerator] = ()) -> Hardware:
    """Describe the machine that this runs on; GPUs are for the caller to name."""
    return Hardware(
        machine=platform.machine() or "unknown",
        cpu=_cpu(),
        cores=os.cpu_count() or 0,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        accelerators=tuple(accelerators),
    )


def _described(folder: Path, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    try:
        sizes = plain_files(folder)
    except VerificationError as error:
        found = "; ".join(str(problem) for problem in error.problems)
        raise ManifestError(f"`{folder}` can't be sealed: {found}") from error
    same = {name: record.sha256 for name, record in known.items() if sizes.get(name) == record.size}
    digests = same | hash_files(folder, sorted(sizes.keys() - same.keys()))
    unread = [str(Problem(name, "can't be read")) for name, digest in digests.items() if not digest]
    if unread:
        raise ManifestError(f"`{folder}` can't be sealed: {'; '.join(unread)}")
    return {name: FileRecord(sha256=digests[name], size=sizes[name]) for name in sorted(sizes)}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else "") or platform.processor() or "unknown"

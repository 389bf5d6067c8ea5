"""The manifest: one JSON document that says what a release is; what is not in it did not happen.

The format, ``slipway.release/v1``:

- *Canonical form.* UTF-8 JSON, object keys sorted by Unicode code point, no whitespace, no NaN or infinity, non-ASCII
  characters as themselves, every field present (``null`` where there is nothing). It resembles RFC 8785 and differs
  in two points: numbers are written as Python's ``repr`` writes them (``1.0``, ``1e-07``), and keys sort by code point
  rather than by UTF-16 unit. A file that is not in this form is refused, so one release has one digest.
- *Digest.* ``sha256:`` and the SHA-256 of the canonical bytes; those bytes are what is signed.
- *Law.* ``Manifest.parse(m.canonical()) == m``, and ``Manifest.parse(b).canonical() == b`` for all bytes it accepts.
- *Coverage.* ``files`` names every file of the release folder but ``release/manifest.json``, ``release/signature.json``
  and ``release/provenance.json``, which is made from the manifest (`registry.provenance`) and covered by the signature.
  Model files are at the folder's root, so that an engine loads the folder as it is.
- *Compatibility.* Unknown keys are refused; a change of meaning is a new version. A field that came after the first
  release is `Later`: it has a default, and is left out where it has that value, so that what was signed without it
  keeps its digest for ever.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from registry.bounded_json import Bounds, DocumentError, read_json
from registry.digests import canonical_json, digest_of
from registry.errors import ManifestError, VariantError
from registry.verdict import Verdict

SCHEMA = "slipway.release/v1"
MANIFEST = "release/manifest.json"
SIGNATURE = "release/signature.json"
PROVENANCE = "release/provenance.json"
DOCUMENTS = (MANIFEST, SIGNATURE, PROVENANCE)
"""The files that a manifest does not list; releases signed by an Ed25519 key have no provenance."""
EVIDENCE = "release/evidence"
ADAPTERS = "adapters"
DRAFT_MODEL = "draft_model"
"""The folder with a folder for each LoRA adapter."""
REPORT = "release/report.html"
BOUNDS = Bounds(bytes=16 << 20, values=30_000, depth=16)
"""Bounds of a manifest, signature or provenance (7,000 files), which are read before any signature is checked."""
_MOST_SHOWN = 5
REQUIRED_GATES = ("drift", "scan", "load")
"""The gates without which nothing is promoted."""


def _relative(path: str) -> str:
    """Accept a path that stays in its folder, written in the one way this format writes it."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or ".." in parts or str(PurePosixPath(*parts)) != path:
        raise ValueError(f"`{path}` is not a plain relative path: it may not leave the release's folder")
    if any(unicodedata.category(character) == "Cc" for character in path):
        raise ValueError(f"{path!r} holds a control character")
    return path


def _covered(path: str) -> str:
    if path in DOCUMENTS:
        raise ValueError(f"`{path}` can't be listed in the manifest that it holds or signs")
    return _relative(path)


def _moment(text: str) -> str:
    """Accept a day that the calendar has, and a time that the clock has."""
    datetime.fromisoformat(text)
    return text


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
Hex256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(min_length=1)]
RelativePath = Annotated[str, AfterValidator(_relative)]
CoveredPath = Annotated[str, AfterValidator(_covered)]
Count = Annotated[int, Field(ge=0)]
Scalar = str | bool | int | float | None
Timestamp = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"), AfterValidator(_moment)]


class Later:
    """Marks a field that the first releases had not: ``measured: Annotated[Timestamp | None, Later()] = None``."""


class _ManifestPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        document: dict[str, object] = handler(self)
        for name, field in type(self).model_fields.items():
            if getattr(self, name) == field.default and any(isinstance(mark, Later) for mark in field.metadata):
                document.pop(field.alias or name, None)
        return document


class FileRecord(_ManifestPart):
    """One file: its SHA-256 in hexadecimal and its size in bytes."""

    sha256: Hex256
    """In hexadecimal."""
    size: Count
    """In bytes."""


class MergedAdapter(_ManifestPart):
    """A LoRA or DoRA adapter that became part of the weights; none of its files are in the release."""

    uri: Text
    """As in the model file."""
    revision: Text
    """A commit, or the digest of the files; never a branch."""
    rank: Count
    """The largest rank of a layer."""
    modules: tuple[Name, ...]
    """The last names of the layers that it changed."""
    files: Mapping[RelativePath, FileRecord] = Field(min_length=1)
    """By their path."""
    pins_digest: Digest
    """Of the locked environment that merged it."""


class Source(_ManifestPart):
    """Where the weights came from: ``revision`` is a commit or the digest of the files, never a branch."""

    uri: Text
    """As in the model file."""
    revision: Text
    """A commit, or the digest of the files; never a branch."""
    files: Mapping[RelativePath, FileRecord]
    """By their path."""
    adapter: Annotated[MergedAdapter | None, Later()] = None
    """The adapter that was merged into these files before they were quantized."""


class CalibrationData(_ManifestPart):
    """One source of calibration data."""

    uri: Text
    """As in the model file; of a file its name."""
    revision: Text | None
    """The commit of a data set of a hub."""
    files: Mapping[Text, Digest]
    """The digest of each file that it was read from, by its path."""
    weight: float
    """Its share of the samples, relative to the others."""


class Calibration(_ManifestPart):
    """The text that the quantizer looked at."""

    uri: Text
    """As in the model file, of a file its name; `mixture` for several."""
    digest: Digest
    """Of the text."""
    samples: Count
    """How many rows were used."""
    max_tokens: Count
    """What was longer was cut to so many tokens."""
    cut: Annotated[Count | None, Later()] = None
    """How many samples that were."""
    empty: Annotated[Count | None, Later()] = None
    """How many samples held no token."""
    data: Annotated[tuple[CalibrationData, ...], Later()] = ()
    """What the samples were drawn from, where that is not one file here; ``digest`` is that of the samples."""

    @property
    def summary(self) -> str:
        """``32 samples of up to 200 tokens: 75% cut, 0% empty``; of a release before these were recorded the first."""
        known = {"cut": self.cut, "empty": self.empty}
        shares = [f"{count / max(1, self.samples):.0%} {what}" for what, count in known.items() if count is not None]
        used = f"{self.samples} samples of up to {self.max_tokens} tokens"
        return f"{used}: {', '.join(shares)}" if shares else used


class Quantizer(_ManifestPart):
    """What made the weights smaller; ``pins_digest`` is that of the locked environment it ran in."""

    backend: Name
    """The program; `none` where the source was quantized already."""
    version: Text
    """Its version; `as published` where there is none."""
    method: Name
    """The format of the weights."""
    parameters: Mapping[str, Scalar]
    """Of the scheme."""
    calibration: Calibration | None
    """The text that it looked at."""
    pins_digest: Digest | None
    """Of the locked environment that it ran in; null where the source was quantized already."""


class GateRecord(_ManifestPart):
    """A gate's verdict, and the digest of each file of the release that it rests on."""

    verdict: Verdict
    """What the gate concluded."""
    evidence: Mapping[CoveredPath, Digest] = Field(min_length=1)
    """The digest of each file of the release that the verdict rests on."""


class Image(_ManifestPart):
    """The container that was scanned and loaded; ``minimum_driver`` is the GPU driver it needs, if any."""

    reference: Text
    """`REPOSITORY@sha256:…`, or the id in the engine where it was not pushed."""
    digest: Digest
    """Of its OCI manifest."""
    base_digest: Digest
    """Of the base image."""
    pins_digest: Digest
    """Of the runtime: its profile, its lock and what builds it."""
    runtime: Name
    """The runtime's name."""
    minimum_driver: Text | None
    """The GPU driver that it needs, if any."""


class Sbom(_ManifestPart):
    """A bill of materials, the image's (``sbom``) or the model's (``mlbom``): a file of the release."""

    path: CoveredPath
    """Of the file in the release."""
    digest: Digest
    """Of the file."""


class Accelerator(_ManifestPart):
    """A GPU that took part in the tests."""

    name: Text
    """As NVML reports it."""
    memory_bytes: Count
    """All of its memory."""
    driver: Text
    """The driver's version."""


class Kernels(_ManifestPart):
    """What computed on the CPU: what multiplied 16-bit layers, how many layers each quantized kernel had, and the rest.

    ``compute_dtype`` is what layers hand to each other, ``threads`` how many computed.
    """

    linear_16bit: Text
    """What multiplied 16-bit layers."""
    linear_quantized: Mapping[Text, Count]
    """How many layers each quantized kernel had."""
    compute_dtype: Text
    """What layers hand to each other."""
    threads: Count
    """How many threads computed."""
    kv_cache_dtype: Text
    """Of the KV cache."""
    attention: Text
    """The implementation of attention."""


class ReleasedAdapter(_ManifestPart):
    """A LoRA adapter that is served next to the model; its files are in the release's folder ``adapters/NAME``."""

    uri: Text
    """As in the model file."""
    revision: Text
    """A commit, or the digest of the files; never a branch."""
    rank: Count
    """The largest rank of a layer."""
    modules: tuple[Name, ...]
    """The last names of the layers that it changes."""
    files: Mapping[RelativePath, FileRecord] = Field(min_length=1)
    """By their path in the adapter's folder."""


class ReleasedDraftModel(_ManifestPart):
    """The model that drafts tokens for this one; its files are in the release's folder ``draft_model``."""

    uri: Text
    """As in the model file."""
    revision: Text
    """A commit, or the digest of the files; never a branch."""
    files: Mapping[RelativePath, FileRecord] = Field(min_length=1)
    """By their path in its folder."""


class ServedConfiguration(_ManifestPart):
    """How a release may be served: a configuration in which it passed its gates."""

    variant: Name | None
    """The name of the variant; none is the main configuration, which the image runs by itself."""
    context: Count | None
    """Tokens of prompt and answer."""
    dtype: Name
    """The precision of activations, and of weights that are not quantized."""
    kv_cache: Name
    """The precision of the KV cache; `auto` is that of `dtype`."""
    tensor_parallel: Count
    """GPUs that share each layer."""
    pipeline_parallel: Count
    """Groups of GPUs that share the layers."""
    chat_template: Digest | None
    """Of the chat template in the image; none is the model's own."""
    adapters: tuple[Name, ...]
    """LoRA adapters, under the names that requests use."""
    command: tuple[Text, ...]
    """The arguments of the image's entry point."""


class Hardware(_ManifestPart):
    """What the release was tested on; ``instruction_set`` is the CPU's best that the tests used."""

    machine: Text
    """The architecture, such as `x86_64`."""
    cpu: Text
    """The CPU's model."""
    cores: Count
    """Logical CPUs."""
    memory_bytes: Count
    """Of the machine."""
    accelerators: tuple[Accelerator, ...] = ()
    """GPUs that took part."""
    instruction_set: Annotated[Text | None, Later()] = None
    """The CPU's best that the tests used."""
    kernels: Annotated[Kernels | None, Later()] = None
    """The kernels that computed on the CPU."""


class Manifest(_ManifestPart):
    """A release: one model in one quantization scheme, and everything that was found out about it."""

    schema_version: Literal["slipway.release/v1"] = Field(alias="schema")
    """The format of this document."""
    model: Name
    """The model's name."""
    scheme: Name
    """The scheme's name."""
    source: Source
    """Where the weights came from."""
    baseline: Annotated[Source | None, Later()] = None
    """The 16-bit original that it was compared with, where the source was quantized already."""
    quantizer: Quantizer
    """What quantized them."""
    gates: tuple[GateRecord, ...]
    """Every verdict, with its evidence."""
    image: Image
    """The container that was scanned and load-tested."""
    serving: Annotated[tuple[ServedConfiguration, ...], Later()] = ()
    """The configurations in which it passed its gates, the main one first; the first releases do not list them."""
    adapters: Annotated[Mapping[Name, ReleasedAdapter], Later()] = {}
    """LoRA adapters by the names under which they are served."""
    draft_model: Annotated[ReleasedDraftModel | None, Later()] = None
    """The model that drafts tokens, if one does."""
    sbom: Sbom
    """The image's bill of materials."""
    mlbom: Annotated[Sbom | None, Later()] = None
    """The model's bill of materials."""
    hardware: Hardware
    """What the release was tested on."""
    files: Mapping[CoveredPath, FileRecord]
    """Every file of the release but this one, its signature and `provenance.json`."""
    created: Timestamp
    """When the release was sealed, UTC."""

    @property
    def name(self) -> str:
        """The release line, and the name of the registered model: ``MODEL-SCHEME``."""
        return f"{self.model}-{self.scheme}"

    def configuration(self, variant: str | None) -> ServedConfiguration | None:
        """Return the configuration of a variant, or the main one; None of a release from before they were listed.

        Raises:
            VariantError: the release does not list the variant, so it did not pass its gates.
        """
        if variant is None:
            return next((each for each in self.serving if each.variant is None), None)
        found = next((each for each in self.serving if each.variant == variant), None)
        if found is None:
            listed = ", ".join(f"`{each.variant}`" for each in self.serving if each.variant is not None) or "none"
            raise VariantError(
                f"{self.name} does not list the variant `{variant}`, so it did not pass its gates (it lists {listed})"
            )
        return found

    @property
    def digest(self) -> str:
        """``sha256:`` and the SHA-256 of the canonical bytes."""
        return digest_of(self.canonical())

    @property
    def size_bytes(self) -> int:
        """All files of the release, in bytes."""
        return sum(record.size for record in self.files.values())

    def canonical(self) -> bytes:
        """Return the bytes that are stored, digested and signed."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a manifest from its canonical bytes.

        Raises:
            ManifestError: The bytes are not a manifest of this version, or not in canonical form.
        """
        try:
            document = read_json(data, BOUNDS)
        except DocumentError as error:
            raise ManifestError(f"`{MANIFEST}` can't be read: {error}") from error
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise ManifestError(f"`schema` of the manifest is {str(schema)[:60]!r}; this program reads `{SCHEMA}`")
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            raise ManifestError(f"`{MANIFEST}` is not a `{SCHEMA}`: {_explained(error)}") from error
        if manifest.canonical() != data:
            raise ManifestError(f"`{MANIFEST}` is not in canonical form: it was written or changed by something else")
        return manifest

    @model_validator(mode="after")
    def _evidence_is_in_the_release(self) -> Self:
        names = [gate.verdict.gate for gate in self.gates]
        if len(set(names)) != len(names):
            raise ValueError(f"`gates` holds one verdict a gate, not {', '.join(names)}")
        cited = [(bill.path, bill.digest) for bill in (self.sbom, self.mlbom) if bill is not None]
        cited += [item for gate in self.gates for item in gate.evidence.items()]
        for path, digest in cited:
            if path not in self.files:
                raise ValueError(f"`{path}` is cited as evidence and is not among `files`")
            if digest != f"sha256:{self.files[path].sha256}":
                raise ValueError(f"`{path}` has another digest as evidence than among `files`")
        return self

    @model_validator(mode="after")
    def _adapters_are_in_the_release(self) -> Self:
        for name, adapter in self.adapters.items():
            for path, record in adapter.files.items():
                if self.files.get(f"{ADAPTERS}/{name}/{path}") != record:
                    raise ValueError(f"`{path}` of the adapter `{name}` is not the same among `files`")
        return self

    @model_validator(mode="after")
    def _the_draft_model_is_in_the_release(self) -> Self:
        for path, record in ({} if self.draft_model is None else self.draft_model.files).items():
            if self.files.get(f"{DRAFT_MODEL}/{path}") != record:
                raise ValueError(f"`{path}` of the draft model is not the same among `files`")
        return self


def utc_now() -> str:
    """Return the time in the form of ``created``: UTC, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _explained(error: ValidationError) -> str:
    """Name the first bad keys with their paths: ``quantizer.bits: Extra inputs are not permitted``."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    found = [
        f"`{'.'.join(str(part) for part in detail['loc'])[:200] or 'manifest'}`: {detail['msg']}"
        for detail in problems[:_MOST_SHOWN]
    ]
    return "; ".join(found) + (f"; and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else "")

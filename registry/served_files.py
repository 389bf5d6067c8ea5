"""The files that a container may hand to its engine, and the check of all but the weights before the engine starts.

Two things can say what they are:

- ``/etc/slipway/files.json``, a list with the digest of each file under ``/model``, ``/adapters``, ``/draft_model`` and
  ``/serve``. It is in the image of a release, whose digest covers it, or is mounted by whoever starts the container.
- A trust policy that is mounted at ``/etc/slipway-trust`` (``policy.toml``, or else public keys, ``*.pub``). Then
  ``/model`` must be a release as `pull` leaves it, with its signed manifest. Its adapters and its draft model are in
  it, beside it, or both. The list still counts for ``/serve``.

What is there and not listed is refused like what is listed and changed. Weights are checked as they are read
(`slipway_loader.stream`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.digests import canonical_json, digest_of
from registry.errors import Problem, VerificationError, first_problem
from registry.manifest import ADAPTERS, BOUNDS, DRAFT_MODEL, MANIFEST, FileRecord, RelativePath
from registry.policy import Policy
from registry.signing import load_trusted_keys
from registry.verify import check_documents, compare_files, compare_sizes, plain_files, read_document

REFUSED = 78
"""The exit status of a container whose start was refused; vLLM does not use it."""
MARK = "slipway loader: "
"""How the loader's lines in a container's log begin."""
REFUSAL = f"{MARK}refused: "
LIST = "etc/slipway/files.json"
TRUST = "etc/slipway-trust"
MARKS = "var/lib/slipway-loader"
"""A folder with marks of weights that were hashed before (`slipway_loader.digest_check`), if it is mounted."""
MODEL, TEMPLATES = "model", "serve"
"""Folders of a container, next to those of adapters and of a model that drafts tokens."""
_BESIDE = (ADAPTERS, DRAFT_MODEL)
_FOLDERS = (MODEL, *_BESIDE, TEMPLATES)
_Value = TypeVar("_Value")


class ServedFiles(BaseModel):
    """Files of a container, by their path without the leading slash."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal["slipway.files/v1"] = Field(default="slipway.files/v1", alias="schema")
    """The format of this document."""
    files: Mapping[RelativePath, FileRecord]
    """Every file that the engine may read as part of the model."""

    def to_bytes(self) -> bytes:
        """Return the document in canonical form."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))

    @classmethod
    def read(cls, path: Path) -> ServedFiles:
        """Read a document.

        Raises:
            VerificationError: It can't be read, or has another form.
        """
        try:
            with path.open("rb") as file:
                data = file.read(BOUNDS.bytes + 1)
            if len(data) > BOUNDS.bytes:
                raise VerificationError(path.parent, [Problem(path.name, f"larger than {BOUNDS.bytes} bytes")])
            return cls.model_validate_json(data)
        except OSError as error:
            raise VerificationError(path.parent, [Problem(path.name, f"can't be read: {error.strerror}")]) from error
        except ValidationError as error:
            raise VerificationError(path.parent, [Problem(path.name, first_problem(error))]) from error


def is_weights(path: str) -> bool:
    """Whether the loader reads a file of a container: a shard of a model, not of an adapter."""
    folder, _, name = path.rpartition("/")
    return folder in {MODEL, DRAFT_MODEL} and name.endswith(".safetensors")


def expected_files(root: Path, manifest_digest: str | None = None) -> ServedFiles:
    """Return the files that a container with this root may serve.

    ``manifest_digest`` says which release a signed one must be; None accepts every release that the policy accepts.

    Raises:
        VerificationError: Nothing says what may be served, or the release in ``/model`` is not signed as the policy
            asks for.
        TrustPolicyError, SigningError: The policy or a key can't be read.
    """
    trust, listed = root / TRUST, root / LIST
    files = dict(ServedFiles.read(listed).files) if listed.is_file() else {}
    if trust.is_dir():
        signed = _signed(root, trust, manifest_digest)
        files = {name: record for name, record in files.items() if name.startswith(f"{TEMPLATES}/")} | signed
    elif manifest_digest is not None:
        raise VerificationError(root, [Problem(f"/{TRUST}", "no trust policy is mounted to check the manifest with")])
    elif not files:
        why = f"this image lists no files: mount a trust policy at /{TRUST}, or serve a release's own image"
        raise VerificationError(root, [Problem(f"/{LIST}", why)])
    return ServedFiles(files=files)


def check_before_start(root: Path, expected: ServedFiles) -> int:
    """Compare all files but the weights by their digests, and the weights by name and size; return the bytes read.

    Raises:
        VerificationError: It lists every file that is changed, missing, extra, or no plain file.
    """
    found: dict[str, int] = {}
    problems: list[Problem] = []
    for folder in _FOLDERS:
        if (root / folder).is_dir():
            try:
                found |= {f"{folder}/{name}": size for name, size in plain_files(root / folder).items()}
            except VerificationError as error:
                problems += (Problem(f"{folder}/{each.what}", each.why) for each in error.problems)
    blamed = {problem.what for problem in problems}
    weights, others = _divided(expected.files)
    weights_found, others_found = _divided(found)
    problems += compare_sizes(weights, weights_found, blamed)
    problems += compare_files(root, others, others_found, blamed)
    if problems:
        raise VerificationError(root, [Problem(f"/{each.what}", each.why) for each in problems])
    return sum(record.size for record in others.values())


def _divided(files: Mapping[str, _Value]) -> tuple[dict[str, _Value], dict[str, _Value]]:
    """Divide files, by their path, into the weights and the others."""
    weights = {name: value for name, value in files.items() if is_weights(name)}
    return weights, {name: value for name, value in files.items() if name not in weights}


def _signed(root: Path, trust: Path, manifest_digest: str | None) -> dict[str, FileRecord]:
    """Return the files of the signed release in ``/model``, and of what is mounted beside it."""
    named = trust / "policy.toml"
    policy = Policy.load(named) if named.is_file() else Policy(load_trusted_keys([trust]))
    folder = root / MODEL
    digest = manifest_digest
    if digest is None:
        data, problems = read_document(folder, MANIFEST)
        if data is None:
            why = f"{problems[0].why}, and the mounted trust policy needs it"
            raise VerificationError(folder, [Problem(f"/{MODEL}/{MANIFEST}", why)])
        digest = digest_of(data)
    released = check_documents(folder, policy, digest).manifest.files
    files = {f"{MODEL}/{name}": record for name, record in released.items()}
    for beside in _BESIDE:
        if (root / beside).is_dir():
            its = {name: record for name, record in released.items() if name.startswith(f"{beside}/")}
            if not (folder / beside).exists():
                files = {name: record for name, record in files.items() if name.partition("/")[2] not in its}
            files |= its
    return files

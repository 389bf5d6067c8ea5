"""The manifest's law: one canonical form, read back as it was written, and nothing else accepted."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from release_folder import DIGEST, make_release

from registry.digests import canonical_json, digest_of
from registry.errors import ManifestError
from registry.manifest import (
    SCHEMA,
    Accelerator,
    FileRecord,
    GateRecord,
    Hardware,
    Image,
    Kernels,
    Manifest,
    Quantizer,
    Sbom,
    Source,
)
from registry.signing import SigningKey
from registry.verdict import Verdict

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
hexes = st.text("0123456789abcdef", min_size=64, max_size=64)
digests = hexes.map(lambda text: f"sha256:{text}")
names = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
segments = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\"), min_size=1, max_size=8)
paths = st.lists(segments.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3).map("/".join)
finite = st.floats(allow_nan=False, allow_infinity=False)
records = st.builds(FileRecord, sha256=hexes, size=st.integers(0, 2**60))
kernels = st.builds(
    Kernels,
    linear_16bit=texts,
    linear_quantized=st.dictionaries(texts, st.integers(0, 99), max_size=2),
    compute_dtype=texts,
    threads=st.integers(0, 99),
    kv_cache_dtype=texts,
    attention=texts,
)
scalars = st.none() | st.booleans() | st.integers() | finite | texts


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    files = draw(st.dictionaries(paths, records, min_size=1, max_size=5))
    cited = {name: f"sha256:{record.sha256}" for name, record in files.items()}
    gates = draw(st.lists(names, unique=True, max_size=3))
    return Manifest(
        schema=SCHEMA,  # type: ignore[arg-type]
        model=draw(names),
        scheme=draw(names),
        source=Source(uri=draw(texts), revision=draw(texts), files=draw(st.dictionaries(paths, records, max_size=2))),
        quantizer=Quantizer(
            backend="autoawq",
            version=draw(texts),
            method="awq",
            parameters=draw(st.dictionaries(texts, scalars, max_size=3)),
            calibration=None,
            pins_digest=draw(digests),
        ),
        gates=tuple(
            GateRecord(
                verdict=Verdict(
                    gate=gate,
                    status=draw(st.sampled_from(["pass", "fail", "inconclusive"])),
                    reason=draw(texts),
                    metrics=draw(st.dictionaries(texts, finite, max_size=3)),
                ),
                evidence=cited,
            )
            for gate in gates
        ),
        image=Image(
            reference=draw(texts),
            digest=draw(digests),
            base_digest=draw(digests),
            pins_digest=draw(digests),
            runtime="vllm-cpu",
            minimum_driver=draw(st.none() | texts),
        ),
        sbom=Sbom(path=next(iter(cited)), digest=next(iter(cited.values()))),
        hardware=Hardware(
            machine="x86_64",
            cpu=draw(texts),
            cores=2,
            memory_bytes=1,
            accelerators=(Accelerator(name="H100", memory_bytes=1, driver="580"),),
            instruction_set=draw(st.none() | texts),
            kernels=draw(st.none() | kernels),
        ),
        files=files,
        created="2026-11-24T01:02:03Z",
    )


@given(manifests())
def test_what_is_written_is_read_back_the_same(manifest: Manifest) -> None:
    data = manifest.canonical()
    read = Manifest.parse(data)
    assert read == manifest
    assert read.canonical() == data
    assert read.digest == manifest.digest == digest_of(data)


@given(manifests())
def test_any_other_way_to_write_the_same_document_is_refused(manifest: Manifest) -> None:
    document = json.loads(manifest.canonical())
    spaced = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False).encode()
    reordered = json.dumps(dict(reversed(document.items())), separators=(",", ":"), ensure_ascii=False).encode()
    for data in (spaced, reordered, manifest.canonical() + b"\n"):
        with pytest.raises(ManifestError, match="canonical"):
            Manifest.parse(data)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory, signing_key: SigningKey) -> dict[str, Any]:
    manifest = make_release(tmp_path_factory.mktemp("release"), signing_key)
    loaded: dict[str, Any] = json.loads(manifest.canonical())
    return loaded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"schema": "slipway.release/v2"}, "slipway.release/v2"),
        ({"created": "yesterday"}, "created"),
        ({"model": "../escape"}, "model"),
        ({"image": None}, "image"),
        ({"files": {}}, "among `files`"),
        ({"hardware": {"machine": "x", "cpu": "y", "cores": -1, "memory_bytes": 1}}, "cores"),
    ],
)
def test_a_document_of_another_shape_is_refused(document: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        Manifest.parse(canonical_json(document | change))


@pytest.mark.parametrize(
    "path", ["../x", "/x", "a/../x", "a//b", "./a", "a/", "", "a\\b", "a\nb", "release/manifest.json", "a/./b", "."]
)
def test_a_path_that_escapes_or_has_two_spellings_is_refused(document: dict[str, Any], path: str) -> None:
    files = document["files"] | {path: {"sha256": "00" * 32, "size": 1}}
    with pytest.raises(ManifestError, match="files"):
        Manifest.parse(canonical_json(document | {"files": files}))


def test_two_verdicts_of_one_gate_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="one verdict a gate"):
        Manifest.parse(canonical_json(document | {"gates": document["gates"] * 2}))


def test_evidence_with_another_digest_than_its_file_is_refused(document: dict[str, Any]) -> None:
    sbom = document["sbom"] | {"digest": DIGEST}
    with pytest.raises(ManifestError, match="another digest as evidence"):
        Manifest.parse(canonical_json(document | {"sbom": sbom}))


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff", b'{"schema": NaN}', b"[" * 100_000])
def test_what_is_no_manifest_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.parse(data)


def test_a_duplicate_key_is_refused(document: dict[str, Any]) -> None:
    data = canonical_json(document).replace(b'"created":', b'"created":"2020-01-01T00:00:00Z","created":', 1)
    with pytest.raises(ManifestError, match="canonical"):
        Manifest.parse(data)


def test_numbers_that_json_has_not_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})
    with pytest.raises(ValidationError):
        Quantizer.model_validate(document["quantizer"] | {"parameters": {"damp": float("inf")}})


def test_a_manifest_is_frozen(document: dict[str, Any]) -> None:
    manifest = Manifest.parse(canonical_json(document))
    with pytest.raises(ValidationError, match="frozen"):
        manifest.model = "other"  # type: ignore[misc]


def test_the_name_of_a_release_line(document: dict[str, Any]) -> None:
    assert Manifest.parse(canonical_json(document)).name == "demo-awq"


def test_evidence_that_was_not_given_is_named(tmp_path: Path, signing_key: SigningKey) -> None:
    with pytest.raises(ManifestError, match=r"release/evidence/sbom\.cdx\.json"):
        make_release(tmp_path, signing_key, files={"config.json": b"{}"})


def test_a_sealed_folder_is_not_sealed_again(tmp_path: Path, signing_key: SigningKey) -> None:
    make_release(tmp_path, signing_key)
    with pytest.raises(ManifestError, match="sealed already"):
        make_release(tmp_path, signing_key)


def test_a_folder_with_a_link_is_not_sealed(tmp_path: Path, signing_key: SigningKey) -> None:
    (tmp_path / "model").symlink_to("/etc/passwd")
    with pytest.raises(ManifestError, match="symlink"):
        make_release(tmp_path, signing_key)

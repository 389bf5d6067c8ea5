"""What was signed once verifies for ever; the manifest's form is a law; its published schema is that of the types."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import VerificationError, verify
from registry.digests import canonical_json
from registry.errors import ManifestError
from registry.manifest import Later, Manifest
from registry.policy import Policy
from registry.schema import schema
from registry.signing import load_certificates, load_trusted_keys

ROOT = Path(__file__).parent.parent.parent
COMPAT = sorted(path for path in (ROOT / "compat").iterdir() if path.is_dir())
GATES = ("drift", "scan", "load")  # those there were when these were signed
DIGEST = "sha256:d14f4a5aef2acfe1601319b0feb463c9aee3cc419e6f89ffab34c1fc051d0997"
LATER = {
    "5-mlbom": "sha256:3ddd802b9358fdaa98d381d8e01e67527814a9f3bd88349e3acf91bc92bece34"
}  # those that have a field that the first had not


def trusted(folder: Path) -> Policy:
    """Whoever signed this one."""
    if (folder / "root.pem").exists():
        from registry.certificates import Authority  # noqa: PLC0415 - of later formats

        authorities = tuple(map(Authority, load_certificates(folder / "root.pem")))
        return Policy((), required_gates=GATES, authorities=authorities)
    return Policy(load_trusted_keys([folder / "release.pub"]), required_gates=GATES)


@pytest.mark.parametrize("folder", COMPAT, ids=lambda folder: folder.name)
def test_a_release_of_every_format_ever_written_verifies(folder: Path, tmp_path: Path) -> None:
    assert verify(folder / "release", trusted(folder)).manifest_digest == LATER.get(folder.name, DIGEST)
    shutil.copytree(folder / "release", tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"weights of another model, as it is")
    with pytest.raises(VerificationError, match="changed"):
        verify(tmp_path / "copy", trusted(folder))


@pytest.mark.parametrize("folder", COMPAT, ids=lambda folder: folder.name)
def test_the_published_schema_is_that_of_the_types_and_of_every_manifest(folder: Path) -> None:
    published = (ROOT.parent / "docs" / "manifest.schema.json").read_text()
    assert published == schema(), "python -m registry.schema > docs/manifest.schema.json"
    validator = jsonschema_rs.validator_for(json.loads(published))
    document = json.loads((folder / "release/release/manifest.json").read_bytes())
    assert validator.is_valid(document)
    assert not validator.is_valid(document | {"surprise": 1})
    assert not validator.is_valid(document | {"model": "../x"})


def test_a_later_field_leaves_what_was_signed_without_it_as_it_was() -> None:
    class Newer(Manifest):
        measured: Annotated[str | None, Later()] = None

    data = (COMPAT[0] / "release/release/manifest.json").read_bytes()
    assert Newer.parse(data).canonical() == data
    told = canonical_json(json.loads(data) | {"measured": "2026-11-24"})
    assert Newer.parse(told).canonical() == told
    explicit = canonical_json(json.loads(data) | {"measured": None})
    with pytest.raises(ManifestError, match="canonical"):
        Newer.parse(explicit)


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
digests = hexes.map(lambda text: f"sha256:{text}")
counts = st.integers(0, 2**53)
numbers = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | numbers | st.text(st.characters(codec="utf-8"), max_size=9)
paths = st.lists(names, min_size=1, max_size=3).map(lambda parts: "/".join(["model", *parts]))
records = st.fixed_dictionaries({"sha256": hexes, "size": counts})
times = st.datetimes(datetime(2000, 1, 1), datetime(2999, 1, 1)).map(lambda at: at.strftime("%Y-%m-%dT%H:%M:%SZ"))  # noqa: DTZ001


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """A manifest's JSON document."""
    files = draw(st.dictionaries(paths, records, min_size=1, max_size=6))
    cited = draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=3, unique=True))
    evidence = {name: f"sha256:{files[name]['sha256']}" for name in cited}
    metrics = st.dictionaries(texts, numbers, max_size=3)
    verdicts = st.fixed_dictionaries(
        {
            "gate": names, "status": st.sampled_from(["pass", "fail", "inconclusive"]), "reason": texts,
            "cause": st.none() | texts, "metrics": metrics, "limits": metrics, "accepted_because": st.none() | texts,
        }
    )  # fmt: skip
    gates = draw(st.lists(verdicts, max_size=4, unique_by=lambda verdict: str(verdict["gate"])))
    calibration = st.fixed_dictionaries({"uri": texts, "digest": digests, "samples": counts, "max_tokens": counts})
    quantizer = st.fixed_dictionaries(
        {
            "backend": names, "version": texts, "method": names,
            "parameters": st.dictionaries(texts, scalars, max_size=4),
            "calibration": st.none() | calibration, "pins_digest": digests,
        }
    )  # fmt: skip
    image = st.fixed_dictionaries(
        {
            "reference": texts, "digest": digests, "base_digest": digests, "pins_digest": digests, "runtime": names,
            "minimum_driver": st.none() | texts,
        }
    )  # fmt: skip
    accelerator = st.fixed_dictionaries({"name": texts, "memory_bytes": counts, "driver": texts})
    hardware = st.fixed_dictionaries(
        {
            "machine": texts, "cpu": texts, "cores": counts, "memory_bytes": counts,
            "accelerators": st.lists(accelerator, max_size=2),
        }
    )  # fmt: skip
    source = st.fixed_dictionaries(
        {"uri": texts, "revision": texts, "files": st.dictionaries(paths, records, max_size=3)}
    )
    return {
        "schema": "slipway.release/v1", "model": draw(names), "scheme": draw(names), "source": draw(source),
        "quantizer": draw(quantizer), "gates": [{"verdict": verdict, "evidence": evidence} for verdict in gates],
        "image": draw(image), "sbom": {"path": cited[0], "digest": evidence[cited[0]]}, "hardware": draw(hardware),
        "files": files, "created": draw(times),
    }  # fmt: skip


@given(documents())
def test_the_round_trip_law(document: dict[str, Any]) -> None:
    data = canonical_json(document)
    manifest = Manifest.parse(data)
    assert manifest.canonical() == data
    assert Manifest.parse(manifest.canonical()) == manifest
    assert datetime.fromisoformat(manifest.created).tzinfo == UTC


@given(documents(), st.data())
def test_a_byte_that_is_changed_is_refused_or_is_another_manifest(
    document: dict[str, Any], data: st.DataObject
) -> None:
    whole = canonical_json(document)
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    try:
        other = Manifest.parse(changed)
    except ManifestError:
        return
    assert other.canonical() == changed
    assert other.digest != Manifest.parse(whole).digest

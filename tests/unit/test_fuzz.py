"""Real documents, damaged: whoever reads one gives a value or its own error, in bounded work and in one piece.

Each document is damaged as a tree (keys dropped, values of another type, nesting, huge numbers) and as bytes (flipped,
cut, repeated). The examples are the same in every run; ``SLIPWAY_FUZZ_EXAMPLES`` asks for more of them, and for others
each time (`make test-long`).
"""

from __future__ import annotations

import base64
import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from containers.errors import ContainerError
from containers.gateway import reading
from containers.gateway.errors import Refusal
from containers.gateway.schema import ChatRequest, CompletionRequest
from containers.image.distribution import Registry
from containers.image.pulled import read_configuration, read_manifest
from containers.image.referrers import read_index as read_referrers
from containers.scan.vex import read_vex
from pipeline import spec, yaml_file
from pipeline.compatibility.safetensors_headers import HeaderError, parse_header, read_index
from pipeline.errors import PlanError, SourceError, SpecError
from pipeline.planner import sources
from pipeline.sources.hub import Hub
from registry import attestation
from registry.certificates import Authority
from registry.errors import ManifestError, SigningError, VerificationError
from registry.manifest import Manifest
from registry.signing import load_certificates, load_trusted_keys
from registry.sigstore_bundle import files_of, is_bundle, open_bundle, payload_of

ROOT = Path(__file__).parent.parent.parent
COMPAT = ROOT / "tests" / "compat"
MORE = os.environ.get("SLIPWAY_FUZZ_EXAMPLES")
NOW = datetime(2026, 11, 29, tzinfo=UTC)
fuzzed = settings(
    max_examples=int(MORE or 120),
    derandomize=MORE is None,
    database=None,
    deadline=timedelta(minutes=1),  # against what never ends
    suppress_health_check=list(HealthCheck),
)

Read = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Case:
    """A real document, who reads it, and the errors that this may end in."""

    document: bytes
    read: Read
    errors: tuple[type[Exception], ...]
    tree: Any = field(default=None)


def of_a_file(read: Callable[[Path], object]) -> Read:
    """Who reads a file, as one who reads bytes."""

    def through(data: bytes, folder: Path) -> object:
        path = folder / "document"
        path.write_bytes(data)
        return read(path)

    return through


def header() -> tuple[bytes, int]:
    path = ROOT / "models" / "demo" / "model" / "model.safetensors"
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        whole = json.loads(stream.read(length))
    few = dict(list(whole.items())[:6])
    size = max(entry["data_offsets"][1] for name, entry in few.items() if name != "__metadata__")
    raw = json.dumps(few).encode()
    return raw, 8 + len(raw) + size


DIGEST = "sha256:" + "a" * 64
LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": DIGEST, "size": 5}
AMD64 = {"os": "linux", "architecture": "amd64"}
HEADER, SIZE = header()
JSON_TYPE = {b"content-type": b"application/json"}
KEYS = load_trusted_keys([COMPAT / "5-mlbom" / "release.pub"])
AUTHORITIES = [Authority(certificate) for certificate in load_certificates(COMPAT / "4-certificate" / "root.pem")]
BUNDLE = (COMPAT / "5-mlbom" / "release" / "release" / "signature.json").read_bytes()
VERDICTS = {
    "schema": "slipway.verdicts/v1", "release": "demo-awq", "manifest_digest": DIGEST, "image_digest": DIGEST,
    "sealed": "2026-11-28T01:00:00Z", "passed": True, "statements": {"sbom": DIGEST},
    "gates": {"scan": {"gate": "scan", "status": "pass", "reason": "nothing found", "metrics": {"found": 0.0}}},
    "scan": {"at": "2026-11-28T00:00:00Z", "database_updated_at": None},
}  # fmt: skip
VEX = {
    "@context": "https://openvex.dev/ns/v0.2.0", "@id": "https://example.org/vex/1", "author": "Example",
    "timestamp": NOW.isoformat(), "version": 1,
    "statements": [{
        "vulnerability": {"name": "CVE-2099-0001"}, "status": "not_affected",
        "products": [{"@id": "pkg:deb/debian/openssl", "identifiers": {"purl": "pkg:deb/debian/openssl@3"}}],
        "justification": "vulnerable_code_not_in_execute_path", "timestamp": NOW.isoformat(),
    }],
}  # fmt: skip
FINDING: Any = {"id": "CVE-2099-0001", "package": "openssl", "version": "3", "purl": "pkg:deb/debian/openssl@3"}
CHAT = {
    "model": "m", "temperature": 0.5, "max_tokens": 5, "stop": ["a"], "logit_bias": {"1": 2},
    "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]},
                 {"role": "assistant", "content": None, "tool_calls": [
                     {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "response_format": {"type": "json_object"}, "stream": True, "stream_options": {"include_usage": True},
}  # fmt: skip
REGISTRY, HUB = Registry("127.0.0.1:9"), Hub("http://127.0.0.1:9", None)
MODEL = (ROOT / "models" / "demo.yaml").read_bytes()


def statements(path: Path) -> object:
    found = read_vex(path, NOW)
    return [(item.clears, item.reason, item.covers(FINDING, "an image")) for item in found]


def referrers(data: bytes, _: Path) -> object:
    return read_referrers(data, REGISTRY.host)


def signed(data: bytes, _: Path) -> object:
    is_bundle(data)
    files_of(payload_of(data) or b"{}")
    return open_bundle(data, KEYS, AUTHORITIES)


def stated(data: bytes, _: Path) -> object:
    kind, predicate = attestation._read(data, DIGEST, "")
    return kind, attestation._verdicts(predicate, "an image")


def case(document: object, read: Read, *errors: type[Exception]) -> Case:
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    tree = yaml.safe_load(raw) if raw is MODEL else json.loads(raw)
    return Case(raw, read, errors, tree)


CASES = {
    "manifest": case(
        (COMPAT / "5-mlbom" / "release" / "release" / "manifest.json").read_bytes(),
        lambda data, _: Manifest.parse(data).canonical(),
        ManifestError,
    ),
    "bundle": case(BUNDLE, signed, SigningError),
    "bundle-certificate": case(
        (COMPAT / "4-certificate" / "release" / "release" / "signature.json").read_bytes(), signed, SigningError
    ),
    "statement": case(
        base64.b64decode(json.loads(BUNDLE)["dsseEnvelope"]["payload"]), lambda data, _: files_of(data), SigningError
    ),
    "statement-of-verdicts": case(
        attestation.statement(DIGEST, "demo", attestation.VERDICTS, VERDICTS), stated, SigningError, VerificationError
    ),
    "safetensors": case(
        HEADER, lambda data, _: parse_header(data, Path("a"), SIZE + len(data) - len(HEADER)), HeaderError
    ),
    "safetensors-index": case(
        {"metadata": {"total_size": 5}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}},
        lambda data, _: read_index(data),
        HeaderError,
    ),
    "config": case(
        (ROOT / "models" / "demo" / "model" / "config.json").read_bytes(),
        lambda data, _: sources._document(data, "a model"),
        PlanError,
    ),
    "oci-manifest": case(
        {"schemaVersion": 2, "config": LAYER, "layers": [LAYER, LAYER]},
        lambda data, _: read_manifest(data, "it"),
        ContainerError,
    ),
    "oci-index": case(
        {"manifests": [{**LAYER, "platform": AMD64}]}, lambda data, _: read_manifest(data, "it"), ContainerError
    ),
    "oci-configuration": case(
        {"config": {"Env": ["A=b"], "Labels": {"a": "b"}, "Cmd": ["x"]}, "rootfs": {"diff_ids": [DIGEST]}},
        lambda data, _: read_configuration(data, "it").settings,
        ContainerError,
    ),
    "oci-referrers": case({"manifests": [{**LAYER, "artifactType": "a"}]}, referrers, ContainerError),
    "hub-revision": case(
        {"rfilename": "a.json", "size": 3, "blobId": "a" * 40, "lfs": {"sha256": "a" * 64, "size": 3}},
        lambda data, _: HUB._file(HUB._document(data)),
        SourceError,
    ),
    "gateway-chat": case(CHAT, lambda data, _: reading.parsed(ChatRequest, data, JSON_TYPE), Refusal),
    "gateway-completion": case(
        {"model": "m", "prompt": ["a", "b"], "n": 1, "stop": "x", "logprobs": 1},
        lambda data, _: reading.parsed(CompletionRequest, data, JSON_TYPE),
        Refusal,
    ),
    "vex": case(VEX, of_a_file(statements), ContainerError),
    "yaml": case(MODEL, of_a_file(yaml_file.read), SpecError),
    "model-yaml": case(MODEL, of_a_file(spec.load), SpecError),
}


@dataclass(frozen=True)
class Raw:
    """JSON that stands in a tree as it is: `json` itself writes nothing that is nested so deeply."""

    text: str


def nested(value: object, depth: int) -> Raw:
    return Raw('{"a":[' * depth + json.dumps(value) + "]}" * depth)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([2**63, 2**64, -(2**63) - 1, 10**400, 1e308]),
    st.floats(), st.text(max_size=12), st.sampled_from(["", "..", "/etc", "\x00", "\ud800", "9" * 5000, "2026-11-31"]),
)  # fmt: skip
VALUES = st.one_of(
    SCALARS,
    st.builds(nested, SCALARS, st.sampled_from([1, 2, 20, 70, 2000])),
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.text(max_size=6), SCALARS, max_size=3),
    st.builds(lambda value, count: [value] * count, SCALARS, st.sampled_from([10, 5000])),
)


def places(tree: object) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from places(tree[key])


def written(tree: object) -> bytes:
    """The tree as JSON, what is raw in it as it is."""
    raw: list[str] = []

    def mark(value: object) -> str:
        raw.append(value.text if isinstance(value, Raw) else str(value))
        return f"\x01{len(raw) - 1}\x02"

    text = json.dumps(tree, default=mark)
    for number, inner in enumerate(raw):
        text = text.replace(f'"\\u0001{number}\\u0002"', inner if inner.startswith("{") else json.dumps(inner))
    return text.encode()


@st.composite
def damaged_tree(draw: st.DrawFn, tree: object) -> bytes:
    """A document with some keys dropped, put elsewhere, or of another value."""
    document = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(document))
        container, key = found[draw(st.integers(0, len(found) - 1))]
        what = draw(st.sampled_from(["drop", "replace", "replace", "move", "rename"]))
        if what == "drop" and container is not document:
            del container[key]
        elif what == "move":
            other, place = found[draw(st.integers(0, len(found) - 1))]
            container[key] = copy.deepcopy(other[place])
        elif what == "rename" and isinstance(container, dict):
            container[draw(st.text(max_size=8))] = container.pop(key)
        else:
            container[key] = draw(VALUES)
    return written(document[0])


@st.composite
def damaged_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """A document with some bytes flipped, cut out, put in or repeated."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = start + draw(st.integers(0, 40))
        what = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if what == "flip" and data:
            data[start] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del data[start:end]
        elif what == "insert":
            data[start:start] = draw(
                st.one_of(st.binary(max_size=8), st.sampled_from([b"\xff\xfe", b"&a *a", b'"', b"[" * 3000]))
            )
        else:
            data[end:end] = data[start:end] * draw(st.sampled_from([1, 2, 500]))
    return bytes(data)


@pytest.mark.parametrize("name", CASES)
@fuzzed
@given(st.data())
def test_a_damaged_document_is_a_value_or_the_readers_own_error(
    name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    found = CASES[name]
    damaged = data.draw(st.one_of(damaged_tree(found.tree), damaged_bytes(found.document)))
    said = ""
    try:
        found.read(damaged, tmp_path_factory.getbasetemp())
    except found.errors as error:
        said = str(error)
    assert len(said) < 4000 + len(damaged)  # a path is shown whole


@pytest.mark.parametrize("name", CASES)
def test_undamaged_it_is_read(name: str, tmp_path: Path) -> None:
    """What is damaged above would be read otherwise, or it would show little; a bundle is signed by somebody else."""
    found = CASES[name]
    if name == "model-yaml":
        spec.load(ROOT / "models" / "demo.yaml")
    elif name != "bundle-certificate":
        found.read(found.document, tmp_path)

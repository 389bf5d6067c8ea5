"""A small, whole, signed release for tests: the files of a model that is none, and evidence that says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from registry.manifest import Calibration, FileRecord, Image, Manifest, Quantizer, ServedConfiguration, Source
from registry.seal import _sign, describe
from registry.signing import SigningKey
from registry.sigstore_bundle import files_statement, sign_statement
from registry.verdict import Verdict

DIGEST = "sha256:" + "ab" * 32
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 64,
    "tokenizer.json": '{"added": "é"}'.encode(),
    "release/evidence/drift.json": b'{"accuracy": 0.88}',
    "release/evidence/scan.json": b'{"vulnerabilities": 0}',
    "release/evidence/sbom.cdx.json": b'{"bomFormat": "CycloneDX"}',
    "release/evidence/load.json": (Path(__file__).parent / "data/load_test/load.json").read_bytes(),
    "release/report.html": b"<!doctype html>",
}


def passing(gate: str) -> Verdict:
    """A verdict that lets through."""
    return Verdict(gate=gate, status="pass", reason="within its limits", metrics={"p95": 0.25}, limits={"p95": 1.0})


def make_release(
    folder: Path,
    key: SigningKey,
    *,
    model: str = "demo",
    scheme: str = "awq",
    files: Mapping[str, bytes] = FILES,
    verdicts: Sequence[Verdict] = tuple(map(passing, ("drift", "scan", "load"))),
    created: str = "2026-11-24T01:02:03Z",
    image_id: str | None = None,
    variants: Mapping[str, Sequence[str]] | None = None,
) -> Manifest:
    """Write and seal a release in ``folder``, as it may be or, where its gates forbid that, as a forger would."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    manifest = describe(
        folder,
        model=model,
        scheme=scheme,
        source=Source(
            uri="hf://org/demo", revision="0" * 40, files={"model.safetensors": FileRecord(sha256="cd" * 32, size=9)}
        ),
        quantizer=Quantizer(
            backend="autoawq",
            version="0.2.9",
            method="awq",
            parameters={"bits": 4, "group_size": 64, "zero_point": True, "damp": 0.01},
            calibration=Calibration(uri="file:calibration.jsonl", digest=DIGEST, samples=64, max_tokens=256),
            pins_digest=DIGEST,
        ),
        gates=[(verdict, [f"release/evidence/{verdict.gate}.json"]) for verdict in verdicts],
        image=Image(
            reference=image_id or f"slipway/demo-awq@{DIGEST}",
            digest=image_id or DIGEST,
            base_digest=DIGEST,
            pins_digest=DIGEST,
            runtime="vllm-cpu",
            minimum_driver=None,
        ),
        sbom="release/evidence/sbom.cdx.json",
        created=created,
        serving=tuple(serving(variant, command) for variant, command in (variants or {}).items()),
    )
    _sign(folder, key, manifest)
    return manifest


def serving(variant: str | None, command: Sequence[str]) -> ServedConfiguration:
    """A configuration that is listed, with what its image is started with."""
    return ServedConfiguration(
        variant=variant, context=512, dtype="bfloat16", kv_cache="auto", tensor_parallel=1, pipeline_parallel=1,
        chat_template=None, adapters=(), command=tuple(command),
    )  # fmt: skip


def forged(folder: Path, key: SigningKey, changes: Mapping[str, object]) -> None:
    """Change keys of a sealed manifest and sign it again: what a holder of the key could do."""
    document = json.loads((folder / "release/manifest.json").read_bytes()) | dict(changes)
    data = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    (folder / "release/manifest.json").write_bytes(data)
    digests = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "signature.json"
    }
    (folder / "release/signature.json").write_bytes(sign_statement(files_statement(folder.name, digests), key))

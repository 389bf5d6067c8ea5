"""The model card of a release that is published, made from its signed evidence.

It begins with the metadata that the Hugging Face hub documents (https://huggingface.co/docs/hub/model-cards). It is not
covered by the signature: what it says can be looked up in the files that are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from pipeline.compatibility.description import ModelDescription
from registry.manifest import EVIDENCE, Manifest

NAME = "README.md"
BILL, CONFIGURATION = f"{EVIDENCE}/mlbom.cdx.json", "config.json"
"""The files of a release that its card is made from, beside the manifest: the model's bill of materials, and what the
model is."""
# Licenses by the identifiers that the hub documents (https://huggingface.co/docs/hub/repositories-licenses, August
# 2026); any other is `other`, with its name beside it.
_LICENSES = frozenset({
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
    "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "grok2-community",
    "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by",
    "ofl-1.1", "openmdw-1.0", "openmdw-1.1", "openrail", "openrail++", "osl-3.0", "pddl", "postgresql", "unknown",
    "unlicense", "wtfpl", "zlib",
})  # fmt: skip
_HUB = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)")
# The drift gate's figures: what each is of, and its sign.
_CHANGES = {"increase": ("bits per byte", 1), "drop": ("accuracy", -1)}


def card(manifest: Manifest, files: Mapping[str, bytes], place: str) -> str:
    """Return the card of a release as Markdown, for the ``place`` where it is published.

    Manifest and ``files``, `BILL` and `CONFIGURATION`, must have been verified; the first releases have no bill.
    """
    from huggingface_hub import ModelCardData  # noqa: PLC0415 - its import takes a third of a second

    config = json.loads(files[CONFIGURATION])
    metadata = ModelCardData(**_metadata(manifest, _license(files.get(BILL)), _task(config)))
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(_text(manifest, place)) + "\n"


def _metadata(manifest: Manifest, named: str | None, task: str) -> dict[str, object]:
    """The card's metadata. A base in a folder has no name on a hub, so it has none here."""
    adapter = manifest.source.adapter
    origins = [manifest.source.uri, *([] if adapter is None else [adapter.uri])]
    bases = [match["repository"] for match in map(_HUB.match, origins) if match]
    found: dict[str, object] = {
        "library_name": "transformers",  # whose form checkpoints have; the hub knows no vLLM among its libraries
        "pipeline_tag": task,
        "tags": ["slipway", "vllm", "quantized", manifest.quantizer.method],
    }
    if bases:
        found |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": "quantized"}
    if named is not None:
        known = named.lower() in _LICENSES
        found |= {"license": named.lower()} if known else {"license": "other", "license_name": _slug(named)}
    return found


def _task(config: Mapping[str, object]) -> str:
    """The hub's name for what a model does, by what its configuration says that it accepts."""
    if ModelDescription(config, {}).accepts_images:
        return "image-text-to-text"
    return "audio-text-to-text" if isinstance(config.get("audio_config"), Mapping) else "text-generation"


def _license(bill: bytes | None) -> str | None:
    """The license that the model's bill of materials states."""
    component = {} if bill is None else json.loads(bill)["metadata"]["component"]
    return next((str(each["license"]["name"]) for each in component.get("licenses", ())), None)


def _text(manifest: Manifest, place: str) -> Iterator[str]:
    source, quantizer = manifest.source, manifest.quantizer
    yield from (f"# {manifest.name}", "")
    merged = "" if source.adapter is None else f" with the adapter `{source.adapter.uri}` merged into it"
    how = f"quantized by {quantizer.backend} {quantizer.version}"
    if quantizer.backend == "none":
        how = "quantized already, and released as it was published"
    yield f"`{source.uri}`{merged}, {how} ({quantizer.method})."
    yield from ("", "| | |", "|---|---|")
    yield f"| base | `{source.uri}` at `{source.revision}` |"
    if manifest.baseline is not None:
        yield f"| compared with | `{manifest.baseline.uri}` at `{manifest.baseline.revision}` |"
    if source.adapter is not None:
        yield f"| adapter | `{source.adapter.uri}` at `{source.adapter.revision}` |"
    yield f"| parameters | {', '.join(f'{key} {value}' for key, value in sorted(quantizer.parameters.items()))} |"
    if quantizer.calibration is not None:
        text = quantizer.calibration
        yield f"| calibration | `{text.uri}`, {text.summary} |"
    yield f"| runtime | {manifest.image.runtime}, image `{manifest.image.digest}` |"
    yield f"| tested on | {manifest.hardware.cpu}, {manifest.hardware.cores} cores{_accelerators(manifest)} |"
    yield f"| sealed | {manifest.created} |"
    yield from ("", "## Measured loss", "")
    yield from _losses({gate.verdict.gate: gate.verdict.metrics for gate in manifest.gates}.get("drift", {}))
    yield from ("", "## Gates", "", "| gate | verdict | why |", "|---|---|---|")
    for gate in manifest.gates:
        verdict = gate.verdict
        accepted = f" Accepted: {verdict.accepted_because}" if verdict.accepted_because else ""
        yield f"| {verdict.gate} | {verdict.status} | {_cell(verdict.reason + accepted)} |"
    yield from ("", "`release/report.html` has all of it with pictures, `release/evidence/` what was measured.")
    yield from ("", "## Verify", "", "```bash", f"slipway pull {place} FOLDER", "slipway verify FOLDER", "```", "")
    yield (
        "Both check the signature against the keys that you trust (`SLIPWAY_TRUSTED_KEYS`), every file and the gates. "
        f"The digest of the manifest is `{manifest.digest}`. This card is not signed."
    )


def _losses(metrics: Mapping[str, float]) -> Iterator[str]:
    """A row for each task: the change against FP16 with its interval, which the drift gate judged."""
    if not metrics:
        yield "Nothing was compared: the verdict of the gate says why."
        return
    yield from ("| task | items | change against FP16 | interval |", "|---|---|---|---|")
    for key in sorted(metrics):
        task, _, kind = key.rpartition(".")
        if kind in _CHANGES:
            what, sign = _CHANGES[kind]
            low, high = sorted(sign * metrics[f"{key}_{side}"] for side in ("lower", "upper"))
            items, change = metrics[f"{task}.items"], sign * metrics[key]
            yield f"| {task} | {items:.0f} | {what} {change:+.2%} | {low:+.2%} to {high:+.2%} |"
    mean = "divergence.mean"
    if mean in metrics:
        low, high = metrics[f"{mean}_lower"], metrics[f"{mean}_upper"]
        positions = metrics["divergence.positions"]
        yield f"| next token | {positions:.0f} | {metrics[mean]:.4f} nats | {low:.4f} to {high:.4f} |"


def _accelerators(manifest: Manifest) -> str:
    return "".join(f", {each.name}" for each in manifest.hardware.accelerators)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")

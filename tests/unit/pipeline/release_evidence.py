"""The artifacts that a release adds up to, made by hand: a tiny checkpoint, and evidence within the demo's limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import load_evidence
from image_record import DIGEST, image_record

from containers.sandbox.memory import MemorySample
from containers.scan.evidence import SEVERITIES, DatabaseUsed, OperatingSystem, ScanEvidence, TrivyBuild
from evals.drift.answers import AskedSuite
from evals.drift.pairs import ChoicePairs, Divergence, DocumentPair, Drift, TextPairs
from evals.load.evidence import LoadEvidence
from homes import DEMO
from pipeline.quantization.quantize import CalibrationRecord, QuantizedNotes
from pipeline.settings import Settings
from pipeline.spec import load
from pipeline.stages.context import StageContext
from pipeline.stages.draft_model import PulledDraftModel
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, Store
from pipeline.store.notes import MergedNotes, SourceNotes

FILE = DEMO.with_suffix(".yaml")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DRAFT_MODEL_FILES = ("config.json", "model.safetensors")
SCAN = ScanEvidence(
    image_id=DIGEST,
    os=OperatingSystem(family="debian", name="12.1"),
    scanned_at=datetime(2026, 11, 24, tzinfo=UTC),
    trivy=TrivyBuild(version="0.76.0", sha256="ab" * 32),
    database=DatabaseUsed(state="absent"),
    packages=261,
    sbom_components=262,
    counts=dict.fromkeys(SEVERITIES, 0),
    fixable=dict.fromkeys(SEVERITIES, 0),
)
# A real load test of the demo, whose limits it meets.
LOAD = load_evidence.measured()
SAMPLE = MemorySample(seconds=1.0, phase="load", memory_bytes=10**9, usage_bytes=10**9)
QUANTIZED = QuantizedNotes(
    method="gptq", backend="gptqmodel", parameters={"bits": 4, "group_size": 64}, device="cpu", layers=28,
    calibration=CalibrationRecord(sha256="cd" * 32, samples=32, max_tokens=200, tokens=6400, cut=24, empty=0),
    bytes=10**6, source_bytes=3 * 10**6, bits_per_weight=4.3, pins_digest=DIGEST,
)  # fmt: skip
QUANTIZED_NOTES = QUANTIZED.model_dump(mode="json")


def drift_of(lost: int) -> Drift:
    """Paired answers of a candidate that lost so many of 800 items."""
    return Drift(
        engine={"transformers": "5"},
        engine_differences=(),
        suite=AskedSuite(name="demo", digest=load(FILE).evals.digest, lm_eval="0.4.13"),
        divergence=Divergence(
            top=20, documents=((0.2, 100), (0.3, 100), (0.25, 100)), mean=0.0025, p99=0.02, agreement=0.97, covered=0.8,
            buckets=(), curve=(),
        ),
        tasks={
            "cloze": ChoicePairs(
                items=800, baseline_missing=0, candidate_missing=0, baseline_right=680, candidate_right=680 - lost,
                changed=lost, chance=0.25, lost_ids=tuple(map(str, range(lost))), gained_ids=(),
            ),
            "perplexity": TextPairs(
                documents=tuple(
                    DocumentPair(id=str(number), bytes=2000, baseline_nats=2000.0, candidate_nats=2001.0 + number / 100)
                    for number in range(60)
                ),
                baseline_missing=0,
                candidate_missing=0,
            ),
        },
    )  # fmt: skip


@dataclass
class Made:
    """Makes a release's artifacts in a home of its own."""

    settings: Settings
    lost: int = 1
    load: LoadEvidence = LOAD
    image: Mapping[str, object] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    draft_model: bool = False
    merged: MergedNotes | None = None
    model: Path = FILE
    scheme: str = "gptq"
    quantized: QuantizedNotes = QUANTIZED
    config: str = "{}"
    drift: Drift | None = None
    told: list[str] = field(default_factory=list)

    @property
    def context(self) -> StageContext:
        """Where the scheme is released: the demo's gptq, unless another is named."""
        return StageContext(load(self.model), self.scheme, self.settings, self.told.append)

    def artifacts(self, weights: bytes = b"packed") -> dict[str, Artifact]:
        """What comes before the release, each from the ones before, by stage."""
        source = self.put(
            "source", {}, {"model.safetensors": "weights" * 10, "config.json": "{}"}, **self._source_notes()
        )
        checkpoint = {"model.safetensors": weights.decode(), "config.json": self.config}
        notes = self.quantized.model_dump(mode="json")
        quantized = self.put("quantized", {"source": source.digest}, checkpoint, **notes)
        adapters = self._put_adapters(source)
        of_checkpoint = {"quantized": quantized.digest}
        beside = {"adapters": adapters.digest}
        # An image is of its checkpoint, and so differs with it.
        record = image_record(model_digest=quantized.digest, **self.image)
        image = self.put(
            "image", {**of_checkpoint, **beside}, {"image.json": record.model_dump_json(), **self._drafting()}
        )
        of_image = {"image": image.digest}
        paired = {"drift.json": (self.drift or drift_of(self.lost)).model_dump_json(by_alias=True)}
        drift = self.put("drift", {"source": source.digest, **of_checkpoint, **beside, **of_image}, paired)
        scan = self.put(
            "scan",
            {**of_checkpoint, **beside, **of_image},
            {"scan.json": SCAN.model_dump_json(by_alias=True), "trivy.json": "{}", "sbom.cdx.json": "{}"},
        )
        measured = {
            "load.json": self.load.format(),
            "requests.jsonl": "",
            "memory.json": f"[{SAMPLE.model_dump_json()}]",
        }
        load_test = self.put("load", {**of_image, **beside, **of_checkpoint}, measured)
        variants = self.put(
            "variants", {"source": source.digest, **of_checkpoint, **beside, **of_image, "load": load_test.digest}, {}
        )
        made = (source, adapters, quantized, image, drift, scan, load_test, variants)
        return {artifact.stage: artifact for artifact in made}

    def _source_notes(self) -> dict[str, Any]:
        notes = SourceNotes(revision="0" * 40, merged=self.merged)
        return notes.model_dump(mode="json", exclude_none=True)

    def _put_adapters(self, source: Artifact) -> Artifact:
        told = {"revision": DIGEST, "rank": 4, "modules": ["q_proj"]}
        found = {name: {"uri": f"file:{name}", **told} for name in self.adapters}
        files = {"adapters.json": json.dumps({"adapters": found})}
        files |= {f"{name}/{file}": f"{name}'s {file}" for name in self.adapters for file in ADAPTER_FILES}
        return self.put("adapters", {"source": source.digest}, files)

    def _drafting(self) -> dict[str, str]:
        """The files of a draft model in the image's artifact, if there is one."""
        if not self.draft_model:
            return {}
        record = PulledDraftModel(uri="file:draft", revision=DIGEST, cache_bytes_per_token=512)
        files = {f"draft_model/{file}": f"the draft's {file}" for file in DRAFT_MODEL_FILES}
        return {"draft_model.json": record.model_dump_json(), **files}

    def put(self, stage: str, inputs: Mapping[str, str], files: Mapping[str, str], **notes: Any) -> Artifact:  # noqa: ANN401
        """Make one artifact that holds these files."""

        def make(draft: ArtifactDraft) -> None:
            for name, text in files.items():
                (draft.folder / name).parent.mkdir(exist_ok=True)
                (draft.folder / name).write_text(text)
            draft.notes.update(notes)

        recipe = Recipe(stage, inputs=inputs, parameters={"files": dict(files)}, code="by hand")
        return Store(self.settings.home / "artifacts").obtain(recipe, make)


def settings_of(home: Path) -> Settings:
    """The settings of an empty home."""
    return Settings.read({"SLIPWAY_HOME": str(home)})

"""The stages of a release, in order. Dagster's assets and checks, dry runs and the documentation are made from this."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pipeline.stages import (
    adapters,
    baseline,
    candidate,
    draft_model,
    drift,
    image,
    layers,
    load,
    merged_source,
    quantized,
    release,
    scan,
    variants,
)  # fmt: skip
from pipeline.stages.pairing import choose_instruction_set
from pipeline.stages.stage import Gate, Stage

SOURCE = Stage(
    "source",
    "The model's weights at a pinned revision: safetensors only, the sha256 of every file known and locked.",
    inputs=(),
    recipe=merged_source.recipe,
    make=merged_source.make,
    prepare=merged_source.prepare,
    accept=merged_source.accept,
    tool="huggingface",
)
ADAPTERS = Stage(
    "adapters",
    "The LoRA adapters that are served next to the model: pinned, locked, and checked against the weights.",
    inputs=("source",),
    recipe=adapters.recipe,
    make=adapters.make,
    prepare=adapters.prepare,
    accept=adapters.accept,
    tool="huggingface",
)
QUANTIZED = Stage(
    "quantized",
    "The weights in few bits, made by a quantizer or published so, and checked without a quantizer's help.",
    inputs=("source",),
    recipe=quantized.recipe,
    make=quantized.make,
    prepare=quantized.prepare,
    accept=quantized.accept,
    device=True,
    tool="pytorch",
)
IMAGE = Stage(
    "image",
    "The container that ships: pinned base, pinned wheels, the checkpoint, the adapters and a draft model inside.",
    inputs=("quantized", "adapters"),
    recipe=image.recipe,
    make=image.make,
    prepare=draft_model.prepare,
    stale=image.stale,
    accept=draft_model.accept,
    tool="docker",
)
BASELINE = Stage(
    "baseline",
    "What FP16 answers, item by item: once for a model, a suite and an engine, whatever the scheme.",
    inputs=("source", "adapters"),
    # So that one scheme is quantized while the runtime is built for another.
    waits_for=("image",),
    recipe=baseline.recipe,
    make=baseline.make,
    prepare=choose_instruction_set,
    accept=baseline.accept,
    device=True,
    tool="vllm",
)
CANDIDATE = Stage("candidate", "", ("quantized", "adapters", "image", "baseline"), candidate.recipe, candidate.make)
DRIFT = Stage(
    "drift",
    "What quantization lost: the answers of the image that ships, paired with FP16's, with intervals.",
    inputs=("source", "quantized", "adapters", "image", "baseline"),
    recipe=drift.recipe,
    make=drift.make,
    prepare=choose_instruction_set,
    parts=(
        # The baseline is found, unless the candidate has to be asked on another CPU than FP16 was.
        (BASELINE, CANDIDATE),
        (Stage("layers", "", ("source", "quantized"), layers.recipe, layers.make),),
    ),
    gate=Gate(
        "Does the candidate lose no more against FP16 than the model's limits allow?", drift.judge, ("drift.json",)
    ),
    device=True,
    tool="vllm",
)
SCAN = Stage(
    "scan",
    "Known vulnerabilities, secrets, misconfiguration and the SBOM of the image that ships.",
    inputs=("quantized", "adapters", "image"),
    waits_for=("drift",),
    recipe=scan.recipe,
    make=scan.make,
    prepare=scan.prepare,
    accept=scan.accept,
    gate=Gate("Is the image free of what the policy forbids?", scan.judge, ("scan.json", "trivy.json")),
    tool="trivy",
)
LOAD = Stage(
    "load",
    "Latency, throughput, errors and memory of the image that ships, under open-loop load.",
    inputs=("quantized", "adapters", "image"),
    waits_for=("scan",),
    recipe=load.recipe,
    make=load.make,
    stale=load.stale,
    gate=Gate(
        "Does the container hold its service level under load?",
        load.judge,
        ("load.json", "requests.jsonl", "memory.json"),
    ),
    device=True,
    tool="vllm",
)

VARIANTS = Stage(
    "variants",
    "The model file's further ways to serve the image: each through drift and load. Those that pass are listed.",
    inputs=("source", "quantized", "adapters", "image", "baseline"),
    waits_for=("load",),
    recipe=variants.recipe,
    make=variants.make,
    prepare=choose_instruction_set,
    stale=variants.stale,
    accept=variants.accept,
    device=True,
    tool="vllm",
)

_BEFORE_RELEASE = (SOURCE, ADAPTERS, QUANTIZED, IMAGE, BASELINE, DRIFT, SCAN, LOAD, VARIANTS)
_GATES: Mapping[str, Gate] = {stage.name: stage.gate for stage in _BEFORE_RELEASE if stage.gate}

RELEASE = Stage(
    "release",
    "The signed manifest over all of it, registered and promoted.",
    inputs=("source", "adapters", "quantized", "image", "variants", *_GATES),
    recipe=release.recipe,
    make=partial(release.make, gates=_GATES),
    prepare=partial(release.prepare, gates=_GATES),
    tool="mlflow",
)

STAGES = (*_BEFORE_RELEASE, RELEASE)
BY_NAME: Mapping[str, Stage] = {stage.name: stage for stage in STAGES}

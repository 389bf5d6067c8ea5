"""The error of each layer on the calibration text, a part of the stage `drift`."""

from __future__ import annotations

from evals.drift import json_lines, layer_errors
from evals.drift.pairs import write_layers
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs
from pipeline.store.artifacts import ArtifactDraft, Recipe
from pipeline.workers.environments import pins_digest
from registry.digests import digest_file


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """Both checkpoints and the text."""
    calibration = context.spec.calibration
    return Recipe(
        "layers",
        inputs={name: inputs[name].digest for name in ("source", "quantized")},
        parameters={
            "calibration": digest_file(calibration.uri),
            "samples": calibration.samples,
            "max_tokens": calibration.max_tokens,
            "measured": context.spec.evals.layers,
        },
        code=code_version(__name__),
        pins=pins_digest(layer_errors.ENVIRONMENT),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Measure, unless the model's file switches it off."""
    found = []
    if context.spec.evals.layers:
        found = layer_errors.measure_layers(
            inputs["source"].folder,
            inputs["quantized"].folder,
            calibration_texts(context),
            max_tokens=context.spec.calibration.max_tokens,
            run_worker=context.workers(draft),
            scratch=draft.scratch,
        )
    write_layers(found, draft.folder)


def calibration_texts(context: StageContext) -> list[str]:
    """The texts that the quantizer saw."""
    calibration = context.spec.calibration
    return [row["text"] for row in json_lines.read_rows(calibration.uri, json_lines.TEXTS, calibration.samples)]

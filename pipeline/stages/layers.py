"""The error of each layer on text, a part of the stage `drift`: that of the calibration, or else the load test's."""

from __future__ import annotations

from evals.drift import json_lines, layer_errors
from evals.drift.pairs import write_layers
from pipeline.spec import Calibration
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs
from pipeline.store.artifacts import ArtifactDraft, Recipe
from pipeline.workers.environments import pins_digest
from registry.digests import digest_file

# How many prompts stand in for calibration text, at most.
_SAMPLES = 32


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """Both checkpoints and the text."""
    text = _text(context)
    return Recipe(
        "layers",
        inputs={name: inputs[name].digest for name in ("source", "quantized")},
        parameters={
            "calibration": digest_file(text.uri),
            "samples": text.samples,
            "max_tokens": text.max_tokens,
            "measured": context.spec.evals.layers,
        },
        code=code_version(__name__),
        pins=pins_digest(layer_errors.ENVIRONMENT),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Measure, unless the model's file switches it off."""
    found = []
    if context.spec.evals.layers:
        text = _text(context)
        found = layer_errors.measure_layers(
            inputs["source"].folder,
            inputs["quantized"].folder,
            _read(text),
            max_tokens=text.max_tokens,
            run_worker=context.workers(draft),
            scratch=draft.scratch,
        )
    write_layers(found, draft.folder)


def calibration_texts(context: StageContext) -> list[str]:
    """The texts that the quantizer saw; none where it needs none."""
    return [] if context.calibration is None else _read(context.calibration)


def _text(context: StageContext) -> Calibration:
    """What layers are measured on."""
    return context.calibration or Calibration(uri=context.spec.load.prompts, samples=_SAMPLES)


def _read(text: Calibration) -> list[str]:
    return [row["text"] for row in json_lines.read_rows(text.uri, json_lines.TEXTS, text.samples)]

"""The error of each layer on text, a part of the stage `drift`: that of the calibration, or else the load test's."""

from __future__ import annotations

from evals.drift import layer_errors
from evals.drift.pairs import write_layers
from pipeline.quantization import calibration_data
from pipeline.spec import Calibration
from pipeline.stages import calibration
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
            "calibration": _identity(context),
            "chat_template": context.serving.chat_template,
            "samples": text.samples,
            "max_tokens": text.max_tokens,
            "measured": _is_measured(context),
        },
        code=code_version(__name__),
        pins=pins_digest(layer_errors.ENVIRONMENT),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Measure, unless the model's file switches it off."""
    found = []
    if _is_measured(context):
        found = layer_errors.measure_layers(
            inputs["source"].folder,
            inputs["quantized"].folder,
            _samples(context),
            max_tokens=_text(context).max_tokens,
            chat_template=context.spec.serve.chat_template,
            run_worker=context.workers(draft),
            scratch=draft.scratch,
        )
    write_layers(found, draft.folder)


def _is_measured(context: StageContext) -> bool:
    return context.spec.evals.layers and not context.spec.lacks_baseline


def _text(context: StageContext) -> Calibration:
    """What layers are measured on."""
    return context.calibration or Calibration(uri=f"file:{context.spec.load.prompts}", samples=_SAMPLES)


def _samples(context: StageContext) -> list[calibration_data.Sample]:
    """The calibration's samples, or the first prompts."""
    if context.calibration is None:
        return calibration_data.read(context.spec.load.prompts, _SAMPLES)
    return calibration.samples(context)


def _identity(context: StageContext) -> str:
    return digest_file(context.spec.load.prompts) if context.calibration is None else calibration.digest(context)

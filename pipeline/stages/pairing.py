"""On which CPU's instruction set FP16 and the candidate answer: on the same one, or they are not compared."""

from __future__ import annotations

from dataclasses import replace

from containers.hardware.cpu import INSTRUCTION_SETS, InstructionSet
from containers.image import profile as profiles
from pipeline.stages import baseline, candidate, draft_model, image, quantized
from pipeline.stages.context import StageContext
from pipeline.stages.stage import Inputs
from pipeline.store.artifacts import Artifact, Recipe
from pipeline.store.notes import AnswersNotes
from pipeline.workers.launchers.configured import are_here, have_gpus


def choose_instruction_set(context: StageContext, inputs: Inputs) -> StageContext:
    """Set the context's instruction set, where a CPU of ours computes the answers.

    It is this machine's. A release whose answers were paired on another CPU, and of which nothing has changed since,
    keeps that pair: it is finished, and another machine is no reason to ask again.
    """
    own = own_instruction_set(context)
    if own is None and context.instruction_set is None:
        return context
    given = inputs.get("baseline")
    answered_on = None if given is None else given.noted(AnswersNotes).instruction_set
    chosen = context.instruction_set
    if chosen is None:
        # FP16 was asked on this CPU before the image was made, which may be one that was paired on another CPU.
        chosen = own if answered_on == own else _paired_on(context, inputs, own) or own
    if answered_on not in {None, chosen}:
        # `baseline` was chosen for a pair of another CPU, and the image of that pair has been built anew since.
        context.progress(f"FP16 was asked on a CPU with {answered_on}: asking it on this one, with {chosen}")
    return replace(context, instruction_set=chosen)


def own_instruction_set(context: StageContext) -> InstructionSet | None:
    """This CPU's; None where something else computes the answers."""
    if context.spec.evals.engine == "hf":
        here = are_here(context.settings) and not have_gpus(context.settings)
    else:
        here = profiles.load(context.spec.runtime).minimum_driver is None and context.settings.engine_is_here
    return context.settings.cpu.instruction_set if here else None


def _paired_on(context: StageContext, inputs: Inputs, own: InstructionSet | None) -> InstructionSet | None:
    """The instruction set on which this very checkpoint and image were asked before; this CPU's first."""

    def find(recipe: Recipe) -> Artifact | None:
        return context.store.find(recipe.stage, recipe.key)

    made_of = {"source": inputs["source"]}
    checkpoint = find(quantized.recipe(quantized.prepare(context, made_of), made_of))
    adapters = {"adapters": inputs["adapters"]}
    shipped = checkpoint and find(
        image.recipe(draft_model.prepare(context, inputs), {"quantized": checkpoint, **adapters})
    )
    if checkpoint is None or shipped is None:
        return None
    for each in (own, *(other for other in INSTRUCTION_SETS if other != own)):
        asked = replace(context, instruction_set=each)
        fp16 = find(baseline.recipe(asked, {"source": inputs["source"], **adapters}))
        made = {"quantized": checkpoint, "image": shipped, **adapters}
        if fp16 and find(candidate.recipe(asked, {**made, "baseline": fp16})):
            return each
    return None

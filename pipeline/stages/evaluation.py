"""The stages that ask models questions: FP16 once, each candidate as it ships, and the two side by side."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import docker

from containers.errors import SandboxError
from containers.hardware.cpu import INSTRUCTION_SETS, InstructionSet
from containers.hardware.gpu import gpus
from containers.image import build as images
from containers.image import profile as profiles
from containers.image.runtime import build_runtime
from containers.sandbox import sandbox
from containers.sandbox.kernels import ComputedOn
from evals.drift import asking, json_lines
from evals.drift.answers import Answers, read_answers
from evals.drift.divergence import read_top
from evals.drift.drift_gate import is_clear as is_decided
from evals.drift.drift_gate import judge
from evals.drift.pairs import Layer, compare, write_drift
from evals.drift.suite import questions
from evals.errors import AnswersError
from pipeline.errors import StoreError
from pipeline.stages import table
from pipeline.stages.read_only import NotMade, ReadOnlyContext
from pipeline.stages.table import CODE, StageContext
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from pipeline.workers.environments import pins_digest
from pipeline.workers.launchers.configured import are_here, have_gpus
from registry.digests import digest_file

Serve = Callable[[], AbstractContextManager[sandbox.Server]]
Part = tuple[float, float]
FP16 = "fp16"  # in the place of an image's id


def baseline(bench: StageContext, source: Artifact) -> Artifact:
    """What FP16 answers: once for a model, a suite and an engine, whatever the scheme and however many releases.

    As served, it is mounted read-only into the runtime that every release of this profile is made of.
    """
    return _fp16(on_one_instruction_set(bench, source), source)


def drift(bench: StageContext, source: Artifact, baseline: Artifact, quantized: Artifact, image: Artifact) -> Artifact:
    """Ask the candidate what FP16 was asked, in the image that ships, and pair the answers.

    Raises:
        StoreError: the baseline is of another source than the one that was quantized.
    """
    if not baseline.inputs["checkpoint"] == quantized.inputs["source"] == source.digest:
        raise StoreError("`baseline` is of another `source` than `quantized`: run both again")
    answered_on = baseline.notes.get("instruction_set")
    if bench.instruction_set is None and answered_on == _own_instruction_set(bench):
        # `baseline` was chosen before `image` was made, which may turn out to be one that was paired on another CPU.
        bench = replace(bench, instruction_set=answered_on)
    bench = on_one_instruction_set(bench, source)
    if answered_on not in {None, bench.instruction_set}:
        # The pair of another CPU, for which `baseline` was chosen, is of an image that has since been built anew.
        bench.progress(
            f"FP16 was asked on a CPU with {answered_on}: asking it on this one, with {bench.instruction_set}"
        )
        baseline = _fp16(bench, source)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        # A server's start waits for disk and imports; the layers are measured meanwhile.
        measuring = beside.submit(_layers, bench, source, quantized, stop)
        try:
            candidate = _candidate(bench, baseline, quantized, image)
            layers = measuring.result()
        except BaseException:  # an interrupt above all, which reaches this thread alone
            stop.set()
            raise
    calibration = bench.spec.calibration
    recipe = Recipe(
        "drift",
        inputs={
            "baseline": baseline.digest,
            "candidate": candidate.digest,
            "quantized": quantized.digest,
            "image": image.digest,
            "layers": layers.digest,
        },
        parameters={"calibration": digest_file(calibration.uri), "samples": calibration.samples},
        code=CODE["drift"],
    )

    def make(draft: ArtifactDraft) -> None:
        answered = read_answers(candidate.folder)
        try:
            compared = compare(
                read_answers(baseline.folder),
                answered,
                fraction=candidate.notes.get("fraction", 1.0),
                overlapping=asking.overlapping(answered, candidate.folder, _calibration(bench)),
                tops=(read_top(baseline.folder), read_top(candidate.folder)),
                layers=[Layer.model_validate(layer) for layer in layers.document("layers.json")],
                computed_on=_computed_on(baseline, candidate),
            )
        except AnswersError as error:
            # A data set that changed upstream gives its answers no other key.
            kept = f"{baseline.folder.parent} and {candidate.folder.parent}"
            raise AnswersError(f"{error} (what is kept is in {kept}: remove them, and run again)") from error
        write_drift(compared, draft.folder)

    made = bench.store.obtain(recipe, make)
    # Beside each other, so that the longer of them is what the stage waited for.
    asked = max((each.worker_seconds for each in (candidate, layers) if not each.cached), default=0.0)
    return replace(made, worker_seconds=asked, cached=made.cached and candidate.cached and layers.cached)


@dataclass(frozen=True)
class _Past(ReadOnlyContext):
    """A bench that shows what was paired before; whether the engine still has the image does not matter."""

    def has_image(self, record: images.ImageRecord) -> bool:  # noqa: ARG002 - as the bench's
        """Take it for granted."""
        return True


def on_one_instruction_set(bench: StageContext, source: Artifact) -> StageContext:
    """Return the bench, told on which instruction set FP16 and candidate are asked, where a CPU of ours computes.

    It is this machine's. A release whose answers were paired on another CPU, with nothing changed since, keeps that
    pair: it is finished, and another machine is no reason to ask again.
    """
    own = _own_instruction_set(bench)
    if bench.instruction_set is not None or own is None:
        return bench
    past = _Past(bench.spec, bench.scheme_name, bench.settings, lambda _: None)
    with suppress(NotMade):
        quantized = table.quantized(past, source)
        image = table.image(past, quantized)
        for each in (own, *(other for other in INSTRUCTION_SETS if other != own)):
            looked = replace(past, instruction_set=each)
            with suppress(NotMade):
                _candidate(looked, _fp16(looked, source), quantized, image)
                return replace(bench, instruction_set=each)
    return replace(bench, instruction_set=own)


def _own_instruction_set(bench: StageContext) -> InstructionSet | None:
    """This CPU's; None where something else computes the answers."""
    if bench.spec.evals.engine == "hf":
        here = are_here(bench.settings) and not have_gpus(bench.settings)
    else:
        here = profiles.load(bench.spec.runtime).minimum_driver is None and bench.settings.engine_is_here
    return bench.settings.cpu.instruction_set if here else None


def _fp16(bench: StageContext, source: Artifact) -> Artifact:
    """What FP16 answers on the bench's instruction set."""
    recipe = _recipe(bench, source, {"checkpoint": source.digest}, repeated=True)

    def make(draft: ArtifactDraft) -> None:
        with bench.device():
            answer(bench, draft, source, lambda: serve_source(bench, source), FP16)

    return bench.store.obtain(recipe, make)


def _candidate(bench: StageContext, baseline: Artifact, quantized: Artifact, image: Artifact) -> Artifact:
    """What the candidate answers: in that very image, by its id, where it is served."""
    limits = bench.spec.evals
    inputs = {"checkpoint": quantized.digest, **({"image": image.digest} if limits.engine == "served" else {})}
    recipe = _recipe(bench, quantized, inputs, repeated=False)
    if limits.looks > 1:
        # When to stop follows from the limits and from FP16's answers, so these are asked anew with other limits.
        judged = {"looks": limits.looks, "limits": limits.model_dump(mode="json", exclude={"accept_inconclusive"})}
        recipe = replace(
            recipe, inputs={**inputs, "baseline": baseline.digest}, parameters={**recipe.parameters, **judged}
        )
    image_id = images.ImageRecord.model_validate(image.document("image.json")).image_id

    def make(draft: ArtifactDraft) -> None:
        with bench.device():
            against = baseline if limits.looks > 1 else None
            answer(bench, draft, quantized, lambda: serve_image(bench, image_id), image_id, against)

    return bench.store.obtain(recipe, make)


def _recipe(bench: StageContext, checkpoint: Artifact, inputs: dict[str, str], *, repeated: bool) -> Recipe:
    """What determines answers: the questions, the engine that is asked, and nothing of the limits."""
    limits = bench.spec.evals
    kept = None if limits.divergence is None else limits.divergence.model_dump(mode="json", exclude={"max_mean"})
    parameters: dict[str, Any] = {**questions(limits), "engine": _engine(bench, checkpoint), "divergence": kept}
    if repeated:
        parameters["again"] = limits.again
    return Recipe("answers", inputs, parameters, code=CODE["answers"], pins=pins_digest(asking.ENVIRONMENT))


def _engine(bench: StageContext, checkpoint: Artifact) -> dict[str, str]:
    """What computes the answers, and with which arguments: the same for FP16 and candidate."""
    if bench.spec.evals.engine == "hf":
        return {"name": "hf", "device": "cuda" if have_gpus(bench.settings) else "cpu", **_instruction_set(bench)}
    gpu = next((found.name for found in gpus()), None)
    profile = profiles.load(bench.spec.runtime)
    device = gpu if profile.minimum_driver and gpu else "cpu"
    arguments = " ".join(images.serving_arguments(profile, checkpoint.folder, bench.spec.model))
    pins = profile.pins_digest()
    return {
        "name": asking.SERVED, "runtime": profile.name, "pins": pins, "device": device, "arguments": arguments,
        **_instruction_set(bench),
    }  # fmt: skip


def _instruction_set(bench: StageContext) -> dict[str, str]:
    return {} if bench.instruction_set is None else {"instruction_set": bench.instruction_set}


def _served(
    bench: StageContext,
    client: docker.DockerClient,
    image: str,
    **more: Any,  # noqa: ANN401 - as `sandbox.serve` takes it
) -> AbstractContextManager[sandbox.Server]:
    """Start an image as the load test does, but for its memory: what is asked here is whether it answers rightly."""
    needs_gpu = profiles.load(bench.spec.runtime).minimum_driver is not None
    return sandbox.serve(
        client,
        image,
        name=f"slipway-evaluation-{bench.spec.model}",
        home=bench.settings.home,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=next((found.uuid for found in gpus()), None) if needs_gpu else None,
        cores=bench.server_cores(),
        cpu_limit=bench.settings.cpu_limit,
        start_timeout_s=bench.spec.load.start_timeout_s,
        progress=bench.progress,
        **more,
    )


@contextmanager
def serve_source(bench: StageContext, source: Artifact) -> Iterator[sandbox.Server]:
    """Serve FP16 as a release of it would be: mounted read-only into the runtime, with the arguments of an image."""
    profile = profiles.load(bench.spec.runtime)
    with bench.engine() as client:
        runtime = build_runtime(client, profile, bench.settings.home, bench.progress)
        command = images.serving_arguments(profile, source.folder, bench.spec.model)
        with _served(bench, client, runtime.image_id, command=command, mounts={source.folder: "/model"}) as server:
            yield server


@contextmanager
def serve_image(bench: StageContext, image_id: str) -> Iterator[sandbox.Server]:
    """Serve a release's own image.

    Raises:
        SandboxError: it does not start; says what to do where vLLM can't load such a scheme.
    """
    started = False
    try:
        with bench.engine() as client, _served(bench, client, image_id) as server:
            started = True
            yield server
    except SandboxError as error:
        if started:
            raise
        remedy = "if vLLM can't load this scheme, evaluate it with `evals: {engine: hf}`"
        raise SandboxError(f"the image of `{bench.scheme_name}` can't be asked: {error}; {remedy}") from error


def answer(
    bench: StageContext,
    draft: ArtifactDraft,
    checkpoint: Artifact,
    serve: Serve,
    image: str,
    looked_against: Artifact | None = None,
) -> None:
    """Fill an artifact with a checkpoint's answers; FP16's with some asked twice, a candidate's perhaps in looks."""
    limits = bench.spec.evals
    draft.notes.update(_instruction_set(bench))
    address = draft.scratch / "address"
    serving = (
        asking.Serving(address, bench.spec.model, image, _engine(bench, checkpoint))
        if limits.engine == "served"
        else None
    )

    def ask_part(part: Part, output: Path) -> Answers:
        return asking.ask(
            checkpoint.folder,
            limits,
            output,
            run_worker=bench.workers(draft) if serving is None else bench.workers_here(draft),
            scratch=draft.scratch,
            progress=bench.progress,
            serving=serving,
            part=part,
            divergence=limits.divergence if part[0] == 0 else None,
            again=limits.again if image == FP16 else 0,
            hub=asking.Hub(bench.settings.hub_endpoint, bench.settings.home / "hub"),
        )

    def ask() -> None:
        if looked_against is None:
            ask_part((0.0, 1.0), draft.folder)
            return
        reference = looked_against

        def is_clear(answers: Answers, folder: Path, fraction: float) -> bool:
            tops = (read_top(reference.folder), read_top(folder))
            looked = compare(read_answers(reference.folder), answers, fraction=fraction, tops=tops)
            bench.progress(f"a look at {fraction:.0%} of the suite: {judge(looked, limits).reason}")
            return is_decided(looked, limits)

        asked = asking.in_looks(limits.fractions, ask_part, is_clear, draft.scratch, draft.folder)
        draft.notes["fraction"] = asked

    @contextmanager
    def noted() -> Iterator[sandbox.Server]:
        with serve() as server:
            draft.notes["computed_on"] = server.computed_on.model_dump(mode="json")
            yield server

    if serving is None:
        ask()
    else:
        asking.while_serving(noted, address, ask)


def _computed_on(baseline: Artifact, candidate: Artifact) -> dict[Literal["FP16", "candidate"], ComputedOn]:
    sides: dict[Literal["FP16", "candidate"], Artifact] = {"FP16": baseline, "candidate": candidate}
    return {
        side: ComputedOn.model_validate(answers.notes["computed_on"])
        for side, answers in sides.items()
        if "computed_on" in answers.notes
    }


def _layers(bench: StageContext, source: Artifact, quantized: Artifact, stop: threading.Event) -> Artifact:
    """Where it went wrong, layer by layer, on the calibration text; until ``stop`` is set."""
    calibration = bench.spec.calibration
    recipe = Recipe(
        "layers",
        inputs={"quantized": quantized.digest, "source": source.digest},
        parameters={
            "calibration": digest_file(calibration.uri),
            "samples": calibration.samples,
            "max_tokens": calibration.max_tokens,
            "measured": bench.spec.evals.layers,
        },
        code=CODE["layers"],
        pins=pins_digest(asking.ENVIRONMENT),
    )

    def make(draft: ArtifactDraft) -> None:
        if not bench.spec.evals.layers:
            (draft.folder / "layers.json").write_text("[]")
            return
        workers = bench.workers(draft)
        workers.stop = stop
        layers = asking.measure_layers(
            source.folder,
            quantized.folder,
            _calibration(bench),
            max_tokens=calibration.max_tokens,
            run_worker=workers,
            scratch=draft.scratch,
        )
        (draft.folder / "layers.json").write_text(json.dumps([layer.model_dump() for layer in layers]))

    return bench.store.obtain(recipe, make)


def _calibration(bench: StageContext) -> list[str]:
    """The texts that the quantizer looked at."""
    calibration = bench.spec.calibration
    return [row["text"] for row in json_lines.read_rows(calibration.uri, json_lines.TEXTS, calibration.samples)]

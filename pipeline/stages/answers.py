"""Asking one checkpoint the questions of a suite: what `baseline` and the candidate of `drift` have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import docker

from containers.errors import SandboxError
from containers.hardware.gpu import gpus
from containers.image import build as images
from containers.image import profile as profiles
from containers.image.model_loader import with_list
from containers.image.runtime import build_runtime
from containers.image.serving import ADAPTERS, CHAT_TEMPLATE, ServingConfiguration
from containers.sandbox import sandbox
from evals.drift import asking
from evals.drift.answers import Answers
from evals.drift.limits import DriftLimits
from evals.drift.suite import questions
from pipeline.stages.context import StageContext
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe
from pipeline.store.notes import AnswersNotes
from pipeline.workers.environments import pins_digest
from pipeline.workers.launchers.configured import have_gpus

Serve = Callable[[], AbstractContextManager[sandbox.Server]]
Part = tuple[float, float]
AskPart = Callable[[Part, Path], Answers]
FP16 = "fp16"  # in the place of an image's id


def recipe_of(
    context: StageContext,
    checkpoint: Artifact,
    serving: ServingConfiguration,
    inputs: Mapping[str, str],
    more: Mapping[str, object],
    code: str,
) -> Recipe:
    """The questions and the engine that is asked; no limit, since limits judge answers and do not change them."""
    limits = context.evals
    kept = None if limits.divergence is None else limits.divergence.model_dump(mode="json", exclude={"max_mean"})
    parameters = {**questions(limits), "engine": engine_of(context, checkpoint), "divergence": kept, **more}
    if limits.engine == "served":
        profile, config = profiles.load(context.spec.runtime), images.checkpoint_config(checkpoint.folder)
        parameters["serving"] = serving.answering().resolved(config, profile).model_dump(mode="json")
    if serving.adapters:
        parameters["adapters"] = {name: questions(limits.of_adapter(name)) for name in serving.adapters}
    return Recipe("answers", inputs, parameters, code=code, pins=pins_digest(asking.ENVIRONMENT))


def reference(context: StageContext) -> ServingConfiguration:
    """How FP16 is served, whatever the scheme that is compared with it; to call tools it needs the same parser."""
    serving = context.serving_of(None).reference()
    return serving.model_copy(update={"tool_calls": context.serving.tool_calls})


def engine_of(context: StageContext, checkpoint: Artifact) -> dict[str, str]:
    """What computes the answers: the same for FP16 and candidate."""
    on = {} if context.instruction_set is None else {"instruction_set": context.instruction_set}
    if context.spec.evals.engine == "hf":
        return {"name": "hf", "device": "cuda" if have_gpus(context.settings) else "cpu", **on}
    gpu = next((found.name for found in gpus()), None)
    profile = profiles.load(context.spec.runtime)
    serving = context.serving.resolved(images.checkpoint_config(checkpoint.folder), profile)
    return {
        "name": asking.SERVED,
        "runtime": profile.name,
        "pins": profile.pins_digest(),
        "device": gpu if profile.minimum_driver and gpu else "cpu",
        "dtype": serving.dtype,
        **on,
    }


def image_id_of(image: Artifact) -> str:
    """The engine's id of an image that was built."""
    return images.read_image(image.folder).image_id


def answer(
    context: StageContext,
    draft: ArtifactDraft,
    checkpoint: Artifact,
    serve: Serve,
    image: str,
    ask: Callable[[AskPart], None] | None = None,
    canary: Sequence[str] = (),
) -> None:
    """Fill an artifact with a checkpoint's answers, of lm-eval or of the server that ``serve`` starts.

    A server is also asked for each adapter; those answers are in a folder of their own (`adapter_folder`).

    ``image`` is its image's id, or `FP16`, of which some items are asked twice. ``ask`` asks in parts; all is asked in
    one where it is not given. ``canary`` are the prompts that a canary is chosen from.
    """
    limits = context.evals
    if context.instruction_set is not None:
        draft.note(AnswersNotes(instruction_set=context.instruction_set))
    address, template = draft.scratch / "address", context.spec.serve.chat_template
    serving = (
        asking.StartingServer(
            address=str(address),
            name=context.spec.model,
            image=image,
            engine=engine_of(context, checkpoint),
            chat_template=None if template is None else str(template),
        )
        if limits.engine == "served"
        else None
    )

    def ask_for(
        asked: DriftLimits, serving: asking.StartingServer | None, part: Part, output: Path, canary: Sequence[str] = ()
    ) -> Answers:
        return asking.ask(
            checkpoint.folder,
            asked,
            output,
            run_worker=context.workers(draft) if serving is None else context.local_workers(draft),
            scratch=draft.scratch,
            progress=context.progress,
            serving=serving,
            part=part,
            divergence=asked.divergence if part[0] == 0 else None,
            again=asked.again if image == FP16 else 0,
            canary=canary,
            hub=asking.HubAccess(endpoint=context.settings.hub_endpoint, cache=str(context.settings.home / "hub")),
        )

    ask_part = partial(ask_for, limits, serving, canary=canary)

    def ask_all() -> None:
        if ask is None:
            ask_part((0.0, 1.0), draft.folder)
        else:
            ask(ask_part)
        for name in context.spec.serve.adapters:
            output = adapter_folder(draft.folder, name)
            output.mkdir(parents=True)
            context.progress(f"asking the adapter `{name}`")
            asked: asking.StartingServer | None = None if serving is None else {**serving, "name": name}
            ask_for(limits.of_adapter(name), asked, (0.0, 1.0), output)

    @contextmanager
    def noted() -> Iterator[sandbox.Server]:
        with serve() as server:
            draft.note(AnswersNotes(computed_on=server.computed_on))
            yield server

    if serving is None:
        ask_all()
    else:
        asking.while_serving(noted, address, ask_all)


def adapter_folder(answers: Path, name: str) -> Path:
    """Where a folder of answers has those of an adapter."""
    return answers / "adapters" / name


@contextmanager
def serve_source(context: StageContext, source: Artifact, adapters: Artifact) -> Iterator[sandbox.Server]:
    """Serve FP16 as its release would be served: mounted read-only into the runtime, with an image's arguments."""
    profile = profiles.load(context.spec.runtime)
    with context.engine() as client:
        runtime = build_runtime(client, profile, context.settings.home, context.progress)
        serving = reference(context)
        command = images.serving_arguments(profile, source.folder, context.spec.model, serving)
        mounts = {source.folder: "/model"}
        if serving.adapters:
            mounts[adapters.folder] = ADAPTERS
        if context.spec.serve.chat_template is not None:
            mounts[context.spec.serve.chat_template] = CHAT_TEMPLATE
        known = {made.folder / name: digest for made in (source, adapters) for name, digest in made.sha256.items()}
        with (
            with_list(mounts, context.settings.home, known) as listed,
            _served(context, client, runtime.image_id, serving.gpus, command=command, mounts=listed) as server,
        ):
            yield server


@contextmanager
def serve_image(context: StageContext, image_id: str, checkpoint: Artifact) -> Iterator[sandbox.Server]:
    """Serve a release's own image, with the arguments of the variant that is tested, if one is.

    Raises:
        SandboxError: it does not start; says what to do where vLLM can't load such a scheme.
    """
    started = False
    try:
        command, ranks = context.variant_command(checkpoint), context.serving.gpus
        with context.engine() as client, _served(context, client, image_id, ranks, command=command) as server:
            started = True
            yield server
    except SandboxError as error:
        if started:
            raise
        remedy = "if vLLM can't load this scheme, evaluate it with `evals: {engine: hf}`"
        raise SandboxError(f"the image of `{context.scheme_name}` can't be asked: {error}; {remedy}") from error


@contextmanager
def _served(
    context: StageContext,
    client: docker.DockerClient,
    image: str,
    ranks: int,
    **more: Any,  # noqa: ANN401 - as `sandbox.serve` takes it
) -> Iterator[sandbox.Server]:
    """Start an image as the load test does, but with all of the machine's memory: only the answers count here."""
    with (
        context.gpus(ranks) as devices,
        sandbox.serve(
            client,
            image,
            name=f"slipway-evaluation-{context.spec.model}",
            home=context.settings.home,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            gpus=devices,
            cores=context.server_cores(ranks=ranks),
            cpu_limit=context.settings.cpu_limit,
            start_timeout_s=context.spec.load.start_timeout_s,
            progress=context.progress,
            **more,
        ) as server,
    ):
        yield server

"""The stage `load`: the very image that ships, under the traffic that it will meet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from containers.errors import UnhealthyError
from containers.image import profile as profiles
from containers.image.build import ImageRecord, is_draft_model, serving_arguments
from containers.image.serving import ServingConfiguration
from containers.sandbox import sandbox
from containers.sandbox.engine_report import Requested
from evals.load import greedy, load_test
from evals.load.evidence import LoadEvidence, read_load_evidence
from evals.load.expected_memory import ExpectedMemory, expect
from evals.load.speculation import Asked, compare
from pipeline.errors import PlanError
from pipeline.planner.facts import read_facts
from pipeline.planner.sources import describe_folder
from pipeline.planner.weights import is_weight_only, stored
from pipeline.stages import canary
from pipeline.stages.code_version import code_version
from pipeline.stages.context import StageContext
from pipeline.stages.image import record_of
from pipeline.stages.stage import Inputs, digests
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, timed
from pipeline.workers.environments import pins_digest
from pipeline.workers.runner import Workers
from registry.digests import digest_file
from registry.verdict import Verdict


def recipe(context: StageContext, inputs: Inputs) -> Recipe:
    """The image, the checkpoint, the traffic with its prompts, and the load generator's pins."""
    plan = canary.known(context.spec, context.spec.load)
    return Recipe(
        "load",
        inputs=digests(inputs),
        parameters={**load_test.load_key(plan), "prompts": digest_file(plan.prompts), **_variant(context)},
        code=code_version(__name__),
        pins=pins_digest("aiperf"),
    )


def make(context: StageContext, inputs: Inputs, draft: ArtifactDraft) -> None:
    """Measure; the container's start and its traffic count as worker time."""
    with timed(draft.worker_seconds):
        measure(
            context, context.spec.load, record_of(inputs["image"]), inputs["quantized"], draft.folder, draft.scratch
        )


def stale(context: StageContext, load: Artifact) -> str | None:
    """Say so where the last load test was inconclusive: its server was disturbed, so the next may decide."""
    if load_test.is_conclusive(read_load_evidence(load.folder), context.spec.load):
        return None
    return "the last load test was inconclusive: measuring again"


def judge(load: Artifact, context: StageContext) -> Verdict:
    """Compare the measurements with the model's service level."""
    return load_test.judge(read_load_evidence(load.folder), context.spec.load)


def measure(
    context: StageContext,
    plan: load_test.LoadPlan,
    record: ImageRecord,
    checkpoint: Artifact,
    folder: Path,
    scratch: Path,
    live: load_test.Live = lambda _: None,
) -> LoadEvidence:
    """Serve an image in the sandbox, on a GPU of its own where it needs one, and measure it under a plan's traffic.

    A server that never gets healthy is evidence: the gate fails it, the stage does not. An image that needs a GPU is
    not started where there is none, and no configuration where the CPU does not support it: that is inconclusive. With
    speculation the same greedy requests go to a second server without it.

    Raises:
        UnknownCanaryError: the model was never released, and its file has no canary.
    """
    plan = canary.known(context.spec, plan)
    plan.known_canary()
    if unsupported := context.unsupported_of(checkpoint):
        return load_test.write_unsupported(unsupported, plan, folder)
    profile, serving = profiles.load(record.runtime), context.serving

    def arguments(chosen: ServingConfiguration) -> tuple[str, ...]:
        return serving_arguments(profile, checkpoint.folder, context.spec.model, chosen)

    with context.device(), context.cores(alone=True), context.gpus(context.serving.gpus) as gpus:
        if record.minimum_driver and not gpus:
            return load_test.write_without_gpu(plan, folder)

        @contextlib.contextmanager
        def serve(command: Sequence[str] | None) -> Iterator[sandbox.Server]:
            with (
                context.engine() as client,
                sandbox.serve(
                    client,
                    record.image_id,
                    name=f"slipway-{context.release_name}",
                    home=context.settings.home,
                    memory_bytes=plan.memory.limit_bytes,
                    cpus=plan.cpus,
                    command=command,
                    gpus=gpus,
                    cores=context.server_cores(plan.cpus, with_client=True, ranks=context.serving.gpus),
                    cpu_limit=context.settings.cpu_limit,
                    start_timeout_s=plan.start_timeout_s,
                    lifetime_s=plan.lifetime_s,
                    labels={sandbox.STAGE_LABEL: "load"},
                    progress=context.progress,
                ) as server,
            ):
                yield server

        try:
            with serve(context.variant_command(checkpoint)) as server:
                evidence = load_test.measure(
                    server,
                    plan,
                    tokenizer=checkpoint.folder,
                    folder=folder,
                    scratch=scratch,
                    run_worker=Workers(context.settings, context.progress, bootstrap=context.bootstrap),
                    progress=context.progress,
                    live=live,
                    expected=_expected_memory(context, record, checkpoint),
                    requested=_requested(checkpoint, serving, arguments(serving)),
                )
                if serving.speculative is None or not evidence.canary.ok or server.failed():
                    return evidence
                asked = _ask(context, plan, server)
        except UnhealthyError as error:
            context.progress(str(error))
            return load_test.write_unhealthy(str(error), plan, folder)
        context.progress("asking the same of a server without speculation")
        without = serving.model_copy(update={"speculative": None})
        with serve(arguments(without)) as server:
            found = compare(serving.speculative.method, serving.speculative.tokens, asked, _ask(context, plan, server))
        context.progress(str(found))
        return load_test.add_speculation(folder, evidence, found)


def _ask(context: StageContext, plan: load_test.LoadPlan, server: sandbox.Server) -> Asked:
    prompts = greedy.read_prompts(plan.prompts)
    return greedy.ask(server.url, context.spec.model, prompts, plan.request_timeout_s)


def _variant(context: StageContext) -> dict[str, str]:
    """A variant's configuration; the main one is in the image."""
    return {} if context.variant is None else {"serving": context.serving.document()}


def _requested(checkpoint: Artifact, serving: ServingConfiguration, arguments: tuple[str, ...]) -> Requested:
    """What the engine is asked to apply to a checkpoint; with a draft model a token's cache is that of both."""
    config = checkpoint.document("config.json")
    per_token = None
    with contextlib.suppress(PlanError):  # the planner does not know this architecture, so the size is unknown
        facts = read_facts(config)
        if not serving.drafts and all(layer.window is None for layer in facts.layers):
            per_token = facts.kv_bytes_per_token()
    return Requested(arguments=arguments, weight_only=is_weight_only(config), cache_bytes_per_token=per_token)


def _expected_memory(context: StageContext, record: ImageRecord, checkpoint: Artifact) -> ExpectedMemory | None:
    """What the server should take: on a CPU, which may hold float32 copies of weights, by its instruction set."""
    weights = stored(describe_folder(checkpoint.folder).model)
    size = weights.bytes if record.minimum_driver else weights.on_cpu(context.settings.cpu.instruction_set)
    if context.serving.drafts:
        size += sum(layer.size for layer in record.layers if is_draft_model(layer.holds))
    return expect(size, record.runtime, profiles.load(record.runtime).full_environment, context.serving.gpus)

"""Load tests outside of a release: of one release line, and of FP16 beside every scheme."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from containers.image.build import ImageRecord
from evals.load import load_test as loads
from evals.load.comparison import BASELINE, ComparedScheme, ComparisonRow
from evals.load.evidence import LoadEvidence, read_load_evidence
from evals.load.plan import Changes, LoadPlan
from evals.report import load_report
from evals.report.report import ReportEvidence
from pipeline.errors import SpecError
from pipeline.settings import Settings
from pipeline.spec import ModelSpec
from pipeline.spec import load as load_spec
from pipeline.stages import load
from pipeline.stages.context import StageContext
from pipeline.stages.image import record_of
from pipeline.stages.run import run, run_until
from pipeline.stages.table import IMAGE, LOAD, SOURCE
from pipeline.store.artifacts import Artifact
from registry.progress import Progress
from registry.suggestions import suggestion
from registry.verdict import Verdict


@dataclass(frozen=True)
class LoadTestResult:
    """A load test: its verdict, its evidence, its folder and its page."""

    name: str
    verdict: Verdict
    evidence: LoadEvidence
    folder: Path
    page: Path


def find(name: str, settings: Settings) -> tuple[ModelSpec, str]:
    """Return the model and the scheme of a release line, ``MODEL-SCHEME``; ``MODEL-fp16`` is the unquantized model.

    Raises:
        SpecError: no model file in the models folder has this line.
    """
    known = []
    for path in sorted(settings.models.glob("*.yaml")):
        spec = load_spec(path)
        for scheme in (*spec.schemes, BASELINE):
            if name == f"{spec.model}-{scheme}":
                return spec, scheme
            known.append(f"{spec.model}-{scheme}")
    raise SpecError(f"no model in {settings.models} has the release line `{name}`{suggestion(name, known)}")


def changed(plan: LoadPlan, profiles: Sequence[str], changes: Mapping[str, object]) -> LoadPlan:
    """Return a plan with other profiles, each as it comes, and with ``changes`` of the section's own keys.

    What the model's file changes of the profiles by name stays with those that it names; what it changes of all of them
    goes where one is asked for that it does not name, but for its limits, which stay for all. ``changes`` have the last
    word, over what the file says of one profile too; those of ``capacity`` leave the rest of that section as it is.
    """
    document = dict(plan)
    if not set(profiles) <= set(plan.profiles):
        document |= Changes().model_dump(exclude={"slo"})
    said = dict.fromkeys(changes.keys() & Changes.model_fields.keys())
    named = {name: plan.profiles.get(name, Changes()) for name in profiles or plan.profiles}
    document["profiles"] = {name: own.model_copy(update=said) for name, own in named.items()}
    search = changes.get("capacity")
    if isinstance(search, Mapping) and plan.capacity is not None:
        changes = {**changes, "capacity": {**plan.capacity.model_dump(), **search}}
    return LoadPlan.model_validate({**document, **changes})


def artifacts(context: StageContext) -> tuple[Artifact, Artifact]:
    """Return the checkpoint and its image, made where they are not there; for `fp16` those of the source itself."""
    if context.scheme_name != BASELINE:
        made = run_until("image", context)
        return made["quantized"], made["image"]
    source = run(SOURCE, context, {})
    return source, run(IMAGE, context, {"quantized": source})


def load_now(context: StageContext, plan: LoadPlan, live: loads.Live) -> LoadTestResult:
    """Measure one release line under a plan, now, whatever was measured before; keep it under ``loads`` of the home."""
    checkpoint, image = artifacts(context)
    return measure_now(context, plan, record_of(image), checkpoint, live)


def measure_now(
    context: StageContext, plan: LoadPlan, image: ImageRecord, checkpoint: Artifact, live: loads.Live
) -> LoadTestResult:
    """Measure an image with the checkpoint that is in it."""
    name = context.release_name
    folder = context.settings.home / "loads" / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="load-", dir=folder) as scratch:
        evidence = load.measure(context, plan, image, checkpoint, folder, Path(scratch), live)
    verdict = loads.judge(evidence, plan)
    page = folder / "load.html"
    seen = ReportEvidence.read(folder)
    load_report.write_page(page, name, verdict, evidence, seen.requests, seen.memory)
    return LoadTestResult(name, verdict, evidence, folder, page)


def compare(
    spec: ModelSpec,
    schemes: Sequence[str],
    plan: LoadPlan,
    settings: Settings,
    progress: Callable[[str], Progress],
    price_per_hour: float | None,
) -> tuple[list[ComparisonRow], dict[str, Verdict], Path]:
    """Measure FP16, each scheme and each of its variants under the same plan; return the table, verdicts and the page.

    What was measured under that very plan before is reused. ``progress`` gives each scheme its own listener.
    """
    planned = spec.model_copy(update={"load": plan})
    compared, verdicts = [], {}
    for scheme in (BASELINE, *schemes):
        context = StageContext(planned, scheme, settings, progress(scheme))
        checkpoint, image = artifacts(context)
        measured = run(LOAD, context, {"quantized": checkpoint, "image": image})
        compared.append(ComparedScheme(scheme, checkpoint.size_bytes, read_load_evidence(measured.folder)))
        verdicts[scheme] = loads.judge(compared[-1].load, plan)
        for variant in context.variants if scheme != BASELINE else ():
            own, name = replace(context, variant=variant), f"{scheme}, {variant}"
            measured = run(LOAD, own, {"quantized": checkpoint, "image": image})
            compared.append(ComparedScheme(name, checkpoint.size_bytes, read_load_evidence(measured.folder)))
            verdicts[name] = loads.judge(compared[-1].load, plan)
    page = settings.home / "reports" / f"{spec.model}-comparison.html"
    rows = load_report.write_comparison(page, spec.model, compared, verdicts, price_per_hour)
    return rows, verdicts, page


def price_per_hour(spec: ModelSpec) -> float | None:
    """What the machine costs an hour, as the model's `cost` section has it: rented, else owned."""
    if spec.cost is None:
        return None
    place = spec.cost.cloud or spec.cost.own
    return None if place is None else place.dollars_per_hour

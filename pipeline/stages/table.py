"""The stages of a release, in order: each names what determines its artifact, and makes it if it is not there.

Nothing here knows Dagster. A stage takes a `StageContext` and the artifacts it works on, and returns its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker

from containers.engine.engine import connect
from containers.errors import UnhealthyError
from containers.hardware import gpu_pool, machine_locks
from containers.hardware.core_pool import CoreRequest
from containers.hardware.cpu import InstructionSet
from containers.hardware.gpu import gpus
from containers.image import build as images
from containers.image import gpu_compatibility
from containers.image import profile as profiles
from containers.image.layout import has_layers, write_layout
from containers.sandbox import sandbox
from containers.scan import scan as scans
from containers.scan import scan_gate, trivy
from containers.scan.evidence import read_scan
from evals.drift import drift_gate as drifts
from evals.drift.pairs import read_drift
from evals.load import load_test as loads
from evals.load.expected_memory import Expected, expect
from pipeline.errors import PlanError
from pipeline.planner.facts import read_facts
from pipeline.planner.sources import describe_folder
from pipeline.planner.weights import stored
from pipeline.quantization import quantize as quantization
from pipeline.quantization.quantize import Scheme
from pipeline.resources import PACKAGES
from pipeline.settings import Settings
from pipeline.sources import source as sources
from pipeline.sources.lock import read_lock
from pipeline.spec import ModelSpec
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, Store, require_room, timed
from pipeline.store.shared import SharedStore
from pipeline.workers.environments import pins_digest
from pipeline.workers.launchers import configured as launchers
from pipeline.workers.runner import Bootstrap, Workers
from registry.digests import digest_file, digest_json, digest_of
from registry.file_locks import locked
from registry.progress import Progress
from registry.verdict import Verdict


@dataclass(frozen=True)
class StageContext:
    """What a stage works at: one model in one scheme, this machine's settings, and somebody who hears its progress.

    ``instruction_set`` is the CPU's on which answers are paired; None until `evaluation` has chosen it.
    """

    spec: ModelSpec
    scheme_name: str
    settings: Settings
    progress: Progress
    bootstrap: Bootstrap = lambda _: contextlib.nullcontext({})
    instruction_set: InstructionSet | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme that is being released."""
        return self.spec.scheme(self.scheme_name)

    @property
    def release_name(self) -> str:
        """The release line, as ``demo-awq``: what its image and its registered model are called."""
        return f"{self.spec.model}-{self.scheme_name}"

    @property
    def store(self) -> Store:
        """Where artifacts are."""
        root, floor, shared = self.settings.home / "artifacts", self.settings.disk_floor, self.settings.artifacts
        return Store(root, floor) if shared is None else SharedStore(root, floor, shared, self.progress)

    def workers(self, draft: ArtifactDraft) -> Workers:
        """Give the runner of workers whose seconds count for ``making``."""
        elsewhere = launchers.launcher(self.settings, self.progress)
        return Workers(self.settings, self.progress, draft.worker_seconds, self.bootstrap, elsewhere)

    def workers_here(self, draft: ArtifactDraft) -> Workers:
        """Give the runner of workers that ask a server of this machine, and so run beside it wherever others run."""
        return Workers(self.settings, self.progress, draft.worker_seconds, self.bootstrap)

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """Have what models run on, a GPU or this machine's cores, for one model: two at once may not fit.

        All homes of this machine share the lock. The kernel drops it however the process ends, which Dagster's pool,
        that queues whole runs, does not.
        """
        told = lambda: self.progress("waiting for the device, which another release of this machine uses")  # noqa: E731
        with machine_locks.locked(self.settings.locks, machine_locks.DEVICE, told):
            yield

    def worker_device(self) -> contextlib.AbstractContextManager[None]:
        """Have the device to oneself where workers run on it; elsewhere whoever runs them sees to that."""
        return self.device() if launchers.are_here(self.settings) else contextlib.nullcontext()

    def server_cores(self, count: float | None = None, *, with_client: bool = False) -> CoreRequest | None:
        """Say which cores a server of the model's runtime is to get; None where it computes on a GPU."""
        if profiles.load(self.spec.runtime).minimum_driver is not None:
            return None
        return CoreRequest(self.settings.locks, None if count is None else math.ceil(count), with_client)

    @contextlib.contextmanager
    def cores(self, *, alone: bool = False) -> Iterator[None]:
        """Use this machine's cores for heavy work that runs no model, or have them ``alone`` to time one.

        All homes of this machine share the lock. Answers are the same beside other work and latencies are not, unless
        a GPU gives them.
        """
        if gpus():
            yield
            return
        told = lambda: self.progress("waiting for the cores, which other work of this machine uses")  # noqa: E731
        with machine_locks.locked(self.settings.locks, machine_locks.CORES, told, shared=not alone):
            yield

    def has_image(self, record: images.ImageRecord) -> bool:
        """Whether the engine has an image that was built, or can pull it, and the home has its layers."""
        with self.engine() as client:
            return images.find(client, record) is not None and has_layers(record, self.settings.home)

    def verdict(self, gate: str, evidence: Artifact) -> Verdict:
        """Judge a gate's evidence against the model's limits, as they are now."""
        return verdict(gate, evidence, self.spec)

    @contextlib.contextmanager
    def engine(self) -> Iterator[docker.DockerClient]:
        """Connect to the container engine.

        Raises:
            EngineError: none answers.
        """
        client = connect(self.settings.docker_host, self.settings.home)
        try:
            yield client
        finally:
            client.close()


def code_of(*names: str) -> str:
    """Digest of the files and folders that implement a stage: what they say, so that a changed stage runs again."""
    files = [path for name in names for path in _python_files(PACKAGES / name)]
    return digest_json({path.relative_to(PACKAGES).as_posix(): digest_file(path) for path in files})


def _python_files(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(path for path in place.rglob("*") if path.suffix in {".py", ".yaml", ".j2"})
    return [place]


CODE: Mapping[str, str] = {
    "source": code_of(
        *(
            "pipeline/sources/source.py",
            "pipeline/sources/lock.py",
            "pipeline/sources/hub.py",
            "pipeline/compatibility/safetensors_headers.py",
        ),
        "registry/bounded_json.py",
    ),
    "quantized": code_of(
        *(
            "pipeline/quantization/quantize.py",
            "pipeline/quantization/checkpoint.py",
            "pipeline/compatibility/safetensors_headers.py",
        ),
        *("pipeline/compatibility/description.py", "pipeline/compatibility/backends.py", "registry/bounded_json.py"),
        "evals/drift/json_lines.py",
    ),
    "answers": code_of(
        *(
            "evals/drift/asking.py",
            "evals/drift/answer.py",
            "evals/drift/items.py",
            "evals/drift/served.py",
            "evals/drift/checkpoints.py",
        ),
        *("evals/drift/packed.py", "evals/drift/overlap.py", "evals/drift/tasks", "evals/drift/json_lines.py"),
    ),
    "layers": code_of(
        "evals/drift/layers.py", "evals/drift/checkpoints.py", "evals/drift/packed.py", "evals/drift/json_lines.py"
    ),
    "drift": code_of(
        "evals/drift/pairs.py", "evals/drift/divergence.py", "evals/drift/overlap.py", "containers/sandbox/kernels.py"
    ),
    "image": code_of(
        *(
            "containers/image/build.py",
            "containers/image/runtime.py",
            "containers/image/base.py",
            "containers/image/packages.py",
        ),
        "containers/image/pulled.py",
        *("containers/image/layers.py", "containers/image/oci.py", "containers/image/assembly.py"),
    ),
    "scan": code_of(
        *(
            "containers/scan/scan.py",
            "containers/scan/evidence.py",
            "containers/scan/trivy.py",
            "containers/scan/trivy_db.py",
            "containers/image/layout.py",
        ),
    ),
    "load": code_of(
        *(
            "evals/load/load_test.py",
            "evals/load/plan.py",
            "evals/load/measurements.py",
            "evals/load/traffic",
            "evals/load/capacity.py",
        ),
        *(
            "evals/load/faults.py",
            "evals/load/slo.py",
            "evals/statistics/trend.py",
            "evals/load/engine_metrics.py",
            "evals/load/expected_memory.py",
        ),
        *(
            "containers/sandbox/sandbox.py",
            "containers/sandbox/container.py",
            "containers/sandbox/failure.py",
            "containers/sandbox/engine_log.py",
            "containers/sandbox/isolation.py",
            "containers/sandbox/memory.py",
        ),
        *(
            "containers/hardware/core_pool.py",
            "containers/hardware/cpu.py",
            "containers/sandbox/kernels.py",
            "pipeline/planner/weights.py",
        ),
    ),
    "release": code_of(
        *("pipeline/stages/promotion.py", "registry/seal.py", "registry/manifest.py", "registry/sigstore_bundle.py"),
        *("registry/provenance.py", "registry/signing.py", "containers/sandbox/kernels.py"),
        *(
            "evals/report/report.py",
            "evals/report/pictures.py",
            "evals/report/drift_pictures.py",
            "evals/report/svg.py",
            "evals/report/templates",
        ),
        *(
            "evals/load/cost.py",
            "evals/report/cost_pictures.py",
            "evals/report/load_report.py",
            "evals/report/load_pictures.py",
        ),
    ),
}


def source_recipe(resolved: sources.ResolvedSource) -> Recipe:
    """What determines the artifact of a resolved source."""
    return Recipe(
        "source", inputs={}, parameters={"uri": resolved.uri, "content": resolved.fingerprint}, code=CODE["source"]
    )


def source(bench: StageContext) -> Artifact:
    """Pull the model's weights at their pinned revision, every file checked, and hold them to the lock."""
    settings, wanted = bench.settings, bench.spec.source
    resolved = sources.resolve(
        wanted.uri,
        wanted.revision,
        endpoint=settings.hub_endpoint,
        token=settings.hub_token,
        lock=read_lock(bench.spec.lock),
        memory=settings.home / sources.DIGESTS,
    )
    recipe = source_recipe(resolved)

    def make(draft: ArtifactDraft) -> None:
        require_room(settings.home, resolved.bytes, settings.disk_floor, f"{resolved.uri} (its weights)")
        draft.sha256.update(
            sources.pull(resolved, draft.folder, settings.home / "downloads", bench.progress),
        )
        draft.notes["revision"] = sources.revision_of(resolved, draft.sha256)

    pulled = bench.store.obtain(recipe, make)
    sources.hold_to_lock(bench.spec.lock, resolved, sha256_of(pulled))
    return pulled


def quantized(bench: StageContext, source: Artifact) -> Artifact:
    """Make the weights small, and check the result without the quantizer's help."""
    calibration, scheme = bench.spec.calibration, bench.scheme
    backend = quantization.backend_of(scheme)
    recipe = Recipe(
        "quantized",
        inputs={"source": source.digest, "calibration": f"sha256:{digest_file(calibration.uri)}"},
        parameters={
            **scheme.model_dump(mode="json"),
            "samples": calibration.samples,
            "max_tokens": calibration.max_tokens,
            "cuda": launchers.have_gpus(bench.settings),
        },
        code=digest_json([CODE["quantized"], *map(digest_file, backend.code)]),
        pins=pins_digest(backend.environment),
    )

    def make(draft: ArtifactDraft) -> None:
        with bench.worker_device():
            record = quantization.quantize(
                source.folder,
                calibration.uri,
                calibration.samples,
                calibration.max_tokens,
                scheme,
                draft.folder,
                bench.workers(draft),
                draft.scratch,
                bench.progress,
            )
        draft.notes.update(record, pins_digest=recipe.pins)

    return bench.store.obtain(recipe, make)


def image(bench: StageContext, quantized: Artifact) -> Artifact:
    """Put the checkpoint into its pinned runtime; push the image where a registry is configured."""
    profile = profiles.load(bench.spec.runtime)
    name, labels = bench.release_name, _image_labels(bench, quantized)
    recipe = Recipe(
        "image",
        inputs={"quantized": quantized.digest},
        parameters={
            "name": name,
            "runtime": profile.name,
            "registry": bench.settings.image_registry,
            "labels": labels,
        },
        code=CODE["image"],
        pins=profile.pins_digest(),
    )

    def make(draft: ArtifactDraft) -> None:
        alone = locked(bench.settings.home / "image.lock")
        with bench.cores(), bench.engine() as client, alone, timed(draft.worker_seconds):
            record = images.build_image(
                client,
                profile,
                quantized.folder,
                name=name,
                served_name=bench.spec.model,
                model_digest=quantized.digest,
                home=bench.settings.home,
                progress=bench.progress,
                registry=bench.settings.image_registry,
                sha256=sha256_of(quantized),
                labels=labels,
            )
        (draft.folder / "image.json").write_text(record.model_dump_json(indent=1))

    found = bench.store.find(recipe.stage, recipe.key)
    if found and not bench.has_image(_record(found)):
        bench.progress("the engine or the home has lost layers of this image: building it again")
        bench.store.forget(recipe)
    return bench.store.obtain(recipe, make)


def scan(bench: StageContext, image: Artifact, quantized: Artifact) -> Artifact:
    """Look for known holes, secrets and misconfiguration in that very image."""
    home, record = bench.settings.home, _record(image)
    recipe = Recipe(
        "scan",
        inputs={"image": image.digest},
        parameters=scans.scan_key(record.image_id, trivy.database(home)),
        code=CODE["scan"],
    )

    def make(draft: ArtifactDraft) -> None:
        laid_out = draft.scratch / record.tag.partition(":")[2]
        with bench.cores(), timed(draft.worker_seconds):
            write_layout(record, quantized.folder, sha256_of(quantized), home, laid_out)
            purl = f"pkg:oci/{bench.release_name}@{record.digest}"
            subject = scans.in_layout(laid_out, digest_of(record.configuration.encode()), purl)
            scans.scan(subject, home=home, folder=draft.folder, progress=bench.progress)

    scanned = bench.store.obtain(recipe, make)
    for line in scan_gate.warnings(read_scan(scanned.folder), bench.spec.scan):
        bench.progress(f"warning: {line}")
    return scanned


def load(bench: StageContext, image: Artifact, quantized: Artifact, *, again: bool = False) -> Artifact:
    """Put that very image under the traffic it will meet; ``again``, where it was before."""
    plan = bench.spec.load
    record = _record(image)
    recipe = Recipe(
        "load",
        inputs={"image": image.digest, "quantized": quantized.digest},
        parameters={**loads.load_key(plan), "prompts": digest_file(plan.prompts)},
        code=CODE["load"],
        pins=pins_digest("aiperf"),
    )

    def make(draft: ArtifactDraft) -> None:
        with timed(draft.worker_seconds):  # the container's start and its traffic are the server's own time
            load_test(bench, plan, record, quantized, draft.folder, draft.scratch)

    found = bench.store.find(recipe.stage, recipe.key)
    if found and (again or not loads.is_conclusive(found.document("load.json"), plan)):
        bench.progress("measuring again, as asked" if again else "the last load test told nothing for sure: again")
        bench.store.forget(recipe)
    return bench.store.obtain(recipe, make)


def load_test(
    bench: StageContext,
    plan: loads.LoadPlan,
    record: images.ImageRecord,
    quantized: Artifact,
    folder: Path,
    scratch: Path,
    live: loads.Live = lambda _: None,
) -> Mapping[str, Any]:
    """Serve an image in the sandbox, on a GPU of its own where it needs one, and measure it under a plan's traffic.

    A server that never gets healthy is evidence like any other: the gate fails it, the stage does not. An image that
    needs a GPU is not started where there is none: that is inconclusive.
    """
    with (
        bench.device(),
        bench.cores(alone=True),
        gpu_pool.reserved(bench.progress, bench.settings.locks)
        if record.minimum_driver
        else contextlib.nullcontext() as gpu,
    ):
        if record.minimum_driver and gpu is None:
            return loads.write_without_gpu(plan, folder)
        try:
            with (
                bench.engine() as client,
                sandbox.serve(
                    client,
                    record.image_id,
                    name=f"slipway-{bench.release_name}",
                    home=bench.settings.home,
                    memory_bytes=plan.memory.limit_bytes,
                    cpus=plan.cpus,
                    gpu=None if gpu is None else gpu.uuid,
                    cores=bench.server_cores(plan.cpus, with_client=True),
                    cpu_limit=bench.settings.cpu_limit,
                    start_timeout_s=plan.start_timeout_s,
                    lifetime_s=plan.lifetime_s,
                    labels={sandbox.STAGE_LABEL: "load"},
                    progress=bench.progress,
                ) as server,
            ):
                return loads.measure(
                    server,
                    plan,
                    tokenizer=quantized.folder,
                    folder=folder,
                    scratch=scratch,
                    run_worker=Workers(bench.settings, bench.progress, bootstrap=bench.bootstrap),
                    progress=bench.progress,
                    live=live,
                    expected=_expected_memory(bench, record, quantized),
                )
        except UnhealthyError as error:
            bench.progress(str(error))
            return loads.write_unhealthy(str(error), plan, folder)


def _expected_memory(bench: StageContext, record: images.ImageRecord, quantized: Artifact) -> Expected | None:
    """What the server should take: on a CPU, which may hold float32 copies of weights, by its instruction set."""
    weights = stored(describe_folder(quantized.folder).model)
    size = weights.bytes if record.minimum_driver else weights.on_cpu(bench.settings.cpu.instruction_set)
    return expect(size, record.runtime, profiles.load(record.runtime).full_environment)


def verdict(gate: str, evidence: Artifact, spec: ModelSpec) -> Verdict:
    """Judge a gate's evidence against the model's limits, as they are now."""
    if gate == drifts.GATE:
        return drifts.judge(read_drift(evidence.folder), spec.evals)
    if gate == "scan":
        return scan_gate.judge(read_scan(evidence.folder), spec.scan)
    return loads.judge(evidence.document("load.json"), spec.load)


def _image_labels(bench: StageContext, quantized: Artifact) -> dict[str, str]:
    """Where the model is from, and what one request's cache takes: what the driver's gate and a registry's user ask."""
    config = quantized.document("config.json")
    source = bench.spec.source
    uri = f"file:{Path(source.uri).name}" if source.uri.startswith("file:") else source.uri
    labels = {"org.opencontainers.image.source": uri}
    lock = read_lock(bench.spec.lock)
    revision = source.revision if lock is None else lock.revision  # the commit, whatever branch the model's file names
    if revision:
        labels["org.opencontainers.image.revision"] = revision
    if bench.spec.license:
        labels["org.opencontainers.image.licenses"] = bench.spec.license
    context = images.served_context(config)
    if context is not None:
        with contextlib.suppress(PlanError):  # a model that the planner does not know: its cache is not foreseen
            labels[gpu_compatibility.CACHE_BYTES] = str(read_facts(config).kv_bytes(context))
    return labels


def sha256_of(made: Artifact) -> dict[str, str]:
    """The digest of every file of an artifact, by its path in it."""
    return {name: entry["sha256"] for name, entry in made.files.items()}


def _record(image: Artifact) -> images.ImageRecord:
    return images.ImageRecord.model_validate(image.document("image.json"))

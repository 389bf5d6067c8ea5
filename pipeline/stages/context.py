"""What a stage works with: one model in one scheme, this machine's settings, and what was looked up for its recipe."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import docker

from containers.engine.engine import connect
from containers.hardware import gpu_pool, machine_locks
from containers.hardware.core_pool import CoreRequest
from containers.hardware.cpu import InstructionSet
from containers.hardware.gpu import gpus
from containers.image import profile as profiles
from containers.image.build import ImageRecord, find, serving_arguments
from containers.image.layout import has_layers
from containers.image.serving import ServedAdapter, ServingConfiguration
from containers.scan.trivy_db import Database
from evals.drift.limits import DriftLimits
from pipeline.compatibility.description import has_experts
from pipeline.compatibility.scheme import PublishedScheme, Scheme
from pipeline.settings import Settings
from pipeline.sources.source import ResolvedSource
from pipeline.spec import Calibration, ModelSpec
from pipeline.store.artifacts import Artifact, ArtifactDraft, Store
from pipeline.store.shared import SharedStore
from pipeline.workers.launchers import configured as launchers
from pipeline.workers.runner import Bootstrap, Workers
from registry.progress import Progress
from registry.signing import SigningKey
from registry.verdict import Verdict

T = TypeVar("T")


@dataclass(frozen=True)
class StageContext:
    """What a stage works with. The fields from ``instruction_set`` on are filled in by `Stage.prepare`."""

    spec: ModelSpec
    scheme_name: str
    settings: Settings
    progress: Progress
    bootstrap: Bootstrap = lambda _: contextlib.nullcontext({})
    variant: str | None = None
    """The serving variant that is tested; None for the main configuration."""
    dry: bool = False
    """Whether this is a dry run: artifacts are looked up, and nothing is made or written."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set to end the workers of stages that run beside each other."""
    instruction_set: InstructionSet | None = None
    """The CPU's on which FP16 and the candidate answer; None where no CPU of ours computes the answers."""
    source: ResolvedSource | None = None
    merged_adapter: ResolvedSource | None = None
    """The adapter that is merged into the source, if there is one."""
    published: ResolvedSource | None = None
    """The source that is taken as it is, where its original is another one."""
    published_scheme: PublishedScheme | None = None
    """The scheme that such a source follows, where the stage takes it."""
    adapters: Mapping[str, ResolvedSource] = field(default_factory=dict)
    served_adapters: Mapping[str, ServedAdapter] = field(default_factory=dict)
    """The adapters that were pulled, where the stage takes them."""
    draft_model: ResolvedSource | None = None
    """The model that drafts tokens, if one does."""
    database: Database | None = None
    """The vulnerability database that a scan uses."""
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """Each gate's verdict, by stage: a scan's depends on the day."""
    key: SigningKey | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme that is being released."""
        return self.published_scheme or self.spec.scheme(self.scheme_name)

    @property
    def calibration(self) -> Calibration | None:
        """The text that the scheme is calibrated with; None if it needs none."""
        return self.spec.calibration if self.scheme.needs_calibration else None

    @property
    def serving(self) -> ServingConfiguration:
        """How the release is served, as the model file says it."""
        scheme = self.scheme_name if self.scheme_name in self.spec.schemes else None  # FP16 is load-tested too
        return self.serving_of(scheme)

    def serving_of(self, scheme: str | None) -> ServingConfiguration:
        """How a scheme is served, with the adapters that were pulled; without one, what holds for all schemes."""
        return self.spec.serving(scheme, self.variant).model_copy(update={"adapters": self.served_adapters})

    @property
    def evals(self) -> DriftLimits:
        """The questions and their limits; where tool calls are served, our own requests for them among them."""
        return self.spec.evals.with_tool_calls() if self.serving.tool_calls else self.spec.evals

    def unsupported_of(self, checkpoint: Artifact) -> str | None:
        """Say what this CPU lacks of what a checkpoint in the configuration needs; None if nothing."""
        return self.unsupported(experts=has_experts(checkpoint.document("config.json")))

    def unsupported(self, *, experts: bool) -> str | None:
        """Say what this CPU lacks of what the configuration needs, with routed ``experts`` or without."""
        if profiles.load(self.spec.runtime).minimum_driver is not None or not self.settings.engine_is_here:
            return None
        isa = self.settings.cpu.instruction_set
        return self.scheme.unsupported(isa, experts=experts) or self.serving.unsupported(isa)

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the serving variants, in the order of the model file."""
        return tuple(self.spec.serve.variants)

    def variant_command(self, checkpoint: Artifact) -> tuple[str, ...] | None:
        """Return a variant's arguments in place of the image's own; None for the main configuration."""
        if self.variant is None:
            return None
        return serving_arguments(profiles.load(self.spec.runtime), checkpoint.folder, self.spec.model, self.serving)

    @property
    def release_name(self) -> str:
        """The release line, such as ``demo-awq``: the name of its image and of its registered model."""
        return f"{self.spec.model}-{self.scheme_name}"

    @property
    def store(self) -> Store:
        """Where artifacts are."""
        root, floor, shared = self.settings.home / "artifacts", self.settings.disk_floor, self.settings.artifacts
        return Store(root, floor) if shared is None else SharedStore(root, floor, shared, self.progress)

    def workers(self, draft: ArtifactDraft) -> Workers:
        """Return what runs workers wherever they are configured to run; their seconds count for ``draft``."""
        elsewhere = launchers.launcher(self.settings, self.progress)
        return self._workers(Workers(self.settings, self.progress, draft.worker_seconds, self.bootstrap, elsewhere))

    def local_workers(self, draft: ArtifactDraft) -> Workers:
        """Return what runs workers on this machine, beside the server that they ask; otherwise like `workers`."""
        return self._workers(Workers(self.settings, self.progress, draft.worker_seconds, self.bootstrap))

    def _workers(self, workers: Workers) -> Workers:
        workers.stop = self.stop
        return workers

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """Have the GPU, or this machine's cores, for one model: two models may not fit.

        All homes of this machine share the lock. The kernel drops it when the process ends, whatever ends it. Dagster's
        pool does not: it queues whole runs.
        """
        waiting = lambda: self.progress("waiting for the device, which another release of this machine uses")  # noqa: E731
        with machine_locks.locked(self.settings.locks, machine_locks.DEVICE, waiting):
            yield

    def worker_device(self) -> contextlib.AbstractContextManager[None]:
        """Have the device where workers run on it; whatever runs them elsewhere has its own queue."""
        return self.device() if launchers.are_here(self.settings) else contextlib.nullcontext()

    def server_cores(
        self, count: float | None = None, *, with_client: bool = False, ranks: int = 1
    ) -> CoreRequest | None:
        """Return which cores a server of the model's runtime asks for; None where it computes on GPUs."""
        if profiles.load(self.spec.runtime).minimum_driver is not None:
            return None
        return CoreRequest(self.settings.locks, None if count is None else math.ceil(count), with_client, ranks)

    @contextlib.contextmanager
    def gpus(self, ranks: int) -> Iterator[tuple[str, ...]]:
        """Reserve a GPU for each of a server's ranks, by UUID; none for a runtime that computes on a CPU.

        On a machine without GPUs there are none to reserve.

        Raises:
            GpuPoolError: the machine has fewer, or one has disappeared.
        """
        if profiles.load(self.spec.runtime).minimum_driver is None:
            yield ()
            return
        with gpu_pool.reserved(ranks, self.progress, self.settings.locks) as found:
            yield tuple(gpu.uuid for gpu in found)

    @contextlib.contextmanager
    def cores(self, *, alone: bool = False) -> Iterator[None]:
        """Use this machine's cores for heavy work without a model, or have them ``alone`` to measure a model's speed.

        All homes of this machine share the lock. Other work does not change answers, but it changes latencies, unless
        a GPU computes.
        """
        if gpus():
            yield
            return
        waiting = lambda: self.progress("waiting for the cores, which other work of this machine uses")  # noqa: E731
        with machine_locks.locked(self.settings.locks, machine_locks.CORES, waiting, shared=not alone):
            yield

    def has_image(self, record: ImageRecord) -> bool:
        """Whether the engine has an image that was built, or can pull it, and the home has its layers.

        A dry run pulls nothing: an image that was pushed counts as there. `promotion.already_promoted` asks its
        registry; automation (`affected.InputsDryRun`) asks neither engine nor registry.
        """
        if not has_layers(record, self.settings.home):
            return False
        if self.dry and record.pushed:
            return True
        with self.engine() as client:
            return find(client, record) is not None

    @contextlib.contextmanager
    def engine(self) -> Iterator[docker.DockerClient]:
        """Connect to the container engine.

        Raises:
            EngineError: no engine answers.
        """
        client = connect(self.settings.docker_host, self.settings.home)
        try:
            yield client
        finally:
            client.close()


def prepared(fact: T | None) -> T:
    """Return what `Stage.prepare` has put into a context.

    Raises:
        RuntimeError: it has not been called.
    """
    if fact is None:
        raise RuntimeError("the recipe needs a context that `Stage.prepare` has returned")
    return fact

"""How one stage's artifact reaches the next: by name and key, never by copy."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from dagster import DagsterInstance, Failure, InitResourceContext, InputContext, IOManager, OutputContext, io_manager

from pipeline.orchestration.instance import alive
from pipeline.settings import Settings
from pipeline.store.artifacts import Artifact, Store
from pipeline.store.materializations import MaterializationIndex


class ArtifactHandles(IOManager):
    """Keeps, for every asset and partition, which artifact it last produced."""

    def __init__(self, settings: Settings) -> None:
        """Use the home's handles; the artifacts are its store's."""
        self.handles = MaterializationIndex(settings)
        self.store = Store(settings.home / "artifacts")

    def handle_output(self, context: OutputContext, obj: Artifact) -> None:
        """Note which artifact this asset's partition is."""
        self.handles.write(context.asset_key.to_user_string(), context.partition_key, (obj.stage, obj.key))

    def load_input(self, context: InputContext) -> Artifact:
        """Open the artifact that the upstream asset's partition is."""
        name = context.asset_key.to_user_string()
        place = self.handles.read(name, context.partition_key)
        if place is None:
            raise Failure(f"`{name}` has not been made for {context.partition_key}: materialize it first")
        artifact = self.store.find(*place)
        if artifact is None:
            raise Failure(f"`{name}` of {context.partition_key} was removed from the store: materialize it again")
        return artifact


@io_manager(required_resource_keys={"settings"})  # type: ignore[arg-type]  # a generator ends too
def handles_of_run(context: InitResourceContext) -> Iterator[ArtifactHandles]:
    """Give a run this home's index of materializations; meanwhile its process is marked as the one that executes it.

    So a run of the UI whose process was killed is marked as failed like one of the command line, and frees the queue.
    """
    settings = context.resources.settings
    with (
        alive(context.run_id, settings) if context.run_id else contextlib.nullcontext(),
        partitions_stand(context.instance) if context.instance else contextlib.nullcontext(),
    ):
        yield ArtifactHandles(settings)


@contextlib.contextmanager
def partitions_stand(instance: DagsterInstance) -> Iterator[None]:
    """Look a partition up once: Dagster does at each input, output and event of a run, which is hundreds of queries."""
    instance.has_dynamic_partition = functools.cache(instance.has_dynamic_partition)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del instance.has_dynamic_partition  # and so it is the class's again

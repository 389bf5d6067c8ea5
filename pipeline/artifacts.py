"""How one stage's artifact reaches the next: by name and key, never by copy."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path

from dagster import DagsterInstance, Failure, InitResourceContext, InputContext, IOManager, OutputContext, io_manager

from pipeline.instance import alive
from pipeline.store import Artifact, Store, write_whole


class ArtifactHandles(IOManager):
    """Keeps, for every asset and partition, which artifact it last produced."""

    def __init__(self, folder: Path, store: Store) -> None:
        """Keep the handles in ``folder``; the artifacts are the store's."""
        self.folder = folder
        self.store = store

    def handle_output(self, context: OutputContext, obj: Artifact) -> None:
        """Note which artifact this asset's partition is."""
        handle = self._handle(context)
        handle.parent.mkdir(parents=True, exist_ok=True)
        write_whole(handle, json.dumps({"stage": obj.stage, "key": obj.key}))

    def load_input(self, context: InputContext) -> Artifact:
        """Open the artifact that the upstream asset's partition is."""
        handle = self._handle(context)
        name = context.asset_key.to_user_string()
        if not handle.exists():
            raise Failure(f"`{name}` has not been made for {context.partition_key}: materialize it first")
        artifact = self.store.find(**json.loads(handle.read_text()))
        if artifact is None:
            raise Failure(f"`{name}` of {context.partition_key} was removed from the store: materialize it again")
        return artifact

    def _handle(self, context: InputContext | OutputContext) -> Path:
        return self.folder / context.asset_key.to_user_string() / f"{context.partition_key.replace('|', '@')}.json"


@io_manager(required_resource_keys={"settings"})  # type: ignore[arg-type]  # a generator ends too
def handles_of_run(context: InitResourceContext) -> Iterator[ArtifactHandles]:
    """Give a run this home's handles; while it has them, its process is known to carry the run, whoever started it.

    So a run of the UI that was killed is buried as one of the command line is, and does not keep the queue waiting.
    """
    settings = context.resources.settings
    with (
        alive(context.run_id, settings) if context.run_id else contextlib.nullcontext(),
        partitions_stand(context.instance) if context.instance else contextlib.nullcontext(),
    ):
        yield ArtifactHandles(settings.home / "dagster" / "handles", Store(settings.home / "artifacts"))


@contextlib.contextmanager
def partitions_stand(instance: DagsterInstance) -> Iterator[None]:
    """Look a partition up once: Dagster does at each input, output and event of a run, which is hundreds of queries."""
    instance.has_dynamic_partition = functools.cache(instance.has_dynamic_partition)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del instance.has_dynamic_partition  # and so it is the class's again

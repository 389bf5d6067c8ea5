"""What a run is of: one model in one scheme."""

from __future__ import annotations

from dagster import (
    AssetCheckExecutionContext,
    AssetExecutionContext,
    DagsterInstance,
    DynamicPartitionsDefinition,
    MultiPartitionsDefinition,
    OpExecutionContext,
)
from sqlalchemy.exc import IntegrityError

from pipeline.settings import Settings
from pipeline.spec import ModelSpec, find, load

RELEASES = MultiPartitionsDefinition(
    {"model": DynamicPartitionsDefinition(name="model"), "scheme": DynamicPartitionsDefinition(name="scheme")}
)
# A run of a model whose file is not in the models folder says here where it is.
MODEL_FILE_TAG = "slipway/model_file"


def add_partitions(instance: DagsterInstance, spec: ModelSpec) -> None:
    """Make a model and its schemes known to the instance, also where another process does the same at once."""
    for dimension, keys in (("model", [spec.model]), ("scheme", list(spec.schemes))):
        try:
            instance.add_dynamic_partitions(dimension, keys)
        except IntegrityError:  # added by another between Dagster's look and its insert: a second look finds it
            instance.add_dynamic_partitions(dimension, keys)


def spec_of(
    context: AssetExecutionContext | AssetCheckExecutionContext | OpExecutionContext, settings: Settings
) -> tuple[ModelSpec, str]:
    """Return the model's file and the scheme that a run is of.

    Raises:
        SpecError: the model's file is gone or wrong, or has no such scheme.
    """
    keys = context.multi_partition_key.keys_by_dimension
    spec = load(find(context.run.tags.get(MODEL_FILE_TAG) or keys["model"], settings.models))
    spec.scheme(keys["scheme"])
    return spec, keys["scheme"]

"""The plan as a document, which ``slipway plan --json`` prints. Sizes are bytes; ``gpus`` are those of a replica."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from evals.load.expected_memory import MemoryPrediction

SCHEMA: Literal["slipway/plan/2"] = "slipway/plan/2"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class PlannedDrafting(_Part):
    """What the model takes that drafts tokens: weights, and the cache of a token at 16 bits; and its files' size."""

    weights_bytes: int
    cache_bytes_per_token: int
    download_bytes: int


class PlannedWorkload(_Part):
    """What is served: ``concurrency`` requests at once of ``context`` tokens each, prompt and answer together.

    ``tensor_parallel`` is None if the plan proposes it; ``headroom`` is the share of a GPU that stays free.
    """

    context: int
    concurrency: int
    kv_number_bytes: int
    headroom: float
    tensor_parallel: int | None
    pipeline_parallel: int
    batched_tokens: int | None
    max_sequences: int | None
    drafting: PlannedDrafting | None


class BytesPerGpu(_Part):
    """What each GPU must hold, and what may be used of it."""

    weights: int
    kv_cache: int
    activations: int
    context: int
    total: int
    usable: int


class SpeedBounds(_Part):
    """Tokens a second at most: of one request alone, of all together, and of prompts; and what bounds the second."""

    one_request: float
    all_requests: float
    prompt: float
    bound: str


class PlannedPlacement(_Part):
    """A scheme on one kind of GPU.

    ``cache_bytes`` is the memory of one replica that is left for its KV cache, ``most_requests`` how many requests of
    the workload's context that holds, and ``longest_context`` the longest context of which it holds the workload's
    concurrent requests; None if it holds none.
    """

    gpu: str
    gpus: int
    tensor_parallel: int
    pipeline_parallel: int
    fits: bool
    bytes_per_gpu: BytesPerGpu
    cache_bytes: int
    most_requests: int
    longest_context: int | None
    tokens_per_second_at_most: SpeedBounds
    dollars_per_hour: float | None
    dollars_per_million_tokens_at_least: float | None
    price_source: tuple[str, str] | None


class PlannedScheme(_Part):
    """A scheme: its weights, and the GPUs that hold them under its workload."""

    scheme: str
    weights_bytes: int
    weights_bytes_on_cpu: Mapping[str, int]
    bits_per_weight: float
    parameters: int
    workload: PlannedWorkload
    gpus: tuple[PlannedPlacement, ...]


class MeasuredRelease(_Part):
    """What the load test of a release measured of what its plan predicts."""

    peak_memory_bytes: float | None
    peak: Mapping[str, int | None]
    expected: MemoryPrediction | None
    output_tokens_per_second: float | None
    requests_per_second: float | None
    at_capacity: bool


class EvaluatedTask(_Part):
    """A task of the evaluation: its size, the loss that it allows, and the losses that it detects with 80% power.

    ``detectable`` is by the share of answers that change; of a text it is one loss.
    """

    name: str
    tier: str
    kind: str
    items: int
    groups: int
    tokens: int
    limit: float
    detectable: Mapping[str, float] | float
    items_wanted: int
    can_decide: bool


class PlannedEvaluation(_Part):
    """The evaluation of a model: its tasks, and their tokens for each model that is asked."""

    suite: str
    digest: str
    engine: str
    confidence: float
    power: float
    items: int
    tokens: int
    tasks: tuple[EvaluatedTask, ...]


class PlanDocument(_Part):
    """A model's plan.

    ``download_bytes`` is what is pulled, ``disk_bytes`` what its releases take here. ``refused`` has the schemes that
    can't be made of this model or served as its file says, with the reasons.
    """

    schema_: Annotated[Literal["slipway/plan/2"], Field(alias="schema")] = SCHEMA
    model: str
    architecture: str
    attention: str
    layers: int
    longest_context: int
    workload: PlannedWorkload
    kv_bytes_per_token: int
    kv_bytes_per_request: int
    download_bytes: int
    disk_bytes: int
    schemes: tuple[PlannedScheme, ...]
    refused: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    measured: MeasuredRelease | None = None
    evaluation: PlannedEvaluation | None = None

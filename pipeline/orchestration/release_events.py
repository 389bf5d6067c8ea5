"""What a release's run tells the command line, one JSON object a line, and the document of `slipway release --json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pipeline.stages.metadata import GateResult, ReleasedVersion
from registry.verdict import Status

Outcome = Literal["promoted", "up-to-date", "refused", "failed"]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageStarted(_Document):
    """A stage starts."""

    event: Literal["start"] = "start"
    stage: str


class StageProgress(_Document):
    """A line of a stage's progress."""

    event: Literal["progress"] = "progress"
    stage: str
    text: str


class StageDone(_Document):
    """A stage has its artifact; ``cached`` if it existed already. `release` has the promoted version too."""

    event: Literal["stage"] = "stage"
    name: str
    seconds: float
    cached: bool
    worker_seconds: float
    size_bytes: int = 0
    release: ReleasedVersion | None = None


class GateJudged(GateResult):
    """A gate has judged."""

    event: Literal["gate"] = "gate"


class RunEnded(_Document):
    """The run has ended; ``release`` where it promoted, ``error`` where it did not."""

    event: Literal["end"] = "end"
    outcome: Outcome
    release: ReleasedVersion | None = None
    error: str | None = None


RunEvent = Annotated[StageStarted | StageProgress | StageDone | GateJudged | RunEnded, Field(discriminator="event")]
RUN_EVENT: TypeAdapter[RunEvent] = TypeAdapter(RunEvent)


class StageTiming(_Document):
    """How long a stage took."""

    name: str
    seconds: float
    cached: bool
    worker_seconds: float


class GateSummary(_Document):
    """A gate's verdict, and whether it stops the release."""

    name: str
    status: Status
    reason: str
    blocks: bool


class SchemeResult(_Document):
    """The outcome of releasing one scheme; what there is of a version only if it was promoted or is up to date."""

    scheme: str
    outcome: Outcome
    version: str | None
    aliases: tuple[str, ...]
    manifest_digest: str | None
    image: str | None
    stages: tuple[StageTiming, ...]
    gates: tuple[GateSummary, ...]
    measured: Mapping[str, float]
    variants: Mapping[str, str] = {}
    weights: Mapping[str, str] = {}
    error: str | None


class ReleaseResult(_Document):
    """What `slipway release --json` prints."""

    model: str
    seconds: float
    releases: tuple[SchemeResult, ...]

"""A traffic profile: the lengths of prompts and answers, how requests arrive, and the service level.

``evals/load/traffic/*.yaml`` holds those that come with Slipway; a model's file names them and may change their rate,
their time, their lengths and their limits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evals.errors import EvaluationError
from evals.load.slo import Positive, Slo
from registry.suggestions import suggestion

FOLDER = Path(__file__).parent
# Standard normal quantile of 0.95: where `p95` of a lognormal lies.
_Z95 = 1.6448536269514722

Count = Annotated[int, Field(ge=1)]


class TrafficProfileError(EvaluationError):
    """A profile that does not exist, or whose file is not valid; the message lists the problems."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lengths(_Section):
    """A length in tokens: lognormal where ``p95`` is given, else always the same. A plain number is a fixed length.

    Lengths of real prompts and answers have the long right tail of a lognormal.
    """

    median: Count
    """The median."""
    p95: Count | None = None
    """The 95th percentile."""
    minimum: Count | None = None
    """The shortest that is drawn; a quarter of the median where it is left out."""
    maximum: Count | None = None
    """The longest that is drawn; twice the 95th percentile where it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, given: Any) -> Any:  # noqa: ANN401 - whatever stands in the file
        return {"median": given} if isinstance(given, int) and not isinstance(given, bool) else given

    @model_validator(mode="after")
    def _ordered(self) -> Lengths:
        if not self.lowest <= self.median <= (self.p95 or self.median) <= self.highest:
            raise ValueError(
                f"expected minimum ≤ median ≤ p95 ≤ maximum (found {self.lowest}, {self.median}, "
                f"{self.p95 or self.median}, {self.highest})"
            )
        return self

    @property
    def lowest(self) -> int:
        """The shortest that is drawn."""
        if self.minimum is not None:
            return self.minimum
        return self.median if self.p95 is None else max(1, self.median // 4)

    @property
    def highest(self) -> int:
        """The longest that is drawn."""
        return self.maximum if self.maximum is not None else self.median if self.p95 is None else 2 * self.p95

    @property
    def sigma(self) -> float:
        """The standard deviation of the length's logarithm; 0 where it is fixed."""
        return 0.0 if self.p95 is None else math.log(self.p95 / self.median) / _Z95

    def scaled(self, factor: float) -> Lengths:
        """The same shape, ``factor`` times as long, at least one token."""
        parts = self.model_dump(exclude_none=True)
        return Lengths.model_validate({name: max(1, int(value * factor)) for name, value in parts.items()})


class Prefix(_Section):
    """A text that prompts share, such as a retrieved document that several ask about; ``count`` different ones."""

    tokens: Lengths
    """Length of the shared text."""
    count: Count = 8
    """Number of different shared texts."""


class Segment(_Section):
    """A part of the time, as a share of it, with ``times`` the profile's rate."""

    share: Positive
    """Share of the time."""
    times: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """The rate in this part, as a multiple of the profile's."""


class Arrivals(_Section):
    """How requests arrive: ``poisson``, as from independent users; ``gamma``, in clusters; ``even``.

    ``burstiness`` is gamma's coefficient of variation of the gaps (1 is Poisson, more comes in clusters). ``shape``
    lets the rate change over the time.
    """

    process: Literal["poisson", "gamma", "even"] = "poisson"
    """`poisson`: independent users; `gamma`: in clusters; `even`: at equal intervals."""
    burstiness: Positive = 1.0
    """For `gamma`: the coefficient of variation of the intervals. 1 is Poisson, more is more clustered."""
    shape: tuple[Segment, ...] = (Segment(share=1.0, times=1.0),)
    """How the rate changes over the time."""

    @model_validator(mode="after")
    def _whole(self) -> Arrivals:
        if abs(sum(part.share for part in self.shape) - 1) > 1e-9:
            raise ValueError("the shares of `shape` must add up to 1")
        if self.process != "gamma" and self.burstiness != 1.0:
            raise ValueError(f"`burstiness` belongs to `process: gamma` (found `{self.process}`)")
        return self

    @property
    def mean(self) -> float:
        """The mean of ``times`` over the time."""
        return sum(part.share * part.times for part in self.shape)


class TrafficProfile(_Section):
    """One profile. ``rate`` is in requests a second; ``seconds`` is how long requests arrive.

    ``leak_test``: the profile is long enough to detect a leak by the memory's slope, which is then judged.
    """

    name: str
    """The profile's name."""
    description: str
    """What the profile is for."""
    rate: Positive
    """Requests per second."""
    seconds: Positive
    """How long requests arrive."""
    arrivals: Arrivals = Arrivals()
    """How requests arrive."""
    input_tokens: Lengths
    """Length of the prompts."""
    output_tokens: Lengths
    """Length of the answers."""
    prefix: Prefix | None = None
    """Text that prompts share."""
    seed: int = 0
    """The seed of all random choices."""
    warmup_requests: int = Field(default=8, ge=0)
    """Requests sent first, which are not measured."""
    leak_test: bool = False
    """Whether the profile is long enough to judge memory leaks."""
    slo: Slo = Slo()
    """Limits that a model file may override."""

    @model_validator(mode="after")
    def _enough(self) -> TrafficProfile:
        if self.requests < 1:
            raise ValueError(f"`request_rate` {self.rate:g} times `seconds` {self.seconds:g} is less than one request")
        return self

    @property
    def mean_rate(self) -> float:
        """Requests a second over all of the time: the rate, times its shape."""
        return self.rate * self.arrivals.mean

    @property
    def requests(self) -> int:
        """How many requests the traffic holds: its mean rate times its time."""
        return round(self.mean_rate * self.seconds)

    @property
    def longest(self) -> int:
        """The most tokens that a request of it may take, prompt and answer together."""
        shared = self.prefix.tokens.highest if self.prefix else 0
        return shared + self.input_tokens.highest + self.output_tokens.highest

    def fitted(self, context: int) -> TrafficProfile:
        """The same traffic for a context of ``context`` tokens; if it is too long, all lengths are shortened alike.

        Eight tokens of the context stay free: a prompt that is cut out of a text may become a few tokens longer.
        """
        room = context - 8
        if self.longest <= room:
            return self
        factor = room / self.longest
        shared = (
            None if self.prefix is None else {**self.prefix.model_dump(), "tokens": self.prefix.tokens.scaled(factor)}
        )
        return TrafficProfile.model_validate({
            **self.model_dump(),
            "input_tokens": self.input_tokens.scaled(factor),
            "output_tokens": self.output_tokens.scaled(factor),
            "prefix": shared,
        })  # fmt: skip


def names(folder: Path = FOLDER) -> list[str]:
    """The profiles that come with Slipway."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_profile(name: str, folder: Path = FOLDER) -> TrafficProfile:
    """Read the profile ``name``.

    Raises:
        TrafficProfileError: there is none of that name, or its file is wrong.
    """
    path = folder / f"{name}.yaml"
    known = names(folder)
    if name not in known:
        raise TrafficProfileError(f"no traffic profile `{name}`{suggestion(name, known)}")
    try:
        return TrafficProfile.model_validate({**(yaml.safe_load(path.read_bytes()) or {}), "name": name})
    except ValidationError as error:
        told = "; ".join(f"`{'.'.join(map(str, each['loc']))}`: {each['msg']}" for each in error.errors())
        raise TrafficProfileError(f"{path.name}: {told}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TrafficProfileError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from error

"""The cost of a million tokens, from the measured throughput of one replica while its service level held.

Every figure is in dollars for a million *output* tokens, including the prompts that they answer. With a replica's
hourly cost ``h``, its output tokens a second ``T`` and the share ``u`` of its time in which it is busy:

    own or rented    1e6 * h / (3600 * T * u)
    an API           price of output + price of input * prompt tokens / output tokens

A rented replica costs its price an hour; an owned one its price over its years, power (with cooling) and upkeep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from evals.errors import LoadEvidenceError
from evals.load.evidence import LoadEvidence
from evals.load.requests import RequestRecord

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
HOURS_A_YEAR = 8766.0

# The shape of a working day, hour by hour, with mean 1: an assumption, which a model's file can replace. The minimum,
# at two at night, is a quarter of the maximum, at two in the afternoon.
_LEAST, _PEAK_HOUR = 0.25, 14
USUAL_DAY = tuple(
    (1 + (1 - _LEAST) / (1 + _LEAST) * math.cos(2 * math.pi * (hour - _PEAK_HOUR) / 24)) for hour in range(24)
)


class _CostSection(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cloud(_CostSection):
    """A rented machine that holds one replica."""

    dollars_per_hour: Positive
    """Its price."""
    name: str = "cloud"
    """Its name in the report."""


class Own(_CostSection):
    """A bought machine that holds one replica."""

    dollars: Positive
    """Its price."""
    years: Positive = 3.0
    """How long it is used."""
    watts: Positive = 700.0
    """Its power while it works."""
    cooling: Annotated[float, Field(ge=1)] = 1.4
    """The building's power divided by the machine's."""
    dollars_per_kwh: Annotated[float, Field(ge=0)] = 0.15
    """The price of power."""
    upkeep: Annotated[float, Field(ge=0)] = 0.05
    """Its yearly cost, as a share of the price."""
    utilisation: Share = 0.5
    """The share of the time in which it is busy."""

    @property
    def dollars_per_hour(self) -> float:
        """The cost of an hour, busy or not."""
        power = self.watts / 1000 * self.cooling * self.dollars_per_kwh
        return self.dollars * (1 / self.years + self.upkeep) / HOURS_A_YEAR + power


class Api(_CostSection):
    """A provider's API, in dollars for a million tokens."""

    input: Annotated[float, Field(ge=0)]
    """The price of prompts."""
    output: Positive
    """The price of answers."""
    name: str = "API"
    """Its name in the report."""


class CostPlan(_CostSection):
    """The ``cost:`` section: prices, and the load of a day."""

    cloud: Cloud | None = None
    """A rented machine."""
    own: Own | None = None
    """A bought machine."""
    api: Api | None = None
    """A provider's API."""
    requests_per_day: Positive | None = None
    """The load to plan for."""
    day: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=24, max_length=24)] = USUAL_DAY
    """The shape of the day: 24 numbers, of which only the proportions count; by default a working day."""
    target: Share = 0.7
    """The share of its capacity at which a replica is run; the rest is kept for bursts."""


class _CostDocument(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class Throughput(_CostDocument):
    """What one replica carries: requests and output tokens a second, and the tokens of a mean request.

    ``at_slo``: it is the replica's capacity while its service level holds; otherwise it is what was sent, and less than
    the replica can carry.
    """

    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens: float
    answer_tokens: float
    at_slo: bool

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def requests_per_day(self) -> float:
        """The requests that it can answer in a day."""
        return 86400 * self.requests_per_second


class CostRow(_CostDocument):
    """One way to pay, in dollars; an API has no price an hour."""

    what: str
    dollars_per_hour: float | None
    dollars_per_million: float


class HybridDay(_CostDocument):
    """A day served by ``owned`` replicas, and by rented ones in the hours that need more."""

    owned: int
    rented_hours: int
    dollars_per_day: float


class DayCost(_CostDocument):
    """A planned day: replicas and requests a second by hour, every split into owned and rented, and the cheapest."""

    requests_per_day: float
    replicas: tuple[int, ...]
    requests_per_second: tuple[float, ...]
    hybrids: tuple[HybridDay, ...]
    best: HybridDay | None
    api_dollars: float | None


class CostEvidence(_CostDocument):
    """What ``cost.json`` holds.

    ``break_even`` is in requests a day from which a replica is cheaper than the API, and in hours a day from which
    owning is cheaper than renting; None where it never is. What has no price is left out.
    """

    schema_: Annotated[Literal["slipway/cost/1"], Field(alias="schema")] = "slipway/cost/1"
    throughput: Throughput
    rows: tuple[CostRow, ...]
    break_even: dict[str, float | None]
    day: DayCost | None
    target: float

    def format(self) -> str:
        """The text of ``cost.json``."""
        return self.model_dump_json(by_alias=True, indent=1)


FILE = "cost.json"


def parse_cost(data: str | bytes, where: str) -> CostEvidence:
    """Parse ``cost.json``; ``where`` names the file in an error.

    Raises:
        LoadEvidenceError: it does not have the expected form.
    """
    try:
        return CostEvidence.model_validate_json(data)
    except ValidationError as error:
        raise LoadEvidenceError.of(error, where) from error


def read_cost(path: Path) -> CostEvidence:
    """Read ``cost.json``.

    Raises:
        LoadEvidenceError: it can't be read, or does not have the expected form.
    """
    try:
        return parse_cost(path.read_bytes(), str(path))
    except OSError as error:
        raise LoadEvidenceError(f"{path} can't be read ({error.strerror}): release again") from error


def throughput(load: LoadEvidence, requests: Iterable[RequestRecord]) -> Throughput | None:
    """The throughput of one replica in a load test: its capacity at the service level if that was searched for.

    Rate, tokens and prompts are all of the first profile. None if none of its requests was answered.
    """
    first = load.profiles[0].name if load.profiles else None
    good = [each for each in requests if each.profile in {None, first} and each.answered and each.output_tokens]
    found = load.capacity
    if found is not None and found.requests_per_second and found.output_tokens_per_second:
        at_slo, rate, tokens = True, found.requests_per_second, found.output_tokens_per_second
    else:
        at_slo = False
        rate, tokens = (load.metrics.get(f"{each}_per_second", 0.0) for each in ("requests", "output_tokens"))
    if not good or not rate or not tokens:
        return None
    return Throughput(
        requests_per_second=rate,
        output_tokens_per_second=tokens,
        prompt_tokens=sum(each.input_tokens or 0 for each in good) / len(good),
        answer_tokens=tokens / rate,
        at_slo=at_slo,
    )


def per_million(dollars_per_hour: float, carried: Throughput, utilisation: float = 1.0) -> float:
    """Dollars for a million output tokens on a replica that is busy for that share of its time."""
    return 1e6 * dollars_per_hour / (3600 * carried.output_tokens_per_second * utilisation)


def api_per_million(api: Api, carried: Throughput) -> float:
    """Dollars for a million output tokens with their prompts, at an API's prices."""
    return api.output + api.input * carried.prompt_tokens / carried.answer_tokens


def api_per_request(api: Api, carried: Throughput) -> float:
    """Dollars for a mean request at an API's prices."""
    return (api.output * carried.answer_tokens + api.input * carried.prompt_tokens) / 1e6


def break_even(dollars_per_hour: float, api: Api, carried: Throughput) -> float | None:
    """Requests a day from which a replica that runs around the clock costs no more than an API.

    None if it can't carry so many in a day: then it always costs more, however many replicas there are.
    """
    requests = 24 * dollars_per_hour / api_per_request(api, carried)
    return requests if requests <= carried.requests_per_day else None


def hourly(plan: CostPlan, requests_per_day: float) -> list[float]:
    """Requests a second in each hour of the day."""
    total = sum(plan.day)
    return [requests_per_day * share / total / 3600 for share in plan.day]


def replicas_by_hour(plan: CostPlan, carried: Throughput, requests_per_day: float) -> list[int]:
    """The replicas that each hour of the day needs: at least one, and none of them above its target."""
    rates = hourly(plan, requests_per_day)
    # The rounding error of a division must not add a replica where the rate is met exactly.
    return [max(1, math.ceil(rate / (plan.target * carried.requests_per_second) - 1e-9)) for rate in rates]


def hybrids(plan: CostPlan, carried: Throughput, requests_per_day: float) -> list[HybridDay]:
    """Every split of a day into owned and rented replicas, from none owned to all; empty without both prices.

    An owned replica costs all day, a rented one only for the hours in which it is needed.
    """
    if plan.own is None or plan.cloud is None:
        return []
    needed = replicas_by_hour(plan, carried, requests_per_day)
    found = []
    for owned in range(max(needed) + 1):
        hours = sum(max(0, count - owned) for count in needed)
        dollars = 24 * owned * plan.own.dollars_per_hour + hours * plan.cloud.dollars_per_hour
        found.append(HybridDay(owned=owned, rented_hours=hours, dollars_per_day=dollars))
    return found


def cost_evidence(plan: CostPlan, carried: Throughput) -> CostEvidence:
    """The costs under a plan, at a measured throughput."""
    planned = plan.requests_per_day
    return CostEvidence(
        throughput=carried,
        rows=tuple(_rows(plan, carried)),
        break_even=_break_evens(plan, carried),
        day=None if planned is None else _day(plan, carried, planned),
        target=plan.target,
    )


def _day(plan: CostPlan, carried: Throughput, planned: float) -> DayCost:
    found = hybrids(plan, carried, planned)
    return DayCost(
        requests_per_day=planned,
        replicas=tuple(replicas_by_hour(plan, carried, planned)),
        requests_per_second=tuple(hourly(plan, planned)),
        hybrids=tuple(found),
        best=min(found, key=lambda each: each.dollars_per_day, default=None),
        api_dollars=planned * api_per_request(plan.api, carried) if plan.api else None,
    )


def _rows(plan: CostPlan, carried: Throughput) -> Iterable[CostRow]:
    if plan.cloud is not None:
        rent = plan.cloud.dollars_per_hour
        yield _row(f"{plan.cloud.name}, always busy", rent, per_million(rent, carried))
        yield _row(f"{plan.cloud.name}, {plan.target:.0%} busy", rent, per_million(rent, carried, plan.target))
    if plan.own is not None:
        own, share = plan.own.dollars_per_hour, plan.own.utilisation
        yield _row(f"own hardware, {share:.0%} busy", own, per_million(own, carried, share))
    if plan.api is not None:
        yield _row(plan.api.name, None, api_per_million(plan.api, carried))


def _row(what: str, dollars_per_hour: float | None, dollars: float) -> CostRow:
    return CostRow(what=what, dollars_per_hour=dollars_per_hour, dollars_per_million=dollars)


def _break_evens(plan: CostPlan, carried: Throughput) -> dict[str, float | None]:
    """Requests a day from which a replica is cheaper than the API, and hours a day for owning against renting."""
    found: dict[str, float | None] = {}
    if plan.api is not None and plan.cloud is not None:
        found["cloud_against_api_requests"] = break_even(plan.cloud.dollars_per_hour, plan.api, carried)
    if plan.api is not None and plan.own is not None:
        found["own_against_api_requests"] = break_even(plan.own.dollars_per_hour, plan.api, carried)
    if plan.own is not None and plan.cloud is not None:
        hours = 24 * plan.own.dollars_per_hour / plan.cloud.dollars_per_hour
        found["own_against_cloud_hours"] = hours if hours <= 24 else None
    return found


def sentences(found: CostEvidence) -> Sequence[str]:
    """The costs in words, for a person."""
    carried, even = found.throughput, found.break_even
    source = "at its service level" if carried.at_slo else "as sent in the load test; its capacity was not searched for"
    words = [f"one replica carries {carried.requests_per_second:,.3g} requests/s {source}"]
    for key, what in (("cloud_against_api_requests", "renting"), ("own_against_api_requests", "owning")):
        if key in even:
            requests = even[key]
            words.append(
                f"{what} costs more than the API at any load that one replica can carry"
                if requests is None
                else f"{what} costs less than the API from {requests:,.0f} requests a day on"
            )
    if "own_against_cloud_hours" in even:
        hours = even["own_against_cloud_hours"]
        words.append(
            "owning costs more than renting around the clock"
            if hours is None
            else f"owning costs less than renting from {hours:.1f} hours of use a day on"
        )
    if found.day is not None and found.day.best is not None:
        best = found.day.best
        words.append(
            f"a day of {found.day.requests_per_day:,.0f} requests costs least with {best.owned} owned and "
            f"{best.rented_hours} rented replica-hours: {best.dollars_per_day:,.2f} dollars"
        )
    return words

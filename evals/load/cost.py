"""What a million tokens cost, from what one replica was measured to carry while its service level held.

Every figure is in dollars for a million *output* tokens, prompts answered along with them: that is how a bill divides.
With a replica's hourly cost ``h``, its output tokens a second ``T`` and the share ``u`` of its time that it has work:

    own or rented    1e6 * h / (3600 * T * u)
    an API           price of output + price of input * prompt tokens / output tokens

A rented replica costs its price an hour; an owned one its price over its years, power (with cooling) and upkeep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
HOURS_A_YEAR = 8766.0

# A working day's shape, hour by hour, its mean 1: an assumption, to be replaced by one's own in the model's file. It
# is the least at four in the night, a quarter of its height at two in the afternoon.
_LEAST, _PEAK_HOUR = 0.25, 14
USUAL_DAY = tuple(
    (1 + (1 - _LEAST) / (1 + _LEAST) * math.cos(2 * math.pi * (hour - _PEAK_HOUR) / 24)) for hour in range(24)
)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cloud(_Section):
    """A rented machine that holds one replica."""

    dollars_per_hour: Positive
    """Its price."""
    name: str = "cloud"
    """Its name in the report."""


class Own(_Section):
    """A bought machine that holds one replica."""

    dollars: Positive
    """Its price."""
    years: Positive = 3.0
    """How long it is used."""
    watts: Positive = 700.0
    """Its power while it works."""
    cooling: Annotated[float, Field(ge=1)] = 1.4
    """The building's power over the machine's."""
    dollars_per_kwh: Annotated[float, Field(ge=0)] = 0.15
    """The price of power."""
    upkeep: Annotated[float, Field(ge=0)] = 0.05
    """Of its price, a year."""
    utilisation: Share = 0.5
    """The share of the time in which it has work."""

    @property
    def dollars_per_hour(self) -> float:
        """What an hour costs, whether it has work or not."""
        power = self.watts / 1000 * self.cooling * self.dollars_per_kwh
        return self.dollars * (1 / self.years + self.upkeep) / HOURS_A_YEAR + power


class Api(_Section):
    """What a provider asks for the same, in dollars for a million tokens."""

    input: Annotated[float, Field(ge=0)]
    """Of prompts."""
    output: Positive
    """Of answers."""
    name: str = "API"
    """Its name in the report."""


class CostPlan(_Section):
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
    """Its shape: 24 numbers, of which only the proportions count; a working day where it is left out."""
    target: Share = 0.7
    """The share of its capacity that a replica is run at; the rest is left for bursts."""


@dataclass(frozen=True)
class Throughput:
    """What one replica carries: requests and output tokens a second, and the tokens of a mean request.

    ``at_slo`` where that is its capacity while its service level holds; else it is what was asked of it, and less than
    it can.
    """

    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens: float
    answer_tokens: float
    at_slo: bool

    @property
    def requests_per_day(self) -> float:
        """At most, around the clock."""
        return 86400 * self.requests_per_second


@dataclass(frozen=True)
class Hybrid:
    """A day served by ``owned`` replicas, and rented ones in the hours that need more."""

    owned: int
    rented_hours: int
    dollars_per_day: float


def throughput(load: Mapping[str, Any], requests: Iterable[Mapping[str, Any]]) -> Throughput | None:
    """Read the throughput off a load test: its capacity at the service level where that was searched for.

    ``load`` is ``load.json``, ``requests`` the rows of ``requests.jsonl``. Rate, tokens and prompts are all those of
    the first profile. None where none of its requests was answered.
    """
    first = next((each["name"] for each in load.get("profiles", ())), None)
    sent = [row for row in requests if row.get("profile", first) == first]
    good = [row for row in sent if row.get("error") is None and row.get("output_tokens")]
    found, metrics = load.get("capacity") or {}, load.get("metrics", {})
    at_slo = bool(found.get("requests_per_second") and found.get("output_tokens_per_second"))
    source = found if at_slo else metrics
    rate, tokens = source.get("requests_per_second"), source.get("output_tokens_per_second")
    if not good or not rate or not tokens:
        return None
    prompts = [float(row.get("input_tokens") or 0) for row in good]
    return Throughput(
        requests_per_second=float(rate),
        output_tokens_per_second=float(tokens),
        prompt_tokens=sum(prompts) / len(prompts),
        answer_tokens=float(tokens) / float(rate),
        at_slo=at_slo,
    )


def per_million(dollars_per_hour: float, carried: Throughput, utilisation: float = 1.0) -> float:
    """Dollars for a million output tokens on a replica that has work for that share of its time."""
    return 1e6 * dollars_per_hour / (3600 * carried.output_tokens_per_second * utilisation)


def api_per_million(api: Api, carried: Throughput) -> float:
    """Dollars for a million output tokens with their prompts, at an API's prices."""
    return api.output + api.input * carried.prompt_tokens / carried.answer_tokens


def api_per_request(api: Api, carried: Throughput) -> float:
    """Dollars for a mean request at an API's prices."""
    return (api.output * carried.answer_tokens + api.input * carried.prompt_tokens) / 1e6


def break_even(dollars_per_hour: float, api: Api, carried: Throughput) -> float | None:
    """Requests a day from which a replica that runs around the clock is no dearer than an API.

    None where it never is: it can't carry so many in a day, however many replicas there are.
    """
    requests = 24 * dollars_per_hour / api_per_request(api, carried)
    return requests if requests <= carried.requests_per_day else None


def hourly(plan: CostPlan, requests_per_day: float) -> list[float]:
    """Requests a second in each hour of the day."""
    total = sum(plan.day)
    return [requests_per_day * share / total / 3600 for share in plan.day]


def replicas_by_hour(plan: CostPlan, carried: Throughput, requests_per_day: float) -> list[int]:
    """Replicas that each hour of the day needs, at least one, none of them above its target."""
    rates = hourly(plan, requests_per_day)
    # A rate that is met exactly needs no replica more for the last bit of a division.
    return [max(1, math.ceil(rate / (plan.target * carried.requests_per_second) - 1e-9)) for rate in rates]


def hybrids(plan: CostPlan, carried: Throughput, requests_per_day: float) -> list[Hybrid]:
    """Every division of a day into owned and rented replicas, from none owned to all; empty without both prices.

    An owned replica costs all day; a rented one the hours that it is needed.
    """
    if plan.own is None or plan.cloud is None:
        return []
    needed = replicas_by_hour(plan, carried, requests_per_day)
    found = []
    for owned in range(max(needed) + 1):
        hours = sum(max(0, count - owned) for count in needed)
        dollars = 24 * owned * plan.own.dollars_per_hour + hours * plan.cloud.dollars_per_hour
        found.append(Hybrid(owned, hours, dollars))
    return found


def document(plan: CostPlan, carried: Throughput) -> dict[str, Any]:
    """All of it as JSON: the table's rows, the break-evens, and the day; what has no price is left out."""
    rows = [*_rows(plan, carried)]
    planned = plan.requests_per_day
    day = hybrids(plan, carried, planned) if planned else []
    return {
        "schema": "slipway/cost/1",
        "throughput": {**asdict(carried), "requests_per_day": carried.requests_per_day},
        "rows": rows,
        "break_even": _break_evens(plan, carried),
        "day": None
        if planned is None
        else {
            "requests_per_day": planned,
            "replicas": replicas_by_hour(plan, carried, planned),
            "requests_per_second": hourly(plan, planned),
            "hybrids": [asdict(each) for each in day],
            "best": asdict(min(day, key=lambda each: each.dollars_per_day)) if day else None,
            "api_dollars": planned * api_per_request(plan.api, carried) if plan.api else None,
        },
        "target": plan.target,
    }


def _rows(plan: CostPlan, carried: Throughput) -> Iterable[dict[str, Any]]:
    """One row a way to pay: what it is, dollars an hour, dollars for a million output tokens."""
    if plan.cloud is not None:
        hourly = plan.cloud.dollars_per_hour
        yield _row(f"{plan.cloud.name}, always busy", hourly, per_million(hourly, carried))
        yield _row(f"{plan.cloud.name}, {plan.target:.0%} busy", hourly, per_million(hourly, carried, plan.target))
    if plan.own is not None:
        hourly, share = plan.own.dollars_per_hour, plan.own.utilisation
        yield _row(f"own hardware, {share:.0%} busy", hourly, per_million(hourly, carried, share))
    if plan.api is not None:
        yield _row(plan.api.name, None, api_per_million(plan.api, carried))


def _row(what: str, hourly: float | None, dollars: float) -> dict[str, Any]:
    return {"what": what, "dollars_per_hour": hourly, "dollars_per_million": dollars}


def _break_evens(plan: CostPlan, carried: Throughput) -> dict[str, float | None]:
    """Requests a day from which a replica pays: against the API, and (hours a day) owning against renting."""
    found: dict[str, float | None] = {}
    if plan.api is not None and plan.cloud is not None:
        found["cloud_against_api_requests"] = break_even(plan.cloud.dollars_per_hour, plan.api, carried)
    if plan.api is not None and plan.own is not None:
        found["own_against_api_requests"] = break_even(plan.own.dollars_per_hour, plan.api, carried)
    if plan.own is not None and plan.cloud is not None:
        hours = 24 * plan.own.dollars_per_hour / plan.cloud.dollars_per_hour
        found["own_against_cloud_hours"] = hours if hours <= 24 else None
    return found


def sentences(found: Mapping[str, Any]) -> Sequence[str]:
    """What the document says, for a person."""
    carried, even = found["throughput"], found["break_even"]
    told = [
        f"one replica carries {carried['requests_per_second']:,.3g} requests/s"
        + (
            " at its service level"
            if carried["at_slo"]
            else "; that was asked of it, its capacity was not searched for"
        )
    ]
    for key, what in (("cloud_against_api_requests", "renting"), ("own_against_api_requests", "owning")):
        if key in even:
            requests = even[key]
            told.append(
                f"{what} is dearer than the API at any load that one replica can carry"
                if requests is None
                else f"{what} beats the API from {requests:,.0f} requests a day on"
            )
    if "own_against_cloud_hours" in even:
        hours = even["own_against_cloud_hours"]
        told.append(
            "owning is dearer than renting around the clock"
            if hours is None
            else f"owning beats renting from {hours:.1f} hours of use a day on"
        )
    day = found["day"]
    if day and day["best"]:
        best = day["best"]
        told.append(
            f"a day of {day['requests_per_day']:,.0f} requests is cheapest with {best['owned']} owned and "
            f"{best['rented_hours']} rented replica-hours: {best['dollars_per_day']:,.2f} dollars"
        )
    return told

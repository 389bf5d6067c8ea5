"""Open-loop traffic: requests leave on a schedule, whether or not earlier ones were answered, and none is forgotten.

    python tests/open_loop.py --url http://127.0.0.1:8080 --key KEY --model demo-awq --rate 5 --seconds 60

Latency counts from the moment a request was due, so that a client that falls behind does not hide what it made others
wait (coordinated omission). Every second request is streamed. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx


@dataclass
class Outcome:
    """What became of one request: seconds since the start when it was due, and how long it took from there.

    ``result`` is ``ok``, ``status N``, ``no answer: …``; for a stream that began also ``error event`` (it said so) or
    ``cut off`` (it just ended).
    """

    due: float
    seconds: float
    stream: bool
    result: str
    release: str
    first: float | None = None


async def drive(
    url: str, key: str, body: Mapping[str, Any], *, rate: float, seconds: float, seed: int = 0, streams: float = 0.5
) -> list[Outcome]:
    """Send Poisson arrivals of ``rate`` requests a second for ``seconds``, and wait for every answer.

    ``streams`` is the share of requests that are streamed.
    """
    draw = random.Random(seed)
    due, dues = 0.0, []
    while (due := due + draw.expovariate(rate)) < seconds:
        dues.append((due, draw.random() < streams))
    head = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=4)
    async with httpx.AsyncClient(base_url=url, headers=head, timeout=120, limits=limits, trust_env=False) as client:
        started = time.monotonic()
        tasks: list[asyncio.Future[Any]] = []
        for due, stream in dues:
            await asyncio.sleep(max(0.0, started + due - time.monotonic()))
            request = {**body, "stream": stream, "prompt": f"{body['prompt']} {len(tasks)}"}
            tasks.append(asyncio.ensure_future(_one(client, request, started, due)))
        return list(await asyncio.gather(*tasks))


async def _one(client: httpx.AsyncClient, body: dict[str, Any], started: float, due: float) -> Outcome:
    outcome = Outcome(due, 0.0, bool(body["stream"]), "ok", "-")
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            outcome.release = answer.headers.get("x-slipway-release", "-")
            text = b""
            async for piece in answer.aiter_raw():
                if outcome.first is None:
                    outcome.first = time.monotonic() - started - due
                text += piece
        if answer.status_code != httpx.codes.OK:
            outcome.result = f"status {answer.status_code}"
        elif outcome.stream and not text.endswith(b"data: [DONE]\n\n"):
            outcome.result = "error event" if b'"error"' in text.rstrip().rpartition(b"\n\n")[2] else "cut off"
    except httpx.HTTPError as error:
        outcome.result = f"no answer: {type(error).__name__}"
    outcome.seconds = time.monotonic() - started - due
    return outcome


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them lie (linear between neighbours); NaN of none."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=1000, method="inclusive")[min(998, round(share * 1000) - 1)]


def summary(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Counts by result, and latency of what was answered, in milliseconds."""
    all_of_them = list(outcomes)
    good = [outcome.seconds * 1000 for outcome in all_of_them if outcome.result == "ok"]
    return {
        "requests": len(all_of_them),
        "whole": dict(Counter(outcome.result for outcome in all_of_them if not outcome.stream)),
        "streams": dict(Counter(outcome.result for outcome in all_of_them if outcome.stream)),
        "releases": dict(Counter(outcome.release for outcome in all_of_them)),
        "p50_ms": round(quantile(good, 0.5), 1),
        "p95_ms": round(quantile(good, 0.95), 1),
        "p99_ms": round(quantile(good, 0.99), 1),
    }


def windows(outcomes: Sequence[Outcome], width: float) -> list[tuple[float, int, float]]:
    """For each ``width`` seconds of the schedule: its start, its requests, and their p95 latency in milliseconds."""
    found = []
    last = max((outcome.due for outcome in outcomes), default=0.0)
    for index in range(int(last // width) + 1):
        inside = [each.seconds * 1000 for each in outcomes if index * width <= each.due < (index + 1) * width]
        found.append((index * width, len(inside), quantile(inside, 0.95)))
    return found


def main() -> None:
    """Drive a server and print what became of the requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", default="")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rate", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--streams", type=float, default=0.5)
    parser.add_argument("--rows", help="Write every request there, JSON lines.")
    options = parser.parse_args()
    body = {"model": options.model, "prompt": "def add(", "max_tokens": options.tokens, "ignore_eos": True}
    outcomes = asyncio.run(
        drive(options.url, options.key, body, rate=options.rate, seconds=options.seconds, streams=options.streams)
    )
    if options.rows:
        with open(options.rows, "w") as file:  # noqa: PTH123
            file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
    print(json.dumps(summary(outcomes)))


if __name__ == "__main__":
    main()

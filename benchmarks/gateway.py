"""What the gateway adds to latency: the same open-loop traffic straight to a replica and through the gateway.

    python benchmarks/gateway.py [--rate 100] [--seconds 5] [--rounds 4]

Rounds of direct and gatewayed traffic take turns in one run, so that whatever else the machine does falls on both. The
replica is scripted (8 tokens, 1 ms each). Every request has a key with limits on requests and tokens, so that nothing
that production does is left out. Latency counts from the moment a request was due; of streams it is the first byte's.
Prints a table and one JSON object; exits with 1 where the targets (p50 below 3 ms, p99 below 15 ms) are missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from gateways import MODEL, gateway, routes
from open_loop import Outcome, drive, quantile
from pipeline.settings import Settings
from upstreams import upstream

TARGETS = {0.5: 3.0, 0.99: 15.0}
SHARES = (0.5, 0.95, 0.99)


def latencies(outcomes: list[Outcome], *, stream: bool) -> list[float]:
    """Milliseconds of whole answers, or to the first byte of streams."""
    bad = {each.result for each in outcomes} - {"ok"}
    if bad:
        sys.exit(f"not every request was answered: {bad}")
    return [(each.first or 0.0) * 1000 if stream else each.seconds * 1000 for each in outcomes if each.stream == stream]


def measure(rate: float, seconds: float, rounds: int) -> dict[str, list[Outcome]]:
    """Send the traffic both ways, turn by turn."""
    found: dict[str, list[Outcome]] = {"direct": [], "gateway": []}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        replica = stack.enter_context(upstream(token_ms=1))
        routed = routes(("v1", 100, [replica]))
        running = stack.enter_context(gateway(Settings.read(), folder, routed, health_interval_s=1.0))
        key = running.add_key(requests_per_minute=1_000_000, tokens_per_minute=100_000_000)
        body = {"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 8}
        for number in range(-1, rounds):  # the first round warms both
            for way, url in (("direct", replica.url), ("gateway", running.url)):
                outcomes = asyncio.run(drive(url, key, body, rate=rate, seconds=seconds, seed=number))
                found[way] += outcomes if number >= 0 else []
    return found


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    found = measure(options.rate, options.seconds, options.rounds)
    print(f"{options.rate:g} requests/s, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| | direct, ms | gateway, ms | added, ms |\n|---|---|---|---|")
    added = {}
    for stream, name in ((False, "whole answer"), (True, "first byte of a stream")):
        ways = {way: latencies(outcomes, stream=stream) for way, outcomes in found.items()}
        for share in SHARES:
            direct, through = (quantile(ways[way], share) for way in ("direct", "gateway"))
            added[f"{name}, p{share * 100:g}"] = through - direct
            print(f"| {name}, p{share * 100:g} | {direct:.2f} | {through:.2f} | {through - direct:.2f} |")
    print(json.dumps({name: round(value, 3) for name, value in added.items()}))
    return int(any(added[f"whole answer, p{share * 100:g}"] >= most for share, most in TARGETS.items()))


if __name__ == "__main__":
    sys.exit(main())

"""What one key's attack costs another: the latency of the other's requests and of `/health`, and the gateway's memory.

    python benchmarks/gateway_attack.py [--rate 10] [--seconds 10] [--attackers 6]

One run: first the other key's traffic alone, open loop, then the same while each attacker sends one wrong body of a
megabyte after the other (token ids, the last of which is wrong: the dearest that there are). The replica is scripted
(8 tokens, 1 ms each).
Prints a table and one JSON object; exits with 1 where the other key's p99 more than doubles, or the gateway's memory
grows by more than 50 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from multiprocessing import Process, Queue
from pathlib import Path

import httpx

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from gateways import MODEL, Running, gateway, routes
from open_loop import drive, quantile
from pipeline.settings import Settings
from upstreams import upstream

BODY = {"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 8}
WRONG = b'{"model":"demo-awq","prompt":[' + b"1," * 500_000 + b"-1]}"
MOST_GROWTH, MOST_MEMORY = 2.0, 50e6


def memory_of(process: int) -> int:
    """Bytes that a process has in memory."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def attack(url: str, key: str, statuses: Queue[int]) -> None:
    """Send one wrong body after the other, in a process of its own, until it is ended."""
    head = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with httpx.Client(base_url=url, headers=head, timeout=60, trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):  # turned away before the body was sent
                statuses.put(client.post("/v1/completions", content=WRONG).status_code)


@contextlib.contextmanager
def attacked(running: Running, attackers: int, statuses: Queue[int]) -> Iterator[None]:
    """Attack with the gateway's own key during the block."""
    found = [Process(target=attack, args=(running.url, running.key, statuses)) for _ in range(attackers)]
    for each in found:
        each.start()
    try:
        yield
    finally:
        for each in found:
            each.terminate()
            each.join()


@contextlib.asynccontextmanager
async def observed(running: Running, health: list[float], memory: list[int]) -> AsyncIterator[None]:
    """Note seconds that `/health` takes and the gateway's memory, ten times a second, during the block."""

    async def observe() -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=60, trust_env=False) as client:
            while True:
                started = time.monotonic()
                await client.get("/health")
                health.append(time.monotonic() - started)
                memory.append(memory_of(running.process.process.pid))
                await asyncio.sleep(0.1)

    task = asyncio.ensure_future(observe())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def measure(running: Running, key: str, rate: float, seconds: float, attackers: int) -> dict[str, float]:
    """Drive the other key's traffic without and with the attack; milliseconds and bytes."""
    await drive(running.url, key, BODY, rate=rate, seconds=2, streams=0)
    found: dict[str, float] = {}
    statuses: Queue[int] = Queue()
    for name, number in (("alone", 0), ("attacked", attackers)):
        health, memory = list[float](), list[int]()
        async with observed(running, health, memory):
            with attacked(running, number, statuses):
                outcomes = await drive(running.url, key, BODY, rate=rate, seconds=seconds, streams=0)
        bad = {each.result for each in outcomes} - {"ok"}
        if bad:
            sys.exit(f"not every request was answered: {bad}")
        latencies = [each.seconds * 1000 for each in outcomes]
        for share in (0.5, 0.99):
            found[f"p{share * 100:g} {name}"] = quantile(latencies, share)
        found[f"health p99 {name}"] = quantile([each * 1000 for each in health], 0.99)
        found[f"memory {name}"] = max(memory)
    told = Counter(statuses.get() for _ in range(statuses.qsize()))
    print(f"the attack's answers: {dict(told)}")
    return found


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--attackers", type=int, default=6)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        replica = stack.enter_context(upstream(token_ms=1))
        running = stack.enter_context(gateway(Settings.read(), folder, routes(("v1", 100, [replica]))))
        key = running.add_key(requests_per_minute=1_000_000, tokens_per_minute=100_000_000)
        found = asyncio.run(measure(running, key, options.rate, options.seconds, options.attackers))
    print(f"{options.rate:g} requests/s, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| | alone | attacked |\n|---|---|---|")
    for name in ("p50", "p99", "health p99"):
        print(f"| {name}, ms | {found[f'{name} alone']:.1f} | {found[f'{name} attacked']:.1f} |")
    print(f"| memory, MB | {found['memory alone'] / 1e6:.0f} | {found['memory attacked'] / 1e6:.0f} |")
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))
    slower = found["p99 attacked"] > MOST_GROWTH * found["p99 alone"]
    return int(slower or found["memory attacked"] - found["memory alone"] > MOST_MEMORY)


if __name__ == "__main__":
    sys.exit(main())

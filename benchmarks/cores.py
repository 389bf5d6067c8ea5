"""What it gains that Slipway names a server's cores, against vLLM's own choice, on the demo's FP16 model.

    SLIPWAY_HOME=... .venv/bin/python benchmarks/cores.py [--rounds 7]

Starts three servers: with vLLM's binding (`VLLM_CPU_OMP_THREADS_BIND=auto`), with all cores named, and with all but
one. In each round every server in turn, the others idle, gives its prompts' log-probabilities as an evaluation asks for
them (32 prompts a request, 4 requests at a time), and then has open-loop traffic as in the demo's load test (Poisson, 4
requests a second, 32 tokens each) from a client that shares the machine. Prints prompt tokens a second, the p95
latency, and the medians of both as ratios to vLLM's own choice in the same round, so that what else runs on the machine
falls on all alike. Needs two cores and 12 GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx

from containers.engine.engine import connect
from containers.hardware.core_pool import CoreRequest
from containers.image import profile as profiles
from containers.image.build import serving_arguments
from containers.image.model_loader import with_list
from containers.image.runtime import build_runtime
from containers.sandbox import sandbox
from pipeline.settings import Settings

DEMO = Path(__file__).parent.parent / "models" / "demo"
OWN_CHOICE = "vLLM's own choice"
PROMPTS, CONNECTIONS, SCORED_REQUESTS = 32, 4, 4
RATE, TRAFFIC_SECONDS, OUTPUT_TOKENS = 4.0, 8.0, 32


def score(url: str, texts: list[str]) -> float:
    """Prompt tokens a second while the server gives the log-probabilities of prompts."""
    body = {"model": "demo", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}

    def ask(client: httpx.Client, number: int) -> int:
        batch = [texts[(number * PROMPTS + each) % len(texts)] for each in range(PROMPTS)]
        answer = client.post("/v1/completions", json={**body, "prompt": batch}).raise_for_status().json()
        return int(answer["usage"]["prompt_tokens"])

    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client, ThreadPoolExecutor(CONNECTIONS) as pool:
        ask(client, 0)
        started = time.monotonic()
        tokens = sum(pool.map(lambda number: ask(client, number), range(1, SCORED_REQUESTS + 1)))
        return tokens / (time.monotonic() - started)


def p95_latency(url: str, texts: list[str]) -> float:
    """The p95 latency, in milliseconds from when a request was due, of open-loop traffic."""
    clock = random.Random(7)  # noqa: S311 - a schedule
    due, at = [], 0.0
    while (at := at + clock.expovariate(RATE)) < TRAFFIC_SECONDS:
        due.append(at)
    body = {"model": "demo", "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client, ThreadPoolExecutor(64) as pool:
        started = time.monotonic()

        def ask(moment: float, text: str) -> float:
            client.post("/v1/completions", json={**body, "prompt": text}).raise_for_status()
            return 1000 * (time.monotonic() - started - moment)

        answers: list[Future[float]] = []
        for number, moment in enumerate(due):
            time.sleep(max(0.0, started + moment - time.monotonic()))
            answers.append(pool.submit(ask, moment, texts[number % len(texts)]))
        return statistics.quantiles([answer.result() for answer in answers], n=20)[-1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    settings = Settings.read(os.environ)
    lines = (DEMO / "heldout.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"][:600] for line in lines]
    every = len(os.sched_getaffinity(0))
    counts = {OWN_CHOICE: None, f"all {every} cores named": every, f"{every - 1} named, one for the client": every - 1}
    seen: dict[str, list[tuple[float, float]]] = {way: [] for way in counts}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(counts)) as pool:
        started = pool.map(lambda count: stack.enter_context(serving(count, settings)), counts.values())
        urls = dict(zip(counts, started, strict=True))
        for number in range(rounds + 1):
            for way, url in urls.items():
                figures = (score(url, texts), p95_latency(url, texts))
                if number:  # the first round is for warming up
                    seen[way].append(figures)
                    print(f"{way}: {figures[0]:,.0f} prompt tokens/s, p95 {figures[1]:,.0f} ms", flush=True)
    for way, found in seen.items():
        pairs = list(zip(found, seen[OWN_CHOICE], strict=True))
        tokens, latency = (statistics.median(each[at] for each in found) for at in (0, 1))
        faster, slower = (statistics.median(one[at] / other[at] for one, other in pairs) for at in (0, 1))
        print(
            f"{way}: {tokens:,.0f} prompt tokens/s, p95 {latency:,.0f} ms: "
            f"{faster:.2f} times the throughput, {slower:.2f} times the latency"
        )


@contextlib.contextmanager
def serving(count: int | None, settings: Settings) -> Iterator[str]:
    """Serve the demo's FP16 model on so many cores, whoever else has them; gives its URL."""
    profile = profiles.load("vllm-cpu")
    client = connect(settings.docker_host, settings.home)
    runtime = build_runtime(client, profile, settings.home, print)
    mounts = {DEMO / "model": "/model"}
    with tempfile.TemporaryDirectory() as locks, with_list(mounts, settings.home, {}) as listed, sandbox.serve(
        client, runtime.image_id, name="slipway-cores", home=settings.home, memory_bytes=6 * 2**30,
        command=serving_arguments(profile, DEMO / "model", "demo"), mounts=listed,
        cores=None if count is None else CoreRequest(Path(locks), count), cpu_limit=settings.cpu_limit,
        start_timeout_s=600, progress=print,
    ) as server:  # fmt: skip
        yield server.url


if __name__ == "__main__":
    main()

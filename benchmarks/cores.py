"""What it gains that Slipway names a server's cores, against vLLM's own choice, on the demo's FP16 model.

    SLIPWAY_HOME=... .venv/bin/python benchmarks/cores.py [--rounds 2]

Starts the server with vLLM's binding (`VLLM_CPU_OMP_THREADS_BIND=auto`), with all cores named, and with all but one,
one after the other, several rounds. Each answers for its prompts' log-probabilities as an evaluation asks them (32
prompts a request, 4 requests at a time), and then open-loop traffic as in the demo's load test (Poisson, 4 requests a
second, 32 tokens each) from a client that shares the machine. Prints prompt tokens a second, the p95 latency, and both
as ratios to vLLM's own choice, by the median of the rounds. Needs two cores and takes two minutes a round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import httpx

from containers import profile as profiles
from containers import sandbox
from containers.core_pool import CoreRequest
from containers.engine import connect
from containers.image import serving_arguments
from containers.runtime import build_runtime
from pipeline.settings import CHECKOUT, Settings

DEMO = CHECKOUT / "models" / "demo"
PROMPTS, CONNECTIONS, SCORED_REQUESTS = 32, 4, 12
RATE, TRAFFIC_SECONDS, OUTPUT_TOKENS = 4.0, 25.0, 32


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
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    settings = Settings.read(os.environ)
    lines = (DEMO / "heldout.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"][:600] for line in lines]
    profile = profiles.load("vllm-cpu")
    every = len(os.sched_getaffinity(0))
    ways: Mapping[str, CoreRequest | None] = {
        "vLLM's own choice": None,
        f"all {every} cores named": CoreRequest(settings.locks),
        f"{every - 1} named, one for the client": CoreRequest(settings.locks, every - 1),
    }
    seen: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    client = connect(settings.docker_host, settings.home)
    runtime = build_runtime(client, profile, settings.home, print)
    for _ in range(rounds):
        for way, request in ways.items():
            with sandbox.serve(
                client, runtime.image_id, name="slipway-cores", home=settings.home, memory_bytes=8 * 2**30,
                command=serving_arguments(profile, DEMO / "model", "demo"), mounts={DEMO / "model": "/model"},
                cores=request, progress=lambda _: None,
            ) as server:  # fmt: skip
                figures = (score(server.url, texts), p95_latency(server.url, texts))
            seen[way].append(figures)
            print(f"{way}: {figures[0]:,.0f} prompt tokens/s, p95 {figures[1]:,.0f} ms", flush=True)
    medians = {way: [statistics.median(each) for each in zip(*found, strict=True)] for way, found in seen.items()}
    reference = medians["vLLM's own choice"]
    for way, (tokens, latency) in medians.items():
        ratios = f"{tokens / reference[0]:.2f} times the throughput, {latency / reference[1]:.2f} times the latency"
        print(f"{way}: {tokens:,.0f} prompt tokens/s, p95 {latency:,.0f} ms: {ratios}")


if __name__ == "__main__":
    main()

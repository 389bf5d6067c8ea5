"""vLLM's own metrics, read from ``/metrics``: KV cache, queue, prefix cache. Other engines have none of them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from evals.load.requests import RequestRecord

# Labels of `vllm:cache_config_info`.
_POOL = ("block_size", "num_gpu_blocks")
_LINE = re.compile(r"^(?P<name>vllm:[a-z_0-9]+)(?:\{[^}]*\})? (?P<value>\S+)$", re.MULTILINE)
# vLLM's counters (0.32), and the names of their growth over a profile.
_COUNTERS = {
    "vllm:prefix_cache_queries_total": "prefix_cache_queries",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits",
    "vllm:num_preemptions_total": "preemptions",
}


@dataclass(frozen=True)
class Scrape:
    """An engine's metrics at one moment, each summed over its labels; ``at`` in seconds since the epoch.

    ``block_tokens`` and ``blocks`` are the size of the KV cache's pool, if the engine states it.
    """

    values: Mapping[str, float]
    at: float = 0.0
    block_tokens: int | None = None
    blocks: int | None = None

    def since(self, before: Scrape) -> dict[str, float]:
        """Preemptions between two scrapes, and the share of prompt tokens found in the prefix cache."""
        grown = {
            metric: self.values[name] - before.values.get(name, 0.0)
            for name, metric in _COUNTERS.items()
            if name in self.values
        }
        metrics = {"preemptions": grown["preemptions"]} if "preemptions" in grown else {}
        if grown.get("prefix_cache_queries"):
            metrics["prefix_cache_hit_rate"] = grown.get("prefix_cache_hits", 0.0) / grown["prefix_cache_queries"]
        return metrics

    @property
    def kv_cache(self) -> dict[str, float]:
        """The share of the KV cache's blocks in use, and the requests that run and wait."""
        names = {
            "vllm:kv_cache_usage_perc": "kv_cache_used",
            "vllm:num_requests_running": "running",
            "vllm:num_requests_waiting": "waiting",
        }
        return {metric: self.values[name] for name, metric in names.items() if name in self.values}


def scrape(url: str) -> Scrape | None:
    """Read ``/metrics``; None if there is none, or none of vLLM's metrics on it."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=5, trust_env=False).raise_for_status().text
    except httpx.HTTPError:
        return None
    return parse(text)


def parse(text: str) -> Scrape | None:
    """Parse vLLM's plain counters and gauges out of Prometheus' text format."""
    values: dict[str, float] = {}
    for match in _LINE.finditer(text):
        try:
            value = float(match["value"])
        except ValueError:
            continue
        values[match["name"]] = values.get(match["name"], 0.0) + value
    sizes = {name: int(found[1]) for name in _POOL if (found := re.search(rf'{name}="(\d+)"', text))}
    return Scrape(values, time.time(), *(sizes.get(name) for name in _POOL)) if values else None


def pool(scrapes: Sequence[Scrape], requests: Sequence[RequestRecord], start: float) -> dict[str, float]:
    """The peaks of the KV cache's use and of requests running and waiting, and how much of the cache was wasted.

    ``scrapes`` were taken while ``requests`` were sent, which began at ``start`` (seconds since the epoch). Waste is
    the share of the blocks in use that hold no token, because a request's last block is seldom full. It is measured at
    the fullest moment, as if the tokens of an answer came evenly.
    """
    if not scrapes:
        return {}
    metrics = {
        f"{name}_peak": max(scrape.kv_cache[name] for scrape in scrapes if name in scrape.kv_cache)
        for name in ("kv_cache_used", "running", "waiting")
        if any(name in scrape.kv_cache for scrape in scrapes)
    }
    fullest = max(scrapes, key=lambda scrape: scrape.kv_cache.get("kv_cache_used", 0.0))
    if fullest.blocks and fullest.block_tokens and fullest.kv_cache.get("kv_cache_used"):
        held = fullest.kv_cache["kv_cache_used"] * fullest.blocks * fullest.block_tokens
        needed = sum(_tokens_at(request, 1000 * (fullest.at - start)) for request in requests)
        if 0 < needed <= held:
            metrics["kv_cache_waste"] = 1 - needed / held
    return metrics


def _tokens_at(request: RequestRecord, at_ms: float) -> float:
    """The tokens of a request in the cache at a moment; none before its first token, nor after its last."""
    if request.ttft_ms is None or request.end_ms is None:
        return 0.0
    first, last = request.due_ms + request.ttft_ms, request.end_ms
    if not first <= at_ms <= last:
        return 0.0
    share = (at_ms - first) / (last - first) if last > first else 1.0
    return float((request.input_tokens or 0) + share * (request.output_tokens or 0))

"""What vLLM says of itself on ``/metrics``: its KV cache, its queue, its prefix cache. Other engines say nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

# Labels of `vllm:cache_config_info`.
_POOL = ("block_size", "num_gpu_blocks")
_LINE = re.compile(r"^(?P<name>vllm:[a-z_0-9]+)(?:\{[^}]*\})? (?P<value>\S+)$", re.MULTILINE)
# vLLM's counters (0.32), and what their growth over a profile is called here.
_COUNTERS = {
    "vllm:prefix_cache_queries_total": "prefix_cache_queries",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits",
    "vllm:num_preemptions_total": "preemptions",
}


@dataclass(frozen=True)
class Scrape:
    """All of an engine's figures at one moment, each summed over its labels; ``at`` in seconds since the epoch.

    ``block_tokens`` and ``blocks`` are the size of the KV cache's pool, where the engine tells.
    """

    values: Mapping[str, float]
    at: float = 0.0
    block_tokens: int | None = None
    blocks: int | None = None

    def since(self, before: Scrape) -> dict[str, float]:
        """What happened between two scrapes: preemptions, and the share of prompt tokens found in the prefix cache."""
        grown = {
            told: self.values[name] - before.values.get(name, 0.0)
            for name, told in _COUNTERS.items()
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
        return {told: self.values[name] for name, told in names.items() if name in self.values}


def scrape(url: str) -> Scrape | None:
    """Read ``/metrics``; None where there is none, or nothing of vLLM's on it."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=5, trust_env=False).raise_for_status().text
    except httpx.HTTPError:
        return None
    return parse(text)


def parse(text: str) -> Scrape | None:
    """Read Prometheus' text format as far as vLLM's plain counters and gauges go."""
    values: dict[str, float] = {}
    for match in _LINE.finditer(text):
        try:
            value = float(match["value"])
        except ValueError:
            continue
        values[match["name"]] = values.get(match["name"], 0.0) + value
    sizes = {name: int(found[1]) for name in _POOL if (found := re.search(rf'{name}="(\d+)"', text))}
    return Scrape(values, time.time(), *(sizes.get(name) for name in _POOL)) if values else None


def pool(scrapes: Sequence[Scrape], rows: Sequence[Mapping[str, Any]], start: float) -> dict[str, float]:
    """How full the KV cache's pool was, how many requests ran and waited, and how much of what it held was waste.

    ``scrapes`` were taken while ``rows`` were sent, which began at ``start`` (seconds since the epoch). Waste is the
    share of the blocks in use that no token needs: a request's last block is seldom full. It is that of the fullest
    moment; an answer's tokens are taken to have come evenly.
    """
    if not scrapes:
        return {}
    figures = {
        f"{told}_peak": max(scrape.kv_cache[told] for scrape in scrapes if told in scrape.kv_cache)
        for told in ("kv_cache_used", "running", "waiting")
        if any(told in scrape.kv_cache for scrape in scrapes)
    }
    fullest = max(scrapes, key=lambda scrape: scrape.kv_cache.get("kv_cache_used", 0.0))
    if fullest.blocks and fullest.block_tokens and fullest.kv_cache.get("kv_cache_used"):
        held = fullest.kv_cache["kv_cache_used"] * fullest.blocks * fullest.block_tokens
        needed = sum(_tokens_at(row, 1000 * (fullest.at - start)) for row in rows)
        if 0 < needed <= held:
            figures["kv_cache_waste"] = 1 - needed / held
    return figures


def _tokens_at(row: Mapping[str, Any], at_ms: float) -> float:
    """The tokens of a request that the cache holds at a moment; none before its first, nor after its last."""
    if row["error"] is not None or not row["due_ms"] + row["ttft_ms"] <= at_ms <= row["end_ms"]:
        return 0.0
    first = row["due_ms"] + row["ttft_ms"]
    share = (at_ms - first) / (row["end_ms"] - first) if row["end_ms"] > first else 1.0
    return float((row["input_tokens"] or 0) + share * (row["output_tokens"] or 0))

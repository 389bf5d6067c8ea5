"""Greedy answers of a server, which `evals.load.speculation` compares with those of another."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from evals.errors import EvaluationError
from evals.load.engine_metrics import Scrape, scrape
from evals.load.speculation import Asked
from registry import untrusted

PROMPTS = 24
TOKENS = 64
_PROMPT_CHARACTERS = 240
_PROMPTS_BYTES = 64 << 20
# vLLM's counters (0.32).
_DRAFTED, _ACCEPTED = "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"


def read_prompts(path: Path) -> list[str]:
    """Return the beginnings of the first texts in a file of prompts, JSON lines of ``{"text": …}``."""
    lines = untrusted.read(path.parent, path.name, _PROMPTS_BYTES).decode(errors="replace").splitlines()
    texts = (str(json.loads(line)["text"]) for line in lines if line.strip())
    return [text[:_PROMPT_CHARACTERS] for text in itertools.islice(texts, PROMPTS)]


def ask(url: str, model: str, prompts: Sequence[str], timeout_s: float) -> Asked:
    """Ask a server for greedy answers of at most `TOKENS` tokens.

    Raises:
        EvaluationError: the server did not answer.
    """
    with httpx.Client(base_url=url, timeout=timeout_s, trust_env=False) as client:

        def answer(prompt: str) -> list[int]:
            body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
            return _token_ids(client, body)

        answer(prompts[0])  # what is compiled or cached at the first request is not measured
        before = scrape(url)
        began = time.monotonic()
        single = [answer(prompt) for prompt in prompts]
        single_seconds = time.monotonic() - began
        began = time.monotonic()
        with ThreadPoolExecutor(len(prompts)) as pool:
            batches = [list(pool.map(answer, prompts)) for _ in range(2)]
        batch_seconds = time.monotonic() - began
        after = scrape(url)
        drafted, accepted = (_grown(before, after, counter) for counter in (_DRAFTED, _ACCEPTED))
        return Asked(single, batches, single_seconds, batch_seconds, drafted, accepted)


def _grown(before: Scrape | None, after: Scrape | None, counter: str) -> int:
    """How much a counter has grown; 0 where the server has none."""
    if before is None or after is None:
        return 0
    return max(0, round(after.values.get(counter, 0.0) - before.values.get(counter, 0.0)))


def _token_ids(client: httpx.Client, body: dict[str, Any]) -> list[int]:
    try:
        (choice,) = client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
        return [int(token) for token in choice["token_ids"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise EvaluationError(f"the server gave no greedy answer to compare: {told}") from error

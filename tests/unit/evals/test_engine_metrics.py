"""What vLLM says on /metrics, and what a prediction of its memory is worth."""

from __future__ import annotations

import pytest

from evals.load.engine_metrics import Scrape, parse, pool
from evals.load.expected_memory import RUNTIME_BYTES, ExpectedMemory, compared, expect
from evals.load.requests import RequestRecord

PAGE = """# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25
vllm:num_requests_running{engine="0",model_name="demo"} 3.0
vllm:num_requests_waiting{engine="0",model_name="demo"} 1.0
vllm:num_preemptions_total{engine="0",model_name="demo"} %d
vllm:prefix_cache_queries_total{engine="0",model_name="demo"} %d
vllm:prefix_cache_queries_total{engine="1",model_name="demo"} 0
vllm:prefix_cache_hits_total{engine="0",model_name="demo"} %d
vllm:request_success_total{finished_reason="stop"} NaN
process_cpu_seconds_total 12.5
"""


def test_what_happened_between_two_scrapes_is_told() -> None:
    before, after = parse(PAGE % (0, 1000, 0)), parse(PAGE % (2, 3000, 1500))
    assert before is not None
    assert after is not None
    assert after.since(before) == {"preemptions": 2.0, "prefix_cache_hit_rate": 0.75}
    assert after.kv_cache == {"kv_cache_used": 0.25, "running": 3.0, "waiting": 1.0}


def test_the_pools_waste_is_what_no_token_needs() -> None:
    page = PAGE % (0, 0, 0) + 'vllm:cache_config_info{block_size="16",num_gpu_blocks="100",engine="0"} 1.0\n'
    seen = parse(page)
    assert seen is not None
    assert (seen.block_tokens, seen.blocks) == (16, 100)
    # A quarter of 100 blocks of 16 is held: 400 tokens. At 1.5 s the first has 200 + 50, the second is not yet there.
    rows = [
        RequestRecord(
            number=number, due_ms=due, ttft_ms=1000, end_ms=due + 2000, input_tokens=200, output_tokens=100, error=None
        )
        for number, due in enumerate((0, 1000))
    ]
    rows.append(RequestRecord(number=2, due_ms=0, error="500"))
    found = pool([Scrape(seen.values, 101.5, 16, 100)], rows, 100.0)
    assert found == {"kv_cache_used_peak": 0.25, "running_peak": 3, "waiting_peak": 1, "kv_cache_waste": 1 - 250 / 400}
    assert pool([], rows, 0.0) == {}


def test_an_engine_that_says_nothing_of_vllm_says_nothing() -> None:
    assert parse("process_cpu_seconds_total 12.5\n") is None


def test_a_prediction_adds_up_and_one_that_is_far_off_says_so() -> None:
    expected = expect(10**9, "vllm-cpu", {"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert expected == ExpectedMemory(10**9, 2**30, RUNTIME_BYTES["vllm-cpu"])
    good = compared(expected, {"memory_bytes": int(expected.total / 1.1)})
    assert not good.off
    assert good.error == pytest.approx(0.1)
    bad = compared(expected, {"memory_bytes": int(expected.total / 1.2)})
    assert bad.off
    assert "+20%" in bad.sentence
    assert not compared(expected, {"memory_bytes": None}).off
    two = expect(10**9, "vllm-cpu", {"VLLM_CPU_KVCACHE_SPACE": "1"}, ranks=2)
    assert two is not None
    assert (two.weights_bytes, two.kv_cache_bytes) == (10**9, 2 * 2**30)
    assert expect(1, "a-runtime-of-tomorrow", {"VLLM_CPU_KVCACHE_SPACE": "1"}) is None

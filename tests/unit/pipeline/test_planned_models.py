"""What is planned for models that people release, on the GPUs that they release them on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from containers.hardware.gpu_models import find_gpu
from pipeline.planner.facts import ModelFacts, read_facts
from pipeline.planner.memory import Workload, demand, indivisible, most_requests, usable_bytes
from pipeline.planner.plan import Placement, place
from pipeline.planner.weights import Weights, unquantized
from unit.pipeline import published_models

GIB = 2**30
# 32 requests of 8,192 tokens at once, as published planners plan for, with 20% of each GPU left free.
ASKED = Workload(context=8192, concurrency=32)
# GPUs of one replica, the GiB of its KV cache, and the longest context of which that holds 32 requests; None where
# eight GPUs are too small.
PROPOSED: dict[str, dict[str, tuple[int, int, int] | None]] = {
    "deepseek-v3": {"H100": None, "H200": (8, 246, 14336), "B200": (8, 491, 28672)},
    "gemma-3-27b": {"H100": (4, 185, 27648), "H200": (2, 163, 18432), "B200": (2, 224, 14336)},
    "gpt-oss-120b": {"H100": (2, 59, 45056), "H200": (1, 48, 34816), "B200": (1, 79, 54272)},
    "gpt-oss-20b": {"H100": (1, 47, 56320), "H200": (1, 96, 121856), "B200": (1, 127, 131072)},
    "llama-3.1-8b": {"H100": (1, 46, 11264), "H200": (1, 94, 23552), "B200": (1, 124, 31744)},
    "llama-3.3-70b": {"H100": (4, 110, 10240), "H200": (2, 86, 8192), "B200": (2, 146, 14336)},
    "mistral-small-24b": {"H100": (2, 76, 15360), "H200": (1, 64, 12288), "B200": (1, 94, 18432)},
    "qwen3-30b-a3b": {"H100": (2, 64, 21504), "H200": (1, 52, 17408), "B200": (1, 83, 27648)},
    "qwen3-235b-a22b": {"H100": None, "H200": (8, 434, 36864), "B200": (4, 120, 20480)},
}


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[ModelFacts, Weights]]:
    made = {name: published_models.model(name) for name in published_models.NAMES}
    return {name: (read_facts(model.config), unquantized(model)) for name, model in made.items()}


def placed(model: tuple[ModelFacts, Weights], gpu: str, workload: Workload = ASKED) -> Placement:
    return place(*model, find_gpu(gpu), workload)


@pytest.mark.parametrize("name", published_models.NAMES)
def test_a_published_model_has_the_weights_that_are_published(
    models: dict[str, tuple[ModelFacts, Weights]], name: str
) -> None:
    _, weights = models[name]
    assert weights.numbers == published_models.published(name)["parameters"]


@pytest.mark.parametrize("gpu", ["H100", "H200", "B200"])
@pytest.mark.parametrize("name", published_models.NAMES)
def test_gpus_cache_and_context_are_proposed(
    models: dict[str, tuple[ModelFacts, Weights]], name: str, gpu: str
) -> None:
    found, wanted = placed(models[name], gpu), PROPOSED[name][gpu]
    assert found.fits == (wanted is not None)
    if wanted is not None:
        gpus, cache, context = wanted
        assert (found.demand.gpus, round(found.cache_bytes / GIB), found.longest_context) == (gpus, cache, context)


@pytest.mark.parametrize("name", published_models.NAMES)
def test_the_proposed_context_is_held_and_a_longer_one_is_not(
    models: dict[str, tuple[ModelFacts, Weights]], name: str
) -> None:
    facts, weights = models[name]
    found, gpu = placed(models[name], "B200"), find_gpu("B200")
    context, size = found.longest_context, found.demand.tensor_parallel
    assert context is not None
    for asked, fits in ((context, True), (context + 1024, context == facts.context)):
        workload = replace(ASKED, context=asked)
        needed = demand(facts, weights, gpu, workload, size)
        assert (needed.total <= usable_bytes(gpu, workload)) == fits
        assert (most_requests(facts, needed, gpu, workload) >= ASKED.concurrency) == fits


def test_the_figures_beside_those_of_other_planners(models: dict[str, tuple[ModelFacts, Weights]]) -> None:
    """Their addresses are in docs/explanation/planner.md."""
    # 32 users with 8k each: 44.0 GiB of weights and 40.0 GiB of cache for Mistral Small, two H100; four for Llama.
    facts, weights = models["mistral-small-24b"]
    assert weights.bytes / GIB == pytest.approx(44.0, abs=0.1)
    assert 32 * facts.kv_bytes(8192) / GIB == 40.0
    assert placed(models["mistral-small-24b"], "H100").demand.gpus == 2
    assert placed(models["llama-3.3-70b"], "H100").demand.gpus == 4
    # 470.2 GB of weights for Qwen3 235B.
    assert models["qwen3-235b-a22b"][1].bytes / 1e9 == pytest.approx(470.2, abs=0.1)
    # GPT-OSS 120B: 60.8 GiB in its model card; two H100 for the whole context.
    assert models["gpt-oss-120b"][1].bytes / GIB == pytest.approx(60.8, abs=0.1)
    one = placed(models["gpt-oss-120b"], "H100", Workload(131072, 1, headroom=0.08, tensor_parallel=1))
    two = placed(models["gpt-oss-120b"], "H100", Workload(131072, 1, headroom=0.08, tensor_parallel=2))
    assert (one.fits, two.fits) == (True, True)
    # DeepSeek V3 leaves eight H100 no cache, and fits eight B200. Another planner divides its latent cache among them
    # and has 84 requests of 131,072 tokens; vLLM keeps it whole on each.
    assert not placed(models["deepseek-v3"], "H100", Workload(4096, 1, headroom=0.1)).fits
    assert placed(models["deepseek-v3"], "B200", Workload(131072, 1, headroom=0.1)).most_requests == 9


def test_a_pipeline_divides_layers_and_their_cache(models: dict[str, tuple[ModelFacts, Weights]]) -> None:
    sixteen = placed(models["deepseek-v3"], "H100", replace(ASKED, tensor_parallel=8, pipeline_parallel=2))
    assert (sixteen.demand.gpus, sixteen.fits) == (16, True)
    whole = placed(models["deepseek-v3"], "H200")
    # 31 of 61 layers are in the larger stage.
    assert sixteen.demand.weights == pytest.approx(whole.demand.weights * 31 / 61, abs=1)
    assert sixteen.demand.kv_cache == pytest.approx(whole.demand.kv_cache * 31 / 61, abs=32)


def test_a_group_that_is_stated_is_the_only_one(models: dict[str, tuple[ModelFacts, Weights]]) -> None:
    assert placed(models["llama-3.3-70b"], "H100", replace(ASKED, tensor_parallel=8)).demand.gpus == 8
    two = placed(models["llama-3.3-70b"], "H100", replace(ASKED, tensor_parallel=2))
    assert (two.demand.gpus, two.fits, two.cache_bytes, two.longest_context) == (2, False, 0, None)


def test_why_a_group_does_not_divide_a_model_is_said(models: dict[str, tuple[ModelFacts, Weights]]) -> None:
    llama, weights = models["llama-3.3-70b"]
    assert indivisible(llama, weights, 8) is None
    assert indivisible(llama, weights, 3) == "3 does not divide the model's 64 attention heads"
    shared = replace(llama, kv_heads=6)
    assert indivisible(shared, weights, 4) == (
        "4 neither divides the model's 6 key-value heads nor is a multiple of them"
    )
    grouped = replace(weights, scheme="awq", group_size=128)
    assert indivisible(replace(llama, intermediate=29568), grouped, 2) == (
        "2 does not divide the 29,568 inputs of a layer in groups of 128 (awq)"
    )

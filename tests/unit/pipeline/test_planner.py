from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from pydantic import ByteSize

from containers.hardware.gpu import Gpu
from containers.hardware.gpu_models import GpuDataError, find_gpu, known_gpus, price_source
from containers.image import gpu_compatibility, profile
from containers.image.serving import Override, Serve
from evals.load.expected_memory import RUNTIME_BYTES
from evals.load.load_test import LoadPlan, Memory
from homes import DEMO
from pipeline.commands import planning
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.safetensors_headers import Tensor, read_model
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import PlanError, UnsupportedModelError
from pipeline.planner import asking
from pipeline.planner.document import PlanDocument
from pipeline.planner.facts import ModelFacts, read_facts
from pipeline.planner.memory import (
    Demand,
    Workload,
    activation_bytes,
    demand,
    indivisible,
    most_requests,
    smallest_fit,
    tensor_parallel_sizes,
    usable_bytes,
)
from pipeline.planner.plan import make_plan
from pipeline.planner.sources import describe, describe_folder
from pipeline.planner.speed import roofline
from pipeline.planner.weights import Weights, active_numbers, bytes_per_step, quantized, stored, unquantized
from pipeline.settings import Settings
from pipeline.sources.origin import Access
from pipeline.sources.source import resolve
from pipeline.spec import ModelSpec, ReleasedScheme, Source, load
from pipeline.stages import preflight
from pipeline.stages.preflight import foresee, not_served_here
from registry.manifest import Manifest
from registry.pull import ReleaseMetadata
from unit.pipeline import checkpoints, hub_server

PUBLIC = json.loads((Path(__file__).parents[2] / "data" / "public_configurations.json").read_text())["models"]
AWQ = Scheme(method="awq", backend="autoawq", group_size=128)


def facts_of(name: str, **changes: object) -> ModelFacts:
    return read_facts({**PUBLIC[name]["config"], **changes})


def model_of(config: dict[str, Any]) -> ModelDescription:
    """A Llama, as its checkpoints' headers describe it."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (config["vocab_size"], hidden))
    shapes["model.norm.weight"] = (hidden,)
    tensors = {name: Tensor("BF16", shape, 0, 2 * math.prod(shape), Path("x")) for name, shape in shapes.items()}
    return ModelDescription(config, tensors)


# The cache


@pytest.mark.parametrize("name", PUBLIC)
def test_a_token_takes_what_vllm_says_it_takes(name: str) -> None:
    assert facts_of(name).kv_bytes_per_token() == PUBLIC[name]["kv_bytes_per_token"]


def test_the_demo_takes_two_kilobytes_a_token_as_vllm_logged() -> None:
    # vLLM 0.32: "CPU KV cache size: 524,288 tokens" in 1 GiB.
    facts = read_facts(json.loads((DEMO / "model" / "config.json").read_text()))
    assert facts.kv_bytes_per_token() == 2**30 // 524288


def test_heads_are_divided_among_gpus_and_a_latent_is_not() -> None:
    llama, deepseek = facts_of("llama-3.1-70b"), facts_of("deepseek-v3")
    assert llama.kv_bytes_per_token(tensor_parallel=8) * 8 == llama.kv_bytes_per_token()
    assert llama.kv_bytes_per_token(tensor_parallel=16) == llama.kv_bytes_per_token(tensor_parallel=8)
    assert deepseek.kv_bytes_per_token(tensor_parallel=8) == deepseek.kv_bytes_per_token() == 61 * (512 + 64) * 2


def test_a_window_bounds_what_a_request_keeps() -> None:
    mistral, gemma = facts_of("mistral-7b-v0.1"), facts_of("gemma-3-1b")
    assert mistral.kv_bytes(2000) == 2000 * 131072
    assert mistral.kv_bytes(32768, batched_tokens=2048) == (4095 + 2048) * 131072
    whole = sum(layer.window is None for layer in gemma.layers)
    assert whole == 4
    assert gemma.kv_bytes(32768) == (4 * 32768 + 22 * 512) * 1024
    assert "sliding window of 512 in 22 of 26 layers" in gemma.attention


@pytest.mark.parametrize(
    ("changes", "windowed"),
    [
        ({"sliding_window": None}, 0),
        ({"use_sliding_window": False}, 0),
        ({"use_sliding_window": True, "max_window_layers": 28}, 4),
        ({"model_type": "gemma2"}, 16),
        ({"layer_types": ["sliding_attention", "full_attention"] * 16}, 16),
    ],
)
def test_which_layers_slide_is_read_as_each_architecture_says_it(changes: dict[str, Any], windowed: int) -> None:
    layers = facts_of("mistral-7b-v0.1", **changes).layers
    assert sum(layer.window == 4096 for layer in layers) == windowed


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["linear_attention"] * 32}, "`linear_attention`"),
        ({"layer_types": ["full_attention"]}, "1 of them for 32 layers"),
        ({"num_hidden_layers": None}, "`num_hidden_layers`"),
        ({"mamba_d_state": 16}, "`mamba_d_state`: the state"),
        ({"hybrid_layer_pattern": [0, 1] * 16}, "`hybrid_layer_pattern`"),
        ({"num_key_value_heads": [8, 8]}, "`num_key_value_heads` .*expected a number, or a list of 32"),
        ({"intermediate_size": {"0": 256}}, "`intermediate_size` .*expected a number"),
        ({"num_attention_heads": "32"}, "`num_attention_heads` .*expected a number"),
        ({"num_local_experts": 4, "mlp_only_layers": 3}, "`mlp_only_layers` 3: expected a list"),
        ({"sliding_window": 1.5}, "`sliding_window` 1.5"),
        ({"layer_types": "full_attention"}, "0 of them for 32 layers"),
        ({"num_hidden_layers": 10**9}, "1,000,000,000 layers"),
    ],
)
def test_what_is_not_known_is_refused_instead_of_guessed(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        facts_of("llama-3.1-8b", **changes)


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"num_key_value_heads": [8] * 16 + [4] * 16}, 16 * (8 + 4) * 2 * 128),
        ({"num_key_value_heads": None}, 32 * 32 * 2 * 128),
        ({"intermediate_size": [8192] * 32}, 32 * 8 * 2 * 128),
        ({"head_dim": None, "sliding_window": None, "layer_types": None}, 32 * 8 * 2 * 128),
        ({"num_kv_shared_layers": 12}, 20 * 8 * 2 * 128),
    ],
)
def test_numbers_may_be_null_or_one_for_each_layer(changes: dict[str, Any], numbers: int) -> None:
    assert facts_of("llama-3.1-8b", **changes).kv_bytes_per_token() == 2 * numbers


@pytest.mark.parametrize(
    ("changes", "expert_layers"),
    [
        ({"moe_layer_freq": [0] + [1] * 31}, 31),
        ({"moe_layer_freq": 2, "first_k_dense_replace": None}, 16),
        ({"moe_layers": [1, 3, 5]}, 3),
        ({"interleave_moe_layer_step": 2, "decoder_sparse_step": 0}, 16),
        ({"mlp_only_layers": None}, 32),
    ],
)
def test_the_layers_with_experts_are_counted_as_each_architecture_lists_them(
    changes: dict[str, Any], expert_layers: int
) -> None:
    facts = facts_of("llama-3.1-8b", num_local_experts=4, num_experts_per_tok=2, **changes)
    assert facts.expert_layers == expert_layers


@pytest.mark.parametrize("rotary", [[1, 1, 1, 0] * 8, [], None])
def test_llama_4_chunks_the_layers_with_rotary_positions(rotary: list[int] | None) -> None:
    changes = {"model_type": "llama4_text", "attention_chunk_size": 8192, "no_rope_layers": rotary}
    layers = facts_of("llama-3.1-8b", **changes).layers
    assert [layer.window for layer in layers] == [8192, 8192, 8192, None] * 8


def test_a_head_is_tied_where_the_class_ties_it() -> None:
    config = {key: value for key, value in PUBLIC["gemma-3-1b"]["config"].items() if key != "tie_word_embeddings"}
    assert read_facts(config).tied is True
    assert read_facts({**config, "tie_word_embeddings": False}).tied is False


def test_a_multimodal_models_text_part_counts() -> None:
    text = PUBLIC["llama-3.1-8b"]["config"]
    assert read_facts({"architectures": ["X"], "text_config": text}).kv_bytes_per_token() == 131072


# The weights


def test_seventy_billion_weights_are_141_gb_at_16_bits_and_40_at_4() -> None:
    model = model_of(PUBLIC["llama-3.1-70b"]["config"])
    half, packed = unquantized(model), quantized("awq", AWQ, model)
    assert half.numbers == 70_553_706_496
    assert half.bytes == 141_107_412_992
    bare = packed.quantized * 4 / 8
    assert bare / 1e9 == pytest.approx(34.2, abs=0.1)
    assert packed.bits_per_weight == pytest.approx(4 + 16 / 128 + 4 / 128)
    # Known of the published AWQ checkpoints of this model: nine files, 39.8 GB.
    assert packed.bytes / 1e9 == pytest.approx(39.8, abs=0.1)


@pytest.mark.parametrize(("method", "backend"), [("awq", "autoawq"), ("gptq", "gptqmodel")])
@pytest.mark.parametrize("group_size", [32, 64])
def test_a_scheme_takes_the_checkpoints_bytes_exactly(
    tmp_path: Path, method: Literal["awq", "gptq"], backend: Literal["autoawq", "gptqmodel"], group_size: int
) -> None:
    source = describe_folder(checkpoints.write_source(tmp_path / "source")).model
    made = read_model(checkpoints.write_quantized(tmp_path / "made", method, 4, group_size))
    planned = quantized("x", Scheme(method=method, backend=backend, group_size=group_size), source)
    assert planned.bytes == sum(tensor.bytes for tensor in made.values())
    assert unquantized(source).bytes == sum(tensor.bytes for tensor in source.tensors.values())


def test_what_is_stored_in_8_bits_is_served_in_8_and_its_scales_are_no_weights() -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.weight": Tensor("F8_E4M3", (64, 64), 0, 4096, Path("x")),
        "model.layers.0.mlp.up_proj.weight_scale_inv": Tensor("F32", (1, 1), 4096, 4100, Path("x")),
        "model.embed_tokens.weight": Tensor("BF16", (8, 64), 4100, 5124, Path("x")),
    }
    found = unquantized(ModelDescription({}, tensors))
    assert (found.bytes, found.numbers) == (4096 + 2 + 1024, 4096 + 512)


def test_a_cpu_without_bfloat16_holds_float32_copies() -> None:
    model = model_of(PUBLIC["llama-3.1-70b"]["config"])
    half, awq = unquantized(model), quantized("awq", AWQ, model)
    eight = quantized("gptq8", Scheme(method="gptq", backend="gptqmodel", bits=8), model)
    head, linear = 128256 * 8192, half.linear
    assert (half.head, awq.head, awq.linear) == (head, head, linear)
    # Packed at 4 bits and a little for scales, each weight becomes 4 bytes: 7.7 times as much.
    assert awq.on_cpu("avx2") == awq.bytes - awq.packed + 4 * linear + 4 * head
    assert 4 * linear / awq.packed == pytest.approx(7.7, abs=0.1)
    assert half.on_cpu("avx2") == half.on_cpu("avx512") == half.bytes + 2 * linear + 4 * head
    # With AVX-512 vLLM has a kernel for 4 bits, and none for 8.
    assert awq.on_cpu("avx512") == awq.bytes + 4 * head
    assert eight.on_cpu("avx512") == eight.on_cpu("avx2") == awq.on_cpu("avx2")
    assert eight.on_cpu("amx") == eight.bytes - eight.packed + 4 * linear
    for weights in (half, awq):
        assert weights.on_cpu("avx512_bf16") == weights.on_cpu("amx") == weights.bytes


def test_a_checkpoint_says_itself_what_it_takes_on_a_cpu(tmp_path: Path) -> None:
    model = describe_folder(DEMO / "model").model
    assert stored(model) == unquantized(model)
    checkpoint = checkpoints.write_quantized(tmp_path / "awq")
    awq = Scheme(method="awq", backend="gptqmodel", group_size=32)
    planned = quantized("", awq, describe_folder(checkpoints.write_source(tmp_path / "source")).model)
    assert stored(describe_folder(checkpoint).model).on_cpu("avx2") == planned.on_cpu("avx2")


def test_a_step_reads_the_experts_that_somebody_is_sent_to() -> None:
    facts = facts_of("qwen3-235b-a22b")
    experts = 94 * 128 * 3 * 4096 * 1536
    assert facts.all_experts == experts
    total = 235_093_634_560
    weights = Weights("fp16", 2 * total, 0, total, 0, 16, None, total, 0)
    assert active_numbers(weights, facts) / 1e9 == pytest.approx(22.2 - 0.6, abs=0.2)
    one, many = bytes_per_step(weights, facts, 1), bytes_per_step(weights, facts, 4096)
    assert one == pytest.approx(2 * active_numbers(weights, facts))
    assert many == pytest.approx(2 * (total - facts.embedding), rel=1e-6)


# What fits


def fit(name: str, gpu: str, weights: Weights, workload: Workload) -> tuple[Demand, bool]:
    return smallest_fit(facts_of(name), weights, find_gpu(gpu), workload)


def test_seventy_billion_weights_need_four_h100_at_16_bits_and_one_at_4() -> None:
    model = model_of(PUBLIC["llama-3.1-70b"]["config"])
    workload = Workload(context=4096, concurrency=8)
    half, fits = fit("llama-3.1-70b", "H100", unquantized(model), workload)
    assert (half.tensor_parallel, fits) == (4, True)
    packed, fits = fit("llama-3.1-70b", "H100", quantized("awq", AWQ, model), workload)
    assert (packed.tensor_parallel, fits) == (1, True)
    none, fits = fit("llama-3.1-70b", "T4", unquantized(model), workload)
    assert (none.tensor_parallel, fits) == (8, False)


def test_no_size_divides_what_it_cannot() -> None:
    model = model_of(PUBLIC["llama-3.1-8b"]["config"])
    half, packed = unquantized(model), quantized("awq", AWQ, model)
    assert list(tensor_parallel_sizes(facts_of("llama-3.1-8b"), half)) == [1, 2, 4, 8]
    assert list(tensor_parallel_sizes(facts_of("llama-3.1-8b"), packed)) == [1, 2, 4, 8]
    # Qwen2.5 72B: 29,568 = 231 * 128, so that groups of 128 can't be divided in two.
    odd = facts_of("llama-3.1-70b", intermediate_size=29568)
    assert list(tensor_parallel_sizes(odd, half)) == [1, 2, 4, 8]
    assert list(tensor_parallel_sizes(odd, packed)) == [1]


def test_the_activations_are_about_what_vllm_reported() -> None:
    assert activation_bytes(facts_of("llama-3.1-8b"), 8192, 256, 1) / 2**30 == pytest.approx(1.2, rel=0.1)


def test_the_cache_takes_what_the_rest_leaves_and_not_one_request_more() -> None:
    facts, gpu = facts_of("llama-3.1-8b"), find_gpu("L4")
    weights = quantized("awq", AWQ, model_of(PUBLIC["llama-3.1-8b"]["config"]))
    workload = Workload(context=8192, concurrency=1)
    most = most_requests(facts, demand(facts, weights, gpu, workload, 1), gpu, workload)
    full = Workload(context=8192, concurrency=most)
    assert most > 1
    assert demand(facts, weights, gpu, full, 1).total <= usable_bytes(gpu, full)
    over = Workload(context=8192, concurrency=most + 1)
    assert demand(facts, weights, gpu, over, 1).total > usable_bytes(gpu, over)


# Speed


def test_one_request_is_bound_by_bandwidth_and_many_by_arithmetic() -> None:
    facts, gpu = facts_of("llama-3.1-8b"), find_gpu("H100")
    weights = unquantized(model_of(PUBLIC["llama-3.1-8b"]["config"]))
    one = roofline(facts, weights, gpu, Workload(context=2, concurrency=1), 1)
    # 3,350 GB/s over 15.0 GB that a step reads (the embedding is looked up).
    assert one.one_request == pytest.approx(3350 / 15.01, rel=0.01)
    assert one.bound == "memory bandwidth"
    many = roofline(facts, weights, gpu, Workload(context=2, concurrency=4096), 1)
    assert many.bound == "arithmetic"
    assert many.all_requests == pytest.approx(989e12 / (2 * 7.505e9), rel=0.01)
    two = roofline(facts, weights, gpu, Workload(context=2, concurrency=1), 2)
    assert two.one_request == pytest.approx(2 * one.one_request)


# The plan, its sources and the GPUs' data


def test_a_plan_says_it_as_it_is() -> None:
    model = model_of(PUBLIC["llama-3.1-70b"]["config"])
    weights = [unquantized(model), quantized("awq", AWQ, model)]
    plan = make_plan("m", facts_of("llama-3.1-70b"), weights, [find_gpu("H100")], Workload(4096, 16), download_bytes=1)
    document = json.loads(plan.document().model_dump_json(by_alias=True))
    assert PlanDocument.model_validate(document) == plan.document()
    assert document["schemes"][0]["weights_bytes"] == 141_107_412_992
    assert any("34.2 GB of 4-bit weights, 1.34 GB of scales and zeros, 4.21 GB" in note for note in document["notes"])
    assert document["schemes"][0]["gpus"][0]["gpus"] == 4
    found = document["schemes"][0]["gpus"][0]
    assert found["dollars_per_hour"] == pytest.approx(4 * 4.76)
    speed = found["tokens_per_second_at_most"]["all_requests"]
    assert found["dollars_per_million_tokens_at_least"] == pytest.approx(4 * 4.76 / (3600 * speed) * 1e6)


def test_a_hubs_model_is_planned_without_its_weights(tmp_path: Path) -> None:
    folder = checkpoints.write_source(tmp_path / "model")
    local = describe_folder(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["model.safetensors"] = padded(files["model.safetensors"])
    with hub_server.serving(files) as hub:
        found = describe(resolve(f"hf://{hub_server.REPOSITORY}", access=Access(hub.endpoint)))
        asked = [wanted for _, path, wanted, _ in hub.seen if path.endswith(".safetensors")]
    assert {name: tensor.shape for name, tensor in found.model.tensors.items()} == {
        **{name: tensor.shape for name, tensor in local.model.tensors.items()},
        "big": (4_000_000,),
    }
    assert found.model.config == local.model.config
    assert asked == ["bytes=0-131071"]


def padded(data: bytes) -> bytes:
    """A file with four more megabytes of weights, which nobody should ask for."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["big"] = {"dtype": "U8", "shape": [4_000_000], "data_offsets": [end, end + 4_000_000]}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :] + bytes(4_000_000)


def test_a_header_longer_than_the_first_read_is_fetched_whole(tmp_path: Path) -> None:
    header = {
        f"model.layers.{number}.{'x' * 100}": {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]}
        for number in range(1500)
    }
    raw = json.dumps(header).encode()
    files = {
        "model.safetensors": len(raw).to_bytes(8, "little") + raw + bytes(1500),
        "config.json": json.dumps(checkpoints.config()).encode(),
        "tokenizer.json": b"{}",
    }
    with hub_server.serving(files) as hub:
        found = describe(resolve(f"hf://{hub_server.REPOSITORY}", access=Access(hub.endpoint)))
    assert len(raw) > 131072
    assert len(found.model.tensors) == 1500


def test_a_damaged_header_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PlanError, match="can't plan"):
        describe_folder(tmp_path)


def test_the_gpus_data_is_whole() -> None:
    gpus = known_gpus()
    assert len({gpu.name for gpu in gpus}) == len(gpus) >= 8
    for gpu in gpus:
        assert gpu.source.startswith("https://")
        assert 10 < gpu.memory_bytes / 2**30 < 300
        assert gpu.flops["fp16"] > 10 * gpu.bandwidth_bytes_per_s
        if gpu.price is not None:
            address, dated = price_source(gpu.price)
            assert address.startswith("https://")
            assert dated >= "2026"


@pytest.mark.parametrize(
    ("asked", "found"),
    [("h100", "H100"), ("l40s", "L40S"), ("A100-80GB", "A100 80GB"), ("NVIDIA H100 80GB HBM3", "H100"),
     ("NVIDIA L4", "L4"), ("NVIDIA GeForce RTX 4090", "RTX 4090")],
)  # fmt: skip
def test_a_gpu_is_found_as_it_is_typed_or_reported(asked: str, found: str) -> None:
    assert find_gpu(asked).name == found


def test_an_unknown_gpu_is_named_with_a_near_one() -> None:
    with pytest.raises(GpuDataError, match="did you mean `H200`"):
        find_gpu("H201")


# Before a release


def spec_of(**changes: object) -> ModelSpec:
    spec = load(DEMO.parent / "demo.yaml")
    return spec.model_copy(update=changes)


def test_a_release_says_first_what_it_will_take(tmp_path: Path) -> None:
    lines: list[str] = []
    planned = foresee(spec_of(), ["awq"], Settings.read({"SLIPWAY_HOME": str(tmp_path)}), lines.append)
    assert planned is not None
    assert lines == ["plan: awq takes 3.8 MB, 4.31 bits a weight"]


def test_a_release_says_first_which_schemes_this_cpu_cannot_serve(tmp_path: Path) -> None:
    lines: list[str] = []
    asked: dict[str, dict[str, Any]] = {
        "fp8": {},
        "cached": {"method": "fp8", "kv_cache": "fp8"},
        "w4a16": {"group_size": 64},
        "nvfp4": {},
    }
    schemes = {
        name: ReleasedScheme.model_validate({"method": name, "backend": "llmcompressor", **more})
        for name, more in asked.items()
    }
    spec = spec_of(schemes=schemes)
    here = Settings.read({"SLIPWAY_HOME": str(tmp_path), "SLIPWAY_CPU_ISA": "avx2"})
    assert foresee(spec, list(schemes), here, lines.append) is not None
    found = [line for line in lines if "can't be served on this machine" in line]
    whole = "`drift` and `load` will be inconclusive; with `evals: {engine: hf}` drift is measured without vLLM"
    reasons = {
        "cached": "`kv_cache: fp8` needs a CPU with AVX-512 or AMX, and this one has avx2: test it on another machine",
        "nvfp4": "vLLM has no kernel for `method: nvfp4` on CPUs",
    }
    assert found == [f"{name} can't be served on this machine ({reason}): {whole}" for name, reason in reasons.items()]
    without = spec.model_copy(update={"evals": spec.evals.model_copy(update={"engine": "hf"})})
    assert [line.rpartition(": ")[2] for line in not_served_here(without, schemes, here, experts=False)] == [
        "`load` will be inconclusive"
    ] * 2
    assert not not_served_here(spec, schemes, replace(here, docker_host="tcp://engine:2376"), experts=False)


def test_squares_of_fp8_are_not_cut_by_tensor_parallelism() -> None:
    model = describe_folder(DEMO / "model").model
    facts = read_facts(model.config)
    for method, problem in {
        "fp8": None,
        "fp8-block": "2 leaves 64 outputs of the keys' layer, which squares of 128 (x) don't divide",
    }.items():
        scheme = Scheme.model_validate({"method": method, "backend": "llmcompressor"})
        weights = quantized("x", scheme, model)
        assert (indivisible(facts, weights, 1), indivisible(facts, weights, 2)) == (None, problem)


def test_calibrated_scales_of_the_cache_are_planned_and_the_cache_is_served_in_fp8() -> None:
    plain, cached = (
        ReleasedScheme.model_validate({"method": "fp8", "backend": "llmcompressor", **more})
        for more in ({}, {"kv_cache": "fp8"})
    )
    model = describe_folder(DEMO / "model").model
    # Keys and values of four layers, two bytes each.
    assert quantized("x", cached, model).bytes - quantized("x", plain, model).bytes == 16
    spec = spec_of(schemes={"plain": plain, "cached": cached})
    assert (spec.serving("plain").kv_cache, spec.serving("cached").kv_cache) == ("auto", "fp8")


def test_a_release_that_its_server_cannot_hold_is_refused_before_any_work(tmp_path: Path) -> None:
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path)})

    def held_to(gib: float) -> LoadPlan:
        return spec_of().load.model_copy(update={"memory": Memory(limit_bytes=ByteSize(gib * 2**30))})

    # The cache of one rank takes one gibibyte, and the runtime 1.26.
    assert foresee(spec_of(load=held_to(2.3)), ["awq"], settings, print) is not None
    with pytest.raises(PlanError, match=r"1\.00 GiB of KV cache for 1 rank, .* of the runtime\), .* gives 2\.20 GiB"):
        foresee(spec_of(load=held_to(2.2)), ["awq"], settings, print)
    two_ranks = spec_of(load=held_to(3.5), serve=Serve(tensor_parallel=2))
    with pytest.raises(PlanError, match=r"awq needs 3\.8\d GiB \(.* 2\.00 GiB of KV cache for 2 ranks"):
        foresee(two_ranks, ["awq"], settings, print)
    assert not (tmp_path / "artifacts").exists()


def test_float32_copies_count_where_this_cpu_serves_and_not_behind_an_engine_elsewhere(tmp_path: Path) -> None:
    stored = 2**30 + RUNTIME_BYTES["vllm-cpu"] + 6_000_000
    room = spec_of().load.model_copy(update={"memory": Memory(limit_bytes=ByteSize(stored))})
    here = Settings.read({"SLIPWAY_HOME": str(tmp_path), "SLIPWAY_CPU_ISA": "avx2"})
    with pytest.raises(PlanError, match="in float32 where a CPU with avx2 has no kernel for them"):
        foresee(spec_of(load=room), ["awq"], here, print)
    assert foresee(spec_of(load=room), ["awq"], replace(here, docker_host="tcp://engine:2376"), print) is not None


def test_a_release_that_the_disk_cannot_hold_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(PlanError, match="are free for"):
        foresee(spec_of(), ["awq"], Settings.read({"SLIPWAY_HOME": str(tmp_path)}), print)


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, 1024),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 4096),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 2048),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, 8192),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}, 1024),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 1024),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 1024),
    ],
)  # fmt: skip
def test_the_longest_context_counts_rotary_scaling_as_the_engine_does(changes: dict[str, Any], context: int) -> None:
    config = json.loads((DEMO / "model" / "config.json").read_text())
    assert read_facts({**config, **changes}).context == context


@pytest.mark.parametrize(
    ("serve", "awq", "problem"),
    [
        ({"tensor_parallel": 3}, {}, "`serve.tensor_parallel`: 3 does not divide the model's 4 attention heads"),
        ({}, {"tensor_parallel": 3}, "`schemes.awq.serve.tensor_parallel`: 3 does not divide"),
        ({"context": 2048}, {}, "`serve.context`: the model's longest context is 1,024 tokens (found 2,048)"),
        ({"pipeline_parallel": 5}, {}, "`serve.pipeline_parallel`: the model has 4 layers (found 5)"),
        ({"variants": {"wide": {"tensor_parallel": 8}}}, {},
         "`serve.variants.wide.tensor_parallel`: 8 does not divide the model's 4 attention heads"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_allow_is_refused_by_its_key_in_a_plan_and_before_a_release(
    tmp_path: Path, serve: dict[str, Any], awq: dict[str, Any], problem: str
) -> None:
    schemes = dict(spec_of().schemes)
    schemes["awq"] = schemes["awq"].model_copy(update={"serve": Override.model_validate(awq)})
    spec = spec_of(serve=Serve.model_validate(serve), schemes=schemes)
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path)})
    for check in (lambda: foresee(spec, ["awq"], settings, print), lambda: asking.plan_source(spec, settings, [])):
        with pytest.raises(UnsupportedModelError, match=re.escape(problem)):
            check()


def test_a_plan_takes_what_the_file_says_and_refuses_what_no_gpu_holds(tmp_path: Path) -> None:
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path)})
    stated = {"context": 512, "tensor_parallel": 2, "kv_cache": "fp8", "gpu_memory": 0.9, "max_sequences": 8}
    spec = spec_of(serve=Serve.model_validate(stated))
    planned = asking.plan_source(spec, settings, [find_gpu("L4")])
    assert planned.refused == {}
    assert (planned.workload.context, planned.workload.kv_number_bytes, planned.workload.max_sequences) == (512, 1, 8)
    assert planned.workload.headroom == pytest.approx(0.1)
    assert [placement.demand.gpus for scheme in planned.schemes for placement in scheme.placements] == [2, 2, 2]
    tiny = find_gpu("L4").model_copy(update={"memory_bytes": 1 << 30})
    (refused,) = asking.plan_source(spec, settings, [tiny]).refused["awq"]
    assert refused.startswith("`serve.context` 512 and `serve.tensor_parallel` 2: 16 concurrent requests need 1.")
    assert refused.endswith(" GiB on each of 2 L4, of which 0.9 GiB are usable")
    unstated = asking.plan_source(spec_of(), settings, [tiny])
    assert unstated.refused == {}


def test_a_release_needs_as_many_gpus_as_its_file_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path)})
    h100 = Gpu(0, "GPU-0", "NVIDIA H100 80GB HBM3", 85520809984, "580.95.05", (9, 0))
    monkeypatch.setattr(preflight, "gpus", lambda: [h100])
    spec = spec_of(runtime="vllm-cuda13", serve=Serve(tensor_parallel=2))
    with pytest.raises(PlanError, match=r"awq: `serve\.tensor_parallel` asks for 2 GPUs, and this machine has 1"):
        foresee(spec, ["awq"], settings, print)
    monkeypatch.setattr(preflight, "gpus", lambda: [h100, h100])
    assert foresee(spec, ["awq"], settings, print) is not None


def test_a_source_that_cannot_be_looked_at_is_left_to_its_stage(tmp_path: Path) -> None:
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path)})
    assert foresee(spec_of(source=Source(uri=f"file:{tmp_path}/none")), ["awq"], settings, print) is None


def test_a_release_is_held_to_the_driver_that_is_named_as_its_image_says() -> None:
    runtime = profile.load("vllm-cuda13")
    labels = {
        **gpu_compatibility.labels_of(runtime),
        gpu_compatibility.RUNTIME: runtime.name,
        gpu_compatibility.MODEL_BYTES: str(30 << 30),
    }
    nothing = Manifest.model_construct()  # type: ignore[call-arg]
    release = ReleaseMetadata("1", nothing, {asking.IMAGE: json.dumps({"labels": labels}).encode()})
    needs = planning._needs(None, release)
    told = planning._gate(needs, [find_gpu("H100"), find_gpu("L4")], "550.54.15")
    assert told[0].startswith("vllm-cuda13 needs NVIDIA driver 580.65.06, CUDA 13.0")
    assert "refused: vllm-cuda13 needs NVIDIA driver 580.65.06 or later, but this host has 550.54.15" in told
    assert any("of weights and 0.0 GiB of cache take a GPU of 37.5 GiB" in line and "L4 has" in line for line in told)
    assert len(planning._gate(needs, [find_gpu("H100")], "580.65.06")) == 1

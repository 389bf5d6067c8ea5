"""What vLLM says it applied, read from real logs of its CPU engine and from its own messages about GPUs.

The lines about GPUs are vLLM 0.32's format strings with values, not seen on a GPU. `data/engine_logs` has real logs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from containers.sandbox import kernels
from containers.sandbox.engine_report import EngineReport, Requested, not_applied, read

LOGS = Path(__file__).parents[2] / "data" / "engine_logs"
CONFIGURATION = (
    "(EngineCore pid=41) INFO 11-29 22:09:34 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: "
    "model='/model', speculative_config={speculative}, tokenizer='/model', dtype=torch.bfloat16, max_seq_len=16384, "
    "tensor_parallel_size={ranks}, pipeline_parallel_size=1, quantization=compressed-tensors, enforce_eager=False, "
    "kv_cache_dtype={cache}, device_config=cuda, enable_prefix_caching=True, enable_chunked_prefill=True"
)
GPU = "(Worker pid=52) {level} 11-29 22:09:41 [{file}] {message}"


def log(*messages: str, speculative: str = "None", cache: str = "auto", ranks: int = 1) -> str:
    lines = [CONFIGURATION.format(speculative=speculative, cache=cache, ranks=ranks)]
    lines += [GPU.format(level="INFO", file="__init__.py:758", message=message) for message in messages]
    return "\n".join(lines)


def reported(*messages: str, speculative: str = "None", cache: str = "auto", ranks: int = 1) -> EngineReport:
    found = read(log(*messages, speculative=speculative, cache=cache, ranks=ranks), None)
    assert found is not None
    return found


def real(name: str) -> EngineReport:
    text = (LOGS / name).read_bytes()
    found = read(text.decode(), kernels.find(text))
    assert found is not None
    return found


def requested(*arguments: str, weight_only: bool = True, cache_bytes: int | None = None) -> Requested:
    return Requested(arguments=arguments, weight_only=weight_only, cache_bytes_per_token=cache_bytes)


def test_a_real_server_with_speculation_says_what_it_runs() -> None:
    found = real("applied_ngram.log")
    assert found.speculative == "ngram"
    assert found.kernels["AutoGPTQLinearMethod"] == ("CPUWNA16LinearKernel",)
    assert found.attention == ("CPU_ATTN",)
    assert found.kv_cache == found.configuration["dtype"] == "bfloat16"
    assert found.cache_bytes_per_token == 2048
    assert found.configuration["max_seq_len"] == "1024"
    asked = requested(
        "--dtype", "bfloat16", "--max-model-len", "1024",
        "--speculative-config", '{"method":"ngram","num_speculative_tokens":4}',
    )  # fmt: skip
    assert not_applied(asked, found, on_gpu=False) == []


def test_a_real_server_with_an_8_bit_cache_takes_half_the_bytes() -> None:
    found = real("applied_fp8_cache.log")
    assert found.kv_cache == "fp8"
    assert found.cache_bytes_per_token == 1024
    assert not_applied(requested("--kv-cache-dtype", "fp8", cache_bytes=2048), found, on_gpu=False) == []


def test_a_cache_that_stayed_at_16_bits_is_named() -> None:
    plain = real("applied_ngram.log")
    (said,) = not_applied(requested("--kv-cache-dtype", "fp8"), plain, on_gpu=False)
    assert said == "a KV cache of fp8 was requested, and the engine's is bfloat16"
    # The engine claims 8 bits, and its memory says 16: 70 GiB for 524,288 tokens in each of two ranks.
    claimed = reported(
        "Available KV cache memory: 70.0 GiB",
        "GPU KV cache size: 524,288 tokens, Maximum concurrency for 16,384 tokens per request: 32.00x",
        cache="fp8", ranks=2,
    )  # fmt: skip
    (said,) = not_applied(requested("--kv-cache-dtype=fp8", cache_bytes=286_720), claimed, on_gpu=True)
    assert said == ("a KV cache of fp8 was requested, and a token takes 286720 bytes of it: 286720 would be 16 bits")
    assert not_applied(requested("--kv-cache-dtype=fp8", cache_bytes=2 * 286_720), claimed, on_gpu=True) == []


def test_speculation_that_was_switched_off_is_named() -> None:
    asked = requested("--speculative-config", '{"method":"ngram","num_speculative_tokens":4}')
    (said,) = not_applied(asked, reported(), on_gpu=True)
    assert said == "speculation by ngram was requested, and the engine switched it off"
    other = reported(speculative="SpeculativeConfig(method='mtp', model='/draft', num_spec_tokens=2)")
    (said,) = not_applied(asked, other, on_gpu=True)
    assert said == "speculation by ngram was requested, and the engine drafts by mtp"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dtype", "float16"), "`--dtype float16` was requested, and the engine runs with bfloat16"),
        (("--max-model-len", "32768"), "`--max-model-len 32768` was requested, and the engine runs with 16384"),
        (("--tensor-parallel-size=2",), "`--tensor-parallel-size 2` was requested, and the engine runs with 1"),
        (
            ("--no-enable-prefix-caching",),
            "`--no-enable-prefix-caching` was requested, and the engine says enable_prefix_caching=True",
        ),
    ],
)
def test_another_value_is_named(arguments: tuple[str, ...], said: str) -> None:
    assert not_applied(requested(*arguments), reported(), on_gpu=True) == [said]


def test_what_was_applied_or_left_to_the_engine_is_not_named() -> None:
    asked = requested("--dtype", "auto", "--max-model-len", "16384", "--kv-cache-dtype", "auto")
    assert not_applied(asked, reported(), on_gpu=True) == []


def test_kernels_by_layer_type_as_on_a_gpu() -> None:
    found = reported(
        "Selected CutlassFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8",
        "Using MarlinLinearKernel for CompressedTensorsWNA16",
        "Using FlashInferCutlassNvFp4LinearKernel for NVFP4 GEMM",
        "Using 'FLASHINFER_TRTLLM' NvFp4 MoE backend out of potential backends: ['FLASHINFER_TRTLLM'].",
        "Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN', 'FLASHINFER'].",
        "Using FlashAttention version 3",
    )
    assert found.kernels == {
        "CompressedTensorsW8A8Fp8": ("CutlassFP8ScaledMMLinearKernel",),
        "CompressedTensorsWNA16": ("MarlinLinearKernel",),
        "NVFP4": ("FlashInferCutlassNvFp4LinearKernel",),
        "NvFp4 MoE backend": ("FLASHINFER_TRTLLM",),
    }
    assert found.attention == ("FLASH_ATTN", "FlashAttention version 3")
    assert not_applied(requested(weight_only=False), found, on_gpu=True) == []


MARLIN = (
    "Your GPU does not have native support for FP8 computation but FP8 quantization is being used. Weight-only FP8 "
    "compression will be used leveraging the Marlin kernel. This may degrade performance for compute-heavy workloads."
)


def test_a_dequantizing_fallback_on_a_gpu_is_named() -> None:
    marlin = reported("Selected MarlinFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8", MARLIN)
    (said,) = not_applied(requested(weight_only=False), marlin, on_gpu=True)
    assert said.startswith("quantized layers fell back to 16-bit arithmetic: Your GPU does not have native support")
    assert not_applied(requested(weight_only=True), marlin, on_gpu=True) == []
    assert not_applied(requested(weight_only=False), marlin, on_gpu=False) == []
    emulated = reported("Using EmulationNvFp4LinearKernel for NVFP4 GEMM")
    (said,) = not_applied(requested(weight_only=True), emulated, on_gpu=True)
    assert said == "NVFP4 is served by EmulationNvFp4LinearKernel, which dequantizes its weights"


def test_a_log_of_another_form_says_nothing() -> None:
    assert read("INFO:     Started server process [1]\n", None) is None
    hostile = (
        "Selected " + "x" * 500 + " for y",
        "Using <script> for z",
        "KV cache size: , tokens, Maximum concurrency",
    )
    found = read(log(*hostile), None)
    assert found is not None
    assert (found.kernels, found.cache_tokens) == ({}, None)
    many = read(log(*(f"Selected Kernel{number} for Layers{number}" for number in range(99))), None)
    assert many is not None
    assert len(many.kernels) == 32


def test_the_report_is_read_back_as_it_was_written() -> None:
    found = real("applied_ngram.log")
    assert EngineReport.model_validate_json(json.dumps(found.model_dump(mode="json"))) == found

"""Packed layouts, against packers written from the formats' descriptions, value by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from evals.drift.packed import FormatError, unpack_experts, unpack_linear, unpack_words
from pipeline.quantization.quantizers.compressed_tensors_config import quantization_config
from unit.pipeline import compressed

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _stream(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack each column of (n, m) values into 32-bit words as one long Python integer would hold them."""
    columns = []
    for column in values.T:
        whole = sum(int(value) << (bits * place) for place, value in enumerate(column))
        words = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(len(column) * bits // 32)]
        columns.append(np.array(words, dtype=np.uint32).view(np.int32))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_bit_stream_comes_apart(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, size=(96, 5))
    assert np.array_equal(unpack_words(_stream(values, bits), bits), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_gives_back_the_weights(bits: int, layout: str) -> None:
    rng = np.random.default_rng(bits)
    q, z = rng.integers(0, 2**bits, size=(64, 32)), rng.integers(1, 2**bits, size=(2, 32))
    scales = rng.uniform(0.01, 0.1, size=(2, 32)).astype(np.float16)
    groups = rng.permutation(np.repeat([0, 1], 32)).astype(np.int32)
    stored = z - 1 if layout == "gptq" else z
    parts = {"qweight": _stream(q, bits), "qzeros": _stream(stored.T, bits).T, "scales": scales, "g_idx": groups}
    weight = unpack_linear(parts, {"quant_method": "gptq", "bits": bits, "checkpoint_format": layout})
    expected = (q - z[groups]) * scales.astype(np.float32)[groups]
    np.testing.assert_allclose(weight, expected.T, rtol=1e-6)


def test_gptq_without_an_index_has_its_groups_in_order() -> None:
    q, z = np.full((64, 8), 9), np.full((2, 8), 8)
    scales = np.stack([np.full(8, 0.5), np.full(8, 2.0)]).astype(np.float16)
    parts = {"qweight": _stream(q, 4), "qzeros": _stream((z - 1).T, 4).T, "scales": scales}
    weight = unpack_linear(parts, {"quant_method": "gptq", "bits": 4})
    assert np.array_equal(weight[0], np.repeat([0.5, 2.0], 32).astype(np.float32))


def test_awq_gives_back_the_weights() -> None:
    rng = np.random.default_rng(1)
    q, z = rng.integers(0, 16, size=(64, 16)), rng.integers(0, 16, size=(2, 16))
    scales = rng.uniform(0.01, 0.1, size=(2, 16)).astype(np.float16)

    def pack(values: np.ndarray) -> np.ndarray:
        words = np.zeros((len(values), values.shape[1] // 8), dtype=np.uint32)
        for place, value in enumerate(AWQ_ORDER):
            words |= (values[:, value::8] << (4 * place)).astype(np.uint32)
        return words.view(np.int32)

    parts = {"qweight": pack(q), "qzeros": pack(z), "scales": scales}
    weight = unpack_linear(parts, {"quant_method": "awq", "bits": 4, "version": "gemm"})
    groups = np.repeat([0, 1], 32)
    np.testing.assert_allclose(weight, ((q - z[groups]) * scales.astype(np.float32)[groups]).T, rtol=1e-6)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "awq", "bits": 8},
        {"quant_method": "gptq", "bits": 5},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {},
    ],
)
def test_an_unknown_format_is_refused_by_name(quantization: dict[str, object]) -> None:
    with pytest.raises(FormatError, match=r"not read here: .*`(gemm|gptq)`"):
        unpack_linear({}, quantization)


@pytest.mark.parametrize("method", ["fp8", "fp8-block", "w8a8", "w4a16", "nvfp4", "mxfp4"])
def test_compressed_tensors_give_back_about_the_weights(method: str) -> None:
    weight = np.random.default_rng(1).standard_normal((64, 128)).astype(np.float32)
    scheme = compressed.scheme(method, **({"group_size": 32} if method == "w4a16" else {}))
    request: Any = {**scheme.model_dump(), "kv_cache": None, "ignored": [], "mixture": ()}
    stated = quantization_config(request)
    parts = {part: compressed.decoded(stored) for part, stored in compressed.encode(method, weight).items()}
    found = unpack_linear(parts, stated)
    error = float(np.linalg.norm(found - weight) / np.linalg.norm(weight))
    assert error < (0.03 if scheme.bits == 8 else 0.2)


def test_another_format_of_compressed_tensors_is_refused() -> None:
    stated = {
        "quant_method": "compressed-tensors",
        "format": "marlin-24",
        "config_groups": {"group_0": {"weights": {}}},
    }
    with pytest.raises(FormatError, match="`marlin-24` is not read here"):
        unpack_linear({}, stated)


def test_squares_as_deepseek_publishes_them_give_back_about_the_weights() -> None:
    weight = np.random.default_rng(3).standard_normal((96, 200)).astype(np.float32)
    stored = compressed.encode_squares(weight, 64)
    parts = {name: compressed.decoded(each) for name, each in stored.items()}
    found = unpack_linear(parts, {"quant_method": "fp8", "weight_block_size": [64, 64]})
    assert np.sqrt(np.square(found - weight).mean()) < 0.03


def test_experts_as_gpt_oss_publishes_them_give_back_about_the_weights() -> None:
    experts = np.random.default_rng(4).standard_normal((3, 64, 40)).astype(np.float32)
    each = [compressed.encode("mxfp4", expert.T) for expert in experts]
    scales = np.stack([one["weight_scale"][1] for one in each])
    blocks = np.stack([one["weight_packed"][1] for one in each]).reshape(*scales.shape, 16)
    found = unpack_experts(blocks, scales)
    assert found.shape == experts.shape
    assert np.sqrt(np.square(found - experts).mean()) < 0.2

"""Checkpoints of compressed-tensors: sound ones pass, and each kind of damage is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import CheckpointError
from pipeline.quantization.checkpoint import check
from unit.pipeline import checkpoints, compressed

METHODS = ["fp8", "fp8-block", "w8a8", "w4a16", "nvfp4", "mxfp4"]
LAYER = "model.layers.1.mlp.down_proj"
# Bits of a weight with its share of scales; what a layer has but once adds to them.
BITS = {"fp8": 8, "fp8-block": 8, "w8a8": 8, "w4a16": 4.5, "nvfp4": 4.5, "mxfp4": 4.25}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write_source(tmp_path / "source")


def refusal(folder: Path, source: Path, method: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        check(folder, source, compressed.scheme(method, **({"group_size": 32} if method == "w4a16" else {})))
    return str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_sound_checkpoint_passes(tmp_path: Path, source: Path, method: str) -> None:
    scheme = compressed.scheme(method, **({"group_size": 32} if method == "w4a16" else {}))
    found = check(compressed.write(tmp_path / "made", method), source, scheme)
    assert found.layers == len(checkpoints.linears())
    assert BITS[method] <= found.bits_per_weight < BITS[method] + 0.3


@pytest.mark.parametrize("method", [method for method in METHODS if method != "w8a8"])
def test_scales_wrong_by_a_factor_are_refused(tmp_path: Path, source: Path, method: str) -> None:
    tensors = compressed.quantized(method)
    if method == "nvfp4":
        tensors[f"{LAYER}.weight_global_scale"][1][:] /= 2
    elif method == "mxfp4":
        tensors[f"{LAYER}.weight_scale"][1][:] += 1
    else:
        tensors[f"{LAYER}.weight_scale"][1][:] *= 2
    message = refusal(compressed.write(tmp_path / "made", method, tensors), source, method)
    assert f"{LAYER} decodes to " in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_another_layer_are_refused(tmp_path: Path, source: Path, method: str) -> None:
    tensors = compressed.quantized(method)
    twin = LAYER.replace("layers.1", "layers.0")
    for name in [name for name in tensors if name.startswith(LAYER)]:
        other = name.replace(LAYER, twin)
        tensors[name], tensors[other] = tensors[other], tensors[name]
    message = refusal(compressed.write(tmp_path / "made", method, tensors), source, method)
    assert f"{LAYER} does not decode to the source's weights" in message


@pytest.mark.parametrize("method", ["fp8", "w8a8", "w4a16", "nvfp4", "mxfp4"])
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, source: Path, method: str) -> None:
    tensors = compressed.quantized(method)
    dtype, scales = tensors[f"{LAYER}.weight_scale"]
    scales[0, 0] = np.nan if dtype == "float16" else 127 if dtype == "float8_e4m3fn" else 255
    message = refusal(compressed.write(tmp_path / "made", method, tensors), source, method)
    assert f"{LAYER}.weight_scale holds a value that is not" in message


@pytest.mark.parametrize(("method", "noticed"), [("fp8", True), ("nvfp4", True), ("w8a8", False)])
def test_what_is_not_quantized_stays_as_it_was(tmp_path: Path, source: Path, method: str, noticed: bool) -> None:
    tensors = compressed.quantized(method)
    norm = tensors["model.layers.0.input_layernorm.weight"]
    norm[1][0] += 1
    folder = compressed.write(tmp_path / "made", method, tensors)
    if noticed:
        assert "`model.layers.0.input_layernorm.weight` differs from the source's" in refusal(folder, source, method)
    else:  # SmoothQuant divides norms by its factors
        assert check(folder, source, compressed.scheme(method)).layers


def test_a_shard_of_another_scheme_is_refused(tmp_path: Path, source: Path) -> None:
    tensors = compressed.quantized("fp8")
    for name in [name for name in tensors if name.startswith(LAYER)]:
        del tensors[name]
    weight = checkpoints.unquantized()[f"{LAYER}.weight"].astype(np.float32)
    tensors |= {f"{LAYER}.{part}": stored for part, stored in compressed.encode("w8a8", weight).items()}
    message = refusal(compressed.write(tmp_path / "made", "fp8", tensors), source, "fp8")
    assert f"{LAYER}.weight is I8 [64, 128], expected F8_E4M3 [64, 128]" in message


def test_a_configuration_that_says_another_thing_is_refused(tmp_path: Path, source: Path) -> None:
    folder = compressed.write(tmp_path / "made", "fp8", format="int-quantized")
    assert "`quantization_config.format` is 'int-quantized', expected 'float-quantized'" in refusal(
        folder, source, "fp8"
    )
    folder = compressed.write(tmp_path / "another", "nvfp4")
    assert "`quantization_config.format` is 'nvfp4-pack-quantized'" in refusal(folder, source, "mxfp4")


def test_a_cache_in_fp8_needs_a_scale_for_each_layer(tmp_path: Path, source: Path) -> None:
    scheme = compressed.scheme("fp8", kv_cache="fp8")
    tensors = compressed.quantized("fp8")
    attentions = [f"model.layers.{number}.self_attn" for number in range(checkpoints.LAYERS)]
    tensors |= {
        f"{each}.{part}": ("float16", np.ones(1, np.float16)) for each in attentions for part in ("k_scale", "v_scale")
    }
    assert check(compressed.write(tmp_path / "made", "fp8", tensors), source, scheme).layers
    del tensors[f"{attentions[0]}.k_scale"]
    tensors[f"{attentions[1]}.v_scale"][1][0] = 0
    with pytest.raises(CheckpointError) as caught:
        check(compressed.write(tmp_path / "damaged", "fp8", tensors), source, scheme)
    assert f"`{attentions[0]}.k_scale` is missing" in str(caught.value)
    assert f"{attentions[1]}.v_scale holds 1 values that are not above zero" in str(caught.value)

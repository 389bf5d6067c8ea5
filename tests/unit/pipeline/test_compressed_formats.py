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


def test_scales_wrong_by_a_factor_are_refused_in_a_layer_that_smoothquant_left_alone(
    tmp_path: Path, source: Path
) -> None:
    """A norm that has changed by nearly one factor explains doubled scales too, but not as well as no norm does."""
    tensors = compressed.quantized("w8a8")
    norm = tensors["model.layers.1.input_layernorm.weight"][1]
    norm *= (0.6 * np.exp(np.random.default_rng(3).normal(0, 0.04, norm.shape))).astype(np.float16)
    assert check(compressed.write(tmp_path / "sound", "w8a8", tensors), source, compressed.scheme("w8a8")).layers
    tensors["model.layers.1.self_attn.q_proj.weight_scale"][1][:] *= 2
    message = refusal(compressed.write(tmp_path / "made", "w8a8", tensors), source, "w8a8")
    assert "model.layers.1.self_attn.q_proj decodes to 2.00 times the source's weights" in message


@pytest.mark.parametrize("method", METHODS)
def test_a_zeroed_expert_and_a_quantized_tower_are_refused(tmp_path: Path, method: str) -> None:
    expert, tower = "model.layers.0.mlp.experts.0.up_proj", "vision_tower.encoder.layers.0.q_proj"
    weights = {name: np.random.default_rng(1).standard_normal((64, 64)).astype(np.float16) for name in (expert, tower)}
    whole = checkpoints.unquantized() | {f"{name}.weight": weight for name, weight in weights.items()}
    source = checkpoints.write(tmp_path / "source", whole, checkpoints.config())
    tensors = compressed.quantized(method) | {f"{tower}.weight": ("float16", weights[tower])}
    packed = compressed.encode(method, weights[expert].astype(np.float32))
    tensors |= {f"{expert}.{part}": stored for part, stored in packed.items()}
    scheme = compressed.scheme(method, **({"group_size": 32} if method == "w4a16" else {}))
    assert check(compressed.write(tmp_path / "sound", method, tensors), source, scheme).layers == 9

    values = packed["weight" if "weight" in packed else "weight_packed"][1]
    values[:] = -0x77777778 if method == "w4a16" else 0  # eight times the middle of four bits
    message = refusal(compressed.write(tmp_path / "zeroed", method, tensors), source, method)
    assert f"{expert} does not decode to the source's weights" in message

    tensors |= {
        f"{expert}.{part}": each for part, each in compressed.encode(method, weights[expert].astype(np.float32)).items()
    }
    del tensors[f"{tower}.weight"]
    encoded = compressed.encode(method, weights[tower].astype(np.float32))
    tensors |= {f"{tower}.{part}": stored for part, stored in encoded.items()}
    assert f"{tower} is quantized and should not be" in refusal(
        compressed.write(tmp_path / "tower", method, tensors), source, method
    )


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

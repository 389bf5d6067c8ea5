from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.compatibility.scheme import Scheme
from pipeline.errors import CheckpointError
from pipeline.quantization.checkpoint import check
from unit.pipeline import checkpoints

LAYER = "model.layers.1.mlp.down_proj"


def scheme(method: str = "awq", bits: int = 4, **more: object) -> Scheme:
    backend = "autoawq" if method == "awq" else "gptqmodel"
    return Scheme.model_validate({"method": method, "backend": backend, "bits": bits, "group_size": 32, **more})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write_source(tmp_path / "source")


@pytest.mark.parametrize(("method", "bits"), [("awq", 4), ("gptq", 2), ("gptq", 3), ("gptq", 4), ("gptq", 8)])
def test_a_sound_checkpoint_passes(tmp_path: Path, source: Path, method: str, bits: int) -> None:
    folder = checkpoints.write_quantized(tmp_path / "made", method, bits)
    found = check(folder, source, scheme(method, bits))
    assert found.layers == len(checkpoints.linears())
    assert found.bytes == (folder / "model.safetensors").stat().st_size
    assert found.source_bytes == (source / "model.safetensors").stat().st_size
    # A scale of 16 bits and a zero of `bits` for 32 weights; GPTQ's index besides.
    at_least = bits + (16 + bits) / 32
    assert at_least <= found.bits_per_weight <= at_least + 1


def refused(tmp_path: Path, source: Path, change: Callable[[checkpoints.Tensors], Any], method: str = "awq") -> str:
    tensors = checkpoints.quantized(method, 4, 32)
    change(tensors)
    document = checkpoints.config() | {"quantization_config": checkpoints.quantization_config(method, 4, 32)}
    with pytest.raises(CheckpointError) as caught:
        check(checkpoints.write(tmp_path / "made", tensors, document), source, scheme(method))
    return str(caught.value)


def test_a_layer_left_unquantized_is_named(tmp_path: Path, source: Path) -> None:
    def leave(tensors: checkpoints.Tensors) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{LAYER}.{part}"]
        tensors[f"{LAYER}.weight"] = np.zeros(checkpoints.linears()[LAYER], np.float16)

    assert f"{LAYER} is not quantized" in refused(tmp_path, source, leave)


def test_a_quantized_output_layer_is_refused(tmp_path: Path, source: Path) -> None:
    def quantize(tensors: checkpoints.Tensors) -> None:
        del tensors["lm_head.weight"]
        tensors["lm_head.qweight"] = np.zeros((checkpoints.HIDDEN, 12), np.int32)

    message = refused(tmp_path, source, quantize)
    assert "lm_head is quantized and should not be" in message
    assert "`lm_head.weight` of the source is missing" in message


def test_wrong_shapes_and_groups_are_all_listed(tmp_path: Path, source: Path) -> None:
    def spoil(tensors: checkpoints.Tensors) -> None:
        tensors[f"{LAYER}.qweight"] = tensors[f"{LAYER}.qweight"].T.copy()
        tensors[f"{LAYER}.scales"] = tensors[f"{LAYER}.scales"][:1].copy()
        del tensors[f"{LAYER}.qzeros"]
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)

    message = refused(tmp_path, source, spoil)
    assert f"{LAYER}.qweight is I32 [8, 128], expected I32 [128, 8]" in message
    assert f"{LAYER}.scales is F16 [1, 64], expected F16 [4, 64]" in message
    assert f"{LAYER} lacks `qzeros`" in message
    assert "`model.norm.weight` is F32, expected F16" in message


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, source: Path) -> None:
    def spoil(tensors: checkpoints.Tensors) -> None:
        tensors[f"{LAYER}.scales"][0, 0] = np.nan

    assert f"{LAYER}.scales holds a value that is not finite" in refused(tmp_path, source, spoil)


def test_a_scale_of_zero_is_refused(tmp_path: Path, source: Path) -> None:
    def spoil(tensors: checkpoints.Tensors) -> None:
        tensors[f"{LAYER}.scales"][0, :3] = 0

    assert f"{LAYER}.scales holds 3 values that are not above zero" in refused(tmp_path, source, spoil)


@pytest.mark.parametrize("factor", [0.5, 2])
def test_scales_of_one_layer_that_are_wrong_by_a_factor_are_refused(
    tmp_path: Path, source: Path, factor: float
) -> None:
    def spoil(tensors: checkpoints.Tensors) -> None:
        tensors[f"{LAYER}.scales"] *= np.float16(factor)

    message = refused(tmp_path, source, spoil, "gptq")
    found = re.search(rf"{LAYER} decodes to (\S+) times the source's weights: its scales are wrong", message)
    assert found is not None, message
    assert float(found[1]) == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize(("factor", "refused"), [(1, False), (0.5, True), (2, True)])
@pytest.mark.parametrize(("mean", "spread"), [(1, 0.4), (4, 0.01)], ids=["by input", "nearly all alike"])
@pytest.mark.parametrize("offset", [0, 1], ids=["a norm's weights", "one more than they are"])
def test_awqs_own_factors_are_told_from_wrong_scales(
    tmp_path: Path, source: Path, factor: float, refused: bool, mean: float, spread: float, offset: int
) -> None:
    """AWQ multiplies each input of a layer, and divides the norm in front of it."""
    generator = np.random.default_rng(2)
    of_input = (mean * np.exp(generator.normal(0, spread, checkpoints.HIDDEN))).astype(np.float16)
    changed = checkpoints.unquantized()
    for name in [name for name, weight in changed.items() if ".1." in name and weight.shape[1:] == of_input.shape]:
        changed[name] = changed[name] * of_input
    norm = changed["model.layers.1.input_layernorm.weight"]
    changed["model.layers.1.input_layernorm.weight"] = (norm + offset) / of_input - offset
    tensors = checkpoints.quantized("awq", 4, 32, changed)
    tensors["model.layers.1.self_attn.q_proj.scales"] *= np.float16(factor)
    stated = checkpoints.config() | {"quantization_config": checkpoints.quantization_config("awq", 4, 32)}
    folder = checkpoints.write(tmp_path / "made", tensors, stated)
    if not refused:
        assert check(folder, source, scheme()).layers
        return
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.q_proj decodes to \S+ times .* scales are wrong$"):
        check(folder, source, scheme())


@pytest.mark.parametrize(("factor", "refused"), [(1, False), (0.5, True), (2, True)])
def test_factors_that_awq_moved_to_the_layer_in_front_are_told_from_wrong_scales(
    tmp_path: Path, source: Path, factor: float, refused: bool
) -> None:
    """AWQ of SmolLM2-135M by GPTQModel left nearly all inputs of layer 1's down_proj at 0.63 times what they were."""
    generator = np.random.default_rng(2)
    moved = (0.63 * np.exp(generator.normal(0, 0.08, checkpoints.INNER))).astype(np.float16)
    changed = checkpoints.unquantized()
    changed[f"{LAYER}.weight"] = changed[f"{LAYER}.weight"] * moved
    in_front = f"{LAYER.replace('down', 'up')}.weight"
    changed[in_front] = changed[in_front] / moved[:, None]
    tensors = checkpoints.quantized("awq", 4, 32, changed)
    tensors[f"{LAYER}.scales"] *= np.float16(factor)
    stated = checkpoints.config() | {"quantization_config": checkpoints.quantization_config("awq", 4, 32)}
    folder = checkpoints.write(tmp_path / "made", tensors, stated)
    if not refused:
        assert check(folder, source, scheme()).layers
        return
    with pytest.raises(CheckpointError) as caught:
        check(folder, source, scheme())
    found = re.search(rf"{LAYER} decodes to (\S+) times the source's weights: its scales are wrong", str(caught.value))
    assert found is not None, caught.value
    assert float(found[1]) == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_weights_that_are_not_the_sources_are_refused(tmp_path: Path, source: Path, method: str) -> None:
    """Those of another layer, and zeros: neither has wrong shapes or dtypes."""
    twin = LAYER.replace("layers.1", "layers.0")

    def exchange(tensors: checkpoints.Tensors) -> None:
        for part in ("qweight", "qzeros", "scales"):
            ours, theirs = f"{LAYER}.{part}", f"{twin}.{part}"
            tensors[ours], tensors[theirs] = tensors[theirs], tensors[ours]

    def erase(tensors: checkpoints.Tensors) -> None:
        out, inputs = checkpoints.linears()[LAYER]
        tensors |= checkpoints.packed(LAYER, np.zeros((out, inputs), np.float32), method, 4, 32)

    message = refused(tmp_path, source, exchange, method)
    assert f"{LAYER} does not decode to the source's weights: a cosine of" in message
    assert f"{twin} does not decode" in message
    assert f"{LAYER} does not decode" in refused(tmp_path, source, erase, method)


@pytest.mark.parametrize(
    ("method", "name", "noticed"),
    [
        ("awq", "lm_head.weight", True),
        ("gptq", "lm_head.weight", True),
        ("gptq", "model.layers.0.input_layernorm.weight", True),
        # AWQ divides norms by its scales.
        ("awq", "model.layers.0.input_layernorm.weight", False),
    ],
)
def test_what_is_not_quantized_is_the_sources(
    tmp_path: Path, source: Path, method: str, name: str, noticed: bool
) -> None:
    tensors = checkpoints.quantized(method, 4, 32)
    tensors[name] = tensors[name] * np.float16(1.5)
    stated = checkpoints.config() | {"quantization_config": checkpoints.quantization_config(method, 4, 32)}
    folder = checkpoints.write(tmp_path / "made", tensors, stated)
    if not noticed:
        assert check(folder, source, scheme(method)).layers
        return
    with pytest.raises(CheckpointError, match=f"`{name}` differs from the source's"):
        check(folder, source, scheme(method))


def test_group_indices_must_follow_the_group_size(tmp_path: Path, source: Path) -> None:
    def shuffle(tensors: checkpoints.Tensors) -> None:
        tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"][::-1].copy()

    assert f"{LAYER}.g_idx" in refused(tmp_path, source, shuffle, "gptq")


def test_ordered_by_activation_the_indices_may_come_in_any_order(tmp_path: Path, source: Path) -> None:
    tensors = checkpoints.quantized("gptq", 4, 32)
    for name in checkpoints.linears():
        for part in ("g_idx", "scales", "qzeros"):
            tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][::-1].copy()
    stated = checkpoints.quantization_config("gptq", 4, 32) | {"desc_act": True}
    folder = checkpoints.write(tmp_path / "made", tensors, checkpoints.config() | {"quantization_config": stated})
    assert check(folder, source, scheme("gptq", desc_act=True)).layers
    with pytest.raises(CheckpointError, match="desc_act` is True, expected False"):
        check(folder, source, scheme("gptq"))


def test_one_group_over_a_whole_input(tmp_path: Path, source: Path) -> None:
    tensors = checkpoints.quantized("gptq", 4, -1)
    stated = checkpoints.quantization_config("gptq", 4, -1)
    folder = checkpoints.write(tmp_path / "made", tensors, checkpoints.config() | {"quantization_config": stated})
    assert check(folder, source, scheme("gptq", group_size=-1)).layers == len(checkpoints.linears())


def test_a_configuration_that_says_another_thing_is_refused(tmp_path: Path, source: Path) -> None:
    folder = checkpoints.write_quantized(tmp_path / "made")
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"]["group_size"] = 128
    document["rope_theta"] = 1.0
    document["torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        check(folder, source, scheme())
    assert "`quantization_config.group_size` is 128, expected 32" in str(caught.value)
    assert "`rope_theta` is 1.0, and None in the source" in str(caught.value)
    assert "`torch_dtype` is 'bfloat16'" in str(caught.value)


def test_files_must_be_readable_carried_over_and_no_pickles(tmp_path: Path, source: Path) -> None:
    folder = checkpoints.write_quantized(tmp_path / "made")
    (folder / "model.safetensors").chmod(0o600)
    (folder / "tokenizer.json").unlink()
    (folder / "training_args.bin").write_bytes(b"")
    (folder / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError) as caught:
        check(folder, source, scheme())
    for problem in (
        "model.safetensors has mode 0600",
        "tokenizer.json of the source is missing",
        "is a pickle",
        "not a regular file",
    ):
        assert problem in str(caught.value)


def test_a_tensor_the_source_does_not_have_is_refused(tmp_path: Path, source: Path) -> None:
    def add(tensors: checkpoints.Tensors) -> None:
        tensors["model.layers.0.extra"] = np.zeros(1_000_000, np.float16)

    message = refused(tmp_path, source, add)
    assert "`model.layers.0.extra` is not of the source" in message
    assert "4 bits predict at most" in message


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, source: Path) -> None:
    folder = checkpoints.write_quantized(tmp_path / "made")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"the checkpoint: model\.safetensors: the tensors end at byte"):
        check(folder, source, scheme())


def test_routers_and_other_towers_stay_as_they_are(tmp_path: Path) -> None:
    kept = {
        "model.layers.0.mlp.gate.weight": np.zeros((8, 64), np.float16),
        "vision_tower.encoder.layers.0.q_proj.weight": np.zeros((64, 64), np.float16),
    }
    source = checkpoints.write(tmp_path / "source", checkpoints.unquantized() | kept, checkpoints.config())
    document = checkpoints.config() | {"quantization_config": checkpoints.quantization_config("awq", 4, 32)}
    folder = checkpoints.write(tmp_path / "made", checkpoints.quantized("awq", 4, 32) | kept, document)
    assert check(folder, source, scheme()).layers == len(checkpoints.linears())


def test_a_file_that_the_index_does_not_name_is_refused(tmp_path: Path, source: Path) -> None:
    folder = checkpoints.write_quantized(tmp_path / "made")
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"consolidated\.safetensors is not named by the index"):
        check(folder, source, scheme())


@pytest.mark.parametrize("tied", [{"tie_word_embeddings": True}, {"model_type": "gemma2", "tie_word_embeddings": None}])
def test_a_tied_output_layer_may_be_left_out(tied: dict[str, object], tmp_path: Path) -> None:
    config = checkpoints.config() | tied
    source = checkpoints.write(tmp_path / "source", checkpoints.unquantized(), config)
    tensors = checkpoints.quantized("awq", 4, 32)
    del tensors["lm_head.weight"]
    stated = config | {"quantization_config": checkpoints.quantization_config("awq", 4, 32)}
    assert check(checkpoints.write(tmp_path / "made", tensors, stated), source, scheme()).layers


# A mixture of experts beside a vision tower


ROUTED = {f"model.layers.0.mlp.experts.{number}.up_proj": (64, 64) for number in range(3)}
TOWER = "vision_tower.encoder.layers.0.q_proj"


def write_mixture(folder: Path, change: Callable[[checkpoints.Tensors], None] = lambda _: None) -> Path:
    """Write source and checkpoint (GPTQ) of a model with experts and a tower, the checkpoint changed."""
    generator = np.random.default_rng(1)
    kept = {
        "model.layers.0.mlp.gate.weight": generator.standard_normal((8, 64)).astype(np.float16),
        f"{TOWER}.weight": generator.standard_normal((64, 64)).astype(np.float16),
    }
    experts = {name: generator.standard_normal(shape).astype(np.float16) for name, shape in ROUTED.items()}
    source = checkpoints.unquantized() | kept | {f"{name}.weight": value for name, value in experts.items()}
    checkpoints.write(folder / "source", source, checkpoints.config())
    tensors = checkpoints.quantized("gptq", 4, 32) | kept
    for name, weight in experts.items():
        tensors |= checkpoints.packed(name, weight.astype(np.float32), "gptq", 4, 32)
    change(tensors)
    stated = checkpoints.config() | {"quantization_config": checkpoints.quantization_config("gptq", 4, 32)}
    return checkpoints.write(folder / "made", tensors, stated)


def zero_an_expert(tensors: checkpoints.Tensors) -> None:
    name = next(iter(ROUTED))
    tensors[f"{name}.qweight"] = np.full_like(tensors[f"{name}.qweight"], np.int32(-2004318072))  # 8 eight times


def quantize_the_tower(tensors: checkpoints.Tensors) -> None:
    weight = tensors.pop(f"{TOWER}.weight").astype(np.float32)
    tensors |= checkpoints.packed(TOWER, weight, "gptq", 4, 32)


def quantize_the_router(tensors: checkpoints.Tensors) -> None:
    tensors |= checkpoints.packed("model.layers.0.mlp.gate", np.ones((8, 64), np.float32), "gptq", 4, 32)


def change_one_bit_of_the_tower(tensors: checkpoints.Tensors) -> None:
    tensors[f"{TOWER}.weight"].view(np.uint16)[5, 5] ^= 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (zero_an_expert, "experts.0.up_proj does not decode to the source's weights: a cosine of 0.00 over a sample"),
        (quantize_the_tower, f"{TOWER} is quantized and should not be"),
        (quantize_the_router, "model.layers.0.mlp.gate is quantized and should not be"),
        (change_one_bit_of_the_tower, f"`{TOWER}.weight` differs from the source's"),
    ],
)
def test_damage_to_experts_and_towers_is_refused(
    tmp_path: Path, change: Callable[[checkpoints.Tensors], None], problem: str
) -> None:
    assert check(write_mixture(tmp_path / "sound"), tmp_path / "sound" / "source", scheme("gptq")).layers == 11
    with pytest.raises(CheckpointError) as caught:
        check(write_mixture(tmp_path / "damaged", change), tmp_path / "damaged" / "source", scheme("gptq"))
    assert problem in str(caught.value)


def test_a_shard_of_another_scheme_is_refused(tmp_path: Path, source: Path) -> None:
    """Layer 1 of a checkpoint in groups of 64, in a file of its own, among others in groups of 32."""
    here = {name: t for name, t in checkpoints.quantized("gptq", 4, 32).items() if ".1." not in name}
    other = {name: t for name, t in checkpoints.quantized("gptq", 4, 64).items() if ".1." in name}
    stated = checkpoints.config() | {"quantization_config": checkpoints.quantization_config("gptq", 4, 32)}
    folder = checkpoints.write(tmp_path / "made", here, stated)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    save_file(other, folder / "model-2.safetensors")
    (folder / "model-2.safetensors").chmod(0o644)
    placed = dict.fromkeys(here, "model-1.safetensors") | dict.fromkeys(other, "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "model.safetensors.index.json").chmod(0o644)
    with pytest.raises(CheckpointError, match=rf"{LAYER}.scales is F16 \[2, 64\], expected F16 \[4, 64\]"):
        check(folder, source, scheme("gptq"))

"""Mixtures of formats: the choice under a budget, what shares a format, and what the check refuses."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.safetensors_headers import Tensor, read_model
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import CheckpointError, QuantizeError
from pipeline.planner.weights import quantized, stored
from pipeline.quantization import mixture
from pipeline.quantization.assignment import (
    NothingFits,
    Option,
    Options,
    solve_exactly,
    solve_greedily,
    total_bytes,
    total_loss,
)
from pipeline.quantization.checkpoint import check
from unit.pipeline import checkpoints, compressed
from unit.pipeline.compressed import MIXED

LAYER = "model.layers.1.mlp.down_proj"


def mixed(**budget: object) -> Scheme:
    return compressed.scheme("mixed", budget=budget or {"bits_per_weight": 8})


def described(folder: Path) -> ModelDescription:
    return ModelDescription(json.loads((folder / "config.json").read_text()), read_model(folder))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.write_source(tmp_path / "source")


def some_options(seed: int) -> Options:
    """Five groups of unlike size, each with three formats; a smaller one loses more."""
    chosen = random.Random(seed)
    found = {}
    for number in range(5):
        size, loss = chosen.randint(1, 9) * 64, chosen.random()
        shares = ((4, 1.0), (8, chosen.random() / 10), (16, 0.0))
        found[f"group {number}"] = {f"{bits} bits": Option(size * bits, loss * share) for bits, share in shares}
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_exact_choice_is_the_best_of_all_that_fit(seed: int) -> None:
    options = some_options(seed)
    least, most = (sum(pick(o.bytes for o in each.values()) for each in options.values()) for pick in (min, max))
    budget = least + (most - least) // 3
    all_of_them = [dict(zip(options, names, strict=True)) for names in itertools.product(*options.values())]
    best = min(total_loss(options, each) for each in all_of_them if total_bytes(options, each) <= budget)
    found, greedy = solve_exactly(options, budget), solve_greedily(options, budget)
    assert total_loss(options, found) == pytest.approx(best, abs=1e-9)
    assert best <= total_loss(options, greedy) + 1e-9
    assert max(total_bytes(options, each) for each in (found, greedy)) <= budget


def test_a_greedy_choice_spends_the_budget_on_what_looks_best_first() -> None:
    options = {
        "a": {"4": Option(0, 10.0), "8": Option(60, 3.0)},
        "b": {"4": Option(0, 6.0), "8": Option(50, 1.0)},
        "c": {"4": Option(0, 6.0), "8": Option(50, 1.0)},
    }
    assert total_loss(options, solve_greedily(options, 100)) == 15
    assert solve_exactly(options, 100) == {"a": "4", "b": "8", "c": "8"}


def test_a_budget_that_nothing_fits_is_refused_with_what_would() -> None:
    options = some_options(0)
    with pytest.raises(NothingFits, match=r"the smallest formats take \d+ bytes, and the budget is 5"):
        solve_exactly(options, 5)


def test_what_the_engine_fuses_shares_a_format(source: Path) -> None:
    model = described(source)
    experts = {
        f"model.layers.0.mlp.experts.{number}.{name}_proj.weight": Tensor("F16", (64, 64), 0, 8192, source)
        for number in range(2)
        for name in ("gate", "up", "down")
    }
    groups = mixture.groups_of(ModelDescription(model.config, {**model.tensors, **experts}), mixed())
    layers = {name: [layer.rpartition(".")[2] for layer in group.layers] for name, group in groups.items()}
    assert layers["model.layers.1.self_attn.qkv_proj"] == ["k_proj", "q_proj"]
    assert len(layers["model.layers.0.mlp.experts"]) == 6
    assert list(groups).index("model.layers.0.mlp.experts") < list(groups).index("model.layers.1.mlp.down_proj")
    # Groups of 128 do not divide an input of 64.
    assert "w4a16-128" not in groups["model.layers.1.self_attn.qkv_proj"].bytes
    assert "w4a16-128" in groups["model.layers.1.mlp.down_proj"].bytes


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"bits_per_weight": 4}, r"`budget` is 4 bits a weight, and the smallest mixture of .* `bits_per_weight` 4.23"),
        ({"bytes": 40_000}, r"`budget` is 39.1KiB, and the smallest mixture of w4a16, w8a8, fp8 takes \d+ bytes"),
        ({"bits_per_weight": 16}, "which the model fits as it is: nothing to quantize"),
    ],
)
def test_a_budget_that_makes_no_mixture_is_refused(source: Path, budget: dict[str, Any], said: str) -> None:
    (problem,) = mixture.find_problems(described(source), mixed(**budget))
    assert re.search(said, problem)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "mixed"}, "`budget` is missing"),
        ({"method": "mixed", "budget": {}}, "expected one key, `bytes` or `bits_per_weight`"),
        ({"method": "mixed", "budget": {"bytes": "4GiB", "bits_per_weight": 5}}, "expected one key"),
        ({"method": "mixed", "budget": {"bits_per_weight": 5}, "formats": []}, "at least one of `formats`"),
        ({"method": "mixed", "budget": {"bits_per_weight": 5}, "kv_cache": "fp8"}, "calibrates no `kv_cache`"),
        ({"method": "fp8", "budget": {"bits_per_weight": 5}}, "`budget` applies only to mixed"),
        ({"method": "fp8", "formats": ["w8a8"]}, "`formats` applies only to mixed"),
    ],
)
def test_a_scheme_that_says_half_of_it_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Scheme.model_validate({"backend": "llmcompressor", **given})


def test_a_sound_mixture_passes_and_planner_and_check_count_alike(tmp_path: Path, source: Path) -> None:
    folder = compressed.write_mixed(tmp_path / "made", MIXED)
    found = check(folder, source, mixed())
    assert found.layers == len(MIXED) - 1
    assert 4.5 < found.bits_per_weight < 8
    plan, there = (
        quantized("x", mixed(bits_per_weight=found.bits_per_weight), described(source)),
        stored(described(folder)),
    )
    assert abs(plan.bytes - there.bytes) <= 1
    assert there.numbers == plan.numbers


@pytest.mark.parametrize(("up", "down"), [("w4a16", "w8a8"), ("w8a8", "w4a16"), ("fp8", "w8a8")])
def test_layers_one_behind_the_other_may_have_any_formats(tmp_path: Path, source: Path, up: str, down: str) -> None:
    chosen = {
        f"model.layers.{number}.mlp.{name}_proj": each
        for number in (0, 1)
        for name, each in (("up", up), ("down", down))
    }
    assert check(compressed.write_mixed(tmp_path / "made", MIXED | chosen), source, mixed()).layers == len(MIXED)


def refusal(folder: Path, source: Path, scheme: Scheme) -> str:
    with pytest.raises(CheckpointError) as caught:
        check(folder, source, scheme)
    return str(caught.value)


def test_layers_that_are_fused_in_two_formats_are_refused(tmp_path: Path, source: Path) -> None:
    folder = compressed.write_mixed(tmp_path / "made", MIXED | {"model.layers.0.self_attn.q_proj": "fp8"})
    assert "model.layers.0.self_attn.qkv_proj has layers of several formats" in refusal(folder, source, mixed())


def test_a_mixture_over_its_budget_is_refused(tmp_path: Path, source: Path) -> None:
    folder = compressed.write_mixed(tmp_path / "made", MIXED)
    assert "the budget of 5 bits a weight allows" in refusal(folder, source, mixed(bits_per_weight=5))


def test_a_format_that_the_scheme_does_not_name_is_refused(tmp_path: Path, source: Path) -> None:
    folder = compressed.write_mixed(tmp_path / "made", MIXED)
    scheme = compressed.scheme("mixed", budget={"bits_per_weight": 8}, formats=["w4a16", "fp8"])
    assert "follows none of the scheme's `formats`" in refusal(folder, source, scheme)


def test_a_layer_stored_otherwise_than_stated_is_refused(tmp_path: Path, source: Path) -> None:
    stated = MIXED | {LAYER: "fp8"}
    folder = compressed.write_mixed(tmp_path / "made", MIXED, stated)
    assert f"{LAYER}.weight is I8" in refusal(folder, source, mixed())


def test_doubled_scales_and_a_changed_layer_at_16_bits_are_refused(tmp_path: Path, source: Path) -> None:
    tensors = compressed.mixed_tensors(MIXED)
    tensors["model.layers.0.mlp.down_proj.weight_scale"][1][:] *= 2
    tensors["model.layers.1.mlp.up_proj.weight"][1][0, 0] += 1
    message = refusal(compressed.write_mixed(tmp_path / "made", MIXED, tensors=tensors), source, mixed())
    assert "model.layers.0.mlp.down_proj decodes to 2" in message
    assert "`model.layers.1.mlp.up_proj.weight` differs from the source's" in message


def test_an_assignment_says_what_it_was_chosen_from(source: Path) -> None:
    """The worker's answers as it gives them: losses by group and format, then those of the finished checkpoint."""
    model, scheme = described(source), mixed(bits_per_weight=6)
    request = mixture.SensitivityRequest(
        source=source,
        checkpoint=None,
        calibration="",
        texts=(),
        chat_template=None,
        max_tokens=8,
        seed=0,
        groups={},
        formats={},
    )

    def ask(request: Any, name: str) -> dict[str, Any]:  # noqa: ANN401 - the worker's request
        if name == "measured":
            return {"losses": dict.fromkeys(request["groups"], 0.01), "total": 0.05}
        losses = {key: 0.001 if key in {"w8a8", "fp8"} else 0.01 for key in request["formats"]}
        return {"losses": dict.fromkeys(request["groups"], losses)}

    found = mixture.choose(model, scheme, request, ask, print)
    document = mixture.measure(found, request, source, ask, print)
    assert document.bytes <= document.budget_bytes
    assert document.predicted <= document.greedy
    assert document.measured == 0.05
    named = [layer for each in found.formats for layer in each["layers"]]
    assert sorted([*named, *found.unquantized]) == sorted(model.linears)
    with pytest.raises(QuantizeError, match="the smallest mixture"):
        mixture.choose(model, mixed(bits_per_weight=4), request, ask, print)

"""Two-layer models of every family, as transformers makes them, through the backends that run on a CPU.

The law: what `preflight` accepts is quantized, and every check of the checkpoint passes; what it refuses, it refuses
within a second, and names a backend that it accepts, if there is one.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_families import make_families

from evals.drift.layer_errors import measure_layers
from homes import DEMO
from pipeline.compatibility import backends, preflight
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.safetensors_headers import read_model
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import CheckpointError, QuantizeError, UnsupportedModelError
from pipeline.quantization.quantize import QuantizationRecord, quantize
from pipeline.settings import Settings
from pipeline.workers.runner import Workers
from shared import made_once

TESTS = Path(__file__).parents[1]
FAMILIES: dict[str, Any] = json.loads((TESTS / "data" / "model_families.json").read_text())["families"]
# AutoGPTQ quantizes on a GPU alone.
PAIRS = [(method, each) for method, named in backends.METHODS.items() for each in named if each != "autogptq"]
# With random weights nothing reaches two linears of Gemma 3n's layers, and GPTQ makes zeros of them: the check says so.
UNREACHED = ("gemma3n_text", "w4a16")
SAMPLES, TOKENS = 8, 128
Family = Callable[[str], Path]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory, machine: Settings) -> Family:
    """The folder of a family's model, with the demo's tokenizer."""

    root = made_once(tmp_path_factory, "model-families", lambda folder: make_families(folder, machine))
    return lambda name: root / name


def scheme_of(method: str, backend: str) -> Scheme:
    """The smallest groups that the method has, for narrow layers."""
    sizes = backends.GROUP_SIZES[method]
    return Scheme.model_validate({"method": method, "backend": backend, "group_size": 32 if 32 in sizes else sizes[0]})


def made(
    folder: Path, scheme: Scheme, machine: Settings, scratch: Path, min_expert_tokens: int | None = None
) -> QuantizationRecord:
    """Quantize a model for real and check what was written."""
    for name in ("output", "scratch"):
        (scratch / name).mkdir()
    calibration = DEMO / "calibration.jsonl" if scheme.needs_calibration else None
    return quantize(
        folder, calibration, SAMPLES, TOKENS, scheme, scratch / "output", Workers(machine, print),
        scratch / "scratch", print, min_expert_tokens,
    )  # fmt: skip


def described(folder: Path) -> ModelDescription:
    return ModelDescription(json.loads((folder / "config.json").read_text()), read_model(folder))


def test_the_tokens_that_reach_each_expert_are_counted(family: Family, machine: Settings, tmp_path: Path) -> None:
    scheme = scheme_of("gptq", "gptqmodel")
    with pytest.raises(QuantizeError, match=r"`calibration.min_expert_tokens` is 100000, but 8 of 8 experts") as caught:
        made(family("qwen3_moe"), scheme, machine, tmp_path, min_expert_tokens=100_000)
    assert "`calibration.samples` like these 8 would be enough" in str(caught.value)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    record = made(family("qwen3_moe"), scheme, machine, tmp_path)
    assert list(record.experts) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    # Two of four experts answer for every token, however often the quantizer runs a layer.
    assert record.calibration is not None
    assert {sum(counts) for counts in record.experts.values()} == {2 * record.calibration.tokens}


def test_a_mixture_is_measured_chosen_and_measured_again(family: Family, machine: Settings, tmp_path: Path) -> None:
    scheme = Scheme.model_validate({"method": "mixed", "backend": "llmcompressor", "budget": {"bits_per_weight": 7}})
    record = made(family("llama"), scheme, machine, tmp_path)
    assert record.bits_per_weight <= 7
    assert record.mixture is not None
    assert record.mixture.predicted <= record.mixture.greedy
    assert len({group.chosen for group in record.mixture.groups.values()}) > 1
    # Everything together loses more than nothing, and to second order what was foreseen: GPTQ only does better.
    assert 0 < record.mixture.measured < 2 * record.mixture.predicted


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "voxtral", "qwen3_moe", "mixtral"])
def test_layers_are_measured_by_their_stored_names(
    name: str, family: Family, machine: Settings, tmp_path: Path
) -> None:
    """Transformers has Gemma 3's decoder under other names than it stores, and a block's experts in one module."""
    made(family(name), scheme_of("fp8", "llmcompressor"), machine, tmp_path)
    layers = measure_layers(
        family(name), tmp_path / "output", ["def add(a, b):\n    return a + b\n"],
        max_tokens=TOKENS, run_worker=Workers(machine, print), scratch=tmp_path / "scratch",
    )  # fmt: skip
    stored = {re.sub(r"(?<=\.experts)\..*$", "", linear) for linear in described(family(name)).linears}
    assert {layer.name for layer in layers} == stored
    # With other numbers some tokens go to other experts.
    assert all(0 < layer.error < (0.5 if layer.name.endswith("experts") else 0.2) for layer in layers)


@pytest.mark.long
@pytest.mark.parametrize(("method", "backend"), PAIRS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_quantized_or_refused_in_the_first_second(
    name: str, method: str, backend: str, family: Family, machine: Settings, tmp_path: Path
) -> None:
    folder, scheme = family(name), scheme_of(method, backend)
    model = described(folder)
    started = time.monotonic()
    problems = preflight.find_problems(model, scheme)
    assert time.monotonic() - started < 1
    if problems:
        with pytest.raises(UnsupportedModelError):
            made(folder, scheme, machine, tmp_path)
        print(f"refused: {'; '.join(problems)}")
        return
    if (name, method) == UNREACHED:
        with pytest.raises(CheckpointError, match="per_layer_input_gate does not decode to the source's weights"):
            made(folder, scheme, machine, tmp_path)
        return
    assert made(folder, scheme, machine, tmp_path).layers == len(model.linears)

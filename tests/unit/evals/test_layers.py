"""How transformers loads a checkpoint, and which module computes a layer that it has under another name."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from evals.drift import images, packed
from pipeline.workers import slipway_worker
from registry import counting

BLOCK = "model.layers.0"
EXPERTS = f"{BLOCK}.mlp.experts"


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as the worker has it."""
    for name, found in (
        ("checkpoints", SimpleNamespace()),
        ("slipway_counting", counting),
        ("slipway_worker", slipway_worker),
    ):
        monkeypatch.setitem(sys.modules, name, found)
    return importlib.import_module("evals.drift.layers")


@pytest.mark.parametrize(
    ("stored", "module", "shown"),
    [
        (f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.self_attn.q_proj"),
        # As Gemma 3's decoder is stored.
        (f"language_model.{BLOCK}.self_attn.q_proj", f"{BLOCK}.self_attn.q_proj", None),
        # Qwen 3 MoE, and Mixtral.
        (f"{EXPERTS}.7.up_proj", EXPERTS, EXPERTS),
        (f"{BLOCK}.block_sparse_moe.experts.7.w1", EXPERTS, f"{BLOCK}.block_sparse_moe.experts"),
        (f"{BLOCK}.mlp.unknown", f"{BLOCK}.mlp.unknown", None),
    ],
)
def test_a_stored_layer_is_found_in_the_network(
    stored: str, module: str, shown: str | None, layers: ModuleType
) -> None:
    decoder = object()
    names = ("", BLOCK, f"{BLOCK}.self_attn.q_proj", EXPERTS, "model.layers.1.mlp.experts")
    modules = dict.fromkeys(names, object()) | {"model": decoder}
    network = SimpleNamespace(get_decoder=lambda: decoder, named_modules=modules.items)
    assert layers.find_module(stored, modules, network) == (module, shown or stored)


@pytest.mark.parametrize(
    ("stored", "drafts"),
    [
        ("model.layers.1.mlp.experts.9.up_proj", False),
        ("model.layers.2.mlp.experts.0.up_proj", True),
        ("mtp.layers.0.self_attn.q_proj", True),
    ],
)
def test_layers_that_draft_tokens_are_left_out(stored: str, drafts: bool, layers: ModuleType) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
    assert layers.drafts(stored, SimpleNamespace(config=config)) == drafts


@pytest.mark.parametrize(
    ("towers", "kind"),
    [
        ((), "AutoModelForCausalLM"),
        (("audio_config",), "AutoModelForMultimodalLM"),
        (("audio_config", "vision_config"), "AutoModelForImageTextToText"),
    ],
)
def test_a_model_with_a_tower_has_a_class_of_its_own(
    towers: tuple[str, ...], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Transformers:
        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(from_pretrained=lambda *_, **__: name)

    for name, found in (
        ("images", images),
        ("packed", packed),
        ("slipway_worker", slipway_worker),
        ("torch", SimpleNamespace(float32=None)),
        ("transformers", Transformers()),
    ):
        monkeypatch.setitem(sys.modules, name, found)
    checkpoints = importlib.import_module("evals.drift.checkpoints")
    (tmp_path / "config.json").write_text(json.dumps({key: {} for key in towers}))
    assert checkpoints.read(tmp_path) == kind

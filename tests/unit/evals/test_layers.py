"""Which module computes a layer that a checkpoint holds, where transformers has it under another name."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest

from pipeline.workers import slipway_worker
from registry import counting

BLOCK = "model.layers.0"
EXPERTS = f"{BLOCK}.mlp.experts"


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
    stored: str, module: str, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, found in (
        ("checkpoints", SimpleNamespace()),
        ("slipway_counting", counting),
        ("slipway_worker", slipway_worker),
    ):
        monkeypatch.setitem(sys.modules, name, found)
    layers = importlib.import_module("evals.drift.layers")
    decoder = object()
    names = ("", BLOCK, f"{BLOCK}.self_attn.q_proj", EXPERTS, "model.layers.1.mlp.experts")
    modules = dict.fromkeys(names, object()) | {"model": decoder}
    network = SimpleNamespace(get_decoder=lambda: decoder, named_modules=modules.items)
    assert layers.find_module(stored, modules, network) == (module, shown or stored)

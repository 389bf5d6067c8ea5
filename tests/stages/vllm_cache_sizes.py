"""Runs where vLLM is: builds each model of a folder without weights, and asks its layers what they keep.

Prints one JSON document: name → bytes that a token takes in all layers, and the kinds of the layers' caches.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import vllm.distributed.parallel_state as parallel
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model


def cache_specs(folder: Path) -> list[Any]:
    """What each attention layer tells vLLM to keep for it."""
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, load_format="dummy", enforce_eager=True, max_model_len=1024,
        dtype="bfloat16",
    )  # fmt: skip
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        if not parallel.model_parallel_is_initialized():
            parallel.init_distributed_environment(
                world_size=1, rank=0, local_rank=0, backend="gloo", distributed_init_method="tcp://127.0.0.1:29555"
            )
            parallel.initialize_model_parallel(1, 1)
        with torch.device("meta"):
            initialize_model(vllm_config=config)
        layers = config.compilation_config.static_forward_context.values()
        # Routed experts are registered beside them and keep nothing.
        asked = [layer.get_kv_cache_spec(config) for layer in layers if hasattr(layer, "get_kv_cache_spec")]
        return [spec for spec in asked if spec is not None]


found = {}
for place in sorted(Path(sys.argv[1]).iterdir()):
    specs = cache_specs(place)
    found[place.name] = {
        "bytes_per_token": sum(spec.page_size_bytes // spec.block_size for spec in specs),
        "kinds": sorted({type(spec).__name__ for spec in specs}),
    }
print("RESULT " + json.dumps(found))

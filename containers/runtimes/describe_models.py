"""Runs inside the image under construction: writes down what vLLM else finds out at every start.

Before it loads a model, vLLM asks a process of its own what the model's class can do, which imports everything once
more: 5 s of a start's 24. The answer depends on the class alone; vLLM looks it up in ``$VLLM_CACHE_ROOT/modelinfos`` by
the digest of the class's source, and asks again where that differs.
"""
# ruff: noqa: INP001 - a script that is copied into an image

from __future__ import annotations

import sys
from pathlib import Path

from vllm.model_executor.models import registry


def main() -> None:
    """Describe every text model that can be imported with what is installed."""
    written = 0
    for architecture in registry._TEXT_GENERATION_MODELS:  # noqa: SLF001 - of the version that is pinned
        model = registry.ModelRegistry.models[architecture]
        source = Path(registry.__file__).parent / f"{model.module_name.rpartition('.')[2]}.py"
        if not source.exists():
            continue
        try:
            description = registry._ModelInfo.from_model_cls(model.load_model_cls())  # noqa: SLF001
        except ImportError:  # it needs what this runtime leaves out
            continue
        model._save_modelinfo_to_cache(description, model._get_modelinfo_module_hash(source))  # noqa: SLF001
        written += 1
    print(f"described {written} models")
    if not written:
        sys.exit("no model could be described")


if __name__ == "__main__":
    main()

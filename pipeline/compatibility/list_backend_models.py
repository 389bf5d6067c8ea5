"""Worker: list the architectures that this environment's quantizer knows, and the linears of a layer that it quantizes.

Each backend's environment runs it; `backends.json` beside it keeps the results::

    PYTHON pipeline/compatibility/list_backend_models.py autoawq

A linear is named as in a decoder layer, with ``#`` for a number: ``mlp.experts.#.up_proj``. An architecture that this
environment's transformers does not have would need code that comes with a model; it is left out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Keys of config.json that say how many experts there are, as versions of transformers name them.
_EXPERT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts")
# Small enough to be built by name alone, with each kind of layer in it.
_SMALL = {"num_hidden_layers": 8, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4}
# A linear of a numbered layer, and one that chooses experts, as `pipeline.compatibility.description` knows them.
_IN_LAYER = re.compile(r"(?:^|\.)\d+\.(.+)")
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate|[^.]*_router)$")


def main(backend: str) -> None:
    """Print the table of one backend as JSON."""
    known = dict(sorted(_BACKENDS[backend]()))
    from importlib.metadata import version

    package = {"autogptq": "auto_gptq"}.get(backend, backend)
    print(json.dumps({"version": version(package), "transformers": version("transformers"), "models": known}))


def _autoawq() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """AutoAWQ quantizes every linear of a layer but those that the class leaves out: a model on "meta" lists them."""
    import torch
    from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
    from transformers import AutoConfig, AutoModelForCausalLM

    for model_type, definition in AWQ_CAUSAL_LM_MODEL_MAP.items():
        config = _configuration(AutoConfig, model_type)
        if (
            config is None or config.model_type != model_type
        ):  # the text part of a model of images has a type of its own
            continue
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        except ValueError:
            continue  # no text model
        left_out = getattr(definition, "modules_to_not_convert", None) or []
        names = {
            re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
            for layer in definition.get_model_layers(model)
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear) and not any(part in name for part in left_out)
        }
        yield model_type, {"linears": sorted(names), "experts": _experts_key(config)}


def _autogptq() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """AutoGPTQ lists the linears of a layer; of experts, the eight that Mixtral 8x7B has."""
    from auto_gptq.modeling._const import SUPPORTED_MODELS
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
    from transformers import AutoConfig

    for model_type, definition in GPTQ_CAUSAL_LM_MODEL_MAP.items():
        config = _configuration(AutoConfig, model_type) if model_type in SUPPORTED_MODELS else None
        if config is not None:
            names = {name for group in definition.inside_layer_modules for name in group}
            yield model_type, {"linears": sorted(names), "experts": _experts_key(config)}


def _gptqmodel() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """GPTQModel describes a layer as a tree, in the names that its transformers gives to modules when they run."""
    from gptqmodel.models.auto import MODEL_MAP
    from gptqmodel.models.base import NON_QUANTIZE_FLAGS
    from transformers import AutoConfig

    for model_type, definition in MODEL_MAP.items():
        if (config := _configuration(AutoConfig, model_type)) is None:
            continue
        names = {
            name.replace("{expert_index}", "#").split(":")[0]
            for block in definition.build_layer_modules(definition.module_tree)
            for name in block
            if not any(flag in name for flag in NON_QUANTIZE_FLAGS)
        }
        yield model_type, {"linears": sorted(names), "tied": bool(getattr(config, "tie_word_embeddings", False))}


def _llmcompressor() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """llm-compressor quantizes every linear that transformers has in a layer, but those that it is told to leave."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = _configuration(AutoConfig, model_type)
            if config is None or config.model_type != model_type:
                continue
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # noqa: BLE001 - a class that can't be made small is left out
            sys.stderr.write(f"{model_type}: {error}\n")
            continue
        found = (
            _IN_LAYER.search(name) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        )
        names = {re.sub(r"(?<=\.)\d+(?=\.)", "#", each[1]) for each in found if each is not None}
        linears = sorted(name for name in names if not _ROUTER.search(name))
        if linears:
            yield model_type, {"linears": linears, "tied": bool(getattr(config, "tie_word_embeddings", False))}


def _configuration(auto_config: Any, model_type: str) -> Any:  # noqa: ANN401 - transformers' classes
    """Return a small configuration of an architecture, or None where transformers has none."""
    try:
        config = auto_config.for_model(model_type)
    except ValueError:
        return None
    config = config.get_text_config()
    for key, value in _SMALL.items():
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, value)
    return config


def _experts_key(config: Any) -> str | None:  # noqa: ANN401 - as above
    """The key that this version of transformers reads the number of experts from."""
    keys = [key for key in _EXPERT_KEYS if key in config.to_dict()]
    return keys[0] if keys else None


_BACKENDS: Mapping[str, Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]] = {
    "autoawq": _autoawq,
    "autogptq": _autogptq,
    "gptqmodel": _gptqmodel,
    "llmcompressor": _llmcompressor,
}

if __name__ == "__main__":
    main(sys.argv[1])

"""Refuses a scheme that its backend or format can't apply to a model, before an hour of quantization fails.

It reads only config.json and headers. `plan` calls it, `release` calls it before it starts a worker, and the stage that
quantizes calls it again, because Dagster may run that stage alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from pipeline.compatibility import backends
from pipeline.compatibility.description import ModelDescription, in_layer
from pipeline.compatibility.scheme import AS_IS, Scheme, either
from pipeline.errors import QuantizeError, UnsupportedModelError

_NAMES = {"autoawq": "AutoAWQ", "gptqmodel": "GPTQModel", "autogptq": "AutoGPTQ", "llmcompressor": "llm-compressor"}
# Its classes keep a linear's weight as [in, out] (transformers' Conv1D); the packed layouts here are of [out, in].
_TRANSPOSED = frozenset({"gpt2"})
# Of multi-head latent attention (DeepSeek V2 and V3, Kimi K2). Both this and the next were found with GPTQModel 7.5.0.
_LATENT = ".kv_a_proj_with_mqa"
# Whose full and sliding layers rotate by different frequencies, in older configurations without `rope_parameters`.
_ROTARY_BY_LAYER = ("gemma3", "gemma4")
# AutoAWQ reserves ``out // 32 * 4`` words for a row of outputs (awq/modules/linear/gemm.py), and writes beyond them.
_AUTOAWQ_OUTPUTS = 32
# Where a backend's own code fails, found by quantizing two-layer models (tests/stages/test_model_families.py).
# GPTQModel's defuser 0.0.28 takes the router's answer for logits; transformers 5.23 returns a tuple.
_FAULTS = {("gptqmodel", "glm4_moe"): "its own code for the router does not fit its transformers"}
# llm-compressor 0.14's SmoothQuant, which w8a8 begins with, resolves no mapping for these.
_NOT_SMOOTHED = frozenset({"glm4", "gemma3n_text"})
# How many names a message gives.
_NAMED = 3


def check(model: ModelDescription, scheme: Scheme) -> None:
    """Refuse a scheme that can't be applied to this model.

    Raises:
        UnsupportedModelError: listing every reason, with the backend or the group sizes that can.
    """
    if problems := find_problems(model, scheme):
        raise UnsupportedModelError("; ".join(problems))


def find_problems(model: ModelDescription, scheme: Scheme, *, has_gpus: bool = True) -> list[str]:
    """Return why ``scheme`` can't be applied to ``model``, each with what to do; empty if it can.

    ``has_gpus`` is whether quantizers have a GPU.
    """
    if scheme.method == AS_IS:  # what it takes is checked by `quantization.published`
        return []
    stored = list(_stored(model))
    if stored:
        return stored
    without_model = not scheme.needs_calibration
    refused = list(_by_backend(model, scheme.method, scheme.backend, without_model=without_model, has_gpus=has_gpus))
    if refused:
        reasons = "; ".join(refused)
        said = f"{_NAMES[scheme.backend]} can't quantize `{model.architecture}`: {reasons}"
        refused = [f"{said}: {_alternative(model, scheme.method, has_gpus=has_gpus)}"]
    return refused + list(_widths(model, scheme))


def too_long_samples(model: ModelDescription, max_tokens: int) -> str | None:
    """Say that calibration samples of ``max_tokens`` are longer than the model's context; None if they are not."""
    positions = model.text_config.get("max_position_embeddings")
    if not isinstance(positions, int) or max_tokens <= positions:
        return None
    return f"`calibration.max_tokens` is {max_tokens}, but the model's longest context is {positions} tokens"


def _stored(model: ModelDescription) -> Iterator[str]:
    """Problems that no backend can solve."""
    if found := model.quantized_dtypes:
        name, dtype = next(iter(found.items()))
        remedy = "release it by `method: as-is`, or use the original model"
        yield f"the source is already quantized (`{name}` is {dtype}): {remedy}"
    elif model.architecture in _TRANSPOSED:
        yield f"`{model.architecture}` stores its linear layers transposed, which no packed format supports"
    elif not model.linears and not model.fused_experts:
        yield "the source has no linear layer in any numbered layer: nothing to quantize"


def _by_backend(
    model: ModelDescription, method: str, backend: str, *, without_model: bool, has_gpus: bool
) -> Iterator[str]:
    """Why one backend can't do the model with a method, by loading it or from the weights alone."""
    if without_model:
        if model.fused_experts:
            yield f"experts are stored as one tensor ({_some(model.fused_experts)}), which it does not split"
        return
    known = backends.known_architecture(backend, model.architecture)
    if known is None:
        version = backends.transformers_version(backend)
        yield f"it does not support this architecture (its transformers is {version})"
        return
    yield from _limits(model, method, backend, has_gpus=has_gpus)
    if model.fused_experts:
        yield f"experts are stored as one tensor ({_some(model.fused_experts)}), which no packed format supports"
    if model.towers:
        yield f"beside a vision or audio tower ({_some(model.towers)}) it gives the decoder's layers other names"
    if model.drafting:
        yield f"it drops the layers that draft tokens ({_some(model.drafting)})"
    left = [name for name in model.linears if not known.packs(in_layer(name))]
    if left:
        yield f"it leaves {len(left)} of {len(model.linears)} linear layers at 16 bits or renames them ({_some(left)})"
    spoiled = sorted(name for name in model.routers if known.packs(in_layer(name)))
    if spoiled:
        yield f"it would quantize the routers too ({_some(spoiled)})"
    if (method, backend) == ("awq", "gptqmodel"):
        yield from _scale_search(model)
    if backend in backends.ARCHIVED:
        yield from _newer_configuration(model, known)


def _limits(model: ModelDescription, method: str, backend: str, *, has_gpus: bool) -> Iterator[str]:
    """What the backend's own code can't do, whatever the model's layers are."""
    if backend in backends.ON_GPUS_ALONE and not has_gpus:
        yield "it runs on NVIDIA GPUs alone, and quantizers have none here"
    if fault := _FAULTS.get((backend, model.architecture)):
        yield fault
    if method == "w8a8" and model.architecture in _NOT_SMOOTHED:
        yield "its SmoothQuant does not know which norms stand in front of which layers"


def _scale_search(model: ModelDescription) -> Iterator[str]:
    """Where GPTQModel's search for AWQ's scales fails; GPTQ has no such search."""
    if any(name.endswith(_LATENT) for name in model.linears):
        yield "its search for AWQ's scales gives latent attention the wrong inputs"
    rotary = model.text_config.get("rope_parameters")
    by_layer = isinstance(rotary, Mapping) and any(isinstance(each, Mapping) for each in rotary.values())
    if by_layer or model.architecture.startswith(_ROTARY_BY_LAYER):
        yield "its search for AWQ's scales can't give each layer its own rotary positions"


def _newer_configuration(model: ModelDescription, known: backends.KnownArchitecture) -> Iterator[str]:
    """What config.json says in words that the backend's transformers does not know."""
    if known.experts_key is not None and known.experts_key not in model.config:
        yield f"config.json has no `{known.experts_key}`, where its transformers reads the number of experts"
    try:
        backends.older_config(model.config)
    except QuantizeError as error:
        yield str(error)


def _alternative(model: ModelDescription, method: str, *, has_gpus: bool) -> str:
    """Name a backend that can do the model: for this method, or else for the other one."""
    for other in (method, *(name for name in backends.METHODS if name != method)):
        for backend in backends.METHODS.get(other, ()):
            without_model = other in backends.WITHOUT_MODEL
            if not any(_by_backend(model, other, backend, without_model=without_model, has_gpus=has_gpus)):
                chosen = "" if other == method else f"`method: {other}` with "
                return f"use {chosen}`backend: {backend}`"
    return "no backend can; choose another model"


def _widths(model: ModelDescription, scheme: Scheme) -> Iterator[str]:
    """Groups must divide every linear's inputs, and 32-bit words hold whole numbers of weights."""
    sizes = backends.GROUP_SIZES[scheme.method]
    size = scheme.group_size
    ragged = [name for name, weight in model.linears.items() if size > 0 and weight.shape[1] % size]
    if ragged:
        widths = {weight.shape[1] for weight in model.linears.values()}
        fitting = [each for each in sizes if each == -1 or all(width % each == 0 for width in widths)]
        remedy = f"use {either(fitting)}" if fitting else "use `method: fp8`, which has no groups"
        yield (
            f"`group_size` {size} does not divide the {model.linears[ragged[0]].shape[1]} inputs of "
            f"{_some(ragged)}: {remedy}"
        )
    if scheme.method == "fp8-block":
        cut = [name for name, weight in model.linears.items() if weight.shape[0] % size]
        if cut:
            yield (
                f"`fp8-block` has squares of {size}, and vLLM cuts none: they do not divide the "
                f"{model.linears[cut[0]].shape[0]} outputs of {_some(cut)}; use `method: fp8`"
            )
    axis, what = (0, "outputs") if scheme.method == "awq" else (1, "inputs")
    whole = _AUTOAWQ_OUTPUTS if scheme.backend == "autoawq" else 32 // math.gcd(32, scheme.bits)
    uneven = [name for name, weight in model.linears.items() if weight.shape[axis] % whole]
    if uneven and scheme.method != "mixed":  # which takes another format for such a layer
        width = model.linears[uneven[0]].shape[axis]
        yield f"{_NAMES[scheme.backend]} packs {what} by {whole}, which does not divide the {width} of {_some(uneven)}"


def _some(names: Iterable[str]) -> str:
    """Up to three names, and how many more there are."""
    listed = list(names)
    shown = ", ".join(f"`{name}`" for name in listed[:_NAMED])
    return shown if len(listed) <= _NAMED else f"{shown} and {len(listed) - _NAMED} more"

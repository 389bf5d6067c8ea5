"""A checkpoint that was quantized elsewhere, as ``method: as-is`` takes it: its format, and the model it stands for.

What the format is, its config.json says, and `scheme_of` takes none that the checks of ``formats`` do not know. From
that and the headers follows the 16-bit model, name by name and shape by shape, although nobody may have its weights;
the planner plans with it, and the original that a model file names as ``baseline`` must be it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipeline.compatibility.backends import BITS, GROUP_SIZES
from pipeline.compatibility.description import FLOATS, LINEAR_ROLES, ModelDescription, Role
from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.compatibility.scheme import AS_IS, Format, PublishedScheme, either
from pipeline.errors import UnsupportedModelError
from pipeline.quantization.formats import mxfp4_experts
from pipeline.quantization.formats.checkpoint_format import PackedLayer
from pipeline.quantization.formats.table import layer_format

# What a scheme of compressed-tensors is tried as, in this order; the first whose settings are those of config.json.
_COMPRESSED: Sequence[Format] = ("fp8", "fp8-block", "w8a8", "w4a16", "nvfp4", "mxfp4")
_METHODS = ("awq", "gptq", "fp8", "mxfp4", "compressed-tensors")
# Keys under which `quantization_config` names the layers that stay at 16 bits.
_KEPT = ("ignore", "modules_to_not_convert", "ignored_layers")
# Stored by some, and computed by others when a model is loaded.
_DERIVED = re.compile(r"\.inv_freq$")
# Expressions that take linear time on a name, or nearly: literals, and at most so many `.*`.
_PLAIN_EXPRESSION, _MOST_WILDCARDS, _MOST_EXPRESSIONS = re.compile(r"(?:[\w^$|()-]|\\[.d]\+?|\.\*?)*"), 4, 100
_QUANTIZED_ROLES = LINEAR_ROLES | {Role.DRAFTING, Role.FUSED_EXPERTS}
_MATRIX = 2
# How many names a message gives.
_NAMED = 3


@dataclass(frozen=True)
class Published:
    """A quantized ``checkpoint``, and the scheme that it follows."""

    checkpoint: ModelDescription
    scheme: PublishedScheme

    @cached_property
    def layers(self) -> Mapping[str, PackedLayer]:
        """Its quantized layers by name; the weight of each has the shape that it stands for, and no bytes."""
        form = layer_format(self.scheme)
        modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.checkpoint.tensors.items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = tensor
        found: dict[str, PackedLayer] = {}
        for module, tensors in modules.items():
            stored = tensors.get(form.MARK)
            if stored is None or stored.dtype in FLOATS or len(stored.shape) != _MATRIX:
                continue
            dtype = next(
                (each.dtype for part, each in tensors.items() if part != "bias" and each.dtype in FLOATS), "BF16"
            )
            weight = Tensor(dtype, form.weight_shape(stored, self.scheme), 0, 0, stored.file)
            parts = {part: tensors[part] for part in form.layout(weight, self.scheme) if part in tensors}
            found[module] = PackedLayer(module, weight, parts)
        return found

    @cached_property
    def experts(self) -> Mapping[str, Tensor]:
        """Its quantized experts that are fused into one tensor, as that tensor would be at 16 bits."""
        if self.scheme.format != "mxfp4-experts":
            return {}
        found = {}
        for name, stored in self.checkpoint.tensors.items():
            shape = mxfp4_experts.fused_shape(stored) if name.endswith(mxfp4_experts.BLOCKS) else None
            if shape is not None:
                found[name.removesuffix(mxfp4_experts.BLOCKS)] = Tensor("BF16", shape, 0, 0, stored.file)
        return found

    @cached_property
    def original(self) -> ModelDescription:
        """The 16-bit model that it stands for: names and shapes alone."""
        packed = {f"{name}.{part}" for name, layer in self.layers.items() for part in layer.parts}
        ends = (mxfp4_experts.BLOCKS, mxfp4_experts.SCALES)
        packed |= {f"{name}{end}" for name in self.experts for end in ends}
        tensors = {name: tensor for name, tensor in self.checkpoint.tensors.items() if name not in packed}
        tensors |= {f"{name}.weight": layer.weight for name, layer in self.layers.items()} | dict(self.experts)
        config = {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}
        return ModelDescription(config, tensors)

    def packed(self, source: ModelDescription | None = None) -> Iterator[PackedLayer]:
        """Yield every quantized layer, each fused expert as one of its own, with the weight that a ``source`` has."""
        tensors = None if source is None else source.tensors
        for name, layer in self.layers.items():
            yield layer if tensors is None else replace(layer, weight=tensors[f"{name}.weight"])
        for name, fused in self.experts.items():
            weight = fused if tensors is None else tensors[name]
            yield from mxfp4_experts.expert_layers(name, self.checkpoint.tensors, weight)


def read(checkpoint: ModelDescription) -> Published:
    """Describe a checkpoint by its configuration and headers.

    Raises:
        UnsupportedModelError: it is not quantized, or in no format that is checked here.
    """
    return Published(checkpoint, scheme_of(checkpoint.config))


def scheme_of(config: Mapping[str, Any]) -> PublishedScheme:
    """The scheme that a config.json states.

    Raises:
        UnsupportedModelError: it states none, or one that is not checked here.
    """
    stated = config.get("quantization_config")
    if not isinstance(stated, Mapping):
        raise UnsupportedModelError(
            "`source`: it is not quantized (config.json has no `quantization_config`), and `method: as-is` takes a "
            "quantized one: choose a method that quantizes, as `method: fp8, backend: llmcompressor`"
        )
    if stated.get("quant_method") not in _METHODS:
        raise UnsupportedModelError(
            f"`source`: config.json says `quant_method` {str(stated.get('quant_method'))[:60]!r}, and what `method: "
            f"as-is` takes is checked for {either(_METHODS)} alone"
        )
    if stated.get("kv_cache_scheme") is not None:
        raise UnsupportedModelError(
            "`source`: config.json has a `kv_cache_scheme`, which `method: as-is` does not take"
        )
    # What older versions of the libraries left out or named otherwise, with one meaning.
    known = {"checkpoint_format": "gptq", **stated, "quantization_status": "compressed"}
    problems: list[str] = []
    for scheme in _candidates(stated):
        problems = list(layer_format(scheme).config_problems(known, scheme))
        if not problems:
            return scheme
    why = problems[0] if problems and stated["quant_method"] != "compressed-tensors" else _settings(stated)
    raise UnsupportedModelError(f"`source`: a format that `method: as-is` does not know: {why}")


def find_problems(found: Published, baseline: ModelDescription | None) -> list[str]:
    """Why a checkpoint can't be released as it is, or be compared with a ``baseline``; each begins with the key."""
    problems = [f"`source`: {problem}" for problem in _coverage_problems(found)]
    if key := found.scheme.not_served:
        problems.append(f"`source`: vLLM can't serve GPTQ with `{key}` {getattr(found.scheme, key)!r}")
    if baseline is not None:
        problems += [f"`baseline`: {problem}" for problem in _differences(found, baseline)]
    return problems


def _candidates(stated: Mapping[str, Any]) -> Iterator[PublishedScheme]:
    """The schemes that a ``quantization_config`` may mean."""
    match stated.get("quant_method"), stated.get("bits"), stated.get("group_size"):
        case "awq", int(bits), int(size) if bits in BITS["awq", "autoawq"] and size in GROUP_SIZES["awq"]:
            yield _scheme("awq", bits, size)
        case "gptq", int(bits), int(size) if bits in BITS["gptq", "gptqmodel"] and size in GROUP_SIZES["gptq"]:
            yield _scheme("gptq", bits, size, stated.get("sym") is True, stated.get("desc_act") is True)
        case "fp8", _, _:
            block = stated.get("weight_block_size")
            size = block[0] if isinstance(block, list) and block and type(block[0]) is int and block[0] > 0 else 128
            yield _scheme("fp8-scale-inv", 8, size)
        case "mxfp4", _, _:
            yield _scheme("mxfp4-experts", 4, 32)
        case "compressed-tensors", _, _:
            for method in _COMPRESSED:
                (bits,) = BITS[method, "llmcompressor"]
                for size in GROUP_SIZES[method]:
                    yield _scheme(method, bits, size)


def _scheme(
    form: Format,
    bits: int,
    size: int,
    symmetric: bool = True,
    desc_act: bool = False,
) -> PublishedScheme:
    return PublishedScheme(
        method=AS_IS,
        backend="none",
        published=form,
        bits=bits,
        group_size=size,
        symmetric=symmetric,
        desc_act=desc_act,
    )


def _settings(stated: Mapping[str, Any]) -> str:
    """A ``quantization_config`` in one line: without the names of layers."""
    kept = {key: value for key, value in stated.items() if key not in _KEPT and value is not None}
    return str(kept)[:300]


def _coverage_problems(found: Published) -> Iterator[str]:
    """Layers that config.json says to be quantized must be, and no others; what is not a layer never is."""
    kept = _Kept.read(found.checkpoint.config["quantization_config"])
    roles = found.original.roles
    names = {f"{name}.weight": name for name in found.layers} | {name: name for name in found.experts}
    if not names:
        yield f"config.json states `{found.scheme.format}`, and no layer is quantized so"
        return
    if odd := [name for tensor, name in names.items() if roles[tensor] not in _QUANTIZED_ROLES]:
        yield f"{_some(odd)} {'is' if len(odd) == 1 else 'are'} quantized, and no linear layer of the decoder"
    if odd := [name for name in names.values() if name in kept]:
        yield f"{_some(odd)}: quantized, and config.json says that it is not"
    # Of fused experts the format says itself that it takes nothing else.
    linears = () if found.scheme.format == "mxfp4-experts" else found.original.linears
    if left := [name for name in linears if name not in found.layers and name not in kept]:
        yield f"{_some(left)}: not quantized, and config.json does not say so"


@dataclass(frozen=True)
class _Kept:
    """The layers that stay at 16 bits: by whole parts of their names, with ``*`` for any, or by expressions."""

    names: frozenset[str]
    expressions: tuple[re.Pattern[str], ...]

    @classmethod
    def read(cls, stated: Mapping[str, Any]) -> _Kept:
        """Read what a ``quantization_config`` says.

        Raises:
            UnsupportedModelError: an expression in it might take for ever.
        """
        names = [str(each) for key in _KEPT if isinstance(stated.get(key), list) for each in stated[key]]
        is_pattern = {name: name.startswith("re:") or "*" in name for name in names}
        if sum(is_pattern.values()) > _MOST_EXPRESSIONS:
            raise UnsupportedModelError(f"`source`: config.json names layers by more than {_MOST_EXPRESSIONS} patterns")
        plain = frozenset(name.removesuffix(".weight") for name in names if not is_pattern[name])
        return cls(plain, tuple(_expression(name) for name in names if is_pattern[name]))

    def __contains__(self, name: str) -> bool:
        parts = name.split(".")
        pieces = (".".join(parts[at:end]) for at in range(len(parts)) for end in range(at + 1, len(parts) + 1))
        return any(piece in self.names for piece in pieces) or any(each.match(name) for each in self.expressions)


def _expression(name: str) -> re.Pattern[str]:
    is_one = name.startswith("re:")
    parts = re.escape(name.removesuffix(".weight")).replace(r"\*", "[^.]*")
    written = name.removeprefix("re:") if is_one else rf"(?:.*\.)?{parts}(?:\..*)?$"
    if name.count("*") + name.count("+") <= _MOST_WILDCARDS and (not is_one or _PLAIN_EXPRESSION.fullmatch(written)):
        with contextlib.suppress(re.error):
            return re.compile(written)
    raise UnsupportedModelError(f"`source`: config.json names layers by what is not read here: {name[:80]!r}")


def _differences(found: Published, baseline: ModelDescription) -> Iterator[str]:
    """Where a baseline is not the model that the checkpoint stands for."""
    if stored := baseline.quantized_dtypes:
        name, dtype = next(iter(stored.items()))
        yield f"it is quantized itself (`{name}` is {dtype}): name the original at 16 bits"
        return
    mine = found.original
    if mine.architecture != baseline.architecture:
        yield f"it is a `{baseline.architecture}`, and the source a `{mine.architecture}`"
        return
    ours, theirs = _compared(mine, found), _compared(baseline, found)
    shapes = [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
    if shapes:
        name, more = shapes[0], f" ({len(shapes) - 1} more differ)" if len(shapes) > 1 else ""
        yield f"`{name}` is {list(theirs[name].shape)}, and {list(ours[name].shape)} in the source{more}"
    if lacking := sorted(ours.keys() - theirs.keys()):
        yield f"it lacks {_some(lacking)}, which the source has"
    if lacking := sorted(theirs.keys() - ours.keys()):
        yield f"it has {_some(lacking)}, which the source lacks"


def _compared(model: ModelDescription, found: Published) -> dict[str, Tensor]:
    """What both must have: not a tied head, nor layers that draft tokens, nor biases that quantizers add."""
    biases = {f"{name}.bias" for name in found.layers}
    return {
        name: tensor
        for name, tensor in model.tensors.items()
        if not (_DERIVED.search(name) or name in biases or model.roles[name] is Role.DRAFTING)
        and not (model.tied and model.roles[name] is Role.HEAD)
    }


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(f"`{name}`" for name in listed[:_NAMED])
    return shown if len(listed) <= _NAMED else f"{shown} and {len(listed) - _NAMED} more"

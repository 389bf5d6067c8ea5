"""Checks a quantized checkpoint independently of the quantizer.

It reads config.json, the safetensors headers, indices and scales, and checks that every linear layer of the decoder is
quantized and nothing else is; that packed shapes, groups and dtypes fit the scheme and the source's shapes; that a
sample of every layer decodes to about the source's weights; that the source's other tensors are unchanged, those of
vision and audio towers byte for byte; that the size matches the bits; and that all users may read the files. The
layouts are described in ``formats``, one module each.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compatibility.description import FLOATS, ModelDescription, layer_of
from pipeline.compatibility.safetensors_headers import HeaderError, Tensor, read_model
from pipeline.compatibility.safetensors_values import equal, read_rows
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import CheckpointError
from pipeline.quantization import mixture, published
from pipeline.quantization.formats import compressed_tensors, mixed
from pipeline.quantization.formats.checkpoint_format import LayerFormat, PackedLayer, scale_problems
from pipeline.quantization.formats.table import format_of, layer_format
from pipeline.quantization.published import Published
from registry.bounded_json import Bounds, DocumentError, read_json

# Weights that are decoded of each layer, about, in spans of so many rows or columns.
_SAMPLED, _SPAN = 1 << 19, 128
# Measured on the demo: a cosine of 0.79 to 0.85 at 2 bits, 0.97 and more at 4; a factor of 0.94 to 0.97 and 0.99 to 1.
_LEAST_COSINE, _FACTORS = 0.5, (2 / 3, 3 / 2)
# The spread, in natural logarithms, up to which the factors of inputs or outputs are those that a norm explains.
_EXPLAINED = 0.1
# Up to so much more spread, one explains them as well as another. On the demo in w8a8 it is 0.001 and 0.03 or more.
_AS_WELL = 0.02
# AWQ divides the outputs of a linear layer for the one behind it, the last ones where a weight holds several parts
# (`scale_fc_fc` in AutoAWQ's `awq/quantize/scale.py`). Mixtral names an MLP's layers w1, w2 and w3.
_IN_FRONT = {"o_proj": ("v_proj", "qkv_proj"), "down_proj": ("up_proj", "gate_up_proj"), "w2": ("w3",)}
_BEHIND = {front: (name,) for name, fronts in _IN_FRONT.items() for front in fronts}
# Computed when a model is loaded; some sources store it nevertheless.
_DERIVED = re.compile(r"\.inv_freq$")
_DOCUMENT = Bounds(bytes=16 << 20, values=500_000)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Found:
    """A checkpoint that passed: how many layers are quantized, the safetensors files' bytes, and the source's.

    ``bits_per_weight`` counts all that the quantized layers take, scales and zeros among it, over their weights.
    """

    layers: int
    bytes: int
    source_bytes: int
    bits_per_weight: float


def check(folder: Path, source: Path, scheme: Scheme) -> Found:
    """Check the checkpoint in ``folder`` against the ``source`` it was made from and the ``scheme`` it was to follow.

    Raises:
        CheckpointError: listing every problem found.
    """
    problems = [
        *_file_problems(folder),
        *_carried_problems(folder, source),
        *_config_problems(folder, source, scheme),
    ]
    before, after = _read(source, "the source", problems), _read(folder, "the checkpoint", problems)
    if not before or not after:
        _refuse(folder, problems)
    model = ModelDescription(_json(source / "config.json"), before)
    linears = model.linears
    if not linears:
        problems.append("the source has no linear layer in any numbered layer: nothing to quantize")
    schemes = _schemes(folder, model, scheme)
    if scheme.method == "mixed":
        problems += mixture.assignment_problems(model, schemes, scheme)
    quantized = {name: linears[name] for name in linears if name in schemes}
    sound = {}
    for name, weight in quantized.items():
        layer = _packed(name, weight, after, schemes[name])
        wrong = list(_layer_problems(layer, after, schemes[name]))
        problems += wrong
        if not wrong:
            sound[name] = layer
    around = _surroundings(model, after, scheme, sound)
    for name, layer in sound.items():
        problems += _value_problems(layer, schemes[name], around)
    problems += _other_problems(model, after, scheme, schemes)
    read = {tensor.file for tensor in after.values()}
    problems += [f"{path.name} is not named by the index" for path in folder.glob("*.safetensors") if path not in read]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    packed = sum(mixture.stored_bytes(weight, schemes.get(name)) for name, weight in linears.items())
    problems += _size_problems(size, packed, model, after, scheme)
    _refuse(folder, problems)
    return Found(
        layers=len(quantized),
        bytes=size,
        source_bytes=sum(path.stat().st_size for path in source.glob("*.safetensors")),
        bits_per_weight=8 * packed / sum(math.prod(weight.shape) for weight in linears.values()),
    )


def check_published(folder: Path, baseline: Path | None) -> Found:
    """Check a checkpoint that was quantized elsewhere: as it is, and against the ``baseline`` that it was made from.

    Which layers are quantized and how, its own config.json says. Its tokenizer and the rest of its configuration are
    its own too.

    Raises:
        CheckpointError: listing every problem found.
        UnsupportedModelError: it is not quantized, or in no format that is checked here.
    """
    problems = list(_file_problems(folder))
    after = _read(folder, "the checkpoint", problems)
    before = {} if baseline is None else _read(baseline, "the baseline", problems)
    if problems:
        _refuse(folder, problems)
    found = published.read(ModelDescription(_json(folder / "config.json"), after))
    original = None if baseline is None else ModelDescription(_json(baseline / "config.json"), before)
    if problems := published.find_problems(found, original):
        _refuse(folder, problems)
    for layer in found.packed():
        problems += _stored_problems(layer, found.scheme)
    if original is not None and not problems:
        compared = {layer.name: layer for layer in found.packed(original)}
        around = _surroundings(original, after, found.scheme, compared)
        for layer in compared.values():
            problems += _value_problems(layer, found.scheme, around)
        problems += _kept_problems(found, original)
    _refuse(folder, problems)
    layers = list(found.packed())
    weights = sum(math.prod(layer.weight.shape) for layer in layers)
    return Found(
        layers=len(layers),
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        source_bytes=2 * sum(math.prod(tensor.shape) for tensor in found.original.tensors.values()),
        bits_per_weight=8 * sum(part.bytes for layer in layers for part in layer.parts.values()) / weights,
    )


def _kept_problems(found: Published, original: ModelDescription) -> Iterator[str]:
    """Where a published checkpoint keeps other numbers than its original has, in dtypes that can be compared."""
    form, after = format_of(found.scheme), found.checkpoint.tensors
    for name, tensor in original.tensors.items():
        kept = after.get(name)
        moved = tensor.dtype in FLOATS and form.rescales(found.scheme) and original.is_in_decoder(name)
        if kept is None or moved or name.removesuffix(".weight") in found.layers:
            continue
        if kept.dtype in {tensor.dtype, "F16"} and not equal(tensor, kept):
            yield f"`{name}` differs from the baseline's"


@dataclass(frozen=True)
class _Surroundings:
    """What can have taken over factors of a layer."""

    changed_norms: Mapping[str, list[NDArray[np.float32]]]
    """See `_changed_norms`."""
    layers: Mapping[str, PackedLayer]
    """All quantized ones that can be decoded, by name."""

    def norms(self, layer: PackedLayer) -> list[NDArray[np.float32]]:
        """The norms of its place in the decoder."""
        width = layer.weight.shape[1]
        return [norm for norm in self.changed_norms.get(layer_of(layer.name), []) if len(norm) == width]

    def in_front(self, layer: PackedLayer) -> list[PackedLayer]:
        """The linear layer whose outputs, or the last of them, are this one's inputs."""
        return [other for other in self._beside(layer, _IN_FRONT) if other.weight.shape[0] >= layer.weight.shape[1]]

    def behind(self, layer: PackedLayer) -> list[PackedLayer]:
        """The linear layer whose inputs are this one's outputs, or the last of them."""
        return [other for other in self._beside(layer, _BEHIND) if layer.weight.shape[0] >= other.weight.shape[1]]

    def _beside(self, layer: PackedLayer, names: Mapping[str, Sequence[str]]) -> list[PackedLayer]:
        module, _, name = layer.name.rpartition(".")
        found = (self.layers.get(f"{module}.{other}") for other in names.get(name, ()))
        return [other for other in found if other is not None]


def _schemes(folder: Path, model: ModelDescription, scheme: Scheme) -> Mapping[str, Scheme]:
    """The scheme of each layer that is to be quantized: of a mixture its own, as the configuration states it."""
    if scheme.method != "mixed":
        return dict.fromkeys(model.linears, scheme)
    stated = _json(folder / "config.json").get("quantization_config")
    return mixed.read_schemes(stated, scheme) if isinstance(stated, dict) else {}


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"the checkpoint in {folder} does not match its scheme:\n{listed}")


def _read(folder: Path, what: str, problems: list[str]) -> dict[str, Tensor]:
    try:
        return read_model(folder)
    except HeaderError as error:
        problems += [f"{what}: {line}" for line in str(error).splitlines()]
        return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path.read_bytes(), _DOCUMENT)
    except (OSError, DocumentError):
        return {}
    return document if isinstance(document, dict) else {}


def _file_problems(folder: Path) -> Iterator[str]:
    """File modes, and pickles."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield f"{path.name} is not a regular file"
        elif path.is_file() and path.stat().st_mode & 0o044 != 0o044:
            yield f"{path.name} has mode {path.stat().st_mode & 0o777:04o}: an unprivileged container can't read it"
        if path.suffix in _PICKLES:
            yield f"{path.name} is a pickle"


def _carried_problems(folder: Path, source: Path) -> Iterator[str]:
    """The source's configuration and tokenizer files."""
    for path in sorted(source.iterdir()):
        if not path.is_file() or ".safetensors" in path.name or path.name == "config.json":
            continue
        carried = folder / path.name
        if not carried.is_file():
            yield f"{path.name} of the source is missing"
        elif carried.read_bytes() != path.read_bytes():
            yield f"{path.name} differs from the source's"


def _config_problems(folder: Path, source: Path, scheme: Scheme) -> Iterator[str]:
    """config.json: the source's own, with a quantization that says what the scheme says."""
    config = _json(folder / "config.json")
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        yield "config.json has no `quantization_config`"
        return
    form = format_of(scheme)
    yield from form.config_problems(stated, scheme)
    ours = {"quantization_config", "dtype", "torch_dtype"} | ({"auto_map"} if "auto_map" not in config else set())
    before = _json(source / "config.json")
    for key in sorted((before.keys() | config.keys()) - ours):
        if before.get(key) != config.get(key):
            yield f"config.json: `{key}` is {config.get(key)!r}, and {before.get(key)!r} in the source"
    for key in ("dtype", "torch_dtype") if form.REST_DTYPE == "F16" else ():
        if config.get(key, "float16") != "float16":
            yield f"config.json: `{key}` is {config[key]!r}, and the weights are float16"


def _packed(name: str, weight: Tensor, after: Mapping[str, Tensor], scheme: Scheme) -> PackedLayer:
    layout = layer_format(scheme).layout(weight, scheme)
    return PackedLayer(name, weight, {part: after[f"{name}.{part}"] for part in layout if f"{name}.{part}" in after})


def _layer_problems(layer: PackedLayer, after: Mapping[str, Tensor], scheme: Scheme) -> Iterator[str]:
    unquantized = after.get(f"{layer.name}.weight")
    if unquantized is not None and ("weight" not in layer.parts or unquantized.dtype in FLOATS):
        yield f"{layer.name} is not quantized: `{layer.name}.weight` is still there"
        return
    yield from _stored_problems(layer, scheme)


def _stored_problems(layer: PackedLayer, scheme: Scheme) -> Iterator[str]:
    """Whether a layer's tensors have the dtypes and shapes of its format, and scales and indices that can be right."""
    form, weight = layer_format(scheme), layer.weight
    sound = True
    for part, stored in form.layout(weight, scheme).items():
        tensor = layer.parts.get(part)
        if tensor is None:
            yield f"{layer.name} lacks `{part}`"
        elif (tensor.dtype, tensor.shape) != (stored.dtype, stored.shape):
            yield (
                f"{layer.name}.{part} is {tensor.dtype} {list(tensor.shape)}, expected {stored.dtype} "
                f"{list(stored.shape)} for a weight of {list(weight.shape)} at {scheme.bits} bits in groups of "
                f"{scheme.group_size}"
            )
        else:
            continue
        sound = False
    if sound:
        yield from form.layer_problems(layer, scheme)


def _value_problems(layer: PackedLayer, scheme: Scheme, around: _Surroundings) -> Iterator[str]:
    """Whether a sample of a layer decodes to about the source's weights.

    Two figures over the sampled weights w and what they decode to, q: the cosine <q, w> / |q||w|, which is near 0 for
    weights of another layer, and the factor <q, w> / <w, w>, which is near 1 unless scales are wrong. Where the format
    moves scales between layers, the cosine is the median of those of each input's weights, and the factor is known
    only where what happened to inputs and outputs has been taken over by a norm, or by the linear layer in front or
    behind.
    """
    form = layer_format(scheme)
    sample = _sample(layer, form, scheme)
    decoded, weights = sample.decoded, sample.weights
    if not weights.any():
        return
    moved = form.rescales(scheme)
    product, sizes = (decoded * weights).sum(0), (decoded**2).sum(0) * (weights**2).sum(0)
    cosines = np.sqrt(sizes) if moved else np.sqrt((decoded**2).sum() * (weights**2).sum())
    over = product if moved else product.sum()
    cosine = float(np.median(np.divide(over, cosines, out=np.zeros_like(cosines), where=cosines > 0)))
    if cosine < _LEAST_COSINE:
        yield f"{layer.name} does not decode to the source's weights: a cosine of {cosine:.2f} over a sample of them"
        return
    factor = _explained_factor(layer, sample, scheme, around) if moved else float(product.sum() / (weights**2).sum())
    if factor is not None and not _FACTORS[0] < factor < _FACTORS[1]:
        yield f"{layer.name} decodes to {factor:.2f} times the source's weights: its scales are wrong"


def _explained_factor(layer: PackedLayer, sample: _Sample, scheme: Scheme, around: _Surroundings) -> float | None:
    """The factor of all weights beside those of each input and output, where something else has taken these over.

    That is a norm in front, or the linear layer in front or behind. Where several explain them, or one and inputs as
    they were, that is meant after which the factors spread least, since one norm's factors can resemble another's times
    a constant; and of those the one that leaves the least.
    """
    inputs = _own_inputs(layer, around)
    for other in around.in_front(layer):
        inputs += [divided[-layer.weight.shape[1] :] for divided in _divided_outputs(other, scheme, around)]
    outputs = [np.ones(layer.weight.shape[0], np.float32)]
    for other in around.behind(layer):
        outputs.append(np.ones(layer.weight.shape[0], np.float32))
        outputs[-1][-other.weight.shape[1] :] = _divided_inputs(other, scheme)
    explained = []
    for of_input, of_output in itertools.product(inputs, outputs):
        along = [_log(sample.ratios(of_input, of_output, axis)) for axis in (0, 1)]
        spread = max(_spread(each) for each in along)
        if spread < _EXPLAINED:
            explained.append((spread, float(np.median(along[0]))))
    if not explained:
        return None
    least = min(explained)[0]
    return math.exp(min((factor for spread, factor in explained if spread < least + _AS_WELL), key=abs))


def _divided_outputs(layer: PackedLayer, scheme: Scheme, around: _Surroundings) -> list[NDArray[np.float32]]:
    """What each output was divided by, or 0 where that is unknown: for each norm that explains the inputs as well."""
    sample, candidates = _sample(layer, layer_format(scheme), scheme), _own_inputs(layer, around)
    as_they_were = np.ones(layer.weight.shape[0], np.float32)
    spreads = [_spread(_log(sample.ratios(each, as_they_were, 0))) for each in candidates]
    return [
        _divided(layer, sample, each, 1)
        for each, spread in zip(candidates, spreads, strict=True)
        if spread <= min(spreads) + _AS_WELL
    ]


def _divided_inputs(layer: PackedLayer, scheme: Scheme) -> NDArray[np.float32]:
    """What each input was divided by, or 0 where that is unknown."""
    sample = _sample(layer, layer_format(scheme), scheme)
    return _divided(layer, sample, np.ones(layer.weight.shape[1], np.float32), 0)


def _divided(layer: PackedLayer, sample: _Sample, inputs: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    ratios = sample.ratios(inputs, np.ones(layer.weight.shape[0], np.float32), axis)
    found = np.zeros(layer.weight.shape[1 - axis], np.float32)
    found[sample.outputs if axis else sample.inputs] = np.divide(1, ratios, out=np.zeros_like(ratios), where=ratios > 0)
    return found


def _own_inputs(layer: PackedLayer, around: _Surroundings) -> list[NDArray[np.float32]]:
    """Inputs as they were, and with the factors that norms have taken over."""
    return [np.ones(layer.weight.shape[1], np.float32), *around.norms(layer)]


def _log(ratios: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logarithms of those that are above zero."""
    logs: NDArray[np.float32] = np.log(ratios[ratios > 0])
    return logs


def _spread(logs: NDArray[np.float32]) -> float:
    return float(logs.std()) if len(logs) else math.inf


@dataclass(frozen=True)
class _Sample:
    """Some weights [out, in] of a layer, decoded and as the source has them, and which of its inputs and outputs."""

    decoded: NDArray[np.float32]
    weights: NDArray[np.float32]
    inputs: NDArray[np.int64]
    outputs: NDArray[np.int64]

    def ratios(self, of_inputs: NDArray[np.float32], of_outputs: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        """How many times what is expected each input (0) or output (1) has; factors are given for the whole layer."""
        expected = self.weights * of_inputs[self.inputs] * of_outputs[self.outputs, None]
        product, size = (self.decoded * expected).sum(axis), (expected**2).sum(axis)
        ratios: NDArray[np.float32] = np.divide(product, size, out=np.zeros_like(product), where=size > 0)
        return ratios


def _sample(layer: PackedLayer, form: LayerFormat, scheme: Scheme) -> _Sample:
    """Decode whole spans of a layer, evenly spaced."""
    length, across = layer.weight.shape[form.AXIS], layer.weight.shape[1 - form.AXIS]
    spans = math.ceil(length / _SPAN)
    taken = max(1, min(spans, _SAMPLED // (_SPAN * across)))
    starts = [number * spans // taken * _SPAN for number in range(taken)]
    chosen = [slice(start, min(length, start + _SPAN)) for start in starts]
    along = np.concatenate([np.arange(span.start, span.stop) for span in chosen])
    return _Sample(
        np.concatenate([form.decode(layer, span, scheme) for span in chosen], form.AXIS),
        np.concatenate([layer.original(span, form.AXIS) for span in chosen], form.AXIS),
        *((np.arange(across), along) if form.AXIS == 0 else (along, np.arange(across))),
    )


def _surroundings(
    model: ModelDescription, after: Mapping[str, Tensor], scheme: Scheme, layers: Mapping[str, PackedLayer]
) -> _Surroundings:
    """What can have taken over factors: nothing for formats that move no scales."""
    if not format_of(scheme).rescales(scheme):
        return _Surroundings({}, {})
    return _Surroundings(_changed_norms(model, after), layers)


def _changed_norms(model: ModelDescription, after: Mapping[str, Tensor]) -> Mapping[str, list[NDArray[np.float32]]]:
    """By layer of the decoder: each input's factor where a norm has changed, as its weights were over as they are."""
    found: dict[str, list[NDArray[np.float32]]] = {}
    for name, tensor in model.tensors.items():
        changed = after.get(name)
        if changed is None or len(tensor.shape) != 1 or tensor.shape != changed.shape or not model.is_in_decoder(name):
            continue
        if tensor.dtype in FLOATS and changed.dtype in FLOATS:
            before, now = read_rows(tensor), read_rows(changed)
            # Gemma's norms, and those of Qwen 3.5, multiply by one more than their weights.
            ratios = [(before + more) / np.where(now + more, now + more, np.float32(np.nan)) for more in (0, 1)]
            found.setdefault(layer_of(name), []).extend(each.astype(np.float32) for each in ratios if (each > 0).all())
    return found


def _other_problems(
    model: ModelDescription, after: Mapping[str, Tensor], scheme: Scheme, schemes: Mapping[str, Scheme]
) -> Iterator[str]:
    """Everything that is not quantized is the source's; there is nothing else.

    What is converted to float16 must hold what the source's numbers round to. Where the format moves scales between
    layers, what stands in the decoder's layers may differ.
    """
    before, form = model.tensors, format_of(scheme)
    weights = {f"{name}.weight" for name in schemes}
    for name in sorted(before.keys() - weights):
        tensor, floating = after.get(name), before[name].dtype in FLOATS
        expected = (form.REST_DTYPE if floating else None) or before[name].dtype
        moved = floating and form.rescales(scheme) and model.is_in_decoder(name)
        if tensor is None:
            if not (_DERIVED.search(name) or (model.tied and name.endswith("lm_head.weight"))):
                yield f"`{name}` of the source is missing"
        elif tensor.shape != before[name].shape:
            yield f"`{name}` has shape {list(tensor.shape)}, and {list(before[name].shape)} in the source"
        elif tensor.dtype != expected:
            yield f"`{name}` is {tensor.dtype}, expected {expected}"
        elif not moved and not equal(before[name], tensor):
            yield f"`{name}` differs from the source's"
    cache_scales = compressed_tensors.cache_scales(model) if scheme.kv_cache else frozenset()
    for name in sorted(cache_scales):
        if name not in after:
            yield f"`{name}` is missing, which the cache in FP8 needs"
        elif (scale := after[name]).dtype not in FLOATS or math.prod(scale.shape) != 1:
            yield f"`{name}` is {scale.dtype} {list(scale.shape)}, expected one floating-point number"
        else:
            yield from scale_problems(name, read_rows(scale))
    for name in sorted(after.keys() - before.keys() - cache_scales):
        module, _, part = name.rpartition(".")
        weight = before.get(f"{module}.weight")
        formats = [schemes[module]] if module in schemes else list(dict.fromkeys(schemes.values()))
        packed = (
            weight is not None
            and len(weight.shape) == 2
            and any(part in layer_format(own).layout(weight, own) for own in formats)
        )
        if module in schemes and (packed or part == "bias"):
            continue
        yield f"`{name}`: {module} is quantized and should not be" if packed else f"`{name}` is not of the source"


def _size_problems(
    size: int, packed: int, model: ModelDescription, after: Mapping[str, Tensor], scheme: Scheme
) -> Iterator[str]:
    """What the bits predict: packed layers, the rest, and a header."""
    form = format_of(scheme)
    biases = sum(2 * weight.shape[0] for name, weight in model.linears.items() if f"{name}.bias" not in model.tensors)
    rest = sum(
        2 * math.prod(tensor.shape) if form.REST_DTYPE == "F16" else tensor.bytes
        for name, tensor in model.tensors.items()
        if name.removesuffix(".weight") not in model.linears
    )
    header = 4096 * (1 + len({tensor.file for tensor in after.values()})) + 512 * len(after)
    if size > packed + biases + rest + header:
        yield f"the weights take {size} bytes, and {scheme.bits} bits predict at most {packed + biases + rest + header}"

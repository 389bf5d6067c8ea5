"""Checks a quantized checkpoint independently of the quantizer.

It reads config.json, the safetensors headers, group indices and scales, and checks that every linear layer of the
decoder is quantized and nothing else is; that packed shapes, groups and dtypes fit the scheme and the source's shapes;
that the source's other tensors are present; that the size matches the bits; and that all users may read the files.

The packed layouts, for a source weight of [out, in], b bits, g = in / group_size groups, all packed into int32:

    AWQ (GEMM)   qweight [in, out·b/32]    qzeros [g, out·b/32]   scales [g, out]
    GPTQ         qweight [in·b/32, out]    qzeros [g, out·b/32]   scales [g, out]   g_idx [in]
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.safetensors_headers import HeaderError, Tensor, read_bytes, read_model
from pipeline.errors import CheckpointError
from registry.bounded_json import Bounds, DocumentError, read_json

if TYPE_CHECKING:
    from pipeline.quantization.quantize import Scheme

_PACKED = ("qweight", "qzeros", "scales", "g_idx")
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
    problems = [*_file_problems(folder, source), *_config_problems(folder, source, scheme)]
    before, after = _read(source, "the source", problems), _read(folder, "the checkpoint", problems)
    if not before or not after:
        _refuse(folder, problems)
    model = ModelDescription(_json(source / "config.json"), before)
    linears = model.linears
    if not linears:
        problems.append("the source has no linear layer in any numbered layer: nothing to quantize")
    for name, weight in linears.items():
        problems += _layer_problems(name, weight, after, scheme)
    problems += _other_problems(before, after, linears, tied=model.tied)
    read = {tensor.file for tensor in after.values()}
    problems += [f"{path.name} is not named by the index" for path in folder.glob("*.safetensors") if path not in read]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    problems += _size_problems(size, before, after, linears, scheme)
    _refuse(folder, problems)
    packed = sum(after[f"{name}.{part}"].bytes for name in linears for part in _PACKED if f"{name}.{part}" in after)
    return Found(
        layers=len(linears),
        bytes=size,
        source_bytes=sum(path.stat().st_size for path in source.glob("*.safetensors")),
        bits_per_weight=8 * packed / sum(math.prod(weight.shape) for weight in linears.values()),
    )


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


def _file_problems(folder: Path, source: Path) -> Iterator[str]:
    """File modes, pickles, and the source's configuration and tokenizer files."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield f"{path.name} is not a regular file"
        elif path.is_file() and path.stat().st_mode & 0o044 != 0o044:
            yield f"{path.name} has mode {path.stat().st_mode & 0o777:04o}: an unprivileged container can't read it"
        if path.suffix in _PICKLES:
            yield f"{path.name} is a pickle"
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
    expected: dict[str, Any] = {"quant_method": scheme.method, "bits": scheme.bits, "group_size": scheme.group_size}
    if scheme.method == "awq":
        expected |= {"zero_point": True, "version": "gemm"}
    else:
        expected |= {"sym": scheme.symmetric, "desc_act": scheme.desc_act, "checkpoint_format": "gptq"}
    for key, value in expected.items():
        if stated.get(key) != value:
            yield f"config.json: `quantization_config.{key}` is {stated.get(key)!r}, expected {value!r}"
    ours = {"quantization_config", "dtype", "torch_dtype"} | ({"auto_map"} if "auto_map" not in config else set())
    before = _json(source / "config.json")
    for key in sorted((before.keys() | config.keys()) - ours):
        if before.get(key) != config.get(key):
            yield f"config.json: `{key}` is {config.get(key)!r}, and {before.get(key)!r} in the source"
    for key in ("dtype", "torch_dtype"):
        if config.get(key, "float16") != "float16":
            yield f"config.json: `{key}` is {config[key]!r}, and the weights are float16"


def packed_layout(weight: Tensor, scheme: Scheme) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every packed tensor of a layer; see the module's head."""
    out, inputs = weight.shape
    groups = 1 if scheme.group_size == -1 else math.ceil(inputs / scheme.group_size)
    packed_out = math.ceil(out * scheme.bits / 32)
    common = {"qzeros": ("I32", (groups, packed_out)), "scales": ("F16", (groups, out))}
    if scheme.method == "awq":
        return {"qweight": ("I32", (inputs, packed_out)), **common}
    qweight = (math.ceil(inputs * scheme.bits / 32), out)
    return {"qweight": ("I32", qweight), **common, "g_idx": ("I32", (inputs,))}


def _layer_problems(name: str, weight: Tensor, after: Mapping[str, Tensor], scheme: Scheme) -> Iterator[str]:
    if f"{name}.weight" in after:
        yield f"{name} is not quantized: `{name}.weight` is still there"
        return
    for part, (dtype, shape) in packed_layout(weight, scheme).items():
        tensor = after.get(f"{name}.{part}")
        if tensor is None:
            yield f"{name} lacks `{part}`"
        elif (tensor.dtype, tensor.shape) != (dtype, shape):
            yield (
                f"{name}.{part} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)} for a weight "
                f"of {list(weight.shape)} at {scheme.bits} bits in groups of {scheme.group_size}"
            )
        elif part == "scales" and not np.isfinite(np.frombuffer(read_bytes(tensor), np.float16)).all():
            yield f"{name}.scales holds a value that is not finite"
        elif part == "g_idx":
            yield from _group_problems(name, np.frombuffer(read_bytes(tensor), np.int32), scheme)


def _group_problems(name: str, index: np.ndarray[Any, np.dtype[np.int32]], scheme: Scheme) -> Iterator[str]:
    """Input i belongs to group i // group_size; with ``desc_act`` in another order, but as many to each."""
    size = len(index) if scheme.group_size == -1 else scheme.group_size
    expected = np.arange(len(index)) // size
    found = np.sort(index) if scheme.desc_act else index
    if not np.array_equal(found, expected):
        yield f"{name}.g_idx does not put {size} inputs into each group{'' if scheme.desc_act else ', in their order'}"


def _other_problems(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], linears: Mapping[str, Tensor], *, tied: bool
) -> Iterator[str]:
    """Everything that is not quantized is the source's, as float16; there is nothing else."""
    weights = {f"{name}.weight" for name in linears}
    for name in sorted(before.keys() - weights):
        tensor = after.get(name)
        if tensor is None:
            if not (_DERIVED.search(name) or (tied and name.endswith("lm_head.weight"))):
                yield f"`{name}` of the source is missing"
        elif tensor.shape != before[name].shape:
            yield f"`{name}` has shape {list(tensor.shape)}, and {list(before[name].shape)} in the source"
        elif before[name].dtype in {"F32", "BF16", "F16"} and tensor.dtype != "F16":
            yield f"`{name}` is {tensor.dtype}, expected F16"
    for name in sorted(after.keys() - before.keys()):
        module, _, part = name.rpartition(".")
        if module in linears and (part in _PACKED or part == "bias"):
            continue
        known = f"{module}.weight" in before and part in _PACKED
        yield f"`{name}`: {module} is quantized and should not be" if known else f"`{name}` is not of the source"


def _size_problems(
    size: int,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    linears: Mapping[str, Tensor],
    scheme: Scheme,
) -> Iterator[str]:
    """What the bits predict: packed layers, the rest at two bytes a number, and a header."""
    packed = sum(math.prod(shape) * (2 if dtype == "F16" else 4)
                 for weight in linears.values() for dtype, shape in packed_layout(weight, scheme).values())  # fmt: skip
    biases = sum(2 * weight.shape[0] for name, weight in linears.items() if f"{name}.bias" not in before)
    rest = sum(
        2 * math.prod(tensor.shape) for name, tensor in before.items() if name.removesuffix(".weight") not in linears
    )
    header = 4096 * (1 + len(list({tensor.file for tensor in after.values()}))) + 512 * len(after)
    if size > packed + biases + rest + header:
        yield f"the weights take {size} bytes, and {scheme.bits} bits predict at most {packed + biases + rest + header}"

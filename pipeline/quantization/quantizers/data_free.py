"""Worker: weights in FP8 or MXFP4 without a model and without calibration, some rows at a time.

What llm-compressor's `model_free_ptq` writes, byte for byte, without holding a file in memory: each safetensors file
becomes one of the same name. A new file's header follows from the old one's, so tensors go from one file into the other
in their order, and tensors that are not quantized as they are.
"""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from compressed_tensors_config import quantization_config  # type: ignore[import-not-found]  # beside this script
from finished_layers import finished_folder, peak_memory, whole_file  # type: ignore[import-not-found]
from quantizer_common import let_threads_sleep  # type: ignore[import-not-found]
from slipway_counting import Count
from slipway_worker import Report, WorkerError, main

if TYPE_CHECKING:
    import torch

    from pipeline.quantization.quantize import QuantizationRequest

# Rows go through in pieces of about so many bytes: they stay in the processor's cache.
_PIECE_BYTES = 4 << 20
_COPIED_BYTES = 8 << 20
_BLOCK, _GROUP = 128, 32
_E4M3_LARGEST, _LEAST_POWER = 448.0, -127
# Where the numbers of E2M1 are rounded to the next: halfway, and there to the even one (0, 1, 2 and 4).
_E2M1_UP_FROM = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
# safetensors' names of the dtypes that can be quantized, as torch names them.
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_WIDTHS = {"F8_E4M3": 1, "U8": 1, "F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors header; ``start`` and ``end`` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Method:
    """How rows of a weight are quantized, and the dtype and shape of what that makes of a weight [out, in]."""

    stored: Callable[[int, int, str], Mapping[str, tuple[str, tuple[int, ...]]]]
    quantize: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]


def work(request: QuantizationRequest, report: Report) -> dict[str, object]:
    """Quantize ``source`` into the folder ``output``; see `QuantizationRequest` in `pipeline.quantization.quantize`."""
    let_threads_sleep()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source, output = Path(request["source"]), Path(request["output"])
    finished = finished_folder(request, "cpu", report)
    files = sorted(source.glob("*.safetensors"))
    before = [path for path in files if (finished / path.name).exists()]
    if before:
        report(f"{len(before)} of {len(files)} files were finished before a run was cut off: they are taken over")
    names = {f"{name}.weight" for name in request["linears"]}
    method = METHODS[request["method"]]
    started = time.monotonic()
    for number, path in enumerate(files, 1):
        if path not in before:
            with whole_file(finished / path.name) as part:
                convert(path, part, names, method)
        seconds, known = time.monotonic() - started, len([each for each in before if each <= path])
        report(str(Count("quantized", number, len(files), "files", seconds, known, peak_memory())))
    for path in files:
        (finished / path.name).rename(output / path.name)
    write_index(output)
    return {"device": "cpu", "calibration": None, "quantization_config": quantization_config(request)}


def write_index(folder: Path) -> None:
    """Write the index of a folder's files; a single one needs none under the name that all loaders know."""
    files = sorted(folder.glob("*.safetensors"))
    if [path.name for path in files] == ["model.safetensors"]:
        return
    weight_map: dict[str, str] = {}
    total = 0
    for path in files:
        with path.open("rb") as stream:
            written = _header(stream)[1]
        weight_map |= dict.fromkeys(written, path.name)
        total += sum(entry.end - entry.start for entry in written.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def convert(path: Path, output: Path, names: set[str], method: Method) -> None:
    """Write one file anew with the weights called ``names`` quantized."""
    with path.open("rb") as source, output.open("wb") as target:
        metadata, entries, begin = _header(source)
        before = sorted(entries.items(), key=lambda item: item[1].start)
        after = _entries(before, names, method)
        document: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        document |= {
            name: {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.start, entry.end]}
            for name, entry in after.items()
        }
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        target.write(struct.pack("<Q", len(text)) + text)
        data = 8 + len(text)
        for name, entry in before:
            source.seek(begin + entry.start)
            if name in names:
                _quantize(source, target, name, entry, method, {key: data + new.start for key, new in after.items()})
            else:
                target.seek(data + after[name].start)
                _copy(source, target, entry.end - entry.start)
        target.truncate(data + sum(entry.end - entry.start for entry in after.values()))


def _header(stream: BinaryIO) -> tuple[dict[str, str] | None, dict[str, Entry], int]:
    """A safetensors file's metadata and entries, and where its data begin."""
    (length,) = struct.unpack("<Q", stream.read(8))
    header = json.loads(stream.read(length))
    metadata = header.pop("__metadata__", None)
    entries = {name: Entry(each["dtype"], tuple(each["shape"]), *each["data_offsets"]) for name, each in header.items()}
    return metadata, entries, 8 + length


def _entries(before: list[tuple[str, Entry]], names: set[str], method: Method) -> dict[str, Entry]:
    """The new file's tensors: the old order, each quantized weight's tensors in place of it."""
    found: dict[str, Entry] = {}
    at = 0
    for name, entry in before:
        if name not in names:
            found[name] = Entry(entry.dtype, entry.shape, at, at + entry.end - entry.start)
            at = found[name].end
            continue
        layer = name.removesuffix(".weight")
        for part, (dtype, shape) in method.stored(entry.shape[0], entry.shape[1], entry.dtype).items():
            found[f"{layer}.{part}"] = Entry(dtype, shape, at, at + _WIDTHS[dtype] * math.prod(shape))
            at = found[f"{layer}.{part}"].end
    return found


def _quantize(
    source: BinaryIO, target: BinaryIO, name: str, entry: Entry, method: Method, places: Mapping[str, int]
) -> None:
    """Quantize one weight piece by piece, and write each piece's tensors where they belong."""
    import torch

    if entry.dtype not in _DTYPES:
        raise WorkerError(f"`{name}` is {entry.dtype}, and only {', '.join(_DTYPES)} can be quantized")
    layer, dtype = name.removesuffix(".weight"), getattr(torch, _DTYPES[entry.dtype])
    ends: dict[str, int] = {}
    for piece in _pieces(source, entry):
        weight = torch.frombuffer(piece, dtype=dtype).reshape(-1, entry.shape[1])
        if not weight.abs().amax().isfinite():
            raise WorkerError(f"`{name}` holds a value that is not a finite number")
        for part, tensor in method.quantize(weight).items():
            raw = tensor.contiguous().view(torch.uint8).numpy()
            at = ends.setdefault(part, places[f"{layer}.{part}"])
            target.seek(at)
            target.write(raw.data)
            ends[part] = at + raw.nbytes


def _pieces(source: BinaryIO, entry: Entry) -> Iterator[bytearray]:
    """The bytes of some rows at a time, whole blocks of 128."""
    rows = entry.shape[0]
    row = (entry.end - entry.start) // max(1, rows)
    step = max(1, _PIECE_BYTES // (row * _BLOCK)) * _BLOCK
    for start in range(0, rows, step):
        count = min(step, rows - start)
        piece = bytearray(count * row)
        if source.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise WorkerError("a file of the source ended early")
        yield piece


def _fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A scale for each row."""
    import torch

    scale = _e4m3_scale(weight.abs().amax(1, keepdim=True))
    return {
        "weight": (weight / scale).clamp_(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn),
        "weight_scale": scale,
    }


def _fp8_block(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A scale for each square of 128 by 128, borders filled up with zeros."""
    import torch

    rows, columns = weight.shape
    filled = torch.nn.functional.pad(weight, (0, -columns % _BLOCK, 0, -rows % _BLOCK))
    squares = filled.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
    scale = _e4m3_scale(squares.abs().amax((1, 3), keepdim=True))
    stored = (squares / scale).clamp_(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn)
    return {
        "weight": stored.flatten(2, 3).flatten(0, 1)[:rows, :columns],
        "weight_scale": scale[:, 0, :, 0],
    }


def _e4m3_scale(largest: torch.Tensor) -> torch.Tensor:
    """The scale that maps the largest number to FP8's largest; for zeros, llm-compressor's, as any would do."""
    import torch

    scale = largest / _E4M3_LARGEST
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def _mxfp4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A power of two for each group of 32, two numbers in a byte."""
    import torch

    groups = weight.float().unflatten(1, (-1, _GROUP))
    fraction, exponent = torch.frexp(groups.abs().amax(2, keepdim=True))
    # The largest number becomes 3.5 to 7, of which E2M1 holds up to 6: two powers below its own, or below the next.
    power = torch.where(fraction == 0, _LEAST_POWER, exponent - 3 + (fraction >= 0.875)).clamp(_LEAST_POWER)
    scaled = groups / torch.ldexp(torch.ones_like(fraction), power)
    code = (scaled < 0).to(torch.uint8) << 3
    for bound, included in _E2M1_UP_FROM:
        code += scaled.abs() >= bound if included else scaled.abs() > bound
    code = code.flatten(1)
    return {
        "weight_packed": code[:, ::2] | code[:, 1::2] << 4,
        "weight_scale": (power[:, :, 0] - _LEAST_POWER).to(torch.uint8),
    }


METHODS: Mapping[str, Method] = {
    "fp8": Method(
        lambda out, inputs, dtype: {"weight": ("F8_E4M3", (out, inputs)), "weight_scale": (dtype, (out, 1))}, _fp8
    ),
    "fp8-block": Method(
        lambda out, inputs, dtype: {
            "weight": ("F8_E4M3", (out, inputs)),
            "weight_scale": (dtype, (-(-out // _BLOCK), -(-inputs // _BLOCK))),
        },
        _fp8_block,
    ),
    "mxfp4": Method(
        lambda out, inputs, _: {
            "weight_packed": ("U8", (out, inputs // 2)),
            "weight_scale": ("U8", (out, inputs // _GROUP)),
        },
        _mxfp4,
    ),
}


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        piece = source.read(min(size, _COPIED_BYTES))
        if not piece:
            raise WorkerError("a file of the source ended early")
        target.write(piece)
        size -= len(piece)


if __name__ == "__main__":
    main(work)

"""The headers of safetensors files, read strictly and without the weights.

The format: eight bytes, little-endian, of the header's length; the header, JSON, ``{name: {dtype, shape,
data_offsets}, "__metadata__": {str: str}}``; then the tensors' bytes, to which the offsets count. The law that a file
obeys here: the tensors cover those bytes exactly, without a hole or an overlap, each as many as dtype and shape say.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.bounded_json import Bounds, DocumentError, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What an index may name: a file beside it, whatever its numbering (`model-00001-of-000002.safetensors`).
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
# A tensor takes about 120 bytes and 8 values: this is room for 180,000 of them in one file. (safetensors itself reads
# up to 100 MB, which would take gigabytes here.)
_HEADER = Bounds(bytes=32 << 20, values=1_500_000, depth=3)
INDEX_BOUNDS = Bounds(bytes=64 << 20, values=1_000_000, depth=4)
# NumPy's and PyTorch's limit; a shape without one makes its product a number of millions of digits.
_MOST_DIMENSIONS = 64
# As safetensors has them: an unsigned number of 64 bits.
_LARGEST = 2**64 - 1
_MOST_PROBLEMS, _LONGEST_SHOWN = 20, 100
# Bits an element, of the dtypes that safetensors names.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class HeaderError(ValueError):
    """A safetensors file, or a folder of them, is damaged or incomplete."""


@dataclass(frozen=True)
class Tensor:
    """One tensor as a header describes it: ``start`` and ``end`` count in bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    file: Path

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return self.end - self.start


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file by name.

    Raises:
        HeaderError: the file is not a complete safetensors file; the message says why.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        if len(first) < 8:
            raise HeaderError(f"{path.name}: a file of {size} bytes is not a safetensors file")
        raw = stream.read(header_length(first, path, size))
    return parse_header(raw, path, size)


def header_length(first: bytes, path: Path, size: int) -> int:
    """Return how many bytes the header takes, from the ``first`` eight of a file of ``size``.

    Raises:
        HeaderError: no header can be that long in such a file.
    """
    (length,) = struct.unpack("<Q", first[:8])
    if length > size - 8:
        raise HeaderError(
            f"{path.name}: a header of {length} bytes in a file of {size}: it is truncated, or not a safetensors file"
        )
    if length > _HEADER.bytes:
        raise HeaderError(f"{path.name}: a header of {length} bytes; at most {_HEADER.bytes} are read")
    return int(length)


def parse_header(raw: bytes, path: Path, size: int) -> dict[str, Tensor]:
    """Return the tensors that a header, ``raw``, describes: of the file ``path`` of ``size`` bytes, here or elsewhere.

    It takes linear time, whatever the header says.

    Raises:
        HeaderError: the header is not valid, or does not cover every byte of the file.
    """
    data = 8 + len(raw)
    try:
        header = read_json(raw, _HEADER, pairs_hook=_without_repetition)
    except (DocumentError, HeaderError) as error:
        raise HeaderError(f"{path.name}: the header can't be read: {error}") from error
    if not isinstance(header, dict):
        raise HeaderError(f"{path.name}: the header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, data) for name, entry in header.items()}
    _check_cover(path, tensors, data, size)
    return tensors


def weight_files(names: Collection[str], placed: Mapping[str, str] | None) -> list[str]:
    """Return those of a model's file ``names`` that hold its weights; what else ends in .safetensors is not read.

    They are the files that its index names, as `read_index` gives it, or without an index ``model.safetensors``.

    Raises:
        HeaderError: files that the index names, or all, are missing.
    """
    if placed is None:
        if SINGLE in names:
            return [SINGLE]
        others = ", ".join(sorted(name for name in names if name.endswith(".safetensors"))[:8])
        raise HeaderError(f"there is neither {SINGLE} nor an index, {INDEX}" + (f", only {others}" if others else ""))
    wanted = sorted(set(placed.values()))
    if missing := [name for name in wanted if name not in names]:
        shown = "; ".join(f"{INDEX} names {_shown(name)}, which is not there" for name in missing[:_MOST_PROBLEMS])
        raise HeaderError(shown + (f" and {len(missing) - _MOST_PROBLEMS} more" if missing[_MOST_PROBLEMS:] else ""))
    return wanted


def read_index(raw: bytes) -> dict[str, str]:
    """Return the file of every tensor, as a model's index says.

    Raises:
        HeaderError: it is not an index, or names a file that can't be beside it.
    """
    try:
        placed = read_json(raw, INDEX_BOUNDS)["weight_map"]
        pairs = {str(name): str(file) for name, file in placed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeaderError(f"{INDEX} has no readable `weight_map`: {error!r}") from error
    if odd := sorted({file for file in pairs.values() if _FILE.fullmatch(file) is None}):
        raise HeaderError(f"{INDEX} names {_shown(odd[0])}, which is not the name of a safetensors file beside it")
    return pairs


def read_model(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a model's folder: of ``model.safetensors``, or of all files that its index names.

    Raises:
        HeaderError: a file is damaged, or index and files disagree; the message lists every problem, one a line.
    """
    placed = _folder_index(folder)
    files = weight_files({path.name for path in folder.glob("*.safetensors")}, placed)
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for path in (folder / name for name in files):
        try:
            found = read_header(path)
        except HeaderError as error:
            problems.append(str(error))
            continue
        problems += [f"{path.name}: {_shown(n)} is in {tensors[n].file.name} too" for n in found if n in tensors]
        tensors.update(found)
    if not problems and placed is not None:
        problems = _index_problems(placed, tensors)
    if problems:
        more = [f"and {len(problems) - _MOST_PROBLEMS} more problems"] if len(problems) > _MOST_PROBLEMS else []
        raise HeaderError("\n".join(problems[:_MOST_PROBLEMS] + more))
    return tensors


def _folder_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream:
            return read_index(stream.read(INDEX_BOUNDS.bytes + 1))
    except OSError as error:
        raise HeaderError(f"{INDEX} can't be read: {error}") from error


def _index_problems(placed: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name in sorted(placed.keys() | tensors.keys()):
        found = tensors[name].file.name if name in tensors else None
        if found is None:
            problems.append(f"{INDEX} puts {_shown(name)} into {placed[name]}, which lacks it")
        elif placed.get(name) != found:
            stated = f"puts it into {_shown(placed[name])}" if name in placed else "does not name it"
            problems.append(f"{_shown(name)} is in {found}, but {INDEX} {stated}")
    return problems


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise HeaderError("it has a name twice")
    return document


def _tensor(path: Path, name: str, entry: Any, data: int) -> Tensor:  # noqa: ANN401 - JSON
    def problem(what: str) -> HeaderError:
        return HeaderError(f"{path.name}: {_shown(name)} {what}")

    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise problem("has no proper dtype, shape and data_offsets") from error
    if len(shape) > _MOST_DIMENSIONS:
        raise problem(f"has {len(shape)} dimensions, of which at most {_MOST_DIMENSIONS} are read")
    if not all(type(number) is int and 0 <= number <= _LARGEST for number in (*shape, start, end)):
        raise problem("has a number that is not an unsigned integer of 64 bits")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise problem(f"has the unknown dtype {str(dtype)[:_LONGEST_SHOWN]!r}")
    expected, rest = divmod(math.prod(shape) * BITS[dtype], 8)
    if rest or end - start != expected:
        raise problem(f"of {dtype} and shape {list(shape)} takes {expected} bytes, not {end - start}")
    return Tensor(dtype, shape, data + start, data + end, path)


def _shown(name: str) -> str:
    """A name from a file as part of one line, whatever is in it."""
    cut = name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}…"
    return f"`{cut}`" if cut.isprintable() else repr(cut)


def _check_cover(path: Path, tensors: Mapping[str, Tensor], data: int, size: int) -> None:
    reached = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != reached:
            what = "overlaps what is before it" if tensor.start < reached else "leaves a hole before it"
            raise HeaderError(f"{path.name}: {_shown(name)} {what} ({tensor.start} for {reached})")
        reached = tensor.end
    if reached != size:
        raise HeaderError(f"{path.name}: the tensors end at byte {reached}, and the file at {size}")

"""The model loader: vLLM's own, with weights from `stream`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from vllm.config.load import LoadConfig
from vllm.distributed.parallel_state import GroupCoordinator, get_tp_group, get_world_group
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

from registry.errors import Problem, VerificationError
from registry.served_files import MARK, MARKS, MODEL, ServedFiles
from slipway_loader import EXPECTED, LOAD_FORMAT, STATE, refuse
from slipway_loader.stream import MOST_WORKERS, Batch, Shard, divided

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


class Loader(DefaultModelLoader):  # type: ignore[misc]
    """Loads what the entry point expects, and nothing else."""

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, torch.Tensor]]:
        if self.counter_before_loading_weights == 0.0:  # type: ignore[has-type]  # vLLM logs the time since then
            self.counter_before_loading_weights = time.perf_counter()
        try:
            # Every rank loads the model; only the last stage of a pipeline loads one that drafts tokens.
            group = get_world_group() if Path(source.model_or_path).name == MODEL else get_tp_group()
            for name, tensor in _weights(_shards(source), group):
                yield source.prefix + name, tensor
        except VerificationError as error:
            refuse(error)
            raise


def install() -> None:
    """Register the loader, and refuse every other format."""
    loaders = model_loader._LOAD_FORMAT_TO_MODEL_LOADER  # noqa: SLF001 - vLLM has no other way to take one away
    loaders.update(dict.fromkeys(loaders, _refuse_format))
    loaders[LOAD_FORMAT] = Loader


def _refuse_format(config: LoadConfig) -> DefaultModelLoader:
    error = VerificationError("/", [Problem(f"--load-format {config.load_format}", f"only `{LOAD_FORMAT}` verifies")])
    refuse(error)
    raise error


def _shards(source: DefaultModelLoader.Source) -> list[Shard]:
    """The files of a source, each with the record that it must match."""
    folder = Path(source.model_or_path, getattr(source, "subfolder", None) or "")  # vLLM 0.19 has none
    patterns = source.allow_patterns_overrides or ["*.safetensors"]
    found = sorted({str(path) for pattern in patterns for path in folder.glob(pattern)})
    paths = [Path(name) for name in filter_duplicate_safetensors_files(found, str(folder), SAFE_WEIGHTS_INDEX_NAME)]
    expected = ServedFiles.read(Path(os.environ[STATE]) / EXPECTED).files
    records = [(path, expected.get(str(path).removeprefix("/"))) for path in paths]
    unknown = [Problem(str(path), "extra: not in the manifest") for path, record in records if record is None]
    if unknown or not records:
        raise VerificationError(folder, unknown or [Problem(str(folder), "it has no weights")])
    return [(path, record) for path, record in records if record is not None]


def _weights(shards: Sequence[Shard], group: GroupCoordinator) -> Iterator[tuple[str, torch.Tensor]]:
    began = time.monotonic()

    def gather(value: object) -> Sequence[object]:
        values: list[object] = [None] * group.world_size
        torch.distributed.all_gather_object(values, value, group=group.cpu_group)
        return values

    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    marks = Path("/", MARKS)
    for batch in divided(shards, gather, workers, marks if marks.is_dir() else None):
        yield from _tensors(batch)
    if group.rank_in_group == 0:
        read = {"bytes": sum(record.size for _, record in shards), "files": len(shards), "ranks": group.world_size}
        line = json.dumps({**read, "seconds": round(time.monotonic() - began, 3)}, sort_keys=True)
        sys.stderr.write(f"{MARK}{line}\n")
        sys.stderr.flush()


def _tensors(batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in batch.tensors:
        if tensor.dtype not in _DTYPES:
            raise VerificationError(tensor.file.parent, [Problem(str(tensor.file), f"{tensor.dtype} can't be loaded")])
        kind = _DTYPES[tensor.dtype]
        count = tensor.bytes // kind.itemsize
        flat = (
            torch.frombuffer(batch.memory.map, dtype=kind, count=count, offset=tensor.start - batch.begins)
            if count
            else torch.empty(0, dtype=kind, device="cpu")
        )
        yield name, flat.reshape(tensor.shape)

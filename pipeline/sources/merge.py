"""Merges a LoRA or DoRA adapter into a model: PEFT computes in a worker, and the result is checked without its help.

The law: a merged model is its base, byte by byte, but for the weights that the adapter is for; each of those changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypedDict

from evals.workers import RunWorker
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.lora import WEIGHTS, adapted_layers
from pipeline.compatibility.safetensors_headers import read_header
from pipeline.errors import SourceError
from pipeline.sources.adapter import AdapterDescription
from registry import seal, untrusted
from registry.progress import Progress

ENVIRONMENT = "peft"
SCRIPT = Path(__file__).with_name("peft_merge.py")
_CHUNK = 4 << 20
_MOST_PROBLEMS = 5


class MergeConfiguration(TypedDict):
    """What PEFT needs of an adapter's configuration, under its own names."""

    r: int
    lora_alpha: float
    use_dora: bool
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]


class MergedLayer(TypedDict):
    """A layer of the adapter, as `pipeline.compatibility.lora.AdaptedLayer` describes it."""

    name: str
    parts: Mapping[str, str]


class MergeRequest(TypedDict):
    """The request to the worker script, which reads it as JSON."""

    source: Path | str
    """The base's folder, absolute."""
    adapter: Path | str
    """The adapter's safetensors file, absolute."""
    output: Path | str
    """An empty folder, absolute, that receives the files with merged weights."""
    configuration: MergeConfiguration
    layers: Mapping[str, MergedLayer]
    """The adapter's layers by the names of the weights in the base."""


def merge(
    base: Path,
    model: ModelDescription,
    adapter: Path,
    described: AdapterDescription,
    output: Path,
    run_worker: RunWorker,
    scratch: Path,
    progress: Progress,
) -> set[str]:
    """Write the model in ``base``, with the adapter in ``adapter`` merged, into the empty folder ``output``.

    Both must fit each other (`pipeline.sources.adapter.refuse_misfit`). Files that do not change become hard links;
    their names are returned.

    Raises:
        SourceError: the result is not what it should be; lists every problem.
        UntrustedFileError: the worker left links or special files.
        WorkerFailed: the worker failed, with its own message.
    """
    layers = adapted_layers(described.tensors, model)
    written = scratch / "merged"
    written.mkdir()
    configuration = described.configuration
    request = MergeRequest(
        source=base.absolute(),
        adapter=(adapter / WEIGHTS).absolute(),
        output=written.absolute(),
        configuration=MergeConfiguration(
            r=configuration.r,
            lora_alpha=configuration.lora_alpha,
            use_dora=configuration.use_dora,
            use_rslora=configuration.use_rslora,
            rank_pattern=configuration.rank_pattern,
            alpha_pattern=configuration.alpha_pattern,
        ),
        layers={name: MergedLayer(name=layer.name, parts=layer.parts) for name, layer in layers.items()},
    )
    progress(f"merging {len(layers)} layers of rank {configuration.rank}")
    run_worker(ENVIRONMENT, SCRIPT, request, scratch)
    names = {path.name for path in base.iterdir() if path.is_file()}
    for name in untrusted.plain_files(written):
        if name not in names or not name.endswith(".safetensors"):
            raise SourceError(f"the merge wrote `{name}`, which is not a weights file of the base")
        shutil.move(written / name, output / name)
        names.remove(name)
    seal.place({name: base / name for name in names}, output)
    if problems := list(_differences(base, output, layers.keys())):
        more = f"; and {len(problems) - _MOST_PROBLEMS} more" if problems[_MOST_PROBLEMS:] else ""
        raise SourceError(f"the merged model is not what it should be: {'; '.join(problems[:_MOST_PROBLEMS])}{more}")
    progress(f"checked: {len(layers)} weights changed, and no other byte")
    return names


def _differences(base: Path, merged: Path, weights: Collection[str]) -> Iterator[str]:
    """Yield what breaks the law of a merged model."""
    found: set[str] = set()
    for before in sorted(base.glob("*.safetensors")):
        after = merged / before.name
        tensors = read_header(before)
        found |= tensors.keys() & set(weights)
        if before.samefile(after):
            yield from (f"`{name}` did not change" for name in sorted(tensors.keys() & set(weights)))
            continue
        if before.stat().st_size != after.stat().st_size:
            yield f"{before.name} has another size"
            continue
        with before.open("rb") as old, after.open("rb") as new:
            if _differ(old, new, 0, min((tensor.start for tensor in tensors.values()), default=0)):
                yield f"{before.name} has another header"
                continue
            for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
                changed = _differ(old, new, tensor.start, tensor.end)
                if changed != (name in weights):
                    yield f"`{name}` {'changed' if changed else 'did not change'}"
    yield from (f"`{name}` is not there" for name in sorted(set(weights) - found))


def _differ(old: BinaryIO, new: BinaryIO, start: int, end: int) -> bool:
    """Whether two files differ between two places."""
    old.seek(start)
    new.seek(start)
    while start < end:
        size = min(_CHUNK, end - start)
        if old.read(size) != new.read(size):
            return True
        start += size
    return False

"""Sources of LoRA adapters: two files, ``adapter_config.json`` and ``adapter_model.safetensors``, checked like weights.

An adapter is served next to the model, or merged into it. Each has a lock of its own beside the model's. Tokenizers and
whatever else lies beside an adapter is not pulled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.lora import (
    BOUNDS,
    CONFIGURATION,
    WEIGHTS,
    AdapterConfiguration,
    AdapterError,
    Use,
    find_problems,
    read_configuration,
)
from pipeline.compatibility.safetensors_headers import HeaderError, Tensor, read_header
from pipeline.errors import SourceError
from pipeline.sources.contents import Contents, missing_weights
from pipeline.sources.source import ResolvedSource, read_range
from pipeline.sources.source import read_header as read_source_header
from registry.progress import Progress


@dataclass(frozen=True)
class AdapterDescription:
    """An adapter as its two files describe it; the matrices are not read."""

    configuration: AdapterConfiguration
    tensors: dict[str, Tensor]


def lock_of(model_lock: Path, name: str) -> Path:
    """The lock of a model's adapter. No model's name has an underscore, so it is not the lock of another model."""
    return model_lock.with_name(model_lock.name.replace(".lock.json", f".adapter_{name}.lock.json"))


def merged_lock_of(model_lock: Path) -> Path:
    """The lock of the adapter that is merged into a model."""
    return model_lock.with_name(model_lock.name.replace(".lock.json", ".merged_adapter.lock.json"))


def describe(resolved: ResolvedSource, use: Use = "served") -> AdapterDescription:
    """Read an adapter's configuration and header, of a folder or, by range requests, from elsewhere.

    Raises:
        SourceError: they can't be read, or are not those of an adapter that can be used so.
    """
    if resolved.folder is not None:
        return describe_folder(resolved.folder, use)
    (weights,) = (file for file in resolved.files if file.path == WEIGHTS)
    try:
        configuration = read_configuration(read_range(resolved, CONFIGURATION, 0, BOUNDS.bytes + 1), use)
        return AdapterDescription(configuration, read_source_header(resolved, weights))
    except (AdapterError, HeaderError) as error:
        raise SourceError(f"{resolved.uri}: {error}") from error


def describe_folder(folder: Path, use: Use = "served") -> AdapterDescription:
    """Read the configuration and the header of an adapter in a folder.

    Raises:
        SourceError: they can't be read, or are not those of an adapter that can be used so.
    """
    try:
        with (folder / CONFIGURATION).open("rb") as stream:
            configuration = read_configuration(stream.read(BOUNDS.bytes + 1), use)
        return AdapterDescription(configuration, read_header(folder / WEIGHTS))
    except (AdapterError, HeaderError, OSError) as error:
        raise SourceError(f"{folder.name}: {error}") from error


def refuse_misfit(adapter: AdapterDescription, model: ModelDescription | None, uri: str, use: Use = "served") -> None:
    """Check that an adapter's matrices are whole and, with a ``model``, that they fit its layers.

    Raises:
        SourceError: listing what does not fit.
    """
    if problems := find_problems(adapter.configuration, adapter.tensors, model):
        raise SourceError(f"{uri} can't be {use}: {'; '.join(problems)}")


def _weights(uri: str, names: list[str], _index: Callable[[], bytes]) -> list[str]:
    if WEIGHTS not in names:
        raise missing_weights(uri, names, WEIGHTS)
    return [WEIGHTS]


def _is_taken(name: str, _weights: Collection[str]) -> bool:
    return name in {CONFIGURATION, WEIGHTS}


def _require(uri: str, taken: list[str]) -> None:
    if CONFIGURATION not in taken:
        raise SourceError(f"{uri} has no {CONFIGURATION}: it is not an adapter that PEFT wrote")


def _check(use: Use, folder: Path, _progress: Progress) -> None:
    refuse_misfit(describe_folder(folder, use), None, "the adapter", use)


ADAPTER = Contents(_weights, _is_taken, _require, partial(_check, "served"))
"""A LoRA adapter, as PEFT writes it, that is served next to the model."""
MERGED = Contents(_weights, _is_taken, _require, partial(_check, "merged"))
"""A LoRA or DoRA adapter, as PEFT writes it, that becomes part of the weights."""

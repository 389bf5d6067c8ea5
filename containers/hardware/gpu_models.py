"""Specifications and prices of GPUs, from ``gpus.yaml`` with sources and dates."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from containers.errors import ContainerError
from registry.suggestions import suggestion

DATA = Path(__file__).with_name("gpus.yaml")

Precision = Literal["fp16", "fp8", "fp4", "int8"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class GpuDataError(ContainerError):
    """The data file has no GPU of that name."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Price(_Part):
    """The on-demand price of one GPU per hour; ``source`` is a key of the file's ``sources``."""

    dollars_per_hour: Positive
    source: str


class GpuModel(_Part):
    """A GPU model: memory in bytes as NVML reports it, bandwidth in bytes/s, and dense FLOP/s by precision."""

    name: str
    architecture: str
    capability: tuple[int, int]
    memory_bytes: Annotated[int, Field(gt=0)]
    bandwidth_bytes_per_s: Positive
    flops: Mapping[Precision, Positive]
    nvlink: bool
    watts: Positive
    source: str
    price: Price | None = None


@functools.cache
def known_gpus() -> tuple[GpuModel, ...]:
    """Return every GPU model of the data file, in its order: by memory within a generation."""
    document = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return tuple(GpuModel.model_validate(entry) for entry in document["gpus"])


def price_source(price: Price) -> tuple[str, str]:
    """Return the URL and the date of a price's source."""
    source = yaml.safe_load(DATA.read_text(encoding="utf-8"))["sources"][price.source]
    return str(source["url"]), str(source["dated"])


def find_gpu(name: str) -> GpuModel:
    """Return the GPU model of a name; case and punctuation are ignored, and NVML's names are accepted.

    Raises:
        GpuDataError: there is none; the message suggests a similar name.
    """
    wanted = _plain(name)
    by_name = {_plain(gpu.name): gpu for gpu in known_gpus()}
    if wanted in by_name:
        return by_name[wanted]
    # NVML's name is `NVIDIA H100 80GB HBM3`: choose the longest name of the file whose words are all in it.
    words = set(_words(name))
    inside = [gpu for gpu in known_gpus() if set(_words(gpu.name)) <= words]
    if inside:
        return max(inside, key=lambda gpu: len(gpu.name))
    known = suggestion(name, (gpu.name for gpu in known_gpus()))
    raise GpuDataError(f"`{name}` is not a GPU of {DATA.name}{known}")


def _plain(name: str) -> str:
    return "".join(_words(name))


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())

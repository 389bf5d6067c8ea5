"""Reads what a plan needs: config.json and headers of safetensors, from a folder or in parts; never the weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.safetensors_headers import HeaderError, Tensor, read_model
from pipeline.errors import PlanError, UnsupportedModelError
from pipeline.quantization import published
from pipeline.quantization.published import Published
from pipeline.sources.source import ResolvedSource, read_header, read_range
from registry.bounded_json import Bounds, DocumentError, read_json

_AT_ONCE = 8
_TOKENIZER = "tokenizer_config.json"
_PROCESSOR_TEMPLATE = "chat_template.json"  # of older models that accept images
_CONFIG = Bounds(bytes=1 << 20, values=100_000)
# Gemma 3's takes 1.2 MB: the template stands behind a long list of added tokens.
_TOKENIZER_BYTES = 4 << 20


@dataclass(frozen=True)
class Described:
    """A model at 16 bits as its files describe it, and the size of all files to pull.

    ``published`` is the checkpoint of it that is taken as it is, if there is one; without a baseline, ``model`` is what
    that stands for.
    """

    model: ModelDescription
    bytes: int
    published: Published | None = None

    @property
    def is_compared(self) -> bool:
        """Whether there are weights at 16 bits."""
        return self.published is None or self.model is not self.published.original


def describe(resolved: ResolvedSource) -> Described:
    """Read a source's configuration and headers; from elsewhere by range requests, a few hundred kilobytes in all.

    Raises:
        SourceError: the source does not answer.
        PlanError: what it holds can't be read.
    """
    if resolved.folder is not None:
        return describe_folder(resolved.folder)
    weights = [file for file in resolved.files if file.path.endswith(".safetensors")]
    config = read_range(resolved, "config.json", 0, _CONFIG.bytes)
    tensors: dict[str, Tensor] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for found in pool.map(lambda file: read_header(resolved, file), weights):
                tensors |= found
        except HeaderError as error:
            raise PlanError(f"{resolved.uri}: {error}") from error
    return Described(ModelDescription(_document(config, resolved.uri), tensors), resolved.bytes)


def with_published(checkpoint: Described, baseline: Described | None) -> Described:
    """Describe a ``checkpoint`` that is taken as it is, together with the ``baseline`` that it is compared with.

    Raises:
        UnsupportedModelError: it is not quantized, or not as it says, or the baseline is not its original.
    """
    found = published.read(checkpoint.model)
    if problems := published.find_problems(found, None if baseline is None else baseline.model):
        raise UnsupportedModelError("; ".join(problems))
    if baseline is None:
        return Described(found.original, checkpoint.bytes, found)
    return Described(baseline.model, checkpoint.bytes + baseline.bytes, found)


def describe_folder(folder: Path) -> Described:
    """Read the configuration and the headers in a folder.

    Raises:
        PlanError: they are missing or damaged.
    """
    try:
        tensors = read_model(folder)
        config = (folder / "config.json").read_bytes()
    except (HeaderError, OSError) as error:
        raise PlanError(f"can't plan from {folder}: {error}") from error
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return Described(ModelDescription(_document(config, str(folder)), tensors), size)


def has_chat_template(resolved: ResolvedSource) -> bool:
    """Whether a source has a chat template: in a file of its own, or in the tokenizer's configuration.

    Raises:
        SourceError: the hub does not answer.
    """
    names = {file.path for file in resolved.files}
    if any(name.endswith(".jinja") or name == _PROCESSOR_TEMPLATE for name in names):
        return True
    if _TOKENIZER not in names:
        return False
    return b'"chat_template"' in read_range(resolved, _TOKENIZER, 0, _TOKENIZER_BYTES)


def _document(raw: bytes, what: str) -> dict[str, Any]:
    try:
        document = read_json(raw, _CONFIG)
    except DocumentError as error:
        raise PlanError(f"config.json of {what} can't be read: {error}") from error
    if not isinstance(document, dict):
        raise PlanError(f"config.json of {what} is not a JSON object")
    return document

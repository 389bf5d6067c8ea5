"""Quantize a model: a scheme, its backend's worker in its own environment, and a checkpoint checked without its help.

Four backends write two formats: AWQ by AutoAWQ or GPTQModel, GPTQ by GPTQModel or AutoGPTQ. The worker decides the
weights and nothing else: configuration and tokenizer are the source's own, with the quantization written into it.
The law: the same source, calibration and scheme give the same bytes on the same machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evals.drift import json_lines
from pipeline.compatibility import preflight
from pipeline.compatibility.backends import GROUP_SIZES, older_config
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.safetensors_headers import HeaderError, read_model
from pipeline.errors import QuantizeError
from pipeline.quantization import checkpoint
from registry import untrusted
from registry.digests import digest_file
from registry.file_systems import set_mode
from registry.progress import Progress

RunWorker = Callable[[str, Path, Mapping[str, Any], Path], dict[str, Any]]

Method = Literal["awq", "gptq"]
BackendName = Literal["autoawq", "gptqmodel", "autogptq"]

_SCRIPTS = Path(__file__).parent / "quantizers"
_SEED = 0
# Of config.json, what the source's own loader may want and a backend's must not meet: a quantization that was never
# applied (its weights have 16 bits, `preflight` has seen to that), and the names of code that came with the model.
_LEFT_OUT = ("quantization_config", "auto_map")
_GPTQ_ONLY = ("symmetric", "desc_act")
# What vLLM 0.32 loads of GPTQ on any device (`auto_gptq.py`, `gptq_utils.py`).
_SERVED_BITS = (4, 8)


class Scheme(BaseModel):
    """How a model is quantized."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    """The format of the quantized weights."""
    backend: BackendName
    """The program that quantizes; AWQ by `autoawq` or `gptqmodel`, GPTQ by `gptqmodel` or `autogptq`."""
    bits: int = 4
    """Bits a weight: AWQ 4; GPTQ 2, 3, 4 or 8."""
    group_size: int = 128
    """How many input weights share a scale: AWQ 32, 64 or 128; GPTQ 16 to 256, or -1 for a whole row."""
    symmetric: bool = True
    """GPTQ only: no zero points."""
    desc_act: bool = False
    """GPTQ only: columns in order of activation."""
    clone_saved_weights: bool = Field(default=True, exclude_if=lambda value: value is True)
    """AutoAWQ only: `false` switches off the remedy that it needs on a CPU and so gives a spoiled checkpoint, for tests
    of the gates.
    """

    @model_validator(mode="after")
    def _supported(self) -> Scheme:
        supported = _BACKENDS.get((self.method, self.backend))
        if supported is None:
            able = sorted(backend for method, backend in _BACKENDS if method == self.method)
            raise ValueError(f"backend `{self.backend}` can't do {self.method}: use {_either(able)}")
        if self.bits not in supported.bits:
            raise ValueError(f"{self.method} by `{self.backend}` has {_either(supported.bits)} `bits`, not {self.bits}")
        if self.group_size not in GROUP_SIZES[self.method]:
            sizes = _either(GROUP_SIZES[self.method])
            raise ValueError(f"{self.method} has a `group_size` of {sizes}, not {self.group_size}")
        if self.method == "awq" and (extra := [key for key in _GPTQ_ONLY if key in self.model_fields_set]):
            raise ValueError(f"`{extra[0]}` means nothing to awq: remove it, or use `method: gptq`")
        if self.backend != "autoawq" and "clone_saved_weights" in self.model_fields_set:
            raise ValueError("`clone_saved_weights` means something to the backend `autoawq` alone: remove it")
        return self

    @property
    def not_served(self) -> str | None:
        """The key whose value vLLM refuses on every device, or None where it serves the scheme."""
        if self.bits not in _SERVED_BITS:
            return "bits"
        if not self.symmetric:
            return "symmetric"
        # With one group over a whole input the order of columns changes nothing.
        return "desc_act" if self.desc_act and self.group_size > 0 else None


class Backend(Protocol):
    """What quantizes: where it runs, what it can do, and what it must be told."""

    @property
    def environment(self) -> str:
        """The name of the requirements file of its environment."""
        ...

    @property
    def script(self) -> Path:
        """Its worker."""
        ...

    @property
    def bits(self) -> tuple[int, ...]:
        """The bits a weight that it can write."""
        ...

    def view(self, source: Path, scratch: Path) -> Path:
        """Return the folder to load the source from: itself, or one in ``scratch`` that this backend can read."""
        ...


@dataclass(frozen=True)
class _Current:
    """A backend with a current version of transformers."""

    environment: str
    bits: tuple[int, ...]

    @property
    def script(self) -> Path:
        return _SCRIPTS / f"{self.environment}.py"

    def view(self, source: Path, scratch: Path) -> Path:
        config = _read_config(source)
        readable = self._readable({key: value for key, value in config.items() if key not in _LEFT_OUT})
        if readable == config:
            return source
        folder = scratch / "source"
        folder.mkdir()
        for path in source.iterdir():
            if path.name != "config.json":
                (folder / path.name).symlink_to(path.resolve())
        (folder / "config.json").write_text(json.dumps(readable))
        return folder

    def _readable(self, config: dict[str, Any]) -> dict[str, Any]:
        return config


@dataclass(frozen=True)
class _Archived(_Current):
    """A backend that stopped at transformers 4.51, which overlooks what a newer version writes into config.json."""

    def _readable(self, config: dict[str, Any]) -> dict[str, Any]:
        return older_config(config)


_BACKENDS: Mapping[tuple[str, str], Backend] = {
    ("awq", "autoawq"): _Archived("autoawq", (4,)),
    ("awq", "gptqmodel"): _Current("gptqmodel", (4,)),
    ("gptq", "gptqmodel"): _Current("gptqmodel", (2, 3, 4, 8)),
    ("gptq", "autogptq"): _Archived("autogptq", (2, 3, 4, 8)),
}


def backend_of(scheme: Scheme) -> Backend:
    """Return what quantizes a scheme. Its environment's pins and its script are part of the checkpoint's key."""
    return _BACKENDS[scheme.method, scheme.backend]


def quantize(
    source: Path,
    calibration: Path,
    samples: int,
    max_tokens: int,
    scheme: Scheme,
    output: Path,
    run_worker: RunWorker,
    scratch: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Quantize the model in the folder ``source`` into the empty folder ``output``, and check what came out.

    ``calibration`` holds JSON lines of ``{"text": …}``: the first ``samples`` are used, each cut to ``max_tokens``.
    ``scratch`` is an empty folder for the worker. Returned is what a release records: backend, parameters, device,
    calibration (sha256, samples, tokens), source and output bytes, bits a parameter and the layers that were quantized.

    Raises:
        QuantizeError: the calibration is too small, or the scheme doesn't fit the model.
        UntrustedFileError: the worker left links or special files.
        CheckpointError: what the worker wrote is not what the scheme promises; lists every problem.
        WorkerFailed: the worker failed; its own words.
    """
    config = _read_config(source)
    texts = _calibration_texts(calibration, samples)
    _check_fits(source, config, scheme, max_tokens)
    backend = backend_of(scheme)
    written = scratch / "checkpoint"
    written.mkdir()
    request = {
        **scheme.model_dump(include={"method", "bits", "group_size", "symmetric", "desc_act"}),
        "clone_saved_weights": scheme.clone_saved_weights,
        "source": backend.view(source, scratch).absolute(),
        "output": written.absolute(),
        "calibration": str(calibration.absolute()),
        "texts": texts,
        "max_tokens": max_tokens,
        "seed": _SEED,
    }
    progress(f"quantizing: {scheme.method} by {scheme.backend}, {scheme.bits} bits, groups of {scheme.group_size}")
    result = run_worker(backend.environment, backend.script, request, scratch)
    _assemble(written, source, config, result["quantization_config"], output)
    found = checkpoint.check(output, source, scheme)
    progress(f"checked: {found.layers} layers, {found.bytes / 1e6:.1f} MB, {found.bits_per_weight:.2f} bits a weight")
    return {
        "method": scheme.method,
        "backend": scheme.backend,
        "parameters": scheme.model_dump(exclude={"method", "backend", *(_GPTQ_ONLY if scheme.method == "awq" else ())}),
        "device": result["device"],
        "calibration": {
            "sha256": digest_file(calibration),
            "samples": samples,
            "max_tokens": max_tokens,
            "tokens": result["blocks"] * max_tokens,
        },
        "layers": found.layers,
        "bytes": found.bytes,
        "source_bytes": found.source_bytes,
        "bits_per_weight": found.bits_per_weight,
    }


def _either(values: tuple[int, ...] | list[str]) -> str:
    """``4``; ``2, 3 or 4``."""
    words = [f"`{value}`" if isinstance(value, str) else str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _read_config(source: Path) -> dict[str, Any]:
    try:
        config = json.loads((source / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise QuantizeError(f"can't read the model's configuration: {error}") from error
    if not isinstance(config, dict):
        raise QuantizeError(f"{source / 'config.json'} holds no mapping")
    return config


def _calibration_texts(calibration: Path, samples: int) -> list[str]:
    """Read the lines that will be used; the worker judges their tokens, since it has the tokenizer."""
    try:
        rows = json_lines.read_rows(calibration, json_lines.TEXTS, samples)
    except json_lines.JsonLinesError as error:
        raise QuantizeError(f"the calibration text: {error}") from error
    if len(rows) < samples:
        raise QuantizeError(
            f"{calibration} holds {len(rows)} samples, and `calibration.samples` is {samples}: add text, or ask for "
            "fewer"
        )
    return [row["text"] for row in rows]


def _check_fits(source: Path, config: Mapping[str, Any], scheme: Scheme, max_tokens: int) -> None:
    try:
        model = ModelDescription(config, read_model(source))
    except HeaderError as error:
        raise QuantizeError(f"can't read the source's headers: {error}") from error
    preflight.check(model, scheme)
    positions = model.text_config.get("max_position_embeddings")
    if isinstance(positions, int) and max_tokens > positions:
        raise QuantizeError(f"`calibration.max_tokens` is {max_tokens}, and the model ends at {positions} positions")


def _assemble(
    written: Path,
    source: Path,
    config: Mapping[str, Any],
    quantization: Mapping[str, Any],
    output: Path,
) -> None:
    """Put the worker's weights beside the source's own configuration and tokenizer, all readable by anybody."""
    for name in untrusted.plain_files(written):
        if "/" not in name and name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.move(written / name, output / name)
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and ".safetensors" not in path.name:
            shutil.copyfile(path, output / path.name)
    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    merged = {**kept, "quantization_config": dict(quantization), "torch_dtype": "float16"}
    if "dtype" in config:
        merged["dtype"] = "float16"
    (output / "config.json").write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")
    for name in untrusted.plain_files(output):
        with untrusted.open_file(output, name) as stream:
            set_mode(stream.fileno(), 0o644)

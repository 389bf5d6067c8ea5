"""Quantize a model: run the backend's worker in its own environment, then check the checkpoint that it wrote.

Three backends write two formats: AWQ by AutoAWQ or GPTQModel, GPTQ by GPTQModel or AutoGPTQ. Only the weights come from
the worker: the tokenizer is the source's, and so is config.json, to which the quantization is added.
The law: the same source, calibration and scheme give the same bytes on the same machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt, ValidationError, model_validator

from evals.drift import json_lines
from evals.workers import RunWorker
from pipeline.compatibility import preflight
from pipeline.compatibility.backends import GROUP_SIZES, older_config
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.safetensors_headers import HeaderError, read_model
from pipeline.errors import QuantizeError, WorkerFailed
from pipeline.quantization import checkpoint
from registry import untrusted
from registry.digests import digest_file
from registry.errors import first_problem
from registry.file_systems import set_mode
from registry.progress import Progress

Method = Literal["awq", "gptq"]
BackendName = Literal["autoawq", "gptqmodel", "autogptq"]

_SCRIPTS = Path(__file__).parent / "quantizers"
_SEED = 0
# Keys of config.json that a backend must not see: a quantization that was never applied (`preflight` has checked that
# the weights have 16 bits), and names of code that came with the model.
_LEFT_OUT = ("quantization_config", "auto_map")
_GPTQ_ONLY = ("symmetric", "desc_act")
# The bits of GPTQ that vLLM 0.32 loads on any device (`auto_gptq.py`, `gptq_utils.py`).
_SERVED_BITS = (4, 8)


class Scheme(BaseModel):
    """How a model is quantized."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    """The format of the quantized weights."""
    backend: BackendName
    """The program that quantizes; AWQ by `autoawq` or `gptqmodel`, GPTQ by `gptqmodel` or `autogptq`."""
    bits: int = 4
    """Bits per weight: AWQ 4; GPTQ 2, 3, 4 or 8."""
    group_size: int = 128
    """How many input weights share a scale: AWQ 32, 64 or 128; GPTQ 16 to 256, or -1 for a whole row."""
    symmetric: bool = True
    """GPTQ only: no zero points."""
    desc_act: bool = False
    """GPTQ only: quantize columns in order of activation."""
    clone_saved_weights: bool = Field(default=True, exclude_if=lambda value: value is True)
    """AutoAWQ only: `false` switches off a fix that it needs on a CPU. The checkpoint is then damaged, for tests of the
    gates.
    """

    @model_validator(mode="after")
    def _supported(self) -> Scheme:
        supported = _BACKENDS.get((self.method, self.backend))
        if supported is None:
            able = sorted(backend for method, backend in _BACKENDS if method == self.method)
            raise ValueError(f"backend `{self.backend}` can't write {self.method}: use {_either(able)}")
        if self.bits not in supported.bits:
            raise ValueError(
                f"`{self.backend}` writes {self.method} with {_either(supported.bits)} `bits`, not {self.bits}"
            )
        if self.group_size not in GROUP_SIZES[self.method]:
            sizes = _either(GROUP_SIZES[self.method])
            raise ValueError(f"{self.method} supports a `group_size` of {sizes}, not {self.group_size}")
        if self.method == "awq" and (extra := [key for key in _GPTQ_ONLY if key in self.model_fields_set]):
            raise ValueError(f"`{extra[0]}` applies only to gptq: remove it, or use `method: gptq`")
        if self.backend != "autoawq" and "clone_saved_weights" in self.model_fields_set:
            raise ValueError("`clone_saved_weights` applies only to the backend `autoawq`: remove it")
        return self

    @property
    def not_served(self) -> str | None:
        """The key whose value vLLM refuses on every device, or None if vLLM serves the scheme."""
        if self.bits not in _SERVED_BITS:
            return "bits"
        if not self.symmetric:
            return "symmetric"
        # With one group for a whole row, the order of columns makes no difference.
        return "desc_act" if self.desc_act and self.group_size > 0 else None


class QuantizationRequest(BaseModel):
    """The request to a quantizer's worker script.

    The script reads it as JSON in its own environment, which does not have this class.
    """

    model_config = ConfigDict(frozen=True)

    method: Method
    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool
    clone_saved_weights: bool
    source: Path
    """The model's folder, absolute."""
    output: Path
    """An empty folder, absolute, that receives the safetensors files."""
    calibration: str
    """The calibration file's path, for messages: `texts` holds its text."""
    texts: tuple[str, ...]
    max_tokens: int
    """The longest piece of a text that is used; also the length of a calibration block."""
    seed: int


class QuantizationResult(BaseModel):
    """The result of a quantizer's worker script."""

    model_config = ConfigDict(frozen=True)

    device: Literal["cpu", "cuda"]
    blocks: PositiveInt
    """Calibration blocks of `max_tokens` tokens that were used."""
    quantization_config: Mapping[str, JsonValue]
    """The `quantization_config` of the checkpoint's config.json."""


class CalibrationRecord(BaseModel):
    """What a checkpoint was calibrated with."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    samples: int
    max_tokens: int
    tokens: int


class QuantizationRecord(BaseModel):
    """What a release records about a checkpoint's quantization. It is kept in the notes of the `quantized` artifact."""

    model_config = ConfigDict(frozen=True)

    method: Method
    backend: BackendName
    parameters: Mapping[str, str | bool | int | float | None]
    device: Literal["cpu", "cuda"]
    calibration: CalibrationRecord
    layers: int
    """How many linear layers were quantized."""
    bytes: int
    source_bytes: int
    bits_per_weight: float
    """Bits that a quantized weight takes, including its share of scales and zeros."""


class Backend(Protocol):
    """A program that quantizes: its environment, its worker script and the bits that it can write."""

    @property
    def environment(self) -> str:
        """The name of the requirements file of its environment."""
        ...

    @property
    def script(self) -> Path:
        """Its worker script."""
        ...

    @property
    def bits(self) -> tuple[int, ...]:
        """The bits per weight that it can write."""
        ...

    def view(self, source: Path, scratch: Path) -> Path:
        """Return the folder to load the source from: ``source``, or one in ``scratch`` that this backend can read."""
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
    """A backend that needs transformers 4.51, which ignores keys that newer versions write into config.json."""

    def _readable(self, config: dict[str, Any]) -> dict[str, Any]:
        return older_config(config)


_BACKENDS: Mapping[tuple[str, str], Backend] = {
    ("awq", "autoawq"): _Archived("autoawq", (4,)),
    ("awq", "gptqmodel"): _Current("gptqmodel", (4,)),
    ("gptq", "gptqmodel"): _Current("gptqmodel", (2, 3, 4, 8)),
    ("gptq", "autogptq"): _Archived("autogptq", (2, 3, 4, 8)),
}


def backend_of(scheme: Scheme) -> Backend:
    """Return the backend of a scheme; its environment's pins and its script are part of a checkpoint's key."""
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
) -> QuantizationRecord:
    """Quantize the model in the folder ``source`` into the empty folder ``output``, and check the result.

    ``calibration`` holds JSON lines of ``{"text": …}``: the first ``samples`` are used, each cut to ``max_tokens``.
    ``scratch`` is an empty folder for the worker.

    Raises:
        QuantizeError: the calibration is too small, or the scheme doesn't fit the model.
        UntrustedFileError: the worker left links or special files.
        CheckpointError: the checkpoint does not match the scheme; lists every problem.
        WorkerFailed: the worker failed, with its own message, or its result is not valid.
    """
    config = _read_config(source)
    texts = _calibration_texts(calibration, samples)
    _check_fits(source, config, scheme, max_tokens)
    backend = backend_of(scheme)
    written = scratch / "checkpoint"
    written.mkdir()
    request = QuantizationRequest(
        method=scheme.method,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        desc_act=scheme.desc_act,
        clone_saved_weights=scheme.clone_saved_weights,
        source=backend.view(source, scratch).absolute(),
        output=written.absolute(),
        calibration=str(calibration.absolute()),
        texts=tuple(texts),
        max_tokens=max_tokens,
        seed=_SEED,
    )
    progress(f"quantizing: {scheme.method} by {scheme.backend}, {scheme.bits} bits, groups of {scheme.group_size}")
    result = _result(run_worker(backend.environment, backend.script, request.model_dump(), scratch), scheme.backend)
    _assemble(written, source, config, result.quantization_config, output)
    found = checkpoint.check(output, source, scheme)
    progress(f"checked: {found.layers} layers, {found.bytes / 1e6:.1f} MB, {found.bits_per_weight:.2f} bits per weight")
    return QuantizationRecord(
        method=scheme.method,
        backend=scheme.backend,
        parameters=scheme.model_dump(exclude={"method", "backend", *(_GPTQ_ONLY if scheme.method == "awq" else ())}),
        device=result.device,
        calibration=CalibrationRecord(
            sha256=digest_file(calibration),
            samples=samples,
            max_tokens=max_tokens,
            tokens=result.blocks * max_tokens,
        ),
        layers=found.layers,
        bytes=found.bytes,
        source_bytes=found.source_bytes,
        bits_per_weight=found.bits_per_weight,
    )


def _result(written: Mapping[str, object], backend: str) -> QuantizationResult:
    try:
        return QuantizationResult.model_validate(written)
    except ValidationError as error:
        raise WorkerFailed(
            f"the worker of `{backend}` wrote a result that is not valid: {first_problem(error)}"
        ) from error


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
        raise QuantizeError(f"{source / 'config.json'} is not valid: expected a JSON object")
    return config


def _calibration_texts(calibration: Path, samples: int) -> list[str]:
    """Read the texts that will be used. The worker, which has the tokenizer, checks that they have enough tokens."""
    try:
        rows = json_lines.read_rows(calibration, json_lines.TEXTS, samples)
    except json_lines.JsonLinesError as error:
        raise QuantizeError(f"the calibration text: {error}") from error
    if len(rows) < samples:
        raise QuantizeError(
            f"{calibration} holds {len(rows)} samples, but `calibration.samples` is {samples}: add text, or lower "
            "`calibration.samples`"
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
        raise QuantizeError(
            f"`calibration.max_tokens` is {max_tokens}, but the model's longest context is {positions} tokens"
        )


def _assemble(
    written: Path,
    source: Path,
    config: Mapping[str, Any],
    quantization: Mapping[str, Any],
    output: Path,
) -> None:
    """Put the worker's weights and the source's configuration and tokenizer into ``output``, readable by all users."""
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

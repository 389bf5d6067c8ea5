"""Quantize a model: run the backend's worker in its own environment, then check the checkpoint that it wrote.

AutoAWQ and GPTQModel write AWQ, GPTQModel and AutoGPTQ write GPTQ, llm-compressor writes the formats of
compressed-tensors. Only the weights come from the worker: the tokenizer is the source's, and so is config.json, to
which the quantization is added.
The law: the same source, calibration and scheme give the same bytes on the same machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt, PositiveInt, ValidationError

from evals.drift import json_lines
from evals.drift.mixture import Mixture
from evals.workers import RunWorker
from pipeline.compatibility import preflight
from pipeline.compatibility.backends import older_config
from pipeline.compatibility.description import ModelDescription, Role
from pipeline.compatibility.safetensors_headers import HeaderError, read_model
from pipeline.compatibility.scheme import BackendName, Format, Method, Scheme
from pipeline.errors import QuantizeError, WorkerFailed
from pipeline.quantization import calibration_data, checkpoint, expert_coverage, mixture
from pipeline.quantization.formats.table import format_of
from registry import untrusted
from registry.digests import digest_file
from registry.errors import first_problem
from registry.file_systems import set_mode
from registry.progress import Progress

_SCRIPTS = Path(__file__).parent / "quantizers"
_SEED = 0
# Keys of config.json that a backend must not see: a quantization that was never applied (`preflight` has checked that
# the weights have 16 bits), and names of code that came with the model.
_LEFT_OUT = ("quantization_config", "auto_map")


class QuantizationRequest(TypedDict):
    """The request to a quantizer's worker script, which reads it as JSON."""

    method: Method
    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool
    clone_saved_weights: bool
    kv_cache: Literal["fp8"] | None
    linears: tuple[str, ...]
    """The layers to quantize, for backends that don't choose them themselves."""
    ignored: tuple[str, ...]
    """The other layers, which compressed-tensors' configuration names."""
    source: Path | str
    """The model's folder, absolute."""
    output: Path | str
    """An empty folder, absolute, that receives the safetensors files."""
    calibration: str | None
    """The calibration file's path, for messages: `texts` holds its text. None where the method needs none."""
    texts: tuple[str | list[dict[str, str]], ...]
    """Each a text, or the messages of a conversation."""
    chat_template: str | None
    """In place of the model's own."""
    max_tokens: int
    """The longest piece of a text that is used; also the longest calibration block."""
    seed: int
    mixture: Sequence[mixture.FormatOfLayers]
    """For `mixed` each format that occurs."""


class CalibrationUse(BaseModel):
    """What became of the calibration samples."""

    model_config = ConfigDict(frozen=True)

    tokens: PositiveInt
    """How many the quantizer has seen."""
    cut: NonNegativeInt
    """Samples longer than `max_tokens`: of a text the rest is not used, of a conversation the last messages."""
    empty: NonNegativeInt
    """Samples without any token."""


class QuantizationResult(BaseModel):
    """The result of a quantizer's worker script."""

    model_config = ConfigDict(frozen=True)

    device: Literal["cpu", "cuda"]
    calibration: CalibrationUse | None
    """None without calibration."""
    quantization_config: Mapping[str, JsonValue]
    """The `quantization_config` of the checkpoint's config.json."""
    experts: Mapping[str, tuple[NonNegativeInt, ...]] = {}
    """Calibration tokens that reached each expert, by the name of the experts' module."""


class CalibrationRecord(CalibrationUse):
    """What a checkpoint was calibrated with."""

    sha256: str
    samples: int
    max_tokens: int


class QuantizationRecord(BaseModel):
    """What a release records about a checkpoint's quantization."""

    model_config = ConfigDict(frozen=True)

    method: Format
    backend: BackendName
    parameters: Mapping[str, str | bool | int | float | None]
    device: Literal["cpu", "cuda"] | None
    """What computed; None where nothing was computed, since the source was quantized already."""
    calibration: CalibrationRecord | None
    layers: int
    """How many linear layers were quantized."""
    bytes: int
    source_bytes: int
    bits_per_weight: float
    """Bits that a quantized weight takes, including its share of scales and zeros."""
    experts: Mapping[str, tuple[int, ...]] = Field(default={}, exclude_if=lambda value: not value)
    """Calibration tokens that reached each expert, by the name of the experts' module; empty for a dense model."""
    mixture: Mixture | None = Field(default=None, exclude_if=lambda value: value is None)
    """Of `mixed`, which layers have which format, and what that loses."""


class QuantizedNotes(QuantizationRecord):
    """What is noted about the artifact of `quantized`: ``pins_digest`` is that of the worker's environment.

    A checkpoint that is taken as it is has a ``revision`` in its place.
    """

    pins_digest: str | None
    revision: str | None = None


@dataclass(frozen=True)
class QuantizationBackend:
    """A program that quantizes. ``environment`` is the name of the requirements file of its environment.

    ``room`` is what it writes at most, in times the source's bytes: the checkpoint, and what it keeps of finished
    layers. Its script is named after the environment, unless ``script_name`` is given.
    """

    environment: str
    room: int
    script_name: str | None = None

    @property
    def script(self) -> Path:
        """Its worker script."""
        return _SCRIPTS / f"{self.script_name or self.environment}.py"

    def view(self, source: Path, scratch: Path) -> Path:
        """Return the folder to load the source from: ``source``, or one in ``scratch`` that this backend can read."""
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
class _Archived(QuantizationBackend):
    """A backend that needs transformers 4.51, which ignores keys that newer versions write into config.json."""

    def _readable(self, config: dict[str, Any]) -> dict[str, Any]:
        return older_config(config)


_BACKENDS: Mapping[BackendName, QuantizationBackend] = {
    "autoawq": _Archived("autoawq", room=1),
    "gptqmodel": QuantizationBackend("gptqmodel", room=3),  # on CPU it keeps weights in float32
    "autogptq": _Archived("autogptq", room=2),
    "llmcompressor": QuantizationBackend("llmcompressor", room=2),
}


def backend_of(scheme: Scheme) -> QuantizationBackend:
    """Return the backend of a scheme; its environment's pins and its script are part of a checkpoint's key."""
    backend = _BACKENDS[scheme.backend]
    return backend if scheme.needs_calibration else replace(backend, script_name="data_free", room=1)


def quantize(
    source: Path,
    calibration: Path | None,
    samples: int,
    max_tokens: int,
    scheme: Scheme,
    output: Path,
    run_worker: RunWorker,
    scratch: Path,
    progress: Progress,
    min_expert_tokens: int | None = None,
    chat_template: Path | None = None,
) -> QuantizationRecord:
    """Quantize the model in the folder ``source`` into the empty folder ``output``, and check the result.

    ``calibration`` holds JSON lines of ``{"text": …}`` or ``{"messages": […]}``: the first ``samples`` are used, each
    cut to ``max_tokens``. It is None for a scheme that needs none. ``chat_template`` is used in place of the model's
    own. ``scratch`` is an empty folder for the worker. Where the model has experts, each must be reached by
    ``min_expert_tokens`` calibration tokens.

    Raises:
        QuantizeError: the calibration is too small, or the scheme doesn't fit the model.
        UntrustedFileError: the worker left links or special files.
        CheckpointError: the checkpoint does not match the scheme; lists every problem.
        WorkerFailed: the worker failed, with its own message, or its result is not valid.
    """
    config = _read_config(source)
    texts = [] if calibration is None else _calibration_texts(calibration, samples)
    model = _fitting(source, config, scheme, max_tokens)
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
        kv_cache=scheme.kv_cache,
        linears=tuple(model.linears),
        ignored=_ignored(model),
        source=backend.view(source, scratch).absolute(),
        output=written.absolute(),
        calibration=None if calibration is None else str(calibration.absolute()),
        texts=tuple(texts),
        chat_template=None if chat_template is None else chat_template.read_text(encoding="utf-8"),
        max_tokens=max_tokens,
        seed=_SEED,
        mixture=(),
    )
    groups = "whole rows" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    size = f"{scheme.bits} bits, {groups}" if scheme.budget is None else str(scheme.budget)
    progress(f"quantizing: {scheme.method} by {scheme.backend}, {size}")
    chosen = None
    if scheme.method == "mixed":
        asked, ask = _sensitivity(request), _ask(run_worker, backend, scratch)
        chosen = mixture.choose(model, scheme, asked, ask, progress)
        kept = tuple(sorted((*request["ignored"], *chosen.unquantized)))
        request = {**request, "mixture": chosen.formats, "ignored": kept}
    result = _result(run_worker(backend.environment, backend.script, request, scratch), scheme.backend)
    has_experts = bool(model.of(Role.EXPERT))
    expert_coverage.check(result.experts, samples, min_expert_tokens, progress, has_experts=has_experts)
    _assemble(written, source, config, result.quantization_config, output, format_of(scheme).REST_DTYPE)
    found = checkpoint.check(output, source, scheme)
    progress(f"checked: {found.layers} layers, {found.bytes / 1e6:.1f} MB, {found.bits_per_weight:.2f} bits per weight")
    return QuantizationRecord(
        method=scheme.method,
        backend=scheme.backend,
        parameters=scheme.parameters,
        device=result.device,
        calibration=_calibration_record(calibration, samples, max_tokens, result),
        layers=found.layers,
        bytes=found.bytes,
        source_bytes=found.source_bytes,
        bits_per_weight=found.bits_per_weight,
        experts=result.experts,
        mixture=None if chosen is None else mixture.measure(chosen, asked, output, ask, progress),
    )


def _sensitivity(request: QuantizationRequest) -> mixture.SensitivityRequest:
    """What the worker that measures losses needs of a request."""
    return mixture.SensitivityRequest(
        source=request["source"],
        checkpoint=None,
        calibration=str(request["calibration"]),
        texts=request["texts"],
        chat_template=request["chat_template"],
        max_tokens=request["max_tokens"],
        seed=request["seed"],
        groups={},
        formats={},
    )


def _ask(run_worker: RunWorker, backend: QuantizationBackend, scratch: Path) -> mixture.Ask:
    def ask(request: Mapping[str, object], name: str) -> Mapping[str, object]:
        folder = scratch / name
        folder.mkdir()
        return run_worker(backend.environment, mixture.SCRIPT, request, folder)

    return ask


def _calibration_record(
    calibration: Path | None, samples: int, max_tokens: int, result: QuantizationResult
) -> CalibrationRecord | None:
    if calibration is None or result.calibration is None:
        return None
    return CalibrationRecord(
        sha256=digest_file(calibration), samples=samples, max_tokens=max_tokens, **result.calibration.model_dump()
    )


def _result(written: Mapping[str, object], backend: str) -> QuantizationResult:
    try:
        return QuantizationResult.model_validate(written)
    except ValidationError as error:
        raise WorkerFailed(
            f"the worker of `{backend}` wrote a result that is not valid: {first_problem(error)}"
        ) from error


def _read_config(source: Path) -> dict[str, Any]:
    try:
        config = json.loads((source / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise QuantizeError(f"can't read the model's configuration: {error}") from error
    if not isinstance(config, dict):
        raise QuantizeError(f"{source / 'config.json'} is not valid: expected a JSON object")
    return config


def _calibration_texts(calibration: Path, samples: int) -> list[calibration_data.Sample]:
    """Read the samples that will be used. The worker, which has the tokenizer, checks that they have enough tokens."""
    try:
        rows = calibration_data.read(calibration, samples)
    except json_lines.JsonLinesError as error:
        raise QuantizeError(f"the calibration text: {error}") from error
    if len(rows) < samples:
        raise QuantizeError(
            f"{calibration} holds {len(rows)} samples, but `calibration.samples` is {samples}: add text, or lower "
            "`calibration.samples`"
        )
    return rows


def _fitting(source: Path, config: Mapping[str, Any], scheme: Scheme, max_tokens: int) -> ModelDescription:
    """Describe the model, and refuse a scheme that does not fit it."""
    try:
        model = ModelDescription(config, read_model(source))
    except HeaderError as error:
        raise QuantizeError(f"can't read the source's headers: {error}") from error
    preflight.check(model, scheme)
    if scheme.needs_calibration and (problem := preflight.too_long_samples(model, max_tokens)):
        raise QuantizeError(problem)
    return model


def _ignored(model: ModelDescription) -> tuple[str, ...]:
    """The matrices that stay as they are: heads, routers, embeddings, towers. A tied head has no tensor of its own."""
    names = {name.removesuffix(".weight") for name, each in model.tensors.items() if len(each.shape) == 2}
    return tuple(sorted({"lm_head", *names} - model.linears.keys()))


def _assemble(
    written: Path,
    source: Path,
    config: Mapping[str, Any],
    quantization: Mapping[str, Any],
    output: Path,
    rest_dtype: str | None,
) -> None:
    """Put the worker's weights and the source's configuration and tokenizer into ``output``, readable by all users.

    ``rest_dtype`` is what tensors that are not quantized were converted to, if they were.
    """
    for name in untrusted.plain_files(written):
        if "/" not in name and name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.move(written / name, output / name)
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and ".safetensors" not in path.name:
            shutil.copyfile(path, output / path.name)
    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    merged = {**kept, "quantization_config": dict(quantization)}
    if rest_dtype == "F16":
        merged |= {"torch_dtype": "float16"} | ({"dtype": "float16"} if "dtype" in config else {})
    (output / "config.json").write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")
    for name in untrusted.plain_files(output):
        with untrusted.open_file(output, name) as stream:
            set_mode(stream.fileno(), 0o644)

"""What vLLM says in its log that it applied, kernels by layer type among it, and what was requested and not applied.

The messages are those of vLLM 0.32. The log is not trusted: a bounded part of it is read, and only words of a plain
form are taken from it. What the log does not say is absent here, and is never reported as not applied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from containers.sandbox.kernels import Kernels
from containers.sandbox.log_lines import PREFIX

Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:+-]{1,128}$")]
LayerType = Annotated[str, StringConstraints(pattern=r"^[\w .:+-]{1,128}$")]

_MOST_LINES = 20_000
_MOST_NAMES = 32
_GIB = 1 << 30

_CONFIGURATION = re.compile(r"Initializing a V1 LLM engine \(v[\w.+-]+\) with config: (?P<values>.*)")
# Values of that line which answer an argument.
_VALUES = (
    "dtype", "max_seq_len", "tensor_parallel_size", "pipeline_parallel_size", "quantization", "kv_cache_dtype",
    "enable_prefix_caching",
)  # fmt: skip
_DRAFTING = re.compile(r"speculative_config=(?:None|SpeculativeConfig\(method='(?P<method>[\w-]{1,64})')")
_KERNELS = (
    re.compile(r"Using (?P<kernel>\w{1,128}) for (?P<layers>[\w .:+-]{1,128}?)(?: linear| GEMM)?$"),
    re.compile(r"Selected (?P<kernel>\w{1,128}) for (?P<layers>[\w .:+-]{1,128})$"),
    re.compile(r"Using '?(?P<kernel>[\w -]{1,64}?)'? (?P<layers>(?:[\w-]{1,32} ){0,3}M[oO]E backend)"),
)
_ATTENTION = (
    re.compile(r"Using (?P<name>\w{1,64}) attention backend out of potential backends"),
    re.compile(r"Using (?:AttentionBackendEnum\.)?(?P<name>[A-Z][A-Z0-9_]{1,63}) backend\.$"),
    re.compile(r"Using (?P<name>FlashAttention version \d)$"),
)
_CACHE_FORMAT = re.compile(r"Using (?P<format>[\w.]{1,64}) KV cache format for \w{1,64} backend")
_CACHE_TOKENS = re.compile(r"KV cache size: (?P<tokens>[\d,]{1,20}) tokens, Maximum concurrency")
_CACHE_GIB = re.compile(
    r"(?:Available KV cache memory: |(?:Explicitly|Auto) set \()(?P<gib>\d{1,6}(?:\.\d{1,6})?)"
    r"(?: GiB|/[\d.]+\) GiB for KV)"
)
# Messages about layers that keep few bits in memory and compute in 16.
_FALLBACKS = (
    re.compile(r"Your GPU does not have native support for (?:FP8|FP4) computation but (?:FP8|FP4) quantization"),
    re.compile(r"is a weight-only \(A16\) kernel; the requested activation quantization"),
    re.compile(r"falling back to the slow and unoptimized emulation backend"),
    re.compile(r"does not support native \w+ computation"),
    re.compile(r"dequantized? (?:weights|to BF16)"),
)  # fmt: skip
_EMULATING = re.compile(r"[Ee]mulation|EMULATION")
_FALLBACK_CHARACTERS = 160
# A 16-bit cache takes twice the bytes of an 8-bit one; memory is rounded to hundredths of a GiB.
_BETWEEN_8_AND_16_BITS = 0.75


class EngineReport(BaseModel):
    """What an engine's log says that it runs.

    ``configuration`` are values of its own configuration (``dtype``, ``max_seq_len``, …), ``speculative`` the method
    that drafts tokens, ``kernels`` are by layer type. ``fallbacks`` are its messages about layers that are computed
    without the bits that they are stored in. ``cache_tokens`` and ``cache_bytes`` are the KV cache of one rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    configuration: Mapping[Word, Word] = {}
    """Values of the engine's configuration, such as `dtype` and `max_seq_len`."""
    speculative: Word | None = None
    """The method that drafts tokens."""
    kernels: Mapping[LayerType, tuple[Word, ...]] = {}
    """The kernels, by type of layer."""
    attention: tuple[LayerType, ...] = ()
    """The implementations of attention."""
    kv_cache: Word | None = None
    """The type of the KV cache."""
    cache_tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens in the KV cache of one rank."""
    cache_bytes: Annotated[int, Field(gt=0)] | None = None
    """Bytes of the KV cache of one rank."""
    fallbacks: tuple[str, ...] = ()
    """Messages about layers that are computed with more bits than they are stored in."""

    @property
    def cache_bytes_per_token(self) -> float | None:
        """Bytes of the KV cache for one token, in one rank."""
        return self.cache_bytes / self.cache_tokens if self.cache_bytes and self.cache_tokens else None

    def __str__(self) -> str:
        """Describe it for a report."""
        parts = [f"{', '.join(names)} for {layers}" for layers, names in sorted(self.kernels.items())]
        if self.attention:
            parts.append(f"attention {', '.join(self.attention)}")
        if self.kv_cache is not None:
            parts.append(f"KV cache {self.kv_cache}")
        if self.speculative is not None:
            parts.append(f"speculation by {self.speculative}")
        return ", ".join(parts)


class Requested(BaseModel):
    """What a server was asked to apply.

    ``arguments`` are its engine's. ``weight_only`` is whether its checkpoint keeps activations in 16 bits, so that a
    kernel which multiplies in 16 bits is the right one. ``cache_bytes_per_token`` is what a 16-bit KV cache takes for a
    token in all ranks, where every layer keeps every token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arguments: tuple[str, ...]
    """The engine's arguments."""
    weight_only: bool = True
    """Whether activations keep 16 bits, so that kernels that multiply in 16 bits are right."""
    cache_bytes_per_token: Annotated[int, Field(gt=0)] | None = None
    """Bytes of a 16-bit KV cache per token, in all ranks."""

    def value(self, flag: str) -> str | None:
        """The value of an argument, ``--flag value`` or ``--flag=value``; None where it is not given."""
        found = None
        for place, word in enumerate(self.arguments):
            name, equals, value = word.partition("=")
            if name == flag:
                found = value if equals else next(iter(self.arguments[place + 1 : place + 2]), None)
        return found


def read(log: str, kernels: Kernels | None) -> EngineReport | None:
    """Return what a healthy engine's log says; None without the line that states its configuration.

    ``kernels`` is what the CPU runtime's own line says, which takes precedence: it was read off the loaded layers.
    """
    lines = [_message(line) for line in log.splitlines()[:_MOST_LINES]]
    configured = next((found["values"] for line in lines if (found := _CONFIGURATION.match(line))), None)
    if configured is None:
        return None
    values = dict(_configuration(configured))
    drafting = _DRAFTING.search(configured)
    cache = next((found["format"] for line in lines if (found := _CACHE_FORMAT.search(line))), None)
    tokens = next((found["tokens"] for line in lines if (found := _CACHE_TOKENS.search(line))), "")
    gib = next((found["gib"] for line in lines if (found := _CACHE_GIB.search(line))), "0")
    by_layers: dict[str, list[str]] = {}
    for line in lines:
        found = next((match for each in _KERNELS if (match := each.match(line))), None)
        if found and len(by_layers) < _MOST_NAMES:
            kernel = re.sub(r"\W+", "-", found["kernel"])
            by_layers.setdefault(found["layers"], [])
            by_layers[found["layers"]] += [kernel] if kernel not in by_layers[found["layers"]] else []
    attention = [found["name"] for line in lines for each in _ATTENTION if (found := each.match(line))]
    if kernels is not None:
        attention = [kernels.attention]
        cache = kernels.kv_cache_dtype
    return EngineReport(
        configuration=values,
        speculative=drafting["method"] if drafting else None,
        kernels={layers: tuple(names[:_MOST_NAMES]) for layers, names in by_layers.items()},
        attention=tuple(dict.fromkeys(attention))[:_MOST_NAMES],
        kv_cache=cache or _resolved_cache(values),
        cache_tokens=int(tokens.replace(",", "") or 0) or None,
        cache_bytes=round(float(gib) * _GIB) or None,
        fallbacks=tuple(dict.fromkeys(_fallbacks(lines)))[:_MOST_NAMES],
    )


def not_applied(requested: Requested, report: EngineReport, *, on_gpu: bool) -> list[str]:
    """Name what was requested and not applied, one sentence each, with what runs in its place."""
    return [
        *_other_values(requested, report),
        *_other_cache(requested, report),
        *_other_speculation(requested, report),
        *(_dequantized(requested, report) if on_gpu else ()),
    ]


def _message(line: str) -> str:
    found = PREFIX.match(line)
    return (line if found is None else line[found.end() :]).rstrip()


def _configuration(text: str) -> Iterator[tuple[str, str]]:
    for name in _VALUES:
        found = re.search(rf"\b{name}=(?:torch\.)?([\w.-]{{1,64}})", text)
        if found is not None:
            yield name, found[1]


def _resolved_cache(values: Mapping[str, str]) -> str | None:
    """The KV cache's precision; ``auto`` is that of the layers."""
    said = values.get("kv_cache_dtype")
    return values.get("dtype") if said == "auto" else said


def _fallbacks(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if any(each.search(line) for each in _FALLBACKS):
            yield "".join(each if each.isprintable() else "?" for each in line[:_FALLBACK_CHARACTERS])


def _other_values(requested: Requested, report: EngineReport) -> Iterator[str]:
    for flag, name in (
        ("--dtype", "dtype"),
        ("--max-model-len", "max_seq_len"),
        ("--tensor-parallel-size", "tensor_parallel_size"),
        ("--pipeline-parallel-size", "pipeline_parallel_size"),
    ):
        wanted, applied = requested.value(flag), report.configuration.get(name)
        if wanted not in {None, "auto", applied} and applied is not None:
            yield f"`{flag} {wanted}` was requested, and the engine runs with {applied}"
    for flag, wanted in (("--enable-prefix-caching", "True"), ("--no-enable-prefix-caching", "False")):
        applied = report.configuration.get("enable_prefix_caching", wanted)
        if flag in requested.arguments and applied != wanted:
            yield f"`{flag}` was requested, and the engine says enable_prefix_caching={applied}"


def _other_cache(requested: Requested, report: EngineReport) -> Iterator[str]:
    wanted = requested.value("--kv-cache-dtype")
    if wanted in {None, "auto"} or report.kv_cache is None:
        return
    if wanted.startswith("fp8") != report.kv_cache.startswith("fp8"):
        yield f"a KV cache of {wanted} was requested, and the engine's is {report.kv_cache}"
        return
    measured, whole = report.cache_bytes_per_token, requested.cache_bytes_per_token
    if measured is None or whole is None or not wanted.startswith("fp8"):
        return
    ranks = int(report.configuration.get("tensor_parallel_size", "1")) * int(
        report.configuration.get("pipeline_parallel_size", "1")
    )
    if measured * ranks > whole * _BETWEEN_8_AND_16_BITS:
        yield (
            f"a KV cache of {wanted} was requested, and a token takes {measured * ranks:.0f} bytes of it: "
            f"{whole} would be 16 bits"
        )


def _other_speculation(requested: Requested, report: EngineReport) -> Iterator[str]:
    given = requested.value("--speculative-config")
    if given is None:
        return
    wanted = _method(given)
    if report.speculative is None:
        yield f"speculation by {wanted} was requested, and the engine switched it off"
    elif report.speculative != wanted:
        yield f"speculation by {wanted} was requested, and the engine drafts by {report.speculative}"


def _method(given: str) -> str:
    try:
        return str(json.loads(given)["method"])
    except (ValueError, KeyError, TypeError):
        return given[:64]


def _dequantized(requested: Requested, report: EngineReport) -> Iterator[str]:
    emulated: Sequence[tuple[str, str]] = [
        (layers, name) for layers, names in report.kernels.items() for name in names if _EMULATING.search(name)
    ]
    for layers, name in emulated:
        yield f"{layers} is served by {name}, which dequantizes its weights"
    if not requested.weight_only:
        yield from (f"quantized layers fell back to 16-bit arithmetic: {said}" for said in report.fallbacks)
    elif not emulated:
        yield from (
            f"quantized layers are dequantized: {said}"
            for said in report.fallbacks
            if "emulat" in said.lower() or "dequantize" in said.lower()
        )

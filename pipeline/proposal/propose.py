"""The numbers of a first model file: context, GPUs, traffic, limits, and how much text is used.

They are estimates; what each rests on stands beside it here, and as a comment in the file that is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from containers.hardware.cpu import InstructionSet
from containers.hardware.gpu_models import GpuModel
from containers.image import profile as profiles
from evals import builtin
from evals.drift import planning
from evals.drift.limits import DriftLimits
from evals.load.expected_memory import expect
from evals.load.traffic.profile import read_profile
from evals.statistics import paired
from pipeline.compatibility.backends import is_supported
from pipeline.compatibility.description import ModelDescription, has_experts
from pipeline.errors import PlanError, SpecError, UnsupportedModelError
from pipeline.planner.facts import ModelFacts, read_facts
from pipeline.planner.memory import CONTEXT_STEP, GIB, LARGEST, Workload
from pipeline.planner.plan import Placement, place
from pipeline.planner.weights import FP16, Weights, active_numbers, quantized, taken, unquantized
from pipeline.proposal.schemes import Choice, choose
from pipeline.quantization.published import Published

Kind = Literal["base", "chat", "code"]
KINDS: tuple[Kind, ...] = ("base", "chat", "code")
SUITES: Mapping[Kind, str] = {"base": "standard", "chat": "support-chat", "code": "code"}
"""The suite for each kind."""
_WITH_IMAGES = "vision"

# Requests at once, each of the whole context.
_CONCURRENT, _CONCURRENT_ON_CPU = 16, 4
_CONTEXT, _LONGEST, _CONTEXT_ON_CPU = 8192, 32768, 4096
# Two cores of a CPU with AVX2: 55 GFLOP/s were measured in float32 (SmolLM2-135M), with AVX-512 several times as much.
CPU_FLOPS = 40e9
_CPU_BANDWIDTH = 10e9
# How long a CPU may answer the questions for one model.
_EVALUATION_S = 600
_LEAST_ITEMS, _LEAST_DOCUMENTS = 200, 32
# What the load test asks of a CPU: so much of its time, so many requests, and how much slower one in twenty may be.
_BUSY, _REQUESTS, _SLOWER = 0.3, 12, 10
# Above this size FP16 does not fit beside its quantized copy where layers are compared, and takes minutes to load.
_LARGE = 40 * 10**9
# Parts of the names of classes in transformers whose models answer a prompt.
_GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHead")
# Names of schemes for formats that only published checkpoints have.
_SHORT = {"fp8-scale-inv": "fp8", "mxfp4-experts": "mxfp4"}
_WORDS: Sequence[tuple[Kind, re.Pattern[str]]] = (
    ("code", re.compile(r"code|coder|codestral|devstral", re.IGNORECASE)),
    ("chat", re.compile(r"instruct|chat|assistant|(?:^|[-_])it(?:[-_]|$)|gpt-oss", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Target:
    """What will serve the model: GPUs of one kind, or a CPU with this instruction set."""

    runtime: str
    gpu: GpuModel | None
    instruction_set: InstructionSet
    machine_gpus: int = LARGEST
    """How many of its GPUs one machine has."""

    @property
    def name(self) -> str:
        """As a person calls it."""
        return "CPUs" if self.gpu is None else self.gpu.name


@dataclass(frozen=True)
class Traffic:
    """The load test: a profile, what is changed of it, and its limits."""

    profile: str
    slo: Mapping[str, float]
    changes: Mapping[str, float]


@dataclass(frozen=True)
class AsIs:
    """A source that is quantized already, and the URI of its original, or else the ``reason`` why there is none."""

    published: Published
    baseline: str | None
    reason: str | None


@dataclass(frozen=True)
class Proposal:
    """All that a first model file says."""

    model: str
    uri: str
    revision: str | None
    kind: Kind
    target: Target
    description: ModelDescription
    facts: ModelFacts
    weights: Mapping[str, Weights]
    choice: Choice
    context: int
    concurrent: int
    tensor_parallel: Mapping[str, int]
    """GPUs of a replica by scheme, FP16 among them; empty on a CPU."""
    items: int
    documents: int
    max_drop: float
    samples: int
    max_tokens: int
    traffic: Traffic
    memory_bytes: int
    start_timeout_s: int | None
    shows_images: bool
    """Whether the model is asked about images."""
    as_is: AsIs | None = None

    @property
    def fp16(self) -> Weights:
        """The unquantized weights."""
        return self.weights[FP16]

    @property
    def suite(self) -> str:
        """The suite that gives stronger evidence than built-in data: with images where the model accepts them."""
        return _WITH_IMAGES if self.shows_images else SUITES[self.kind]

    @property
    def active(self) -> float:
        """Weights that take part in a token."""
        return active_numbers(self.fp16, self.facts)

    @property
    def compares_layers(self) -> bool:
        """Whether FP16 is there, and small enough to stand in memory beside its quantized copy."""
        return self.fp16.bytes <= _LARGE and not self.is_alone

    @property
    def is_alone(self) -> bool:
        """Whether there is no 16-bit model to compare with."""
        return self.as_is is not None and self.as_is.baseline is None


def name_of(uri: str) -> str:
    """Return a model's name for the last part of a URI that is no version, in the letters that a name may have.

    Raises:
        SpecError: there is no such letter in it.
    """
    _, *parts = (part for part in re.split(r"[/:]", uri.split("@", maxsplit=1)[0]) if part)
    last = next((part for part in reversed(parts) if not part.isdigit()), "")
    found = "-".join(part.strip(".") for part in re.split(r"[^a-z0-9.]+", last.lower()) if part.strip("."))
    name = re.sub(r"\.{2,}", ".", found)
    if not name:
        raise SpecError(f"can't take the model's name from {uri!r}: give it with --name")
    return name


def kind_of(uri: str, *, has_chat_template: bool) -> Kind:
    """Guess what a model is for by its name, or by its tokenizer, which has a template for chats."""
    last = uri.rstrip("/").rpartition("/")[2]
    return next((kind for kind, words in _WORDS if words.search(last)), "chat" if has_chat_template else "base")


def propose(
    model: str,
    uri: str,
    revision: str | None,
    description: ModelDescription,
    kind: Kind,
    target: Target,
    *,
    has_chat_template: bool,
    as_is: AsIs | None = None,
) -> Proposal:
    """Choose what a first model file says; without a chat template a model can't be shown images.

    ``description`` is of the model at 16 bits, also of a source that is quantized already.

    Raises:
        UnsupportedModelError: nothing can be made of the model.
        PlanError: the planner does not know the architecture, or the target can't hold the model.
    """
    _check_usable(description)
    facts = read_facts(description.config)
    weights = {FP16: unquantized(description)}
    if as_is is None:
        choice = choose(description, target.gpu, target.instruction_set)
        weights |= {name: quantized(name, scheme, description) for name, scheme in choice.schemes.items()}
    else:
        choice = _as_is(as_is, target)
        weights |= {name: taken(name, as_is.published) for name in choice.schemes}
    groups: dict[str, int] = {}
    if target.gpu is None:
        context = _context_on_cpu(facts, target.runtime)
    else:
        has_fp16 = as_is is None or as_is.baseline is not None
        served = {name: each for name, each in weights.items() if name != FP16 or has_fp16}
        context, groups = _on_gpus(facts, served, target.gpu, target.machine_gpus)
    active = active_numbers(weights[FP16], facts)
    on_cpu = target.gpu is None
    items, documents = _questions(active) if on_cpu else (_size("cloze"), _size("heldout"))
    return Proposal(
        model=model,
        uri=uri,
        revision=revision,
        kind=kind,
        target=target,
        description=description,
        facts=facts,
        weights=weights,
        choice=choice,
        context=context,
        concurrent=_CONCURRENT_ON_CPU if on_cpu else _CONCURRENT,
        tensor_parallel=groups,
        items=items,
        documents=documents,
        max_drop=_max_drop(items),
        samples=32 if on_cpu else 256,
        max_tokens=256 if on_cpu else 512,
        traffic=_on_a_cpu(active, weights) if target.gpu is None else _chat(facts, weights, target.gpu, context),
        memory_bytes=_memory(weights, target.runtime, max(groups.values(), default=1)),
        start_timeout_s=1800 if weights[FP16].bytes > _LARGE else None,
        shows_images=description.accepts_images and has_chat_template,
        as_is=as_is,
    )


def _check_usable(model: ModelDescription) -> None:
    """Refuse what answers no prompt by itself: encoders, classifiers, and decoders that read what an encoder wrote.

    A model that needs code of its own is refused too, as after the pull.

    Raises:
        UnsupportedModelError: the model is one of those, or its output head is missing.
    """
    found = model.config.get("architectures")
    named = [str(name) for name in found] if isinstance(found, list) else []
    if named and not any(part in name for name in named for part in _GENERATING):
        raise UnsupportedModelError(
            f"`{named[0][:60]}` does not generate text: expected a model with one of {', '.join(_GENERATING)} in the "
            "name of its class (`architectures` in config.json)"
        )
    if model.config.get("is_encoder_decoder"):
        raise UnsupportedModelError(
            f"`{model.architecture}` has an encoder before its decoder, which is not planned for"
        )
    if model.config.get("auto_map") and not is_supported(model.architecture):
        raise UnsupportedModelError(
            f"transformers does not support `{model.architecture[:60]}` itself, and code that comes with a model is "
            "never run: choose another model"
        )
    if model.lacks_head:
        raise UnsupportedModelError("the weights have no output head, and config.json does not tie it to the embedding")


def _as_is(as_is: AsIs, target: Target) -> Choice:
    """The one scheme of a source that is quantized already.

    Raises:
        UnsupportedModelError: the target can't serve its format.
    """
    scheme, experts = as_is.published.scheme, has_experts(as_is.published.checkpoint.config)
    if target.gpu is None and (lacking := scheme.unsupported(target.instruction_set, experts=experts)):
        raise UnsupportedModelError(f"{lacking}: choose what will serve it with --gpu")
    return Choice({_SHORT.get(scheme.format, scheme.format): scheme}, {})


def _on_gpus(
    facts: ModelFacts, weights: Mapping[str, Weights], gpu: GpuModel, machine: int
) -> tuple[int, dict[str, int]]:
    """The context of which every scheme holds the requests, and the GPUs of a replica for each; FP16 is served too.

    Raises:
        PlanError: the GPUs of a machine do not hold FP16, with which every scheme is compared.
    """
    asked = Workload(context=min(_CONTEXT, facts.context), concurrency=_CONCURRENT)
    found: dict[str, Placement] = {name: place(facts, each, gpu, asked) for name, each in weights.items()}
    for name, placement in found.items():
        if not placement.fits:
            raise PlanError(
                f"{name} needs {placement.demand.total / GIB:.0f} GiB on each of {placement.demand.gpus} {gpu.name}, "
                f"which have {placement.usable_bytes / GIB:.0f}: choose larger GPUs with --gpu"
            )
        if placement.demand.gpus > machine:
            raise PlanError(
                f"{name} needs {placement.demand.gpus} {gpu.name}, and this machine has {machine}: choose others with "
                "--gpu"
            )
    longest = min(placement.longest_context or asked.context for placement in found.values())
    return min(longest, _LONGEST), {name: placement.demand.tensor_parallel for name, placement in found.items()}


def _context_on_cpu(facts: ModelFacts, runtime: str) -> int:
    """The longest context, up to a limit, of which the runtime's cache holds the requests, or at least one."""
    cache = float(profiles.load(runtime).environment["VLLM_CPU_KVCACHE_SPACE"]) * GIB
    context = min(_CONTEXT_ON_CPU, facts.context)
    for requests in (_CONCURRENT_ON_CPU, 1):
        for size in range(context, 0, -CONTEXT_STEP):
            if requests * facts.kv_bytes(size) <= cache:
                return size
    raise PlanError(f"the cache of {runtime}, {cache / GIB:.0f} GiB, does not hold one request of {context:,} tokens")


def _questions(active: float) -> tuple[int, int]:
    """How many items and documents a CPU answers in its time; not fewer than decide anything."""
    limits = DriftLimits.model_validate(
        {
            "tasks": {
                "cloze": {"data": builtin.FILES["cloze"], "kind": "choice", "max_drop": 0.02},
                "perplexity": {"data": builtin.FILES["heldout"], "kind": "text", "max_increase": 0.02},
            }
        }
    )
    tokens = sum(task.tokens for task in planning.plan(limits))
    share = min(1.0, _EVALUATION_S * CPU_FLOPS / (2 * active) / tokens)
    return (
        max(_LEAST_ITEMS, int(share * _size("cloze")) // 100 * 100),
        max(_LEAST_DOCUMENTS, int(share * _size("heldout"))),
    )


def _size(name: str) -> int:
    with builtin.FILES[name].open(encoding="utf-8") as lines:
        return sum(1 for _ in lines)


def _max_drop(items: int) -> float:
    """The smallest loss that so many items show at the usual share of flips, in half points."""
    return math.ceil(200 * paired.detectable_drop(planning.TYPICAL, items, 0.95, planning.POWER)) / 200


def _on_a_cpu(active: float, weights: Mapping[str, Weights]) -> Traffic:
    """Short requests, so few that the CPU keeps up: computed from its arithmetic and its memory's bandwidth."""
    profile = read_profile("quick")
    read, written = (64, 32) if active < 1e9 else (32, 8)
    step = max(weights[FP16].bytes / _CPU_BANDWIDTH, 2 * active / CPU_FLOPS)
    request = read * 2 * active / CPU_FLOPS + written * step
    rate = min(profile.rate, _two_digits(_BUSY / request))
    seconds = max(profile.seconds, math.ceil(_REQUESTS / rate))
    limit = max(2000.0, _two_digits(1000 * _SLOWER * request))
    changes: dict[str, float] = {}
    if rate < profile.rate:
        changes = {"request_rate": rate, "seconds": seconds, "input_tokens": read, "output_tokens": written}
    if 4 * request > 60:
        changes["request_timeout_s"] = _two_digits(4 * request)
    return Traffic("quick", {"p95_latency_ms": limit, "error_rate": 0.0}, changes)


def _chat(facts: ModelFacts, weights: Mapping[str, Weights], gpu: GpuModel, context: int) -> Traffic:
    """People who talk. A long answer at the bound of the slowest scheme, three times."""
    work = Workload(context=context, concurrency=1)
    schemes = [each for name, each in weights.items() if name != FP16]
    slowest = min(place(facts, each, gpu, work).speed.one_request for each in schemes)
    return Traffic(
        "chat",
        {"p95_latency_ms": max(2000.0, _two_digits(3 * 1000 * 400 / slowest)), "p95_ttft_ms": 1000, "error_rate": 0.0},
        {},
    )


def _memory(weights: Mapping[str, Weights], runtime: str, gpus: int) -> int:
    """The container's memory in whole GiB: what is expected on the CPU that needs most, and a third more."""
    largest = max(each.on_cpu("avx2") for name, each in weights.items() if name != FP16)
    expected = expect(largest, runtime, profiles.load(runtime).full_environment)
    if expected is None:  # of GPU runtimes it was not measured
        return (16 + 8 * gpus) * GIB
    return math.ceil(1.3 * expected.total / 0.8 / GIB) * GIB


def _two_digits(value: float) -> float:
    """The value in two significant digits, rounded up above 1 so that limits only get wider."""
    digits = 1 - math.floor(math.log10(value))
    return math.ceil(value * 10.0**digits) / 10.0**digits if value > 1 else round(value, digits)

"""The text of a first model file, with the reason of each value beside it."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator

from evals.drift.limits import NO_BASELINE
from evals.drift.suite import IMAGES
from pipeline.compatibility.scheme import AS_IS, Scheme
from pipeline.proposal.cost import size
from pipeline.proposal.propose import Proposal
from pipeline.proposal.schemes import MEANINGS

_WIDTH = 120
_GIB = 2**30
# What YAML reads as text, also within braces.
_PLAIN = re.compile(
    r"(?!(?i:null|true|false|yes|no|on|off)$)[A-Za-z][A-Za-z0-9_.-]*|[a-z0-9]+:[/A-Za-z0-9_.@:-]*[/A-Za-z0-9_.@-]"
)


def write(proposal: Proposal, schema: str | None = None) -> str:
    """Return the file; ``schema`` is where editors find the schema, if they do."""
    sections = (_head(proposal), _schemes(proposal), _evals(proposal), _serve(proposal), _load(proposal))
    lines = [] if schema is None else [f"# yaml-language-server: $schema={schema}"]
    for number, section in enumerate(sections):
        lines += ["", *section] if number else section
    return "\n".join(lines) + "\n"


def _head(proposal: Proposal) -> Iterator[str]:
    fp16 = proposal.fp16
    yield from _comment(
        f"{proposal.model} for {proposal.target.name}, as `slipway init` proposes it: a {proposal.kind} model "
        f"({proposal.description.architecture}), {fp16.numbers / 1e6:,.0f} million weights, {size(fp16.bytes)} "
        "unquantized. Limits are estimates until a release has measured them; change what you know better."
    )
    yield f"model: {_text(proposal.model)}"
    revision = "" if proposal.revision is None else f", revision: {_text(proposal.revision)}"
    yield "# The first release locks its files: commit the lock."
    yield f"source: {{uri: {_text(proposal.uri)}{revision}}}"
    if proposal.as_is is not None and proposal.as_is.baseline is not None:
        yield "# Its original at 16 bits, which it is compared with; locked too."
        yield f"baseline: {_text(proposal.as_is.baseline)}"
    yield "# license: of the weights, as `apache-2.0`, for the image's labels and the bill of materials"


def _schemes(proposal: Proposal) -> Iterator[str]:
    yield "# Each scheme is a release line of its own."
    yield "schemes:"
    widest = max(proposal.tensor_parallel.values(), default=1)
    for name, scheme in proposal.choice.schemes.items():
        gpus = proposal.tensor_parallel.get(name, 1)
        own = f", serve: {{tensor_parallel: {gpus}}}" if gpus != widest else ""
        yield f"  # {MEANINGS[name] if proposal.as_is is None else _published(scheme)}"
        yield f"  {name}: {{{_keys(scheme)}{own}}}"
    for name, reason in proposal.choice.left_out.items():
        yield from _comment(f"`{name}` is left out: {reason}", "  ")
    if any(scheme.needs_calibration for scheme in proposal.choice.schemes.values()):
        yield ""
        yield from _comment("Text that comes with Slipway. Text of your own use is better: `{uri: file:TEXT.jsonl}`.")
        yield (
            f"calibration: {{uri: builtin:calibration, samples: {proposal.samples}, max_tokens: {proposal.max_tokens}}}"
        )


def _published(scheme: Scheme) -> str:
    groups = "" if scheme.group_size == -1 else f", groups of {scheme.group_size}"
    return f"As it is published: {scheme.format}, {scheme.bits} bits{groups}"


def _keys(scheme: Scheme) -> str:
    if scheme.method == AS_IS:
        return f"method: {AS_IS}"
    keys = f"method: {scheme.method}, backend: {scheme.backend}"
    return keys + (f", bits: {scheme.bits}" if scheme.method == "gptq" else "") + (
        f", group_size: {scheme.group_size}" if scheme.method in {"awq", "gptq", "w4a16"} else ""
    )  # fmt: skip


def _evals(proposal: Proposal) -> Iterator[str]:
    yield "evals:"
    yield from _comment(
        f"What FP16 and each scheme are asked; it comes with Slipway. Stronger evidence, with downloads and hours: "
        f"`suite: {proposal.suite}` in place of `tasks`.",
        "  ",
    )
    yield "  tasks:"
    yield from _comment(
        f"Where 5% of the answers change, as is usual with 4 bits, {proposal.items:,} items show a loss of "
        f"{100 * proposal.max_drop:g} points with 80% power. A smaller limit needs more items.",
        "    ",
    )
    yield f"    cloze: {{data: builtin:cloze, items: {proposal.items}, kind: choice, max_drop: {proposal.max_drop:g}}}"
    yield from _comment(
        "Bits per byte: with 4 bits the demo (4 million weights) lost 0.3%, SmolLM2-135M 5 to 6%, which this refuses.",
        "    ",
    )
    yield (f"    perplexity: {{data: builtin:heldout, items: {proposal.documents}, kind: text, max_increase: 0.02}}")
    if proposal.shows_images:
        yield from _comment(
            "Questions about images, which see a damaged vision tower. What 240 items show to be lost fails; what they "
            "can't decide does not block.",
            "    ",
        )
        yield f"    {IMAGES}: {{data: builtin:{IMAGES}, tier: supporting, max_drop: 0.05}}"
    if proposal.as_is is not None and proposal.as_is.reason is not None:
        yield "  # There is no 16-bit model to compare with, so that nothing is asked; the reason stands in the report."
        yield f"  accept_inconclusive: {{{NO_BASELINE}: {_text(proposal.as_is.reason)}}}"
    elif not proposal.compares_layers:
        yield "  layers: false # both networks would have to fit into memory"


def _serve(proposal: Proposal) -> Iterator[str]:
    yield f"runtime: {proposal.target.runtime}"
    yield "serve:"
    room = f"{proposal.concurrent} such requests at once fit beside the weights"
    yield f"  context: {proposal.context} # of {proposal.facts.context:,}; {room}"
    if (gpus := max(proposal.tensor_parallel.values(), default=1)) > 1:
        held = ", ".join(f"{name} {count}" for name, count in proposal.tensor_parallel.items())
        yield f"  tensor_parallel: {gpus} # GPUs that hold each: {held}"


def _load(proposal: Proposal) -> Iterator[str]:
    traffic, on_cpu = proposal.traffic, proposal.target.gpu is None
    yield "load:"
    yield "  prompts: builtin:heldout"
    yield f"  profiles: [{traffic.profile}]"
    if traffic.changes:
        yield "  # So few requests that the server keeps up, computed for 40 GFLOP/s and 10 GB/s."
    for key, value in traffic.changes.items():
        yield f"  {key}: {value:g}"
    if proposal.is_alone:
        yield "  # What the model must answer before traffic is sent: a guess, so ask it, and correct this."
        yield '  canary: {prompt: "The capital of France is", expect: " Paris"}'
    else:
        yield from _comment(
            "No canary: the first release takes a token that FP16 prefers clearly, and writes it to the lock.", "  "
        )
    how = (
        "ten times what such a request takes at 40 GFLOP/s and 10 GB/s"
        if on_cpu
        else "three times what an answer of 400 tokens takes at the memory's bandwidth"
    )
    yield from _comment(f"The latency is {how}: not measured. Set what your users need.", "  ")
    yield f"  slo: {{{', '.join(f'{name}: {value:g}' for name, value in traffic.slo.items())}}}"
    if proposal.start_timeout_s is not None:
        yield f"  start_timeout_s: {proposal.start_timeout_s} # {size(proposal.fp16.bytes)} are loaded"
    why = "weights, cache and runtime, and a third more" if on_cpu else "the container's; not measured on a GPU"
    yield f"  memory: {{limit_bytes: {proposal.memory_bytes // _GIB}GiB, headroom: 0.2}} # {why}"


def _comment(text: str, indent: str = "") -> Iterator[str]:
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    for line in textwrap.wrap(whole, _WIDTH - len(indent) - 2, break_on_hyphens=False):
        yield f"{indent}# {line}".replace("\0", " ")


def _text(value: str) -> str:
    """A value as YAML reads it: quoted where it must be."""
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)

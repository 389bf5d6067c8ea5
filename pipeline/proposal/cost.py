"""What a first release is expected to take, each figure with what it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import BaseModel, ConfigDict

from evals.load.traffic.profile import read_profile
from pipeline.planner.document import PlannedEvaluation
from pipeline.planner.plan import Plan
from pipeline.planner.weights import FP16
from pipeline.proposal.propose import CPU_FLOPS, Proposal

# GPTQ of SmolLM2-135M with 4,096 tokens on two cores.
_CPU_SECONDS, _CPU_WEIGHTS, _CPU_TOKENS = 160, 135e6, 4096
# llm-compressor's published times for 8 billion weights on an A100.
_GPU_CALIBRATED_S, _GPU_DATA_FREE_S, _GPU_WEIGHTS = 1800, 60, 8e9
# The share of a GPU's peak that prompts reach, assumed; and the start of a server.
_GPU_SHARE, _GPU_START_S, _CPU_START_S = 0.3, 180, 60


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Expected(_Part):
    """One line of the estimate: what is taken, about how much, and what that rests on."""

    what: str
    amount: str
    basis: str


class ProposedFile(_Part):
    """What ``slipway init --json`` prints: where the file is, None in a dry run, its text, and what a release takes."""

    model: str
    path: str | None
    text: str
    schemes: tuple[str, ...]
    left_out: Mapping[str, str]
    expected: tuple[Expected, ...]


def estimate(proposal: Proposal, plan: Plan, evaluation: PlannedEvaluation) -> Iterator[Expected]:
    """Yield downloads, disk, minutes and GPU hours of the first release of all schemes."""
    tools = "the source; what `slipway doctor` lists as missing comes on top"
    yield Expected(what="download", amount=size(plan.download_bytes), basis=tools)
    yield Expected(what="disk", amount=size(plan.disk_bytes), basis="the source, and each checkpoint three times")
    steps = {
        "quantize": sum(_quantizing(proposal, name) for name in proposal.choice.schemes),
        "evaluate": _evaluating(proposal, plan, evaluation),
        "load test": _loading(proposal),
    }
    bases = _on_gpu() if proposal.target.gpu is not None else _on_cpu()
    for name, seconds in steps.items():
        yield Expected(what=name, amount=_minutes(seconds), basis=bases[name])
    gpus = max(proposal.tensor_parallel.values(), default=0)
    if gpus:
        hours = sum(steps.values()) / 3600
        basis = f"the above, on {gpus} {proposal.target.name}"
        yield Expected(what="GPU hours", amount=f"{hours * gpus:,.1f}", basis=basis)


def _on_cpu() -> dict[str, str]:
    return {
        "quantize": "160 s were measured for 135 million weights and 4,096 tokens on two cores",
        "evaluate": "by 40 GFLOP/s on two cores",
        "load test": "the profile's time and the start of a server",
    }


def _on_gpu() -> dict[str, str]:
    return {
        "quantize": "published for 8 billion weights on an A100: 30 min, FP8 1 min",
        "evaluate": "30% of the GPUs' arithmetic, assumed, and starts of servers",
        "load test": "the profile's time and the start of a server",
    }


def _quantizing(proposal: Proposal, name: str) -> float:
    if proposal.as_is is not None:
        return 0
    numbers, scheme = proposal.fp16.numbers, proposal.choice.schemes[name]
    if proposal.target.gpu is not None:
        return (_GPU_CALIBRATED_S if scheme.needs_calibration else _GPU_DATA_FREE_S) * numbers / _GPU_WEIGHTS
    if not scheme.needs_calibration:
        return numbers / _CPU_WEIGHTS
    return _CPU_SECONDS * numbers / _CPU_WEIGHTS * proposal.samples * proposal.max_tokens / _CPU_TOKENS


def _evaluating(proposal: Proposal, plan: Plan, evaluation: PlannedEvaluation) -> float:
    if proposal.is_alone:
        return 0
    models = 1 + len(proposal.choice.schemes)
    if proposal.target.gpu is None:
        return models * (evaluation.tokens * 2 * proposal.active / CPU_FLOPS + _CPU_START_S)
    (fp16,) = (scheme.placements[0] for scheme in plan.schemes if scheme.weights.scheme == FP16)
    return models * (evaluation.tokens / (_GPU_SHARE * fp16.speed.prompt) + _GPU_START_S)


def _loading(proposal: Proposal) -> float:
    seconds = proposal.traffic.changes.get("seconds", read_profile(proposal.traffic.profile).seconds)
    start = _CPU_START_S if proposal.target.gpu is None else _GPU_START_S
    return len(proposal.choice.schemes) * (seconds + start)


def _minutes(seconds: float) -> str:
    if seconds < 60:
        return "under 1 min"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def size(value: int) -> str:
    """Bytes in the units of a plan."""
    return f"{value / 1e9:,.1f} GB" if value >= 1e9 else f"{value / 1e6:,.0f} MB"

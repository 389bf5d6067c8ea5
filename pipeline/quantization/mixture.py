"""Mixed precision under a budget: which layers share a format, what each may be, and the choice of least loss.

A worker measures what each format would lose in each group (`quantizers/sensitivity.py` has the formula), the choice is
made here, and when the checkpoint is finished the worker measures what it did lose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from evals.drift.mixture import UNQUANTIZED, FormatCost, MixedGroup, Mixture
from pipeline.compatibility.description import ModelDescription, Role, in_layer, layer_of
from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.compatibility.scheme import Method, Scheme
from pipeline.errors import QuantizeError, WorkerFailed
from pipeline.quantization.assignment import (
    Assignment,
    Option,
    Options,
    solve_exactly,
    solve_greedily,
    total_bytes,
    total_loss,
)
from pipeline.quantization.formats.table import layer_format
from registry.errors import first_problem
from registry.progress import Progress

SCRIPT = Path(__file__).parent / "quantizers" / "sensitivity.py"
# Layers that vLLM 0.32 loads into one (``packed_modules_mapping`` of its models).
_FUSED: Mapping[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
}
_EXPERTS = re.compile(r"(?<=\.experts)\..*$")

Result = TypeVar("Result", bound=BaseModel)

# Runs the worker: its script, request and the name of a folder of its own → its result.
Ask = Callable[[Mapping[str, object], str], Mapping[str, object]]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share a format, and the bytes that they take in each that they can have."""

    layers: tuple[str, ...]
    weights: int
    bytes: Mapping[str, int]


class FormatSettings(TypedDict):
    """A format, as a worker is told of it."""

    method: Method
    bits: int
    group_size: int


class FormatOfLayers(FormatSettings):
    """A format, and the layers that have it."""

    layers: list[str]


class SensitivityRequest(TypedDict):
    """The request to the worker: to predict each format's losses, or to measure those of a finished checkpoint."""

    source: Path | str
    checkpoint: Path | str | None
    calibration: str
    texts: tuple[str | list[dict[str, str]], ...]
    chat_template: str | None
    max_tokens: int
    seed: int
    groups: Mapping[str, Sequence[str]]
    formats: Mapping[str, FormatSettings]


class _Predicted(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    losses: Mapping[str, Mapping[str, float]]


class _Measured(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    losses: Mapping[str, float]
    total: float


def groups_of(model: ModelDescription, scheme: Scheme) -> dict[str, LayerGroup]:
    """The decoder's linear layers by what the engine fuses, in the network's order."""
    named: dict[str, list[str]] = {}
    for name in sorted(model.linears, key=_in_order):
        named.setdefault(_group_of(name, model.roles[f"{name}.weight"]), []).append(name)
    return {
        group: LayerGroup(
            tuple(layers),
            sum(math.prod(model.linears[name].shape) for name in layers),
            _sizes([model.linears[name] for name in layers], scheme),
        )
        for group, layers in named.items()
    }


def allowed_bytes(model: ModelDescription, scheme: Scheme) -> int:
    """What the decoder's linear layers may take by the scheme's budget."""
    weights = sum(math.prod(tensor.shape) for tensor in model.linears.values())
    if scheme.budget is None:
        raise ValueError("a mixture has a budget")
    if scheme.budget.bytes is None:
        return math.floor((scheme.budget.bits_per_weight or 0) * weights / 8)
    rest = sum(t.bytes for name, t in model.tensors.items() if name.removesuffix(".weight") not in model.linears)
    return int(scheme.budget.bytes) - rest


def find_problems(model: ModelDescription, scheme: Scheme) -> list[str]:
    """Why a mixture can't be made: a budget that nothing fits. Empty for other schemes."""
    if scheme.budget is None:
        return []
    allowed = allowed_bytes(model, scheme)
    groups = groups_of(model, scheme)
    if sum(group.bytes[UNQUANTIZED] for group in groups.values()) <= allowed:
        return [f"`budget` is {scheme.budget}, which the model fits as it is: nothing to quantize"]
    least = sum(min(group.bytes.values()) for group in groups.values())
    if least <= allowed:
        return []
    weights = sum(group.weights for group in groups.values())
    rest = 0 if scheme.budget.bytes is None else int(scheme.budget.bytes) - allowed
    smallest = f"`bits_per_weight` {math.ceil(800 * least / weights) / 100:g}" if not rest else f"{least + rest} bytes"
    return [f"`budget` is {scheme.budget}, and the smallest mixture of {', '.join(scheme.formats)} takes {smallest}"]


def assignment_problems(model: ModelDescription, schemes: Mapping[str, Scheme], scheme: Scheme) -> Iterator[str]:
    """Where a checkpoint's layers, each with its own scheme, break the rules of a mixture."""
    for name in sorted(schemes.keys() - model.linears.keys()):
        yield f"config.json: `quantization_config` names `{name}`, which is no linear layer of the decoder"
    for name, group in groups_of(model, scheme).items():
        if len({schemes.get(layer) for layer in group.layers}) > 1:
            yield f"{name} has layers of several formats, which the engine fuses into one"
    size = sum(stored_bytes(weight, schemes.get(name)) for name, weight in model.linears.items())
    if size > (allowed := allowed_bytes(model, scheme)):
        yield f"the linear layers take {size} bytes, and the budget of {scheme.budget} allows {allowed}"


def packed_bytes(model: ModelDescription, scheme: Scheme) -> int:
    """What the decoder's linear layers take in a scheme; in a mixture at most."""
    if scheme.method == "mixed":
        kept = sum(weight.bytes for weight in model.linears.values())
        return min(allowed_bytes(model, scheme), kept)
    return sum(stored_bytes(weight, scheme) for weight in model.linears.values())


def stored_bytes(weight: Tensor, scheme: Scheme | None) -> int:
    """What a layer takes in a scheme; without one what it takes in the source."""
    if scheme is None:
        return weight.bytes
    return sum(stored.bytes for stored in layer_format(scheme).layout(weight, scheme).values())


@dataclass(frozen=True)
class ChosenMixture:
    """An assignment, with what it was chosen from."""

    scheme: Scheme
    groups: Mapping[str, LayerGroup]
    options: Options
    chosen: Assignment
    budget: int

    @cached_property
    def formats(self) -> list[FormatOfLayers]:
        """For the quantizer's worker: each format that occurs, with its layers."""
        found: dict[str, list[str]] = {}
        for group, name in self.chosen.items():
            if name != UNQUANTIZED:
                found.setdefault(name, []).extend(self.groups[group].layers)
        schemes = self.scheme.mixed_schemes
        return [{**_settings(schemes[name]), "layers": sorted(found[name])} for name in schemes if name in found]

    @property
    def unquantized(self) -> list[str]:
        """The layers that stay at 16 bits."""
        kept = [group for group, name in self.chosen.items() if name == UNQUANTIZED]
        return [layer for group in kept for layer in self.groups[group].layers]

    def evidence(self, measured: Mapping[str, float], total: float) -> Mixture:
        """The document, with what the finished checkpoint was measured to lose."""
        return Mixture(
            budget_bytes=self.budget,
            bytes=total_bytes(self.options, self.chosen),
            predicted=total_loss(self.options, self.chosen),
            greedy=total_loss(self.options, solve_greedily(self.options, self.budget)),
            measured=total,
            groups={
                name: MixedGroup(
                    layers=group.layers,
                    weights=group.weights,
                    chosen=self.chosen[name],
                    formats={
                        key: FormatCost(bytes=one.bytes, loss=one.loss) for key, one in self.options[name].items()
                    },
                    measured=measured[name],
                )
                for name, group in self.groups.items()
            },
        )


def choose(
    model: ModelDescription, scheme: Scheme, request: SensitivityRequest, ask: Ask, progress: Progress
) -> ChosenMixture:
    """Have every format's losses measured, and choose the assignment of least loss that fits the budget.

    Raises:
        QuantizeError: nothing fits.
        WorkerFailed: the worker's result is not valid.
    """
    if problems := find_problems(model, scheme):
        raise QuantizeError("; ".join(problems))
    groups = groups_of(model, scheme)
    request = {
        **request,
        "groups": {name: group.layers for name, group in groups.items()},
        "formats": {name: _settings(each) for name, each in scheme.mixed_schemes.items()},
    }
    progress(f"measuring {len(groups)} groups of layers in {len(scheme.mixed_schemes)} formats")
    losses = _valid(_Predicted, ask(request, "sensitivity")).losses
    options = {
        name: {
            key: Option(size, 0.0 if key == UNQUANTIZED else _known(losses, name, key))
            for key, size in group.bytes.items()
        }
        for name, group in groups.items()
    }
    budget = allowed_bytes(model, scheme)
    chosen = solve_exactly(options, budget)
    found = ChosenMixture(scheme, groups, options, chosen, budget)
    progress(f"chosen: {_counted(chosen)}; predicted loss {total_loss(options, chosen):.5f} nats a token")
    return found


def measure(
    found: ChosenMixture, request: SensitivityRequest, checkpoint: Path, ask: Ask, progress: Progress
) -> Mixture:
    """Have the losses of a finished checkpoint measured, of each group and of all together.

    Raises:
        WorkerFailed: the worker's result is not valid.
    """
    request = {
        **request,
        "checkpoint": checkpoint.absolute(),
        "groups": {name: each.layers for name, each in found.groups.items() if found.chosen[name] != UNQUANTIZED},
    }
    measured = _valid(_Measured, ask(request, "measured"))
    progress(f"measured loss: {measured.total:.5f} nats a token")
    losses = {name: measured.losses.get(name, 0.0) for name in found.groups}
    return found.evidence(losses, measured.total)


def _group_of(name: str, role: Role) -> str:
    """The group of a layer: what the engine fuses, all experts of a layer, all parts of linear attention."""
    if role == Role.EXPERT:
        return _EXPERTS.sub("", name)
    module, _, last = name.rpartition(".")
    if role == Role.STATE:
        return module
    return f"{module}.{_FUSED.get(last, last)}"


def _in_order(name: str) -> tuple[int, str]:
    number = layer_of(name).rpartition(".")[2]
    return (int(number) if number.isdecimal() else 0, in_layer(name))


def _sizes(weights: Sequence[Tensor], scheme: Scheme) -> dict[str, int]:
    """Bytes by format, of those that all the layers can have."""
    found = {UNQUANTIZED: sum(weight.bytes for weight in weights)}
    for name, own in scheme.mixed_schemes.items():
        group = max(own.group_size, 32 // own.bits)  # packed words hold whole numbers of weights
        if own.group_size == -1 or all(weight.shape[1] % group == 0 for weight in weights):
            found[name] = sum(stored_bytes(weight, own) for weight in weights)
    return found


def _settings(scheme: Scheme) -> FormatSettings:
    return FormatSettings(method=scheme.method, bits=scheme.bits, group_size=scheme.group_size)


def _known(losses: Mapping[str, Mapping[str, float]], group: str, name: str) -> float:
    try:
        return losses[group][name]
    except KeyError as error:
        raise WorkerFailed(f"the worker measured no loss of {group} in {name}: no token reached its layers") from error


def _counted(chosen: Assignment) -> str:
    names = sorted(set(chosen.values()))
    return ", ".join(f"{list(chosen.values()).count(name)} groups in {name}" for name in names)


def _valid(kind: type[Result], written: Mapping[str, object]) -> Result:
    try:
        return kind.model_validate(written)
    except ValidationError as error:
        raise WorkerFailed(f"the worker wrote a result that is not valid: {first_problem(error)}") from error

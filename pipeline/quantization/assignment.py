"""Chooses an option for each group of layers, with the least loss of all that fit: exactly, and greedily to compare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """What a group costs in one format."""

    bytes: int
    loss: float


# By group and format.
Options = Mapping[str, Mapping[str, Option]]
Assignment = Mapping[str, str]


class NothingFits(ValueError):
    """Even the smallest options together are larger than the budget; ``least`` is what they take."""

    def __init__(self, least: int, budget: int) -> None:
        super().__init__(f"the smallest formats take {least} bytes, and the budget is {budget}")
        self.least = least


def total_bytes(options: Options, chosen: Assignment) -> int:
    """What an assignment takes."""
    return sum(options[group][name].bytes for group, name in chosen.items())


def total_loss(options: Options, chosen: Assignment) -> float:
    """What an assignment is predicted to lose: the sum over its groups."""
    return math.fsum(options[group][name].loss for group, name in chosen.items())


def solve_exactly(options: Options, budget: int) -> Assignment:
    """The assignment of least loss that fits, by branch and bound (HiGHS).

    Minimizes sum x[g, f] loss[g, f] over x in {0, 1} with sum over f of x[g, f] = 1 and sum x[g, f] bytes[g, f] <=
    budget: a knapsack with choices (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11).

    Raises:
        NothingFits: no assignment fits.
    """
    import numpy as np  # noqa: PLC0415 - scipy is slow to import, and few schemes need it
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415
    from scipy.sparse import csr_array  # noqa: PLC0415

    _require_fit(options, budget)
    pairs = [(group, name) for group, each in options.items() for name in each]
    losses = np.array([options[group][name].loss for group, name in pairs])
    # In units that divide all sizes, so that no rounding of the solver's counts for a byte.
    unit = math.gcd(*(option.bytes for each in options.values() for option in each.values()))
    sizes = np.array([options[group][name].bytes // unit for group, name in pairs], float)
    rows = {group: row for row, group in enumerate(options)}
    one_each = csr_array((np.ones(len(pairs)), ([rows[group] for group, _ in pairs], range(len(pairs)))))
    found = milp(
        losses / (losses.max() or 1.0),
        integrality=np.ones(len(pairs), np.int64),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None, :], -np.inf, budget // unit)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"the solver gave no assignment: {found.message}")
    return {group: name for (group, name), chosen in zip(pairs, found.x, strict=True) if chosen > 0.5}


def solve_greedily(options: Options, budget: int) -> Assignment:
    """From the smallest options, again and again the change that saves the most loss for each byte and still fits.

    Raises:
        NothingFits: no assignment fits.
    """
    _require_fit(options, budget)
    chosen = {group: min(each, key=lambda name: (each[name].bytes, each[name].loss)) for group, each in options.items()}
    left = budget - total_bytes(options, chosen)
    while True:
        steps = [
            (own.loss - option.loss, option.bytes - own.bytes, group, name)
            for group, each in options.items()
            for own in [each[chosen[group]]]
            for name, option in each.items()
            if option.loss < own.loss and option.bytes - own.bytes <= left
        ]
        if not steps:
            return chosen
        _, more, group, name = max(steps, key=lambda step: step[0] / max(1, step[1]))
        chosen[group] = name
        left -= more


def _require_fit(options: Options, budget: int) -> None:
    least = sum(min(option.bytes for option in each.values()) for each in options.values())
    if least > budget:
        raise NothingFits(least, budget)

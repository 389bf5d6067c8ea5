"""How many calibration tokens reached each expert, and how many samples would be enough.

GPTQ and AWQ fit an expert to the tokens that the router sent to it: one that few reached is rounded almost blindly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.errors import QuantizeError
from registry.progress import Progress

# Tokens that each expert of a module got, by the module's name.
ExpertTokens = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LeastUsed:
    """Experts that fewer than ``wanted`` tokens reached: how many of ``experts``, and the one with the fewest."""

    few: int
    experts: int
    module: str
    number: int
    tokens: int
    wanted: int

    def enough(self, samples: int) -> str:
        """How many samples would be enough, if more text is like the ``samples`` that there were."""
        if not self.tokens:
            return f"none of {samples} samples reached it, so use other text or many more `calibration.samples`"
        needed = math.ceil(samples * self.wanted / self.tokens)
        return f"about {needed} `calibration.samples` like these {samples} would be enough"


def least_used(tokens: ExpertTokens, wanted: int) -> LeastUsed | None:
    """Find the experts that fewer than ``wanted`` tokens reached; None if there is none."""
    everything = list(_all(tokens))
    few = [found for found in everything if found[0] < wanted]
    if not few:
        return None
    least, module, number = min(few)
    return LeastUsed(len(few), len(everything), module, number, least, wanted)


def check(
    tokens: ExpertTokens, samples: int, wanted: int | None, progress: Progress, *, has_experts: bool = False
) -> None:
    """Say how many tokens reached the experts, and refuse fewer than ``wanted``; None only warns of none at all.

    Raises:
        QuantizeError: an expert got fewer tokens; it says how many samples would be enough. Or the model has experts,
            and none was counted.
    """
    if not tokens:
        if wanted is not None and has_experts:
            raise QuantizeError(
                f"`calibration.min_expert_tokens` is {wanted}, but the backend counted no tokens of this model's "
                "experts: remove the key, or use another backend"
            )
        return
    counts = [count for count, _, _ in _all(tokens)]
    progress(f"experts: {len(counts)} in {len(tokens)} layers, reached by {min(counts)} to {max(counts)} tokens each")
    found = least_used(tokens, wanted or 1)
    if found is None:
        return
    said = (
        f"{found.few} of {found.experts} experts were reached by fewer than {found.wanted} calibration tokens, "
        f"`{found.module}.{found.number}` by {found.tokens}: {found.enough(samples)}"
    )
    if wanted is not None:
        raise QuantizeError(f"`calibration.min_expert_tokens` is {wanted}, but {said}")
    progress(f"warning: {said}")


def _all(tokens: ExpertTokens) -> Iterator[tuple[int, str, int]]:
    for module, counts in tokens.items():
        for number, count in enumerate(counts):
            yield count, module, number

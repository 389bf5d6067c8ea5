"""The drift gate's findings as metrics and in words: the change, its interval, and the items that would decide."""

from __future__ import annotations

import math

from evals.drift.pairs import ChoicePairs, TextPairs, counted
from evals.statistics import paired
from evals.statistics.paired import Flips, Loss
from evals.statistics.resampling import drop_bootstrap, ratio_bootstrap


def accuracy_metrics(pairs: ChoicePairs, loss: Loss, confidence: float) -> dict[str, float]:
    """Return the metrics of a graded task: accuracies, intervals, flips, the noise floor."""
    flips = Flips(pairs.items, len(pairs.lost_ids), len(pairs.gained_ids))
    resampled = drop_bootstrap(counted(pairs), confidence)
    floor = {}
    if pairs.again is not None and pairs.again.items:
        floor = {
            "floor_items": float(pairs.again.items),
            "floor_flip_rate": pairs.again.flips / pairs.again.items,
            "floor_flip_rate_upper": paired.share_interval(pairs.again.flips, pairs.again.items, confidence).upper,
            "floor_nats": pairs.again.largest,
        }
    return {
        "items": float(pairs.items),
        "baseline_accuracy": pairs.baseline_right / pairs.items,
        "candidate_accuracy": pairs.candidate_right / pairs.items,
        "drop": loss.interval.estimate,
        "drop_lower": loss.interval.lower,
        "drop_upper": loss.interval.upper,
        "drop_bootstrap_lower": resampled.lower,
        "drop_bootstrap_upper": resampled.upper,
        "lost": float(flips.lost),
        "gained": float(flips.gained),
        "flip_rate": flips.rate,
        "changed": float(pairs.changed),
        "groups": float(max(1, len(pairs.groups))),
        "mcnemar_p": paired.mcnemar_worse(flips),
        "within_p": loss.within,
        "beyond_p": loss.beyond,
        "detectable_drop": paired.detectable_drop(flips.rate, pairs.items, confidence),
        **({} if pairs.length_ratio is None else {"length_ratio": pairs.length_ratio}),
        **floor,
    }


def likelihood_metrics(pairs: TextPairs, loss: Loss, confidence: float) -> dict[str, float]:
    """Return the metrics of a likelihood task: bits per byte, and intervals of their increase."""
    baseline = [document.baseline_nats for document in pairs.documents]
    candidate = [document.candidate_nats for document in pairs.documents]
    bits = math.log(2) * sum(document.bytes for document in pairs.documents)
    resampled = ratio_bootstrap(baseline, candidate, confidence)
    return {
        "items": float(len(pairs.documents)),
        "baseline_bits_per_byte": sum(baseline) / bits,
        "candidate_bits_per_byte": sum(candidate) / bits,
        "increase": loss.interval.estimate,
        "increase_lower": loss.interval.lower,
        "increase_upper": loss.interval.upper,
        "increase_bootstrap_lower": resampled.lower - 1,
        "increase_bootstrap_upper": resampled.upper - 1,
        "within_p": loss.within,
        "beyond_p": loss.beyond,
    }


def accuracy_words(name: str, pairs: ChoicePairs, loss: Loss, limit: float, confidence: float) -> str:
    """Describe the result of a graded task, without the verdict."""
    moved = 100 * loss.interval.estimate
    what = "did not change" if moved == 0 else f"{'fell' if moved > 0 else 'rose'} {abs(moved):.2f} pp"
    flips = f"{len(pairs.lost_ids)} lost and {len(pairs.gained_ids)} gained of {pairs.items:,}"
    return f"accuracy on `{name}` {what} ({flips}), {_bounds(loss, limit, confidence, 'pp')}"


def likelihood_words(name: str, pairs: TextPairs, loss: Loss, limit: float, confidence: float) -> str:
    """Describe the result of a likelihood task, without the verdict."""
    moved = 100 * loss.interval.estimate
    what = "did not change" if moved == 0 else f"{'rose' if moved > 0 else 'fell'} {abs(moved):.2f}%"
    where = f"over {len(pairs.documents):,} documents"
    return f"bits per byte on `{name}` {what} {where}, {_bounds(loss, limit, confidence, '%')}"


def _bounds(loss: Loss, limit: float, confidence: float, unit: str) -> str:
    """State the upper bound of a loss, or its lower bound if even that is beyond the limit."""
    space = "" if unit == "%" else " "
    surely = loss.interval.lower > limit
    bound = f"at {'least' if surely else 'most'} {100 * (loss.interval.lower if surely else loss.interval.upper):.2f}"
    return f"{bound}{space}{unit} with {100 * confidence:g}% confidence; {100 * limit:.2f}{space}{unit} is allowed"


def remedy(loss: Loss, limit: float, items: int) -> str:
    """Say how many items would decide if the estimate stays: an interval narrows with the root of their number."""
    margin = abs(limit - loss.interval.estimate)
    half = max(loss.interval.upper - loss.interval.estimate, loss.interval.estimate - loss.interval.lower)
    if margin == 0:
        return "; no number of items would decide: the estimate equals the limit"
    more = math.ceil(items * (half / margin) ** 2) - items
    return f"; {max(more, 1):,} more items would decide"

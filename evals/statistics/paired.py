"""Paired statistics: two models answered the same items; how much worse may the second be?

Everything here is a pure function of counts or arrays. Nothing is rounded. Intervals are two-sided; a one-sided
question is answered by reading one end of an interval (so 0.95 leaves 0.025 beyond the end that is read).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # not `stats`, which takes a second to import and asks `special` in the end

CONTINUITY = 0.5  # items
_TOLERANCE = 1e-12
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its confidence interval, in the estimate's own unit."""

    estimate: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Loss:
    """What was lost, and how surely that is on either side of a limit.

    ``within`` is the p-value against "the loss is the limit or more": small where the loss is surely less. ``beyond``
    is the p-value against "the loss is the limit or less": small where it is surely more.
    """

    interval: Interval
    within: float
    beyond: float


@dataclass(frozen=True)
class Flips:
    """How right and wrong answers moved between two models over the same ``items``.

    ``lost`` were right and became wrong, ``gained`` were wrong and became right. The difference of the two accuracies
    sees only ``lost - gained``; the flips say how much changed beneath it (arXiv 2407.09141).
    """

    items: int
    lost: int
    gained: int

    def __post_init__(self) -> None:
        """Refuse counts that no set of items can give."""
        if min(self.items, self.lost, self.gained) < 0 or self.lost + self.gained > self.items:
            raise ValueError(f"{self.lost} lost and {self.gained} gained don't fit into {self.items} items")

    @property
    def drop(self) -> float:
        """Accuracy of the first model less that of the second, absolute; NaN over no items."""
        return (self.lost - self.gained) / self.items if self.items else math.nan

    @property
    def rate(self) -> float:
        """The share of items that flipped, either way; NaN over no items."""
        return (self.lost + self.gained) / self.items if self.items else math.nan


def mcnemar_worse(flips: Flips) -> float:
    """Return the exact one-sided McNemar p-value of "the second model loses more items than it gains".

    Under the null each of the flipped items was lost with probability one half, so the value is
    P(X >= lost), X ~ Binomial(lost + gained, 1/2). Without a flip it is 1. (McNemar, Psychometrika 12, 1947.)
    """
    return float(special.bdtrc(flips.lost - 1, flips.lost + flips.gained, 0.5))


def drop_interval(flips: Flips, confidence: float, correction: float = 0.0) -> Interval:
    """Return the paired interval of the drop in accuracy (first less second, absolute).

    Tango's score interval for a difference of paired proportions (Statistics in Medicine 17:891-908, 1998). Unlike
    the Wald interval it keeps a width where nothing flipped, and its coverage holds with few flips. ``correction``
    widens both ends, see `drop_score`.

    Raises:
        ValueError: without items, or with a confidence outside (0, 1).
    """
    if flips.items == 0:
        raise ValueError("a drop in accuracy needs at least one item that both models answered")
    z = _quantile(confidence)
    return Interval(flips.drop, _tango_end(flips, z, -correction), _tango_end(flips, -z, correction))


def drop_score(
    items: ArrayLike, lost: ArrayLike, gained: ArrayLike, delta: ArrayLike, correction: float = 0.0
) -> Floats:
    """Return Tango's score statistic for the true drop ``delta``; all arguments broadcast.

    (lost - gained - n delta) / sqrt(n (2 q + delta (1 - delta))), with q the most likely probability of a gain when the
    drop is held at delta: the larger root of 2n q^2 + B q - gained delta (1 - delta) = 0. Standard normal, to first
    order, when delta is the truth.
    """
    n, lose, gain, held = (np.asarray(value, dtype=np.float64) for value in (items, lost, gained, delta))
    linear = -lose - gain + (2 * n - lose + gain) * held
    constant = -gain * held * (1 - held)
    likely = (np.sqrt(np.maximum(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
    variance = n * (2 * likely + held * (1 - held))
    difference = lose - gain - n * held + correction
    with np.errstate(divide="ignore", invalid="ignore"):
        score = difference / np.sqrt(np.maximum(variance, 0.0))
    return np.where(variance > 0.0, score, np.where(difference == 0.0, 0.0, np.copysign(np.inf, difference)))


def drop_loss(flips: Flips, limit: float, confidence: float) -> Loss:
    """Return the drop in accuracy with Tango's interval, and its score test against ``limit`` on both sides.

    Corrected for continuity: without it, five flips in 200 items raise false alarms at twice the stated rate.
    """
    counts = flips.items, flips.lost, flips.gained
    within = float(special.ndtr(drop_score(*counts, limit, CONTINUITY)))
    beyond = float(special.ndtr(-drop_score(*counts, limit, -CONTINUITY)))
    return Loss(drop_interval(flips, confidence, CONTINUITY), within, beyond)


def clustered_drop_loss(groups: Sequence[Flips], limit: float, confidence: float) -> Loss:
    """Return the drop in accuracy over items that come in groups (mmlu's subjects), which may move together.

    The ratio estimator over groups with Student's t on their number less one (Cochran, 6.19-6.20; the cluster-robust
    error that Miller, arXiv 2411.00640, asks for). Each end and each p-value is the more cautious of this and of
    Tango's over the pooled items, so that a few groups which happen to agree promise nothing.

    Raises:
        ValueError: without items.
    """
    pooled = Flips(*(sum(getattr(group, name) for group in groups) for name in ("items", "lost", "gained")))
    plain = drop_loss(pooled, limit, confidence)
    if len(groups) < 2:
        return plain
    moved = np.array([group.lost - group.gained for group in groups], dtype=np.float64)
    sizes = np.array([group.items for group in groups], dtype=np.float64)
    error = _ratio_error(moved, sizes, pooled.drop)
    clustered = _student(pooled.drop, error, len(groups) - 1, limit, confidence)
    interval = Interval(
        pooled.drop,
        min(plain.interval.lower, clustered.interval.lower),
        max(plain.interval.upper, clustered.interval.upper),
    )
    return Loss(interval, max(plain.within, clustered.within), max(plain.beyond, clustered.beyond))


def increase_loss(baseline: Sequence[float], candidate: Sequence[float], limit: float, confidence: float) -> Loss:
    """Return the relative increase of sum(candidate) over sum(baseline) (0.01 is one percent), against ``limit``.

    See `ratio_interval`, whose errors it raises.
    """
    ratio = ratio_interval(baseline, candidate, confidence)
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    error = _ratio_error(second, first, ratio.estimate)
    return _student(ratio.estimate - 1, error, first.size - 1, limit, confidence)


def mean_loss(totals: Sequence[float], sizes: Sequence[int], limit: float, confidence: float) -> Loss:
    """Return the mean of a loss over positions that come in documents (sum and number of each), against ``limit``.

    Raises:
        ValueError: with fewer than two documents or without positions.
    """
    sums, counts = np.asarray(totals, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if sums.size < 2 or counts.sum() <= 0:
        raise ValueError("a mean over positions needs at least two documents that have some")
    mean = float(sums.sum() / counts.sum())
    return _student(mean, _ratio_error(sums, counts, mean), sums.size - 1, limit, confidence)


def ratio_interval(baseline: Sequence[float], candidate: Sequence[float], confidence: float) -> Interval:
    """Return the paired interval of sum(candidate) / sum(baseline) over documents.

    With both in nats per document, the ratio is that of bits per byte (the bytes are the same and cancel): 1.01 is one
    percent worse. The ratio estimator's linearised standard error over documents, with Student's t (Cochran, Sampling
    Techniques, 3rd ed., 6.19-6.20): se = sqrt(n / (n - 1) * sum((c - r b)^2)) / sum(b).

    Raises:
        ValueError: if the lengths differ, with fewer than two documents, a value that is not finite, or a baseline
            whose sum is not positive.
    """
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"the models answered {first.size} and {second.size} documents; pairs were expected")
    if first.size < 2:
        raise ValueError("an interval over documents needs at least two documents")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a log-likelihood is not finite")
    total = float(first.sum())
    if total <= 0.0:
        raise ValueError("the baseline's negative log-likelihoods must sum to more than zero")
    ratio = float(second.sum()) / total
    half = _student_quantile(first.size - 1, confidence) * _ratio_error(second, first, ratio)
    return Interval(ratio, ratio - half, ratio + half)


def share_interval(successes: int, items: int, confidence: float) -> Interval:
    """Return the exact (Clopper-Pearson) interval of one share, such as a model's accuracy.

    Raises:
        ValueError: without items, or with more successes than items.
    """
    if not 0 <= successes <= items or items == 0:
        raise ValueError(f"expected a share of items, found {successes} of {items}")
    tail = (1 - _checked(confidence)) / 2
    lower = float(special.betaincinv(successes, items - successes + 1, tail)) if successes else 0.0
    upper = float(special.betainccinv(successes + 1, items - successes, tail)) if successes < items else 1.0
    return Interval(successes / items, lower, upper)


def detectable_drop(flip_rate: float, items: int, confidence: float, power: float = 0.8) -> float:
    """Return the smallest true drop in accuracy, absolute, that ``items`` paired items show with this ``power``.

    Connor's normal approximation for paired proportions (Biometrics 43:207-211, 1987), solved for the drop d:
    d = (z_a sqrt(f) + z_b sqrt(f - d^2)) / sqrt(n), f the share of items that flip, z_a at one end of the interval.
    At 10% flips one percentage point takes about 7,850 items at 0.95 and 0.8 (arXiv 2605.28873).
    Infinite without items.
    """
    if items <= 0:
        return math.inf
    alpha, beta = _quantile(confidence), float(special.ndtri(power))
    drop = (alpha + beta) * math.sqrt(flip_rate / items)
    for _ in range(50):
        drop = (alpha * math.sqrt(flip_rate) + beta * math.sqrt(max(flip_rate - drop * drop, 0.0))) / math.sqrt(items)
    return drop


def detectable_shift(spread: float, count: int, confidence: float, power: float = 0.8) -> float:
    """Return the smallest true mean that shows over ``count`` values whose standard deviation is ``spread``."""
    return (_quantile(confidence) + float(special.ndtri(power))) * spread / math.sqrt(count)


def items_to_detect(flip_rate: float, drop: float, confidence: float, power: float = 0.8) -> int:
    """Return how many paired items show a true ``drop`` with this ``power``: see `detectable_drop`."""
    alpha, beta = _quantile(confidence), float(special.ndtri(power))
    rate = max(flip_rate, drop)
    return math.ceil(((alpha * math.sqrt(rate) + beta * math.sqrt(rate - drop * drop)) / drop) ** 2)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return each p-value adjusted for all of them (Holm, Scandinavian Journal of Statistics 6:65-70, 1979).

    What is at most alpha after it may be rejected, and the chance that anything true is rejected stays at most alpha.
    """
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def tail(confidence: float) -> float:
    """Return what a two-sided interval of this confidence leaves beyond each of its ends: the rate of either error."""
    return (1 - _checked(confidence)) / 2


def shared(confidence: float, tests: int) -> float:
    """Return the confidence that each of ``tests`` intervals needs for all to hold at once (Bonferroni)."""
    return 1 - (1 - _checked(confidence)) / max(tests, 1)


def _checked(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"a confidence lies between 0 and 1; {confidence} was given")
    return confidence


def _quantile(confidence: float) -> float:
    """Return the standard normal quantile that a two-sided interval of this confidence reaches to."""
    return float(special.ndtri(0.5 + _checked(confidence) / 2))


def _student_quantile(degrees: int, confidence: float) -> float:
    return float(special.stdtrit(degrees, 0.5 + _checked(confidence) / 2))


def _ratio_error(over: Floats, under: Floats, ratio: float) -> float:
    """Return the linearised standard error of sum(over) / sum(under): sqrt(n / (n - 1) * sum((o - r u)^2)) / sum(u)."""
    count = over.size
    return math.sqrt(count / (count - 1) * float(np.square(over - ratio * under).sum())) / float(under.sum())


def _student(estimate: float, error: float, degrees: int, limit: float, confidence: float) -> Loss:
    half = _student_quantile(degrees, confidence) * error
    interval = Interval(estimate, estimate - half, estimate + half)
    if error == 0.0:
        return Loss(interval, 0.0 if estimate <= limit else 1.0, 0.0 if estimate > limit else 1.0)
    score = (estimate - limit) / error
    return Loss(interval, float(special.stdtr(degrees, score)), float(special.stdtr(degrees, -score)))


def _tango_end(flips: Flips, z: float, correction: float) -> float:
    """Return the difference at which Tango's score statistic equals ``z``: the lower end for z > 0, else the upper."""
    start, stop = (-1.0, flips.drop) if z > 0 else (flips.drop, 1.0)
    # The score falls strictly in delta, from +inf at -1 to -inf at 1, and is about zero at the observed drop.
    while stop - start > _TOLERANCE:
        middle = (start + stop) / 2
        if float(drop_score(flips.items, flips.lost, flips.gained, middle, correction)) > z:
            start = middle
        else:
            stop = middle
    return (start + stop) / 2

"""Resampling beside the formulas: paired bootstraps that assume nothing of the shape of a difference.

The gate decides by the formulas of `evals.statistics.paired`, which keep a width where nothing flipped. These are
shown beside them and held against them by tests; a seed is given, so that the same answers give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evals.statistics.paired import Flips, Floats, Interval

RESAMPLES = 2_000
SEED = 20_261
_CHUNK = 2_000_000  # indices drawn at a time: memory, not time


def drop_bootstrap(
    groups: Sequence[Flips], confidence: float, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """Return the percentile interval of the drop in accuracy from resampled pairs.

    One group resamples items, which is a multinomial draw of lost, gained and the rest; several resample whole groups.

    Raises:
        ValueError: without items.
    """
    items, moved = sum(group.items for group in groups), sum(group.lost - group.gained for group in groups)
    if items == 0:
        raise ValueError("a drop in accuracy needs at least one item that both models answered")
    random = np.random.default_rng(seed)
    if len(groups) == 1:
        (only,) = groups
        shares = np.array([only.lost, only.gained, only.items - only.lost - only.gained]) / only.items
        counts = random.multinomial(only.items, shares, size=resamples)
        drops = (counts[:, 0] - counts[:, 1]) / only.items
    else:
        differences = np.array([group.lost - group.gained for group in groups], dtype=np.float64)
        drops = _resampled(
            differences, np.array([group.items for group in groups], dtype=np.float64), resamples, random
        )
    return _percentiles(moved / items, drops, confidence)


def ratio_bootstrap(
    baseline: Sequence[float],
    candidate: Sequence[float],
    confidence: float,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """Return the percentile interval of sum(candidate) / sum(baseline), documents resampled whole (a block bootstrap).

    A document is the block: what its tokens share stays together. With nats a document this is the ratio of bits a
    byte, and its power of e to the number of tokens the ratio of perplexities.

    Raises:
        ValueError: if the lengths differ, or there are fewer than two documents.
    """
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if first.shape != second.shape or first.size < 2:
        raise ValueError(f"the models answered {first.size} and {second.size} documents; two pairs were expected")
    ratios = _resampled(second, first, resamples, np.random.default_rng(seed))
    return _percentiles(float(second.sum() / first.sum()), ratios, confidence)


def _resampled(over: Floats, under: Floats, resamples: int, random: np.random.Generator) -> Floats:
    """Return sum(over) / sum(under) of as many resamples of the pairs."""
    ratios, step = np.empty(resamples), max(1, _CHUNK // over.size)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = random.integers(0, over.size, size=(rows, over.size))
        ratios[start : start + rows] = over[drawn].sum(axis=1) / under[drawn].sum(axis=1)
    return ratios


def _percentiles(estimate: float, drawn: Floats, confidence: float) -> Interval:
    lower, upper = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(estimate, float(lower), float(upper))

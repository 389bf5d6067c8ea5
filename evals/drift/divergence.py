"""How far two models' next-token distributions are apart over held-out text, from the top of each alone.

Each side keeps its k likeliest tokens a position. What FP16's top holds and the candidate's does not is known only to
be less likely than the candidate's least kept token, and all else is one rest with what mass remains. Of all
distributions that fit this, the nearest is taken: the result is a tight lower bound of KL(FP16 || candidate), never an
overstatement, and it grows without end where the candidate drops what FP16 thought likely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evals.errors import AnswersError
from evals.statistics.paired import Floats

FILE = "top.npz"
BUCKETS = (0, 32, 128, 512, 2048)  # positions in a document: a bucket goes up to the next
_FLOOR = 1e-12  # no probability counts as smaller


@dataclass(frozen=True)
class Top:
    """The likeliest tokens of one model at every position of some documents, likeliest first.

    ``tokens`` and ``log_probabilities`` are positions by k, ``document`` and ``position`` say where each row is.
    """

    tokens: NDArray[np.int64]
    log_probabilities: Floats
    document: NDArray[np.int64]
    position: NDArray[np.int64]


def read_top(folder: Path) -> Top | None:
    """Read what a model answered; None where it was not asked.

    Raises:
        AnswersError: the file is damaged, or a log-probability in it is no finite number.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as found:
            top = Top(
                found["tokens"].astype(np.int64),
                found["log_probabilities"].astype(np.float64),
                found["document"].astype(np.int64),
                found["position"].astype(np.int64),
            )
    except (OSError, ValueError, KeyError) as error:
        raise AnswersError(f"{path} cannot be read ({error}): evaluate the model again") from error
    if not np.isfinite(top.log_probabilities).all():
        raise AnswersError(f"{path} holds a log-probability that is not finite: evaluate the model again")
    return top


def kl(first: Top, second: Top) -> Floats:
    """Return KL(first || second) in nats at each position, as the module says.

    Raises:
        AnswersError: the two were not asked over the same positions.
    """
    if first.document.shape != second.document.shape or not (
        np.array_equal(first.document, second.document) and np.array_equal(first.position, second.position)
    ):
        raise AnswersError("the two models' distributions are of different text: evaluate both again")
    return np.array(
        [
            _nearest(*row)
            for row in zip(
                first.tokens,
                np.exp(first.log_probabilities),
                second.tokens,
                np.exp(second.log_probabilities),
                strict=True,
            )
        ]
    )


def agreement(first: Top, second: Top) -> NDArray[np.bool_]:
    """Return at each position whether both think the same token likeliest."""
    return np.asarray(first.tokens[:, 0] == second.tokens[:, 0])


def by_document(values: Floats, top: Top) -> Sequence[tuple[float, int]]:
    """Return the sum and the number of positions of each document: what an interval is made over."""
    return [
        (float(values[top.document == number].sum()), int((top.document == number).sum()))
        for number in np.unique(top.document)
    ]


def by_bucket(values: Floats, agreed: NDArray[np.bool_], top: Top) -> list[Mapping[str, float]]:
    """Return ``start``, ``positions``, ``mean``, ``p99`` and ``agreement`` of each bucket of positions that has any."""
    found: list[Mapping[str, float]] = []
    for start, end in zip(BUCKETS, [*BUCKETS[1:], np.inf], strict=True):
        inside = (top.position >= start) & (top.position < end)
        if inside.any():
            found.append(
                {
                    "start": float(start),
                    "positions": float(inside.sum()),
                    "mean": float(values[inside].mean()),
                    "p99": float(np.quantile(values[inside], 0.99)),
                    "agreement": float(agreed[inside].mean()),
                }
            )
    return found


def _nearest(ours: NDArray[np.int64], p: Floats, theirs: NDArray[np.int64], q: Floats) -> float:
    """Return the least KL of all pairs of distributions that have these tops."""
    known = dict(zip(theirs.tolist(), q.tolist(), strict=True))
    both = np.array([known.pop(token, -1.0) for token in ours.tolist()])
    shared = both >= 0
    exact = float((p[shared] * np.log(p[shared] / np.maximum(both[shared], _FLOOR))).sum())
    rest, elsewhere = max(0.0, 1.0 - float(p.sum())), sum(known.values())
    left, most = max(_FLOOR, 1.0 - float(q.sum())), float(q.min())
    cost, poured = _poured(p[~shared], rest, left + elsewhere, most)
    if poured >= elsewhere:
        return exact + cost
    # The candidate's own top among the rest is more than the rest would be given: the rest has that and no more.
    return exact + _poured(p[~shared], 0.0, left, most)[0] + _term(rest, elsewhere)


def _poured(p: Floats, rest: float, mass: float, most: float) -> tuple[float, float]:
    """Return the least sum of p log(p / q) over some tokens and a rest that share a ``mass``, and what the rest has.

    Without a bound q is proportional to p. No token may have more than ``most``: those that would are held there.
    """
    p = np.sort(p)[::-1]
    for held in range(p.size + 1):
        free, remaining = float(p[held:].sum()) + rest, max(_FLOOR, mass - held * most)
        if held == p.size or p[held] * remaining <= most * free:
            break
    capped = sum(_term(float(value), most) for value in p[:held])
    return capped + _term(free, remaining), remaining * rest / free if free > 0 else 0.0


def _term(p: float, q: float) -> float:
    return p * float(np.log(p / max(q, _FLOOR))) if p > 0 else 0.0

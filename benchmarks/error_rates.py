"""How often the drift gate errs, by simulation: writes the picture and prints the table of docs/explanation/drift.md.

    python benchmarks/error_rates.py [--trials 2000]

Each point draws trials of paired answers (items, share that flips, true drop), and judges each as the gate does at 95%
confidence and a margin of one point. The two things compared: the rule as it is against a comparison of two rounded
averages (a drop of at most one point, rounded to one decimal, passes), on the same draws. The ratio printed last is how
many times as often the averages pass a drop of half a point beyond the margin.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evals.report.svg import Axis, Canvas, page_colours
from evals.statistics.paired import CONTINUITY, drop_score, tail
from evals.statistics.sequential import levels, prefixes

MARGIN = 0.01
SIZES, FLIPS = (200, 1000, 5000), (0.02, 0.05, 0.10)
DROPS = tuple(step / 1000 for step in range(-10, 31, 2))
COLOURS = {200: "warn", 1000: "b", 5000: "good"}
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "error_rates.svg"


def draws(items: int, flips: float, drop: float, trials: int, looks: int) -> NDArray[np.int64]:
    """Return the cumulated (lost, gained, neither) at each look of each trial: looks by trials by three."""
    random = np.random.default_rng(round(1e6 * flips) + items)
    shares = np.clip([(flips + drop) / 2, (flips - drop) / 2, 1 - flips], 0, 1)
    fractions = [look / looks for look in range(1, looks + 1)]
    sizes = np.diff([0, *prefixes(items, fractions)])
    return np.cumsum([random.multinomial(size, shares / shares.sum(), size=trials) for size in sizes], axis=0)


def rates(items: int, flips: float, drop: float, trials: int, looks: int = 1) -> tuple[float, float, float]:
    """Return the shares of trials that passed and that failed, and of the items that were asked."""
    counts = draws(items, flips, drop, trials, looks)
    fractions = tuple(look / looks for look in range(1, looks + 1))
    allowed = levels(fractions, tail(0.95)) if looks > 1 else (tail(0.95),)
    passed, failed, asked = (np.zeros(trials) for _ in range(3))
    for level, count, size in zip(allowed, counts, prefixes(items, fractions), strict=True):
        waiting = ~(passed.astype(bool) | failed.astype(bool))
        asked[waiting] = size / items
        lost, gained = count[:, 0], count[:, 1]
        failed[waiting & (special.ndtr(-drop_score(size, lost, gained, MARGIN, -CONTINUITY)) <= level)] = 1
        within = special.ndtr(drop_score(size, lost, gained, MARGIN, CONTINUITY)) <= level
        passed[waiting & within & (failed == 0)] = 1
    return float(passed.mean()), float(failed.mean()), float(asked.mean())


def averages_pass(items: int, flips: float, drop: float, trials: int) -> float:
    """Return how often a comparison of two averages, rounded to a tenth of a point, lets the drop through."""
    counts = draws(items, flips, drop, trials, 1)[-1]
    return float((np.round((counts[:, 0] - counts[:, 1]) / items, 3) <= MARGIN).mean())


def draw(trials: int) -> str:
    """Return both curves of every size and share of flips: how often it passes, and how often it fails."""
    canvas = Canvas("How often the drift gate passes and fails, by the true drop (margin 1 point)", 470, 780)
    for column, flips in enumerate(FLIPS):
        for row, (what, index) in enumerate((("passes", 0), ("fails", 1))):
            across = Axis(100 * DROPS[0], 100 * DROPS[-1], 50 + 250 * column, 250 + 250 * column)
            up = Axis(0, 1, 215 + 215 * row, 45 + 215 * row)
            _frame(canvas, across, up, f"{what}, {flips:.0%} of items flip")
            for items in SIZES:
                line = [(100 * drop, rates(items, flips, drop, trials)[index]) for drop in DROPS if abs(drop) <= flips]
                canvas.line([(across(x), up(y)) for x, y in line], COLOURS[items], width=2)
    canvas.key(50, 16, [(colour, f"{items:,} items") for items, colour in COLOURS.items()])
    canvas.text(400, 16, "across: true drop, points; dashed: margin and stated rate", size=11)
    light, dark = page_colours()
    style = f"<style>svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return canvas.svg().replace("<title>", f"{style}<title>", 1)


def _frame(canvas: Canvas, across: Axis, up: Axis, words: str) -> None:
    canvas.text(across.start, up.end - 8, words, "ink", size=12)
    for value in (0.0, 0.5, 1.0):
        canvas.line([(across.start, up(value)), (across.end, up(value))], "grid", width=0.6)
        canvas.text(across.start - 6, up(value) + 4, f"{value:.0%}", anchor="end", size=11)
    canvas.line([(across.start, up(0.025)), (across.end, up(0.025))], "bad", width=0.8, dash="2 3")
    canvas.line([(across(100 * MARGIN), up.start), (across(100 * MARGIN), up.end)], "bad", dash="4 3")
    for value in (-1, 0, 1, 2, 3):
        canvas.text(across(value), up.start + 15, f"{value}", anchor="middle", size=11)


def main() -> None:
    """Draw the curves, print the table, and end with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    print(f"{trials:,} trials a point, margin 1 point, 95% confidence: each error is stated at 2.5%")
    print("| items | flips | no drop: fails | at 1 pp: passes | fails | 4 looks: passes | fails | asked, no drop |")
    print("|---|---|---|---|---|---|---|---|")
    ratios = []
    for items in SIZES:
        for flips in FLIPS:
            none, margin = rates(items, flips, 0.0, trials), rates(items, flips, MARGIN, trials)
            looked, early = rates(items, flips, MARGIN, trials, 4), rates(items, flips, 0.0, trials, 4)
            row = [none[1], margin[0], margin[1], looked[0], looked[1]]
            print(f"| {items:,} | {flips:.0%} | {' | '.join(f'{value:.2%}' for value in row)} | {early[2]:.0%} |")
            beyond = 1.5 * MARGIN
            ratios.append((averages_pass(items, flips, beyond, trials), rates(items, flips, beyond, trials)[0]))
    PICTURE.write_text(draw(trials) + "\n", encoding="utf-8")
    averages, gate = (sum(pair[which] for pair in ratios) / len(ratios) for which in (0, 1))
    print(f"a drop of 1.5 points passes two rounded averages in {averages:.1%} of trials, the gate in {gate:.2%}")
    print(f"ratio: {averages / max(gate, 1 / trials):.0f}")


if __name__ == "__main__":
    main()

"""Mixtures of formats against 4 bits in all layers: the tables of docs/explanation/mixed-precision.md, on the demo.

    SLIPWAY_HOME=… python -m benchmarks.mixed_precision --out FOLDER

Quantizes the demo to 4 bits in groups of 64 by llm-compressor, to a mixture that is no larger, and to one of 5 bits a
weight; each answers the demo's suite through lm-eval's HF backend, which unpacks weights and quantizes no inputs. Then
compares the exact choice with the greedy one at other budgets, by the losses that were measured once. What lies in
FOLDER already is not made anew. About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.damage import DEMO, StageContext
from evals.drift.limits import DriftLimits
from evals.drift.mixture import FILE, Mixture, read_mixture
from evals.report.mixture_pictures import mixture
from evals.report.svg import standalone
from pipeline.compatibility.scheme import Scheme
from pipeline.quantization.assignment import Option, solve_exactly, solve_greedily, total_loss
from pipeline.quantization.quantize import quantize
from pipeline.settings import Settings
from pipeline.workers.runner import Workers

SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "4 bits in groups of 64": {"method": "w4a16", "group_size": 64},
    "mixture, 4.25 bits": {"method": "mixed", "budget": {"bits_per_weight": 4.25}},
    "mixture, 5 bits": {"method": "mixed", "budget": {"bits_per_weight": 5}},
}
BUDGETS = (4.2, 4.25, 4.5, 5, 5.5, 6, 7, 8, 10, 12)


def main() -> None:
    """Make what is not there, print a row for each checkpoint, then one for each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of checkpoints and pictures")
    out = parser.parse_args().out
    workers = Workers(Settings.read(os.environ), lambda _: None)
    for name, scheme in SCHEMES.items():
        if not (out / name / "checkpoint" / "config.json").exists():
            _make(out / name, scheme, workers)
    limits = DriftLimits.model_validate({"suite": "demo", "engine": "hf"})
    with tempfile.TemporaryDirectory(dir=out) as place:
        _evaluate(StageContext(workers, Path(place), limits, []), out)
    _compare(read_mixture(out / "mixture, 5 bits" / FILE))


def _evaluate(bench: StageContext, out: Path) -> None:
    baseline = bench.asked(DEMO / "model", again=200)
    print("| format | bytes | cloze | bits a byte | KL, nats a token | predicted | greedily | on calibration text |")
    print("|---|---|---|---|---|---|---|---|")
    for name in SCHEMES:
        folder = out / name / "checkpoint"
        m = bench.verdict(baseline, bench.asked(folder)).metrics
        size = (folder / "model.safetensors").stat().st_size
        judged = f"{m['cloze.candidate_accuracy']:.4f} | {m['perplexity.candidate_bits_per_byte']:.4f}"
        print(
            f"| {name} | {size:,} | {judged} | {m['divergence.mean']:.5f} | {_losses(out / name / FILE)} |", flush=True
        )


def _make(folder: Path, scheme: Mapping[str, Any], workers: Workers) -> None:
    for name in ("checkpoint", "scratch"):
        (folder / name).mkdir(parents=True)
    found = quantize(
        DEMO / "model", DEMO / "calibration.jsonl", 32, 200,
        Scheme.model_validate({"backend": "llmcompressor", **scheme}),
        folder / "checkpoint", workers, folder / "scratch", print,
    )  # fmt: skip
    if found.mixture is not None:
        (folder / FILE).write_text(found.mixture.format())
        (folder / "mixture.svg").write_text(standalone(mixture(found.mixture)))


def _losses(path: Path) -> str:
    if not path.exists():
        return " | | "
    found = read_mixture(path)
    return f"{found.predicted:.5f} | {found.greedy:.5f} | {found.measured:.5f}"


def _compare(found: Mixture) -> None:
    """The predicted loss of the exact choice and of the greedy one, by budget."""
    options = {
        group: {name: Option(each.bytes, each.loss) for name, each in one.formats.items()}
        for group, one in found.groups.items()
    }
    weights = sum(group.weights for group in found.groups.values())
    print("\n| bits a weight | exact | greedy | greedy loses more by |\n|---|---|---|---|")
    for bits in BUDGETS:
        budget = int(bits * weights / 8)
        exact, greedy = (total_loss(options, solve(options, budget)) for solve in (solve_exactly, solve_greedily))
        print(f"| {bits:g} | {exact:.6f} | {greedy:.6f} | {greedy / exact - 1:.2%} |")


if __name__ == "__main__":
    main()

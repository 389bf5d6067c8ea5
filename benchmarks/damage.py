"""What the drift gate says of real damage: makes the table of docs/explanation/drift.md, on the demo model.

    SLIPWAY_HOME=… python benchmarks/damage.py [--items 800] [NAME…]

Quantizes the demo as its file does and worse, lets every checkpoint answer the demo's suite through lm-eval's HF
backend (what vLLM can't load, 2 and 3 bits, can be asked there too), and judges. Compares two things on each: the
gate's verdict, and that of two rounded averages, which passes a drop of at most one point of accuracy. Prints how many
of the spoiled checkpoints each refuses, and the ratio. About a minute and a half a checkpoint on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.drift.answers import Answers
from evals.drift.asking import ask, overlapping
from evals.drift.divergence import read_top
from evals.drift.drift_gate import judge
from evals.drift.layer_errors import measure_layers
from evals.drift.limits import DriftLimits
from evals.drift.pairs import compare
from pipeline.compatibility.scheme import Scheme
from pipeline.quantization.quantize import quantize
from pipeline.settings import Settings
from pipeline.workers.runner import Workers
from registry.verdict import Verdict

DEMO = Path(__file__).parent.parent / "models" / "demo"
GPTQ = {"method": "gptq", "backend": "gptqmodel", "group_size": 64}
AWQ = {"method": "awq", "backend": "autoawq", "bits": 4, "group_size": 64}
# Name → (how it is made, whether it is spoiled).
CHECKPOINTS: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    "AutoAWQ 4 bits, helped": (AWQ, False),
    "GPTQModel AWQ 4 bits": ({**AWQ, "backend": "gptqmodel"}, False),
    "GPTQModel GPTQ 4 bits": ({**GPTQ, "bits": 4}, False),
    "GPTQModel GPTQ 3 bits": ({**GPTQ, "bits": 3}, False),
    "round to nearest, 3 bits, one group a row": ({"round_to": 3}, True),
    "AutoAWQ 4 bits, spoiled on CPU": ({**AWQ, "clone_saved_weights": False}, True),
    "GPTQModel GPTQ 2 bits": ({**GPTQ, "bits": 2}, True),
}


@dataclass(frozen=True)
class StageContext:
    """Where it happens."""

    workers: Workers
    place: Path
    limits: DriftLimits
    calibration: list[str]

    def folder(self, name: str) -> Path:
        """Make an empty folder."""
        made = self.place / f"{len(list(self.place.iterdir()))}-{name}"
        made.mkdir()
        return made

    def checkpoint(self, how: Mapping[str, Any]) -> Path:
        """Make a checkpoint: by a scheme, or by rounding FP16's own weights."""
        output = self.folder("checkpoint")
        if "round_to" in how:
            request = {"source": str(DEMO / "model"), "output": str(output), "bits": how["round_to"]}
            self.workers("lm-eval", Path(__file__).with_name("round_to_nearest.py"), request, self.folder("scratch"))
            return output
        calibration = DEMO / "calibration.jsonl"
        scheme = Scheme.model_validate(dict(how))
        scratch = self.folder("scratch")
        quantize(DEMO / "model", calibration, 32, 200, scheme, output, self.workers, scratch, lambda _: None)
        return output

    def asked(self, checkpoint: Path, again: int = 0) -> tuple[Answers, Path]:
        """Let a checkpoint answer the suite."""
        output = self.folder("answers")
        answers = ask(
            checkpoint, self.limits, output, device="cpu", run_worker=self.workers, scratch=self.folder("scratch"),
            progress=lambda _: None, divergence=self.limits.divergence, again=again,
        )  # fmt: skip
        return answers, output

    def verdict(self, baseline: tuple[Answers, Path], candidate: tuple[Answers, Path]) -> Verdict:
        """Judge a candidate against FP16."""
        drift = compare(
            baseline[0],
            candidate[0],
            overlapping=overlapping(candidate[0], candidate[1], self.calibration),
            tops=(read_top(baseline[1]), read_top(candidate[1])),
        )
        return judge(drift, self.limits)

    def worst_layer(self, checkpoint: Path) -> str:
        """Return the layer with the largest error, and that error; nothing where weights are not packed."""
        if "quantization_config" not in json.loads((checkpoint / "config.json").read_text()):
            return "-"
        found = measure_layers(
            DEMO / "model", checkpoint, self.calibration[:8], max_tokens=200, run_worker=self.workers,
            scratch=self.folder("scratch"),
        )  # fmt: skip
        worst = max(found, key=lambda layer: layer.error)
        return f"{worst.name.removeprefix('model.layers.')} {worst.error:.0%}"


def main() -> None:
    """Make every checkpoint, judge it, print a row, and end with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=800, help="of cloze")
    parser.add_argument("names", nargs="*", help="only checkpoints whose name holds one of these")
    arguments = parser.parse_args()
    chosen = {
        name: entry
        for name, entry in CHECKPOINTS.items()
        if not arguments.names or any(part in name for part in arguments.names)
    }
    calibration = [json.loads(line)["text"] for line in (DEMO / "calibration.jsonl").read_text().splitlines()][:32]
    limits = DriftLimits.model_validate(
        {"suite": "demo", "tasks": {"cloze": {"items": arguments.items}}, "engine": "hf"}
    )
    with tempfile.TemporaryDirectory() as place:
        bench = StageContext(Workers(Settings.read(os.environ), lambda _: None), Path(place), limits, calibration)
        baseline = bench.asked(DEMO / "model", again=200)
        _report(chosen, lambda how: _judged(bench, baseline, how))


def _judged(bench: StageContext, baseline: tuple[Answers, Path], how: Mapping[str, Any]) -> tuple[Verdict, str]:
    checkpoint = bench.checkpoint(how)
    return bench.verdict(baseline, bench.asked(checkpoint)), bench.worst_layer(checkpoint)


def _report(
    chosen: Mapping[str, tuple[Mapping[str, Any], bool]],
    judged: Callable[[Mapping[str, Any]], tuple[Verdict, str]],
) -> None:
    print(
        "| checkpoint | cloze | flips | drop, at most | bits per byte | increase, at most | KL | agree | worst | gate |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    spoiled = refused = averages = 0
    for name, (how, is_spoiled) in chosen.items():
        verdict, worst = judged(how)
        m = verdict.metrics
        print(f"| {name} | {' | '.join(_cells(m))} | {worst} | {verdict.status} |", flush=True)
        if is_spoiled:
            spoiled += 1
            refused += verdict.blocks
            averages += round(m["cloze.drop"], 3) > 0.01
    fp16 = m["cloze.baseline_accuracy"], m["perplexity.baseline_bits_per_byte"]
    floor = m["cloze.floor_flip_rate"], m["cloze.floor_nats"]
    print(f"FP16: cloze {fp16[0]:.4f}, {fp16[1]:.4f} bits per byte; twice: {floor[0]:.2%} flip, {floor[1]:.4f} nats")
    print(f"of {spoiled} spoiled checkpoints the gate refuses {refused}, two rounded averages {averages}")
    print(f"ratio: {refused / max(averages, 1):.1f}")


def _cells(m: Mapping[str, float]) -> list[str]:
    return [
        f"{m['cloze.candidate_accuracy']:.4f}",
        f"{m['cloze.flip_rate']:.2%}",
        f"{100 * m['cloze.drop']:+.2f}, {100 * m['cloze.drop_upper']:.2f} pp",
        f"{m['perplexity.candidate_bits_per_byte']:.4f}",
        f"{100 * m['perplexity.increase']:+.2f}, {100 * m['perplexity.increase_upper']:.2f}%",
        f"{m['divergence.mean']:.4f}",
        f"{m['divergence.agreement']:.1%}",
    ]


if __name__ == "__main__":
    main()

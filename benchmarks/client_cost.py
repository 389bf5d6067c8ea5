"""What the load generator itself takes: processor cores of aiperf, as Slipway runs it, at 50 requests a second.

Against a scripted server (50 ms an answer of 8 tokens) whose own cost is apart, so that only the client is counted; at
5 and at 50 requests a second in one run, each for 20 s. Prints both, their ratio, and the share of one core. Needs the
`aiperf` environment:

    SLIPWAY_HOME=... .venv/bin/python benchmarks/client_cost.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT / "tests"))

from scripted_server import Script, serving  # noqa: E402 - found through the line above

from containers.sandbox.memory import MemorySampler  # noqa: E402
from containers.sandbox.sandbox import Server  # noqa: E402
from evals.load.load_test import LoadPlan, measure  # noqa: E402
from pipeline.settings import Settings  # noqa: E402
from pipeline.workers.runner import Workers  # noqa: E402

RATES = (5.0, 50.0)
SECONDS = 20.0
DEMO = CHECKOUT / "models" / "demo"


def cores(rate: float, folder: Path) -> tuple[float, float, float]:
    """Cores while requests are under way, processor seconds in all, and the client's lateness at p99 in ms."""
    plan = LoadPlan.model_validate({
        "prompts": DEMO / "heldout.jsonl", "request_rate": rate, "seconds": SECONDS, "output_tokens": 8,
        "canary": {"prompt": "once", "expect": "the"}, "memory": {"limit_bytes": "1GiB"},
    })  # fmt: skip
    evidence, scratch = folder / "evidence", folder / "scratch"
    evidence.mkdir(parents=True)
    scratch.mkdir()
    with serving(Script(service_ms=50)) as (url, _):
        sampler = MemorySampler(lambda: {"memory_bytes": 0}, "none")
        sampler.start()
        found = measure(
            Server(url, 0.0, 1 << 30, None, sampler, lambda: None), plan, tokenizer=DEMO / "model", folder=evidence,
            scratch=scratch, run_worker=Workers(Settings.read(), print), progress=lambda _: None,
        )  # fmt: skip
    late = found.profiles[0].traffic.client_late_ms["p99"]
    return found.client.cores or 0.0, found.client.cpu_seconds, late


def main() -> None:
    """Measure at both rates and print."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            found[rate] = cores(rate, Path(folder) / f"{rate:g}")
            under_way, total, late = found[rate]
            print(f"{rate:4g} requests/s: {under_way:.3f} cores, {total:.1f} s in all, {late:.1f} ms late (p99)")
    low, high = (found[rate][0] for rate in RATES)
    print(f"ten times the rate takes {high / low:.1f} times the cores; 50 requests/s take {high:.0%} of one core")


if __name__ == "__main__":
    main()

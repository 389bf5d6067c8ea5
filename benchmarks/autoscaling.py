"""A day under the autoscaler of a bundle, beside scaling on the number of requests: who is late, what runs how long.

    SLIPWAY_HOME=… python benchmarks/autoscaling.py [NAME[@ALIAS]]

Capacity, latency and start-up are the release's own (default: demo-awq); the day is simulated. Prints both, and the
ratio.
"""

from __future__ import annotations

import sys

from containers.kubernetes.numbers import numbers
from evals.report.autoscaling import COUNT, OURS, compare
from pipeline.serving.deployment import gather
from pipeline.settings import Settings


def main() -> None:
    """Simulate a day and print what it came to."""
    evidence, _ = gather(sys.argv[1] if len(sys.argv) > 1 else "demo-awq", Settings.read())
    runs = compare(numbers(evidence), evidence.metrics.get("p95_latency_ms"))["runs"]
    for name, run in runs.items():
        print(f"{name:48} {run['late_share']:8.2%} late {run['replica_hours']:8.1f} replica-hours")
    late, more = (runs[COUNT][key] / runs[OURS][key] for key in ("late_share", "replica_hours"))
    print(f"{COUNT} against {OURS}: {late:.1f} times as many late at {more:.2f} times the replica-hours")


if __name__ == "__main__":
    main()

"""Simulate a day under the autoscaler of a bundle and under scaling on the number of requests.

    SLIPWAY_HOME=… python benchmarks/autoscaling.py [NAME[@ALIAS]]

Capacity, latency and start-up are those of the release (default: demo-awq). Prints late requests and replica-hours of
both, and their ratios.
"""

from __future__ import annotations

import sys

from containers.kubernetes.numbers import numbers
from evals.report.autoscaling import COUNT, OURS, compare
from pipeline.serving.deployment import gather
from pipeline.settings import Settings


def main() -> None:
    """Simulate a day and print the outcome."""
    evidence, _ = gather(sys.argv[1] if len(sys.argv) > 1 else "demo-awq", Settings.read())
    runs = compare(numbers(evidence), evidence.metrics.get("p95_latency_ms")).runs
    for name, run in runs.items():
        print(f"{name:48} {run.late_share:8.2%} late {run.replica_hours:8.1f} replica-hours")
    late = runs[COUNT].late_share / runs[OURS].late_share
    more = runs[COUNT].replica_hours / runs[OURS].replica_hours
    print(f"{COUNT} against {OURS}: {late:.1f} times as many late at {more:.2f} times the replica-hours")


if __name__ == "__main__":
    main()

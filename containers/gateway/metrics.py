"""Metrics for Prometheus. They contain no prompts, answers or secrets: keys appear by their public ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from containers.gateway.router import Router

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 120, 300)
_OWN = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1)
_P = "slipway_gateway"


class Metrics:
    """The gateway's metrics; `/metrics` shows ``registry``."""

    def __init__(self) -> None:
        # Creation times would double the number of series.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter(
            f"{_P}_requests", "Requests by status and error code", ["model", "key", "status", "code"], registry=own
        )
        self.latency = Histogram(
            f"{_P}_request_seconds", "Time from the request to the end of its answer", ["model", "key", "replica"],
            buckets=_LATENCY, registry=own,
        )  # fmt: skip
        self.first_token = Histogram(
            f"{_P}_first_token_seconds", "Time from the request to the first byte of a streamed answer",
            ["model", "key", "replica"], buckets=_LATENCY, registry=own,
        )  # fmt: skip
        self.queued = Histogram(
            f"{_P}_queue_seconds", "Time spent waiting for a free replica", ["model"], buckets=_LATENCY, registry=own
        )
        self.overhead = Histogram(
            f"{_P}_overhead_seconds", "Time in the gateway before the request goes to a replica, without the queue",
            ["model"], buckets=_OWN, registry=own,
        )  # fmt: skip
        self.tokens = Counter(
            f"{_P}_tokens", "Tokens by kind: prompt or completion", ["model", "key", "replica", "kind"], registry=own
        )
        self.attempts = Counter(
            f"{_P}_replica_answers", "Answers of replicas by status; error: the connection failed",
            ["replica", "status"], registry=own,
        )  # fmt: skip
        self.retries = Counter(f"{_P}_retries", "Requests retried at another replica", ["model"], registry=own)
        self.refused = Counter(
            f"{_P}_refused", "Requests refused by the gateway, by error code", ["code"], registry=own
        )
        self.hung_up = Counter(
            f"{_P}_hung_up", "Clients that disconnected before their answer was complete", ["model"], registry=own
        )
        self.broken = Counter(
            f"{_P}_broken_streams", "Streams that failed after they had begun", ["model"], registry=own
        )

    def show(self, router: Router, errors: Callable[[], Iterable[str]]) -> None:
        """Add the metrics that are read at each scrape: queues, replicas, and files with content that is not valid."""
        self.registry.register(_State(router, errors))


class _State(Collector):
    def __init__(self, router: Router, errors: Callable[[], Iterable[str]]) -> None:
        self._router = router
        self._errors = errors

    def collect(self) -> Iterator[Metric]:
        """Read the metrics from the router."""
        queue = GaugeMetricFamily(f"{_P}_queue_length", "Requests that wait for a replica", labels=["model"])
        for model, pool in self._router.pools.items():
            queue.add_metric([model], len(pool.waiting))
        yield queue
        labels = ["replica", "release"]
        up = GaugeMetricFamily(f"{_P}_replica_up", "1 if requests are sent to the replica", labels=labels)
        running = GaugeMetricFamily(f"{_P}_replica_running", "Requests running at the replica", labels=labels)
        tokens = GaugeMetricFamily(
            f"{_P}_replica_tokens", "Tokens of the requests running at the replica", labels=labels
        )
        ejections = CounterMetricFamily(
            f"{_P}_replica_ejections", "Times the replica was taken out of service", labels=labels
        )
        for replica in self._router.everyone():
            names = [replica.name, replica.release]
            up.add_metric(names, float(replica.usable))
            running.add_metric(names, len(replica.running))
            tokens.add_metric(names, replica.tokens)
            ejections.add_metric(names, replica.ejections)
        yield from (up, running, tokens, ejections)
        stale = GaugeMetricFamily(
            f"{_P}_stale_files", "1 if the newest content of a file is not valid", labels=["file"]
        )
        for name in self._errors():
            stale.add_metric([name], 1)
        yield stale

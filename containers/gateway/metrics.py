"""What Prometheus sees. No prompt, no answer, no secret: keys appear by their public id."""

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
    """The gateway's own; ``registry`` is what `/metrics` shows."""

    def __init__(self) -> None:
        # The moment of a counter's birth would be a series for each.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter(
            f"{_P}_requests", "Requests by what they were answered", ["model", "key", "status", "code"], registry=own
        )
        self.latency = Histogram(
            f"{_P}_request_seconds", "From the request to the end of its answer", ["model", "key", "replica"],
            buckets=_LATENCY, registry=own,
        )  # fmt: skip
        self.first_token = Histogram(
            f"{_P}_first_token_seconds", "From the request to the first byte of a streamed answer",
            ["model", "key", "replica"], buckets=_LATENCY, registry=own,
        )  # fmt: skip
        self.queued = Histogram(
            f"{_P}_queue_seconds", "Waited for a replica with room", ["model"], buckets=_LATENCY, registry=own
        )
        self.overhead = Histogram(
            f"{_P}_overhead_seconds", "Spent here before the replica was asked, the queue left out", ["model"],
            buckets=_OWN, registry=own,
        )  # fmt: skip
        self.tokens = Counter(
            f"{_P}_tokens", "Tokens by kind: prompt, completion", ["model", "key", "replica", "kind"], registry=own
        )
        self.attempts = Counter(
            f"{_P}_replica_answers", "What replicas answered; error: it broke off", ["replica", "status"],
            registry=own,
        )  # fmt: skip
        self.retries = Counter(f"{_P}_retries", "Requests that went to another replica", ["model"], registry=own)
        self.refused = Counter(
            f"{_P}_refused", "Requests refused here, by the code they were told", ["code"], registry=own
        )
        self.hung_up = Counter(
            f"{_P}_hung_up", "Clients that left before their answer was whole", ["model"], registry=own
        )
        self.broken = Counter(
            f"{_P}_broken_streams", "Streams that had begun and ended in an error", ["model"], registry=own
        )

    def show(self, router: Router, errors: Callable[[], Iterable[str]]) -> None:
        """Add what is read when asked: queues and replicas, and which files could not be read again."""
        self.registry.register(_State(router, errors))


class _State(Collector):
    def __init__(self, router: Router, errors: Callable[[], Iterable[str]]) -> None:
        self._router = router
        self._errors = errors

    def collect(self) -> Iterator[Metric]:
        """Read the router."""
        queue = GaugeMetricFamily(f"{_P}_queue_length", "Requests that wait for a replica", labels=["model"])
        for model, pool in self._router.pools.items():
            queue.add_metric([model], len(pool.waiting))
        yield queue
        labels = ["replica", "release"]
        up = GaugeMetricFamily(f"{_P}_replica_up", "1 where requests are sent there", labels=labels)
        running = GaugeMetricFamily(f"{_P}_replica_running", "Requests it works on", labels=labels)
        tokens = GaugeMetricFamily(f"{_P}_replica_tokens", "Tokens outstanding there", labels=labels)
        ejections = CounterMetricFamily(f"{_P}_replica_ejections", "Times it was ejected", labels=labels)
        for replica in self._router.everyone():
            names = [replica.name, replica.release]
            up.add_metric(names, float(replica.usable))
            running.add_metric(names, len(replica.running))
            tokens.add_metric(names, replica.tokens)
            ejections.add_metric(names, replica.ejections)
        yield from (up, running, tokens, ejections)
        stale = GaugeMetricFamily(f"{_P}_stale_files", "1 where a changed file can't be used", labels=["file"])
        for name in self._errors():
            stale.add_metric([name], 1)
        yield stale

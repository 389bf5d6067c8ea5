"""A gateway before scripted replicas, for tests and benchmarks: with keys, routes, and a client for each."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from containers.gateway import keys
from containers.gateway.config import Backend, ModelRoute, ReplicaRoute, Routes
from pipeline.serving import gateway_process
from pipeline.settings import Settings
from upstreams import Upstream

MODEL = "demo-awq"
TOKENIZER = Path(__file__).parent.parent / "models" / "demo" / "model"


@dataclass(frozen=True)
class Running:
    """A running gateway, its folder, and a key without limits."""

    process: gateway_process.GatewayProcess
    folder: Path
    key: str

    @property
    def url(self) -> str:
        return self.process.url

    def add_key(self, **limits: int) -> str:
        """Make another key, and wait until the gateway has read it."""
        _, text = keys.add(self.folder / "keys.json", "test", limits=keys.Limits(**limits))
        self.wait_for_key(text)
        return text

    def wait_for_key(self, text: str, status: int = 200) -> None:
        with self.client(text) as client:
            for _ in range(500):
                if client.get("/v1/models").status_code == status:
                    return
                time.sleep(0.02)
        raise TimeoutError(f"the key is not answered with {status}")

    def client(self, key: str | None = None) -> httpx.Client:
        """A client with a key."""
        head = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=head, timeout=30, trust_env=False)

    def ask(self, prompt: str = "def", key: str | None = None, **more: Any) -> httpx.Response:  # noqa: ANN401 - JSON
        """Ask for a completion."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, **more}
        with self.client(key) as client:
            return client.post("/v1/completions", json=body)

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the series of a metric that have these labels."""
        total = 0.0
        for line in httpx.get(f"{self.process.admin_url}/metrics", timeout=10).text.splitlines():
            found = re.fullmatch(rf"slipway_gateway_{name}(?:{{(.*)}})? (\S+)", line)
            if found and all(f'{label}="{value}"' in (found[1] or "") for label, value in labels.items()):
                total += float(found[2])
        return total


def routes(*shares: tuple[str, int, Sequence[Upstream]], context: int = 1024, **more: Any) -> Routes:  # noqa: ANN401
    """Routes for one model: release, weight and replicas of each share."""
    backends = tuple(
        Backend(
            release=release,
            weight=weight,
            replicas=tuple(
                ReplicaRoute(name=f"{release}-{each.url.rpartition(':')[2]}", url=each.url) for each in replicas
            ),
        )
        for release, weight, replicas in shares
    )
    route = ModelRoute(served_as="demo", tokenizer=TOKENIZER, context=context, backends=backends, **more)
    return Routes(models={MODEL: route})


@contextlib.contextmanager
def gateway(
    settings: Settings,
    folder: Path,
    routed: Routes | None = None,
    *,
    ready: bool = True,
    **options: Any,  # noqa: ANN401
) -> Iterator[Running]:
    """Run one on ports of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    _, key = keys.add(folder / "keys.json", "owner")
    chosen = {"keys": folder / "keys.json", "port": 0, "admin_port": 0, "health_interval_s": 0.2, **options}
    with gateway_process.gateway(settings, folder, print, **chosen) as process:
        running = Running(process, folder, key)
        if routed is not None:
            process.route(routed)
            if ready:
                process.wait_ready()
        yield running

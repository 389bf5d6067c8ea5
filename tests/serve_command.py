"""A running `slipway serve`, with a client's key, for tests that ask what it serves."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from homes import SLIPWAY, Slipway


@dataclass(frozen=True)
class Served:
    """The process, what it printed when it was ready, and the release line's name."""

    name: str
    key: str
    process: subprocess.Popen[str]
    told: Mapping[str, Any]

    def model(self) -> dict[str, Any]:
        """The one model that the gateway lists."""
        with self._client() as client:
            (listed,) = client.get("/v1/models").raise_for_status().json()["data"]
        return dict(listed)

    def complete(self, prompt: str, **more: Any) -> str:  # noqa: ANN401 - JSON
        """The text that continues a prompt; the answer names the model as the request did."""
        body = {"model": self.name, "prompt": prompt, "temperature": 0, **more}
        with self._client() as client:
            answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        document = answer.json()
        assert document["model"] == self.name
        text: str = document["choices"][0]["text"]
        return text

    def replicas(self) -> dict[str, str]:
        """The replicas' states by name."""
        found = httpx.get(f"{self.told['admin_url']}/replicas", timeout=10).json()["replicas"]
        return {each["name"]: each["state"] for each in found}

    def _client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.told["url"], headers=headers, timeout=60, trust_env=False)


@contextlib.contextmanager
def serving(slipway: Slipway, name: str, *words: str) -> Iterator[Served]:
    """Run the command until the end of the block."""
    key = slipway("keys", "add", "--owner", "test").stdout.strip()
    log = slipway.home / "serve.log"
    with log.open("a") as stderr:
        process = subprocess.Popen(
            [SLIPWAY, "serve", name, "--port", "0", "--admin-port", "0", "--every", "0.5", "--json", *words],
            env=dict(slipway.variables), stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        text = ""
        while not text.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, log.read_text()
            text += line
        yield Served(name, key, process, json.loads(text))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(120)
        process.stdout.close()

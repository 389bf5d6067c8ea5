"""Schemathesis against the gateway's own OpenAPI description: whatever it thinks of, the answer is a described one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx

from gateways import MODEL, TOKENIZER, gateway, routes
from pipeline.settings import Settings
from upstreams import upstream

EXAMPLES = 60


def with_a_template(folder: Path) -> Path:
    """The demo's tokenizer and a chat template, which the demo has not."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((TOKENIZER / "tokenizer.json").read_bytes())
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


def test_schemathesis_finds_nothing(machine: Settings, tmp_path: Path) -> None:
    with upstream(token_ms=0, tokens=4) as server:
        # A context so long that every request that fits the schema fits the model.
        routed = routes(("v1", 100, [server]), context=2_000_000_000, default_tokens=4)
        route = routed.models[MODEL].model_copy(update={"tokenizer": with_a_template(tmp_path / "tokenizer")})
        routed = routed.model_copy(update={"models": {MODEL: route}})
        with gateway(
            machine, tmp_path / "gateway", routed, wrong_keys_per_minute=1_000_000, rejected_per_minute=1_000_000
        ) as gate:
            document = httpx.get(f"{gate.process.admin_url}/openapi.json").json()
            for name in ("CompletionRequest", "ChatRequest"):
                # The model that there is: a random name would always end in 404.
                document["components"]["schemas"][name]["properties"]["model"] = {"const": MODEL, "type": "string"}
            (tmp_path / "openapi.json").write_text(json.dumps(document))
            command = [
                str(Path(sys.executable).parent / "schemathesis"), "run", str(tmp_path / "openapi.json"),
                "--url", gate.url, "--header", f"Authorization: Bearer {gate.key}",
                "--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES), "--no-color",
            ]  # fmt: skip
            done = subprocess.run(
                command, cwd=tmp_path, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            lines = [line[:300] for line in (done.stdout + done.stderr).splitlines()]
            assert done.returncode == 0, "\n".join(lines[-120:])
            assert gate.ask().status_code == 200

"""The planner beside vLLM itself: what its own layers say that they keep, with no weights and no GPU."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import docker
import pytest

from containers.image import profile
from containers.image.runtime import build_runtime
from homes import DEMO
from pipeline.planner.facts import read_facts
from pipeline.settings import Settings

PUBLIC = json.loads((Path(__file__).parents[1] / "data" / "public_configurations.json").read_text())["models"]
SCRIPT = Path(__file__).with_name("vllm_cache_sizes.py")


def packed(files: dict[str, bytes]) -> bytes:
    """A tar of files, by path."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture(scope="module")
def configurations() -> dict[str, dict[str, Any]]:
    demo = json.loads((DEMO / "model" / "config.json").read_text())
    return {"demo": demo, **{name: entry["config"] for name, entry in PUBLIC.items()}}


@pytest.fixture(scope="module")
def vllm_says(
    engine: docker.DockerClient, machine: Settings, configurations: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    runtime = profile.load("vllm-cpu")
    image = build_runtime(engine, runtime, machine.home, print).image_id
    files = {"ask.py": SCRIPT.read_bytes()}
    files |= {f"models/{name}/config.json": json.dumps(config).encode() for name, config in configurations.items()}
    container = engine.containers.create(
        image,
        entrypoint=["/opt/venv/bin/python", "/srv/ask.py", "/srv/models"],
        environment=runtime.full_environment,
        network_mode="none",
        shm_size="1g",
        mem_limit="6g",
    )
    try:
        container.put_archive("/srv", packed(files))
        container.start()
        container.wait(timeout=600)
        lines = container.logs(stderr=True).decode().splitlines()
    finally:
        container.remove(force=True)
    results = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    assert results, "\n".join(lines[-30:])
    return dict(json.loads(results[0]))


def test_every_token_takes_what_vllm_keeps_for_it(
    vllm_says: dict[str, dict[str, Any]], configurations: dict[str, dict[str, Any]]
) -> None:
    planned = {name: read_facts(config).kv_bytes_per_token() for name, config in configurations.items()}
    assert planned == {name: found["bytes_per_token"] for name, found in vllm_says.items()}
    assert {name: entry["kv_bytes_per_token"] for name, entry in PUBLIC.items()}.items() <= planned.items()


def test_each_kind_of_attention_is_among_them(vllm_says: dict[str, dict[str, Any]]) -> None:
    assert vllm_says["llama-3.1-70b"]["kinds"] == ["FullAttentionSpec"]
    assert vllm_says["deepseek-v3"]["kinds"] == ["MLAAttentionSpec"]
    assert vllm_says["mistral-7b-v0.1"]["kinds"] == ["SlidingWindowSpec"]
    assert vllm_says["gemma-3-1b"]["kinds"] == ["FullAttentionSpec", "SlidingWindowSpec"]

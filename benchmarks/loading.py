"""What it costs that a start verifies what it loads, against vLLM's own loader: seconds, CPU seconds, bytes read.

    SLIPWAY_HOME=... .venv/bin/python benchmarks/loading.py [--gigabytes 4]

Starts the CPU runtime with a generated Llama of so many gigabytes in four shards and with the demo, by vLLM's server
and by the image's own entry point, in turn: cold, with the model's files dropped from the page cache, then warm, and at
last warm with the marks that the start before left. The runtime's own files are warm in all of them. A start lasts
until the server is healthy. CPU seconds are the container's. Bytes read from the disk are those of its processes
(`/proc/PID/io`), so this runs as root. Needs two cores, 10 GiB of memory, and disk space for the model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import docker
import httpx
from docker.models.containers import Container

from containers.engine.engine import connect
from containers.image import profile as profiles
from containers.image.build import serving_arguments
from containers.image.model_loader import NAME, with_list
from containers.image.runtime import build_runtime
from containers.sandbox.container import hardening
from pipeline.settings import Settings
from registry.served_files import MARK, MARKS

DEMO = Path(__file__).parent.parent / "models" / "demo" / "model"
SHARDS, HIDDEN, INNER, KEYS = 4, 2048, 8192, 1024
MEMORY = 10 * 2**30
LONGEST_START_S = 1800
# A start with marks is compared with the default one before it.
STARTS = (
    ("cold", "default"), ("cold", "verifying"), ("warm", "default"), ("warm", "verifying"), ("marked", "verifying"),
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """One start: ``seconds`` until it was healthy, CPU seconds until then, bytes from the disk, the loader's line."""

    seconds: float
    cpu_seconds: float
    disk_bytes: int
    said: str


def generate(folder: Path, gigabytes: float) -> Path:
    """Write a Llama with the demo's tokenizer and weights near zero."""
    folder.mkdir()
    for path in DEMO.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, folder)
    config = json.loads((DEMO / "config.json").read_text())
    layer = {
        "input_layernorm": [HIDDEN], "post_attention_layernorm": [HIDDEN],
        "self_attn.q_proj": [HIDDEN, HIDDEN], "self_attn.k_proj": [KEYS, HIDDEN], "self_attn.v_proj": [KEYS, HIDDEN],
        "self_attn.o_proj": [HIDDEN, HIDDEN], "mlp.gate_proj": [INNER, HIDDEN], "mlp.up_proj": [INNER, HIDDEN],
        "mlp.down_proj": [HIDDEN, INNER],
    }  # fmt: skip
    count = max(SHARDS, round(gigabytes * 1e9 / sum(map(size, layer.values()))))
    config |= {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": count, "num_attention_heads": 16,
        "num_key_value_heads": KEYS // (HIDDEN // 16), "head_dim": HIDDEN // 16, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, list[int]]] = [{} for _ in range(SHARDS)]
    shards[0] = {"model.embed_tokens.weight": [config["vocab_size"], HIDDEN], "model.norm.weight": [HIDDEN]}
    for number in range(count):
        named = {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        shards[number * SHARDS // count] |= named
    places: dict[str, str] = {}
    chance = random.Random(4)  # noqa: S311 - weights
    block = b"".join(bytes((low, chance.choice((0x3C, 0xBC)))) for low in chance.randbytes(1 << 19))
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        places |= dict.fromkeys(tensors, name)
        write(folder / name, tensors, block)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def size(shape: list[int]) -> int:
    """Bytes of a tensor in bfloat16."""
    count = 2
    for each in shape:
        count *= each
    return count


def write(path: Path, tensors: dict[str, list[int]], block: bytes) -> None:
    """Write one safetensors file, filled with ``block``."""
    header, end = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size(shape)]}
        end += size(shape)
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for place in range(0, end, len(block)):
            file.write(block[: end - place])
        os.fsync(file.fileno())  # what is not on the disk can't be dropped from the page cache


def drop(folder: Path) -> None:
    """Drop a model's files from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def container(
    client: docker.DockerClient,
    image: str,
    command: list[str],
    mounts: dict[Path, str],
    marks: Path,
    entrypoint: list[str] | None,
) -> Iterator[Container]:
    """Create a hardened container on loopback's port, and remove it."""
    volumes = {str(path): {"bind": place, "mode": "ro"} for path, place in mounts.items()}
    volumes[str(marks)] = {"bind": f"/{MARKS}", "mode": "rw"}
    made = client.containers.create(
        image, command, entrypoint=entrypoint, network_mode="host",
        environment={"HOME": "/tmp", "VLLM_HOST_IP": "127.0.0.1"},  # noqa: S108 - inside the container
        volumes=volumes, **hardening(MEMORY),
    )  # fmt: skip
    try:
        yield made
    finally:
        made.remove(force=True)


def start(made: Container, port: int) -> Start:
    """Start it and wait until it is healthy."""
    began = time.monotonic()
    made.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=2.0, trust_env=False) as client:
        while time.monotonic() - began < LONGEST_START_S:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health").status_code == httpx.codes.OK:
                    break
            made.reload()
            if made.status != "running":
                raise SystemExit(made.logs(tail=30).decode())
            time.sleep(0.1)
    seconds = time.monotonic() - began
    stats = cast("dict[str, Any]", made.stats(stream=False))
    used = stats["cpu_stats"]["cpu_usage"]["total_usage"]
    processes = [int(row[1]) for row in made.top()["Processes"]]
    disk = 0
    for process in processes:
        lines = Path(f"/proc/{process}/io").read_text(encoding="ascii").splitlines()
        disk += int(dict(line.split(": ") for line in lines)["read_bytes"])
    said = [line.partition(MARK)[2] for line in made.logs().decode(errors="replace").splitlines() if MARK in line]
    return Start(seconds, used / 1e9, disk, said[-1] if said else "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args()
    settings = Settings.read(os.environ)
    profile = profiles.load("vllm-cpu")
    client = connect(settings.docker_host, settings.home)
    image = build_runtime(client, profile, settings.home, print).image_id
    ways = {"default": [word for word in profile.entrypoint if word != NAME], "verifying": None}
    with tempfile.TemporaryDirectory(dir=settings.home) as folder:
        models = {f"{options.gigabytes:g} GB": generate(Path(folder) / "model", options.gigabytes), "demo": DEMO}
        marks = Path(folder) / "marks"
        marks.mkdir()
        marks.chmod(0o777)  # the container's user writes it
        Path(folder).chmod(0o755)
        for name, model in models.items():
            command = [*serving_arguments(profile, model, "demo")]
            command[command.index("--port") + 1] = str(options.port)
            command[command.index("--host") + 1] = "127.0.0.1"
            with with_list({model: "/model"}, settings.home, {}) as mounts:
                found: dict[str, Start] = {}
                for state, way in STARTS:
                    if state == "cold":
                        drop(model)
                    if state != "marked":
                        for mark in marks.iterdir():
                            mark.unlink()
                    with container(client, image, command, mounts, marks, ways[way]) as made:
                        found[way] = start(made, options.port)
                    print(f"{name}, {state}, {way}: {found[way]}", flush=True)
                    if way == "verifying":
                        ours, theirs = found["verifying"], found["default"]
                        print(
                            f"{name}, {state}: {ours.seconds / theirs.seconds:.3f} times the seconds, "
                            f"{ours.cpu_seconds / theirs.cpu_seconds:.3f} times the CPU seconds",
                            flush=True,
                        )


if __name__ == "__main__":
    main()

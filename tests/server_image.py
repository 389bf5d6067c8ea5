"""An image of the scripted server, as small as it comes."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import docker

SERVER = Path(__file__).parent / "scripted_server.py"
ENGINE_LOGS = Path(__file__).parent / "data" / "engine_logs"


@contextlib.contextmanager
def server_image(engine: docker.DockerClient, base: str, *options: str) -> Iterator[str]:
    """Build it on ``base``, which has python3; gives its id. The server gets these options.

    What a real vLLM wrote when it failed (`ENGINE_LOGS`) is in its folder ``/logs``.
    """
    entry = ["python3", "/scripted_server.py", "--host", "0.0.0.0", "--port", "8000", *options]  # noqa: S104 - its own network
    files = {
        "Dockerfile": (
            f"FROM {base}\nCOPY scripted_server.py /\nCOPY logs /logs/\nENTRYPOINT {json.dumps(entry)}\n".encode()
        ),
        SERVER.name: SERVER.read_bytes(),
        **{f"logs/{path.name}": path.read_bytes() for path in ENGINE_LOGS.glob("*.log")},
    }
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    context.seek(0)
    tag = f"slipway-test-server:{uuid.uuid4().hex[:8]}"
    built, _ = engine.images.build(fileobj=context, custom_context=True, rm=True, tag=tag)
    try:
        yield str(built.id)
    finally:
        engine.images.remove(tag, force=True)

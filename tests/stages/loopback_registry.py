"""Debian's docker-registry on loopback."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from containers.engine.engine import install_packages


@contextlib.contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[str]:
    """Serve a registry that keeps its blobs in ``folder``, on a free port if none is given; give its address."""
    if shutil.which("docker-registry") is None:
        install_packages(["docker-registry"], print)
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))
        port = free.getsockname()[1]
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder / "blobs")}},
        "http": {"addr": f"127.0.0.1:{port}"},
        "log": {"level": "error", "accesslog": {"disabled": True}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "registry.yml").write_text(yaml.safe_dump(settings))
    process = subprocess.Popen(
        ["docker-registry", "serve", str(folder / "registry.yml")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()

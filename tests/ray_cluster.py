"""A real Ray cluster of two nodes on this machine, all of it on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from real_server import free_port

from homes import OF_THE_MACHINE
from pipeline.settings import Settings
from pipeline.workers.environments import ensure_environment

# What the second node has and the first has not: a worker that asks for it runs there.
RESOURCE = "quantizer"


@dataclass(frozen=True)
class Cluster:
    """``address`` is the jobs' interface; ``homes`` are the nodes' own $SLIPWAY_HOME, the first's first."""

    address: str
    homes: tuple[Path, Path]

    def workers(self, path: Path, store: str) -> Path:
        """Write a file for ``SLIPWAY_WORKERS`` that has them run on the second node."""
        path.write_text(
            f"launcher: ray\naddress: {self.address}\nstore: {store}\ncpus: 1\nresources: {{{RESOURCE}: 1}}\n"
        )
        return path


@contextmanager
def ray_cluster(folder: Path, machine: Settings, s3: Mapping[str, str]) -> Iterator[Cluster]:
    """Start two nodes that know S3 by the variables ``s3`` and share the machine's environments."""
    python = ensure_environment("ray", machine, print) / "bin" / "python"
    homes = (folder / "one", folder / "two")
    for home in homes:
        home.mkdir()
        (home / "envs").symlink_to(machine.home / "envs")
    port = free_port()
    # Ray's sockets have long names, and a socket's may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short:
        environment = {
            **s3, **{name: os.environ[name] for name in OF_THE_MACHINE if name in os.environ},
            "PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(folder),
            "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0",
            # Without it Ray takes the machine's own address for the loopback's.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }  # fmt: skip
        told = {"port": port, "resource": RESOURCE, "homes": [str(home) for home in homes]}
        command = [str(python), str(Path(__file__).with_name("ray_nodes.py")), json.dumps(told)]
        with (folder / "ray.log").open("wb") as log:
            nodes = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        try:
            assert nodes.stdout is not None
            started = nodes.stdout.readline()
            assert started == b"two nodes\n", (folder / "ray.log").read_text()
            yield Cluster(f"http://127.0.0.1:{port}", homes)
        finally:
            nodes.communicate(timeout=60)

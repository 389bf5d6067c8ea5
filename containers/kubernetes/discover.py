"""Keeps the gateway's routes up to date: writes every ready replica of a headless Service into a file.

Runs beside the gateway, needs only Python's standard library, and is copied into the bundle unchanged. The gateway
reads the file again when it changes; the file is replaced atomically.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from pathlib import Path
from typing import TypedDict


class RoutedModel(TypedDict):
    """One model of the routes: where its requests go. Its other keys are kept."""

    backends: list[dict[str, object]]


class RoutesFile(TypedDict):
    """The gateway's routes; other keys are kept."""

    models: dict[str, RoutedModel]


def addresses(service: str, port: int) -> list[str] | None:
    """Return the addresses of all ready replicas, sorted; None if the lookup failed: routes are kept."""
    try:
        found = socket.getaddrinfo(service, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        # The name of a Service without ready replicas resolves to no address.
        return [] if error.errno in {socket.EAI_NODATA, socket.EAI_NONAME} else None
    return sorted({str(entry[4][0]) for entry in found})


def routes(template: RoutesFile, found: list[str], port: int) -> RoutesFile:
    """Return the template with these replicas in every backend of every model."""
    replicas = [
        {"name": address.replace(":", "-"), "url": f"http://[{address}]:{port}" if ":" in address else
         f"http://{address}:{port}"}
        for address in found
    ]  # fmt: skip
    models: dict[str, RoutedModel] = {
        name: {**model, "backends": [{**backend, "replicas": replicas} for backend in model["backends"]]}
        for name, model in template["models"].items()
    }
    return {**template, "models": models}


def write(path: Path, document: RoutesFile) -> None:
    """Replace the file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1))
    part.replace(path)


def main() -> None:
    """Look up the replicas periodically, and write the routes when they change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--template", type=Path, required=True)
    parser.add_argument("--service", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--every", type=float, default=1.0)
    arguments = parser.parse_args()
    written: list[str] | None = None
    while True:
        found = addresses(arguments.service, arguments.port)
        if found is not None and found != written:
            write(arguments.out, routes(json.loads(arguments.template.read_text()), found, arguments.port))
            print(f"{len(found)} replicas: {', '.join(found)}", file=sys.stderr, flush=True)
            written = found
        time.sleep(arguments.every)


if __name__ == "__main__":
    main()

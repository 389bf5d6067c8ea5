"""Keep the gateway's routes up to date: every ready replica that a headless Service names, written as a file.

Runs beside the gateway with nothing but Python's standard library, and is copied into the bundle as it is. The
gateway reads the file again when it changes; it is replaced whole, so that half a file is never read.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any


def addresses(service: str, port: int) -> list[str] | None:
    """The addresses of all ready replicas, in order; None where the name can't be looked up, which is no news."""
    try:
        found = socket.getaddrinfo(service, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        # A Service without a ready replica has a name and no address.
        return [] if error.errno in {socket.EAI_NODATA, socket.EAI_NONAME} else None
    return sorted({str(entry[4][0]) for entry in found})


def routes(template: dict[str, Any], found: list[str], port: int) -> dict[str, Any]:
    """The template with these replicas in every backend of every model."""
    replicas = [
        {"name": address.replace(":", "-"), "url": f"http://[{address}]:{port}" if ":" in address else
         f"http://{address}:{port}"}
        for address in found
    ]  # fmt: skip
    models = {
        name: {**model, "backends": [{**backend, "replicas": replicas} for backend in model["backends"]]}
        for name, model in template["models"].items()
    }
    return {**template, "models": models}


def write(path: Path, document: dict[str, Any]) -> None:
    """Replace the file whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1))
    part.replace(path)


def main() -> None:
    """Look every so often, and write where something changed."""
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

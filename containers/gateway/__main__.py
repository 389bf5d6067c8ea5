"""``python -m containers.gateway --config FILE``: serve until SIGTERM. Exit status 2 if its files are not valid."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from containers.gateway.config import read_settings
from containers.gateway.errors import ConfigurationError


def main() -> int:
    """Read the settings and serve."""
    parser = argparse.ArgumentParser(prog="containers.gateway", description=__doc__)
    parser.add_argument(
        "--config", type=Path, required=True, help="The settings, JSON; see docs/reference/gateway-files.md."
    )
    parser.add_argument("--no-request-log", action="store_true", help="Do not log each request.")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if arguments.no_request_log:
        logging.getLogger("slipway.gateway.requests").setLevel(logging.WARNING)
    import uvloop  # noqa: PLC0415 - `--help` needs none of it

    from containers.gateway.server import serve  # noqa: PLC0415

    try:
        uvloop.run(serve(read_settings(arguments.config)))
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The gateway's image. Its settings are in ``/etc/slipway/gateway.json``."""

from __future__ import annotations

from pathlib import Path

from containers.gateway.config import GatewaySettings
from containers.image.layers import Member, archive
from containers.image.program_image import Program, profile
from containers.image.runtime import health_check

# Can't be the name of a release line, which is MODEL-SCHEME.
_NAME = "gateway"
_PACKAGE = Path(__file__).parent.parent
# The working directory that contains the modules: Python imports from it first.
_FOLDER = "gateway"
_PORT, _ADMIN_PORT = (GatewaySettings.model_fields[name].default for name in ("port", "admin_port"))


def gateway_program(requirements: Path) -> Program:
    """Return the gateway with its modules, and the others that they import.

    ``requirements`` is the folder with ``gateway.txt``, the pins of the environment that `slipway serve` uses for it.
    """
    paths = [_PACKAGE / "__init__.py", _PACKAGE / "errors.py", *(_PACKAGE / "gateway").glob("*.py")]
    root = _PACKAGE.parent
    arguments = ("--config", "/etc/slipway/gateway.json")
    return Program(
        "keys, limits and routing before a release's replicas",
        profile(
            _NAME,
            requirements,
            # The commands of a bundle start `python`.
            {"PATH": "/opt/venv/bin:/usr/local/bin:/usr/bin:/bin"},
            ("/opt/venv/bin/python", "-m", "containers.gateway"),
            arguments,
        ),
        archive([Member(f"{_FOLDER}/{path.relative_to(root).as_posix()}", path.read_bytes()) for path in paths]),
        {
            "Cmd": list(arguments),
            "WorkingDir": f"/{_FOLDER}",
            "ExposedPorts": {f"{port}/tcp": {} for port in (_PORT, _ADMIN_PORT)},
            "Healthcheck": health_check(_ADMIN_PORT, 10),
        },
    )

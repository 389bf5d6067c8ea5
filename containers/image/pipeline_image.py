"""The image that runs the pipeline in a cluster: Dagster's code location, its runs, and its workers.

It has `slipway`, `dagster` and `python` on its ``PATH``, and no container engine.
"""

from __future__ import annotations

from pathlib import Path

from containers.image.layers import Member, archive
from containers.image.program_image import Program, profile

# Can't be the name of a release line, which is MODEL-SCHEME.
_NAME = "pipeline"
_FOLDER = "slipway"
_HOME = "/var/lib/slipway"
_PACKAGES = ("pipeline", "evals", "containers", "registry")
_COMMAND = b"#!/opt/venv/bin/python\nfrom pipeline.cli import main\n\nmain()\n"


def pipeline_program(packages: Path, resources: Path, resources_place: str, version: str) -> Program:
    """Return the pipeline of this version of Slipway.

    ``packages`` is the folder with our packages, ``resources`` that with ``requirements/`` and ``dagster.yaml``, which
    the image has at ``resources_place`` beside the packages, as the wheel has them.
    """
    requirements = resources / "requirements"
    kept = [
        Member(f"{_FOLDER}/{path.relative_to(packages).as_posix()}", path.read_bytes())
        for name in _PACKAGES
        for path in (packages / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and packages / resources_place not in path.parents
    ]
    beside = [
        Member(f"{_FOLDER}/{resources_place}/{path.relative_to(resources).as_posix()}", path.read_bytes())
        for path in (resources / "dagster.yaml", *requirements.iterdir())
    ]
    metadata = f"Metadata-Version: 2.1\nName: slipway\nVersion: {version}\n".encode()
    own = [
        Member(f"{_FOLDER}/slipway-{version}.dist-info/METADATA", metadata),
        Member(f"{_FOLDER}/bin/slipway", _COMMAND, 0o755),
    ]
    arguments = ("slipway", "--help")
    environment = {
        "PATH": f"/{_FOLDER}/bin:/opt/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": f"/{_FOLDER}",
        "SLIPWAY_HOME": _HOME,
        "HOME": _HOME,
        # Models are pulled here, unlike in the images that serve them.
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
    }
    return Program(
        "the release pipeline: Dagster's code location, runs and workers",
        # Kubernetes appends the arguments of Dagster's chart and launcher, which begin with a command's name.
        profile(_NAME, requirements, environment, ("/usr/bin/env",), arguments),
        archive([*kept, *beside, *own]),
        {"Cmd": list(arguments), "WorkingDir": f"/{_FOLDER}", "ExposedPorts": {}, "Healthcheck": {"Test": ["NONE"]}},
    )

"""A Ray cluster as an engine of jobs, through Ray's HTTP API; Ray need not be installed here.

Ray runs a job on a node with the requested resources. The code is uploaded as a package, named by its digest, which Ray
keeps. The other requirements of a node are in ``requirements/ray.txt``.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import cached_property
from pathlib import Path

from pipeline.errors import WorkerFailed
from pipeline.resources import IN_WHEEL, PACKAGES, REQUIREMENTS
from pipeline.workers.launchers.http import SYSTEM_AUTHORITIES, Interface, client
from pipeline.workers.launchers.jobs import NO_LOG, Log
from pipeline.workers.launchers.placement import Ray
from pipeline.workers.launchers.remote_job import node_command
from pipeline.workers.launchers.task import Task
from registry.manifest import FileRecord

_CODE = ("pipeline", "evals", "containers", "registry")


class RayCluster:
    """The jobs of a Ray cluster."""

    def __init__(self, where: Ray) -> None:
        """Keep the settings; connect on the first request."""
        self.where = where
        self.name = f"the Ray cluster at {where.address}"
        self.asked = Interface(self.name, lambda: client(where.address), SYSTEM_AUTHORITIES)

    @cached_property
    def package(self) -> bytes:
        """The code for a node as a zip file; the same code gives the same bytes."""
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
            # Laid out as an installed wheel is, from a checkout too.
            files = {path.relative_to(PACKAGES): path for folder in _CODE for path in (PACKAGES / folder).rglob("*")}
            files |= {Path(IN_WHEEL, "requirements", path.name): path for path in REQUIREMENTS.iterdir()}
            for name, path in sorted(files.items()):
                if path.suffix in {".py", ".in", ".txt", ".yaml"} and "__pycache__" not in path.parts:
                    archive.writestr(zipfile.ZipInfo(name.as_posix()), path.read_bytes())
        return made.getvalue()

    @property
    def code(self) -> str:
        """The digest of the uploaded code."""
        return hashlib.sha256(self.package).hexdigest()

    def close(self) -> None:
        """Close the connections."""
        self.asked.close()

    @property
    def poll_seconds(self) -> float:
        """As often as Ray's own dashboard asks."""
        return 1.0

    def states(self, job: str) -> tuple[str, ...]:  # noqa: ARG002 - of the protocol
        """None: Ray describes a job only in its message, after it has ended."""
        return ()

    def running(self, job: str) -> bool | None:
        """Whether a job waits or runs."""
        found = self.asked.document(f"/api/jobs/{job}")
        return None if found is None else found.get("status") in {"PENDING", "RUNNING"}

    def was_stopped(self, job: str) -> bool:
        """Whether a job was stopped: Ray keeps stopped jobs with that status."""
        found = self.asked.document(f"/api/jobs/{job}")
        return found is None or found.get("status") == "STOPPED"

    def log(self, job: str) -> Log:
        """The job's output on its node."""
        found = self.asked.document(f"/api/jobs/{job}/logs")
        return NO_LOG if found is None else Log(job, str(found.get("logs", "")))

    def why(self, job: str) -> str:
        """Ray's message about the job."""
        found = self.asked.document(f"/api/jobs/{job}")
        return "it was deleted" if found is None else str(found.get("message"))

    def submit(self, job: str, remote_job: FileRecord, task: Task) -> None:
        """Upload the code if the cluster does not have it, and submit the job."""
        home = {"SLIPWAY_HOME": str(self.where.home)} if self.where.home else {}
        document = {
            "submission_id": job,
            "entrypoint": " ".join(node_command(self.where.store, remote_job)),
            "entrypoint_num_cpus": self.where.cpus,
            "entrypoint_num_gpus": self.where.gpus,
            "entrypoint_resources": dict(self.where.resources),
            "runtime_env": {"working_dir": self._give_code(), "env_vars": {**task.variables, **home}},
            "metadata": {"slipway.script": task.script.stem, "slipway.environment": task.environment},
        }
        try:
            self.asked.send("POST", "/api/jobs/", json=document)
        except WorkerFailed:
            if self.running(job) is None:  # the job exists if only the answer was lost
                raise

    def stop(self, job: str) -> None:
        """Stop the job."""
        self.asked.end("POST", f"/api/jobs/{job}/stop")

    def _give_code(self) -> str:
        name = f"_ray_pkg_{self.code[:32]}.zip"
        if self.asked.find(f"/api/packages/gcs/{name}") is None:
            self.asked.send("PUT", f"/api/packages/gcs/{name}", content=self.package)
        return f"gcs://{name}"

"""A Kubernetes cluster as an engine of jobs, through its own HTTP interface.

Each errand is a Job of one pod, which is never started twice and which the cluster removes in the end, whatever becomes
of this process: Dagster's own client (`PipesK8sClient`) starts bare pods, which stay where their starter was killed.
The image has the checkout, and the environment of ``requirements/node.txt`` first on its ``PATH``.
"""

from __future__ import annotations

import ssl
from typing import Any

import httpx

from containers.cpu import NODE_TERMS
from pipeline.errors import SettingsError, WorkerFailed
from pipeline.launchers.http import Interface, client
from pipeline.launchers.placement import Kubernetes
from pipeline.launchers.task import Task
from registry import network
from registry.errors import NetworkError
from registry.manifest import FileRecord

# Seconds that a job that ended can still be looked at.
_KEPT_SECONDS = 24 * 3600
_HOME = "/var/lib/slipway"
_UNPRIVILEGED = 65534
# Without a GPU a worker multiplies with AVX2.
_CPU_AFFINITY = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": list(term)} for term in NODE_TERMS]
        }
    }
}


class KubernetesCluster:
    """The jobs of a namespace."""

    def __init__(self, where: Kubernetes) -> None:
        """Speak to it only when asked something."""
        self.where = where
        self.name = f"Kubernetes at {where.address}, namespace {where.namespace}"
        self.asked = Interface(self.name, self._connect)
        self.jobs = f"/apis/batch/v1/namespaces/{where.namespace}/jobs"
        self.pods = f"/api/v1/namespaces/{where.namespace}/pods"

    @property
    def does(self) -> str:
        """The image, which is named by its digest."""
        return self.where.image

    def running(self, job: str) -> bool | None:
        """Whether a job waits or runs: one that ended says so in its conditions."""
        found = self.asked.find(f"{self.jobs}/{job}")
        return None if found is None else not _ended(found.json())

    def log(self, job: str) -> str:
        """What the job's pod has printed; nothing as long as it has not begun."""
        pod = self._pod(job)
        if pod is None or pod["status"].get("phase") in {None, "Pending", "Unknown"}:
            return ""
        found = self.asked.find(f"{self.pods}/{pod['metadata']['name']}/log")
        return "" if found is None else found.text

    def why(self, job: str) -> str:
        """The conditions of the job and of its pod, and how its container ended."""
        found = self.asked.find(f"{self.jobs}/{job}")
        pod = self._pod(job) or {}
        conditions = [*(_conditions(found.json()) if found is not None else ()), *_conditions(pod)]
        states = [status.get("state", {}) for status in pod.get("status", {}).get("containerStatuses", ())]
        told = [f"{each.get('reason')}: {each.get('message')}" for each in conditions if each.get("message")]
        ends = [f"{state['terminated'].get('reason')}, status {state['terminated'].get('exitCode')}"
                for state in states if "terminated" in state]  # fmt: skip
        return "; ".join([*told, *ends]) or "the cluster says nothing of it"

    def submit(self, job: str, errand: FileRecord, task: Task) -> None:
        """Create the job."""
        try:
            self.asked.send("POST", self.jobs, json=self.manifest(job, errand, task))
        except WorkerFailed:
            if self.running(job) is None:  # an answer that was lost is no refusal
                raise

    def stop(self, job: str) -> None:
        """Delete the job and its pod."""
        self.asked.end("DELETE", f"{self.jobs}/{job}", params={"propagationPolicy": "Background"})

    def manifest(self, job: str, errand: FileRecord, task: Task) -> dict[str, Any]:
        """The job as Kubernetes takes it: hardened, on the nodes and with the resources that are configured."""
        where = self.where
        labels = {"app.kubernetes.io/name": "slipway-worker", "slipway/environment": task.environment}
        resources = {"cpu": where.cpus, "memory": where.memory}
        if where.gpus:
            resources["nvidia.com/gpu"] = str(where.gpus)
        variables = {**task.variables, "SLIPWAY_HOME": _HOME, "HOME": _HOME}
        container = {
            "name": "worker",
            "image": where.image,
            "command": ["python", "-m", "pipeline.launchers.node", where.store, errand.sha256, str(errand.size)],
            "env": [{"name": name, "value": value} for name, value in sorted(variables.items())],
            "envFrom": [{"secretRef": {"name": name}} for name in where.secrets],
            "resources": {"requests": resources, "limits": resources},
            "volumeMounts": [{"name": "home", "mountPath": _HOME}, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 - inside the container
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
        }
        home = {"persistentVolumeClaim": {"claimName": where.claim}} if where.claim else {"emptyDir": {}}
        pod = {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "serviceAccountName": where.service_account,
            "nodeSelector": dict(where.node_selector),
            "affinity": {} if where.gpus else _CPU_AFFINITY,
            "tolerations": [toleration.model_dump(exclude_none=True) for toleration in where.tolerations],
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _UNPRIVILEGED,
                "fsGroup": _UNPRIVILEGED,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "home", **home}, {"name": "tmp", "emptyDir": {}}],
        }
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": job, "namespace": where.namespace, "labels": labels},
            "spec": {
                "backoffLimit": 0,
                "activeDeadlineSeconds": round(where.hours * 3600),
                "ttlSecondsAfterFinished": _KEPT_SECONDS,
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }

    def _pod(self, job: str) -> dict[str, Any] | None:
        found = self.asked.find(self.pods, labelSelector=f"job-name={job}")
        items = [] if found is None else found.json()["items"]
        return items[0] if items else None

    def _connect(self) -> httpx.Client:
        """Connect as whom the token says, which the cluster renews: read each time."""
        where = self.where
        try:
            token = network.token(str(where.token), where.token.read_text()) if where.token else ""
            verify = ssl.create_default_context(cafile=str(where.certificate)) if where.certificate else None
        except NetworkError as error:
            raise SettingsError(str(error)) from error
        except OSError as error:  # ssl's own are too
            raise SettingsError(f"`token` or `certificate` of {self.name} can't be read: {error}") from error
        return client(where.address, {"Authorization": f"Bearer {token}"} if token else {}, verify)


def _conditions(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in document.get("status", {}).get("conditions") or () if isinstance(each, dict)]


def _ended(job: dict[str, Any]) -> bool:
    """Whether a job is complete or failed: Kubernetes' own sign that nothing more becomes of it."""
    return any(each["type"] in {"Complete", "Failed"} and each["status"] == "True" for each in _conditions(job))

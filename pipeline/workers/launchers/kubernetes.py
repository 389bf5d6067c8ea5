"""A Kubernetes cluster as an engine of jobs, through its HTTP API.

Each remote job is a Job of one pod at a time, which the cluster removes in the end even if this process is killed. A
worker that fails is not started again; a pod that the cluster ends (a drain, a lost node, preemption) is replaced.
Dagster's own client (`PipesK8sClient`) starts bare pods, which stay when their starter is killed. The image has the
checkout, and the environment of ``requirements/node.txt`` first on its ``PATH``.
"""

from __future__ import annotations

import ssl
from typing import Any

import httpx

from containers.hardware.cpu import NODE_TERMS
from containers.kubernetes.objects import KubernetesObject
from pipeline.errors import SettingsError, WorkerFailed
from pipeline.workers.launchers.http import SYSTEM_AUTHORITIES, Interface, client
from pipeline.workers.launchers.jobs import NO_LOG, Log
from pipeline.workers.launchers.placement import Kubernetes
from pipeline.workers.launchers.remote_job import node_command
from pipeline.workers.launchers.task import Task
from registry import network
from registry.errors import NetworkSettingError
from registry.manifest import FileRecord

# Seconds that a job is kept after it has ended.
_KEPT_SECONDS = 24 * 3600
_POLL_SECONDS = 5.0
_LONGEST_SAID = 500
_HOME = "/var/lib/slipway"
_UNPRIVILEGED = 65534
# A pod that Kubernetes ends has this condition, and is replaced without counting as a failure of its job. One that
# exceeds its own limits has not: https://kubernetes.io/docs/concepts/workloads/pods/disruptions/
_DISRUPTED = {"type": "DisruptionTarget", "status": "True"}
_REPLACE_DISRUPTED = {"rules": [{"action": "Ignore", "onPodConditions": [_DISRUPTED]}]}
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
# A worker without a GPU needs a CPU with AVX2.
_CPU_AFFINITY = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": list(term)} for term in NODE_TERMS]
        }
    }
}


class KubernetesCluster:
    """The jobs of a Kubernetes namespace."""

    def __init__(self, where: Kubernetes) -> None:
        """Keep the settings; connect on the first request."""
        self.where = where
        self.name = f"Kubernetes at {where.address}, namespace {where.namespace}"
        authority = f"`certificate` ({where.certificate})" if where.certificate else SYSTEM_AUTHORITIES
        self.asked = Interface(self.name, self._connect, authority)
        self.jobs = f"/apis/batch/v1/namespaces/{where.namespace}/jobs"
        self._found: dict[str, dict[str, Any]] = {}
        self._looked: dict[str, dict[str, Any]] = {}
        self.pods = f"/api/v1/namespaces/{where.namespace}/pods"

    @property
    def code(self) -> str:
        """The image with its digest."""
        return self.where.image

    def close(self) -> None:
        """Close the connections."""
        self.asked.close()

    @property
    def poll_seconds(self) -> float:
        """Each check takes three requests, over one connection."""
        return _POLL_SECONDS

    def running(self, job: str) -> bool | None:
        """Whether a job waits or runs, by its conditions; the job is remembered for `states`."""
        found = self.asked.document(f"{self.jobs}/{job}")
        if found is None:
            return None
        self._found[job] = found
        return not _ended(found)

    def was_stopped(self, job: str) -> bool:
        """Whether a job was stopped: it is then deleted, while a job that ended by itself is kept for a day."""
        return self.asked.find(f"{self.jobs}/{job}") is None

    def log(self, job: str) -> Log:
        """The output of the job's newest pod; empty before it starts."""
        pod = self._looked.get(job) or self._pod(job)
        if pod is None or _status(pod).get("phase") in {None, "Pending", "Unknown"}:
            return NO_LOG
        name = str(pod["metadata"]["name"])
        found = self.asked.find(f"{self.pods}/{name}/log")
        return NO_LOG if found is None else Log(name, found.text)

    def states(self, job: str) -> tuple[str, ...]:
        """Conditions, container states and warnings of the job and its pod; the pod is remembered for `log`."""
        pod = self._pod(job)
        if pod is not None:
            self._looked[job] = pod
        waits = pod is None or _status(pod).get("phase") == "Pending"
        lines = [*_said_by(self._found.get(job, {})), *_said_by(pod or {})]
        if waits:
            names = [job, *([pod["metadata"]["name"]] if pod else [])]
            lines += [line for name in names for line in self._warnings(name)]
        return tuple(dict.fromkeys(lines))

    def why(self, job: str) -> str:
        """The states of a job that has ended, and how its container ended."""
        pod = self._pod(job) or self._looked.get(job) or {}
        ends = [f"{state['terminated'].get('reason')}, status {state['terminated'].get('exitCode')}"
                for state in _containers(pod) if "terminated" in state]  # fmt: skip
        return "; ".join([*self.states(job), *ends]) or "the cluster gives no reason"

    def _warnings(self, name: str) -> list[str]:
        """The warnings among an object's events; none if the token may not list events."""
        events = f"/api/v1/namespaces/{self.where.namespace}/events"
        try:
            found = self.asked.document(events, fieldSelector=f"involvedObject.name={name},type=Warning")
        except WorkerFailed:
            return []
        items = (found or {}).get("items") or []
        return [_line(each) for each in items if isinstance(each, dict) and each.get("message")]

    def submit(self, job: str, remote_job: FileRecord, task: Task) -> None:
        """Create the job."""
        try:
            self.asked.send("POST", self.jobs, json=self.manifest(job, remote_job, task))
        except WorkerFailed:
            if self.running(job) is None:  # the job exists if only the answer was lost
                raise

    def stop(self, job: str) -> None:
        """Delete the job and its pod."""
        self.asked.end("DELETE", f"{self.jobs}/{job}", params={"propagationPolicy": "Background"})

    def manifest(self, job: str, remote_job: FileRecord, task: Task) -> KubernetesObject:
        """The manifest of the job: hardened, with the configured nodes and resources."""
        where = self.where
        labels = {
            **where.labels,
            "app.kubernetes.io/name": "slipway-worker",
            "slipway/environment": task.environment,
        }
        described = {"labels": labels, "annotations": dict(where.annotations)}
        queued = {**described, "labels": {**labels, _QUEUE_LABEL: where.queue}} if where.queue else described
        resources = {"cpu": where.cpus, "memory": where.memory}
        if where.ephemeral_storage:
            resources["ephemeral-storage"] = where.ephemeral_storage
        if where.gpus:
            resources["nvidia.com/gpu"] = str(where.gpus)
        variables = {**task.variables, "SLIPWAY_HOME": _HOME, "HOME": _HOME}
        container = {
            "name": "worker",
            "image": where.image,
            "command": node_command(where.store, remote_job),
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
        chosen = {
            "imagePullSecrets": [{"name": name} for name in where.image_pull_secrets],
            "runtimeClassName": where.runtime_class,
            "priorityClassName": where.priority_class,
        }
        pod |= {key: value for key, value in chosen.items() if value}
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": job, "namespace": where.namespace, **queued},
            "spec": {
                "suspend": where.queue is not None,  # Kueue starts it
                "backoffLimit": 0,
                "podFailurePolicy": _REPLACE_DISRUPTED,
                "podReplacementPolicy": "Failed",
                "activeDeadlineSeconds": round(where.hours * 3600),
                "ttlSecondsAfterFinished": _KEPT_SECONDS,
                "template": {"metadata": described, "spec": pod},
            },
        }

    def _pod(self, job: str) -> KubernetesObject | None:
        """The job's newest pod; those before it were ended by the cluster."""
        found = self.asked.document(self.pods, labelSelector=f"job-name={job}")
        items = (found or {}).get("items")
        return max(items, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))) if items else None

    def _connect(self) -> httpx.Client:
        """Connect. The token is read for each request, because the cluster renews it."""
        where = self.where
        try:
            verify = ssl.create_default_context(cafile=str(where.certificate)) if where.certificate else None
        except OSError as error:  # ssl's errors are OSErrors too
            raise SettingsError(f"`certificate` of {self.name} can't be read: {error}") from error
        made = client(where.address, {}, verify)
        made.auth = self._authorized
        return made

    def _authorized(self, request: httpx.Request) -> httpx.Request:
        """Add the token to a request."""
        where = self.where
        try:
            token = network.token(str(where.token), where.token.read_text()) if where.token else ""
        except NetworkSettingError as error:
            raise SettingsError(str(error)) from error
        except OSError as error:
            raise SettingsError(f"`token` of {self.name} can't be read: {error}") from error
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        return request


def _status(document: dict[str, Any]) -> dict[str, Any]:
    found = document.get("status")
    return found if isinstance(found, dict) else {}


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    statuses = [*(_status(pod).get("initContainerStatuses") or ()), *(_status(pod).get("containerStatuses") or ())]
    return [status.get("state") or {} for status in statuses]


def _said_by(document: dict[str, Any]) -> list[str]:
    """An object's messages: its conditions, its reason (for example an eviction), and why its container waits."""
    waiting = [state["waiting"] for state in _containers(document) if "waiting" in state]
    lines = [*_conditions(document), _status(document), *waiting]
    return [_line(each) for each in lines if each.get("message") or each in waiting]


def _line(said: dict[str, Any]) -> str:
    words = ": ".join(str(said[key]) for key in ("reason", "message") if said.get(key))
    return " ".join(words.split())[:_LONGEST_SAID]


def _conditions(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in _status(document).get("conditions") or () if isinstance(each, dict)]


def _ended(job: dict[str, Any]) -> bool:
    """Whether a job has ended: Kubernetes then sets the condition Complete or Failed."""
    return any(each.get("type") in {"Complete", "Failed"} and each.get("status") == "True" for each in _conditions(job))

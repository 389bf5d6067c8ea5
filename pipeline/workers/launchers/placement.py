"""Where workers run, from the file that ``SLIPWAY_WORKERS`` names. It belongs to an installation, not to a model.

The same model file must give the same release on a laptop and on a cluster, so it does not name machines. Each
installation has one file for them::

    launcher: ray
    address: http://127.0.0.1:8265
    store: s3://BUCKET/PREFIX
    gpus: 1
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from containers.kubernetes.names import LabelValue, MetadataKey, ObjectName
from pipeline.errors import SettingsError, SpecError
from pipeline.yaml_file import explain, keys, listed, read

_Store = Annotated[str, Field(pattern=r"^s3://[a-z0-9.-]+(/[\w./-]+)?$")]
# An amount as Kubernetes writes it; its own schema accepts any text.
_Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?$")]


class _Placement(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: int = Field(default=0, ge=0)
    """GPUs per worker."""


class Container(_Placement):
    """Containers of this machine's engine."""

    launcher: Literal["container"]
    """The kind of launcher."""
    image: str | None = Field(default=None, pattern=r"sha256:[0-9a-f]{64}$")
    """An image with the system's libraries, by id or digest; also with Python if this machine's Python is the system's.
    Default: the base of the CPU runtime.
    """
    memory: ByteSize = ByteSize(32 * 2**30)
    """The memory limit of each container."""


class Ray(_Placement):
    """A Ray cluster."""

    launcher: Literal["ray"]
    """The kind of launcher."""
    address: str = Field(pattern=r"^https?://[^/]+$")
    """The address of its jobs API."""
    store: _Store
    """The object store through which files are exchanged."""
    cpus: float = Field(default=1, gt=0)
    """CPUs per worker."""
    resources: Mapping[str, float] = {}
    """The cluster's custom resources, with the amount per worker."""
    home: Path | None = None
    """The folder of worker environments on a node. Default: the node's own `SLIPWAY_HOME`."""


class Toleration(BaseModel):
    """A toleration of workers for a node's taint, as in Kubernetes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str | None = None
    """The taint's key."""
    operator: Literal["Exists", "Equal"] | None = None
    """How the value is compared."""
    value: str | None = None
    """The taint's value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect."""


class Kubernetes(_Placement):
    """A namespace of a Kubernetes cluster; each worker is a Job of one pod."""

    launcher: Literal["kubernetes"]
    """The kind of launcher."""
    address: str = Field(default="https://kubernetes.default.svc", pattern=r"^https?://[^/]+$")
    """The address of the cluster's API."""
    token: Path | None = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    """The file with the access token."""
    certificate: Path | None = Path("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
    """The file with the certificate of the cluster's authority."""
    namespace: str = "default"
    """The namespace of the jobs."""
    image: str = Field(pattern=r"@sha256:[0-9a-f]{64}$")
    """The image that runs workers, by digest: that of `slipway image pipeline`, or one with the checkout, and
    `requirements/node.txt` first on its `PATH`."""
    store: _Store
    """The object store through which files are exchanged."""
    cpus: _Quantity = "4"
    """CPUs per worker."""
    memory: _Quantity = "16Gi"
    """Memory per worker."""
    ephemeral_storage: _Quantity | None = None
    """Ephemeral storage of a pod, for environments and weights: request and limit."""
    node_selector: Mapping[str, str] = {}
    """Labels that nodes must have."""
    tolerations: tuple[Toleration, ...] = ()
    """Tolerations of the pods."""
    service_account: str = "default"
    """The service account of the pods."""
    secrets: tuple[str, ...] = ()
    """Secrets with the environment variables for S3."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets for pulling the image."""
    runtime_class: str | None = None
    """The runtime class, `nvidia` on nodes that need it for GPUs."""
    priority_class: str | None = None
    """The priority class of the pods."""
    labels: Mapping[MetadataKey, LabelValue] = {}
    """Further labels of jobs and pods, for example for the costs of a team."""
    annotations: Mapping[MetadataKey, str] = {}
    """Annotations of jobs and pods, for example `karpenter.sh/do-not-disrupt`."""
    queue: ObjectName | None = None
    """The Kueue queue (`LocalQueue`) of the namespace in which jobs wait for their turn."""
    claim: str | None = None
    """The volume claim for worker environments; without it each pod makes its own."""
    hours: float = Field(default=24, gt=0)
    """Hours after which a job is ended."""


Placement = Annotated[Container | Ray | Kubernetes, Field(discriminator="launcher")]


_PLACEMENT: TypeAdapter[Container | Ray | Kubernetes] = TypeAdapter(Placement)


def placement(path: Path) -> Container | Ray | Kubernetes:
    """Read the file that `SLIPWAY_WORKERS` names.

    Raises:
        SettingsError: listing every key that is unknown, missing or wrong.
    """
    try:
        return _PLACEMENT.validate_python(read(path))
    except SpecError as error:
        raise SettingsError(f"`SLIPWAY_WORKERS`: {error}") from error
    except ValidationError as error:
        known = {*keys(Container), *keys(Ray), *keys(Kubernetes)}
        problems = (explain(detail, known) for detail in map(_without_kind, error.errors()))
        heading = f"{path} (`SLIPWAY_WORKERS`) is not valid:"
        raise SettingsError(listed(heading, problems)) from error


def _without_kind(detail: Any) -> dict[str, Any]:  # noqa: ANN401 - pydantic's own error record
    """The error with the key's path as in the file; pydantic puts the launcher's name before it."""
    if not detail["loc"]:
        return {**detail, "loc": ("launcher",)}
    return {**detail, "loc": detail["loc"][1:]}

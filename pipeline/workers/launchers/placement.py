"""Where workers run, as the file that ``SLIPWAY_WORKERS`` names says it: this installation's affair, not a model's.

The same model's file releases on a laptop and on a cluster, and what comes of it must not depend on which. So a model
says nothing of machines; what it runs on is one file an installation::

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

from pipeline.errors import SettingsError, SpecError
from pipeline.yaml_file import explain, keys, listed, read

_Store = Annotated[str, Field(pattern=r"^s3://[a-z0-9.-]+(/[\w./-]+)?$")]
# As Kubernetes writes amounts; its schemas take any text.
_Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?$")]


class _Placement(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: int = Field(default=0, ge=0)
    """GPUs a worker."""


class Container(_Placement):
    """Containers of this machine's engine."""

    launcher: Literal["container"]
    """What runs workers."""
    image: str | None = Field(default=None, pattern=r"sha256:[0-9a-f]{64}$")
    """The system's libraries, and Python where this machine's is the system's own, by id or digest; the CPU runtime's
    base where it is left out.
    """
    memory: ByteSize = ByteSize(32 * 2**30)
    """Of each container, at most."""


class Ray(_Placement):
    """A Ray cluster."""

    launcher: Literal["ray"]
    """What runs workers."""
    address: str = Field(pattern=r"^https?://[^/]+$")
    """Of its jobs' interface."""
    store: _Store
    """The object store between here and there."""
    cpus: float = Field(default=1, gt=0)
    """CPUs a worker."""
    resources: Mapping[str, float] = {}
    """The cluster's own names, with how much of each a worker takes."""
    home: Path | None = None
    """Where a node keeps environments, if its own `SLIPWAY_HOME` does not say so."""


class Toleration(BaseModel):
    """A taint of nodes that workers put up with, as Kubernetes has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str | None = None
    """The taint's key."""
    operator: Literal["Exists", "Equal"] | None = None
    """How it is compared."""
    value: str | None = None
    """The taint's value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect."""


class Kubernetes(_Placement):
    """A namespace of a Kubernetes cluster; each worker is a Job of one pod."""

    launcher: Literal["kubernetes"]
    """What runs workers."""
    address: str = Field(default="https://kubernetes.default.svc", pattern=r"^https?://[^/]+$")
    """Of the cluster's API."""
    token: Path | None = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    """The file of the token that it is asked with."""
    certificate: Path | None = Path("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
    """The file of the cluster's authority."""
    namespace: str = "default"
    """Where jobs run."""
    image: str = Field(pattern=r"@sha256:[0-9a-f]{64}$")
    """What runs a worker: the checkout, and `requirements/node.txt` first on its `PATH`; by digest."""
    store: _Store
    """The object store between here and there."""
    cpus: _Quantity = "4"
    """CPUs a worker."""
    memory: _Quantity = "16Gi"
    """Memory a worker."""
    ephemeral_storage: _Quantity | None = None
    """What a pod keeps on its node, environments and weights among it: request and limit."""
    node_selector: Mapping[str, str] = {}
    """Labels of nodes."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that workers put up with."""
    service_account: str = "default"
    """Of the pods."""
    secrets: tuple[str, ...] = ()
    """Secrets that hold S3's variables."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets of the image's registry."""
    runtime_class: str | None = None
    """For nodes that give containers no GPU without it: `nvidia`."""
    priority_class: str | None = None
    """Of the pods."""
    claim: str | None = None
    """The volume that keeps workers' environments; without it each pod makes its own."""
    hours: float = Field(default=24, gt=0)
    """Then a job is ended."""


Placement = Annotated[Container | Ray | Kubernetes, Field(discriminator="launcher")]


_PLACEMENT: TypeAdapter[Container | Ray | Kubernetes] = TypeAdapter(Placement)


def placement(path: Path) -> Container | Ray | Kubernetes:
    """Read where workers run.

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
        heading = f"{path} (`SLIPWAY_WORKERS`) does not say where workers run:"
        raise SettingsError(listed(heading, problems)) from error


def _without_kind(detail: Any) -> dict[str, Any]:  # noqa: ANN401 - pydantic's own error record
    """The problem with its path as it stands in the file, which pydantic begins with the launcher's name."""
    if not detail["loc"]:
        return {**detail, "loc": ("launcher",)}
    return {**detail, "loc": detail["loc"][1:]}

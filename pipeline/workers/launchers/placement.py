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
from pipeline.yaml_file import explain, keys, read

_Store = Annotated[str, Field(pattern=r"^s3://[a-z0-9.-]+(/[\w./-]+)?$")]
# As Kubernetes writes amounts; its schemas take any text.
_Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?$")]


class _Placement(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: int = Field(default=0, ge=0)


class Container(_Placement):
    """Containers of this machine's engine, at most ``memory`` bytes each (``32GiB``).

    ``image`` has the system's libraries, and Python where this machine's is the system's own; by its id or digest.
    """

    launcher: Literal["container"]
    image: str | None = Field(default=None, pattern=r"sha256:[0-9a-f]{64}$")
    memory: ByteSize = ByteSize(32 * 2**30)


class Ray(_Placement):
    """A Ray cluster: the address of its jobs' interface, what one worker takes of it, and the object store between.

    ``resources`` are the cluster's own names, with how much of each; ``home`` is where a node keeps environments, if
    its own ``SLIPWAY_HOME`` does not say so.
    """

    launcher: Literal["ray"]
    address: str = Field(pattern=r"^https?://[^/]+$")
    store: _Store
    cpus: float = Field(default=1, gt=0)
    resources: Mapping[str, float] = {}
    home: Path | None = None


class Toleration(BaseModel):
    """A taint of nodes that workers put up with, as Kubernetes has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Kubernetes(_Placement):
    """A namespace of a Kubernetes cluster, the image that does errands, and what one worker takes and puts up with.

    ``ephemeral_storage`` is requested and the limit: what a pod keeps on its node, environments and weights among it.
    As whom it is asked says the file ``token``; ``certificate`` is the cluster's authority. ``secrets`` hold S3's
    variables, ``image_pull_secrets`` the image registry's; the volume of ``claim`` keeps workers' environments, which
    are else made in each pod. ``runtime_class`` is for nodes that give containers no GPU without it. A
    job that takes longer than ``hours`` is ended.
    """

    launcher: Literal["kubernetes"]
    address: str = Field(default="https://kubernetes.default.svc", pattern=r"^https?://[^/]+$")
    token: Path | None = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
    certificate: Path | None = Path("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
    namespace: str = "default"
    image: str = Field(pattern=r"@sha256:[0-9a-f]{64}$")
    store: _Store
    cpus: _Quantity = "4"
    memory: _Quantity = "16Gi"
    ephemeral_storage: _Quantity | None = None
    node_selector: Mapping[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    service_account: str = "default"
    secrets: tuple[str, ...] = ()
    image_pull_secrets: tuple[str, ...] = ()
    runtime_class: str | None = None
    priority_class: str | None = None
    claim: str | None = None
    hours: float = Field(default=24, gt=0)


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
        problems = [explain(detail, known) for detail in map(_without_kind, error.errors())]
        told = "\n".join([f"{path} (`SLIPWAY_WORKERS`) does not say where workers run:", *map("  {}".format, problems)])
        raise SettingsError(told) from error


def _without_kind(detail: Any) -> dict[str, Any]:  # noqa: ANN401 - pydantic's own error record
    """The problem with its path as it stands in the file, which pydantic begins with the launcher's name."""
    if not detail["loc"]:
        return {**detail, "loc": ("launcher",)}
    return {**detail, "loc": detail["loc"][1:]}

"""The settings of the cluster that a bundle is written for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, IPvAnyAddress

from containers.kubernetes.names import LabelValue, MetadataKey, ObjectName

_ByDigest = Annotated[str, Field(pattern=r"^[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+@sha256:[0-9a-f]{64}$")]


def _mebibytes(amount: object) -> object:
    found = re.fullmatch(r"([1-9][0-9]{0,6})(Mi|Gi)", amount) if isinstance(amount, str) else None
    if found is None:
        raise ValueError("expected an amount like 512Mi or 8Gi")
    return int(found[1]) * (1024 if found[2] == "Gi" else 1)


_Mebibytes = Annotated[int, BeforeValidator(_mebibytes)]


class Cluster(BaseModel):
    """Settings of the cluster; unset ones are left out of the bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime_class: ObjectName | None = None
    """The RuntimeClass of engine pods: `nvidia`, for nodes that need it to give containers a GPU."""
    image_pull_secrets: tuple[ObjectName, ...] = ()
    """Pull secrets of all pods; you create the secrets."""
    priority_class: ObjectName | None = None
    """The PriorityClass of all pods."""
    surge: bool = True
    """`false`: an update stops a replica before it starts the next one, for nodes without free room."""
    cpu_request: float | None = Field(default=None, ge=0.001, le=1024)
    """The engine's CPU request in cores; by default half of the cores of the load test."""
    cpu_limits: bool = False
    """Set CPU limits on every container, for namespaces whose quota requires them."""
    ephemeral_storage: _Mebibytes | None = None
    """The engine's request and limit of disk space, like `8Gi`; all other containers get small limits."""
    monitor_labels: Mapping[MetadataKey, LabelValue] = {}
    """Labels of monitors and rules, by which the Prometheus operator selects them."""
    redis_image: _ByDigest | None = None
    """The image of the Redis that gateways share limits in, `REPOSITORY@sha256:…`; by default the tag of Valkey 8."""
    dns: Literal["kube-dns", "openshift"] = "kube-dns"
    """The cluster's DNS: which pods resolve names."""
    dns_addresses: tuple[IPvAnyAddress, ...] = ()
    """Further DNS addresses: NodeLocal DNSCache's, and the `kube-dns` address that it takes over."""

    @property
    def dns_blocks(self) -> tuple[str, ...]:
        """The addresses as CIDR blocks of a network policy: ``169.254.20.10/32``."""
        return tuple(f"{address}/{address.max_prefixlen}" for address in self.dns_addresses)

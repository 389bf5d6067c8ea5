"""What a bundle needs to know of the cluster that it is for, which no release can tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, IPvAnyAddress

# An object's name: a DNS-1123 subdomain.
_Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
_LabelKey = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?$")]
_LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?$")]
_ByDigest = Annotated[str, Field(pattern=r"^[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+@sha256:[0-9a-f]{64}$")]


def _mebibytes(amount: object) -> object:
    found = re.fullmatch(r"([1-9][0-9]{0,6})(Mi|Gi)", amount) if isinstance(amount, str) else None
    if found is None:
        raise ValueError("expected an amount such as 512Mi or 8Gi")
    return int(found[1]) * (1024 if found[2] == "Gi" else 1)


_Mebibytes = Annotated[int, BeforeValidator(_mebibytes)]


class Cluster(BaseModel):
    """The cluster's own: what is not set is not in the bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime_class: _Name | None = None
    """For nodes that give containers no GPU without it: `nvidia`."""
    image_pull_secrets: tuple[_Name, ...] = ()
    """For all pods; the secrets are yours."""
    priority_class: _Name | None = None
    """For all pods."""
    surge: bool = True
    """`false`: an update ends a replica before it starts the next one, for nodes that are full."""
    cpu_request: float | None = Field(default=None, ge=0.001, le=1024)
    """The engine's, in cores; half of those that it was tested with where it is left out."""
    cpu_limits: bool = False
    """Limits on every container, for namespaces whose quota asks for them."""
    ephemeral_storage: _Mebibytes | None = None
    """The engine's request and limit, `8Gi`, and small limits on all other containers."""
    monitor_labels: Mapping[_LabelKey, _LabelValue] = {}
    """Labels on monitors and rules, by which Prometheus' operator selects them."""
    redis_image: _ByDigest | None = None
    """What keeps the limits that gateways share, `REPOSITORY@sha256:…`; the newest Valkey 8 by tag where it is left
    out.
    """
    dns: Literal["kube-dns", "openshift"] = "kube-dns"
    """Which pods answer names."""
    dns_addresses: tuple[IPvAnyAddress, ...] = ()
    """Addresses that answer names beside them: NodeLocal DNSCache's, and the one of `kube-dns` that it takes over."""

    @property
    def dns_blocks(self) -> tuple[str, ...]:
        """The addresses as a network policy takes them: ``169.254.20.10/32``."""
        return tuple(f"{address}/{address.max_prefixlen}" for address in self.dns_addresses)

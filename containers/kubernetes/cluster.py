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
    """The cluster's own: what is not set is not in the bundle.

    ``runtime_class`` is for nodes that give containers no GPU without it. ``dns`` says whose pods answer names, and
    ``dns_addresses`` are asked beside them: NodeLocal DNSCache's own, and the one of `kube-dns` that it takes over.
    Where there is no ``surge``, an update replaces a replica before it starts the next one, for nodes that are full.
    The engine's ``cpu_request``, in cores, is else a share of those that it was tested with. ``cpu_limits`` and
    ``ephemeral_storage`` (MiB of the engine's; the other containers get small ones) are for namespaces whose quota asks
    for limits. ``monitor_labels`` are those by which Prometheus' operator selects monitors and rules. ``redis_image``
    keeps the limits that gateways share, as ``REPOSITORY@sha256:…``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime_class: _Name | None = None
    image_pull_secrets: tuple[_Name, ...] = ()
    priority_class: _Name | None = None
    surge: bool = True
    cpu_request: float | None = Field(default=None, ge=0.001, le=1024)
    cpu_limits: bool = False
    ephemeral_storage: _Mebibytes | None = None
    monitor_labels: Mapping[_LabelKey, _LabelValue] = {}
    redis_image: _ByDigest | None = None
    dns: Literal["kube-dns", "openshift"] = "kube-dns"
    dns_addresses: tuple[IPvAnyAddress, ...] = ()

    @property
    def dns_blocks(self) -> tuple[str, ...]:
        """The addresses as a network policy takes them: ``169.254.20.10/32``."""
        return tuple(f"{address}/{address.max_prefixlen}" for address in self.dns_addresses)

"""What the templates of a bundle write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from containers.kubernetes.admission import Admission
from containers.kubernetes.alerts import Alert, Recording
from containers.kubernetes.cluster import Cluster
from containers.kubernetes.numbers import Number


@dataclass(frozen=True)
class TemplateValues:
    """The values of the templates, which use each by its name.

    ``name`` begins the objects' names, ``line`` is the release line, ``n`` holds the numbers. Amounts of memory and of
    disk space are as Kubernetes writes them; those of disk space are None where the cluster's file sets none.
    """

    name: str
    line: str
    model: str
    version: str
    digest: str
    n: Mapping[str, Number]
    namespace: str
    monitoring_namespace: str
    cluster: Cluster
    admission: Admission | None
    """None where admission controllers check nothing."""
    image: str
    repository: str
    image_digest: str
    pushed: bool
    user: int
    port: int
    model_folder: str
    variant: str | None
    arguments: Sequence[str] | None
    """The server's arguments; None: those of the image."""
    beside: Sequence[str]
    """Folders with further models, beside the model's files."""
    on_gpu: bool
    cpu_terms: Sequence[Sequence[Mapping[str, str | Sequence[str]]]]
    """Node selector terms, each the expressions of one."""
    unbound_ranks: bool
    driver: str
    driver_major: int
    driver_minor: int
    gpu_target: str
    gateway_name: str
    gateway_digest: str
    gateway_known: bool
    redis_name: str
    redis_digest: str
    redis_tag: str
    weights_limit: str
    storage: str | None
    storage_with_weights: str | None
    gateway_storage: str
    gateway_storage_with_weights: str
    searched: bool
    recordings: Sequence[Recording]
    alerts: Sequence[Alert]
    more: Callable[[str, str], str]
    """Returns the further limits of a small container, from its CPU and its disk space."""

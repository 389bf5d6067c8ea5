"""What a gateway tells operators: the ports that it took, and the state of its replicas."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

ReplicaStatus = Literal["starting", "ready", "ejected", "draining"]


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GatewayPorts(_Told):
    """The file that `announce` names, written once the gateway listens."""

    port: int
    admin_port: int
    pid: int


class ReplicaState(_Told):
    """One replica: ``running`` requests, and the ``tokens`` that they may take."""

    name: str
    release: str
    url: str
    state: ReplicaStatus
    running: int
    tokens: int
    ejections: int


class GatewayState(_Told):
    """The answer to `/replicas`; ``routes`` is the digest of the routes in use, ``queues`` counts requests by model."""

    routes: str
    draining: bool
    ready: bool
    queues: dict[str, int]
    replicas: tuple[ReplicaState, ...]

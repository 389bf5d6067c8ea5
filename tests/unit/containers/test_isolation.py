"""Where a network that leads nowhere can be had, and where the port must be published instead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import docker
import pytest

from containers.sandbox.isolation import _has_default_route, is_local


def engine(base_url: str = "http+docker://localhost", **about: Any) -> docker.DockerClient:  # noqa: ANN401 - JSON
    info = {"OperatingSystem": "Debian GNU/Linux 12 (bookworm)", "SecurityOptions": ["name=seccomp,profile=default"]}
    stand_in = SimpleNamespace(api=SimpleNamespace(base_url=base_url), info=lambda: {**info, **about})
    return cast("docker.DockerClient", stand_in)


def test_an_engine_behind_a_socket_of_this_machine_shares_its_network() -> None:
    assert is_local(engine())
    assert is_local(engine(SecurityOptions=None))


@pytest.mark.parametrize(
    "elsewhere",
    [
        engine("http://10.0.0.1:2375"),
        engine("https://10.0.0.1:2376"),
        engine("http+docker://ssh"),
        engine(OperatingSystem="Docker Desktop"),
        engine(SecurityOptions=["name=seccomp,profile=builtin", "name=rootless"]),
    ],
)
def test_one_that_runs_elsewhere_or_in_a_machine_of_its_own_does_not(elsewhere: docker.DockerClient) -> None:
    assert not is_local(elsewhere)


def test_a_process_that_is_gone_has_no_route() -> None:
    assert not _has_default_route(2**22 + 1)

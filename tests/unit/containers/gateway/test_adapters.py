from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from containers.gateway.config import Backend, GatewaySettings, ModelRoute, ReplicaRoute, Routes
from containers.gateway.router import Router
from homes import DEMO


def route(*adapters: str) -> ModelRoute:
    replica = ReplicaRoute(name="one", url="http://127.0.0.1:9")
    backend = Backend(release="demo-awq@v1", replicas=(replica,))
    return ModelRoute(served_as="demo", tokenizer=DEMO / "model", context=1024, adapters=adapters, backends=(backend,))


def test_an_adapter_goes_to_its_models_replicas_under_its_own_name(tmp_path: Path) -> None:
    async def applied() -> Router:
        async with httpx.AsyncClient() as client:
            router = Router(GatewaySettings(keys=tmp_path / "keys", routes=tmp_path / "routes"), client)
            await router.apply(Routes(models={"demo-awq": route("manual", "tests")}))
            router.stop()
            return router

    router = asyncio.run(applied())
    assert [name for name, _ in router.names()] == ["demo-awq", "manual", "tests"]
    pool = router.pool("demo-awq")
    assert pool is not None
    assert router.pool("tests") is pool
    assert router.pool("demo") is None
    assert [pool.served_as(name) for name in ("demo-awq", "tests")] == ["demo", "tests"]


@pytest.mark.parametrize("models", [{"a": route("x"), "b": route("x")}, {"a": route("b"), "b": route()}])
def test_a_name_is_that_of_one_model_or_adapter(models: dict[str, ModelRoute]) -> None:
    with pytest.raises(ValidationError, match="two models or adapters have one name"):
        Routes(models=models)

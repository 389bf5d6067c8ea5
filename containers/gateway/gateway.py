"""The gateway's shared state: files, replicas, limits, metrics and the request log."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path

import httpx

from containers.gateway.account import Account
from containers.gateway.config import GatewaySettings, Routes, Watched
from containers.gateway.connections import Connections
from containers.gateway.errors import ConfigurationError, Refusal
from containers.gateway.intake import Intake
from containers.gateway.keys import Key, Keyring
from containers.gateway.limiter import Limiter
from containers.gateway.metrics import Metrics
from containers.gateway.router import Pool, Router
from containers.gateway.schema import ModelCard, ModelList
from containers.gateway.state import GatewayState, ReplicaState
from containers.gateway.upstream import HEADERS, Upstream

log = logging.getLogger("slipway.gateway")
requests_log = logging.getLogger("slipway.gateway.requests")
SOCKET_BUFFER = 256 * 1024


class Gateway:
    """State shared by all requests. Call `start` before use and `stop` after it, on one event loop."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.keys = Watched(settings.keys, Keyring.parse)
        self.routes = Watched(settings.routes, Routes.model_validate_json)
        connections = Connections(SOCKET_BUFFER)
        self.client = _client(connections)
        self.metrics = Metrics()
        self.router = Router(settings, self.client)
        self.upstream = Upstream(settings, connections, self.metrics)
        self.limiter = _limiter(settings)
        self.intake = Intake(settings.bodies_per_key, settings.body_timeout_s)
        self.engine_headers = _engine_headers(settings)
        self.metrics.show(self.router, self.stale_files)
        # About to stop: the health endpoint says so, while requests are still served.
        self.draining = False
        self._route_error: str | None = None
        self._applied = ""
        self._refreshing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Apply the routes and watch the files.

        Raises:
            ConfigurationError: A file is not valid.
        """
        await self.router.apply(self.routes.value)
        self._applied = self.routes.digest
        self._refreshing = asyncio.ensure_future(self._refresh())

    async def stop(self) -> None:
        """Settle open reservations and stop watching the files."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        self.router.stop()
        await self.limiter.close()
        await self.client.aclose()

    async def authenticate(self, headers: Mapping[bytes, bytes], client: tuple[str, int] | None) -> Key:
        """Return the request's key; ``Refusal`` 401, or 429 after too many failures from one address."""
        header = headers.get(b"authorization")
        try:
            return self.keys.value.authenticate(None if header is None else header.decode("latin-1"), datetime.now(UTC))
        except Refusal as refusal:
            if refusal.code == "invalid_api_key" and client is not None:
                await self.limiter.refuse_guessing(client[0])
            raise

    def pool(self, model: str, key: Key) -> Pool:
        """Return a model's replicas; ``Refusal`` 404 if it is unknown or the key may not use it."""
        pool = self.router.pool(model)
        if pool is None or not key.may_use(model):
            raise Refusal(404, "model_not_found", "unknown model, or your key may not use it", parameter="model")
        return pool

    def models(self, key: Key) -> ModelList:
        """Return the models and adapters that a key may use."""
        cards = [
            ModelCard(id=name, max_model_len=pool.route.context)
            for name, pool in self.router.names()
            if key.may_use(name)
        ]
        return ModelList(data=cards)

    def stale_files(self) -> Iterator[str]:
        """Return the files whose newest content is not valid."""
        if self.keys.error:
            yield "keys"
        if self.routes.error or self._route_error:
            yield "routes"

    def state(self) -> GatewayState:
        """Return the state for operators and `slipway serve`."""
        return GatewayState(
            routes=self._applied,
            draining=self.draining,
            ready=self.router.is_ready,
            queues={name: len(pool.waiting) for name, pool in self.router.pools.items()},
            replicas=tuple(
                ReplicaState(
                    name=replica.name,
                    release=replica.release,
                    url=replica.url,
                    state="draining" if replica.draining else replica.state,
                    running=len(replica.running),
                    tokens=replica.tokens,
                    ejections=replica.ejections,
                )
                for replica in self.router.everyone()
            ),
        )

    def tell(self, account: Account) -> None:
        """Log and count a request, without prompt and answer."""
        seconds = time.monotonic() - account.started
        metrics, who = self.metrics, (account.model, account.key, account.replica)
        metrics.requests.labels(account.model, account.key, account.status, account.code).inc()
        if account.code == "hung_up":
            metrics.hung_up.labels(account.model).inc()
        elif account.status >= 400 and account.replica == "-":
            metrics.refused.labels(account.code).inc()
        if account.replica != "-":
            metrics.latency.labels(*who).observe(seconds)
            metrics.queued.labels(account.model).observe(account.queued_s)
            metrics.overhead.labels(account.model).observe(account.overhead_s)
            metrics.tokens.labels(*who, "prompt").inc(account.prompt_tokens)
            metrics.tokens.labels(*who, "completion").inc(account.completion_tokens)
        if account.first_s is not None:
            metrics.first_token.labels(*who).observe(account.first_s)
        if requests_log.isEnabledFor(logging.INFO):
            requests_log.info(json.dumps({
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request": account.trace.request_id, "trace": account.trace.trace_id, "span": account.trace.span_id,
                "path": account.path, "key": account.key, "model": account.model, "replica": account.replica,
                "release": account.release, "status": account.status, "code": account.code, "stream": account.stream,
                "prompt_tokens": account.prompt_tokens, "completion_tokens": account.completion_tokens,
                "seconds": round(seconds, 4), "queued": round(account.queued_s, 4),
                "first": None if account.first_s is None else round(account.first_s, 4),
            }))  # fmt: skip

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self.settings.reload_interval_s)
            self.keys.refresh()
            if self.routes.refresh():
                try:
                    await self.router.apply(self.routes.value)
                except ConfigurationError as error:
                    self._route_error = str(error)
                    log.warning("kept the routes that were in use: %s", error)
                else:
                    self._route_error = None
                    self._applied = self.routes.digest
            self.router.forget_idle()


def _client(connections: Connections) -> httpx.AsyncClient:
    """Make the HTTP client for the replicas' health checks, with a time limit in seconds."""
    return httpx.AsyncClient(
        transport=connections,
        headers=HEADERS,
        # A cookie set by a replica must not be sent back.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        trust_env=False,
        follow_redirects=False,
    )


def _limiter(settings: GatewaySettings) -> Limiter:
    url = settings.redis
    if settings.redis_file is not None:
        url = _secret(settings.redis_file)
    if url is None:
        return Limiter.in_memory(
            lease_s=settings.request_timeout_s,
            wrong_keys=settings.wrong_keys_per_minute,
            rejected=settings.rejected_per_minute,
        )
    return Limiter.in_redis(
        url,
        lease_s=settings.request_timeout_s,
        wrong_keys=settings.wrong_keys_per_minute,
        rejected=settings.rejected_per_minute,
    )


def _engine_headers(settings: GatewaySettings) -> dict[str, str]:
    if settings.engine_key_file is None:
        return {}
    return {"authorization": f"Bearer {_secret(settings.engine_key_file)}"}


def _secret(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError(f"can't read {path}: {error.strerror}") from error

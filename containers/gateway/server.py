"""The gateway's process: both ports, signals, and a graceful stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from pathlib import Path

import uvicorn

from containers.gateway import app
from containers.gateway.config import GatewaySettings
from containers.gateway.errors import ConfigurationError
from containers.gateway.gateway import SOCKET_BUFFER, Gateway
from containers.gateway.protocol import bounded
from containers.gateway.state import GatewayPorts

log = logging.getLogger("slipway.gateway")
_BACKLOG = 2048


class _Quiet(uvicorn.Server):
    """A uvicorn server that leaves signal handling to this module."""

    def install_signal_handlers(self) -> None:
        """None."""


async def serve(settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT, then drain: report not ready, close the ports later, finish running answers.

    Raises:
        ConfigurationError: A file is not valid, or a port is in use.
    """
    gateway = Gateway(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    api = app.api(gateway)
    public = _listening(settings.host, settings.port)
    private = _listening(settings.admin_host, settings.admin_port)
    await gateway.start()
    servers = [
        _server(api, settings, bounded(settings)),
        _server(app.admin(gateway, api), settings, bounded(settings)),
    ]
    # uvicorn's `serve` would install its own signal handlers; `_serve` is the same without them.
    running = [
        asyncio.ensure_future(server._serve(sockets=[listener]))  # noqa: SLF001
        for server, listener in zip(servers, (public, private), strict=True)
    ]
    _announce(settings, public, private)
    # These objects live until the end. Scanning them at each garbage collection would cost milliseconds.
    gc.collect()
    gc.freeze()
    try:
        waiter = asyncio.ensure_future(stopping.wait())
        await asyncio.wait([waiter, *running], return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        log.info("draining")
        gateway.draining = True
        await asyncio.sleep(settings.drain_delay_s)
    finally:
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*running)
        await gateway.stop()


def _server(application: object, settings: GatewaySettings, protocol: type[asyncio.Protocol]) -> uvicorn.Server:
    config = uvicorn.Config(
        application,  # type: ignore[arg-type]
        loop="uvloop",
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
    )
    return _Quiet(config)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Kernel buffer for a client that reads slowly or not at all. Connections inherit it.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"can't have port {port} of {host}: {error.strerror}") from error
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def _announce(settings: GatewaySettings, public: socket.socket, private: socket.socket) -> None:
    """Log the ports and write them to the announcement file, atomically."""
    ports = GatewayPorts(port=public.getsockname()[1], admin_port=private.getsockname()[1], pid=os.getpid())
    log.info("serving on %s:%s, metrics on %s:%s", settings.host, ports.port, settings.admin_host, ports.admin_port)
    if settings.announce is not None:
        beside = Path(f"{settings.announce}.part")
        beside.write_text(ports.model_dump_json())
        beside.replace(settings.announce)

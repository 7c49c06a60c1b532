"""Server: uvicorn as this service wants it, and a shutdown that lets answers end instead of cutting them."""

from __future__ import annotations

import asyncio
import functools
import math
import resource
import socket
from typing import Any

import uvicorn

from adapters.serving.asgi import create_app
from adapters.serving.protocol import BoundedProtocol, Connections, Limits
from core.service import Service

SLOW_READER_S = 5  # after the last answer has ended, for its bytes to be taken


class Server(uvicorn.Server):
    """One worker over one Service. Signals as uvicorn has them: the first drains, a second Ctrl-C does not wait."""

    def __init__(self, service: Service, limits: Limits | None = None) -> None:
        settings = service.settings
        limits = limits or Limits()
        self._service = service
        needed = limits.connections or max(2048, settings.n_parallel + settings.max_queue + 64)
        protocol: Any = functools.partial(BoundedProtocol, limits=limits, connections=Connections(_room(needed)))
        config = uvicorn.Config(
            lambda: create_app(service),
            factory=True,
            host=settings.host,
            port=settings.port,
            http=protocol,
            lifespan="on",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # a peer's word on whom it speaks for would let it pass as loopback
            timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_s) + SLOW_READER_S,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Running answers go on for SHUTDOWN_GRACE_S; longer ones end with an error event, not in mid-air."""
        closing = asyncio.create_task(self._close_host())
        await super().shutdown(sockets)
        await closing
        if self.force_exit:  # uvicorn then waits for nothing; with their engine gone the answers are about to end
            if self.server_state.tasks:
                await asyncio.wait(self.server_state.tasks, timeout=1)
            await self.lifespan.shutdown()

    async def _close_host(self) -> None:
        host = self._service.host
        closing = asyncio.create_task(host.close(self._service.settings.shutdown_grace_s))
        while not closing.done() and not self.force_exit:
            await asyncio.wait({closing}, timeout=0.1)
        if self.force_exit:
            await host.close(0)
        await closing


def _room(connections: int) -> int:
    """How many connections the process can have open, with a higher limit on file descriptors if it may set one."""
    spare = 256  # for the model's files, downloads and pipes
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    if soft < connections + spare:
        soft = connections + spare if hard == resource.RLIM_INFINITY else min(hard, connections + spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(connections, max(16, soft - spare))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, bound before the first line is printed: so the line is true, and port 0 has become a number.

    Raises OSError.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket) -> str:
    """What to put into a browser or a client."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

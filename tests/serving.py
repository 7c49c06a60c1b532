"""A real uvicorn on a real socket, over whatever Service a test has."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from adapters.asgi import create_app
from core.service import Service


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """Serve in a thread; gives the address, e.g. "http://127.0.0.1:40123". Shuts down as `adapters.local` does."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        lambda: create_app(service),
        factory=True,
        lifespan="on",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    listener.listen(128)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)
        listener.close()
        assert not thread.is_alive()

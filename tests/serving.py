"""Serve a test's Service with uvicorn on a real socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from adapters.serving.server import Limits, Server, address_of, listen
from core.service import Service


@contextmanager
def serving(service: Service, limits: Limits | None = None) -> Iterator[str]:
    """Serve in a thread, as `adapters.local` does, and yield the address, e.g. "http://127.0.0.1:40123"."""
    server = Server(service, limits)
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield address_of(listener)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()

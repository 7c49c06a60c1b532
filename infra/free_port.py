"""Find a free TCP port on loopback."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a port that is free now. Another process may take it before it is used."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port

"""The socket that is listened on, and uvicorn around an application."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Any

from ..data import DataError
from ..data.extras import require

if TYPE_CHECKING:
    import uvicorn

BACKLOG = 2048
GRACE_SECONDS = 30  # that a server which stops gives to requests under way
IDLE_SECONDS = 60  # that a connection is kept for another request


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        DataError: the address is in use, not this machine's, or none.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{host}, port {port}, cannot be listened on ({reason}); give another --host or --port"
        ) from error
    # asyncio sends small answers at once (TCP_NODELAY) only where the protocol is said; create_server leaves it at 0.
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=made.detach())


def address(listening: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def make_server(app: Any) -> uvicorn.Server:
    """The server; its `run(sockets=[...])` ends after SIGTERM or Ctrl-C, when requests under way are answered."""
    uvicorn = require("uvicorn", "serving a model", "serve")
    config = uvicorn.Config(
        app,
        http="h11",  # the one that comes with uvicorn, and is strict, whatever else is installed
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return uvicorn.Server(config)

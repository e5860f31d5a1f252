"""Guard: who may ask, what is counted, and which headers every answer has; an ASGI middleware."""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import Any

from .metrics import Metrics
from .settings import RefusedError, Settings

PATHS = ("/", "/encode", "/health", "/metrics")
OPEN = ("/", "/health")  # without a token: the page holds nothing, and health tells little to those who have none
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


def authorized(headers: dict[bytes, bytes], settings: Settings) -> bool:
    """Whether a request brings the token, or needs none; found in the same time whatever is wrong with it."""
    if settings.token is None:
        return True
    given = headers.get(b"authorization", b"")
    wanted = f"Bearer {settings.token}".encode()
    # Digests are of one length, so that not even that of the token shows.
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(wanted).digest())


class Guard:
    """Refuses requests without the token or for another host, before anything of their bodies is read.

    Args:
        app: what it stands before.
        settings: token and hosts.
        metrics: counts each request.
        refuse: a RefusedError -> the ASGI application that answers so.
    """

    def __init__(self, app: Any, settings: Settings, metrics: Metrics, refuse: Any) -> None:
        self._app, self._settings, self._metrics, self._refuse = app, settings, metrics, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        try:
            app = self._app
            try:
                self._check(scope)
            except RefusedError as refused:
                app = self._refuse(refused)
            await app(scope, receive, sending)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.answered(path, status, time.perf_counter() - start)

    def _check(self, scope: Any) -> None:
        headers = dict(scope["headers"])
        if self._settings.hosts and host_name(headers.get(b"host", b"").decode("latin-1")) not in self._settings.hosts:
            # A page elsewhere can give its own name this machine's address, and would then read what is answered.
            raise RefusedError(
                400, f"the Host header must name {' or '.join(self._settings.hosts)}, as this server has no token"
            )
        if scope["path"] not in OPEN and not authorized(headers, self._settings):
            raise RefusedError(
                401, "give the token of this server, as Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )


def host_name(host: str) -> str:
    """Of a Host header, without the port; IPv6 addresses without brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()

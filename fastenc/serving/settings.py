"""What a server allows, and how a request is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits and ways of a server.

    Attributes:
        token: what requests must bring as `Authorization: Bearer TOKEN`; None asks for none.
        max_rows: rows, texts or items in a request.
        max_bytes: of a request's body.
        batch_rows: rows of several requests that the model takes at once.
        wait_ms: milliseconds that a request waits, at most, for others to join it.
        queue: requests that are in the server at once, from their head to their answer.
        hosts: names that the Host header may have, without ports; empty for any.
    """

    token: str | None = None
    max_rows: int = 10_000
    max_bytes: int = 16 << 20
    batch_rows: int = 1024
    wait_ms: float = 2.0
    queue: int = 128
    hosts: tuple[str, ...] = ()


class RefusedError(Exception):
    """A request that is answered by an error: a status of HTTP, one sentence, and maybe headers."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = dict(headers or {})

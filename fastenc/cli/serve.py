"""`fastenc serve`: a model behind HTTP."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from ..data import DataError
from ..pipeline import SavedModel
from ..serving import Settings, listen, make_app, make_server
from ..serving.server import address, is_loopback
from .options import ModelArgument, not_negative

SHORTEST_TOKEN = 16
MAKE_TOKEN = "python -c 'import secrets; print(secrets.token_urlsafe())'"
DEFAULTS = Settings()


def serve(
    folder: ModelArgument,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="What requests must bring as Authorization: Bearer TOKEN. Others on this machine can see options: "
            "--token-file is better.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default=False, help="A file that holds the token.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows, texts or items in a request.")] = DEFAULTS.max_rows,
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = DEFAULTS.max_bytes,
    batch_rows: Annotated[
        int, typer.Option(min=1, help="Rows of several requests that the model takes at once; 1: no joining.")
    ] = DEFAULTS.batch_rows,
    wait_ms: Annotated[
        float, typer.Option(callback=not_negative, help="Milliseconds that a request waits for others to join it.")
    ] = DEFAULTS.wait_ms,
    queue: Annotated[int, typer.Option(min=1, help="Requests at once; others are told to retry.")] = DEFAULTS.queue,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the model's computations; by default PyTorch's own number.")
    ] = None,
) -> None:
    """Serve the model in DIR over HTTP: POST /encode, GET /health and /metrics, and a page at /.

    Only this machine reaches it unless --host says otherwise, which needs a token. SIGTERM or Ctrl-C let the requests
    under way be answered first. A new model in DIR is served after a restart. docs/serving.md says what is sent.
    """
    if token_file is not None:
        if token is not None:
            raise DataError("--token and --token-file are given; leave one of them out")
        token = token_file.read_text(encoding="utf-8", errors="replace").strip()
    check_access(host, token)
    if threads is not None:
        torch.set_num_threads(threads)
    hosts = () if token is not None else tuple(dict.fromkeys(("127.0.0.1", "localhost", "::1", host.lower())))
    with ending_by_sigterm():
        run(SavedModel(folder), host, port, Settings(token, max_rows, max_bytes, batch_rows, wait_ms, queue, hosts))


def run(saved: SavedModel, host: str, port: int, settings: Settings) -> None:
    with listen(host, port) as listening:
        server = make_server(make_app(saved, settings))
        typer.echo(f"serving {type(saved.model).__name__} on {address(listening)} (Ctrl-C stops it)")
        server.run(sockets=[listening])


def check_access(host: str, token: str | None) -> None:
    """Refuse a server that is open to others without a token, or whose token is none."""
    if token is None:
        if not is_loopback(host):
            raise DataError(
                f"--host {host} lets others reach this server; write a token to a file, by {MAKE_TOKEN}, and name it "
                "by --token-file"
            )
    elif len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise DataError(
            f"the token must be {SHORTEST_TOKEN} or more letters, digits and signs without spaces; make one by "
            f"{MAKE_TOKEN}"
        )


@contextmanager
def ending_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the program as if it were done: uvicorn raises it again when all requests are answered."""

    def end(signal_number: int, frame: Any) -> NoReturn:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""How many requests a second does `fastenc serve` answer, how long does each take, and what does joining them do?

    python -m benchmarks.serve                             # two minutes; installed: python -m fastenc.benchmarks.serve
    python -m benchmarks.serve --seconds 1 --clients 1 8   # a look

Starts the server as a process of its own, on random weights, and asks from this one: each client sends a request of
one row, waits for the answer, and sends the next. Both processes share the machine, so figures are of the two together.
The CPU time is what a busy machine changes least. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastenc import Encoder
from fastenc.data import Preprocessor

from .machine import describe_machine, load_warning
from .tables import markdown_table

FEATURES = 64
# The first is held by any cache; the second is 22 MB of weights, which each call reads whatever its number of rows.
MODELS = {"64-128-64-32-16": (128, 64, 32, 16), "64-2048-2048-512-64": (2048, 2048, 512, 64)}
WAYS = {"joined": (), "one by one": ("--batch-rows", "1")}
CLIENTS = (1, 16, 64)
WARM_UP = 0.5  # seconds that are not counted
HEADER = (
    *("model", "clients", "requests", "requests/s", "p50, ms", "p99, ms", "rows in a call of the model"),
    "CPU time of the server, ms a request",
)


@dataclass(frozen=True)
class Load:
    """What clients saw: seconds of each answered request `[requests]`, over `seconds` in all."""

    latencies: np.ndarray
    seconds: float

    def cells(self) -> list[str]:
        p50, p99 = 1e3 * np.percentile(self.latencies, (50, 99))
        return [f"{len(self.latencies) / self.seconds:,.0f}", f"{p50:.2f}", f"{p99:.2f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description="Load fastenc serve with requests.")
    parser.add_argument("--seconds", type=float, default=5.0, help="that each row of the table is measured for")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, metavar="N", help="that ask at once")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="WIDTHS")
    parser.add_argument("--threads", type=int, default=1, help="of the model in the server")
    parsed = parser.parse_args(arguments)
    if parsed.seconds <= 0 or min(parsed.clients) < 1:
        parser.error("--seconds must be more than 0 and --clients at least 1")
    machine = describe_machine()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in parsed.models:
            path = save_model(Path(folder) / model, MODELS[model])
            for way, options in WAYS.items():
                with server(path, "--threads", str(parsed.threads), *options) as (url, process):
                    for clients in parsed.clients:
                        rows.append([model, str(clients), way, *measure(url, process, clients, parsed.seconds)])
                        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"{machine['cpu']}, {machine['cores']} cores, {parsed.threads} threads of the model, {machine['time']}")
    if warning := load_warning(machine):
        print(f"**Warning:** {warning}")
    print()
    print("\n".join(markdown_table(list(HEADER), rows)))
    return 0


def save_model(folder: Path, widths: Sequence[int]) -> Path:
    x = np.random.default_rng(0).normal(size=(256, FEATURES))
    Encoder(FEATURES, widths).save_pretrained(folder, preprocessing=Preprocessor().fit(x).to_dict())
    return folder


@contextmanager
def server(folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """The address and process number of a `fastenc serve` that runs as long as this."""
    command = [sys.executable, "-m", "fastenc", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            found = re.search(r"http://\S+/", child.stdout.readline())
            if found is None:
                raise RuntimeError("fastenc serve did not start; its error is above")
            yield found[0], child.pid
        finally:
            child.terminate()
            child.wait()


def measure(url: str, process: int, clients: int, seconds: float) -> list[str]:
    """A row of the table, from "requests/s" on: what so many clients see, and what it costs the server."""
    asyncio.run(ask(url, clients, WARM_UP))
    before, started = calls_of_the_model(url), cpu_seconds(process)
    load = asyncio.run(ask(url, clients, seconds))
    used = cpu_seconds(process) - started
    rows, calls = np.subtract(calls_of_the_model(url), before)
    return [*load.cells(), f"{rows / calls:.1f}", f"{1e3 * used / len(load.latencies):.2f}"]


def cpu_seconds(process: int) -> float:
    """That a process has used; NaN where there is no /proc."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime of proc(5)


def calls_of_the_model(url: str) -> tuple[float, float]:
    """Rows and calls since the server started."""
    with urllib.request.urlopen(f"{url}metrics") as answer:
        text = answer.read().decode()
    found = [re.search(rf"^fastenc_batch_rows_{name} (\S+)$", text, re.MULTILINE) for name in ("sum", "count")]
    return tuple(float(each[1]) for each in found if each is not None)  # type: ignore[return-value]


async def ask(url: str, clients: int, seconds: float) -> Load:
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    row = np.random.default_rng(1).normal(size=(1, FEATURES)).round(4).tolist()
    body = json.dumps({"rows": row}).encode()
    head = f"POST /encode HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    start = time.perf_counter()
    works = [keep_asking(host, int(port), head.encode() + b"\r\n\r\n" + body, start + seconds) for _ in range(clients)]
    latencies = await asyncio.gather(*works)
    return Load(np.concatenate(latencies), time.perf_counter() - start)


async def keep_asking(host: str, port: int, request: bytes, end: float) -> list[float]:
    """One client: seconds of each of its requests."""
    reader, writer = await asyncio.open_connection(host, port)
    latencies = []
    try:
        while (start := time.perf_counter()) < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            if not head.startswith(b"HTTP/1.1 200 ") or length is None:
                raise RuntimeError(f"the server answered {head.splitlines()[0].decode()}")
            await reader.readexactly(int(length[1]))
            latencies.append(time.perf_counter() - start)
    finally:
        writer.close()
        await writer.wait_closed()
    return latencies


if __name__ == "__main__":
    sys.exit(main())

"""What the tests of `fastenc serve` share: saved models, a server in a thread or as a process, reading its answers."""

from __future__ import annotations

import functools
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import fastenc
from fastenc.data import DataError, Preprocessor
from fastenc.frontends import Collection, FrontEncoder, FrontEnd, Reader
from fastenc.pipeline import SavedModel
from fastenc.serving import Settings, listen, make_app, make_server
from fastenc.serving.server import address

TIMEOUT = 60.0


def people(rows: int = 40) -> pd.DataFrame:
    """A table with numbers, text, and a missing number in row 3."""
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "age": generator.normal(40, 10, rows).round(2),
            "colour": generator.choice(["red", "green", "blue"], rows),
            "height": generator.normal(170, 10, rows).round(2),
        }
    )
    frame.loc[3, "height"] = np.nan
    return frame


def save_model(folder: Path, features: object, seed: int = 0, widths: Sequence[int] = (8, 5), **options: str) -> Path:
    """An autoencoder with random weights for an array or a table, with its preprocessing."""
    preprocessor = Preprocessor(**options).fit(features)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fastenc.AutoEncoder(fastenc.Encoder(len(preprocessor.feature_names), widths, activation="tanh"))
    model.save_pretrained(folder, preprocessing=preprocessor.to_dict())
    return folder


def array_model(folder: Path) -> tuple[SavedModel, np.ndarray]:
    """A model of four numbers, learned from an array, and rows for it."""
    x = np.random.default_rng(1).normal(size=(30, 4))
    return SavedModel(save_model(folder, x)), x


class Numbers(FrontEnd):
    """Stands for the front ends: rows of numbers of any length, NaN behind them -> their sum, count and largest."""

    kind = "points"
    out_features = 3
    summary_features = 1

    def get_config(self) -> dict:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        there = ~x.isnan()
        largest = x.nan_to_num(-torch.inf).amax(1)
        return torch.stack([x.nan_to_num().sum(1), there.sum(1).to(x.dtype), largest], 1)

    def summary(self, x: Tensor) -> Tensor:
        return x.nan_to_num().sum(1, keepdim=True)


class NumbersReader(Reader):
    """Files of numbers, one item in each."""

    kind = "points"
    suffixes = (".pts",)

    def read(self, item: object) -> np.ndarray:
        text = item.decode() if isinstance(item, bytes) else Path(item).read_text()
        try:
            return np.array(text.split(), np.float32)
        except ValueError as error:
            raise DataError(f"{item} holds no numbers; correct it") from error

    def batch(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.from_numpy(each) for each in arrays], True, torch.nan)

    def front_end(self) -> FrontEnd:
        return Numbers()

    def to_dict(self) -> dict:
        return {"kind": self.kind}

    @classmethod
    def from_dict(cls, state: dict) -> Reader:
        return cls()


class LinesReader(NumbersReader):
    """Texts, or files with one in each line; their letters' numbers."""

    kind = "text"
    suffixes = (".txt",)

    @classmethod
    def collect(cls, path: Path, target: str | None = None, column: str | None = None) -> Collection:
        lines = path.read_text().splitlines()
        if not lines:
            raise DataError(f"{path} is empty; write some lines")
        return Collection(cls.kind, str(path), lines, [f"line {number}" for number in range(len(lines))])

    def read(self, item: object) -> np.ndarray:
        if not item:
            raise DataError("the text is empty; write something")
        return np.array([ord(letter) for letter in str(item)], np.float32)


def integer_model() -> FrontEncoder:
    """Whose sums of small whole numbers are exact in float32, whatever their order."""
    model = FrontEncoder(Numbers(), fastenc.Encoder(3, (4,), activation="identity"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) - 2)
    return model


@contextmanager
def serving(saved: object, **settings: object) -> Iterator[httpx.Client]:
    """A client of a server in a thread of this process."""
    with listen("127.0.0.1", 0) as listening:
        server = make_server(make_app(saved, Settings(**settings)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            with httpx.Client(base_url=address(listening), timeout=TIMEOUT, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def started(folder: Path, *options: object, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`fastenc serve` as a process, and its address."""
    command = [sys.executable, "-m", "fastenc", "serve", str(folder), *map(str, options)]
    if "--port" not in options:
        command += ["--port", "0"]
    # Whoever runs the tests in the background of a shell has Ctrl-C ignored, and so would the child.
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=environment, preexec_fn=listens) as child:
        try:
            line = child.stdout.readline()
            found = re.search(r"http://\S+/", line)
            assert found, line + child.stderr.read()
            yield child, found[0]
        finally:
            child.kill()


def finish(child: subprocess.Popen) -> tuple[int, str]:
    """The exit code, and what is on stderr."""
    _, errors = child.communicate(timeout=TIMEOUT)
    return child.returncode, errors


def connect(url: str) -> socket.socket:
    place = httpx.URL(url)
    return socket.create_connection((place.host, place.port), timeout=TIMEOUT)


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def wait_until(true: object, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def as_bytes(save: Callable, *arguments: object, **options: object) -> bytes:
    """What `save` writes to a file."""
    file = io.BytesIO()
    save(file, *arguments, **options)
    return file.getvalue()


def upload(client: httpx.Client, name: str, content: str | bytes, **options: object) -> httpx.Response:
    return client.post("encode", files={"file": (name, content)}, **options)


def vectors(response: httpx.Response) -> np.ndarray:
    """The vectors of an answer to encode."""
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["rows"] == len(answer["vectors"])
    assert {len(vector) for vector in answer["vectors"]} == {answer["width"]}
    return np.array(answer["vectors"], np.float32)


def refusal(response: httpx.Response, status: int) -> str:
    """The one sentence of a refusal."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    sentence = response.json()["error"]
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    return sentence

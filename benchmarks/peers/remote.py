"""Peers that live in an environment of their own, each in a process that takes its own time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..harness import Results, Side

WORKER = Path(__file__).with_name("worker.py")
EPSILON_FIRST = ("keras-tensorflow", "keras-torch", "sklearn")  # see Task.epsilon_first
# The name of each in a report, and in worker.py.
PEERS = {
    "JAX, jit of the step": "jax-jit",
    "JAX, jit and scan of the epoch": "jax-scan",
    "Keras fit on TensorFlow": "keras-tensorflow",
    "Keras fit on torch": "keras-torch",
    "scikit-learn MLPRegressor": "sklearn",
}
CURE = "is not installed here; run: make bench-peers"
LIMIT_S = 300.0  # that a peer may take for an answer, compiling included


@dataclass(frozen=True)
class Task:
    """An autoencoder to train by Adam and mse: first weights, rows to time and rows to check, all float32.

    epsilon_first: what the short training gives, in float64, where Adam adds epsilon to sqrt(v) before that is
        corrected for its first steps, as Keras and scikit-learn have it; PyTorch and optax add it after.
    """

    weights: list[Tensor]
    data: Tensor
    checked: Tensor
    epochs: int
    batch: int
    checked_epochs: int
    checked_batch: int
    lr: float
    threads: int
    epsilon_first: Results


class PeerError(RuntimeError):
    """A peer that cannot be measured, in one sentence."""


def sides(environment: Path | None, task: Task) -> dict[str, Side | str]:
    """A side for each of PEERS, or why there is none."""
    if environment is None:
        return {name: f"{name} {CURE}" for name in PEERS}
    return {name: start(environment, name, task) for name in PEERS}


def start(environment: Path, name: str, task: Task) -> Side | str:
    worker = Worker(environment, PEERS[name], task)
    try:
        answer = worker.ask("hello")
    except PeerError as error:
        worker.close()
        return f"{name} cannot be measured: {error}"
    if (why := answer.get("missing")) is not None:
        worker.close()
        return f"{name} {CURE} ({why})"
    exact = task.epsilon_first if PEERS[name] in EPSILON_FIRST else None
    return Side(partial(worker.run, 1), worker.check, worker.sample, worker.close, exact)


class Worker:
    """The process of one peer. It answers each line of JSON with one, and waits in between without computing."""

    def __init__(self, environment: Path, kind: str, task: Task) -> None:
        self.folder = tempfile.TemporaryDirectory()
        weights = {f"weight{i}": tensor.cpu().numpy() for i, tensor in enumerate(task.weights)}
        arrays = {**weights, "data": task.data.numpy(), "checked": task.checked.numpy()}
        np.savez(Path(self.folder.name) / "task.npz", **arrays)
        numbers = ("epochs", "batch", "checked_epochs", "checked_batch", "lr", "threads")
        (Path(self.folder.name) / "task.json").write_text(json.dumps({name: getattr(task, name) for name in numbers}))
        threads = str(task.threads)
        environ = os.environ | {
            "OMP_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "passive",  # or its threads would spin while another side is timed
            "OPENBLAS_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        command = [str(environment / "bin" / "python"), str(WORKER), kind, self.folder.name]
        if hasattr(os, "sched_getaffinity") and task.threads < len(os.sched_getaffinity(0)):
            # JAX has no setting for its number of threads: it takes the processors that it is given.
            allowed = sorted(os.sched_getaffinity(0))[: task.threads]
            command = ["taskset", "-c", ",".join(map(str, allowed)), *command]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """What the worker answers.

        Raises:
            PeerError: it died, or says what went wrong.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], LIMIT_S)[0]:
                self.process.kill()
                raise PeerError(f"it gave no answer within {LIMIT_S:.0f} seconds")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            assert self.process.stderr is not None
            last = (self.process.stderr.read().strip().splitlines() or ["without a word"])[-1]
            raise PeerError(f"its process ended: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def run(self, calls: int) -> Results:
        self.ask("run", calls=calls)
        return ()

    def sample(self, calls: int) -> float:
        return self.ask("run", calls=calls)["ns"] / calls

    def check(self) -> Results:
        """The loss of each epoch and the output, of the short training."""
        self.ask("check")
        with np.load(Path(self.folder.name) / "checked.npz") as file:
            losses, output = torch.from_numpy(file["losses"]), torch.from_numpy(file["output"])
        return (*losses.unbind(), output)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        self.folder.cleanup()

"""One peer in a process of its own: `python worker.py KIND FOLDER`, run by the environment that has the peer.

It answers each line of JSON on stdin with one on stdout: {"command": "hello"} with {} or {"missing": why}, "run" with
the nanoseconds of so many calls, "check" once FOLDER/checked.npz has the losses and the output of the short training.
It imports nothing of fastenc. FOLDER holds task.npz and task.json, as remote.py writes them.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

Layers = list[tuple[np.ndarray, np.ndarray]]  # weight [out, in] and bias [out] of each


class Jax:
    """A step under jax.jit, Adam by optax."""

    def __init__(self, task: dict[str, Any], layers: Layers) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        self.jax, self.task, self.layers = jax, task, layers
        self.optimizer = optimizer = optax.adam(task["lr"])

        def output(parameters, x):
            for weight, bias in parameters[:-1]:
                x = jax.nn.relu(x @ weight.T + bias)
            weight, bias = parameters[-1]
            return x @ weight.T + bias

        def step(state, batch):
            parameters, moments = state
            loss, gradients = jax.value_and_grad(lambda p: jnp.mean((output(p, batch) - batch) ** 2))(parameters)
            updates, moments = optimizer.update(gradients, moments, parameters)
            return (optax.apply_updates(parameters, updates), moments), loss

        self.step = step
        self.jitted = jax.jit(step, donate_argnums=0)
        self.output = jax.jit(output)
        self.state = self.first_state()

    def first_state(self):
        parameters = [(self.jax.numpy.array(weight), self.jax.numpy.array(bias)) for weight, bias in self.layers]
        return parameters, self.optimizer.init(parameters)

    def epoch(self, state, x, order, batch):
        total = 0.0
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            state, loss = self.jitted(state, x[rows])
            total = total + loss * len(rows)
        return state, total / len(order)

    def train(self, state, x, epochs, batch, shuffle):
        losses = []
        for _ in range(epochs):
            order = np.random.permutation(len(x)) if shuffle else np.arange(len(x))
            state, loss = self.epoch(state, x, order, batch)
            losses.append(loss)
        return state, self.jax.block_until_ready(losses)

    def run(self, x) -> None:
        self.state, _ = self.train(self.state, x, self.task["epochs"], self.task["batch"], True)

    def check(self, x) -> tuple[np.ndarray, np.ndarray]:
        task = self.task
        (parameters, _), losses = self.train(
            self.first_state(), x, task["checked_epochs"], task["checked_batch"], False
        )
        return np.array(losses), np.array(self.output(parameters, x))


class JaxScan(Jax):
    """The whole epoch in one call: lax.scan over its batches, and a step for the short one at its end."""

    def __init__(self, task: dict[str, Any], layers: Layers) -> None:
        super().__init__(task, layers)
        jax, step = self.jax, self.step

        def epoch(state, x, order, batch):
            full = len(order) // batch * batch
            state, losses = jax.lax.scan(
                lambda state, rows: step(state, x[rows]), state, order[:full].reshape(-1, batch)
            )
            total = losses.sum() * batch
            if full < len(order):
                state, loss = step(state, x[order[full:]])
                total = total + loss * (len(order) - full)
            return state, total / len(order)

        self.epoch = jax.jit(epoch, static_argnums=3, donate_argnums=0)

    def train(self, state, x, epochs, batch, shuffle):
        return super().train(state, self.jax.numpy.asarray(x), epochs, batch, shuffle)


class Keras:
    """Sequential of Dense, compile and fit, as Keras's first page has it."""

    def __init__(self, task: dict[str, Any], layers: Layers, backend: str) -> None:
        os.environ["KERAS_BACKEND"] = backend
        if backend == "torch":
            import torch

            torch.set_num_threads(task["threads"])
        else:
            import tensorflow

            tensorflow.config.threading.set_intra_op_parallelism_threads(task["threads"])
            tensorflow.config.threading.set_inter_op_parallelism_threads(1)
        import keras

        self.keras, self.task, self.layers = keras, task, layers
        self.model = self.make()

    def make(self):
        keras = self.keras
        dense = [keras.layers.Dense(len(bias), activation="relu") for _, bias in self.layers[:-1]]
        dense.append(keras.layers.Dense(len(self.layers[-1][1])))
        model = keras.Sequential([keras.Input((self.layers[0][0].shape[1],)), *dense])
        model.compile(optimizer=keras.optimizers.Adam(self.task["lr"], epsilon=1e-8), loss="mse")
        model.set_weights([array for weight, bias in self.layers for array in (weight.T, bias)])
        return model

    def run(self, x) -> None:
        self.model.fit(x, x, epochs=self.task["epochs"], batch_size=self.task["batch"], verbose=0)

    def check(self, x) -> tuple[np.ndarray, np.ndarray]:
        task, model = self.task, self.make()
        fitted = model.fit(
            x, x, epochs=task["checked_epochs"], batch_size=task["checked_batch"], shuffle=False, verbose=0
        )
        return np.array(fitted.history["loss"], np.float32), np.array(model.predict(x, verbose=0))


class Sklearn:
    """MLPRegressor. Its loss is half of the mean square, its gradient that of the sum over a row's outputs."""

    def __init__(self, task: dict[str, Any], layers: Layers) -> None:
        from sklearn.exceptions import ConvergenceWarning

        warnings.simplefilter("ignore", ConvergenceWarning)
        self.task, self.layers = task, layers
        self.model: Any = None

    def make(self, batch: int, shuffle: bool):
        from sklearn.neural_network import MLPRegressor

        return MLPRegressor(
            hidden_layer_sizes=tuple(len(bias) for _, bias in self.layers[:-1]),
            alpha=0.0,
            batch_size=batch,
            learning_rate_init=self.task["lr"],
            shuffle=shuffle,
            epsilon=1e-8 * len(self.layers[-1][1]) / 2,  # of the scale that its gradients have
            max_iter=1,
            n_iter_no_change=10**9,
            warm_start=True,  # fit goes on from the weights there are, with a new Adam
        )

    def run(self, x) -> None:
        if self.model is None:
            self.model = self.make(self.task["batch"], True)
            self.model.max_iter = self.task["epochs"]
        self.model.fit(x, x)

    def check(self, x) -> tuple[np.ndarray, np.ndarray]:
        model = self.make(self.task["checked_batch"], False)
        model.fit(x, x)
        for coefficients, intercepts, (weight, bias) in zip(model.coefs_, model.intercepts_, self.layers, strict=True):
            coefficients[:], intercepts[:] = weight.T, bias
        before = len(model.loss_curve_)
        model.max_iter = self.task["checked_epochs"]
        model.fit(x, x)
        losses = model.loss_curve_[before:] or model.loss_curve_
        return 2 * np.array(losses[-self.task["checked_epochs"] :], np.float32), model.predict(x)


KINDS = {
    "jax-jit": Jax,
    "jax-scan": JaxScan,
    "keras-tensorflow": lambda task, layers: Keras(task, layers, "tensorflow"),
    "keras-torch": lambda task, layers: Keras(task, layers, "torch"),
    "sklearn": Sklearn,
}


def main(kind: str, folder: Path) -> None:
    # Frameworks write to stdout as they please; the answers have a copy of it to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = json.loads((folder / "task.json").read_text())
    with np.load(folder / "task.npz") as file:
        arrays = dict(file)
    weights = [arrays[f"weight{i}"] for i in range(len(arrays) - 2)]
    layers = list(zip(weights[::2], weights[1::2], strict=True))
    peer: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if asked["command"] == "hello":
                peer = KINDS[kind](task, layers)
            elif asked["command"] == "check":
                losses, output = peer.check(arrays["checked"])
                np.savez(folder / "checked.npz", losses=losses, output=output)
            else:
                start = time.perf_counter_ns()
                for _ in range(asked["calls"]):
                    peer.run(arrays["data"])
                answer["ns"] = time.perf_counter_ns() - start
        except ModuleNotFoundError as error:
            answer["missing"] = str(error)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

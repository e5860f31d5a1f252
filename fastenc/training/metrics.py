"""Metrics of the user's: torchmetrics objects, and functions of (prediction, target)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

MetricFunction = Callable[[Tensor, Tensor], Any]


class Metrics:
    """Measures predictions batch by batch.

    Args:
        metrics: torchmetrics objects or functions, or name -> one of them. A function is called once, with all rows
            [rows, ...] on the CPU; a torchmetrics object sees one batch after another, and so needs no memory for them.
            Names are those of the function or class, in_this_form; a MetricCollection gives its own.

    Raises:
        TypeError, ValueError: something else, two of a name, or the name "loss".
    """

    def __init__(self, metrics: Iterable[Any] | Mapping[str, Any] = ()) -> None:
        named = metrics.items() if isinstance(metrics, Mapping) else _named(metrics)
        self._running: dict[str, Any] = {}
        self._functions: dict[str, MetricFunction] = {}
        for name, metric in named:
            if name in ("loss", "lr") or name in self._running or name in self._functions:
                taken = f"{name} is measured already" if name in ("loss", "lr") else f"two metrics are called {name}"
                raise ValueError(f"{taken}; give metrics as a dict of other names")
            if all(callable(getattr(metric, method, None)) for method in ("update", "compute", "reset")):
                self._running[name] = metric
            elif callable(metric) and not isinstance(metric, type):
                self._functions[name] = metric
            else:
                what = f"the class {metric.__name__}" if isinstance(metric, type) else repr(metric)
                raise TypeError(f"a metric is {what}; give torchmetrics objects or functions of (prediction, target)")
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.latest: dict[str, float] = {}  # what `compute` gave

    def __bool__(self) -> bool:
        return bool(self._running or self._functions)

    def reset(self, device: torch.device) -> None:
        """Forget what was seen, and go to where predictions are."""
        self._seen = []
        for metric in self._running.values():
            if hasattr(metric, "to"):
                metric.to(device)
            metric.reset()

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """See a batch.

        Raises:
            TypeError: the model gives something else than one tensor.
        """
        if not isinstance(prediction, Tensor):
            raise TypeError(
                f"the model gives a {type(prediction).__name__}, and metrics need one tensor; leave them out"
            )
        for metric in self._running.values():
            metric.update(prediction.detach(), target)
        if self._functions:
            self._seen.append((prediction.detach().cpu(), target.cpu().clone()))  # a batch's memory is used again

    def compute(self) -> dict[str, float]:
        """name -> number, over all batches since `reset`.

        Raises:
            ValueError: a metric gives something else than one number.
        """
        results: dict[str, float] = {}
        for name, metric in self._running.items():
            value = metric.compute()
            if isinstance(value, Mapping):
                results.update({key: _number(key, part) for key, part in value.items()})
            else:
                results[name] = _number(name, value)
            metric.reset()
        if self._functions:
            prediction, target = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            self._seen = []
            for name, function in self._functions.items():
                results[name] = _number(name, function(prediction, target))
        self.latest = results
        return results


def _named(metrics: Iterable[Any]) -> list[tuple[str, Any]]:
    if isinstance(metrics, str) or not isinstance(metrics, Iterable):
        raise TypeError(f"metrics is {metrics!r}; give a list of torchmetrics objects or functions, or a dict of them")
    return [(_name(metric), metric) for metric in metrics]


def _name(metric: Any) -> str:
    name = getattr(metric, "__name__", type(metric).__name__)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"the metric {name} gives {value!r}; make it give one number") from None

"""Metrics of the user's: torchmetrics objects, and functions of (prediction, target)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .sharing import Share


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
        self._metrics: dict[str, Any] = {}
        for name, metric in named:
            if name in ("loss", "lr") or name in self._metrics:
                taken = f"{name} is measured already" if name in ("loss", "lr") else f"two metrics are called {name}"
                raise ValueError(f"{taken}; give metrics as a dict of other names")
            if isinstance(metric, type) or not (callable(metric) or _is_running(metric)):
                what = f"the class {metric.__name__}" if isinstance(metric, type) else repr(metric)
                raise TypeError(f"a metric is {what}; give torchmetrics objects or functions of (prediction, target)")
            self._metrics[name] = metric
        self._running = [metric for metric in self._metrics.values() if _is_running(metric)]
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.latest: dict[str, float] = {}  # what `compute` gave

    def __bool__(self) -> bool:
        return bool(self._metrics)

    def reset(self, device: torch.device) -> None:
        """Forget what was seen, and go to where predictions are."""
        self._seen = []
        for metric in self._running:
            if hasattr(metric, "to"):
                metric.to(device)
            metric.reset()

    def update(self, prediction: Tensor, target: Tensor, share: Share | None = None) -> None:
        """See a batch, or this process's share of it and by it the whole; torchmetrics adds up over processes itself.

        Raises:
            TypeError: the model gives something else than one tensor.
        """
        if not isinstance(prediction, Tensor):
            raise TypeError(
                f"the model gives a {type(prediction).__name__}, and metrics need one tensor; leave them out"
            )
        own = whole = (prediction.detach(), target)
        if share is not None:
            own = (share.own(own[0]), share.own(target))
            whole = (share.whole(prediction.detach()), share.whole(target))
        for metric in self._running:
            seen = own if _adds_up_itself(metric) else whole
            if len(seen[0]):
                metric.update(*seen)
        if len(self._running) < len(self._metrics):
            self._seen.append((whole[0].cpu(), whole[1].cpu().clone()))  # a batch's memory is used again

    def compute(self) -> dict[str, float]:
        """name -> number, over all batches since `reset`.

        Raises:
            ValueError: a metric gives something else than one number.
        """
        results: dict[str, float] = {}
        whole = [torch.cat(parts) for parts in zip(*self._seen, strict=True)]
        self._seen = []
        for name, metric in self._metrics.items():
            value = metric.compute() if _is_running(metric) else metric(*whole)
            if isinstance(value, Mapping):
                results.update({key: _number(key, part) for key, part in value.items()})
            else:
                results[name] = _number(name, value)
        for metric in self._running:
            metric.reset()
        self.latest = results
        return results


def _is_running(metric: Any) -> bool:
    """Whether it is a torchmetrics object, or works as one."""
    return all(callable(getattr(metric, method, None)) for method in ("update", "compute", "reset"))


def _adds_up_itself(metric: Any) -> bool:
    """Whether `compute` is over all processes."""
    return any(kind.__module__.partition(".")[0] == "torchmetrics" for kind in type(metric).__mro__)


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

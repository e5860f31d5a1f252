"""explain(): which backend runs the layers of a model, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .ops import Decision


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is for people."""

    decisions: tuple[Decision, ...]

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends in use, each once."""
        return tuple(dict.fromkeys(decision.backend for decision in self.decisions))

    def __str__(self) -> str:
        if not self.decisions:
            return "no fused layer ran"
        return "\n".join(str(decision) for decision in self.decisions)


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """Run `model(x)` once, without gradients and in eval mode, and say which backend each fused layer or stack took.

    Args:
        model: any module, with FusedDense layers or fastenc's models in it.
        x: an input of the model; what holds for it holds for inputs of its shape, dtype and device.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), ops.record() as decisions:
            model(x)
    finally:
        for module in training:
            module.training = True
    return Explanation(tuple(decisions))

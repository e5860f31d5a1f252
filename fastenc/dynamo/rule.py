"""Which of the layers found are worth our operators, against what Inductor makes of them.

As for eager PyTorch: `fastenc.ops.parts` cuts a chain, and a part is one operator where `fastenc.ops.select` chooses
kernels for it, with the number of rows that the graph has as it is compiled. What eager PyTorch's product is faster for
is so for Inductor's, which is the same. A training step with few rows is the compiler's: its products cost less than a
call with all that a backward pass needs. Figures are in docs/compile.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..backends import reference
from . import match
from .match import Layer, value

FEW_ROWS = 4


def divide(chain: Sequence[Layer]) -> Iterator[tuple[list[Layer], str | None]]:
    """The chain in parts, each with the reason in words why it is left to the compiler; None for a part to fuse."""
    training = value(chain[-1].out).requires_grad
    rows = _rows(value(chain[0].inputs[0]))
    if rows is None:
        yield list(chain), "the number of rows is not known when it is compiled"
        return
    x, weights, _ = _stand_ins(chain, rows)
    if x.is_cpu and training and rows <= FEW_ROWS and ops.forced_backend() == "auto":
        yield list(chain), "a training step with so few rows is faster compiled"
        return
    for part in ops.parts(x, weights, training) or [slice(None)]:
        layers = list(chain[part])
        if all(layer.activation == "identity" for layer in layers):
            yield layers, match.NO_ACTIVATION
        else:
            yield layers, _why_not(layers, rows, training)


def _why_not(layers: Sequence[Layer], rows: int, training: bool) -> str | None:
    with ops.record() as decisions:
        backend = ops.select(*_stand_ins(layers, rows), [layer.activation for layer in layers], training)
    return decisions[-1].reason if backend in (None, reference) else None


def _rows(x: Tensor) -> int | None:
    """The rows of x as the graph has them when it is compiled; None if that depends on data."""
    rows = 1
    for size in x.shape[:-1]:
        hint = size if isinstance(size, int) else size.node.hint
        if hint is None:
            return None
        rows *= hint
    return rows


def _stand_ins(layers: Sequence[Layer], rows: int) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """x, weights and biases of the sizes, dtype and device that they will have, without memory of that size."""
    out = value(layers[-1].out)
    one = torch.empty((), dtype=out.dtype, device=out.device)
    weights = [one.expand(tuple(value(layer.inputs[1]).shape)) for layer in layers]
    biases = [None if layer.inputs[2] is None else one.expand(len(w)) for layer, w in zip(layers, weights, strict=True)]
    return one.expand(rows, weights[0].shape[1]), weights, biases

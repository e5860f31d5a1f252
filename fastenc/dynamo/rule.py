"""Which of the layers found are worth our operators, against what Inductor makes of them.

A chain is one operator where `fastenc.ops.select` chooses kernels for it, with the number of rows that the graph has as
it is compiled. On the CPU a layer is left out of it for which eager PyTorch would be chosen alone, with or without
gradients: its product takes all the time, and Inductor calls the same BLAS library for it. With AVX-512 there is none.
Measured on an AMD EPYC with AVX2 (one thread; Inductor's time as a multiple of ours, inference and training step):
1.2 and 1.1 for 32 rows of 100-128-64-32-16; 0.8 and 0.8 for 32 rows of 768-3072-768 if it were fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from .. import ops
from ..backends import reference
from .match import Layer, value

NO_ACTIVATION = "no activation of ours follows"


def divide(chain: Sequence[Layer]) -> Iterator[tuple[list[Layer], str | None]]:
    """The chain in parts, each with the reason in words why it is left to the compiler; None for a part to fuse."""
    training = value(chain[-1].out).requires_grad
    rows = _rows(value(chain[0].inputs[0]))
    if rows is None:
        yield list(chain), "the number of rows is not known when it is compiled"
        return
    for part in ops.parts(*_stand_ins(chain, rows)[:2]) or [slice(None)]:
        for reason, layers in groupby(chain[part], lambda layer: _why_not_in_chain(layer, rows, training)):
            run = list(layers)
            if reason is None and all(layer.activation == "identity" for layer in run):
                reason = NO_ACTIVATION
            yield run, reason or _why_not(run, rows, training)


def _why_not_in_chain(layer: Layer, rows: int, training: bool) -> str | None:
    if value(layer.out).is_cuda:
        return None
    return _why_not([layer], rows, False) or (_why_not([layer], rows, True) if training else None)


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

"""One graph: find, decide, fuse, and say what was done."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import fx

from . import match, rewrite, rule
from .match import Layer, value

log = logging.getLogger("fastenc.dynamo")

_recorder: ContextVar[list[Found] | None] = ContextVar("fastenc_found", default=None)


class Found(NamedTuple):
    """A chain of layers in a graph, and why it was left to the compiler; None if it is one operator of ours."""

    layers: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.layers}: {f'left to the compiler ({self.reason})' if self.reason else 'fused'}"


@contextmanager
def record() -> Iterator[list[Found]]:
    """Collect what is found meanwhile in this thread."""
    found: list[Found] = []
    token = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(token)


def fuse_graph(graph: fx.Graph) -> None:
    """Fuse in place what is worth it in a graph of Dynamo's."""
    rewrite.expand(graph)
    chains, left = match.find(graph)
    for linear, reason in left:
        _note(Found(_in_words([Layer(linear, linear, "identity")]), reason))
    for chain in chains:
        for part, why_not in rule.divide(chain):
            _note(Found(_in_words(part), why_not))
            if why_not is None:
                rewrite.fuse(graph, part)
    graph.lint()


def _note(found: Found) -> None:
    log.info("%s", found)
    if (recorder := _recorder.get()) is not None:
        recorder.append(found)


def _in_words(chain: Sequence[Layer]) -> str:
    """For example "[s0, 784] -> 128 relu -> 64"."""
    x, out = value(chain[0].inputs[0]), value(chain[-1].out)
    if x is None or out is None:
        return str(chain[0].linear)  # in a graph that says nothing of its tensors
    steps = [f"[{', '.join(map(str, x.shape))}]"]
    for layer in chain:
        shape = value(layer.linear).shape
        steps.append(f"{shape[-1] if shape else 1} {layer.activation}".removesuffix(" identity"))
    return f"{' -> '.join(steps)} {str(out.dtype).removeprefix('torch.')}"

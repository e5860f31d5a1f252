"""Random numbers of a Trainer's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor


class RandomNumbers:
    """Inside `use`, PyTorch's global generators go on from `seed`, or from where the last `use` ended.

    Afterwards they are as they were. With seed None, `use` does nothing.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self._own: list[Tensor] | None = None

    @contextmanager
    def use(self, device: torch.device) -> Iterator[None]:
        if self.seed is None:
            yield
            return
        generators = _generators(device)
        before = [generator.get_state() for generator in generators]
        for index, generator in enumerate(generators):
            if self._own is None:
                generator.manual_seed(self.seed)
            else:
                generator.set_state(self._own[index])
        try:
            yield
        finally:
            self._own = [generator.get_state() for generator in generators]
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)


def _generators(device: torch.device) -> list[Generator]:
    """PyTorch's global generators that work on `device` draws from: the CPU's, which also shuffles, and its own."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators

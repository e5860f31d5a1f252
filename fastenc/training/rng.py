"""Random numbers of a Trainer's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor


class RandomNumbers:
    """Inside `use`, PyTorch's global generators go on from `seed`, or from where the last `use` ended.

    Afterwards they are as they were. With seed None, `use` does nothing.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self._own: list[Tensor] | None = None
        self._used = False  # at the moment

    @contextmanager
    def use(self, device: torch.device) -> Iterator[None]:
        if self.seed is None:
            yield
            return
        used = generators(device)
        before = [generator.get_state() for generator in used]
        for index, generator in enumerate(used):
            if self._own is None:
                generator.manual_seed(self.seed)
            else:
                generator.set_state(self._own[index])
        self._used = True
        try:
            yield
        finally:
            self._used = False
            self._own = [generator.get_state() for generator in used]
            for generator, state in zip(used, before, strict=True):
                generator.set_state(state)

    def state(self, device: torch.device) -> dict[str, Any]:
        """Where the random numbers are, those of Python and numpy too; for `load`."""
        kind, keys, *others = np.random.get_state(legacy=True)
        version, numbers, gauss = random.getstate()
        live = self._used or self.seed is None
        return {
            "torch": [generator.get_state() for generator in generators(device)] if live else self._own,
            "python": (version, torch.tensor(numbers, device="cpu"), gauss),
            "numpy": (kind, torch.tensor(np.asarray(keys).tolist(), device="cpu"), *others),
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state` gave; a GPU's numbers are left where there are none of this device in it."""
        if self._used or self.seed is None:
            for generator, own in zip(generators(device), state["torch"] or (), strict=False):
                generator.set_state(own)
        else:
            self._own = state["torch"]
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers.tolist()), gauss))
        kind, keys, *others = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *others))


def generators(device: torch.device) -> list[Generator]:
    """PyTorch's global generators that work on `device` draws from: the CPU's, which also shuffles, and its own."""
    used = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        used.append(torch.cuda.default_generators[device.index or 0])
    return used

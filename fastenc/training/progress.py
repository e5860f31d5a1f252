"""One line about how training goes."""

from __future__ import annotations

import sys
from typing import Any

from .callbacks import Callback


class Progress(Callback):
    """A tqdm bar over the epochs with the latest numbers, on stderr; without tqdm, one line for each epoch."""

    writes = True

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self._bar: Any = None

    def on_train_begin(self) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=self.epochs, unit="epoch", desc="training", file=sys.stderr)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        numbers = ", ".join(f"{name}={value:.4g}" for name, value in logs.items())
        if self._bar is None:
            print(f"epoch {epoch + 1}/{self.epochs}: {numbers}", file=sys.stderr)
            return
        self._bar.set_postfix_str(numbers, refresh=False)
        self._bar.update()

    def on_train_end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def wants_progress(verbose: bool | str) -> bool:
    """True and False as they are; "auto" where stderr is a terminal.

    Raises:
        ValueError: anything else.
    """
    if verbose == "auto":
        return sys.stderr is not None and sys.stderr.isatty()
    if verbose in (True, False):
        return bool(verbose)
    raise ValueError(f"verbose is {verbose!r}; give 'auto', True or False")

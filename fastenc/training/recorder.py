"""CUDA graphs: work recorded once on a GPU's stream, and run again by one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_WAIT = "called a synchronizing CUDA operation"  # what PyTorch's warning says
_EXPERIMENT = "Synchronization debug mode is a prototype feature"


class CudaRecorder:
    """Records work on one GPU. What is replayed reads and writes the memory that was recorded; no Python code runs.

    All work, ordinary steps too, runs on one stream beside PyTorch's default one, which cannot be recorded: autograd
    keeps the stream on which a parameter was first used and would go back to it while recording.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def why_not(self, device: torch.device) -> str | None:
        """Why work on `device` cannot be recorded, in words; None if it can."""
        return None if device.type == "cuda" else f"the model is on {device}, and CUDA graphs are for GPUs"

    @contextmanager
    def stream(self, device: torch.device) -> Iterator[None]:
        """Run what is inside on the stream for recording, after what was asked of the current one and before the rest.

        Memory of either stream may be used on the other: each waits for the other at both ends.
        """
        with torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            side = self._streams[device]
            current = torch.cuda.current_stream(device)
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    yield
            finally:
                current.wait_stream(side)

    @contextmanager
    def watch(self, waits: list[str]) -> Iterator[None]:
        """Add to `waits`, in words, where what is inside waits for the GPU: that cannot be recorded.

        To try and fail would be worse: a recording that is broken off can leave PyTorch's random numbers unusable.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            text = str(warning.message)
            if _WAIT in text:
                waits.append(f"it waits for the GPU ({warning.filename}, line {warning.lineno})")
            elif _EXPERIMENT not in text:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work()` without running it; call this inside `stream`.

        Returns the replay. The graph and its memory go when it goes.
        """
        graph, device = torch.cuda.CUDAGraph(), torch.cuda.current_stream().device
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                work()
        except BaseException:
            graph.reset()  # so that the allocator stops recording as well
            # And the generator of random numbers, which a recording takes along and only its regular end sets free.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
                torch.zeros(1, device=device)  # PyTorch warns of an empty one
            raise
        return graph.replay

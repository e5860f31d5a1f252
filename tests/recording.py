"""A stand-in for CUDA graphs on the CPU: operations recorded once and run again on the same memory, without Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class NotPermittedError(RuntimeError):
    """What a GPU says to work that cannot be recorded."""


class Recording(TorchDispatchMode):
    """Runs the operations inside, keeps them, and on leaving undoes what they wrote: recording runs nothing.

    `replay` runs them again as they were recorded: from the same tensors, with the same numbers, into the memory of the
    same results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> Recording:
        self._random = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        super().__exit__(*exc)
        torch.set_rng_state(self._random)
        with torch.no_grad():
            for tensor, before in reversed(self._before.values()):  # of views of one memory the first counts
                if 0 not in tensor.stride():  # expanded: nothing can have written to it
                    tensor.copy_(before)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITS:
            raise NotPermittedError(f"operation not permitted when stream is capturing: {function}")
        kwargs = kwargs or {}
        for tensor in tensors((args, kwargs)):  # of all operations: a schema does not tell that batch norm writes
            self._before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        results = function(*args, **kwargs)
        memory = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        fresh = [t.untyped_storage().data_ptr() not in memory for t in tensors(results)]
        self.calls.append((function, args, kwargs, results, fresh))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, results, fresh in self.calls:
            again = function(*args, **kwargs)
            for old, new, is_fresh in zip(tensors(results), tensors(again), fresh, strict=True):
                if is_fresh:
                    old.detach().copy_(new.detach())


class Waits(TorchDispatchMode):
    """Notes operations that would wait for a GPU."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITS:
            self.notes.append(f"it waits for the GPU ({function})")
        return function(*args, **(kwargs or {}))


class CpuRecorder:
    """CudaRecorder's twin. `recordings` keeps all, `replayed` counts; a recording ends with `fail`, if given."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.recordings: list[Recording] = []
        self.replayed = 0
        self.fail = fail

    def why_not(self, device: torch.device) -> str | None:
        return None

    def stream(self, device: torch.device):
        return nullcontext()

    @contextmanager
    def watch(self, waits: list[str]) -> Iterator[None]:
        with Waits(waits):
            yield

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        recording = Recording()
        with recording:
            work()
            if self.fail is not None:
                raise self.fail
        self.recordings.append(recording)

        def replay() -> None:
            self.replayed += 1
            with _disable_current_modes():  # what watches the host sees nothing of it
                recording.replay()

        return replay


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

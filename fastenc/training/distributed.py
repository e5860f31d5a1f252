"""The processes of one job, as torchrun starts them: joining them, and talking with the others.

Nothing of torch.distributed is asked where WORLD_SIZE is absent or 1 and no process group was made.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class ProcessesError(RuntimeError):
    """The processes of a job cannot be joined, or one was lost; the message says what to do."""


class Processes:
    """This process and the others of its job. What all of them have to call is marked "together".

    Small things and tensors of the CPU go through a gloo group of its own, so that `close` tells the others at once
    that this process gives up; tensors of GPUs go through the default group, whatever its backend.

    Attributes:
        rank, count: which process this is, from 0, and how many there are.
    """

    def __init__(self) -> None:
        """Together."""
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._world = dist.group.WORLD
        self._group: Any = None
        self._open()

    @property
    def alive(self) -> bool:
        """Whether the default group is still the one that this was made in."""
        return dist.is_initialized() and dist.group.WORLD is self._world

    def close(self) -> None:
        """Let go of the others: those that wait for this process get a ProcessesError. The next call joins again."""
        group, self._group = self._group, None
        if group is not None and self.alive:
            dist.destroy_process_group(group)

    def add(self, tensor: Tensor) -> None:
        """Together: `tensor` becomes the sum over the processes, the same bits on each."""
        with self._talking():
            dist.all_reduce(tensor, group=self._for(tensor))

    def any(self, flag: bool) -> bool:
        """Together: whether it is True on any process."""
        flags = torch.tensor([float(flag)], device="cpu")
        self.add(flags)
        return bool(flags.item() > 0)

    def gather(self, part: Tensor, counts: Sequence[int]) -> Tensor:
        """Together: the rows of all processes, in their order; `part` has `counts[rank]` of them."""
        padded = part.new_zeros((max(counts), *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in counts]
        with self._talking():
            dist.all_gather(parts, padded, group=self._for(part))
        return torch.cat([rows[:count] for rows, count in zip(parts, counts, strict=True)])

    def tell(self, thing: Any) -> list[Any]:
        """Together: what each process has told."""
        told = [None] * self.count
        with self._talking():
            dist.all_gather_object(told, thing, group=self._small())
        return told

    def from_first(self, work: Callable[[], T]) -> T:
        """Together: what `work()` gives on process 0, or the error that it raises there."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = work()
            except Exception as error:
                answer[1] = error
        with self._talking():
            dist.broadcast_object_list(answer, src=0, group=self._small())
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    @torch.no_grad()
    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Together: the tensors get the values that they have on process 0."""
        with self._talking():
            for tensor in tensors:
                whole = tensor if tensor.is_contiguous() else tensor.contiguous()
                dist.broadcast(whole, src=0, group=self._for(tensor))
                if whole is not tensor:
                    tensor.copy_(whole)

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[nn.Parameter], scale: float) -> None:
        """Together: each gradient becomes the sum of `scale` times those of the processes, in one message.

        Gradients in 16 bits are added up in fp32. One that a process lacks counts as 0; None stays where all lack it.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        kinds = [(p.device, torch.promote_types(p.dtype, torch.float32)) for p in trained]
        for device, dtype in dict.fromkeys(kinds):
            some = [p for p, kind in zip(trained, kinds, strict=True) if kind == (device, dtype)]
            given = torch.tensor([float(p.grad is not None) for p in some], dtype=dtype, device=device)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            message = torch.cat([*(grad.flatten().to(dtype) for grad in grads), given])
            message[: -len(some)].mul_(scale)
            self.add(message)
            *sums, given = message.split([*(p.numel() for p in some), len(some)])
            sums = [part.view_as(p) for part, p in zip(sums, some, strict=True)]
            if any(p.grad is None for p in some):  # to look at `given` is to wait for a GPU
                for parameter, part, count in zip(some, sums, given.tolist(), strict=True):
                    if parameter.grad is None and count > 0:
                        parameter.grad = torch.empty_like(parameter).copy_(part)
            present = [(p.grad, part) for p, part in zip(some, sums, strict=True) if p.grad is not None]
            if present:
                torch._foreach_copy_([grad for grad, _ in present], [part for _, part in present])

    def _for(self, tensor: Tensor) -> Any:
        return self._small() if tensor.is_cpu else self._world

    def _small(self) -> Any:
        if self._group is None:
            self._open()
        return self._group

    def _open(self) -> None:
        with self._talking():
            self._group = dist.new_group(backend="gloo")

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessesError(
                f"process {self.rank} of {self.count} has lost the others ({_first_sentence(error)}); one of them has "
                "ended or failed, and its own message tells why: start the job again, with fit(resume=...) to go on "
                "from the latest checkpoint"
            ) from error


def find_processes(known: Processes | None) -> Processes | None:
    """Those of this job, joined if they are not yet; None where this process is alone.

    `known`: those that were found before.

    Raises:
        ProcessesError: WORLD_SIZE tells of others, and they cannot be joined.
    """
    if not dist.is_available():
        return None
    if not dist.is_initialized():
        if _environment("WORLD_SIZE", 1) == 1:
            return None
        _join()
    if dist.get_world_size() == 1:
        return None
    return known if known is not None and known.alive else Processes()


def is_first() -> bool:
    """Whether this is the one process of its job that writes files."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return _environment("WORLD_SIZE", 1) == 1 or _environment("RANK", 0) == 0


def own_device(device: torch.device | str) -> torch.device:
    """`device`; but "cuda" is the process's own GPU where torchrun has started several on this machine."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and _environment("WORLD_SIZE", 1) > 1:
        device = torch.device("cuda", _environment("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
    return device


def _join() -> None:
    try:
        dist.init_process_group()
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and the others cannot be joined "
            f"({_first_sentence(error)}); start the program with torchrun, or unset WORLD_SIZE"
        ) from error
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].split(". ")[0]


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ProcessesError(
            f"{name} is {text!r}, which is no number; start the program with torchrun, or unset WORLD_SIZE"
        ) from None

"""Whether all processes of a job were asked for the same, said in one sentence on each where they were not."""

from __future__ import annotations

import hashlib
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from fastenc.data import DataError

from .distributed import Processes
from .sources import Rows, Stream

if TYPE_CHECKING:
    from .fitting import Fit
    from .trainer import Trainer

_LOOKED_AT = 256  # rows by which two arrays are told apart


def agree_on_fit(processes: Processes, trainer: Trainer, fit: Fit, epochs: int) -> bool:
    """Together: see that a fit, or with 0 epochs a part of one, is the same for all.

    Returns: whether a callback on any process has work inside an epoch's steps.

    Raises:
        DataError, ValueError: it is not, or a batch is too small.
    """
    loader = getattr(fit.train, "loader", None)
    if loader is not None and loader.batch_size is not None:
        _check_batch_size(processes, "the DataLoader's batch_size", loader.batch_size)
    elif epochs:
        _check_batch_size(processes, "batch_size", fit.batch_size)
    asked = {
        "epochs": epochs,
        "batch_size": fit.batch_size,
        "shuffle": fit.shuffle,
        "validation data": fit.validation is not None,
        "accumulate": trainer.accumulate,
        "optimiser": type(trainer.optimizer).__name__,
    }
    inside = any(callback.inside_steps for callback in fit.callbacks)
    data = {"x and y": fit.train, "the validation data": fit.validation}
    return any(agree(processes, trainer, data, asked, inside))


def agree(
    processes: Processes,
    trainer: Trainer,
    data: dict[str, Rows | Stream | None],
    asked: dict[str, Any] | None = None,
    inside: bool = False,
) -> list[bool]:
    """Together: `inside` of every process.

    Raises:
        DataError, ValueError: they have other data, were asked for anything else, or have models of other shapes.
    """
    for source in data.values():
        _check_sampler(source)
    asked = {**(asked or {}), "parameters": [[*parameter.shape] for parameter in trainer.model.parameters()]}
    told = processes.tell((asked, {name: _looks(source) for name, source in data.items()}, inside))
    for rank, (their_asked, their_data, _) in enumerate(told):
        for name, value in told[0][0].items():
            if their_asked[name] != value:
                raise ValueError(
                    f"process {rank} has {name} {their_asked[name]} and process 0 has {value}; make them the same on "
                    "every process"
                )
        for name, value in told[0][1].items():
            if their_data[name] != value:
                raise DataError(
                    f"process {rank} was given other rows than process 0 for {name}; give every process all rows: the "
                    "Trainer shares them out itself"
                )
    return [their_inside for _, _, their_inside in told]


def check_batch(processes: Processes, stream: Stream, x: Tensor | None, target: Tensor | None) -> None:
    """Together: see that a stream gives all the same batch, or None at its end.

    Raises:
        DataError: it does not.
    """
    told = processes.tell((0, "") if x is None or target is None else (len(x), _digest(x[:1]) + _digest(target[:1])))
    for rank, (rows, digest) in enumerate(told):
        if (rows, digest) != told[0]:
            both = f"a batch of {rows} rows and process 0 one of {told[0][0]}"
            raise DataError(
                f"{stream.name} gives process {rank} {'another batch than process 0' if rows == told[0][0] else both}; "
                "give every process the same data, in the same order: the Trainer shares out each batch itself"
            )


def check_model(model: nn.Module) -> None:
    """Raises ValueError if the model is not whole and plain on every process."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "the model is in a DistributedDataParallel, and the Trainer adds up gradients itself; give it the model "
            "inside, model.module"
        )
    tensor = sys.modules.get("torch.distributed.tensor")  # without which there are none
    if tensor is not None and any(isinstance(parameter, tensor.DTensor) for parameter in model.parameters()):
        raise ValueError(
            "the model's parameters are sharded, and the Trainer trains whole ones; give it the model without "
            "fully_shard, or train it in a loop of your own, as docs/distributed.md does"
        )


def _check_sampler(source: Rows | Stream | None) -> None:
    if isinstance(source, Stream) and isinstance(getattr(source.loader, "sampler", None), DistributedSampler):
        raise DataError(
            f"{source.name} has a DistributedSampler, and the Trainer gives each process its rows of every batch "
            "itself; leave the sampler out"
        )


def _check_batch_size(processes: Processes, name: str, batch_size: int) -> None:
    if batch_size < processes.count:
        raise ValueError(
            f"{name} is {batch_size} and there are {processes.count} processes; make it at least {processes.count}, so "
            "that each has a row of every batch"
        )


def _looks(source: Rows | Stream | None) -> list[Any]:
    """What tells apart the data of two processes; of a stream each batch is looked at later."""
    if not isinstance(source, Rows):
        return [type(source).__name__]
    some = torch.linspace(0, len(source) - 1, min(len(source), _LOOKED_AT), device="cpu").long().to(source.x.device)
    parts = (source.x, source.target, *([] if source.weight is None else [source.weight]))
    return [len(source), *(_digest(part[some]) for part in parts)]


def _digest(rows: Tensor) -> str:
    content = rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(content + repr(list(rows.shape)).encode(), digest_size=8).hexdigest()

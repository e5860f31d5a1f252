"""Checks of the layers in DDP, in FSDP2 and on DTensors, run by every process of a test with torchrun."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accuracy import Worst, draw, eager, fused, run
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fastenc
from fastenc import AutoEncoder, Classifier, Encoder, FusedDense

ROWS, STEPS = 16, 5
Data = list[tuple[Tensor, Tensor]]
Wrap = Callable[[nn.Module], nn.Module]


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    encoder = Encoder(12, (10, 7, 4), activation="gelu", dtype=dtype)
    if kind == "layers":  # not one stack: each FusedDense is called by itself
        ends = FusedDense(12, 9, activation="tanh", dtype=dtype), FusedDense(9, 5, activation="identity", dtype=dtype)
        return nn.Sequential(ends[0], nn.LayerNorm(9, dtype=dtype), ends[1])
    if kind == "frozen":
        encoder.layers[0].requires_grad_(False)
    return Classifier(encoder, 5)


def make_data(dtype: torch.dtype = torch.float32) -> Data:
    generator = torch.Generator().manual_seed(5)
    batches = [
        (torch.randn(ROWS, 12, generator=generator), torch.randint(5, (ROWS,), generator=generator))
        for _ in range(STEPS)
    ]
    return [(x.to(dtype), target) for x, target in batches]


def train(model: nn.Module, data: Data, parts: int = 1) -> dict[str, Tensor]:
    """The losses and, after the last step, the weights. `parts`: in which the batches of one update come."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for x, target in data:
        optimizer.zero_grad()
        losses.append(torch.zeros((), dtype=torch.float64))
        pieces = list(zip(x.chunk(parts), target.chunk(parts), strict=True))
        for index, (piece, labels) in enumerate(pieces):
            waits = index + 1 < len(pieces) and isinstance(model, DistributedDataParallel)
            with model.no_sync() if waits else nullcontext():
                loss = cross_entropy(model(piece), labels) / parts
                loss.backward()
            losses[-1] += loss.detach().double()
        optimizer.step()
    return {"losses": torch.stack(losses), **weights(model)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    named = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        named[name.removeprefix("module.")] = tensor.detach().clone()
    return named


def mine(data: Data) -> Data:
    """This process's rows of each batch."""
    rank, count = dist.get_rank(), dist.get_world_size()
    return [(x.chunk(count)[rank], target.chunk(count)[rank]) for x, target in data]


def check_as_one_process(wrap: Wrap, kinds: tuple[str, ...] = ("stack", "layers", "frozen"), parts: int = 1) -> None:
    """The error rule, with one process for eager: at most twice its error against float64, in losses and weights."""
    for kind in kinds:
        several = train(wrap(make_model(kind)), mine(make_data()), parts)
        dist.all_reduce(several["losses"])
        several["losses"] /= dist.get_world_size()
        check_rule(several, kind)


def check_rule(several: dict[str, Tensor], kind: str, data: Callable[[torch.dtype], Data] = make_data) -> None:
    one, exact = (train(make_model(kind, dtype), data(dtype)) for dtype in (torch.float32, torch.float64))
    worst = Worst()
    worst.add(several, one, exact)
    worst.check()


def ddp(folder: Path) -> None:
    check_as_one_process(DistributedDataParallel)


def ddp_static_graph(folder: Path) -> None:
    check_as_one_process(lambda model: DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True))


def ddp_no_sync(folder: Path) -> None:
    check_as_one_process(DistributedDataParallel, parts=2)


def ddp_uneven(folder: Path) -> None:
    """Process 0 has two batches more. DDP divides by all processes all the same: those steps' gradients are halves."""
    rank = dist.get_rank()
    batches = mine(make_data())
    model = DistributedDataParallel(make_model("stack"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Join([model]):
        for x, target in batches if rank == 0 else batches[:-2]:
            optimizer.zero_grad()
            cross_entropy(model(x), target).backward()
            optimizer.step()

    def alone(dtype: torch.dtype) -> dict[str, Tensor]:
        one = make_model("stack", dtype)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for index, (x, target) in enumerate(make_data(dtype)):
            halves = [cross_entropy(one(part), labels) / 2 for part, labels in zip(x.chunk(2), target.chunk(2))]  # noqa: B905
            optimizer.zero_grad()
            sum(halves if index < STEPS - 2 else halves[:1]).backward()
            optimizer.step()
        return weights(one)

    worst = Worst()
    worst.add(weights(model), alone(torch.float32), alone(torch.float64))
    worst.check()


def shard_whole(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def shard_layers(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, FusedDense):
            fully_shard(module)
    return fully_shard(model)


def shard_one_layer(model: nn.Module) -> nn.Module:
    fully_shard(next(module for module in model.modules() if isinstance(module, FusedDense)))
    return fully_shard(model)


def shard_children(model: nn.Module) -> nn.Module:
    for child in model.children():
        fully_shard(child)
    return fully_shard(model)


def fsdp(folder: Path) -> None:
    for wrap in (shard_whole, shard_layers, shard_one_layer, shard_children):
        check_as_one_process(wrap)
        assert all(isinstance(parameter, DTensor) for parameter in wrap(make_model("stack")).parameters())


def fsdp_encode(folder: Path) -> None:
    """`encode` beside `forward`, as PyTorch has it for other methods than forward."""
    model, whole = shard_whole(make_model("stack")), make_model("stack")
    register_fsdp_forward_method(model, "encode")
    x = make_data()[0][0]
    assert torch.equal(model.encode(x), whole.encode(x))


def fsdp_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Saved by all processes in the middle, loaded into a new model: the bits of training that was not interrupted."""
    data = mine(make_data())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Data) -> None:
        for x, target in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), target).backward()
            optimizer.step()

    model = shard_layers(make_model("stack"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step(model, optimizer, data[:2])
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / "dcp")
    saved = weights(model)
    step(model, optimizer, data[2:])

    again = shard_whole(make_model("stack"))  # cut otherwise
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    optimizer = torch.optim.Adam(again.parameters(), lr=0.5)
    of_model, of_optimizer = get_state_dict(again, optimizer)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / "dcp")
    set_state_dict(again, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    assert_equal(weights(again), saved)
    step(again, optimizer, data[2:])
    assert_equal(weights(again), weights(model))
    return saved


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def dtensors(folder: Path) -> None:
    """Where the layers are given DTensors themselves, ATen runs them, which knows how they are cut."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cuts = (Replicate(), Shard(0), Shard(1))
    for activation, widths in (("gelu", (6, 4)), ("tanh", (6, 8, 4))):
        problem = draw(8, widths, activation)
        exact = run(eager, problem.map(Tensor.double))
        expected = run(eager, problem)
        for backend, x_cut, cut in itertools.product(("auto", "cpu", "reference"), cuts[:2], cuts):
            with fastenc.use_backend(backend):
                actual = run(lambda *args, c=(x_cut, cut): _on_dtensors(mesh, c, *args), problem)
            worst = Worst()
            worst.add(actual, expected, exact)
            worst.check()


def _on_dtensors(mesh: DeviceMesh, cuts: tuple[Placement, Placement], x, weights, biases, activations) -> Tensor:
    x = distribute_tensor(x, mesh, cuts[:1]) if not x.requires_grad else _cut(x, mesh, cuts[0])
    weights = [_cut(weight, mesh, cuts[1]) for weight in weights]
    biases = [_cut(bias, mesh, Replicate() if cuts[1] == Shard(1) else cuts[1]) for bias in biases]
    return fused(x, weights, biases, activations).full_tensor()


def _cut(tensor: Tensor, mesh: DeviceMesh, cut: Placement) -> DTensor:
    """A DTensor by which gradients come back to `tensor`."""
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False).redistribute(placements=[cut])


def dtensors_refused(folder: Path) -> None:
    """What cannot be right is an error, and `explain` tells what runs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)  # of integers, whose sums are exact in any order
    x, layer = torch.randint(-3, 4, (8, 6), generator=generator).float(), FusedDense(6, 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))
    whole = copy.deepcopy(layer)
    for name, parameter in list(layer.named_parameters()):
        layer.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    cut = distribute_tensor(x, mesh, [Replicate()])
    assert "eager PyTorch (cpu: x and weight are DTensor and DTensor" in str(fastenc.explain(layer, cut))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        layer(x)
    weight, bias = layer.weight, layer.bias
    with pytest.raises(NotImplementedError, match="sharding strategy"):
        torch.ops.fastenc.dense_forward(cut, weight, bias, "relu", False)
    pending = DTensor.from_local(x, mesh, [Partial()], run_check=False)  # the sum over processes is not taken yet
    assert torch.equal(layer(pending).full_tensor(), whole(pending.full_tensor()))


def auto_encoder(folder: Path) -> None:
    """Two stacks that run as one, under DDP and cut in two."""
    x = make_data()[0][0]

    def losses(wrap: Wrap, dtype: torch.dtype, part: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = wrap(AutoEncoder(Encoder(12, (8, 3), activation="silu", dtype=dtype)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(part), part).backward()
            optimizer.step()
        return weights(model)

    part = x.chunk(dist.get_world_size())[dist.get_rank()]
    one, exact = (losses(lambda model: model, dtype, x.to(dtype)) for dtype in (torch.float32, torch.float64))
    for wrap in (DistributedDataParallel, shard_whole, shard_children):
        worst = Worst()
        worst.add(losses(wrap, torch.float32, part), one, exact)
        worst.check()

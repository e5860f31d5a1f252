"""Small models and data that several tests train."""

import torch
from accuracy import Worst
from torch import nn

from fastenc import AutoEncoder, Classifier, Encoder


def make_x(rows: int = 50, features: int = 6) -> torch.Tensor:
    return torch.rand(rows, features, generator=torch.Generator().manual_seed(rows))


def make_model(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> AutoEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoEncoder(Encoder(6, (5, 3), activation="tanh", dropout=dropout, dtype=dtype))


def make_classifier(classes: int = 3) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Classifier(Encoder(6, (5,), activation="tanh"), classes)


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    for (name, tensor), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


def assert_near(actual: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """The error rule for what was computed in float64, where a loop by hand is its own exact answer."""
    worst = Worst()
    named = [{str(i): tensor for i, tensor in enumerate(tensors)} for tensors in (actual, exact)]
    worst.add(named[0], named[1], named[1])
    worst.check()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]

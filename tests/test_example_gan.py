"""The GAN on digits as a program, at a smaller size; and that its loss differentiates the fused layers twice."""

import json

import pytest
import torch
from accuracy import distance, eager, largest
from example_runs import compare, figure, imported

from fastenc import Encoder


def test_gan_digits(tmp_path):
    output, files = compare("gan_digits.py", tmp_path, "--epochs", 8)
    assert "Trained on 1198 digits, compared with 599 that were held out; 1 seeds" in output
    real, ours = figure(output, "real, the training digits"), figure(output, "VAE-GAN")
    assert abs(real) < ours < figure(output, "uniform noise") / 3
    assert 0 < figure(output, "Gaussian in pixel space") < figure(output, "uniform noise")
    assert files == ["digits.png", "results.json"]
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["ours"] == pytest.approx(1000 * ours, abs=0.01)  # printed with five digits
    assert not row["higher"]


@pytest.fixture
def gan_digits():
    with imported("gan_digits") as (gan_digits,):
        yield gan_digits


def test_the_penalty_differentiates_the_fused_critic_twice(gan_digits):
    """The gradients of the critic's loss, of the fused layers, of eager PyTorch, and of that in float64."""
    torch.manual_seed(0)
    critic = Encoder(64, (32, 16, 1), "tanh", "identity")
    real, made = torch.rand(40, 64), torch.rand(40, 64)
    state = {name: parameter.detach() for name, parameter in critic.named_parameters()}

    def gradients(dtype, fused):
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in state.items()}
        weights, biases = ([leaves[f"layers.{i}.{kind}"] for i in range(3)] for kind in ("weight", "bias"))

        def by_layers(x):
            return eager(x, weights, biases, ("tanh", "tanh", "identity"))

        def by_encoder(x):
            return torch.func.functional_call(critic, leaves, (x,))

        torch.manual_seed(1)
        share = torch.rand(40, 1)  # what the loss draws, in the dtype it has there
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_: share.to(dtype))
            gan_digits.critic_loss(by_encoder if fused else by_layers, real.to(dtype), made.to(dtype)).backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    actual, expected, exact = (
        gradients(torch.float32, True),
        gradients(torch.float32, False),
        gradients(torch.float64, False),
    )
    assert actual.keys() == expected.keys() == exact.keys() == state.keys()
    for name, value in exact.items():
        limit = 2 * distance(expected[name], value) + 1e-6 * largest(value)
        assert distance(actual[name], value) <= limit, name


def test_the_distance_is_that_of_its_formula(gan_digits):
    """Sums over pairs, written out; and of two halves of one sample it is near 0 on either side."""
    import numpy as np

    random = np.random.default_rng(0)
    x, y = random.random((5, 3)), random.random((4, 3)) + 0.3

    def kernel(a, b):
        return np.mean([np.exp(-np.square(a - b).sum() / (2 * (share * 0.9) ** 2)) for share in gan_digits.HALVES])

    within_x = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert gan_digits.squared_mmd(x, y, 0.9) == pytest.approx(within_x + within_y - 2 * between)

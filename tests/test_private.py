"""Private training: what is spent, clipped, added and refused; the parts of opacus are tested with opacus itself."""

import copy
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.utils import get_gsm_class
from small_models import assert_same_weights, make_classifier, make_model, make_x, weights
from torch import nn
from typer.testing import CliRunner

from fastenc import AutoEncoder, Encoder, FusedDense, Trainer, cli
from fastenc import private as private_module
from fastenc.data import DataError
from fastenc.loading import load_pretrained
from fastenc.private import _Steps, fit_private, noise_multiplier

X = make_x(120)
Y = (X.sum(1) > 3.0).long() + (X[:, 0] > 0.5).long()

APPLICATIONS = Path(__file__).parents[1] / "docs" / "applications"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def unregistered():
    """Other tests look at what opacus does without knowing FusedDense."""
    yield
    for table in (GradSampleHooks.GRAD_SAMPLERS, get_gsm_class("ghost").NORM_SAMPLERS):
        table.pop(FusedDense, None)


@pytest.fixture
def quick(monkeypatch):
    """The search for the noise takes longer than these fits."""
    monkeypatch.setattr(private_module, "noise_multiplier", lambda *_: 1.0)


def fit(model, **options):
    return fit_private(model, X, Y, **{"epsilon": 3.0, "delta": 1e-3, "loss": "cross_entropy", "seed": 0, **options})


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
def test_no_more_is_spent_than_was_asked_for(epsilon):
    done = fit(make_classifier(), epsilon=epsilon, epochs=2, batch_size=30)
    assert 0.99 * epsilon <= done.epsilon <= epsilon  # as near as the search goes
    assert (done.delta, done.max_grad_norm, done.sample_rate, done.steps) == (1e-3, 1.0, 0.25, 8)
    assert len(done.history.history["loss"]) == 2
    assert f"epsilon {done.epsilon:.4g} spent at delta 0.001: 8 steps" in str(done)


def test_more_epsilon_is_less_noise_and_more_steps_are_more():
    noises = [noise_multiplier(epsilon, 1e-3, 0.25, 8) for epsilon in (0.5, 1.0, 3.0, 8.0)]
    assert noises == sorted(noises, reverse=True)
    assert len(set(noises)) == 4
    assert noise_multiplier(3.0, 1e-3, 0.25, 80) > noises[2]
    assert noise_multiplier(3.0, 1e-3, 1.0, 8) > noises[2]  # all rows in each step


def clipped_mean(model, dtype, limit):
    """The step of SGD at rate 1 on all rows, by one row's gradient after the other."""
    model = copy.deepcopy(model).to(dtype)
    sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for x, y in zip(X.to(dtype), Y, strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.sqrt(sum(grad.square().sum() for grad in grads))
        for total, grad in zip(sums, grads, strict=True):
            total += grad * min(1.0, limit / (norm.item() + 1e-6))  # opacus adds as much to each norm
    return torch.cat([total.flatten() for total in sums]) / len(X)


@pytest.mark.parametrize("limit", [0.05, 100.0])
def test_the_gradient_of_each_row_is_clipped(limit):
    model = make_classifier()
    start = weights(model)
    expected, exact = (clipped_mean(model, dtype, limit) for dtype in (torch.float32, torch.float64))
    steps = _Steps(model, torch.optim.SGD(model.parameters(), lr=1.0), 0.0, limit, 1.0, len(X), "cross_entropy")
    model.train()
    steps.take(X, Y)
    steps.end()
    moved = torch.cat([(a - b).detach().flatten() for a, b in zip(start, model.parameters(), strict=True)])
    assert moved.norm() <= limit
    # Beside the gradient's own rounding, that of the weights it is taken from.
    rounding = 2**-24 * max(float(parameter.abs().max()) for parameter in start)
    assert (moved.double() - exact).abs().max() <= 2 * (expected.double() - exact).abs().max() + 2 * rounding


def test_the_noise_has_the_deviation_that_was_asked_for():
    """A step on a batch of no rows is noise alone."""
    model = AutoEncoder(Encoder(60, (80,))).train()
    start = weights(model)
    steps = _Steps(model, torch.optim.SGD(model.parameters(), lr=1.0), 2.0, 0.5, 0.1, 100, "mse")
    torch.manual_seed(0)
    assert steps.take(torch.empty(0, 60), torch.empty(0, 60)) == 0.0
    steps.end()
    noise = torch.cat([(a - b).detach().flatten() for a, b in zip(start, model.parameters(), strict=True)])
    expected = 2.0 * 0.5 / (0.1 * 100)  # of the sum, over the rows of an average batch
    # The deviation of n normal numbers is itself off by one part in sqrt(2 n); five times that is one in a million.
    assert abs(noise.std().item() / expected - 1.0) < 5 / math.sqrt(2 * noise.numel())


def test_rows_are_drawn_by_chance(quick, monkeypatch):
    sizes = []
    take = _Steps.take

    def counted(self, x, target):
        sizes.append(len(x))
        return take(self, x, target)

    monkeypatch.setattr(_Steps, "take", counted)
    fit(make_classifier(), epochs=3, batch_size=2)
    assert len(sizes) == 3 * 60
    assert 0 in sizes  # a batch may be empty
    deviation = math.sqrt(120 * (2 / 120) * (1 - 2 / 120) / len(sizes))
    assert abs(np.mean(sizes) - 2.0) < 5 * deviation


def test_the_same_seed_gives_the_same_bits(quick):
    models = [make_classifier() for _ in range(4)]
    before = torch.random.get_rng_state()
    for model, seed in zip(models, (1, 1, 2, None), strict=True):
        fit(model, seed=seed, epochs=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same_weights(models[0], models[1])
    for other in models[2:]:
        assert not torch.equal(models[0].head.weight, other.head.weight)


def test_nothing_of_opacus_stays(quick):
    model = make_classifier()
    plain = make_classifier()
    fit(model)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert parameter.__dict__ == other.__dict__
        assert parameter.grad is None
    assert [sorted(module.__dict__) for module in model.modules()] == [sorted(m.__dict__) for m in plain.modules()]
    trainer = Trainer(model, loss="cross_entropy")
    trainer.fit(X, Y, verbose=False)
    assert trainer.explain().endswith("by the C++ engine")


def test_it_learns_what_many_rows_share():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(1000) % 3
    x = 2.0 * nn.functional.one_hot(y, 6) + 0.5 * torch.randn(1000, 6, generator=generator)
    model = make_classifier()
    options = {"epochs": 10, "batch_size": 100, "lr": 0.02, "loss": "cross_entropy", "seed": 0}
    done = fit_private(model, x, y, epsilon=8.0, delta=1e-4, validation_data=(x, y), **options)
    assert done.history.history["val_accuracy"][-1] > 0.9  # a guess is right once in three
    assert done.history.history["loss"][-1] < done.history.history["loss"][0]


def test_autoencoders_numbers_and_other_dtypes(quick):
    model = make_model(dtype=torch.float64, dropout=0.2)
    done = fit_private(model, X.numpy(), epsilon=3.0, delta=1e-3, validation_data=X[:10], optimizer="sgd", momentum=0.9)
    assert set(done.history.history) == {"loss", "val_loss"}
    regressor = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    fit_private(regressor, X, X.sum(1), epsilon=3.0, delta=1e-3, loss="huber")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0; give a finite number above 0"),
        ({"epsilon": math.inf}, "epsilon is inf"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": 1 / 120}, r"delta is 0.00833333 and there are 120 rows; give one below 1 / 120"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"loss": "info_nce"}, "loss='info_nce' compares the rows of a batch"),
        ({"loss": "triplet"}, "loss='triplet' compares the rows of a batch"),
        ({"loss": lambda a, b: a.sum()}, "private training needs one of Trainer's by name"),
        ({"optimizer": torch.optim.SGD}, "makes its optimiser itself"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"epsilon": 1e-6}, "opacus finds no noise for epsilon 1e-06"),
    ],
)
def test_wrong_options(options, message):
    model = make_classifier()
    with pytest.raises(ValueError, match=message):
        fit(model, **options)
    assert_same_weights(model, make_classifier())


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), nn.InstanceNorm1d(6, track_running_stats=True)]
)
def test_layers_in_which_rows_see_each_other(layer):
    with pytest.raises(ValueError, match=f"layer '0' is a {type(layer).__name__}, in which rows see"):
        fit(nn.Sequential(layer, nn.Linear(6, 3)))


def test_bad_rows(quick):
    for x, y in ((X[:, :5], Y), (X * math.nan, Y), (X, Y + 5), (X, Y[:3])):
        with pytest.raises(DataError):
            fit_private(make_classifier(), x, y, epsilon=3.0, delta=1e-3, loss="cross_entropy")
    with pytest.raises(DataError, match="needs labels, and there is no y"):
        fit_private(make_classifier(), X, epsilon=3.0, delta=1e-3, loss="cross_entropy")
    with pytest.raises(ValueError, match="too coarse for the noise"):
        fit_private(make_model(dtype=torch.bfloat16), X, epsilon=3.0, delta=1e-3)
    with pytest.raises(FloatingPointError, match="the loss became"):
        fit_private(make_model(), X * 1e38, epsilon=3.0, delta=1e-3)


def test_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="private training is of one process"):
        fit(make_classifier())


def test_without_opacus(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'private training needs opacus; run: pip install "fastenc\[tools\]"'
    ):
        fit(make_classifier())


def run(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


SMALL = ["--widths", "16,4", "--epochs", "2", "--batch-size", "200"]


def test_the_command_line(tmp_path):
    out = tmp_path / "model"
    result = run("train", "digits", "--out", out, "--private", "--epsilon", "3", *SMALL)
    assert result.exit_code == 0, result.output
    assert "spent at delta 1e-05: 16 steps" in result.output
    assert (
        "covered: the weights, for each of the 1617 training rows. Not covered, learned without noise:" in result.output
    )
    assert "the scale of the columns, medians of missing values; --scale none" in result.output
    record = json.loads((out / "training.json").read_text())
    assert 2.97 <= record["private"]["epsilon"] <= 3.0
    assert list(record["history"]) == ["val_loss"]  # the training rows' loss has no noise
    assert load_pretrained(out).encoder.widths == (16, 4)
    assert run("evaluate", out, "digits").exit_code == 0


def test_the_command_line_where_nothing_else_is_learned(tmp_path):
    out = [tmp_path / name for name in "abc"]
    fixed = ["--scale", "none", "--missing", "error", "--private", "--epsilon", "3"]
    for folder, more in zip(out, ([], ["--noise-seed", "1"], ["--noise-seed", "1"]), strict=True):
        result = run("train", "digits", "--out", folder, *fixed, *SMALL, *more)
        assert "training rows; the preprocessing learned nothing from them" in result.output
    models = [load_pretrained(folder) for folder in out]
    assert_same_weights(models[1], models[2])
    assert not torch.equal(models[0].decoder.layers[0].weight, models[1].decoder.layers[0].weight)  # --seed alone


def test_the_command_line_with_labels(tmp_path):
    out = tmp_path / "model"
    private = ["--private", "--epsilon", "8", "--lr", "0.01", "--batch-size", "300"]
    result = run("finetune", "digits", "--out", out, *private, "--widths", "32,16", "--epochs", "10")
    assert result.exit_code == 0, result.output
    assert "learned without noise: the names of the classes, the scale of the columns, medians" in result.output
    record = json.loads((out / "training.json").read_text())
    assert 7.92 <= record["private"]["epsilon"] <= 8.0
    assert sorted(record["history"]) == ["val_accuracy", "val_loss"]
    assert record["history"]["val_accuracy"][-1] > 0.3  # a guess is right once in ten
    assert record["classes"] == [str(digit) for digit in range(10)]
    other = tmp_path / "other"
    transfer = ["--strategy", "transfer", "--from", out, "--epochs", "1"]
    result = run("finetune", "digits", "--out", other, *private, *transfer)
    assert "rows. Not covered, learned without noise: the names of the classes\n" in result.output
    first, second = (load_pretrained(folder).encoder.layers for folder in (out, other))
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[1].weight, second[1].weight)


def test_numbers_as_labels(tmp_path):
    x = X.numpy()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", x.sum(1))
    command = ["finetune", tmp_path / "x.npy", "--target", tmp_path / "y.npy", "--out", tmp_path / "model"]
    private = ["--private", "--epsilon", "3", "--delta", "1e-3", "--epochs", "2"]
    result = run(*command, *private)
    assert result.exit_code == 2
    assert "cannot scale the targets by their mean and deviation; give --raw-targets" in result.output
    assert run(*command, *private, "--raw-targets").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "pretrain"], "--strategy pretrain does not go with --private: the rows would be seen"),
        (["--strategy", "transfer"], "--strategy transfer needs a trained encoder"),
        (["--loss", "triplet"], "loss='triplet' compares the rows of a batch"),
        (["--lora-rank", "2"], "--lora-rank does not go with --private"),
        (["--unfreeze-every", "2"], "--unfreeze-every does not go with --private"),
        (["--layer-decay", "0.5"], "--layer-decay does not go with --private"),
        (["--mixup", "0.5"], "--mixup does not go with --private"),
        (["--noise", "0.5"], "--noise does not go with --private"),
    ],
)
def test_what_private_finetuning_refuses(tmp_path, options, message):
    result = run("finetune", "digits", "--out", tmp_path / "model", "--private", "--epsilon", "3", *options)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--private"], "--private needs to know how much may be learned of a row; give --epsilon"),
        (["--epsilon", "3"], "--epsilon is of private training; give --private too"),
        (["--noise-seed", "3"], "--noise-seed is of private training"),
        (["--private", "--epsilon", "3", "--schedule", "cosine"], "--schedule does not go with --private"),
        (["--private", "--epsilon", "3", "--patience", "2"], "--patience does not go with --private"),
        (["--private", "--epsilon", "3", "--clip-norm", "2"], "--clip-norm does not go with --private"),
        (["--private", "--epsilon", "3", "--accumulate", "2"], "--accumulate does not go with --private"),
        (["--private", "--epsilon", "3", "--delta", "0.5"], "delta is 0.5 and there are 1617 rows"),
        (["--private", "--epsilon", "3", "--dtype", "bfloat16"], "too coarse for the noise"),
    ],
)
def test_the_command_line_says_what_is_wrong(tmp_path, options, message):
    result = run("train", "digits", "--out", tmp_path / "model", *SMALL, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "model").exists()


def test_the_command_line_without_opacus(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    result = run("train", "digits", "--out", tmp_path / "model", "--private", "--epsilon", "3")
    assert result.exit_code == 2
    assert 'fastenc: --private needs opacus; run: pip install "fastenc[tools]"' in result.output


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (APPLICATIONS / "privacy.md").read_text(), re.DOTALL)
    exec(block, {})
    assert "spent at delta 0.0001: 60 steps" in capsys.readouterr().out
    assert load_pretrained(tmp_path / "private").head.out_features == 3

"""Weights of rows in fit and evaluate: those of rows that come as often, by every way that steps are taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import assert_near, assert_same_weights, make_classifier, make_model, make_x, weights
from torch import nn
from torch.utils.data import TensorDataset

from fastenc import Trainer, use_backend
from fastenc.data import DataError
from fastenc.data.augmentation import GaussianNoise, Mixup

ROWS = 50
X = make_x(ROWS).double()
TIMES = torch.arange(ROWS) % 4  # how often each row comes; some do not
REPEATED = X.repeat_interleave(TIMES, 0)
LABELS = torch.arange(ROWS) % 3


def double(model: nn.Module) -> nn.Module:
    return model.double()


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "cosine", "bce_with_logits"])
def test_they_are_rows_that_come_so_often(loss):
    weighed, repeated = double(make_model()), double(make_model())
    options = {"epochs": 5, "shuffle": False, "verbose": False}
    first = Trainer(weighed, "sgd", 0.1, loss)
    second = Trainer(repeated, "sgd", 0.1, loss)
    history = first.fit(X, sample_weight=TIMES, batch_size=ROWS, **options)
    other = second.fit(REPEATED, batch_size=len(REPEATED), **options)
    measured = [first.evaluate(X, sample_weight=TIMES)["loss"], second.evaluate(REPEATED)["loss"]]
    found, exact = ([*h.history["loss"], m] for h, m in zip((history, other), measured, strict=True))
    assert_near([*weights(weighed), torch.tensor(found)], [*weights(repeated), torch.tensor(exact)])


@pytest.mark.parametrize("target", [LABELS, nn.functional.one_hot(LABELS).double()], ids=["labels", "probabilities"])
def test_of_classes_they_count_in_the_accuracy(target):
    weighed, repeated = double(make_classifier()), double(make_classifier())
    first, second = (Trainer(model, "sgd", 0.5, "cross_entropy") for model in (weighed, repeated))
    first.fit(X, target, sample_weight=TIMES, batch_size=ROWS, shuffle=False, verbose=False)
    second.fit(REPEATED, target.repeat_interleave(TIMES, 0), batch_size=len(REPEATED), shuffle=False, verbose=False)
    assert_near(weights(weighed), weights(repeated))
    found = first.evaluate(X, target, sample_weight=TIMES, batch_size=7)
    exact = second.evaluate(REPEATED, target.repeat_interleave(TIMES, 0))
    assert found["accuracy"] == pytest.approx(exact["accuracy"], rel=1e-6)
    assert found["loss"] == pytest.approx(exact["loss"], rel=1e-6)
    assert found["accuracy"] != first.evaluate(X, target)["accuracy"]


def test_batches_weigh_alike_whatever_their_rows_do():
    """A step is the sum of weight * gradient over the rows of its batch, not over the weights of its batch."""
    model, hand = double(make_model()), double(make_model())
    weight = torch.cat([torch.full((25,), 0.5), torch.full((25,), 1.5)])
    Trainer(model, "sgd", 0.1).fit(X, sample_weight=10 * weight, batch_size=25, shuffle=False, verbose=False)
    for rows, factor in ((X[:25], 0.5), (X[25:], 1.5)):
        Trainer(hand, "sgd", 0.1 * factor).fit(rows, batch_size=25, shuffle=False, verbose=False)
    assert_near(weights(model), weights(hand))


def test_equal_weights_are_none():
    plain, equal = make_model(), make_model()
    for model, weight in ((plain, None), (equal, np.full(ROWS, 8))):
        Trainer(model, seed=0).fit(X, sample_weight=weight, epochs=3, verbose=False)
    assert_same_weights(equal, plain)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=["engine", "accumulated"])
def test_every_way_of_taking_steps_weighs(options):
    """In float32, shuffled: the engine's, autograd's and the sums of several batches."""
    ends = []
    for backend in ("auto", "reference"):
        model = make_model()
        trainer = Trainer(model, "sgd", 0.1, seed=0, **options)
        with use_backend(backend):
            trainer.fit(X, sample_weight=TIMES, epochs=3, batch_size=16, verbose=False)
        assert ("C++" in trainer.explain()) == (backend == "auto" and not options)
        ends.append(torch.cat([parameter.flatten() for parameter in weights(model)]))
    plain = make_model()
    Trainer(plain, "sgd", 0.1, seed=0, **options).fit(X, epochs=3, batch_size=16, verbose=False)
    unweighted = torch.cat([parameter.flatten() for parameter in weights(plain)])
    assert (ends[0] - ends[1]).abs().max() < 1e-3 * (ends[0] - unweighted).abs().max()


def test_validation_rows_have_their_own():
    trainer = Trainer(make_model(), seed=0)
    history = trainer.fit(X, validation_data=(X, None, TIMES), verbose=False).history
    assert history["val_loss"][-1] == trainer.evaluate(X, sample_weight=TIMES)["loss"]
    history = trainer.fit(X, sample_weight=TIMES, validation_split=0.2, verbose=False).history
    assert history["val_loss"][-1] == trainer.evaluate(X[-10:], sample_weight=TIMES[-10:])["loss"]


def test_augmented_rows_keep_theirs():
    trainer, weight = Trainer(make_model(), seed=0), torch.zeros(ROWS)
    weight[3] = 1.0
    first = trainer.evaluate(X[3:4])["loss"]
    history = trainer.fit(X, sample_weight=weight, augment=GaussianNoise(0.0), batch_size=ROWS, verbose=False).history
    assert history["loss"][0] == pytest.approx(first, rel=1e-5)
    with pytest.raises(DataError, match="Mixup mixes rows, and sample_weight weighs single ones; leave one of them"):
        trainer.fit(X, sample_weight=weight, augment=Mixup(), verbose=False)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"sample_weight has shape \[3\] and x has 50 rows"),
        (torch.ones(ROWS, 2), r"sample_weight has shape \[50, 2\]; give one number for each row, \[50\]"),
        (-torch.ones(ROWS), "sample_weight holds negative numbers; give how often each row counts, 0 or more"),
        (torch.full((ROWS,), float("nan")), "sample_weight has NaN or Inf in 50 of 50 rows"),
        (torch.zeros(ROWS), "all weights of x are 0; give some of its rows a weight above 0"),
        (["much"] * ROWS, "sample_weight holds text such as .much., not numbers"),
    ],
    ids=["few", "columns", "negative", "nan", "zeros", "text"],
)
def test_wrong_weights(weight, message):
    trainer = Trainer(make_model())
    with pytest.raises(DataError, match=message):
        trainer.fit(X, sample_weight=weight, verbose=False)
    with pytest.raises(DataError, match=message):
        trainer.evaluate(X, sample_weight=weight)
    assert_same_weights(trainer.model, make_model())


def test_where_rows_cannot_be_weighed():
    one = torch.ones(ROWS)
    for loss, message in (
        ("info_nce", "sample_weight weighs each row, and loss='info_nce' compares the rows of a batch with each other"),
        (
            lambda y, t: (y - t).abs().mean(),
            "and loss is a function, which gives their mean; weigh them in the function",
        ),
    ):
        with pytest.raises(DataError, match=message):
            Trainer(make_model(), loss=loss).fit(X, sample_weight=one, verbose=False)
    Trainer(make_model(), loss=nn.MSELoss()).fit(X, sample_weight=one, verbose=False)
    with pytest.raises(DataError, match="sample_weight needs arrays, and x is a Dataset or DataLoader; leave it out"):
        Trainer(make_model()).fit(TensorDataset(X), sample_weight=one, verbose=False)
    with pytest.raises(DataError, match="all weights of the validation split are 0"):
        Trainer(make_model()).fit(X, sample_weight=torch.arange(ROWS) < 10, validation_split=0.2, verbose=False)
    with pytest.raises(
        ValueError, match=r"validation_data is a tuple of 4; give x, \(x, y\) or \(x, y, sample_weight\)"
    ):
        Trainer(make_model()).fit(X, validation_data=(X, X, one, one), verbose=False)

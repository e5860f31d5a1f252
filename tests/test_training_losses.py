"""The losses by name: their formulas, which targets go with them, and which of PyTorch's own they are."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import assert_near, assert_same_weights, make_x
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastenc import AutoEncoder, Encoder, use_backend
from fastenc.data import DataError
from fastenc.training import Trainer
from fastenc.training.losses import LOSSES, loss_name

ROWS, BATCH, EPOCHS, LR = 22, 8, 3, 0.25


def entropy(p, t):
    return -(t * p.log() + (1 - t) * (1 - p).log()).mean()


def huber(y, t):
    d = (y - t).abs()
    return torch.where(d < 1, d * d / 2, d - 0.5).mean()


def info_nce(y, t):
    y, t = (v / v.norm(dim=1, keepdim=True) for v in (y, t))
    similar = ((y @ t.T) / 0.1).exp()
    pairs = similar.diagonal()
    return -((pairs / similar.sum(0)).log() + (pairs / similar.sum(1)).log()).mean() / 2


def triplet(y, t):
    """Written out, one anchor after the other."""
    losses = []
    for i in range(len(y)):
        distances = ((y[i] - y) ** 2).sum(1)
        mine = [distances[j].sqrt() for j in range(len(y)) if j != i and t[j] == t[i]]
        others = [distances[j].sqrt() for j in range(len(y)) if t[j] != t[i]]
        if mine and others:
            losses.append((max(mine) - min(others) + 1.0).clamp(min=0))
    return torch.stack(losses).mean()


FORMULAS = {
    "cosine": lambda y, t: (1 - (y * t).sum(1) / (y.norm(dim=1) * t.norm(dim=1))).mean(),
    "info_nce": info_nce,
    "triplet": triplet,
    "mse": lambda y, t: ((y - t) ** 2).mean(),
    "mae": lambda y, t: (y - t).abs().mean(),
    "huber": huber,
    "cross_entropy": lambda y, t: -(t * (y - y.exp().sum(1, keepdim=True).log())).sum(1).mean(),
    "bce": entropy,
    "bce_with_logits": lambda y, t: entropy(1 / (1 + (-y).exp()), t),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_formulas(name):
    torch.manual_seed(0)
    last = [nn.Sigmoid()] if name == "bce" else []
    model = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64), *last)
    hand = copy.deepcopy(model)
    x, y = make_x(ROWS).double(), torch.rand(ROWS, 4, dtype=torch.float64)
    y = F.softmax(y, 1) if name == "cross_entropy" else 4 * y if name == "huber" else y  # huber: both of its pieces
    if name == "triplet":
        y = torch.arange(ROWS) % 3
        y[0] = 9  # alone in its class
    history = Trainer(model, "sgd", LR, name).fit(
        x, y, epochs=EPOCHS, batch_size=BATCH, shuffle=False, validation_data=(x, y), verbose=False
    )
    reported, losses = history.history["loss"], []
    for _ in range(EPOCHS):
        total = 0.0
        for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True):
            hand.zero_grad()
            value = FORMULAS[name](hand(a), b)
            value.backward()
            total += value.item() * len(a)
            for p in hand.parameters():
                p.data -= LR * p.grad
        losses.append(total / ROWS)
    with torch.no_grad():
        measured = FORMULAS[name](hand(x), y)
    assert_near(
        [*model.parameters(), torch.tensor([*reported, history.history["val_loss"][-1]], dtype=torch.float64)],
        [*hand.parameters(), torch.tensor([*losses, measured], dtype=torch.float64)],
    )


class Own(nn.MSELoss):
    pass


def hooked() -> nn.Module:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda *_: None)
    return loss


KNOWN = [
    *((name, name) for name in LOSSES),
    *((function, name) for name, function in LOSSES.items()),
    (F.smooth_l1_loss, "huber"),
    (F.binary_cross_entropy, "bce"),
    (nn.MSELoss(), "mse"),
    (nn.L1Loss(), "mae"),
    (nn.HuberLoss(), "huber"),
    (nn.SmoothL1Loss(), "huber"),
    (nn.CrossEntropyLoss(), "cross_entropy"),
    (nn.BCELoss(), "bce"),
    (nn.BCEWithLogitsLoss(), "bce_with_logits"),
    (nn.MSELoss().eval(), "mse"),
    (nn.HuberLoss(reduction="mean", delta=1), "huber"),
]
UNKNOWN = [
    "mes",
    nn.MSELoss(reduction="sum"),
    nn.L1Loss(reduction="none"),
    nn.HuberLoss(delta=0.5),
    nn.SmoothL1Loss(beta=0.5),
    nn.CrossEntropyLoss(weight=torch.ones(3)),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(ignore_index=0),
    nn.BCELoss(weight=torch.ones(3)),
    nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
    Own(),
    hooked(),
    nn.KLDivLoss(),
    F.kl_div,
    lambda y, t: F.mse_loss(y, t),
]


@pytest.mark.parametrize(("loss", "name"), KNOWN, ids=[f"{i} {name}" for i, (_, name) in enumerate(KNOWN)])
def test_pytorchs_losses_are_known_by_name(loss, name):
    assert loss_name(loss) == name


@pytest.mark.parametrize("loss", UNKNOWN, ids=range(len(UNKNOWN)))
def test_other_losses_are_not_known(loss):
    assert loss_name(loss) is None


# bce.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bce_has_the_bits_of_pytorchs(dtype):
    p = torch.rand(50, 3, dtype=dtype).view(-1)
    p[:2] = torch.tensor([0.0, 1.0])  # where its logarithms are cut off
    p, same, t = p.requires_grad_(), p.detach().clone().requires_grad_(), torch.rand(150, dtype=dtype)
    values = [LOSSES["bce"](p, t), F.binary_cross_entropy(same, t)]
    for value in values:
        value.backward()
    assert torch.equal(*values)
    assert torch.equal(p.grad, same.grad)


@pytest.mark.parametrize("bad", [float("nan"), 1.5, -0.5, float("inf")])
def test_bce_of_no_probability_is_nan(bad):
    assert LOSSES["bce"](torch.tensor([0.5, bad]), torch.tensor([1.0, 1.0])).isnan()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_model_that_leaves_0_to_1_under_bce_is_told_by_its_step(backend):
    model = make_binary("identity")
    for parameter in [*model.parameters()][-2:]:
        parameter.data.fill_(0.5 * (parameter.ndim == 1))  # 0.5 for each row, until the first step
    with use_backend(backend), pytest.raises(FloatingPointError, match="the loss became nan in epoch 1, step 2"):
        Trainer(model, "sgd", 1.0, "bce").fit(make_x(ROWS), torch.ones(ROWS), batch_size=BATCH, verbose=False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def make_binary(final: str = "sigmoid") -> Encoder:
    torch.manual_seed(0)
    return Encoder(6, (5, 1), "tanh", final)


BITS = torch.arange(ROWS) % 2
FORMS = {
    "column of floats": BITS.float().unsqueeze(1),
    "floats": BITS.float(),
    "whole numbers": BITS,
    "bools": BITS.bool(),
    "numpy": BITS.numpy().astype("uint8"),
}


@pytest.mark.parametrize(("loss", "final"), [("bce", "sigmoid"), ("bce_with_logits", "identity")])
@pytest.mark.parametrize("form", FORMS)
def test_two_classes_in_any_form_train_the_same(form, loss, final):
    plain, other = make_binary(final), make_binary(final)
    Trainer(plain, loss=loss, seed=0).fit(make_x(ROWS), BITS.float().unsqueeze(1), verbose=False)
    Trainer(other, loss=loss, seed=0).fit(make_x(ROWS), FORMS[form], verbose=False)
    assert_same_weights(other, plain)
    assert not torch.equal(plain.layers[0].weight, make_binary().layers[0].weight)


def shifted(by: float) -> torch.Tensor:
    return BITS.float() + by


@pytest.mark.parametrize("loss", ["bce", "bce_with_logits"])
@pytest.mark.parametrize(
    ("y", "found"), [(shifted(1.0), "1 to 2"), (shifted(-0.25), "-0.25 to 0.75")], ids=["above", "below"]
)
def test_targets_that_are_no_probabilities(y, found, loss):
    trainer = Trainer(make_binary(), loss=loss)
    message = rf"y holds numbers from {found} and loss='{loss}' needs 0 to 1; scale y, or use another loss"
    with pytest.raises(DataError, match=message):
        trainer.fit(make_x(ROWS), y, verbose=False)
    with pytest.raises(DataError, match=message):
        trainer.evaluate(make_x(ROWS), y)
    with pytest.raises(
        DataError, match=message.replace("y holds", "the target holds").replace("scale y", "scale the target")
    ):
        trainer.fit(TensorDataset(make_x(ROWS), y), verbose=False)
    assert_same_weights(trainer.model, make_binary())


def test_an_autoencoder_on_data_that_was_not_scaled():
    model = AutoEncoder(Encoder(6, (3,)), "sigmoid")
    with pytest.raises(DataError, match=r"x holds numbers from .* and loss='bce' needs 0 to 1; scale x"):
        Trainer(model, loss="bce").fit(make_x(ROWS) * 3, verbose=False)
    Trainer(model, loss="bce").fit(make_x(ROWS), verbose=False)


def test_a_model_that_gives_no_probabilities():
    model = nn.Sequential(nn.Linear(6, 1))
    model[0].bias.data.fill_(9.0)
    message = "the model gives numbers from .* and loss='bce' needs probabilities; end the model with a sigmoid, or"
    with pytest.raises(DataError, match=message):
        Trainer(model, loss="bce").fit(make_x(ROWS), BITS, verbose=False)
    with pytest.raises(DataError, match=message):
        Trainer(model, loss="bce").fit(TensorDataset(make_x(ROWS), BITS.float()), verbose=False)
    Trainer(model, loss="bce_with_logits").fit(make_x(ROWS), BITS, verbose=False)


@pytest.mark.parametrize("name", ["mse", "mae", "huber", "bce", "bce_with_logits"])
def test_shapes_must_be_the_models(name):
    with pytest.raises(DataError, match=r"the model gives \[1\] for a row and y has \[2\]"):
        Trainer(make_binary(), loss=name).fit(make_x(ROWS), torch.rand(ROWS, 2), verbose=False)


# Losses over the rows of a batch.


def test_a_single_row_has_no_contrast():
    row = torch.rand(1, 4, requires_grad=True)
    for value in (LOSSES["info_nce"](row, torch.rand(1, 4)), LOSSES["triplet"](row, torch.tensor([3]))):
        assert value.item() == 0.0
        value.backward()
    assert torch.equal(row.grad, torch.zeros(1, 4))


@pytest.mark.parametrize("labels", [[1, 1, 1], [1, 2, 3]], ids=["one class", "all alone"])
def test_triplets_without_an_anchor_cost_nothing(labels):
    vectors = torch.rand(3, 4, requires_grad=True)
    value = LOSSES["triplet"](vectors, torch.tensor(labels))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(vectors.grad, torch.zeros(3, 4))


def test_triplets_of_equal_vectors_have_finite_gradients():
    vectors = torch.ones(4, 3, requires_grad=True)
    value = LOSSES["triplet"](vectors, torch.tensor([0, 0, 1, 1]))
    value.backward()
    assert value.item() == 1.0  # the margin
    assert vectors.grad.isfinite().all()


def test_triplets_move_classes_apart():
    torch.manual_seed(0)
    labels = torch.arange(60) % 2 + 5
    x = torch.randn(60, 6)
    x[:, 0] += 8.0 * (labels - 5.5)
    model = Encoder(6, (16, 4), final_activation="identity")
    history = Trainer(model, lr=1e-2, loss="triplet", seed=0).fit(x, labels, epochs=30, batch_size=30, verbose=False)
    assert history.history["loss"][0] > 0.5
    assert history.history["loss"][-1] < 0.1  # a model that maps all rows to one point has 1, the margin


def test_the_engine_says_which_losses_it_leaves_to_pytorch():
    for loss, target in (("info_nce", torch.rand(ROWS, 1)), ("triplet", BITS)):
        trainer = Trainer(make_binary(), loss=loss)
        trainer.fit(make_x(ROWS), target, verbose=False)
        assert (
            trainer.explain() == f"step by step: the loss is {loss}, which compares the rows of a batch with each other"
        )


def test_triplets_need_labels_and_a_temperature_is_positive():
    with pytest.raises(DataError, match=r"has \[\] of torch.float32; triplet needs a vector, and a whole number"):
        Trainer(Encoder(6, (2,)), loss="triplet").fit(make_x(ROWS), torch.rand(ROWS), verbose=False)
    with pytest.raises(ValueError, match="temperature is 0; give a number above 0"):
        LOSSES["info_nce"](torch.rand(2, 2), torch.rand(2, 2), temperature=0)

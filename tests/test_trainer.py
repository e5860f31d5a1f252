import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_models import assert_same_weights, make_classifier, make_model, make_x, weights
from torch import nn
from torch.nn import functional as F

from fastenc.data import DataError
from fastenc.training import Callback, Trainer


def hand_written(model, optimizer, loss, x, y, epochs, batch_size, seed):
    """What Trainer must do, as anyone would write it."""
    if seed is not None:
        torch.manual_seed(seed)
    losses = []
    for _ in range(epochs):
        order = torch.arange(len(x)) if seed is None else torch.randperm(len(x))
        total = 0.0
        for batch in order.split(batch_size):
            optimizer.zero_grad()
            value = loss(model(x[batch]), y[batch])
            value.backward()
            optimizer.step()
            total += value.item() * len(batch)
        losses.append(total / len(x))
    return losses


OPTIMIZERS = {
    "sgd": ({"momentum": 0.9, "weight_decay": 0.01}, torch.optim.SGD),
    "adam": ({"weight_decay": 0.01}, torch.optim.Adam),
    "adamw": ({"weight_decay": 0.01}, torch.optim.AdamW),
}
LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss}


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_bits_of_a_hand_written_loop(optimizer, loss, shuffle):
    options, make = OPTIMIZERS[optimizer]
    x = make_x(50)  # 16 + 16 + 16 + 2
    trained, expected = make_model(), make_model()
    trainer = Trainer(trained, optimizer, 0.01, loss, seed=7, **options)
    history = trainer.fit(x, epochs=3, batch_size=16, shuffle=shuffle, verbose=False)
    with torch.random.fork_rng():
        by_hand = make(expected.parameters(), lr=0.01, fused=True, **options)
        losses = hand_written(expected, by_hand, LOSSES[loss], x, x, 3, 16, 7 if shuffle else None)
    assert_same_weights(trained, expected)
    assert history is trainer.history
    assert history.epoch == [0, 1, 2]
    assert list(history.history) == ["loss"]
    assert history.history["loss"] == losses  # the same float64 sums of the same float32 losses


@pytest.mark.parametrize(("rows", "features"), [(1, 6), (700, 600)], ids=["one row", "gathered in several chunks"])
def test_the_bits_of_a_hand_written_loop_with_targets(rows, features):
    x, y = make_x(rows, features), make_x(rows, 4)
    trained, expected = nn.Linear(features, 4), nn.Linear(features, 4)
    expected.load_state_dict(trained.state_dict())
    Trainer(trained, torch.optim.SGD(trained.parameters(), 0.001), seed=7).fit(x, y, epochs=2, verbose=False)
    with torch.random.fork_rng():
        hand_written(expected, torch.optim.SGD(expected.parameters(), 0.001), F.mse_loss, x, y, 2, 32, 7)
    assert_same_weights(trained, expected)


def test_named_optimizers_are_pytorchs_fused_ones():
    for name, (_, kind) in OPTIMIZERS.items():
        made = Trainer(make_model(), name, 0.5).optimizer
        assert type(made) is kind
        assert made.defaults["fused"] is True
        assert made.defaults["lr"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    model = make_model(dtype=dtype)
    before = weights(model)
    trainer = Trainer(model, "sgd", 0.1)
    trainer.fit(make_x(), verbose=False)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert trainer.predict(make_x()).dtype == dtype
    numbers = trainer.predict(make_x().numpy())
    assert numbers.dtype == (np.float32 if dtype == torch.bfloat16 else trainer.predict(make_x()).numpy().dtype)


def test_seed_repeats_shuffling_and_dropout_and_leaves_the_global_random_numbers():
    x = make_x()
    state = torch.get_rng_state()
    once, again, twice, other = (make_model(dropout=0.5) for _ in range(4))
    Trainer(once, seed=3).fit(x, epochs=2, verbose=False)
    torch.rand(5)  # whatever else is drawn
    Trainer(again, seed=3).fit(x, epochs=2, verbose=False)
    in_two = Trainer(twice, seed=3)
    in_two.fit(x, verbose=False)
    in_two.fit(x, verbose=False)
    Trainer(other, seed=4).fit(x, epochs=2, verbose=False)
    torch.rand(5)
    assert_same_weights(again, once)
    assert_same_weights(twice, once)
    assert not torch.equal(other.encoder.layers[0].weight, once.encoder.layers[0].weight)
    expected = torch.Generator()
    expected.set_state(state)
    torch.rand(10, generator=expected)
    assert torch.equal(torch.get_rng_state(), expected.get_state())


def test_without_a_seed_the_global_random_numbers_are_used():
    first, second = make_model(), make_model()
    with torch.random.fork_rng():
        for model in (first, second):
            torch.manual_seed(11)
            Trainer(model).fit(make_x(), verbose=False)
    assert_same_weights(first, second)


def test_validation_split_is_the_last_rows_before_shuffling():
    x = make_x(10)
    split, explicit = make_model(), make_model()
    first = Trainer(split, seed=0).fit(x, epochs=2, batch_size=4, validation_split=0.25, verbose=False)
    second = Trainer(explicit, seed=0).fit(x[:7], epochs=2, batch_size=4, validation_data=x[7:], verbose=False)
    assert_same_weights(split, explicit)
    assert first.history == second.history
    assert list(first.history) == ["loss", "val_loss"]
    with torch.no_grad():
        assert first.history["val_loss"][-1] == pytest.approx(F.mse_loss(split(x[7:]), x[7:]).item(), rel=1e-6)


def test_validation_data_goes_before_validation_split():
    x = make_x(10)
    model, plain = make_model(), make_model()
    history = Trainer(model, seed=0).fit(x, validation_split=0.5, validation_data=(x[:2], x[:2]), verbose=False)
    Trainer(plain, seed=0).fit(x, verbose=False)
    assert_same_weights(model, plain)
    assert "val_loss" in history.history


def test_validation_changes_nothing_in_training():
    x = make_x()
    with_validation, without = make_model(dropout=0.5), make_model(dropout=0.5)
    Trainer(with_validation, seed=0).fit(x, epochs=2, validation_data=x, verbose=False)
    Trainer(without, seed=0).fit(x, epochs=2, verbose=False)
    assert_same_weights(with_validation, without)


def test_a_batch_larger_than_the_data_is_one_step():
    class Steps(Callback):
        batches = ()

        def on_train_batch_end(self, batch, logs):
            self.batches += (batch,)

    steps = Steps()
    Trainer(make_model()).fit(make_x(5), batch_size=1000, epochs=2, callbacks=[steps], verbose=False)
    assert steps.batches == (0, 0)


def test_evaluate_is_the_mean_over_the_rows_for_any_batch_size():
    x, model = make_x(50), make_model(dropout=0.5)
    exact = F.mse_loss(make_model().double()(x.double()), x.double()).item()
    trainer = Trainer(model)
    for batch_size in (1, 16, 50, 1000):
        assert trainer.evaluate(x, batch_size=batch_size) == {"loss": pytest.approx(exact, rel=1e-6)}
    assert model.training


def test_classification():
    x = make_x(60)
    labels = (x.sum(1) > 3).long() + (x[:, 0] > 0.5).long()
    model = make_classifier()
    trainer = Trainer(model, lr=0.05, loss="cross_entropy", seed=0)
    history = trainer.fit(x, labels, epochs=40, validation_split=0.2, verbose=False)
    assert list(history.history) == ["loss", "val_loss", "val_accuracy"]
    measured = trainer.evaluate(x, labels, batch_size=7)
    with torch.no_grad():
        output = model.double()(x.double())
    assert measured["accuracy"] == pytest.approx((output.argmax(1) == labels).double().mean().item())
    assert measured["loss"] == pytest.approx(F.cross_entropy(output, labels).item(), rel=1e-5)
    assert history.history["loss"][-1] < history.history["loss"][0]


def test_a_loss_and_an_optimizer_of_ones_own():
    x = make_x()
    own, named = make_model(), make_model()
    Trainer(own, lambda parameters: torch.optim.Adam(parameters, fused=True), loss=F.mse_loss, seed=0).fit(
        x, x, verbose=False
    )
    Trainer(named, seed=0).fit(x, verbose=False)
    assert_same_weights(own, named)


def test_plain_pytorch_models():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 6))
    trainer = Trainer(model, "sgd", 0.1, momentum=0.9)
    history = trainer.fit(make_x(), epochs=20, validation_split=0.2, verbose=False)
    assert history.history["val_loss"][-1] < history.history["val_loss"][0]
    with pytest.raises(DataError, match="x has 5 columns where 6 are expected"):
        trainer.predict(make_x(3, 5))


def test_frozen_parameters_stay():
    model = make_model()
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    before = weights(model)
    Trainer(model).fit(make_x(), verbose=False)
    same = [torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
    assert same == [True] * 4 + [False] * 4


def test_predict_and_encode():
    x, model = make_x(50), make_model(dropout=0.5)
    model.decoder.eval()  # a flag of each module's own
    trainer = Trainer(model)
    eval_model = make_model().eval()
    for batch_size in (50, 7):
        np.testing.assert_allclose(trainer.predict(x, batch_size=batch_size), eval_model(x).detach(), rtol=1e-5)
        np.testing.assert_allclose(trainer.encode(x, batch_size=batch_size), eval_model.encode(x).detach(), rtol=1e-5)
    assert trainer.encode(x.numpy()).shape == (50, 3)
    assert model.encoder.training
    assert not model.decoder.training
    assert torch.equal(Trainer(model.encoder).encode(x), trainer.encode(x))
    codes = trainer.encode(x)
    assert not codes.is_inference()
    nn.Linear(3, 1)(codes).sum().backward()  # inputs to something else that is trained


def test_training_mode_is_on_while_training_and_then_as_it_was():
    class Modes(Callback):
        def on_train_batch_end(self, batch, logs):
            assert all(module.training for module in self.trainer.model.modules())

    model = make_model().eval()
    Trainer(model).fit(make_x(), validation_split=0.5, epochs=2, callbacks=[Modes()], verbose=False)
    assert not any(module.training for module in model.modules())


class Spoil(Callback):
    """Makes the step after epoch `after` one that breaks the weights; keeps the weights of each epoch's end."""

    def __init__(self, after, lr=float("inf")):
        self.after, self.lr, self.kept = after, lr, []

    def on_epoch_begin(self, epoch):
        if epoch == self.after:
            for group in self.trainer.optimizer.param_groups:
                group["lr"] = self.lr

    def on_epoch_end(self, epoch, logs):
        self.kept.append(weights(self.trainer.model))


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [(20, "the loss became nan in epoch 3, step 2,"), (1000, "a weight became NaN or Inf in the last step of epoch 3")],
)
def test_nan_stops_and_the_last_good_epoch_remains(batch_size, message):
    model, spoil = make_model(), Spoil(after=2)
    trainer = Trainer(model, seed=0)
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit(make_x(50), epochs=9, batch_size=batch_size, callbacks=[spoil], verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), spoil.kept[1], strict=True))
    assert trainer.history.epoch == [0, 1]
    assert len(trainer.history.history["loss"]) == 2
    spoil.after, spoil.lr = 0, 1e-3  # and it can be trained on
    trainer.fit(make_x(50), callbacks=[spoil], verbose=False)


def test_an_infinite_loss_names_its_first_step_and_the_untrained_model_remains():
    model = make_model()
    before = weights(model)

    def loss(prediction, target):
        return F.mse_loss(prediction, target) / (1.0 if target.shape[0] == 16 else 0.0)

    with pytest.raises(FloatingPointError, match=r"the loss became inf in epoch 1, step 4, .*smaller lr"):
        Trainer(model, "sgd", loss=loss).fit(make_x(50), batch_size=16, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_ctrl_c_leaves_the_model_and_the_history():
    class CtrlC(Callback):
        ended = False

        def on_train_batch_end(self, batch, logs):
            if len(self.trainer.history.epoch) == 2 and batch == 1:
                raise KeyboardInterrupt

        def on_train_end(self):
            self.ended = True

    model, stop = make_model().eval(), CtrlC()
    trainer = Trainer(model, seed=0)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(make_x(), epochs=9, callbacks=[stop], verbose=False)
    assert stop.ended
    assert len(trainer.history.history["loss"]) == 2
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.isfinite(trainer.predict(make_x())).all()


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("verbose", "terminal", "shown"),
    [("auto", True, True), ("auto", False, False), (True, False, True), (False, True, False)],
)
def test_progress_is_one_bar_on_stderr(monkeypatch, verbose, terminal, shown):
    stderr = Screen() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    Trainer(make_model()).fit(make_x(), epochs=3, validation_split=0.2, verbose=verbose)
    assert ("3/3" in stderr.getvalue()) is shown
    assert ("loss=" in stderr.getvalue() and "val_loss=" in stderr.getvalue()) is shown
    assert stderr.getvalue().count("\n") == shown


def test_progress_without_tqdm_is_plain_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    Trainer(make_model()).fit(make_x(), epochs=2, verbose=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line[: len("epoch 1/2: loss=0.")] for line in lines] == ["epoch 1/2: loss=0.", "epoch 2/2: loss=0."]


def test_importing_training_imports_no_extra():
    script = "import sys, fastenc.training; print({'pandas', 'sklearn', 'pyarrow', 'matplotlib'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"

import math

import pytest
import torch
from small_models import assert_same_weights, make_model, make_x, weights

from fastenc.training import Callback, EarlyStopping, History, Trainer


class Recorder(Callback):
    def __init__(self):
        self.calls = []

    def on_train_begin(self):
        self.calls.append("begin")

    def on_epoch_begin(self, epoch):
        self.calls.append(f"epoch {epoch}")

    def on_train_batch_end(self, batch, logs):
        assert list(logs) == ["loss"]
        assert isinstance(logs["loss"], float)
        self.calls.append(f"batch {batch}")

    def on_epoch_end(self, epoch, logs):
        self.calls.append(f"end {epoch} {' '.join(logs)}")

    def on_train_end(self):
        self.calls.append("end")


def test_every_hook_in_order():
    recorder, trainer = Recorder(), Trainer(make_model())
    trainer.fit(make_x(10), epochs=2, batch_size=5, validation_data=make_x(3), callbacks=[recorder], verbose=False)
    epochs = [[f"epoch {n}", "batch 0", "batch 1", f"end {n} loss val_loss"] for n in range(2)]
    assert recorder.calls == ["begin", *epochs[0], *epochs[1], "end"]
    assert recorder.trainer is trainer


def test_batch_losses_are_the_epochs():
    class Losses(Callback):
        seen = ()

        def on_train_batch_end(self, batch, logs):
            self.seen += (logs["loss"],)

    losses = Losses()
    history = Trainer(make_model()).fit(make_x(10), batch_size=4, callbacks=[losses], verbose=False)
    a, b, c = losses.seen
    assert history.history["loss"] == [(4 * a + 4 * b + 2 * c) / 10]


def test_batch_hooks_that_are_not_overridden_cost_nothing(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("waited for a number in a step"))
    Trainer(make_model()).fit(make_x(), callbacks=[Callback()], verbose=False)


def test_hooks_do_not_change_what_is_learned():
    plain, watched = make_model(), make_model()
    Trainer(plain, seed=0).fit(make_x(), epochs=2, verbose=False)
    Trainer(watched, seed=0).fit(make_x(), epochs=2, callbacks=[Recorder()], verbose=False)
    assert_same_weights(plain, watched)


@pytest.mark.parametrize(("hook", "batches", "epochs"), [("on_train_batch_end", 1, 1), ("on_epoch_end", 5, 1)])
def test_a_callback_stops_training(hook, batches, epochs):
    class Stop(Recorder):
        pass

    def stop(self, number, logs):
        self.trainer.stop_training = True
        getattr(Recorder, hook)(self, number, logs)

    setattr(Stop, hook, stop)
    recorder, trainer = Stop(), Trainer(make_model())
    history = trainer.fit(make_x(50), epochs=4, batch_size=10, callbacks=[recorder], verbose=False)
    assert len(history.epoch) == epochs
    assert sum(call.startswith("batch") for call in recorder.calls) == batches
    assert recorder.calls[-1] == "end"
    assert len(trainer.fit(make_x(50), epochs=2, verbose=False).epoch) == 2  # the wish was for that fit


def test_an_error_in_a_callback_comes_through_and_every_callback_is_told_of_the_end():
    class Broken(Callback):
        def on_epoch_end(self, epoch, logs):
            raise RuntimeError("broken")

    recorder, trainer = Recorder(), Trainer(make_model())
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(make_x(), callbacks=[Broken(), recorder], verbose=False)
    assert recorder.calls[-1] == "end"
    assert len(trainer.history.history["loss"]) == 1


class Scripted(Callback):
    """Puts a number of its own into what is measured, and marks the weights with the epoch."""

    def __init__(self, values, name="val_loss"):
        self.values, self.name = values, name

    def on_epoch_end(self, epoch, logs):
        logs[self.name] = self.values[epoch]
        with torch.no_grad():
            for parameter in self.trainer.model.parameters():
                parameter.fill_(epoch)


def run_scripted(values, stopping, name="val_loss"):
    """How many epochs were trained, and the epoch whose weights the model ended with."""
    model = make_model()
    callbacks = [Scripted(values, name), stopping]
    history = Trainer(model).fit(make_x(), epochs=len(values), callbacks=callbacks, verbose=False)
    (mark,) = {value for parameter in weights(model) for value in parameter.unique().tolist()}
    return len(history.epoch), int(mark)


@pytest.mark.parametrize(
    ("values", "options", "stopped", "best"),
    [
        ([3, 2, 1], {}, None, 2),
        ([3, 2, 4, 1], {}, 2, 1),  # patience 0 stops at the first that is no better
        ([3, 2, 4, 1], {"patience": 1}, 2, 1),  # and so does 1
        ([3, 2, 4, 1], {"patience": 2}, None, 3),
        ([3, 2, 4, 5, 1], {"patience": 2}, 3, 1),
        ([3, 2, 4, 1, 5, 6, 7], {"patience": 2}, 5, 3),  # an improvement starts the count again
        ([3, 3, 3, 1], {"patience": 2}, 2, 0),  # equal is no improvement
        ([3, 2.5, 2.2, 1.9], {"patience": 9, "min_delta": 1}, None, 3),
        ([3, 2.5, 2.2, 2.1], {"patience": 9, "min_delta": 1}, None, 0),
        ([3, 2], {"patience": 9, "min_delta": 1}, None, 0),  # by more than min_delta
        ([1, 2, 3], {"mode": "max"}, None, 2),
        ([3, 2, 4, 5], {"patience": 9, "restore_best_weights": False}, None, 3),
        ([3, math.nan, 2, 4], {"patience": 2}, None, 2),
        ([math.nan, 3, 4, 5], {"patience": 2}, 3, 1),
    ],
)
def test_early_stopping(values, options, stopped, best):
    stopping = EarlyStopping(**options)
    trained = len(values) if stopped is None else stopped + 1
    assert run_scripted(values, stopping) == (trained, best)
    assert stopping.stopped_epoch == stopped


def test_early_stopping_tells_what_was_best():
    stopping = EarlyStopping(patience=2)
    run_scripted([3, 2, 4, 5, 1], stopping)
    assert (stopping.best, stopping.best_epoch, stopping.stopped_epoch) == (2, 1, 3)
    run_scripted([6, 5, 4], stopping)  # used again, it starts again
    assert (stopping.best, stopping.best_epoch, stopping.stopped_epoch) == (4, 2, None)


@pytest.mark.parametrize(
    ("name", "mode", "best"),
    [("val_accuracy", "auto", 1), ("val_loss", "auto", 0), ("val_accuracy", "min", 0), ("val_loss", "max", 1)],
)
def test_which_way_is_better(name, mode, best):
    assert run_scripted([1, 2], EarlyStopping(name, patience=9, mode=mode), name) == (2, best)


def test_best_weights_are_restored_after_an_error_too():
    class CtrlC(Callback):
        def on_epoch_begin(self, epoch):
            if epoch == 3:
                raise KeyboardInterrupt

    model = make_model()
    callbacks = [Scripted([3, 1, 2]), EarlyStopping(patience=9), CtrlC()]
    with pytest.raises(KeyboardInterrupt):
        Trainer(model).fit(make_x(), epochs=9, callbacks=callbacks, verbose=False)
    assert all((parameter == 1).all() for parameter in model.parameters())


def test_real_training_ends_with_the_weights_of_the_best_epoch():
    x, held_out = make_x(8), make_x(40)  # so few rows that they are learned by heart
    model = make_model()
    trainer = Trainer(model, lr=0.05, seed=0)
    stopping = EarlyStopping(patience=5)
    history = trainer.fit(x, epochs=500, validation_data=held_out, callbacks=[stopping], verbose=False)
    values = history.history["val_loss"]
    assert len(values) < 500
    assert stopping.best_epoch == values.index(min(values)) == len(values) - 6
    assert trainer.evaluate(held_out)["loss"] == min(values)


def test_a_monitor_that_is_not_measured():
    with pytest.raises(ValueError, match="monitors 'val_loss' and only loss was measured; monitor one of"):
        Trainer(make_model()).fit(make_x(), callbacks=[EarlyStopping()], verbose=False)
    history = Trainer(make_model()).fit(make_x(), callbacks=[EarlyStopping("loss")], verbose=False)
    assert len(history.epoch) == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="mode is 'best'; give auto, min or max"):
        EarlyStopping(mode="best")
    with pytest.raises(ValueError, match="patience is -1 and"):
        EarlyStopping(patience=-1)


def test_history_is_new_for_each_fit_and_tells_the_latest():
    trainer = Trainer(make_model())
    first = trainer.fit(make_x(), epochs=2, verbose=False)
    second = trainer.fit(make_x(), verbose=False)
    assert (len(first.epoch), len(second.epoch)) == (2, 1)
    assert trainer.history is second
    assert repr(History()) == "History(0 epochs)"
    assert repr(first) == f"History(2 epochs: loss {first.history['loss'][1]:.6g})"

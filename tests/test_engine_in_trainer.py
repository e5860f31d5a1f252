"""The training engine inside Trainer: when it takes the steps, why not, and the same bits however it is called."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastenc import AutoEncoder, Callback, Classifier, Encoder, Trainer, use_backend
from fastenc.backends import cpu


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "cosine"])
def test_autocast_around_a_whole_fit(loss):
    """Autocast keeps casts of the weights until its end: training must not go on with those of the first step."""
    ends = []
    for backend in ("auto", "reference"):
        torch.manual_seed(13)
        trainer = Trainer(AutoEncoder(Encoder(100)), loss=loss, lr=1e-3)
        x = torch.rand(320, 100)
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            losses = trainer.fit(x, epochs=4, batch_size=32, shuffle=False).history["loss"]
            assert trainer.evaluate(x)["loss"] < losses[-1] < losses[1] < losses[0]
        if backend == "auto":
            assert "C++" in trainer.explain()
        ends.append(losses[-1])
    assert ends[0] == pytest.approx(ends[1], rel=0.01)  # rounding's part; with stale weights it is over 0.1


def test_what_follows_a_fit_inside_autocast_sees_its_weights():
    trainer = Trainer(AutoEncoder(Encoder(100)), lr=1e-3)
    x, weight = torch.rand(64, 100), trainer.model.encoder.layers[0].weight
    with torch.autocast("cpu", torch.bfloat16):
        before = F.linear(x, weight)  # autocast keeps its cast of the weight
        trainer.fit(x, epochs=2, batch_size=32)
        after = F.linear(x, weight)
    assert not torch.equal(before, after)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, F.linear(x, weight))


def fitted(threads: int, epochs: int = 6, **options):
    torch.manual_seed(12)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = AutoEncoder(Encoder(100, dropout=0.1))
        trainer = Trainer(model, seed=5, **options)
        history = trainer.fit(torch.rand(300, 100), epochs=epochs, batch_size=64)
    finally:
        torch.set_num_threads(before)
    assert "C++" in trainer.explain()
    return [*model.state_dict().values(), torch.tensor(history.history["loss"])], trainer


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"optimizer": "sgd", "momentum": 0.9}], ids=str)
def test_bits_do_not_depend_on_threads(options):
    alone = fitted(1, **options)[0]
    for threads in (1, 2, 4):
        for one, many in zip(alone, fitted(threads, **options)[0], strict=True):
            assert torch.equal(one, many)


def test_bits_do_not_depend_on_how_many_steps_a_call_takes():
    class Listener(Callback):
        def on_train_batch_end(self, batch, logs):
            assert all(p.grad is not None for p in self.trainer.model.parameters())

    torch.manual_seed(13)
    data, states = torch.rand(300, 100), []
    model = AutoEncoder(Encoder(100))
    for callbacks in ((), (Listener(),)):
        twin = copy.deepcopy(model)
        Trainer(twin, seed=5).fit(data, epochs=3, callbacks=callbacks)
        states.append([*twin.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_trainer_keeps_the_weights_of_before_the_bad_step():
    model, x = AutoEncoder(Encoder(100)), torch.rand(300, 100)
    before = copy.deepcopy(model)

    def rate(step: int) -> float:
        return 1e-3 if step < 7 else 1e30

    with pytest.raises(FloatingPointError, match=r"in epoch 1, step 9, .* weights from before that (step|epoch again)"):
        Trainer(model, "sgd", lr=rate).fit(x, batch_size=30)
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert one.isfinite().all()
        assert one.shape == other.shape


def make_model() -> Encoder:
    return Encoder(17, (9, 5))


class Sub(Encoder):
    pass


def hooked() -> nn.Module:
    model = make_model()
    model.layers[1].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (lambda: Sub(17, (5,)), {}, "the model is not a plain FusedDense, Encoder, AutoEncoder, Classifier"),
        (hooked, {}, "the model is not a plain"),
        (lambda: make_model().double(), {}, "a parameter is not float32"),
        (make_model, {"loss": lambda y, t: (y - t).square().mean()}, "the loss is a function"),
        (
            make_model,
            {"optimizer": lambda p: torch.optim.Adam(p, amsgrad=True)},
            "the optimiser has the option amsgrad",
        ),
        (make_model, {"optimizer": torch.optim.RMSprop}, "the optimiser is not PyTorch's SGD, Adam or AdamW"),
    ],
    ids=["subclass", "hook", "double", "loss", "amsgrad", "rmsprop"],
)
def test_says_why_not(model, options, reason):
    trainer = Trainer(model(), **options)
    trainer.fit(torch.rand(20, 17), torch.rand(20, 5))
    assert trainer.explain().startswith(f"step by step: {reason}")


@pytest.mark.parametrize(
    ("widths", "batch", "brgemm", "backend", "whole"),
    [
        ((512, 512), 33, False, "auto", False),
        ((512, 512), 32, False, "auto", True),
        ((1024, 1024), 32, False, "auto", False),
        ((512, 511), 33, False, "auto", True),
        ((512, 512), 33, False, "cpu", True),
        ((512, 512), 33, True, "auto", None),  # the engine where this CPU has brgemm
    ],
)
def test_wide_layers_are_trained_step_by_step_without_brgemm(widths, batch, brgemm, backend, whole):
    trainer = Trainer(Encoder(widths[0], widths[1:]))
    with cpu.configured("auto", brgemm), use_backend(backend):
        whole = "float32" in cpu.describe() if whole is None else whole
        trainer.fit(torch.rand(40, widths[0]), torch.rand(40, widths[1]), epochs=1, batch_size=batch, verbose=False)
    assert ("C++" in trainer.explain()) == whole
    reason = f"without AVX-512 PyTorch's products are faster for a layer of {widths[0]} to {widths[1]} features"
    assert whole or trainer.explain() == f"step by step: {reason}"


def test_heads_and_their_metrics():
    torch.manual_seed(17)
    x = torch.randn(200, 17)
    labels = (x[:, 0] > 0).long()
    trainer = Trainer(Classifier(Encoder(17, (16, 8)), 2), lr=0.01, loss="cross_entropy", seed=0)
    trainer.fit(x, labels, epochs=30)
    assert "C++" in trainer.explain()
    assert trainer.evaluate(x, labels)["accuracy"] > 0.95

"""finetune(): three strategies, frozen and thawed layers, rates per layer, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small_models import assert_near, assert_same_weights, make_model, make_x
from torch import nn

from fastenc import AutoEncoder, Callback, Classifier, Encoder, Regressor, Trainer, finetune
from fastenc.data import DataError
from fastenc.data.augmentation import GaussianNoise, Mixup
from fastenc.finetuning import GradualUnfreezing, encoder_layers, freeze_layers, layer_groups, pretrain
from fastenc.finetuning.pretraining import METHODS
from fastenc.pretrained import ModelFileError

ROWS = 60
SMALL = {"widths": (5, 4, 3), "activation": "tanh", "epochs": 3, "batch_size": 20, "seed": 0, "verbose": False}
WHOLE = "9 of 9 steps were taken whole, by the C++ engine"


def make_rows(rows=ROWS):
    """Two classes that lie apart."""
    generator = np.random.default_rng(0)
    y = generator.permutation(np.arange(rows) % 2)
    x = generator.normal(size=(rows, 6)).astype(np.float32)
    x[:, :2] += 3.0 * y[:, None]
    return x, np.where(y, "yes", "no")


X, Y = make_rows()
NUMBERS = 100.0 + 50.0 * X[:, 0]


def test_from_scratch():
    result = finetune(X, Y, **{**SMALL, "epochs": 40}, lr=0.01, validation_split=0.2)
    assert isinstance(result.model, Classifier)
    assert result.classes.tolist() == ["no", "yes"]
    assert (result.predict(X) == Y).mean() > 0.9
    assert result.history.history["val_accuracy"][-1] > 0.8
    assert result.how == "120 of 120 steps were taken whole, by the C++ engine"
    assert result.pretraining is None


def test_it_is_the_trainer():
    """Every option of the training with labels reaches it."""
    options = {"weight_decay": 0.1, "l1": 0.01, "clip_norm": 0.5, "lr": 0.02, "optimizer": "adamw"}
    result = finetune(X, Y, **{**SMALL, "dropout": 0.2}, **options, augment=GaussianNoise(0.1))
    torch.manual_seed(0)
    by_hand = Classifier(Encoder(6, (5, 4, 3), "tanh", dropout=0.2), 2)
    trainer = Trainer(by_hand, loss="cross_entropy", seed=0, **options)
    labels = (Y == "yes").astype(int)
    trainer.fit(X, labels, epochs=3, batch_size=20, augment=GaussianNoise(0.1), verbose=False)
    assert_same_weights(result.model, by_hand)


def test_it_is_repeatable_and_leaves_pytorchs_random_numbers_alone():
    state = torch.get_rng_state()
    options = {**SMALL, "strategy": "pretrain", "pretraining": "denoising", "pretraining_options": {"epochs": 2}}
    first, second = finetune(X, Y, **options), finetune(X, Y, **options)
    assert_same_weights(first.model, second.model)
    assert torch.equal(torch.get_rng_state(), state)
    other = finetune(X, Y, **{**options, "seed": 1})
    assert not torch.equal(other.model.head.weight, first.model.head.weight)


def test_regression_gives_numbers_in_their_own_units():
    result = finetune(X, NUMBERS, **{**SMALL, "epochs": 100}, lr=0.02)
    assert isinstance(result.model, Regressor)
    assert result.history.history["loss"][-1] < 0.1  # of a variance of 1
    error = np.square(result.predict(X) - NUMBERS).mean()
    assert error < 0.1 * NUMBERS.var()
    assert result.classes is None
    assert finetune(X, X[:, :2] * 3, **SMALL).predict(X).shape == (ROWS, 2)


def test_scaled_targets_are_the_same_training():
    scaled = (NUMBERS - NUMBERS.mean()) / NUMBERS.std()
    result = finetune(X, NUMBERS, **SMALL)
    plain = finetune(X, scaled.astype(np.float32), **SMALL, scale_targets=False)
    np.testing.assert_allclose(
        (result.predict(X) - NUMBERS.mean()) / NUMBERS.std(), plain.predict(X), rtol=1e-4, atol=1e-5
    )


def test_a_constant_target_is_learned():
    result = finetune(X, np.full(ROWS, 7.5), **{**SMALL, "epochs": 50}, lr=0.02)
    assert np.abs(result.predict(X) - 7.5).max() < 0.5


def test_pre_training_changes_where_fine_tuning_starts():
    seen = {}

    class Start(Callback):
        def on_train_begin(self):
            seen[kind] = copy.deepcopy(self.trainer.model.encoder)

    for kind in METHODS:
        result = finetune(
            X[:10],
            Y[:10],
            **SMALL,
            strategy="pretrain",
            pretraining=kind,
            unlabelled=X,
            pretraining_options={"epochs": 3, "batch_size": 20},
            callbacks=[Start()],
        )
        assert len(result.pretraining.history.epoch) == len(result.history.epoch) == 3
        if kind == "contrastive":
            assert result.pretraining.how.startswith("step by step: the model is not a plain")
            assert result.pretraining.how.endswith("it is a Projected")
        else:
            assert result.pretraining.how == WHOLE
            assert isinstance(result.pretraining.model, AutoEncoder)
        assert result.how == "3 of 3 steps were taken whole, by the C++ engine"
    weights = [encoder.layers[0].weight for encoder in seen.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_pre_training_lowers_its_loss():
    for method in METHODS:
        torch.manual_seed(0)
        encoder = Encoder(6, (16, 4), "tanh", "identity")
        losses = pretrain(
            encoder, X, method=method, epochs=60, batch_size=20, lr=0.01, seed=0, verbose=False, noise=0.05, mask=0.1
        ).history.history["loss"]
        assert losses[-1] < 0.8 * losses[0], method


def test_two_views_are_scored_as_pairs():
    """The model sees view beside view, and the loss is InfoNCE of the two."""
    torch.manual_seed(0)
    encoder = Encoder(6, (4,), "tanh", "identity")
    seen = []
    result = pretrain(
        encoder,
        X,
        method="contrastive",
        augment=lambda x: seen.append(x.shape) or x * (len(seen) % 2 + 1),
        epochs=1,
        batch_size=ROWS,
        lr=0.0,
        temperature=0.5,
        verbose=False,
    )
    assert seen == [(ROWS, 6)] * 2
    x = torch.from_numpy(X)
    first, second = (nn.functional.normalize(result.model.projection(encoder(x * f)), dim=1) for f in (2, 1))
    logits = first @ second.T / 0.5
    rows = torch.arange(ROWS)
    expected = (nn.functional.cross_entropy(logits, rows) + nn.functional.cross_entropy(logits.T, rows)) / 2
    assert abs(result.history.history["loss"][0] - expected.item()) < 1e-4


# Transfer, frozen layers, rates.


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(5)
    return AutoEncoder(Encoder(6, (5, 4, 3), "tanh"))


def test_transfer_trains_a_copy_and_by_default_its_last_layer(source, tmp_path):
    before = copy.deepcopy(source)
    result = finetune(X, Y, **SMALL, strategy="transfer", encoder=source)
    assert_same_weights(source, before)
    layers = source.encoder.layers
    same = [torch.equal(a.weight, b.weight) for a, b in zip(result.model.encoder.layers, layers, strict=True)]
    assert same == [True, True, False]
    assert result.how == WHOLE
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    source.save_pretrained(tmp_path)
    again = finetune(X, Y, **SMALL, strategy="transfer", encoder=tmp_path)
    assert_same_weights(again.model, result.model)
    thawed = finetune(X, Y, **SMALL, strategy="transfer", encoder=source.encoder, frozen=0)
    assert not torch.equal(thawed.model.encoder.layers[0].weight, source.encoder.layers[0].weight)


class Watch(Callback):
    def __init__(self):
        self.trained, self.layers = [], []

    def on_epoch_end(self, epoch, logs):
        layers = encoder_layers(self.trainer.model)
        self.trained.append([layer.weight.requires_grad for layer in layers])
        self.layers.append([layer.weight.detach().clone() for layer in layers])


def test_layers_are_thawed_from_the_top_and_the_engine_follows(source):
    watch = Watch()
    result = finetune(
        X,
        Y,
        **{**SMALL, "epochs": 7},
        strategy="transfer",
        encoder=source,
        unfreeze_every=2,
        layer_decay=0.5,
        callbacks=[watch],
    )
    none, one, two, all_ = ([i >= 3 - n for i in range(3)] for n in range(4))
    assert watch.trained == [none, none, one, one, two, two, all_]
    start = [layer.weight for layer in source.encoder.layers]
    for weights, trained in zip(watch.layers, watch.trained, strict=True):
        assert [not torch.equal(a, b) for a, b in zip(weights, start, strict=True)] == trained
    assert result.how == "21 of 21 steps were taken whole, by the C++ engine"


def test_thawing_step_by_step_is_the_same(source, step_by_step):
    watch = Watch()
    finetune(X, Y, **{**SMALL, "epochs": 4}, encoder=source, unfreeze_every=1, callbacks=[watch])
    start = [layer.weight for layer in source.encoder.layers]
    for weights, trained in zip(watch.layers, watch.trained, strict=True):
        assert [not torch.equal(a, b) for a, b in zip(weights, start, strict=True)] == trained


def test_an_optimiser_that_lacks_the_thawed_layer():
    model = make_model()
    freeze_layers(model, 2)
    with pytest.raises(ValueError, match="the optimiser does not hold the layer that is to be thawed; make"):
        Trainer(model).fit(make_x(), epochs=2, callbacks=[GradualUnfreezing()], verbose=False)


def test_each_layer_has_its_rate():
    model = Classifier(Encoder(6, (5, 4, 3)), 2)
    groups = layer_groups(model, 1.0, 0.5)
    assert [group["lr"] for group in groups] == [1.0, 0.5, 0.25, 0.125]
    tops = [model.head, *reversed(model.encoder.layers)]
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(p) for p in top.parameters()] for top in tops]
    assert [group["lr"] for group in layer_groups(model.encoder, 1.0, 0.5)] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rates_and_other_options_reach_each_layer(source, optimizer):
    """One step of SGD from the same weights: twice the rate is twice the way."""
    options = {**SMALL, "epochs": 1, "batch_size": ROWS, "lr": 0.1, "encoder": source, "optimizer": optimizer}
    plain = finetune(X, Y, **options)
    decayed = finetune(X, Y, **options, layer_decay=0.5)
    assert decayed.how == "1 of 1 steps were taken whole, by the C++ engine"
    for depth, (a, b, start) in enumerate(
        zip(plain.model.encoder.layers, decayed.model.encoder.layers, source.encoder.layers, strict=True)
    ):
        way, shorter = ((layer.weight - start.weight).detach().double() for layer in (a, b))
        torch.testing.assert_close(shorter, way * 0.5 ** (3 - depth), rtol=1e-3, atol=1e-6)
    assert torch.equal(plain.model.head.weight, decayed.model.head.weight)


def test_weight_decay_reaches_grouped_optimisers(source):
    options = {**SMALL, "encoder": source, "optimizer": "adamw", "lr": 0.1}
    plain = finetune(X, Y, **options, weight_decay=0.9)
    grouped = finetune(X, Y, **options, weight_decay=0.9, unfreeze_every=1, frozen=0)
    assert_near(list(grouped.model.double().parameters()), list(plain.model.double().parameters()))


def test_adapters_are_trained_and_merged(source):
    result = finetune(X, Y, **{**SMALL, "epochs": 30}, lr=0.02, strategy="transfer", encoder=source, lora_rank=2)
    assert type(result.model.encoder.layers[0]).__name__ == "FusedDense"
    for layer, start in zip(result.model.encoder.layers, source.encoder.layers, strict=True):
        assert torch.linalg.matrix_rank((layer.weight - start.weight).detach(), rtol=1e-3) == 2
        assert torch.equal(layer.bias, start.bias)
    assert (result.predict(X) == Y).mean() > 0.8
    assert result.how.startswith("step by step: the model is not a plain")


# Other losses, early stopping, validation.


def test_triplets_train_the_encoder_alone():
    result = finetune(X, Y, **{**SMALL, "epochs": 20}, lr=0.01, loss="triplet", validation_split=0.25)
    assert isinstance(result.model, Encoder)
    assert result.history.history["loss"][-1] < result.history.history["loss"][0]
    assert result.predict(X).shape == (ROWS, 3)


def test_cosine_and_mixup():
    finetune(X, X[:, :3], **SMALL, loss="cosine")
    assert finetune(X, Y, **SMALL, augment=[GaussianNoise(0.1), Mixup()]).how == WHOLE


def test_patience_keeps_the_best_weights():
    result = finetune(X, Y, **{**SMALL, "epochs": 200}, lr=0.3, validation_split=0.3, patience=3)
    losses = result.history.history["val_loss"]
    assert len(losses) < 200
    assert len(losses) - 1 - int(np.argmin(losses)) == 3


def test_validation_data_of_ones_own():
    result = finetune(X[:40], Y[:40], **SMALL, validation_data=(X[40:], Y[40:]))
    accuracy = (result.predict(X[40:]) == Y[40:]).mean()
    assert result.history.history["val_accuracy"][-1] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "scrap"}, "strategy is 'scrap'; give one of scratch, pretrain, transfer"),
        ({"strategy": "transfer"}, "needs a trained encoder; give a model or its folder as encoder"),
        ({"unlabelled": X}, "unlabelled rows are for strategy='pretrain' and it is 'scratch'"),
        (
            {"strategy": "pretrain", "pretraining": "gan"},
            "the method of pre-training is 'gan'; give one of",
        ),
        ({"frozen": 9}, "frozen is 9 and the encoder has 3 layers; give 0 to 3"),
        ({"frozen": -1}, "frozen is -1"),
        ({"unfreeze_every": 0}, "every is 0; give a whole number of epochs"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0; it must be above 0 and at most 1"),
        ({"layer_decay": 0.5, "lr": lambda step: 0.1}, "lr is a function and layer_decay and unfreeze_every need"),
        ({"lora_rank": 2, "frozen": 1}, "lora_rank freezes the encoder itself; leave out frozen"),
        ({"lora_rank": 0}, "the rank is 0"),
        ({"patience": 3}, "patience needs validation rows; give validation_split or validation_data"),
        ({"encoder": nn.Linear(6, 2)}, "encoder is a Linear; give a folder, an Encoder"),
        ({"encoder": Encoder(7)}, "x has 6 columns and the encoder takes 7"),
        ({"loss": "mes"}, "loss is 'mes'"),
        ({"optimizer": "adan"}, "optimizer is 'adan'"),
        ({"optimizer": "adan", "unfreeze_every": 1}, "optimizer is 'adan'"),
        ({"validation_split": 1.0}, "validation_split is 1.0"),
        ({"validation_split": 0.001}, "leaves 60 to train on and 0 to validate on"),
        ({"validation_data": X}, r"validation_data must be \(x, y\)"),
        ({"validation_data": (X, ["maybe"] * ROWS)}, "validation y holds labels that no training row has: maybe"),
        ({"validation_data": (X[:, :3], Y)}, "validation x has 3 columns where 6 are expected"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        finetune(X, Y, **{**SMALL, **options})


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelFileError, match="there is no model"):
        finetune(X, Y, **SMALL, strategy="transfer", encoder=tmp_path)


def test_bad_rows_are_refused():
    bad = X.copy()
    bad[3, 2] = np.nan
    with pytest.raises(DataError, match=r"x has NaN or Inf in 1 of 60 rows \(row 3"):
        finetune(bad, Y, **SMALL)
    with pytest.raises(DataError, match="y has 59 labels and x has 60 rows"):
        finetune(X, Y[1:], **SMALL)


def test_a_loss_that_is_not_finite_says_where():
    options = {"strategy": "pretrain", "pretraining_options": {"lr": 1e30, "epochs": 3}}
    with pytest.raises(FloatingPointError, match=r"in pre-training (the loss|a weight) became"):
        finetune(X, Y, **{**SMALL, "activation": "relu"}, **options)
    with pytest.raises(FloatingPointError, match=r"^(the loss|a weight) became"):
        finetune(X, Y, **{**SMALL, "activation": "relu"}, lr=1e30, optimizer="sgd")

"""Augmentation: what each does to rows, that an epoch trains on new ones, and that the engine stays in use."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from small_models import assert_same_weights, make_classifier, make_model, make_x
from torch.utils.data import TensorDataset

from fastenc import Callback, Trainer
from fastenc.data import DataError
from fastenc.data.augmentation import FeatureMask, GaussianNoise, ImageTransform, Mixup, image_augmentation

LABELS = torch.arange(50) % 3


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_noise_has_its_deviation():
    x = torch.full((10_000, 2), 5.0)
    noise = GaussianNoise(0.3)(x) - x
    assert abs(noise.mean()) < 5 * 0.3 / 20_000**0.5  # five standard errors
    assert abs(noise.std() - 0.3) < 5 * 0.3 / 40_000**0.5
    assert torch.equal(x, torch.full((10_000, 2), 5.0))


def test_masks_hide_their_share():
    x = torch.ones(10_000, 2)
    masked = FeatureMask(0.2, value=-1.0)(x)
    assert set(masked.unique().tolist()) == {-1.0, 1.0}
    assert abs((masked == -1.0).double().mean() - 0.2) < 5 * (0.2 * 0.8 / 20_000) ** 0.5


def test_mixup_mixes_rows_and_targets_alike():
    x, target = make_x(50), make_x(50)[:, :2] * 3
    mixed, mixed_target = Mixup(1.0)(x, target)
    torch.testing.assert_close(mixed[:, :2] * 3, mixed_target)
    assert not torch.equal(mixed, x)
    pairs = torch.tensor([[0.0], [1.0]]).repeat(5000, 1)
    share = Mixup(0.2)(pairs, pairs)[0]
    assert 0 <= share.min() < 0.01
    assert 0.99 < share.max() <= 1
    assert 0.01 < ((share > 0.01) & (share < 0.99)).double().mean() < 0.5  # between two unlike rows, and seldom halves


def test_images_are_transformed_one_by_one():
    seen = []

    def turn(image):
        seen.append(image.shape)
        return image.flip(-1) if len(seen) % 2 else image

    x = torch.arange(12.0).reshape(2, 6)
    turned = ImageTransform((2, 3), turn)(x)
    assert seen == [(1, 2, 3)] * 2
    assert turned.tolist() == [[2, 1, 0, 5, 4, 3], [6, 7, 8, 9, 10, 11]]


def test_images_of_another_size():
    with pytest.raises(DataError, match=r"x has 6 columns and images of \[1, 3, 3\] have 9 pixels"):
        ImageTransform((3, 3), lambda image: image)(torch.rand(2, 6))
    with pytest.raises(DataError, match=r"the transform gives images of \[1, 2, 2\] and the rows hold \[1, 2, 3\]"):
        ImageTransform((2, 3), lambda image: image[..., :2])(torch.rand(2, 6))
    with pytest.raises(ValueError, match=r"give \(height, width\) or"):
        ImageTransform((6,), lambda image: image)


def test_without_torchvision_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match="image_augmentation needs torchvision; run: pip install torchvision"):
        image_augmentation((8, 8))


def test_torchvisions_transforms_are_asked_for(monkeypatch):
    """With a stand-in for torchvision, which records what it is asked for."""
    made = []

    def stand_in(name):
        return lambda *args, **options: made.append((name, args, options)) or (lambda image: image)

    v2 = ModuleType("torchvision.transforms.v2")
    for name in ("RandomAffine", "RandomResizedCrop", "RandomHorizontalFlip", "Compose", "Identity"):
        setattr(v2, name, stand_in(name))
    v2.Compose = lambda steps: lambda image: image + len(steps)
    for name, module in (
        ("torchvision", ModuleType("t")),
        ("torchvision.transforms", ModuleType("t")),
        (v2.__name__, v2),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    transform = image_augmentation((3, 8, 4), shift=0.25, crop=0.5, flip=True)
    assert made == [
        ("RandomAffine", (), {"degrees": 0, "translate": (0.25, 0.25)}),
        ("RandomResizedCrop", ((8, 4),), {"scale": (0.5, 1.0), "antialias": True}),
        ("RandomHorizontalFlip", (), {}),
    ]
    assert torch.equal(transform(torch.zeros(2, 96)), torch.full((2, 96), 3.0))
    made.clear()
    image_augmentation((8, 8), shift=0.0)
    assert [name for name, *_ in made] == ["Identity"]


def test_torchvisions_own_transforms():
    """The real ones: images of shifted, cropped and mirrored digits, and a fit with them."""
    pytest.importorskip("torchvision", reason="torchvision wants one torch exactly, so that no extra here can have it")
    image = torch.arange(64.0).reshape(1, 8, 8) / 64
    x = image.reshape(1, 64).repeat(200, 1)
    flipped = image_augmentation((8, 8), shift=0.0, flip=True)(x).reshape(200, 8, 8)
    mirrored = (flipped == image.flip(-1)).flatten(1).all(1)
    assert ((flipped == image).flatten(1).all(1) | mirrored).all()
    assert 60 < mirrored.sum() < 140
    shifted = image_augmentation((8, 8), shift=0.25)(x)
    assert shifted.shape == x.shape
    moves = {
        tuple(torch.roll(image[0], (down, right), (0, 1)).flatten().tolist()): (down, right)
        for down in range(-2, 3)
        for right in range(-2, 3)
    }
    inner = [(row.reshape(8, 8)[2:6, 2:6], row) for row in shifted]
    known = {key: torch.tensor(key).reshape(8, 8)[2:6, 2:6] for key in moves}
    found = {moves[key] for part, _ in inner for key, move in known.items() if torch.equal(part, move)}
    assert len(found) > 15  # of 25 whole pixels up to a quarter of the image
    cropped = image_augmentation((8, 8), shift=0.0, crop=0.5)(x)
    assert cropped.shape == x.shape
    assert cropped.isfinite().all()
    assert len(cropped.unique(dim=0)) > 20
    coloured = image_augmentation((3, 4, 4), shift=0.0, flip=True)(torch.rand(5, 48))
    assert coloured.shape == (5, 48)
    model = make_model()
    trainer = Trainer(model, seed=0)
    trainer.fit(make_x(), augment=image_augmentation((2, 3), shift=0.5, flip=True), epochs=2, verbose=False)
    assert "C++" in trainer.explain()
    assert not torch.equal(model.encoder.layers[0].weight, make_model().encoder.layers[0].weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(-1), "std is -1"),
        (lambda: GaussianNoise(float("nan")), "std is nan"),
        (lambda: FeatureMask(1.0), "probability is 1.0"),
        (lambda: Mixup(0), "alpha is 0"),
        (lambda: image_augmentation((8, 8), shift=2), "shift is 2 and crop 1.0"),
        (lambda: image_augmentation((8, 8), crop=0), "crop 0"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# In the Trainer.


class Doubled:
    """Not random: the next call multiplies by the next number."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x * self.calls


def test_each_epoch_trains_on_rows_of_its_own():
    x, augment = make_x(), Doubled()
    before = x.clone()
    model, hand = make_model(), make_model()
    trainer = Trainer(model, "sgd", 0.1, seed=0)
    trainer.fit(x, epochs=3, augment=augment, validation_data=x, shuffle=False, verbose=False)
    by_hand = Trainer(hand, "sgd", 0.1, seed=0)
    for factor in (1, 2, 3):
        by_hand.fit(x * factor, x, shuffle=False, verbose=False)  # the target stays the clean rows
    assert augment.calls == 3
    assert_same_weights(model, hand)
    assert torch.equal(x, before)
    assert trainer.explain() == "6 of 6 steps were taken whole, by the C++ engine"


def test_the_engine_trains_on_mixed_labels():
    x = make_x()
    model, hand = make_classifier(), make_classifier()
    trainer = Trainer(model, "sgd", 0.5, "cross_entropy", seed=3)
    trainer.fit(x, LABELS, augment=[GaussianNoise(0.0), Mixup(1.0)], shuffle=False, verbose=False)
    assert trainer.explain() == "2 of 2 steps were taken whole, by the C++ engine"
    torch.manual_seed(3)
    torch.randn_like(x)
    mixed = Mixup(1.0)(x, torch.nn.functional.one_hot(LABELS, 3).float())
    Trainer(hand, "sgd", 0.5, "cross_entropy").fit(*mixed, shuffle=False, verbose=False)
    assert_same_weights(model, hand)


def test_augmentation_is_repeatable_and_new_in_each_epoch():
    models = [make_model(), make_model()]
    seen = []

    class Watch(Callback):
        def on_epoch_end(self, epoch, logs):
            seen.append(logs["loss"])

    for model in models:
        Trainer(model, lr=0.0, seed=1).fit(
            make_x(), augment=GaussianNoise(0.5), epochs=3, callbacks=[Watch()], verbose=False
        )
    assert seen[:3] == seen[3:]
    assert len(set(seen)) == 3


def test_batches_of_a_dataset_are_augmented_one_by_one():
    augment = Doubled()
    model = make_classifier()
    data = TensorDataset(make_x(), LABELS)
    Trainer(model, loss="cross_entropy").fit(data, batch_size=20, augment=augment, verbose=False)
    assert augment.calls == 3
    with pytest.raises(DataError, match="Mixup needs arrays to mix labels, and x is a Dataset"):
        Trainer(model, loss="cross_entropy").fit(data, augment=Mixup(), verbose=False)


def test_read_only_rows_are_augmented(tmp_path):
    np.save(tmp_path / "x.npy", make_x().numpy())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    model, hand = make_model(), make_model()
    Trainer(model, seed=0).fit(x, augment=Doubled(), verbose=False)
    Trainer(hand, seed=0).fit(make_x(), augment=Doubled(), verbose=False)
    assert_same_weights(model, hand)


@pytest.mark.parametrize("augment", [lambda x: x[:, :2], lambda x: None, lambda x: x[:1]])
def test_what_changes_the_shape_is_refused(augment):
    with pytest.raises(DataError, match=r"augment gives .* for rows of shape \[50, 6\]"):
        Trainer(make_model()).fit(make_x(), augment=augment, verbose=False)


def test_labels_of_other_losses_cannot_be_mixed():
    with pytest.raises(DataError, match="labels can be mixed for loss='cross_entropy' only"):
        Trainer(make_classifier(), loss="triplet").fit(make_x(), LABELS, augment=Mixup(), verbose=False)


def test_noise_that_is_not_finite_stops_training():
    model = make_model()
    with pytest.raises(FloatingPointError, match="the loss became nan in epoch 1, step 1"):
        Trainer(model).fit(make_x(), augment=lambda x: x * float("nan"), verbose=False)
    assert_same_weights(model, make_model())


def test_a_fit_that_goes_on_augments_as_one_that_was_not_interrupted(tmp_path):
    whole, model = make_model(), make_model()
    augment = GaussianNoise(0.5)
    Trainer(whole, seed=0).fit(make_x(), epochs=4, augment=augment, verbose=False)

    class Save(Callback):
        def on_train_batch_end(self, batch, logs):
            if len(self.trainer.history.epoch) == 2 and batch == 0:
                self.trainer.save_checkpoint(tmp_path / "checkpoint")
                self.trainer.stop_training = True

    Trainer(model, seed=0).fit(make_x(), epochs=4, augment=augment, callbacks=[Save()], verbose=False)
    other = make_model()
    Trainer(other, seed=9).fit(
        make_x(), epochs=4, augment=augment, callbacks=[Callback()], resume=tmp_path / "checkpoint", verbose=False
    )
    assert_same_weights(other, whole)

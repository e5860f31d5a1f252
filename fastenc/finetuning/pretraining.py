"""Pre-training of an encoder on rows without labels: as an autoencoder, a denoising one, or by contrast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastenc.data import as_rows
from fastenc.data.augmentation import FeatureMask, GaussianNoise, augment_rows

from ..encoder import AutoEncoder, Encoder
from ..training import Callback, History, Trainer
from ..training.augmented import Augment
from ..training.losses import info_nce

METHODS = ("autoencoder", "denoising", "masking", "contrastive")
# What belongs to some of the methods only.
OPTIONS = {"noise": ("denoising", "contrastive"), "mask": ("masking", "contrastive"), "temperature": ("contrastive",)}


@dataclass(frozen=True)
class Pretraining:
    """How an encoder was pre-trained.

    Attributes:
        model: what was trained: an AutoEncoder, or the encoder with its projection.
        history: of that training.
        how: how its steps were taken, as `Trainer.explain` tells it.
    """

    model: nn.Module
    history: History
    how: str


class Projected(nn.Module):
    """An encoder and two layers above it, from two views of each row `[rows, 2, features]`, side by side as
    `[rows, 2 * features]`, to two vectors `[rows, 2 * code size]`.

    The layers on top are thrown away after training: what contrast forgets, they forget (Chen et al., 2020).
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        weight = next(encoder.parameters())
        size = encoder.out_features
        self.base = encoder
        self.projection = Encoder(
            size, (size, size), final_activation="identity", device=weight.device, dtype=weight.dtype
        )
        self.in_features = 2 * encoder.in_features

    def forward(self, x: Tensor) -> Tensor:
        views = x.reshape(2 * len(x), self.base.in_features)
        return self.projection(self.base(views)).reshape(len(x), -1)


@dataclass(frozen=True)
class TwoViews:
    """Augments both halves of `[rows, 2 * features]`, each for itself."""

    augment: Augment

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([augment_rows(self.augment, half, half)[0] for half in x.chunk(2, dim=1)], dim=1)


def pretrain(
    encoder: Encoder,
    x: Any,
    *,
    method: str = "autoencoder",
    augment: Augment | None = None,
    noise: float = 0.1,
    mask: float = 0.2,
    temperature: float = 0.1,
    final_activation: str = "identity",
    epochs: int = 100,
    batch_size: int = 32,
    validation_split: float = 0.0,
    callbacks: Sequence[Callback] = (),
    verbose: bool | str = "auto",
    **trainer: Any,
) -> Pretraining:
    """Train `encoder`, in place, on rows without labels.

    Args:
        encoder: what is trained.
        x: [rows, features], arrays of any kind that `Trainer.fit` takes.
        method: "autoencoder"; "denoising", from rows with Gaussian noise to the clean ones; "masking", from rows with
            hidden features to all; "contrastive", in which two views of a row are to be found among those of the others
            of the batch (SimCLR, by InfoNCE).
        augment: in place of the method's own: GaussianNoise(noise), FeatureMask(mask), and both of them for the views.
        noise, mask: the noise's standard deviation, and the probability that a feature is hidden.
        temperature: of InfoNCE.
        final_activation: of the reconstruction; "sigmoid" for features in 0 to 1.
        epochs, batch_size, validation_split, callbacks, verbose: of `Trainer.fit`.
        trainer: the Trainer's own options: optimizer, lr, loss (of a reconstruction), weight_decay, seed and so on.

    The C++ engine takes the steps of autoencoders of all three kinds; those of contrast are taken one by one.

    Raises:
        ValueError: an unknown method, or a wrong option.
        DataError, FloatingPointError: as `Trainer.fit`.
    """
    if method not in METHODS:
        raise ValueError(f"the method of pre-training is {method!r}; give one of {', '.join(METHODS)}")
    fit: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "validation_split": validation_split,
        "verbose": verbose,
    }
    model: nn.Module
    if method == "contrastive":
        augment = [GaussianNoise(noise), FeatureMask(mask)] if augment is None else augment
        if "loss" in trainer:
            raise ValueError("loss is given and contrastive pre-training has its own; leave it out")
        rows = as_rows(x, dtype=next(encoder.parameters()).dtype, features=encoder.in_features)
        model = Projected(encoder)
        fitter = Trainer(model, loss=_PairLoss(temperature), **trainer)
        history = fitter.fit(
            torch.cat([rows, rows], 1), rows[:, :1], augment=TwoViews(augment), callbacks=callbacks, **fit
        )
        return Pretraining(model, history, fitter.explain())
    if augment is None and method != "autoencoder":
        augment = GaussianNoise(noise) if method == "denoising" else FeatureMask(mask)
    model = AutoEncoder(encoder, final_activation)
    fitter = Trainer(model, **trainer)
    history = fitter.fit(x, augment=augment, callbacks=callbacks, **fit)
    return Pretraining(model, history, fitter.explain())


@dataclass(frozen=True)
class _PairLoss:
    """InfoNCE between the two halves of the prediction; the target is not looked at."""

    temperature: float

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        first, second = prediction.chunk(2, dim=1)
        return info_nce(first, second, self.temperature)

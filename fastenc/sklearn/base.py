"""What the estimators share: settings, scaling, weights and training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from ..activation import ACTIVATIONS
from ..encoder import Encoder
from ..pipeline import run_in_chunks
from ..training import EarlyStopping, Trainer


@dataclass(eq=False, repr=False)
class EncoderEstimator(BaseEstimator):
    """The settings and attributes of all estimators here.

    Args:
        widths: the width of each layer of the encoder; the last is the size of the code. None is (128, 64, 32, 16), and
            of a detector (64, 32, a quarter of the features, at most 16).
        activation: of every layer but the last.
        final_activation: of the last layer; None means as the others where a head follows, and identity otherwise.
        dropout: probability of dropping a hidden feature while training.
        optimizer, lr, weight_decay: as Trainer takes them.
        epochs: passes over the training rows.
        batch_size: rows in each step.
        validation_fraction: share of the rows, chosen at random, by which `patience` judges; classifiers take as much
            of each class. Without patience nothing is held out.
        patience: stop when validation got no better for so many epochs, and keep the best weights; None never stops.
        scale: whether each feature (and each number to predict) is scaled to mean 0 and standard deviation 1 over the
            training rows. What comes out is in the units of what went in.
        random_state: None, an int or a numpy RandomState: of the first weights, the order of rows and the dropout.

    Attributes:
        model_: the fitted model, in eval mode.
        history_: what was measured: name -> one number for each epoch.
        n_features_in_, feature_names_in_: as scikit-learn's.

    `fit` takes a `sample_weight` `[rows]`: how often each row counts, in the scaling, the loss and what is held out.
    """

    widths: Sequence[int] | None = None
    activation: str = "relu"
    final_activation: str | None = None
    dropout: float = 0.0
    optimizer: Any = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 100
    batch_size: int = 32
    validation_fraction: float = 0.1
    patience: int | None = None
    scale: bool = True
    random_state: Any = None

    _default_final_activation: ClassVar[str | None] = None

    def _check_settings(self) -> None:
        """Refuse settings before anything is learned; Trainer refuses those that it is given itself."""
        for name in ("epochs", "batch_size", *(["patience"] if self.patience is not None else [])):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name in ("activation", *(["final_activation"] if self.final_activation is not None else [])):
            if getattr(self, name) not in ACTIVATIONS:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(ACTIVATIONS)}")
        widths = self.widths
        sequence = isinstance(widths, (tuple, list, np.ndarray)) and len(widths) > 0
        if widths is not None and not (sequence and all(isinstance(w, Integral) and w > 0 for w in widths)):
            raise ValueError(f"widths is {widths!r}; give the width of each layer, for example (128, 64, 16)")
        fraction = self.validation_fraction
        if self.patience is not None and not (isinstance(fraction, Real) and 0 < fraction < 1):
            raise ValueError(f"validation_fraction is {fraction!r}; patience needs a number between 0 and 1")

    def _encoder(self, features: int) -> Encoder:
        widths = self._default_widths(features) if self.widths is None else self.widths
        final = self._default_final_activation if self.final_activation is None else self.final_activation
        return Encoder(features, widths, self.activation, final, dropout=self.dropout)

    def _default_widths(self, features: int) -> Sequence[int]:
        return (128, 64, 32, 16)

    def _fit_scaler(self, numbers: np.ndarray, weight: np.ndarray | None) -> Any:
        return StandardScaler().fit(numbers, sample_weight=weight) if self.scale else None

    def _fit_inputs(self, x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        """float64 rows to fit on as the model takes them; the scaling is learned from them."""
        self._scaler = self._fit_scaler(x, weight)
        return scaled(self._scaler, x)

    def _train(
        self,
        build: Callable[[], nn.Module],
        x: np.ndarray,
        y: np.ndarray | None,
        loss: str,
        weight: np.ndarray | None,
    ) -> None:
        """Train what `build()` gives on float32 `x` `[rows, features]`; `y` as Trainer takes it, None for `x`."""
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        callbacks: list[EarlyStopping] = []
        rows, held_out = np.arange(len(x)), None
        if self.patience is not None:
            rows, held_out = self._hold_out(len(x), y if loss == "cross_entropy" else None, seed)
            callbacks = [EarlyStopping(patience=int(self.patience))]

        def part(chosen: np.ndarray) -> tuple[Any, ...]:
            return tuple(None if array is None else array[chosen] for array in (x, y, weight))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build()
        trainer = Trainer(model, self.optimizer, self.lr, loss, weight_decay=self.weight_decay, seed=seed)
        train_x, train_y, train_weight = part(rows)
        history = trainer.fit(
            train_x,
            train_y,
            sample_weight=train_weight,
            epochs=int(self.epochs),
            batch_size=int(self.batch_size),
            validation_data=None if held_out is None else part(held_out),
            callbacks=callbacks,
            verbose=False,
        )
        self.model_: Any = model.eval()
        self.history_ = history.history

    def _hold_out(self, rows: int, labels: np.ndarray | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the rows to train on and of those to validate on; `labels` [rows] of a classifier."""
        held_out = max(1, round(rows * self.validation_fraction))
        if held_out >= rows:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} of n_samples={rows} leaves no rows to train on; "
                "lower it, or set patience=None"
            )
        strata = None
        if labels is not None:  # of each class as much, where each has enough
            counts = np.bincount(labels)
            if counts.min() > 1 and len(counts) <= min(held_out, rows - held_out):
                strata = labels
        kept, out = train_test_split(np.arange(rows), test_size=held_out, random_state=seed, stratify=strata)
        return kept, out

    def _validated(self, X: Any) -> np.ndarray:
        """X of a fitted estimator as the model takes it: float32, scaled."""
        check_is_fitted(self)
        return scaled(self._scaler, validate_data(self, X, reset=False, dtype=np.float64))


def checked_weight(sample_weight: Any, rows: int) -> np.ndarray | None:
    """`sample_weight` as float64 `[rows]`, 0 or more and not all 0; None stays None."""
    if sample_weight is None:
        return None
    if isinstance(sample_weight, Real):
        sample_weight = np.full(rows, sample_weight)
    weight = check_array(sample_weight, dtype=np.float64, ensure_2d=False, input_name="sample_weight")
    if weight.shape != (rows,):
        raise ValueError(f"sample_weight has shape {weight.shape}; give one number for each row, ({rows},)")
    if (weight < 0).any():
        raise ValueError("sample_weight has negative numbers; give how often each row counts, 0 or more")
    if not weight.any():
        raise ValueError("sample_weight is 0 for every row; at least one number must be non-zero")
    return weight


def with_weight(weight: np.ndarray | None, *arrays: np.ndarray) -> tuple[Any, ...]:
    """The weights and arrays without the rows of weight 0: as if they had not been given."""
    if weight is None or weight.all():
        return weight, *arrays
    kept = weight > 0
    return weight[kept], *(array[kept] for array in arrays)


def run(model: nn.Module, x: np.ndarray) -> np.ndarray:
    return np.concatenate(list(run_in_chunks(model, x)))


def run_exactly(model: nn.Module, x: np.ndarray) -> np.ndarray:
    """float64 `[rows, ...]`, computed in it: scikit-learn wants a row's result not to depend on those beside it."""
    return run(deepcopy(model).double(), x).astype(np.float64)


def scaled(scaler: Any, numbers: np.ndarray) -> np.ndarray:
    """float32, as models take them."""
    with np.errstate(over="ignore"):
        out = (numbers if scaler is None else scaler.transform(numbers)).astype(np.float32)
    if not np.isfinite(out).all():
        raise ValueError("X or y has values too large for float32; scale them down, or remove them")
    return out


def unscaled(scaler: Any, numbers: np.ndarray) -> np.ndarray:
    return numbers if scaler is None else scaler.inverse_transform(numbers).astype(numbers.dtype)

"""scikit-learn estimators: encoders that are fitted, searched over and put into pipelines as anything of scikit-learn.

They train a model of fastenc by its Trainer and take and give what scikit-learn's own estimators do. X is an array or
table `[rows, features]` of finite numbers; a faulty one is refused in scikit-learn's words, and a faulty setting in one
sentence. The fitted model is `model_`; the same `random_state` gives the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import nn

from .activation import ACTIVATIONS
from .encoder import AutoEncoder, Classifier, Encoder, Regressor
from .pipeline import run_in_chunks
from .report import row_errors
from .training import EarlyStopping, Trainer

try:
    from sklearn.base import (
        BaseEstimator,
        ClassifierMixin,
        ClassNamePrefixFeaturesOutMixin,
        OutlierMixin,
        RegressorMixin,
        TransformerMixin,
    )
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ModuleNotFoundError as error:
    if (
        error.name is None or error.name.partition(".")[0] != "sklearn"
    ):  # it is there, and something that it needs is not
        raise
    raise ModuleNotFoundError(
        'fastenc.sklearn needs scikit-learn; run: pip install "fastenc[app]"', name="sklearn"
    ) from None

__all__ = ["EncoderClassifier", "EncoderOutlierDetector", "EncoderRegressor", "EncoderTransformer"]


class _Estimator(BaseEstimator):
    """What the estimators share: settings, scaling and training.

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
    """

    _default_final_activation: str | None = None

    def __init__(
        self,
        widths: Sequence[int] | None = None,
        activation: str = "relu",
        final_activation: str | None = None,
        dropout: float = 0.0,
        optimizer: Any = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        epochs: int = 100,
        batch_size: int = 32,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        scale: bool = True,
        random_state: Any = None,
    ) -> None:
        self.widths = widths
        self.activation = activation
        self.final_activation = final_activation
        self.dropout = dropout
        self.optimizer = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.scale = scale
        self.random_state = random_state

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

    def _fit_scaler(self, numbers: np.ndarray) -> Any:
        return StandardScaler().fit(numbers) if self.scale else None

    def _train(self, build: Any, x: np.ndarray, y: np.ndarray | None, loss: str) -> None:
        """Train what `build()` gives on float32 `x` `[rows, features]`; `y` as Trainer takes it, None for `x`."""
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        callbacks, validation = [], None
        if self.patience is not None:
            x, y, validation = self._hold_out(x, y, loss, seed)
            callbacks = [EarlyStopping(patience=int(self.patience))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build()
        trainer = Trainer(model, self.optimizer, self.lr, loss, weight_decay=self.weight_decay, seed=seed)
        history = trainer.fit(
            x,
            y,
            epochs=int(self.epochs),
            batch_size=int(self.batch_size),
            validation_data=validation,
            callbacks=callbacks,
            verbose=False,
        )
        self.model_: Any = model.eval()
        self.history_ = history.history

    def _hold_out(self, x: np.ndarray, y: np.ndarray | None, loss: str, seed: int) -> tuple[Any, Any, Any]:
        """(x, y) to train on and the validation data."""
        held_out = max(1, round(len(x) * self.validation_fraction))
        if held_out >= len(x):
            raise ValueError(
                f"validation_fraction={self.validation_fraction} of n_samples={len(x)} leaves no rows to train on; "
                "lower it, or set patience=None"
            )
        strata = None
        if loss == "cross_entropy" and y is not None:  # of each class as much, where each has enough
            counts = np.bincount(y)
            if counts.min() > 1 and len(counts) <= min(held_out, len(x) - held_out):
                strata = y
        rows = np.arange(len(x))
        kept, out = train_test_split(rows, test_size=held_out, random_state=seed, stratify=strata)
        if y is None:
            return x[kept], None, x[out]
        return x[kept], y[kept], (x[out], y[out])

    def _validated(self, X: Any) -> np.ndarray:
        """X of a fitted estimator as the model takes it: float32, scaled."""
        check_is_fitted(self)
        return _scaled(self._scaler, validate_data(self, X, reset=False, dtype=np.float64))

    def _fit_inputs(self, x: np.ndarray) -> np.ndarray:
        """float64 rows to fit on as the model takes them; the scaling is learned from them."""
        self._scaler = self._fit_scaler(x)
        return _scaled(self._scaler, x)


class _Reconstructing(_Estimator):
    """Those that are trained to give X back."""

    _default_final_activation = "identity"

    def _fit_model(self, X: Any) -> np.ndarray:
        """Train on X; the rows as the model takes them."""
        self._check_settings()
        x = self._fit_inputs(validate_data(self, X, dtype=np.float64, ensure_min_samples=2))
        self._train(lambda: AutoEncoder(self._encoder(x.shape[1])), x, None, "mse")
        return x

    def score_samples(self, X: Any) -> np.ndarray:
        """Minus the mean squared error of each row's reconstruction, scaled as in training: float64 `[rows]`."""
        return self._scores(self._validated(X))

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return -row_errors(x, _run_exactly(self.model_, x))


class EncoderTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _Reconstructing):
    """The rows as codes of an autoencoder: `[rows, features] -> float32 [rows, widths[-1]]`; fit needs no y.

    Its settings and attributes are those of all estimators here: see `fastenc.sklearn._Estimator`.
    """

    def fit(self, X: Any, y: Any = None) -> EncoderTransformer:
        """Train on X `[rows, features]`; y is not looked at."""
        self._fit_model(X)
        self._n_features_out = self.model_.encoder.out_features
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The code of each row: float32 `[rows, widths[-1]]`."""
        x = self._validated(X)
        return _run(self.model_.encoder, x)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Codes `[rows, widths[-1]]` to features `[rows, features]`, float32, in the units of what was fitted."""
        check_is_fitted(self)
        codes = check_array(X, dtype=np.float32)
        if codes.shape[1] != self._n_features_out:
            raise ValueError(
                f"X has {codes.shape[1]} columns and a code has {self._n_features_out}; give what transform makes"
            )
        return _unscaled(self._scaler, _run(self.model_.decoder, codes))

    def score(self, X: Any, y: Any = None) -> float:
        """The mean of `score_samples`: minus the mean squared error; y is not looked at."""
        return float(self.score_samples(X).mean())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


class EncoderOutlierDetector(OutlierMixin, _Reconstructing):
    """Finds the rows that an autoencoder reconstructs worst: predict gives -1 for outliers and 1 for others.

    Args:
        contamination: the share of the training rows that is taken for outliers, above 0 and at most 0.5; it sets
            `offset_`, the score below which a row is one.

    The other settings and attributes are those of all estimators here: see `fastenc.sklearn._Estimator`.
    """

    def __init__(
        self,
        widths: Sequence[int] | None = None,
        activation: str = "relu",
        final_activation: str | None = None,
        dropout: float = 0.0,
        optimizer: Any = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        epochs: int = 100,
        batch_size: int = 32,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        scale: bool = True,
        random_state: Any = None,
        contamination: float = 0.1,
    ) -> None:
        super().__init__(
            widths,
            activation,
            final_activation,
            dropout,
            optimizer,
            lr,
            weight_decay,
            epochs,
            batch_size,
            validation_fraction,
            patience,
            scale,
            random_state,
        )
        self.contamination = contamination

    def fit(self, X: Any, y: Any = None) -> EncoderOutlierDetector:
        """Train on X `[rows, features]`; y is not looked at."""
        if not (isinstance(self.contamination, Real) and 0 < self.contamination <= 0.5):
            raise ValueError(f"contamination is {self.contamination!r}; it must be above 0 and at most 0.5")
        x = self._fit_model(X)
        self.offset_: float = float(np.percentile(self._scores(x), 100.0 * self.contamination))
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """`score_samples` less `offset_`: negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """-1 for outliers, 1 for the others: int64 `[rows]`."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _default_widths(self, features: int) -> Sequence[int]:
        return (64, 32, max(1, min(16, features // 4)))


class EncoderClassifier(ClassifierMixin, _Estimator):
    """An encoder and a linear layer to the logits of the classes, trained by cross entropy.

    `classes_` are the labels of y, numbers or text. The settings and other attributes are those of all estimators here:
    see `fastenc.sklearn._Estimator`.
    """

    def fit(self, X: Any, y: Any) -> EncoderClassifier:
        """Train on X `[rows, features]` and the label of each row."""
        self._check_settings()
        x, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        classes, numbers = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y has one class, {classes[0]}; a classifier needs rows of at least two")
        x = self._fit_inputs(x)
        self._train(lambda: Classifier(self._encoder(x.shape[1]), len(classes)), x, numbers, "cross_entropy")
        self.classes_ = classes
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The most likely class of each row: `[rows]`, of the kind of `classes_`."""
        x = self._validated(X)
        return self.classes_[_run(self.model_, x).argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, in the order of `classes_`: float32 `[rows, classes]`."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """The logarithms of `predict_proba`."""
        x = self._validated(X)
        logits = torch.from_numpy(_run(self.model_, x))
        return torch.log_softmax(logits, dim=1).numpy()


class EncoderRegressor(RegressorMixin, _Estimator):
    """An encoder and a linear layer to one or several numbers.

    Args:
        loss: "mse", "mae" or "huber".

    The other settings and attributes are those of all estimators here: see `fastenc.sklearn._Estimator`.
    """

    def __init__(
        self,
        widths: Sequence[int] | None = None,
        activation: str = "relu",
        final_activation: str | None = None,
        dropout: float = 0.0,
        optimizer: Any = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        epochs: int = 100,
        batch_size: int = 32,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        scale: bool = True,
        random_state: Any = None,
        loss: str = "mse",
    ) -> None:
        super().__init__(
            widths,
            activation,
            final_activation,
            dropout,
            optimizer,
            lr,
            weight_decay,
            epochs,
            batch_size,
            validation_fraction,
            patience,
            scale,
            random_state,
        )
        self.loss = loss

    def fit(self, X: Any, y: Any) -> EncoderRegressor:
        """Train on X `[rows, features]` and y `[rows]` or `[rows, outputs]`."""
        self._check_settings()
        if self.loss not in ("mse", "mae", "huber"):
            raise ValueError(f"loss is {self.loss!r}; it must be one of mse, mae, huber")
        x, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2)
        target = np.asarray(y, np.float64).reshape(len(y), -1)
        x = self._fit_inputs(x)
        self._target_scaler = self._fit_scaler(target)
        target = _scaled(self._target_scaler, target)
        self._train(lambda: Regressor(self._encoder(x.shape[1]), target.shape[1]), x, target, self.loss)
        self._flat = y.ndim == 1
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The numbers of each row: float64, of the shape that y had."""
        x = self._validated(X)
        out = _unscaled(self._target_scaler, _run_exactly(self.model_, x))
        return out[:, 0] if self._flat else out

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _run(model: nn.Module, x: np.ndarray) -> np.ndarray:
    return np.concatenate(list(run_in_chunks(model, x)))


def _run_exactly(model: nn.Module, x: np.ndarray) -> np.ndarray:
    """float64 `[rows, ...]`, computed in it: scikit-learn wants a row's result not to depend on those beside it."""
    return _run(deepcopy(model).double(), x).astype(np.float64)


def _scaled(scaler: Any, numbers: np.ndarray) -> np.ndarray:
    """float32, as models take them."""
    with np.errstate(over="ignore"):
        out = (numbers if scaler is None else scaler.transform(numbers)).astype(np.float32)
    if not np.isfinite(out).all():
        raise ValueError("X or y has values too large for float32; scale them down, or remove them")
    return out


def _unscaled(scaler: Any, numbers: np.ndarray) -> np.ndarray:
    return numbers if scaler is None else scaler.inverse_transform(numbers).astype(numbers.dtype)

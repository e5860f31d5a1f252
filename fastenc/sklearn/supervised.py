"""Estimators that learn from y: classes and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data

from ..encoder import Classifier, Regressor
from .base import EncoderEstimator, checked_weight, run, run_exactly, scaled, unscaled, with_weight


@dataclass(eq=False, repr=False)
class EncoderClassifier(ClassifierMixin, EncoderEstimator):
    """An encoder and a linear layer to the logits of the classes, trained by cross entropy.

    Args:
        class_weight: how often the rows of each class count, beside `sample_weight`: a dict from label to number, or
            "balanced", by which all classes count alike; None counts all rows alike.

    `classes_` are the labels of y, numbers or text. The other settings and attributes are those of all estimators here:
    see `fastenc.sklearn.base.EncoderEstimator`.
    """

    class_weight: Any = None

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> EncoderClassifier:
        """Train on X `[rows, features]` and the label of each row."""
        self._check_settings()
        numbers, labels = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(labels)
        labels = column_or_1d(labels, warn=True)
        weight, numbers, labels = with_weight(checked_weight(sample_weight, len(numbers)), numbers, labels)
        classes, codes = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y has one class, {classes[0]}; a classifier needs rows of at least two")
        x = self._fit_inputs(numbers, weight)
        weight = self._with_class_weight(classes, codes, weight)
        self._train(lambda: Classifier(self._encoder(x.shape[1]), len(classes)), x, codes, "cross_entropy", weight)
        self.classes_ = classes
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The most likely class of each row: `[rows]`, of the kind of `classes_`."""
        x = self._validated(X)
        return self.classes_[run(self.model_, x).argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, in the order of `classes_`: float32 `[rows, classes]`."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """The logarithms of `predict_proba`."""
        x = self._validated(X)
        logits = torch.from_numpy(run(self.model_, x))
        return torch.log_softmax(logits, dim=1).numpy()

    def _with_class_weight(self, classes: np.ndarray, codes: np.ndarray, weight: np.ndarray | None) -> Any:
        """The rows' weights times those of their classes."""
        if self.class_weight is None:
            return weight
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            counts = np.bincount(codes, weight)  # scikit-learn 1.5 has it without weights only
            of_classes = counts.sum() / (len(classes) * counts)
        else:
            of_classes = compute_class_weight(self.class_weight, classes=classes, y=classes[codes])
        return of_classes[codes] * (1.0 if weight is None else weight)


@dataclass(eq=False, repr=False)
class EncoderRegressor(RegressorMixin, EncoderEstimator):
    """An encoder and a linear layer to one or several numbers.

    Args:
        loss: "mse", "mae" or "huber".

    The other settings and attributes are those of all estimators here: see `fastenc.sklearn.base.EncoderEstimator`.
    """

    loss: str = "mse"

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> EncoderRegressor:
        """Train on X `[rows, features]` and y `[rows]` or `[rows, outputs]`."""
        self._check_settings()
        if self.loss not in ("mse", "mae", "huber"):
            raise ValueError(f"loss is {self.loss!r}; it must be one of mse, mae, huber")
        numbers, y = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2
        )
        target = np.asarray(y, np.float64).reshape(len(y), -1)
        weight, numbers, target = with_weight(checked_weight(sample_weight, len(numbers)), numbers, target)
        x = self._fit_inputs(numbers, weight)
        self._target_scaler = self._fit_scaler(target, weight)
        target = scaled(self._target_scaler, target)
        self._train(lambda: Regressor(self._encoder(x.shape[1]), target.shape[1]), x, target, self.loss, weight)
        self._flat = y.ndim == 1
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The numbers of each row: float64, of the shape that y had."""
        x = self._validated(X)
        out = unscaled(self._target_scaler, run_exactly(self.model_, x))
        return out[:, 0] if self._flat else out

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

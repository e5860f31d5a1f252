"""Estimators that are trained to give X back: codes of rows, and rows that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin, OutlierMixin, TransformerMixin
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted, validate_data

from ..encoder import AutoEncoder
from ..report import row_errors
from .base import EncoderEstimator, checked_weight, run, run_exactly, unscaled, with_weight


class _Reconstructing(EncoderEstimator):
    _default_final_activation: ClassVar[str | None] = "identity"

    def _fit_model(self, X: Any, sample_weight: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Train on X; the rows as the model takes them, and their weights."""
        self._check_settings()
        numbers = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        weight, numbers = with_weight(checked_weight(sample_weight, len(numbers)), numbers)
        x = self._fit_inputs(numbers, weight)
        self._train(lambda: AutoEncoder(self._encoder(x.shape[1])), x, None, "mse", weight)
        return x, weight

    def score_samples(self, X: Any) -> np.ndarray:
        """Minus the mean squared error of each row's reconstruction, scaled as in training: float64 `[rows]`."""
        return self._scores(self._validated(X))

    def _scores(self, x: np.ndarray) -> np.ndarray:
        return -row_errors(x, run_exactly(self.model_, x))


class EncoderTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _Reconstructing):
    """The rows as codes of an autoencoder: `[rows, features] -> float32 [rows, widths[-1]]`; fit needs no y.

    Its settings and attributes are those of all estimators here: see `fastenc.sklearn.base.EncoderEstimator`.
    """

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> EncoderTransformer:
        """Train on X `[rows, features]`; y is not looked at."""
        self._fit_model(X, sample_weight)
        self._n_features_out = self.model_.encoder.out_features
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The code of each row: float32 `[rows, widths[-1]]`."""
        x = self._validated(X)
        return run(self.model_.encoder, x)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Codes `[rows, widths[-1]]` to features `[rows, features]`, float32, in the units of what was fitted."""
        check_is_fitted(self)
        codes = check_array(X, dtype=np.float32)
        if codes.shape[1] != self._n_features_out:
            raise ValueError(
                f"X has {codes.shape[1]} columns and a code has {self._n_features_out}; give what transform makes"
            )
        return unscaled(self._scaler, run(self.model_.decoder, codes))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """The mean of `score_samples`: minus the mean squared error; y is not looked at."""
        scores = self.score_samples(X)
        return float(np.average(scores, weights=checked_weight(sample_weight, len(scores))))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


@dataclass(eq=False, repr=False)
class EncoderOutlierDetector(OutlierMixin, _Reconstructing):
    """Finds the rows that an autoencoder reconstructs worst: predict gives -1 for outliers and 1 for others.

    Args:
        contamination: the most of the training rows, as a share, that are taken for outliers, above 0 and at most 0.5;
            it sets `offset_`, the score of a training row below which a row is one.

    The other settings and attributes are those of all estimators here: see `fastenc.sklearn.base.EncoderEstimator`.
    """

    contamination: float = 0.1

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> EncoderOutlierDetector:
        """Train on X `[rows, features]`; y is not looked at."""
        if not (isinstance(self.contamination, Real) and 0 < self.contamination <= 0.5):
            raise ValueError(f"contamination is {self.contamination!r}; it must be above 0 and at most 0.5")
        x, weight = self._fit_model(X, sample_weight)
        self.offset_: float = _threshold(self._scores(x), weight, float(self.contamination))
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """`score_samples` less `offset_`: negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """-1 for outliers, 1 for the others: int64 `[rows]`."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _default_widths(self, features: int) -> Sequence[int]:
        return (64, 32, max(1, min(16, features // 4)))


def _threshold(scores: np.ndarray, weight: np.ndarray | None, share: float) -> float:
    """The highest score of a row that at most `share` of the rows, as often as each counts, lie below."""
    order = np.argsort(scores, kind="stable")
    counted = np.cumsum(np.ones(len(scores)) if weight is None else weight[order])
    most = share * counted[-1] * (1.0 + 1e-9)  # the product may have been rounded down
    return float(scores[order[np.searchsorted(counted, most, side="right")]])

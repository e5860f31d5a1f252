"""What a report measures of codes, reconstructions and scores: numpy arrays in, plain figures out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastenc.data import DataError
from fastenc.data.extras import require
from fastenc.report import dead_units

MAX_CLUSTER_ROWS = 2_000  # silhouette and clustering take time with the square of the rows
MAX_CLUSTERS = 10
TEST_SHARE = 0.3  # of each of the repeated splits
MIN_DOWNSTREAM_ROWS = 10
REPORTED_ROWS = 10  # those with the highest anomaly scores

Metric = str | Callable[[np.ndarray, np.ndarray], float]


def feature_errors(x: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """The mean squared error of each feature, float64 `[features]`, from two arrays `[rows, features]`."""
    return np.square(np.asarray(x, np.float64) - reconstruction).mean(axis=0)


def spread(values: np.ndarray) -> dict[str, float]:
    """How `values` `[rows]` are spread: mean, median, 90th and 99th percentile, and the largest."""
    median, p90, p99 = np.percentile(values, [50, 90, 99])
    figures = {"mean": values.mean(), "median": median, "p90": p90, "p99": p99, "max": values.max()}
    return {name: float(value) for name, value in figures.items()}


def code_statistics(codes: np.ndarray) -> dict[str, Any]:
    """What each number of a code tells, and how much of it others tell as well.

    variance: of each unit. dead: units that hold one value for every row. correlation: Pearson's, of each two units,
    0 for dead ones. redundancy: the mean of |correlation| over pairs of living units. effective_dimensions: the
    participation ratio of the codes' covariance, sum(eigenvalues)^2 / sum(eigenvalues^2): from 1 to the code's size.
    """
    codes = np.asarray(codes, np.float64)
    dead = dead_units(codes)
    alive = np.setdiff1d(np.arange(codes.shape[1]), dead)
    centred = codes - codes.mean(axis=0)
    covariance = centred.T @ centred / len(codes)
    deviation = np.sqrt(np.diag(covariance))
    product = np.outer(deviation, deviation)
    correlation = np.divide(covariance, product, out=np.zeros_like(covariance), where=product > 0).clip(-1, 1)
    pairs = np.abs(correlation[np.ix_(alive, alive)][np.triu_indices(len(alive), 1)])
    square = float(np.square(covariance).sum())
    return {
        "variance": np.diag(covariance).tolist(),
        "dead": dead,
        "correlation": correlation.tolist(),
        "redundancy": float(pairs.mean()) if len(pairs) else 0.0,
        "effective_dimensions": float(np.trace(covariance) ** 2 / square) if square > 0 else 0.0,
    }


def cluster_figures(codes: np.ndarray, labels: np.ndarray | None, seed: int) -> dict[str, float]:
    """How the codes `[rows, size]`, standardised, fall into clusters.

    With labels, int64 `[rows]`: the silhouette of the classes, and how far k-means with as many clusters agrees with
    them: the adjusted Rand index and the normalised mutual information. Without: the number of clusters from 2 to
    MAX_CLUSTERS whose silhouette is best, and that silhouette. At most MAX_CLUSTER_ROWS rows, evenly spaced, are taken.
    Empty if the rows are too few or all the same.
    """
    metrics, KMeans = require("sklearn.metrics", "evaluation"), require("sklearn.cluster", "evaluation").KMeans
    rows = np.arange(len(codes))[:: max(1, -(-len(codes) // MAX_CLUSTER_ROWS))]
    codes = np.asarray(codes[rows], np.float64)
    deviation = codes.std(axis=0)
    codes = (codes - codes.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    different = len(np.unique(codes, axis=0))

    def clusters(count: int) -> np.ndarray:
        return KMeans(count, n_init=3, random_state=seed).fit_predict(codes)

    if labels is not None:
        labels = labels[rows]
        classes = len(np.unique(labels))
        if not 2 <= classes < len(codes) or different < classes:
            return {}
        found = clusters(classes)
        return {
            "silhouette": float(metrics.silhouette_score(codes, labels)),
            "adjusted_rand": float(metrics.adjusted_rand_score(labels, found)),
            "normalized_mutual_information": float(metrics.normalized_mutual_info_score(labels, found)),
        }
    best: dict[str, float] = {}
    for count in range(2, min(MAX_CLUSTERS, different - 1, len(codes) - 1) + 1):
        silhouette = float(metrics.silhouette_score(codes, clusters(count)))
        if not best or silhouette > best["silhouette"]:
            best = {"clusters": count, "silhouette": silhouette}
    return best


def interval(scores: np.ndarray, train: int, test: int, confidence: float) -> tuple[float, float]:
    """The confidence interval of the mean of `scores` over repeated splits into `train` and `test` rows.

    Splits share rows, so the variance is the corrected one of Nadeau and Bengio, "Inference for the Generalization
    Error", Machine Learning 52 (2003): s^2 (1 / splits + test / train), with Student's t.
    """
    deviation = scores.std(ddof=1) * math.sqrt(1 / len(scores) + test / train)
    reach = require("scipy.stats", "evaluation").t.ppf((1 + confidence) / 2, len(scores) - 1) * deviation
    return float(scores.mean() - reach), float(scores.mean() + reach)


def downstream(
    inputs: dict[str, np.ndarray],
    target: np.ndarray,
    classes: bool,
    metric: Metric | None,
    splits: int,
    confidence: float,
    seed: int,
) -> dict[str, Any] | str:
    """A linear model's score from each of `inputs`, over the same repeated random splits of their rows.

    Args:
        inputs: name -> `[rows, features]`.
        target: `[rows]`, class numbers if `classes`, else numbers.
        metric: a name of scikit-learn's scorers, or a function of (true, predicted); None is accuracy or R^2.

    Returns: "metric", "splits", "confidence" and, under "scores", name -> mean, low, high and the score of each split;
        or why it could not be measured, in words.

    Raises:
        DataError: the metric is not known, fails, or gives something else than a number.
    """
    model_selection = require("sklearn.model_selection", "evaluation")
    if len(target) < MIN_DOWNSTREAM_ROWS:
        return f"{len(target)} labelled rows are too few to split; it takes {MIN_DOWNSTREAM_ROWS}"
    split: Any = model_selection.ShuffleSplit(splits, test_size=TEST_SHARE, random_state=seed)
    if classes:
        counts = np.bincount(target)
        classes_here = len(counts[counts > 0])
        if classes_here < 2:
            return "the scored rows are all of one class"
        if counts[counts > 0].min() < 2 or classes_here > TEST_SHARE * len(target):
            return "a class has too few rows to be in both parts of a split"
        split = model_selection.StratifiedShuffleSplit(splits, test_size=TEST_SHARE, random_state=seed)
    if metric is None:
        metric = "accuracy" if classes else "r2"
    name, score = _scorer(metric)
    scores: dict[str, Any] = {}
    for label, values in inputs.items():
        found = []
        for train, test in split.split(values, target):
            model = _linear_model(classes).fit(values[train], target[train])
            found.append(score(model, values[test], target[test]))
        low, high = interval(np.array(found), len(train), len(test), confidence)
        scores[label] = {"mean": float(np.mean(found)), "low": low, "high": high, "each": found}
    return {"metric": name, "splits": splits, "confidence": confidence, "scores": scores}


def anomalies(fitted: np.ndarray, scored: np.ndarray, rows: np.ndarray, quantile: float) -> dict[str, Any]:
    """The threshold that a share `quantile` of the row errors `fitted` lies below, and which of `scored` lie above it.

    rows: int64 `[scored rows]`, the number of each scored row in the source.
    """
    threshold = float(np.quantile(fitted, quantile))
    worst = np.argsort(-scored, kind="stable")[:REPORTED_ROWS]
    above = scored > threshold
    return {
        "quantile": quantile,
        "threshold": threshold,
        "above": int(above.sum()),
        "share": float(above.mean()),
        "highest": [{"row": int(rows[index]), "score": float(scored[index])} for index in worst],
    }


def _linear_model(classes: bool) -> Any:
    linear = require("sklearn.linear_model", "evaluation")
    scaler = require("sklearn.preprocessing", "evaluation").StandardScaler()
    model = linear.LogisticRegression(max_iter=10_000) if classes else linear.Ridge()
    return require("sklearn.pipeline", "evaluation").make_pipeline(scaler, model)


def _scorer(metric: Metric) -> tuple[str, Callable[[Any, np.ndarray, np.ndarray], float]]:
    """The metric's name, and a function of (fitted model, inputs, target) that gives a number or raises DataError."""
    metrics = require("sklearn.metrics", "evaluation")
    if isinstance(metric, str):
        if metric not in metrics.get_scorer_names():
            raise DataError(
                f"metric is {metric!r}, which scikit-learn does not know; give one of "
                "sklearn.metrics.get_scorer_names(), or a function of (true, predicted)"
            )
        name, raw = metric, metrics.get_scorer(metric)
    else:
        name = getattr(metric, "__name__", type(metric).__name__)

        def raw(model: Any, x: np.ndarray, y: np.ndarray) -> Any:
            return metric(y, model.predict(x))

    def score(model: Any, x: np.ndarray, y: np.ndarray) -> float:
        try:
            value = float(raw(model, x, y))
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise DataError(f"the metric {name!r} cannot be measured here ({reason}); give another metric") from error
        if not math.isfinite(value):
            raise DataError(f"the metric {name!r} gave {value}; give one that is a number for every split")
        return value

    return name, score

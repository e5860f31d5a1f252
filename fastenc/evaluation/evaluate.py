"""evaluate: a model and rows to one report of everything that tells how good its codes are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastenc.data import DataError, as_rows
from fastenc.pipeline import MIN_EVALUATION_ROWS, OWN_SPLIT, SavedModel, run_in_chunks
from fastenc.record import split_rows
from fastenc.report import class_numbers, evaluate_codes, fit_pca, row_errors

from .quality import Metric, anomalies, cluster_figures, code_statistics, downstream, feature_errors, spread
from .report import EvaluationReport

MAX_DOWNSTREAM_ROWS = 5_000  # a linear model is fitted to them for each split and input
CODE, PCA_CODE, FEATURES = "code", "PCA of the same size", "all features"


def evaluate(
    model: nn.Module | str | os.PathLike[str],
    x: Any,
    y: Any = None,
    *,
    fit_rows: np.ndarray | None = None,
    score_rows: np.ndarray | None = None,
    metric: Metric | None = None,
    splits: int = 10,
    confidence: float = 0.95,
    quantile: float = 0.95,
    feature_names: Sequence[str] | None = None,
    row_numbers: np.ndarray | None = None,
    seed: int = 0,
) -> EvaluationReport:
    """Measure how much of x the codes of a model keep, beside PCA of the same size and the features themselves.

    Args:
        model: an Encoder, an AutoEncoder or another module with an `encoder`; or the folder of a saved one, whose
            preprocessing is then applied to x. A model without `decode` has no reconstruction.
        x: rows that the model takes, as `fastenc.data.as_rows` does, best some that it was not trained on.
        y: a label or number for each row of x; None for none. A row whose label is missing counts for no label.
        fit_rows, score_rows: row numbers of x. PCA and the classifiers are fitted on the first, and all is scored
            on the second; by default 70% of the rows, chosen at random, and the others. Give those that the model was
            trained on and those that it was not, and PCA knows what the model does.
        metric: of the downstream task, a linear model from codes to y: a name of scikit-learn's scorers or a function
            of (true, predicted). None is accuracy for classes, R^2 for numbers.
        splits, confidence: of the scored rows, so many random splits give the downstream score's confidence interval.
        quantile: the share of the fitted rows whose error lies below the threshold of the anomaly score.
        feature_names: of the columns; None is x's own, or 0, 1, ...
        row_numbers: `[rows]`, what to call each row in the list of anomalies; None is its number in x.
        seed: of the splits, PCA and clustering.

    Raises:
        DataError: what `as_rows` refuses, fewer than MIN_EVALUATION_ROWS rows, no rows to fit or to score on, a y of
            another length, or a metric that cannot be measured.
        ValueError: splits, confidence or quantile out of range.
        ModuleNotFoundError: scikit-learn is missing.
    """
    if not isinstance(splits, (int, np.integer)) or splits < 2:
        raise ValueError(f"splits is {splits!r}; it must be a whole number of at least 2")
    for name, value in (("confidence", confidence), ("quantile", quantile)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value!r}; it must be above 0 and below 1")
    numbers = np.arange(0)
    if isinstance(model, (str, os.PathLike)):
        saved = SavedModel(Path(model))
        prepared = saved.prepare("x", x)
        model, rows, numbers, given = saved.model, prepared.x, prepared.rows, len(x)
        if feature_names is None and saved.preprocessor is not None:
            feature_names = saved.preprocessor.feature_names
    else:
        if feature_names is None and hasattr(x, "columns"):
            feature_names = [str(column) for column in x.columns]
        width = getattr(getattr(model, "encoder", model), "in_features", None)
        rows = as_rows(x, features=width, writable=False).numpy()
        rows.flags.writeable = False  # maybe x's own memory, or a read-only map: run_in_chunks copies what a model gets
        numbers, given = np.arange(len(rows)), len(rows)
    if len(rows) < MIN_EVALUATION_ROWS:
        raise DataError(f"x has {len(rows)} usable rows and evaluate needs at least {MIN_EVALUATION_ROWS}; add some")
    target = None if y is None else _labels(y, given)[numbers]
    if fit_rows is None or score_rows is None:
        fit_rows, score_rows = split_rows(len(rows), OWN_SPLIT, seed)
    fit_rows, score_rows = (_row_numbers(each, len(rows)) for each in (fit_rows, score_rows))
    names = [str(name) for name in feature_names] if feature_names is not None else None
    names = names if names and len(names) == rows.shape[1] else [str(column) for column in range(rows.shape[1])]
    was_training = model.training
    model.eval()
    try:
        codes = _run(getattr(model, "encoder", model), rows)
        reconstruction = _run(model, rows) if hasattr(model, "decode") else None
    finally:
        model.train(was_training)
    return measure_codes(
        rows,
        codes,
        reconstruction,
        target,
        fit_rows=fit_rows,
        score_rows=score_rows,
        metric=metric,
        splits=splits,
        confidence=confidence,
        quantile=quantile,
        names=names,
        numbers=numbers if row_numbers is None else np.asarray(row_numbers),
        seed=seed,
    )


def measure_codes(
    rows: np.ndarray,
    codes: np.ndarray,
    reconstruction: np.ndarray | None,
    target: np.ndarray | None,
    *,
    fit_rows: np.ndarray,
    score_rows: np.ndarray,
    metric: Metric | None = None,
    splits: int = 10,
    confidence: float = 0.95,
    quantile: float = 0.95,
    names: Sequence[str],
    numbers: np.ndarray,
    seed: int = 0,
) -> EvaluationReport:
    """`evaluate` of codes that are there already.

    Args:
        rows, codes, reconstruction: float32 `[rows, features]`, `[rows, code size]` and, with a decoder, as the rows.
        target: `[rows]` or None.
        names: of the features.
        numbers: `[rows]`, what to call each row in the list of anomalies.
        Others: as of `evaluate`.
    """
    if not np.isfinite(codes).all():
        raise DataError("the model gives codes that are NaN or Inf; train it again, with a smaller lr or scaled data")

    evaluation = evaluate_codes(rows, codes, reconstruction, target, fit_rows=fit_rows, score_rows=score_rows)
    notes = list(evaluation.notes)
    pca = fit_pca(rows[fit_rows], codes.shape[1])
    pca_codes = pca.transform(rows)
    pca_rows = pca.inverse_transform(pca_codes[score_rows])
    scored = rows[score_rows]
    errors = {"PCA": row_errors(scored, pca_rows)}
    anomaly = ours = None
    if reconstruction is not None:
        ours = feature_errors(scored, reconstruction[score_rows])
        errors = {"fastenc": row_errors(scored, reconstruction[score_rows]), **errors}
        known = row_errors(rows[fit_rows], reconstruction[fit_rows])
        anomaly = anomalies(known, errors["fastenc"], numbers[score_rows], quantile)
    theirs, variance = feature_errors(scored, pca_rows), scored.astype(np.float64).var(axis=0)
    features = [
        {
            "name": name,
            "variance": float(variance[index]),
            "error": None if ours is None else float(ours[index]),
            "pca_error": float(theirs[index]),
        }
        for index, name in enumerate(names)
    ]
    inputs = {CODE: codes[score_rows], PCA_CODE: pca_codes[score_rows], FEATURES: scored}
    classes, labels, task = None, None, None
    if target is not None:
        labels, why_not = class_numbers(target)
        unseen = np.setdiff1d(labels[score_rows], [*labels[fit_rows], -1])
        if why_not is None and len(unseen):
            first = target[score_rows][labels[score_rows] == unseen[0]][0]
            rows_unseen = int(np.isin(labels[score_rows], unseen).sum())
            notes.append(
                f"{rows_unseen} of the scored rows have a label that no fitted row has, such as {first}; classifiers "
                "cannot know it and get these rows wrong."
            )
        labels = labels[score_rows]
        classes = labels if why_not is None and (labels >= 0).all() and len(np.unique(labels)) > 1 else None
        found = _downstream(inputs, target[score_rows], labels, why_not, (metric, splits, confidence, seed))
        task = None if isinstance(found, str) else found
        if isinstance(found, str):
            notes.append(f"No downstream task: {found}.")
    clusters = {name: cluster_figures(values, classes, seed) for name, values in inputs.items()}
    if not clusters[CODE]:
        notes.append("No clusters: the codes of the scored rows are too few, or the same for too many rows.")
    drawn = {"errors": errors, "codes": codes[score_rows], "labels": None if classes is None else target[score_rows]}  # type: ignore[index]
    return EvaluationReport(
        evaluation=evaluation,
        features=features,
        rows={name: spread(values) for name, values in errors.items()},
        codes=code_statistics(codes[score_rows]),
        clusters={name: figures for name, figures in clusters.items() if figures},
        downstream=task,
        anomaly=anomaly,
        notes=notes,
        drawn=drawn,
    )


def _downstream(
    inputs: dict[str, np.ndarray],
    target: np.ndarray,
    labels: np.ndarray,
    why_no_classes: str | None,
    how: tuple[Metric | None, int, float, int],
) -> dict[str, Any] | str:
    if why_no_classes is None:
        rows = np.flatnonzero(labels >= 0)
        numbers: np.ndarray = labels
    elif target.dtype.kind in "iufb":
        numbers = target.astype(np.float64)
        rows = np.flatnonzero(np.isfinite(numbers))
        if len(np.unique(numbers[rows])) < 2:
            return "the target has one value for every row"
    else:
        return why_no_classes
    rows = rows[:: max(1, -(-len(rows) // MAX_DOWNSTREAM_ROWS))]
    return downstream({name: x[rows] for name, x in inputs.items()}, numbers[rows], why_no_classes is None, *how)


def _run(model: nn.Module, x: np.ndarray) -> np.ndarray:
    return np.concatenate(list(run_in_chunks(model, x)))


def _labels(y: Any, rows: int) -> np.ndarray:
    labels = y.detach().cpu().numpy() if hasattr(y, "detach") else np.asarray(y)
    if labels.shape == (rows, 1):
        labels = labels[:, 0]
    if labels.shape != (rows,):
        raise DataError(f"y has shape {list(labels.shape)} and x has {rows} rows; give one label for each row")
    return labels


def _row_numbers(rows: Any, count: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 1 or len(rows) == 0 or rows.dtype.kind not in "iu":
        raise DataError("fit_rows and score_rows must be row numbers, at least one of each; leave them out for a split")
    if rows.min() < 0 or rows.max() >= count:
        raise DataError(
            f"fit_rows and score_rows go from {rows.min()} to {rows.max()}, and x has rows 0 to {count - 1}"
        )
    return rows

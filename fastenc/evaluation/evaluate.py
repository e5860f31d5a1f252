"""evaluate: a model and rows to one report of everything that tells how good its codes are."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastenc.data import DataError, as_rows
from fastenc.files import replacing
from fastenc.pipeline import MIN_EVALUATION_ROWS, OWN_SPLIT, SavedModel, run_in_chunks
from fastenc.record import split_rows
from fastenc.report import Evaluation, class_numbers, evaluate_codes, fit_pca, render_evaluation, row_errors, table

from .quality import Metric, anomalies, cluster_figures, code_statistics, downstream, feature_errors, spread

MAX_DOWNSTREAM_ROWS = 5_000  # a linear model is fitted to them for each split and input
CODE, PCA_CODE, FEATURES = "code", "PCA of the same size", "all features"


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate` found. Every figure is of the scored rows, in the units of the (preprocessed) features.

    Attributes:
        evaluation: reconstruction beside PCA's, and what classifiers read from the codes.
        features: of each feature its name, its variance, and its error as reconstructed by the model (None without a
            decoder) and by PCA.
        rows: how the errors of rows are spread: "fastenc" (if there is a decoder) and "PCA".
        codes: see `quality.code_statistics`.
        clusters: "code" and others -> see `quality.cluster_figures`.
        downstream: see `quality.downstream`; None where there is no target or it could not be measured.
        anomaly: see `quality.anomalies`; None without a decoder.
        notes: what could not be measured and why.
        drawn: what the page's pictures show: arrays that are not in the JSON.
    """

    evaluation: Evaluation
    features: list[dict[str, Any]]
    rows: dict[str, dict[str, float]]
    codes: dict[str, Any]
    clusters: dict[str, dict[str, float]]
    downstream: dict[str, Any] | None
    anomaly: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)
    drawn: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON, without NaN and Inf."""
        own = {name: value for name, value in self.__dict__.items() if name not in ("evaluation", "drawn", "rows")}
        return {**self.evaluation.to_dict(), **own, "row_errors": self.rows, "notes": self.notes}

    def to_html(self, title: str = "fastenc evaluation", facts: Sequence[str] = ()) -> str:
        """One page that needs nothing else; `facts` are sentences for its head. Needs matplotlib."""
        from .page import to_page

        return to_page(self, title, facts)

    def save_json(self, path: str | os.PathLike[str], **more: Any) -> None:
        """Write the figures, after `more`, to a file that appears complete or not at all."""
        with replacing(Path(path)) as temporary:
            text = json.dumps({**more, **self.to_dict()}, indent=2, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    def save_html(self, path: str | os.PathLike[str], title: str = "fastenc evaluation", facts: Any = ()) -> None:
        """Write the page to a file that appears complete or not at all."""
        page = self.to_html(title, facts)
        with replacing(Path(path)) as temporary:
            temporary.write_text(page, encoding="utf-8")

    def __str__(self) -> str:
        return render(self)


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
        shown = numbers if row_numbers is None else np.asarray(row_numbers)
        anomaly = anomalies(known, errors["fastenc"], shown[score_rows], quantile)
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


def render(report: EvaluationReport) -> str:
    """The figures as text tables, for a terminal."""
    parts = [render_evaluation(report.evaluation)]
    rows = [(name, *(f"{value:.4g}" for value in figures.values())) for name, figures in report.rows.items()]
    parts.append(table(("Error of a row", "mean", "median", "90%", "99%", "largest"), rows))
    if report.downstream is not None:
        rows = [
            (name, f"{scores['mean']:.4g}", f"{scores['low']:.4g} to {scores['high']:.4g}")
            for name, scores in report.downstream["scores"].items()
        ]
        share = f"{report.downstream['confidence']:.0%} interval, {report.downstream['splits']} splits"
        parts.append(table((f"Linear model, {report.downstream['metric']}", "mean", share), rows))
    if report.clusters:
        columns = list(next(iter(report.clusters.values())))
        rows = [(name, *(f"{figures[c]:.4g}" for c in columns)) for name, figures in report.clusters.items()]
        parts.append(table(("Clusters", *(column.replace("_", " ") for column in columns)), rows))
    codes = report.codes
    dead = ", ".join(map(str, codes["dead"])) or "none"
    parts.append(
        f"Of {len(codes['variance'])} numbers of the code, dead: {dead}. Effective dimensions: "
        f"{codes['effective_dimensions']:.1f}. Mean |correlation| of two: {codes['redundancy']:.2f}."
    )
    if report.anomaly is not None:
        anomaly = report.anomaly
        parts.append(
            f"Anomalies: {anomaly['above']} of {report.evaluation.scored_rows} scored rows have an error above "
            f"{anomaly['threshold']:.4g}, below which {anomaly['quantile']:.0%} of the fitted rows lie."
        )
    parts += [note for note in report.notes if note not in report.evaluation.notes]
    return "\n\n".join(parts)


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

"""How good an encoder is: reconstruction error beside PCA, and what a classifier can read from the codes.

Whatever is compared is fitted on the same rows (PCA, the classifiers) and scored on other rows, the same for all.
Rows are those after preprocessing: float32 `[rows, features]`. scikit-learn does the fitting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .data.extras import require

MAX_PROBE_ROWS = 20_000  # of each part, for the classifiers, whose time grows with the square of the rows
FEW_CLASSES = 20  # more than these need five rows each, on average, to be classes and not numbers


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_codes` found; every figure is on the scored rows.

    reconstruction: name -> mean over rows of a row's mean squared error, in the units of the preprocessed features.
    accuracy: classifier -> name of its input -> share of rows classified rightly, 0 to 1.
    notes: what could not be measured and why, one sentence each.
    """

    fitted_rows: int
    scored_rows: int
    code_size: int
    reconstruction: dict[str, float]
    accuracy: dict[str, dict[str, float]]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return dict(self.__dict__)


def row_errors(x: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """The mean squared error of each row, float64 `[rows]`, from two arrays `[rows, features]`."""
    return np.square(np.asarray(x, np.float64) - reconstruction).mean(axis=1)


def fit_pca(x: np.ndarray, size: int) -> Any:
    """scikit-learn's PCA of `x` `[rows, features]` with `size` components, or fewer if the data has not as many."""
    PCA = require("sklearn.decomposition", "evaluation").PCA
    with np.errstate(invalid="ignore", divide="ignore"):  # of a share of the variance, where all rows are the same
        return PCA(n_components=min(size, *x.shape), random_state=0).fit(x)


def nearest_neighbour(rows: int) -> Any:
    return require("sklearn.neighbors", "evaluation").KNeighborsClassifier(n_neighbors=1)


def five_neighbours(rows: int) -> Any:
    return require("sklearn.neighbors", "evaluation").KNeighborsClassifier(n_neighbors=min(5, rows))


def linear_probe(rows: int) -> Any:
    """Logistic regression on standardised inputs, so that its penalty means the same for codes and for pixels."""
    scaler = require("sklearn.preprocessing", "evaluation").StandardScaler()
    regression = require("sklearn.linear_model", "evaluation").LogisticRegression(max_iter=10_000)
    return require("sklearn.pipeline", "evaluation").make_pipeline(scaler, regression)


# Each takes the number of rows that it will be fitted on.
PROBES: dict[str, Callable[[int], Any]] = {
    "nearest neighbour": nearest_neighbour,
    "5 nearest neighbours": five_neighbours,
    "linear": linear_probe,
}


def class_numbers(target: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Labels as int64 class numbers, -1 where missing, and in words why they are not classes (None if they are).

    `target` is `[rows]`: integers, booleans, text, or floats that hold whole numbers (a table with missing labels).
    """
    labels = np.asarray(target)
    if labels.dtype.kind in "iub":
        missing = np.zeros(len(labels), bool)
    elif labels.dtype.kind == "f":
        missing = ~np.isfinite(labels)
        if (labels[~missing] % 1 != 0).any():
            return np.full(len(labels), -1), "the target holds fractions, which are not classes"
    else:
        missing = np.array([label is None or label != label or str(label) == "<NA>" for label in labels.tolist()], bool)
        labels = np.array([str(label) for label in labels.tolist()])
    numbers = np.full(len(labels), -1, np.int64)
    names, numbers[~missing] = np.unique(labels[~missing], return_inverse=True)
    if len(names) < 2:
        return numbers, f"the target has {len(names)} class; classifiers need at least two"
    if len(names) * (2 if len(names) <= FEW_CLASSES else 5) > len(labels):
        return numbers, f"the target has {len(names)} different values in {len(labels)} rows, too many for classes"
    return numbers, None


def thinned(rows: np.ndarray) -> np.ndarray:
    """At most MAX_PROBE_ROWS of `rows`, evenly spaced, so that data sorted by class keeps all its classes."""
    return rows[:: max(1, -(-len(rows) // MAX_PROBE_ROWS))]


def probe_accuracy(
    fit_inputs: np.ndarray, fit_labels: np.ndarray, inputs: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Accuracy on `inputs`, `labels` of each classifier of `PROBES` fitted on the first two; labels are integers."""
    count = len(fit_inputs)
    return {
        name: float(probe(count).fit(fit_inputs, fit_labels).score(inputs, labels)) for name, probe in PROBES.items()
    }


def evaluate_codes(
    x: np.ndarray,
    codes: np.ndarray,
    reconstruction: np.ndarray | None,
    target: np.ndarray | None,
    *,
    fit_rows: np.ndarray,
    score_rows: np.ndarray,
) -> Evaluation:
    """Compare codes with PCA of the same size and with the features themselves.

    Args:
        x: features, float32 `[rows, features]`.
        codes: the encoder's output for them, float32 `[rows, code size]`.
        reconstruction: the decoder's output `[rows, features]`; None if the model has no decoder.
        target: labels `[rows]` for the classifiers; None if there are none.
        fit_rows, score_rows: row numbers that PCA and the classifiers are fitted on, and that everything is scored on.
    """
    pca = fit_pca(x[fit_rows], codes.shape[1])
    pca_name = f"PCA, {pca.n_components_} components"
    pca_codes = pca.transform(x)
    notes = []
    errors = {}
    if reconstruction is None:
        notes.append("The model has no decoder, so there is no reconstruction to measure.")
    else:
        errors["fastenc"] = float(row_errors(x[score_rows], reconstruction[score_rows]).mean())
    errors[pca_name] = float(row_errors(x[score_rows], pca.inverse_transform(pca_codes[score_rows])).mean())
    errors["mean of the fitted rows"] = float(row_errors(x[score_rows], x[fit_rows].mean(axis=0)).mean())

    accuracy: dict[str, dict[str, float]] = {}
    if target is not None:
        numbers, why_not = class_numbers(target)
        fit, score = (thinned(rows[numbers[rows] >= 0]) for rows in (fit_rows, score_rows))
        if why_not is None and (len(np.unique(numbers[fit])) < 2 or len(score) == 0):
            why_not = "too few labelled rows are left to fit and to score on"
        if why_not is not None:
            notes.append(f"No classifiers: {why_not}.")
        else:
            inputs = {f"code, {codes.shape[1]} numbers": codes, pca_name: pca_codes, f"all {x.shape[1]} features": x}
            for name, values in inputs.items():
                scores = probe_accuracy(values[fit], numbers[fit], values[score], numbers[score])
                for probe, share in scores.items():
                    accuracy.setdefault(probe, {})[name] = share
    return Evaluation(len(fit_rows), len(score_rows), codes.shape[1], errors, accuracy, notes)


def dead_units(codes: np.ndarray | Iterable[np.ndarray]) -> list[int]:
    """The columns of `codes` `[rows, code size]` that hold one value for every row, and so tell nothing.

    The rows may come in blocks, none of them without rows.
    """
    ranges = [(block.min(0), block.max(0)) for block in ([codes] if isinstance(codes, np.ndarray) else codes)]
    low, high = (np.array(each) for each in zip(*ranges, strict=True))
    return np.flatnonzero(low.min(0) == high.max(0)).tolist()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table; the first column is text, the others are figures and stand to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def render(cells: list[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([render(lines[0]), "  ".join("-" * width for width in widths), *map(render, lines[1:])])


def render_evaluation(evaluation: Evaluation) -> str:
    """The figures as text tables, the best reconstruction told by its ratio to PCA's."""
    lines = []
    base = next(error for name, error in evaluation.reconstruction.items() if name.startswith("PCA"))
    rows: list[tuple[str, ...]] = [
        (name, f"{error:.6g}", f"{error / base:.2f}" if base > 0 else "-")
        for name, error in evaluation.reconstruction.items()
    ]
    lines.append(table(("Reconstruction", "mean squared error", "relative to PCA"), rows))
    if evaluation.accuracy:
        inputs = list(next(iter(evaluation.accuracy.values())))
        probes = list(evaluation.accuracy)
        rows = [(name, *(f"{evaluation.accuracy[probe][name]:.1%}" for probe in probes)) for name in inputs]
        lines.append(table(("Accuracy from", *probes), rows))
    return "\n\n".join([*lines, *evaluation.notes])

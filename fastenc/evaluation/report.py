"""EvaluationReport: what `evaluate` found, as text, JSON and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastenc.files import replacing
from fastenc.report import Evaluation, render_evaluation, table


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

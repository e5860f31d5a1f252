"""`fastenc evaluate`: how good a model's codes are, in a terminal, as JSON and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..data import Chunks
from ..evaluation import EvaluationReport
from ..evaluation import evaluate as measure_quality
from ..measured import read_rows
from ..pipeline import SavedModel, labels_of
from ..record import read_record
from ..vectors import check_folder_of
from .items import evaluate_folder
from .options import ColumnOption, DataArgument, ModelArgument, inner_fraction, report_rows


def evaluate(
    folder: ModelArgument,
    data: DataArgument,
    target: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column of labels; by default the one given to train.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to a JSON file, too.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with tables and pictures, too.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A scorer of scikit-learn's, for a linear model of the labels."),
    ] = None,
    quantile: Annotated[
        float, typer.Option(callback=inner_fraction, help="Share of fitted rows below the anomaly score's threshold.")
    ] = 0.95,
    column: ColumnOption = None,
) -> None:
    """Measure how much of DATA the codes of the model in DIR keep, beside PCA of the same size.

    If DATA is what the model was trained on, PCA and the classifiers are fitted on the rows that the model was trained
    on, and everything is scored on those that were held out. Otherwise they are fitted on 70% of the rows, chosen at
    random, and everything is scored on the other 30%: PCA then knows this very data, and the model may not. Of more
    rows than fit in memory as many are measured as do.
    """
    for file in (json_file, html_file):
        if file is not None:
            check_folder_of(file)
    saved = SavedModel(folder)
    if saved.reader is not None:
        report, why = evaluate_folder(saved, folder, data, target, column, metric=metric, quantile=quantile)
    else:
        report, why = evaluate_table(saved, folder, data, target, metric=metric, quantile=quantile)
    typer.echo(f"{why}\n\n{report}")
    if json_file is not None:
        report.save_json(json_file, model=str(folder), data=data, rows=why)
        typer.echo(f"\nwritten to {json_file}")
    if html_file is not None:
        report.save_html(html_file, f"{folder} on {data}", [why])
        typer.echo(f"\nwritten to {html_file}")


def evaluate_table(
    saved: SavedModel, folder: Path, data: str, target: str | None, **options: Any
) -> tuple[EvaluationReport, str]:
    """The report of a table's rows, and a sentence on what was scored."""
    record = read_record(folder)
    chunks = Chunks(data, target=target)
    if target is None and record is not None and (remembered := labels_of(chunks, record["target"])):
        chunks = Chunks(data, target=remembered)
        if isinstance(record["target"], list):
            others = ", ".join(record["target"][1:])
            typer.echo(f"the labels are those in {remembered}; --target takes others, such as {others}", err=True)
    measured = read_rows(saved, record, data, chunks)
    report_rows(measured.dropped, measured.total, measured.unseen)
    report = measure_quality(
        saved.model,
        measured.x,
        measured.target,
        fit_rows=measured.fit_rows,
        score_rows=measured.score_rows,
        feature_names=None if saved.preprocessor is None else saved.preprocessor.feature_names,
        row_numbers=measured.rows,
        **options,
    )
    return report, measured.why

"""An evaluation as one HTML page that needs nothing else: tables, and pictures as inline SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastenc.data.extras import require
from fastenc.plots import BLUE, ORANGE, STYLE, TEN_COLOURS

if TYPE_CHECKING:
    from .report import EvaluationReport

MAX_FEATURES = 20  # drawn and listed: those with the largest errors
MAX_POINTS = 2_000
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222 }
h2 { margin-top: 2em } table { border-collapse: collapse; margin: 1em 0 }
th, td { border-bottom: 1px solid #ddd; padding: .25em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } td { white-space: nowrap }
figure { margin: 1em 0; overflow-x: auto }
figure table { margin: 0 } svg { max-width: 100%; min-width: 36em; height: auto }
h1 { overflow-wrap: anywhere } p.note { background: #fff3cd; padding: .4em .8em }
@media (max-width: 40em) { body { margin: 1em auto } th, td { padding: .25em .5em } }
"""


def to_page(report: EvaluationReport, title: str, facts: Sequence[str]) -> str:
    """The page; `facts` are sentences under its title."""
    evaluation = report.evaluation
    base = next(error for name, error in evaluation.reconstruction.items() if name.startswith("PCA"))
    parts = [f"<p>{html.escape(fact)}</p>" for fact in facts]
    parts.append(
        f"<p>Code of {evaluation.code_size} numbers; fitted on {evaluation.fitted_rows} rows, scored on "
        f"{evaluation.scored_rows}. Errors are mean squared errors of the preprocessed features.</p>"
    )
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in report.notes]
    parts.append("<h2>Reconstruction</h2>")
    parts.append(
        _table(
            ("from the code of", "mean squared error", "relative to PCA"),
            [
                (name, f"{error:.6g}", f"{error / base:.2f}" if base > 0 else "-")
                for name, error in evaluation.reconstruction.items()
            ],
        )
    )
    parts.append(_figure("rows", "Errors of rows", lambda axes: _draw_rows(axes, report)))
    spreads = [(name, *(f"{value:.4g}" for value in figures.values())) for name, figures in report.rows.items()]
    parts.append(_table(("error of a row", "mean", "median", "90%", "99%", "largest"), spreads))
    worst = _worst_features(report)
    size = (9.0, 1.5 + 0.3 * len(worst))
    parts.append(_figure("features", "Errors of features", lambda axes: _draw_features(axes, worst), size))
    if report.anomaly is not None:
        anomaly = report.anomaly
        parts.append(
            f"<h2>Anomalies</h2><p>{anomaly['above']} of {evaluation.scored_rows} scored rows "
            f"({anomaly['share']:.1%}) have an error above {anomaly['threshold']:.4g}, below which "
            f"{anomaly['quantile']:.0%} of the fitted rows lie. Those with the largest errors, counted from 0:</p>"
        )
        parts.append(
            _table(("row", "error"), [(str(each["row"]), f"{each['score']:.4g}") for each in anomaly["highest"]])
        )
    parts.append("<h2>Codes</h2>")
    codes = report.codes
    dead = ", ".join(map(str, codes["dead"])) or "none"
    parts.append(
        f"<p>Dead units: {dead}. Effective dimensions: {codes['effective_dimensions']:.1f} of {evaluation.code_size}. "
        f"Mean |correlation| of two units: {codes['redundancy']:.2f}.</p>"
    )
    parts.append(_figure("variance", "Variance of each unit", lambda axes: _draw_variance(axes, codes)))
    parts.append(
        _figure("correlation", "Correlation of units", lambda axes: _draw_correlation(axes, codes), (7.0, 6.0))
    )
    parts.append(_figure("map", "Map of the codes", lambda axes: _draw_map(axes, report), (8.0, 6.0)))
    if report.clusters:
        columns = list(next(iter(report.clusters.values())))
        rows = [(name, *(f"{figures[c]:.3g}" for c in columns)) for name, figures in report.clusters.items()]
        parts.append("<h2>Clusters</h2>" + _table(("in", *(column.replace("_", " ") for column in columns)), rows))
    if evaluation.accuracy:
        probes = list(evaluation.accuracy)
        inputs = list(evaluation.accuracy[probes[0]])
        rows = [(name, *(f"{evaluation.accuracy[probe][name]:.1%}" for probe in probes)) for name in inputs]
        parts.append("<h2>Classifiers</h2>" + _table(("accuracy from", *probes), rows))
    if report.downstream is not None:
        parts.append("<h2>Downstream task</h2>" + _downstream(report.downstream))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{CSS}</style>"
    body = f"<h1>{html.escape(title)}</h1>{''.join(parts)}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _downstream(task: dict[str, Any]) -> str:
    rows = [
        (name, f"{each['mean']:.4g}", f"{each['low']:.4g} to {each['high']:.4g}")
        for name, each in task["scores"].items()
    ]
    text = (
        f"<p>{html.escape(task['metric'])} of a linear model, over {task['splits']} random splits of the scored rows; "
        f"the interval of the mean holds with {task['confidence']:.0%} confidence.</p>"
    )
    picture = _figure("downstream", "Score of a linear model", lambda axes: _draw_intervals(axes, task), (9.0, 2.5))
    return text + picture + _table(("from", "mean", "interval"), rows)


def _draw_rows(axes: Any, report: EvaluationReport) -> None:
    errors = report.drawn["errors"]
    everything = np.concatenate(list(errors.values()))
    edges = np.linspace(0.0, max(float(np.percentile(everything, 99.5)), 1e-12), 41)
    for (name, values), colour in zip(errors.items(), (BLUE, ORANGE), strict=False):
        axes.hist(np.minimum(values, edges[-1]), edges, histtype="stepfilled", color=colour, alpha=0.45, label=name)
    if report.anomaly is not None:
        axes.axvline(report.anomaly["threshold"], color="#555555", linestyle="--", label="threshold")
    axes.set(title="Errors of rows", xlabel="mean squared error of a row; the last bin holds all above", ylabel="rows")
    axes.legend()


def _worst_features(report: EvaluationReport) -> list[dict[str, Any]]:
    """Those with the largest errors, largest first."""
    key = "pca_error" if report.anomaly is None else "error"
    return sorted(report.features, key=lambda each: -each[key])[:MAX_FEATURES]


def _draw_features(axes: Any, features: list[dict[str, Any]]) -> None:
    places = -np.arange(len(features))
    if features[0]["error"] is not None:
        axes.barh(places + 0.2, [each["error"] for each in features], 0.4, color=BLUE, label="fastenc")
    axes.barh(places - 0.2, [each["pca_error"] for each in features], 0.4, color=ORANGE, label="PCA")
    axes.plot([each["variance"] for each in features], places, "|", color="#222222", markersize=12, label="variance")
    axes.set_yticks(places, [_plain(each["name"])[:30] for each in features])
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.set(title=f"Errors of features, the {len(features)} largest", xlabel="mean squared error")
    axes.legend(loc="lower right")  # the shortest bars are there


def _draw_variance(axes: Any, codes: dict[str, Any]) -> None:
    variance = codes["variance"]
    axes.bar(range(len(variance)), variance, color=BLUE)
    for unit in codes["dead"]:
        axes.text(unit, 0, "dead", rotation=90, ha="center", va="bottom", color=ORANGE)
    axes.set(
        title="Variance of each unit of the code", xlabel="unit", ylabel="variance", xlim=(-0.7, len(variance) - 0.3)
    )


def _draw_correlation(axes: Any, codes: dict[str, Any]) -> None:
    image = axes.imshow(np.array(codes["correlation"]), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.set(title="Correlation of units", xlabel="unit", ylabel="unit")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _draw_map(axes: Any, report: EvaluationReport) -> None:
    """The two directions in which the codes vary most."""
    codes, labels = report.drawn["codes"], report.drawn["labels"]
    rows = np.arange(len(codes))[:: max(1, -(-len(codes) // MAX_POINTS))]
    centred = codes[rows] - codes[rows].mean(axis=0)
    points = np.zeros((len(rows), 2))
    axis_count = min(2, *centred.shape)
    points[:, :axis_count] = centred @ np.linalg.svd(centred, full_matrices=False)[2][:axis_count].T
    names = [] if labels is None else sorted(set(map(str, labels[rows])))
    if not 2 <= len(names) <= len(TEN_COLOURS):
        axes.scatter(*points.T, s=10, color=BLUE, alpha=0.6, linewidths=0)
    else:
        texts = np.array([str(label) for label in labels[rows]])
        for name, colour in zip(names, TEN_COLOURS, strict=False):
            axes.scatter(*points[texts == name].T, s=12, color=colour, alpha=0.75, linewidths=0, label=_plain(name))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set(title="The codes, along their two widest directions", xlabel="first", ylabel="second")


def _draw_intervals(axes: Any, task: dict[str, Any]) -> None:
    names = list(task["scores"])
    for place, (name, each) in enumerate(task["scores"].items()):
        reach = [[each["mean"] - each["low"]], [each["high"] - each["mean"]]]
        axes.plot(each["each"], [-place] * len(each["each"]), "o", color="#999999", alpha=0.5, markersize=4)
        colour = BLUE if name == names[0] else ORANGE
        axes.errorbar(each["mean"], -place, xerr=reach, fmt="o", color=colour, capsize=5, markersize=8)
    axes.set_yticks([-place for place in range(len(names))], names)
    axes.set_ylim(-len(names) + 0.5, 0.5)
    axes.grid(True, axis="x")
    axes.set(title="Score of a linear model", xlabel=_plain(task["metric"]))


def _figure(name: str, label: str, draw: Callable[[Any], None], size: tuple[float, float] = (9.0, 4.0)) -> str:
    """What `draw(axes)` draws as an inline SVG; `name` keeps its ids apart from other pictures'."""
    matplotlib = require("matplotlib", "an HTML report")
    figure_module = require("matplotlib.figure", "an HTML report")
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": name}):
        figure = figure_module.Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
    return f"<figure>{svg}</figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    # Wider than a phone, a table or a picture is moved by itself, and the page is not.
    return f"<figure><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></figure>"


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")

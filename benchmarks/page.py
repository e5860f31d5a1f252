"""A run as one HTML page that needs nothing else: tables to sort by a click, pictures inline."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from .report import Record, grouped, has_figures, summarise, verdict
from .tables import EXPLANATION, SUMMARY_HEADER, cells, facts, header, missing, summary_cells

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 100em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .2em .6em; text-align: right; white-space: nowrap }
th { cursor: pointer; position: sticky; top: 0; background: #fff } th:hover { background: #eef }
td:first-child, th:first-child { text-align: left }
tr.slower td { background: #fdeaea } tr.error td { background: #fff3cd }
svg { max-width: 100%; height: auto }
"""
# A click sorts by the first number of a cell, by text where there is none; a second click the other way round.
SCRIPT = """
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {
  const table = head.closest("table"), column = head.cellIndex, sign = head.dataset.up ? -1 : 1;
  for (const other of table.querySelectorAll("th")) delete other.dataset.up;
  if (sign > 0) head.dataset.up = "1";
  const key = row => row.cells[column].textContent.replaceAll(",", "");
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const x = parseFloat(key(a)), y = parseFloat(key(b));
    return sign * (isNaN(x) || isNaN(y) ? key(a).localeCompare(key(b)) : x - y);
  });
  table.tBodies[0].append(...rows);
});
"""


def to_page(records: Sequence[Record], pictures: Mapping[str, str]) -> str:
    """The page of all questions. pictures: SVG by name."""
    sections = []
    for (_, title), rows in grouped(records, "question", "title").items():
        shown = [record for record in rows if record["missing"] is None]
        sections += [
            f"<h2>{html.escape(title)}</h2>",
            items(facts(rows)),
            table(SUMMARY_HEADER, [(summary_cells(summary), "") for summary in summarise(rows)]),
            table(header(shown), [(cells(record, shown), css_class(record)) for record in shown]),
            items(f"missing: {peer}: {why}" for peer, why in missing(rows)),
        ]
    drawn = [f"<h2>{html.escape(name)}</h2>{svg[svg.index('<svg') :]}" for name, svg in pictures.items()]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastenc benchmarks</title>'
        f"<style>{STYLE}</style></head><body><h1>fastenc benchmarks</h1><p>{EXPLANATION}</p>"
        f"{''.join(sections)}{''.join(drawn)}<script>{SCRIPT}</script></body></html>\n"
    )


def css_class(record: Record) -> str:
    if not has_figures(record):
        return "error"
    return verdict(record["ratio"])


def items(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def data_cell(text: str) -> str:
    return f"<td>{html.escape(text.replace('**', ''))}</td>"


def table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f'<tr class="{name}">{"".join(map(data_cell, row))}</tr>' for row, name in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"

"""Texts in files: the lines of a .txt file, or a column of sentences in a table, and whether a table is such a list."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Chunks, DataError
from ..data.columns import Columns
from ..data.extras import require

ROWS = 100  # that are looked at to find out what a column holds
WORDS = 3.0  # in a sentence, on average
# Two letters of scripts that put no spaces between words: Thai, kana and Chinese characters.
_UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]{2}")


def decode(data: bytes, name: str) -> str:
    """UTF-8, with a byte order mark or without, as text.

    Raises:
        DataError: the bytes are not UTF-8; the message calls them `name`.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (byte {error.start} of it); save it as UTF-8") from None


def read_lines(path: Path) -> list[str]:
    """Each line of a text file without its end; an empty line is an empty text, so that text i is line i + 1.

    Raises:
        DataError: not UTF-8, or no line.
    """
    text = decode(path.read_bytes(), str(path))
    lines = [line.rstrip("\n") for line in io.StringIO(text, newline=None)]
    if not lines:
        raise DataError(f"{path} is empty; write one text in each line")
    return lines


def holds_sentences(values: Sequence[Any]) -> bool:
    """Whether these values of a column are sentences: three words or more on average, and most of them different.

    A word is what stands between spaces and has a letter: numbers, dates, names, addresses on the web and the few
    values of a category are no sentences.
    """
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    words = sum(
        sum(any(map(str.isalpha, piece)) for piece in text.split()) + len(_UNSPACED.findall(text)) for text in texts
    )
    return bool(texts) and words >= WORDS * len(texts) and 2 * len(set(texts)) > len(texts)


def is_text_table(path: Path, target: str | None) -> bool:
    """Whether a table has one column besides the target, and that one holds sentences, by its first rows.

    A file that cannot be read is none: who loads it says why.
    """
    columns = _first_rows(path)
    others = [name for name in columns if name != target]
    return len(others) == 1 and (target is None or target in columns) and holds_sentences(columns[others[0]])


def read_table(path: Path, target: str | None, column: str | None) -> tuple[list[str], np.ndarray | None]:
    """The texts in `column` of a .csv or .parquet file, and the labels in `target`.

    Args:
        column: None for the only one that holds sentences. A missing value is an empty text.

    Raises:
        DataError: as `load`; there is no such column, it holds no text, or none or several hold sentences.
    """
    chunks = Chunks(path, target=target)
    known = chunks.columns or []
    if column is None:
        column = _only_sentences(path, target)
    elif column not in known or column == target:
        listed = ", ".join(name for name in known if name != target)
        raise DataError(f"{path} has no column {column!r} of texts; its columns are {listed}; name one of them")
    texts: list[str] = []
    labels = []
    for chunk in chunks:
        features = Columns(chunk.features)
        place = features.names.index(column)
        if features.kind(place) == "number":
            raise DataError(f"column {column!r} of {path} holds numbers and no text; name a column of texts")
        texts += ["" if text is None else text for text in features.texts(slice(None), [place])[:, 0]]
        labels.append(chunk.target)
    if target is None:
        return texts, None
    found = np.concatenate(labels)
    return texts, found.astype(str).astype(object) if found.dtype == np.bool_ else found


def _only_sentences(path: Path, target: str | None) -> str:
    columns = _first_rows(path).items()
    found = [name for name, values in columns if name != target and holds_sentences(values)]
    if len(found) != 1:
        what = (
            f"several columns of sentences, {' and '.join(found)}" if found else "no column that is plainly sentences"
        )
        raise DataError(f"{path} has {what}; name the column of the texts, by --column or column=")
    return found[0]


def _first_rows(path: Path) -> dict[str, list[Any]]:
    """The first rows of a .csv or .parquet file, by column; nothing where none can be read."""
    try:
        if path.suffix.lower() == ".csv":
            with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
                lines = [line for line in itertools.islice(csv.reader(file), 1 + ROWS) if line]
            names, rows = (lines[0], lines[1:]) if lines else ([], [])
            return {name: [row[i] for row in rows if i < len(row)] for i, name in enumerate(names)}
        if path.suffix.lower() == ".parquet":
            with require("pyarrow.parquet", "reading Parquet").ParquetFile(path) as file:
                batch = next(file.iter_batches(ROWS), None)
            return {} if batch is None else {name: batch.column(name).to_pylist() for name in batch.schema.names}
    except (OSError, ValueError, KeyError, NotImplementedError, csv.Error):  # of both readers, pyarrow's among them
        pass
    return {}

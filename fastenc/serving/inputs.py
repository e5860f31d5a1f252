"""What requests send, JSON or files, to the rows that the model takes. Nothing here is ever unpickled."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..data import DataError, load
from ..data.extras import require
from ..data.tables import ParquetTables
from .served import TEXT_KINDS, Inputs, ServedModel
from .settings import RefusedError, Settings

NAME_LENGTH = 100  # letters of a file's name that are kept


def from_json(body: bytes, served: ServedModel, settings: Settings) -> Inputs:
    """`{"rows": [...]}` or `{"texts": [...]}`.

    Raises:
        RefusedError, DataError: it is not that, or the model cannot take it.
    """
    try:
        sent = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {str(error).splitlines()[0]}") from error
    asked = [key for key in ("rows", "texts") if isinstance(sent, dict) and key in sent]
    if len(asked) != 1:
        raise RefusedError(422, 'send one JSON object with either "rows" or "texts" in it')
    values = sent[asked[0]]
    if not isinstance(values, list) or not values:
        raise RefusedError(422, f'"{asked[0]}" must be a list with at least one entry')
    check_count(len(values), settings)
    return _from_texts(values, served) if asked == ["texts"] else _from_rows(values, served)


def from_files(files: Sequence[tuple[str, bytes]], served: ServedModel, settings: Settings) -> Inputs:
    """Uploaded files, each as its name and what is in it: a table, or the items that a Reader finds in them.

    Raises:
        RefusedError, DataError: as `from_json`.
    """
    if not files:
        raise RefusedError(422, "there is no file in the form; send one, as curl -F file=@data.csv does")
    if served.reader is None and len(files) > 1:
        raise RefusedError(422, f"there are {len(files)} files and this model takes one table at a time; send one")
    with tempfile.TemporaryDirectory(prefix="fastenc-") as folder:
        paths: list[tuple[Path, str]] = []
        for number, (name, content) in enumerate(files):
            shown = shown_name(name)
            ending = next((each for each in served.endings if shown.lower().endswith(each)), None)
            if ending is None:
                raise RefusedError(415, f"{shown} does not end in {' or '.join(served.endings)}, as this model needs")
            # Under a name of our own: that of the client decides nothing but the ending.
            path = Path(folder) / f"{number}{ending}"
            path.write_bytes(content)
            paths.append((path, shown))
        return (
            _from_table(*paths[0], served, settings) if served.reader is None else _from_items(paths, served, settings)
        )


def shown_name(name: str) -> str:
    """The last part of a file's name, without what cannot be printed."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(letter for letter in last if letter.isprintable())[-NAME_LENGTH:] or "the file"


def check_count(rows: int, settings: Settings) -> None:
    if rows > settings.max_rows:
        raise RefusedError(413, f"there are {rows} rows and this server takes {settings.max_rows} at once; send fewer")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; give null where a value is missing")


def _from_texts(texts: list[Any], served: ServedModel) -> Inputs:
    if served.reader is None or served.kind not in TEXT_KINDS:
        what = '"rows"' if served.reader is None else f"files in {', '.join(served.endings)}"
        raise RefusedError(422, f"this model takes no texts; send {what}")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise RefusedError(422, f'entry {number} of "texts", counted from 0, is no text; put it in quotes')
    arrays = []
    for number, text in enumerate(texts):
        try:
            arrays.append(served.reader.read(text))
        except DataError as error:
            raise DataError(f'entry {number} of "texts", counted from 0: {error}') from error
    return Inputs(arrays)


def _from_rows(rows: list[Any], served: ServedModel) -> Inputs:
    if served.reader is not None:
        what = '"texts" or files' if served.kind in TEXT_KINDS else "files"
        raise RefusedError(422, f"this model takes no rows; send {what} in {', '.join(served.endings)}")
    kind = type(rows[0])
    for number, row in enumerate(rows):
        if type(row) is not kind or kind not in (list, dict):
            what = "a list of values" if served.columns is None else "a list of values or an object"
            raise RefusedError(422, f"row {number}, counted from 0, must be {what}, as all others")
    return Inputs(_table(rows, served) if kind is dict else _array(rows, served))


def _table(rows: list[dict[str, Any]], served: ServedModel) -> Any:
    """Rows by names of columns."""
    if served.columns is None:
        raise DataError(f"this model knows no names of columns; send each row as a list of {served.numbers} numbers")
    names = set(rows[0])
    for number, row in enumerate(rows):
        if odd := names ^ set(row):
            name = min(odd)
            has, lacks = (number, 0) if name in row else (0, number)
            raise DataError(
                f"row {has} has {name!r} and row {lacks} has not, counted from 0; give all rows the same names, and "
                "null where a value is missing"
            )
    return require("pandas", "preprocessing tables").DataFrame(rows)


def _array(rows: list[list[Any]], served: ServedModel) -> Any:
    """Rows by position: of numbers, or as the columns of the table that the model was trained with come."""
    if served.dates:
        raise DataError(f'column {served.dates[0]!r} holds dates; send each row as an object {{"column": value, ...}}')
    wanted = served.numbers if served.columns is None else len(served.columns)
    for number, row in enumerate(rows):
        if len(row) != wanted:
            names = "" if served.columns is None else f" ({', '.join(served.columns[:10])})"
            raise DataError(
                f"row {number}, counted from 0, has {len(row)} values where {wanted} are expected{names}; send as many"
            )
    try:
        array = np.asarray(rows)
        if array.dtype.kind in "biuf" and served.takes_arrays:
            return array
    except (ValueError, OverflowError):
        pass  # some value is a list
    if served.columns is not None:
        return require("pandas", "preprocessing tables").DataFrame(rows, columns=served.columns)
    for number, row in enumerate(rows):
        for column, value in enumerate(row):
            if not (value is None or isinstance(value, (int, float))):
                raise DataError(f"value {column} of row {number}, counted from 0, is no number; correct it")
    try:
        return np.array([[np.nan if value is None else float(value) for value in row] for row in rows])
    except OverflowError as error:
        raise DataError("a number is too large for float64; correct it") from error


def _from_table(path: Path, shown: str, served: ServedModel, settings: Settings) -> Inputs:
    with _called(path, shown):
        if path.suffix == ".parquet":  # a small one can hold very many rows
            check_count(len(ParquetTables(path)), settings)
        features = load(path).features
        check_count(len(features), settings)
        if isinstance(features, np.ndarray) and served.dates:
            raise DataError(f"{shown} has no names of columns, and {served.dates[0]!r} is one of dates; send a table")
        # A map of the file would outlive it.
        return Inputs(np.array(features) if isinstance(features, np.ndarray) else features, shown)


def _from_items(paths: Sequence[tuple[Path, str]], served: ServedModel, settings: Settings) -> Inputs:
    reader = served.reader
    assert reader is not None
    arrays: list[np.ndarray] = []
    names: list[str] = []
    for path, shown in paths:
        with _called(path, shown):
            found = reader.collect(path)
            check_count(len(arrays) + len(found), settings)
            arrays += [reader.read(item) for item in found.items]
        names += [_name(name.replace(path.name, shown), shown, alone=len(paths) == 1) for name in found.names]
    return Inputs(arrays, names=names)


def _name(name: str, shown: str, *, alone: bool) -> str:
    """Of an item, with its file's name where there are other files."""
    return name if alone or shown in name else f"{shown}, {name}"


@contextmanager
def _called(path: Path, shown: str) -> Iterator[None]:
    """Errors about the file name it as the client does."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace(str(path), shown).replace(path.name, shown)) from error

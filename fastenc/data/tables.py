"""CSV and Parquet files piece by piece, as pyarrow tables: what memory holds does not grow with the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .arrays import DataError
from .extras import require
from .sources import check_header, csv_fault

_BLOCK = 1 << 24  # bytes of a CSV that are parsed at a time; the longest line must fit


class CsvTables:
    """The blocks of a CSV file, read anew each time; columns are of the same types as if it were read at once.

    A type is guessed from the first block. A file of more blocks is read once before all else, and a column that is
    something else further on becomes the next wider type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._types: dict[str, Any] = {}
        self._rows: int | None = None
        self._settled = path.stat().st_size <= _BLOCK

    @property
    def names(self) -> list[str]:
        pyarrow = require("pyarrow", "reading CSV")
        try:
            with self._open() as file:
                return list(file.schema.names)
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            raise self._fault(error) from error

    def __len__(self) -> int:
        if self._rows is None:
            self._settle()
        assert self._rows is not None
        return self._rows

    def batches(self, rows: int) -> Iterator[Any]:
        """RecordBatches of at most `rows` rows.

        Raises:
            DataError: not a CSV, no rows, no or bad column names, text that is not UTF-8, or a file that has changed.
        """
        if not self._settled:
            self._settle()
        pyarrow, seen = require("pyarrow", "reading CSV"), 0
        try:
            for batch in self._blocks():
                seen += batch.num_rows
                for start in range(0, batch.num_rows, rows):
                    yield batch.slice(start, rows)
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            raise self._fault(error) from error
        if self._rows not in (None, seen):
            raise DataError(f"{self.path} had {self._rows} rows and has {seen} now; write it, and then start again")
        self._rows = seen

    def _settle(self) -> None:
        """Find how many rows there are, and the types that fit all of them."""
        pyarrow = require("pyarrow", "reading CSV")
        wider = [
            *(pyarrow.null(), pyarrow.int64(), pyarrow.bool_(), pyarrow.float64(), pyarrow.date32()),
            *(pyarrow.time32("s"), pyarrow.timestamp("s"), pyarrow.timestamp("ns"), pyarrow.string()),
        ]  # in the order in which pyarrow tries them on a whole file
        types: dict[str, Any] = {}
        while not self._settled or self._rows is None:
            try:
                if not types:
                    with self._open() as file:
                        types = {field.name: field.type for field in file.schema}
                self._rows = sum(batch.num_rows for batch in self._blocks())
                self._settled = True
            except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
                found = re.match(r"In CSV column #(\d+): ", str(error))
                name = list(types)[int(found[1])] if found else None
                if name is None or types[name] not in wider[:-1]:
                    raise self._fault(error) from error
                types[name] = self._types[name] = wider[wider.index(types[name]) + 1]

    def _blocks(self) -> Iterator[Any]:
        pyarrow, seen = require("pyarrow", "reading CSV"), 0
        with self._open() as file:
            check_header(file.schema.names, self.path)
            for field in file.schema:
                if pyarrow.types.is_binary(field.type):  # what pyarrow makes of text that it cannot decode
                    raise DataError(f"column {field.name!r} of {self.path} is not UTF-8 text; save the file as UTF-8")
            for batch in file:
                seen += batch.num_rows
                yield batch
        if seen == 0:
            raise DataError(f"{self.path} has a header and no rows; add at least one row")

    def _open(self) -> Any:
        reader = require("pyarrow.csv", "reading CSV")
        return reader.open_csv(
            self.path,
            read_options=reader.ReadOptions(block_size=_BLOCK),
            parse_options=reader.ParseOptions(newlines_in_values=True),
            convert_options=reader.ConvertOptions(strings_can_be_null=True, column_types=self._types),
        )

    def _fault(self, error: Exception) -> DataError:
        return DataError(f"{self.path} {csv_fault(self.path, error)}")


class ParquetTables:
    """The row groups of a Parquet file, read anew each time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def names(self) -> list[str]:
        return list(self._ask(lambda file: file.schema_arrow.names))

    def __len__(self) -> int:
        return int(self._ask(lambda file: file.metadata.num_rows))

    def batches(self, rows: int) -> Iterator[Any]:
        """RecordBatches of at most `rows` rows.

        Raises:
            DataError: not Parquet, broken, or no rows.
        """
        pyarrow = require("pyarrow", "reading Parquet")
        try:
            with self._open() as file:
                if file.metadata.num_rows == 0:
                    raise DataError(f"{self.path} has no rows; give at least one")
                yield from file.iter_batches(rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._fault(error) from error

    def _ask(self, question: Any) -> Any:
        pyarrow = require("pyarrow", "reading Parquet")
        try:
            with self._open() as file:
                return question(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._fault(error) from error

    def _open(self) -> Any:
        return require("pyarrow.parquet", "reading Parquet").ParquetFile(self.path)

    def _fault(self, error: Exception) -> DataError:
        reason = str(error).splitlines()[0].rstrip(".")
        return DataError(f"{self.path} is not Parquet, or is broken ({reason}); write or copy it again")

"""Which kind of data a file or folder holds, and the reader and front ends of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data import DataError
from .audio import AudioFrontEnd, AudioReader
from .base import FrontEnd
from .images import ConvStem, ImageReader
from .reader import Collection, Reader
from .sequences import SequenceFrontEnd, SequenceReader
from .series import SeriesFrontEnd, SeriesReader
from .text import TextFrontEnd, TextReader, is_text_table

# In the order in which a folder is looked through.
KINDS: dict[str, type[Reader]] = {
    reader.kind: reader for reader in (ImageReader, AudioReader, SequenceReader, TextReader, SeriesReader)
}
# Those that a saved model may have, by the name in its config.
FRONT_ENDS: dict[str, type[FrontEnd]] = {
    each.__name__: each for each in (ConvStem, AudioFrontEnd, SequenceFrontEnd, TextFrontEnd, SeriesFrontEnd)
}
TABLE = "table"
_TABLES = (".csv", ".parquet", ".npy")


def kind_of(source: str, kind: str = "auto", target: str | None = None) -> str:
    """The kind of what is in `source`: a name of KINDS, or "table" for what `fastenc.data.load` reads.

    Args:
        kind: "auto" to look: at the files' endings and, in a table, at whether it has one column of sentences.
        target: the column of labels of a table.

    Raises:
        DataError: a folder of several kinds, or of none.
    """
    path = Path(source)
    if kind != "auto":
        return kind
    if not path.is_dir():
        if path.suffix.lower() in _TABLES:
            return TextReader.kind if path.is_file() and is_text_table(path, target) else TABLE
        return next((name for name, reader in KINDS.items() if _is_of(reader, path)), TABLE)
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    known = [name for name, reader in KINDS.items() if any(_is_of(reader, file) for file in files)]
    if len(known) != 1:
        what = f"of several kinds, {' and '.join(known)}" if known else "that no front end reads"
        raise DataError(f"{source} holds files {what}; say which to take by --kind {' or '.join(known or KINDS)}")
    return known[0]


def _is_of(reader: type[Reader], path: Path) -> bool:
    return path.name.lower().endswith(reader.suffixes)


def collect(source: str, kind: str, target: str | None = None, column: str | None = None) -> Collection:
    """The items of this kind in a file or folder; see `Reader.collect`.

    Raises:
        DataError: nothing is there, or what `Reader.collect` refuses.
    """
    path = Path(source)
    if not path.exists():
        raise DataError(f"no such file or folder: {source}; give the path of the data")
    return KINDS[kind].collect(path, target, column)


def reader_from_dict(state: dict[str, Any]) -> Reader | None:
    """The reader that was saved with a model as its preprocessing; None where that is a table's."""
    reader = KINDS.get(state.get("kind", ""))
    return None if reader is None else reader.from_dict(state)

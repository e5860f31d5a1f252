"""Data in: arrays and tables of any kind, files, and the preprocessing that is saved with a model."""

from .arrays import DataError, as_rows, as_target
from .chunks import ChunkedRows, Chunks, read_chunks
from .preprocessing import Prepared, Preprocessor
from .sources import Data, load

__all__ = [
    "ChunkedRows",
    "Chunks",
    "Data",
    "DataError",
    "Prepared",
    "Preprocessor",
    "as_rows",
    "as_target",
    "load",
    "read_chunks",
]

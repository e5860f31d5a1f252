"""Data in: arrays and tables of any kind, files, and the preprocessing that is saved with a model."""

from .arrays import DataError, as_rows, as_target

__all__ = ["DataError", "as_rows", "as_target"]

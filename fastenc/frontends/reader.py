"""Reader: what turns the items of one kind of data, files or texts, into the batches that its front end takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..data import DataError
from .base import FrontEnd


@dataclass(frozen=True, eq=False)
class Collection:
    """Items of one kind, found in a file or folder.

    Attributes:
        kind: of the reader that reads them.
        source: the file or folder.
        items: what `Reader.read` takes: a path, a text, a record.
        names: of each item, for people.
        labels: `[items]`, int64, float64, or text as an object array of str; None without labels.
    """

    kind: str
    source: str
    items: Sequence[Any]
    names: Sequence[str]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.items)


class Reader:
    """Base of the readers: found by kind, fitted to the items that are trained on, saved with the model.

    Attributes:
        kind: as of its FrontEnd.
        suffixes: of the files that hold such items, in small letters.
    """

    kind: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @classmethod
    def collect(cls, path: Path, target: str | None = None, column: str | None = None) -> Collection:
        """The items in a file or folder. Nothing is read that is not needed to find them.

        Args:
            path: exists.
            target: where the labels are, for kinds that have several places for them.
            column: which column of a table holds the items, for kinds that come in tables.

        Raises:
            DataError: there are none, or no labels where `target` says.
        """
        items, labels = files_by_class(path, cls.suffixes)
        if target is not None:
            raise DataError(f"the labels of {cls.kind} files are the names of their folders; leave --target out")
        return Collection(
            cls.kind,
            str(path),
            items,
            [str(item.relative_to(path)) if path.is_dir() else item.name for item in items],
            labels,
        )

    def fit(self, items: Sequence[Any]) -> Reader:
        """Learn from the items that are trained on what reading needs to know, such as a vocabulary.

        Raises:
            DataError: an item that cannot be read; the message names it.
        """
        raise NotImplementedError

    def read(self, item: Any) -> np.ndarray:
        """One item to an array. Where items are files, `item` may be the bytes of one, too.

        Raises:
            DataError: it cannot be read; the message names it and says what to do.
        """
        raise NotImplementedError

    def length(self, array: np.ndarray) -> int:
        """How long an item is, for batches of equal ones; 1 where all are alike."""
        return len(array)

    def batch(self, arrays: Sequence[np.ndarray]) -> Tensor:
        """Arrays that `read` gave as one padded tensor, as the FrontEnd takes it."""
        raise NotImplementedError

    def front_end(self) -> FrontEnd:
        """A new FrontEnd of a size that suits what was fitted."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` needs, with "kind", as JSON can hold it."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Reader:
        raise NotImplementedError


def files_by_class(path: Path, suffixes: Sequence[str]) -> tuple[list[Path], np.ndarray | None]:
    """The files of these suffixes in a folder, or the file itself, in the order of their names; and their labels.

    Where the folder holds folders with such files and no such file beside them, each of these folders is a class.

    Raises:
        DataError: there are no such files, or some beside folders of classes.
    """
    if path.is_file():
        return [path], None
    found = sorted(
        file
        for file in path.rglob("*")
        if file.name.lower().endswith(tuple(suffixes)) and file.is_file() and not file.name.startswith(".")
    )
    if not found:
        raise DataError(f"{path} holds no files in {', '.join(suffixes)}; give a folder that does")
    classes = [file.relative_to(path).parts[0] if file.parent != path else None for file in found]
    if all(each is None for each in classes):
        return found, None
    if any(each is None for each in classes):
        stray = found[classes.index(None)]
        raise DataError(
            f"{path} holds files, such as {stray.name}, beside folders; put each in the folder of its class, or all "
            "in one folder"
        )
    return found, np.array(classes, dtype=object)

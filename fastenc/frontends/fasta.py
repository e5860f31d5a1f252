"""FASTA files to records, and the labels in their descriptions, folders and names."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data import DataError
from ..data.extras import require
from .reader import files_by_class

SUFFIXES = (".fasta", ".fa", ".fna", ".faa")
_PACKED = ".gz"
_MOST = 1 << 28  # bytes that are unpacked from memory: more than the longest human chromosome has letters


class Record(NamedTuple):
    """One sequence of a FASTA file.

    name         the first word after ">"
    description  all that is after ">"
    sequence     its letters, without spaces and line ends, otherwise as they are
    """

    name: str
    description: str
    sequence: str


def read_fasta(path: Path) -> list[Record]:
    """The records of a FASTA file, packed by gzip if its name ends in .gz.

    Raises:
        DataError: it is not FASTA, has no records, or cannot be unpacked.
    """
    try:
        with (gzip.open if path.suffix.lower() == _PACKED else open)(path, "rb") as file:
            return _parse(file, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); give a FASTA file, or one packed by gzip") from error


def parse_fasta(content: bytes, name: str = "the FASTA text") -> list[Record]:
    """The records in the bytes of a FASTA file, which gzip may have packed.

    Raises:
        DataError: as `read_fasta`, or more than 256 MiB are packed there.
    """
    if content[:2] == b"\x1f\x8b":
        try:
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(_MOST + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{name} cannot be unpacked ({error}); pack it again by gzip") from error
        if len(content) > _MOST:
            raise DataError(f"{name} unpacks to more than {_MOST >> 20} MiB; give fewer sequences at a time")
    return _parse(io.BytesIO(content), name)


def _parse(file, name: str) -> list[Record]:
    parser = require("Bio.SeqIO.FastaIO", "reading FASTA", "frontends").SimpleFastaParser
    records = []
    with io.TextIOWrapper(file, encoding="utf-8", errors="replace") as text:
        for number, (title, sequence) in enumerate(parser(_lines(text, name)), 1):
            words = title.split(None, 1)
            records.append(Record(words[0] if words else f"number {number}", title, sequence))
    if not records:
        raise DataError(f"{name} holds no sequences; give FASTA, in which a line that begins with > precedes each")
    return records


def _lines(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    """The lines, the first of which begins a record: the parser would skip what comes before."""
    begun = False
    for line in text:
        if not begun and line.strip():
            if line[0] not in ">;":  # a comment of old
                raise DataError(f"{name} does not begin with > and is no FASTA; give a FASTA file")
            begun = True
        yield line


def find_records(path: Path) -> tuple[list[Record], list[str], np.ndarray | None]:
    """The records in a FASTA file, or in all of a folder; the file of each, for people; and their classes.

    The class of a record is the folder that its file lies in, where the folder holds folders; else the file's name
    without its endings, where the folder holds several files; else there are none.

    Raises:
        DataError: no such files, some beside folders of classes, or as `read_fasta`.
    """
    files, classes = files_by_class(path, (*SUFFIXES, _PACKED))
    if path.is_dir():
        kept = [number for number, file in enumerate(files) if _unpacked(file).suffix.lower() in SUFFIXES]
        if not kept:
            raise DataError(f"{path} holds no files in {', '.join(SUFFIXES)}, packed or not; give a folder that does")
        files = [files[number] for number in kept]
        classes = None if classes is None else classes[kept]
        if classes is None and len(files) > 1:
            classes = np.array([_unpacked(file).stem for file in files], dtype=object)
    found = [read_fasta(file) for file in files]
    records = [record for each in found for record in each]
    of_file = [str(file.relative_to(path)) if path.is_dir() else file.name for file in files]
    counts = [len(each) for each in found]
    places = [name for name, count in zip(of_file, counts, strict=True) for _ in range(count)]
    return records, places, None if classes is None else np.repeat(classes, counts)


def _unpacked(file: Path) -> Path:
    return file.with_suffix("") if file.suffix.lower() == _PACKED else file


def labels_in_descriptions(records: Sequence[Record], key: str) -> np.ndarray:
    """What each description says of `key`: `key=value`, `key="a value"` or `[key=a value]`.

    Returns:
        [records], int64 or float64 if all are numbers, otherwise text.

    Raises:
        DataError: a record says nothing of it.
    """
    name = re.escape(key)
    pattern = re.compile(rf'\[{name}=([^\]]+)\]|(?:^|[\s|;,]){name}=(?:"([^"]+)"|([^\s|;,"]+))')
    values = []
    for record in records:
        match = pattern.search(record.description)
        if match is None:
            raise DataError(f"record {record.name} says nothing of {key}; write {key}=... after its name, as after all")
        values.append(next(group for group in match.groups() if group is not None).strip())
    if all(re.fullmatch(r"[+-]?\d{1,18}", value) for value in values):
        return np.array(values, dtype=np.int64)
    if all(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value) for value in values):
        return np.array(values, dtype=np.float64)
    return np.array(values, dtype=object)

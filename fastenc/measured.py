"""The rows of a file that evaluation measures: all of them or, of a file that is large, as many as memory holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .data import Chunks
from .pipeline import OWN_SEED, SavedModel, rows_to_score
from .record import Fingerprint

MAX_VALUES = 1 << 25  # of the prepared rows: 128 MB, of which measuring makes copies in float64


@dataclass(frozen=True, eq=False)
class MeasuredRows:
    """Prepared rows, float32 `[measured, features]`, and what is known of them.

    target                   of each row; None without labels
    rows                     the number of each in the source
    fit_rows, score_rows     which of x to fit comparisons on, and which to score
    why                      a sentence about these
    dropped, total, unseen   of the source's rows with missing values, all of them, and texts in no category
    """

    x: np.ndarray
    target: Any
    rows: np.ndarray
    fit_rows: np.ndarray
    score_rows: np.ndarray
    why: str
    dropped: int
    total: int
    unseen: int


def read_rows(saved: SavedModel, record: dict[str, Any] | None, data: str, chunks: Chunks) -> MeasuredRows:
    """Read the source once, or twice if it has more rows than are measured; `record` is how the model was trained.

    Raises:
        DataError: bad data, or fewer usable rows than `MIN_EVALUATION_ROWS`.
    """
    digest, numbers = Fingerprint(), []
    held: list[tuple[np.ndarray, Any]] = []
    fits, usable, width, dropped, unseen = True, 0, 1, 0, 0
    for block, target in saved.prepare_chunks(data, chunks):
        digest.add(block.x)
        numbers.append(block.rows)
        usable, dropped, unseen = usable + len(block.rows), dropped + block.dropped, unseen + block.unseen
        width = block.x.shape[1]
        fits = usable * width <= MAX_VALUES
        held.append((block.x, target))
        if not fits:
            held.clear()
    rows = np.concatenate(numbers)
    fit_rows, score_rows, why = rows_to_score(rows, digest.hexdigest(), record, data)
    if not fits:
        share = MAX_VALUES / (width * usable)
        fit_rows, score_rows = (_some(each, share) for each in (fit_rows, score_rows))
        chosen = np.sort(np.concatenate([fit_rows, score_rows]))
        held, start = [], 0
        for block, target in saved.prepare_chunks(data, chunks):
            first, last = np.searchsorted(chosen, (start, start + len(block.x)))
            inside = chosen[first:last] - start
            held.append((block.x[inside], None if target is None else target[inside]))
            start += len(block.x)
        fit_rows, score_rows = np.searchsorted(chosen, fit_rows), np.searchsorted(chosen, score_rows)
        rows = rows[chosen]
        why += f" For memory's sake {len(fit_rows)} and {len(score_rows)} of them are taken, chosen at random."
    x = np.concatenate([each for each, _ in held])
    labels = None if held[0][1] is None else np.concatenate([target for _, target in held])
    return MeasuredRows(x, labels, rows, fit_rows, score_rows, why, dropped, dropped + usable, unseen)


def _some(rows: np.ndarray, share: float) -> np.ndarray:
    """A share of the rows, at least two of them, chosen at random."""
    count = max(2, int(len(rows) * share))
    return np.random.RandomState(OWN_SEED).permutation(rows)[:count]

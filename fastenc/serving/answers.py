"""What requests get: vectors as JSON and, if asked for, a map of them in two dimensions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .served import Encoded, Inputs
from .settings import RefusedError


def to_json(inputs: Inputs, encoded: Encoded, with_map: bool) -> bytes:
    """The answer to a request.

    Raises:
        RefusedError: a vector has NaN or Inf, which JSON does not know.
    """
    vectors = encoded.vectors
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        row = int(np.argmin(finite))
        row = row if encoded.source_rows is None else int(encoded.source_rows[row])
        raise RefusedError(422, f"the vector of row {row}, counted from 0, overflows; correct the values of that row")
    answer: dict[str, Any] = {"vectors": vectors.tolist(), "rows": vectors.shape[0], "width": vectors.shape[1]}
    if inputs.names is not None:
        answer["names"] = list(inputs.names)
    if encoded.source_rows is not None:
        answer["source_rows"] = encoded.source_rows.tolist()
        answer["dropped"] = encoded.dropped
    if encoded.unseen:
        answer["unseen"] = encoded.unseen
    if with_map:
        points, explained = principal_plane(vectors)
        answer["map"] = {"points": points.tolist(), "explained": explained.tolist()}
    return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()


def principal_plane(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components of `vectors` `[rows, width]`.

    Returns: float64 `[rows, 2]`, and the share of the variance `[2]` that each has. The largest coefficient of a
        component is positive, so that the same vectors give the same map. Zeros where there is no variance.
    """
    centred = vectors - vectors.mean(0, dtype=np.float64)
    points, explained = np.zeros((len(vectors), 2)), np.zeros(2)
    variances, components = np.linalg.eigh(centred.T @ centred)  # smallest first; width is small beside rows
    total = variances.sum()
    for place in range(min(2, len(variances))):
        component, variance = components[:, -1 - place], variances[-1 - place]
        if total > 0:
            sign = 1.0 if component[np.argmax(np.abs(component))] >= 0 else -1.0
            points[:, place] = centred @ component * sign
            explained[place] = max(variance / total, 0.0)
    return points, explained

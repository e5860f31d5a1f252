"""Files with labels to a fine-tuned model in a folder: what `fastenc finetune` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .data import Data, DataError, Prepared, Preprocessor, load
from .finetuning import FineTuned, finetune
from .pipeline import SavedModel, naming, take
from .record import split_rows, write_record


@dataclass(frozen=True)
class Labelled:
    """Rows with labels, prepared and split.

    x, y          all usable rows, float32 [rows, features], and their labels
    is_held_out   bool [rows]: what is not trained on
    unlabelled    float32 [rows, features] to pre-train on; None for the training rows
    """

    source: Data
    prepared: Prepared
    y: np.ndarray
    is_held_out: np.ndarray
    preprocessor: Preprocessor | None
    unlabelled: np.ndarray | None


def load_with_labels(data: str, target: str | None) -> Data:
    """DATA with its labels: a column of a table; for a .npy file another one with a label for each row.

    Raises:
        DataError: there are no labels, or as `load`.
    """
    if target is not None and target.endswith(".npy") and data.endswith(".npy"):
        source = load(data)
        try:
            labels = np.load(target, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{target} cannot be read as labels; give a .npy file of numbers or text") from error
        if labels.shape != (len(source),):
            raise DataError(
                f"{target} has shape {list(labels.shape)} and {data} has {len(source)} rows; give one label for each"
            )
        return Data(source.name, source.features, labels)
    source = load(data, target=target)
    if source.target is None:
        raise DataError(f"{data} has no labels to learn; name their column by --target, or for .npy a file of labels")
    return source


def prepare(
    data: str,
    target: str | None,
    encoder: Path | None,
    unlabelled: str | None,
    missing: str,
    scale: str,
    validation_split: float,
    seed: int,
) -> Labelled:
    """Read and split the data, and learn its preprocessing: the encoder's own if there is one, else from the unlabelled
    rows or, without these, from those that are trained on.

    Raises:
        DataError: bad data, or a split that leaves nothing to train on.
    """
    source = load_with_labels(data, target)
    assert source.target is not None
    kept, held_out = split_rows(len(source), validation_split, seed)
    if len(kept) == 0 or (validation_split > 0.0 and len(held_out) == 0):
        raise DataError(
            f"--validation-split {validation_split} of the {len(source)} rows of {data} leaves {len(kept)} to train on "
            f"and {len(held_out)} to validate on; change it"
        )
    other = None if unlabelled is None else load(unlabelled).features
    if encoder is not None:
        saved = SavedModel(encoder)
        preprocessor = saved.preprocessor
        prepared = saved.prepare(data, source.features)
        more = None if unlabelled is None else saved.prepare(unlabelled, other).x
    else:
        with naming(data if unlabelled is None else unlabelled):
            rows = take(source.features, np.sort(kept)) if other is None else _same_columns(other, source.features)
            preprocessor = Preprocessor(missing, scale).fit(rows)
        with naming(data):
            prepared = preprocessor.transform(source.features)
        more = None if other is None else preprocessor.transform(other).x
    return Labelled(
        source, prepared, source.target[prepared.rows], np.isin(prepared.rows, held_out), preprocessor, more
    )


def train(labelled: Labelled, **options: Any) -> FineTuned:
    """`fastenc.finetune` on what was prepared.

    Raises:
        DataError: as it does, and for options that are wrong or do not go together.
    """
    x, y, held_out = labelled.prepared.x, labelled.y, labelled.is_held_out
    validation = (x[held_out], y[held_out]) if held_out.any() else None
    if validation and y.dtype.kind not in "f" and options["task"] != "regression" and len(set(validation[1])) == 1:
        raise DataError(
            f"the {held_out.sum()} rows to validate on are all of the class {validation[1][0]}; raise "
            "--validation-split, or change --seed"
        )
    with _one_sentence():
        return finetune(
            x[~held_out], y[~held_out], validation_data=validation, unlabelled=labelled.unlabelled, **options
        )


def save(result: FineTuned, labelled: Labelled, out: Path, held_out: float, seed: int, target: str | None) -> None:
    """Save the model with its preprocessing, and beside it how it was trained and what its outputs stand for."""
    preprocessor = labelled.preprocessor
    result.model.save_pretrained(out, preprocessing=None if preprocessor is None else preprocessor.to_dict())
    split: dict[str, Any] = {"rows": len(labelled.source), "held_out": held_out, "seed": seed, "target": target}
    classes = None if result.classes is None else [str(label) for label in result.classes]
    write_record(out, labelled.prepared.x, **split, history=result.history.history, classes=classes)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Options that do not go together are an error of the user's on the command line."""
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(str(error)) from error


def _same_columns(other: Any, features: Any) -> Any:
    """Of a table without labels, the columns that the labelled one has."""
    if isinstance(other, np.ndarray) or isinstance(features, np.ndarray):
        return other
    if absent := [repr(name) for name in features.columns if name not in other.columns]:
        raise DataError(f"there is no column {', '.join(absent)}, which the rows with labels have; add it to both")
    return other[list(features.columns)]

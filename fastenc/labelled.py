"""Files with labels to a fine-tuned model in a folder: what `fastenc finetune` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import Data, DataError, Prepared, Preprocessor, load
from .data.sources import target_part
from .encoder import Encoder
from .finetuning import FineTuned, finetune
from .finetuning.goals import read_goals
from .finetuning.layers import freeze_layers
from .loading import load_pretrained
from .pipeline import SavedModel, naming, one_sentence, take
from .private import PrivateFit, fit_private
from .record import fingerprint, split_rows, write_record


@dataclass(frozen=True)
class Labelled:
    """Rows with labels, prepared and split.

    y             the labels of all usable rows, or a dict of several targets by name
    is_held_out   bool [rows]: what is not trained on
    unlabelled    float32 [rows, features] to pre-train on; None for the training rows
    """

    source: Data
    prepared: Prepared
    y: Any
    is_held_out: np.ndarray
    preprocessor: Preprocessor | None
    unlabelled: np.ndarray | None


def load_with_labels(data: str, target: str | list[str] | None) -> Data:
    """DATA with its labels: a column of a table; for a .npy file another one with a label for each row.

    Several targets are by name in a dict: that of the column, or of the file without its ending.

    Raises:
        DataError: there are no labels, or as `load`.
    """
    named = [] if target is None else [target] if isinstance(target, str) else target
    if named and data.endswith(".npy") and all(name.endswith(".npy") for name in named):
        source = load(data)
        labels = {Path(name).stem: _labels_in(name, data, len(source)) for name in named}
        if len(labels) < len(named):
            raise DataError("two of the files of labels have the same name; rename one of them")
        return Data(source.name, source.features, labels if isinstance(target, list) else next(iter(labels.values())))
    source = load(data, target=target)
    if source.target is None:
        raise DataError(f"{data} has no labels to learn; name their column by --target, or for .npy a file of labels")
    return source


def _labels_in(file: str, data: str, rows: int) -> np.ndarray:
    try:
        labels = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} cannot be read as labels; give a .npy file of numbers or text") from error
    if labels.shape != (rows,):
        raise DataError(f"{file} has shape {list(labels.shape)} and {data} has {rows} rows; give one label for each")
    return labels


def prepare(
    data: str,
    target: str | list[str] | None,
    encoder: Path | None,
    unlabelled: str | None,
    preprocessor: Preprocessor,
    validation_split: float,
    seed: int,
) -> Labelled:
    """Read and split the data, and learn its preprocessing: the encoder's own if there is one; else `preprocessor`,
    which is new, learns from the unlabelled rows or, without these, from those that are trained on.

    Raises:
        DataError: bad data, or a split that leaves nothing to train on.
    """
    source = load_with_labels(data, target)
    kept, held_out = split_rows(len(source), validation_split, seed)
    if len(kept) == 0 or (validation_split > 0.0 and len(held_out) == 0):
        raise DataError(
            f"--validation-split {validation_split} of the {len(source)} rows of {data} leaves {len(kept)} to train on "
            f"and {len(held_out)} to validate on; change it"
        )
    other = None if unlabelled is None else load(unlabelled).features
    if encoder is not None:
        saved = SavedModel(encoder)
        own = saved.preprocessor
        prepared = saved.prepare(data, source.features)
        more = None if unlabelled is None else saved.prepare(unlabelled, other).x
    else:
        with naming(data if unlabelled is None else unlabelled):
            rows = take(source.features, np.sort(kept)) if other is None else _same_columns(other, source.features)
            own = preprocessor.fit(rows)
        with naming(data):
            prepared = own.transform(source.features)
        more = None if other is None else own.transform(other).x
    labels = target_part(source.target, prepared.rows)
    return Labelled(source, prepared, labels, np.isin(prepared.rows, held_out), own, more)


def train(labelled: Labelled, **options: Any) -> FineTuned:
    """`fastenc.finetune` on what was prepared.

    Raises:
        DataError: as it does, and for options that are wrong or do not go together.
    """
    x, y, held_out = labelled.prepared.x, labelled.y, labelled.is_held_out
    validation = (x[held_out], target_part(y, held_out)) if held_out.any() else None
    if validation:
        task, parts = options["task"], validation[1] if isinstance(y, dict) else {"": validation[1]}
        for name, labels in parts.items():
            kind = task.get(name, "auto") if isinstance(task, dict) else task
            if labels.dtype.kind != "f" and kind != "regression" and len(set(labels.tolist())) == 1:
                what = f"the class {labels[0]}" + f" in {name}" * bool(name)
                raise DataError(
                    f"the {len(labels)} rows to validate on are all of {what}; raise --validation-split, or change "
                    "--seed"
                )
    with one_sentence():
        return finetune(
            x[~held_out],
            target_part(y, ~held_out),
            validation_data=validation,
            unlabelled=labelled.unlabelled,
            **options,
        )


def train_privately(
    labelled: Labelled,
    *,
    strategy: str,
    encoder: Path | None,
    widths: Sequence[int],
    activation: str,
    dropout: float,
    frozen: int | None,
    task: str | dict[str, str],
    loss: str | dict[str, str] | None,
    scale_targets: bool,
    seed: int,
    private: dict[str, Any],
) -> tuple[FineTuned, PrivateFit]:
    """From scratch, or from the encoder of a model trained on other rows, by `fastenc.private.fit_private`.

    Args:
        seed: of the first weights.
        private: the arguments of `fit_private`.

    Raises:
        DataError: as `train`; several targets, or what private training does not have.
    """
    if isinstance(labelled.y, dict):
        raise DataError("--private learns one target, and several are given; leave all but one out")
    if strategy == "pretrain":
        raise DataError(
            "--strategy pretrain does not go with --private: the rows would be seen without noise; pre-train on other "
            "rows, by fastenc train, and give --strategy transfer --from DIR"
        )
    if strategy == "transfer" and encoder is None:
        raise DataError("--strategy transfer needs a trained encoder; give its folder by --from")
    held_out = labelled.is_held_out
    x, y = (part[~held_out] for part in (labelled.prepared.x, labelled.y))
    with one_sentence():
        goal = read_goals(y, len(x), task, loss, None, False)
        if goal.classes is None and scale_targets:
            raise DataError("--private cannot scale the targets by their mean and deviation; give --raw-targets")
        validation = None
        if held_out.any():
            others = goal.match(labelled.y[held_out], int(held_out.sum()), "the validation labels")
            validation = labelled.prepared.x[held_out], others
        torch.manual_seed(seed)
        made = Encoder(x.shape[1], widths, activation, dropout=dropout)
        if encoder is not None:
            loaded = load_pretrained(encoder)
            made = getattr(loaded, "encoder", loaded).requires_grad_(True)
        model = goal.model(made)
        freeze_layers(model, frozen if frozen is not None else len(made.layers) - 1 if strategy == "transfer" else 0)
        done = fit_private(model, x, goal.values, loss=goal.loss, validation_data=validation, **private)
    how = "by opacus, one step after the other"
    return FineTuned(model.requires_grad_(True), done.history, how, goal.classes, None), done


def save(
    result: FineTuned,
    labelled: Labelled,
    out: Path,
    held_out: float,
    seed: int,
    target: str | list[str] | None,
    private: PrivateFit | None = None,
) -> None:
    """Save the model with its preprocessing, and beside it how it was trained and what its outputs stand for."""
    preprocessor = labelled.preprocessor
    result.model.save_pretrained(out, preprocessing=None if preprocessor is None else preprocessor.to_dict())
    split: dict[str, Any] = {"rows": len(labelled.source), "held_out": held_out, "seed": seed, "target": target}
    classes = result.classes
    named = {name: _texts(each) for name, each in classes.items()} if isinstance(classes, dict) else _texts(classes)
    data = fingerprint(labelled.prepared.x)
    history = result.history.history if private is None else private.validation_history
    spent = None if private is None else private.to_dict()
    write_record(out, data, **split, history=history, classes=named, private=spent)


def _texts(labels: np.ndarray | None) -> list[str] | None:
    return None if labels is None else [str(label) for label in labels]


def _same_columns(other: Any, features: Any) -> Any:
    """Of a table without labels, the columns that the labelled one has."""
    if isinstance(other, np.ndarray) or isinstance(features, np.ndarray):
        return other
    if absent := [repr(name) for name in features.columns if name not in other.columns]:
        raise DataError(f"there is no column {', '.join(absent)}, which the rows with labels have; add it to both")
    return other[list(features.columns)]

"""Folders of files, texts and sequences to a model in a folder, and what it makes of them: the command line's part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .data import DataError
from .encoder import AutoEncoder, Classifier, Encoder, Regressor
from .evaluation import EvaluationReport
from .evaluation.evaluate import measure_codes
from .finetuning.layers import freeze_layers
from .finetuning.targets import Targets, read_targets
from .frontends import KINDS, Collection, FrontEncoder, Items, Reader, collect, encode_items, make_loader, summaries
from .frontends.batches import map_items
from .pipeline import SavedModel, rows_to_score
from .pretrained import Pretrained
from .record import split_rows, write_record
from .training import EarlyStopping, History, Trainer


@dataclass(frozen=True)
class SplitItems:
    """Items that are read, and their numbers in two parts: to train on, and to validate on."""

    collection: Collection
    items: Items
    kept: np.ndarray
    held_out: np.ndarray
    fraction: float
    seed: int

    @property
    def reader(self) -> Reader:
        return self.items.reader


def split_items(collection: Collection, fraction: float, seed: int, reader: Reader | None = None) -> SplitItems:
    """Read all items, by a new reader that is fitted to those that are trained on, or by `reader`.

    Raises:
        DataError: an item that cannot be read, or a split that leaves nothing to train or to validate on.
    """
    kept, held_out = split_rows(len(collection), fraction, seed)
    if len(kept) == 0 or (fraction > 0.0 and len(held_out) == 0):
        raise DataError(
            f"--validation-split {fraction} of the {len(collection)} items of {collection.source} leaves {len(kept)} "
            f"to train on and {len(held_out)} to validate on; change it"
        )
    if reader is None:
        reader = KINDS[collection.kind]().fit([collection.items[number] for number in np.sort(kept)])
    return SplitItems(collection, Items(reader, collection.items), np.sort(kept), np.sort(held_out), fraction, seed)


def make_encoder(reader: Reader, widths: tuple[int, ...], activation: str, dropout: float) -> FrontEncoder:
    """A new front end for what the reader reads, and a dense encoder on it."""
    frontend = reader.front_end()
    return FrontEncoder(frontend, Encoder(frontend.out_features, widths, activation, dropout=dropout))


def fit_items(
    model: nn.Module,
    split: SplitItems,
    target: torch.Tensor,
    *,
    loss: Any,
    epochs: int,
    batch_size: int,
    patience: int | None,
    **options: Any,
) -> History:
    """Train on the items' batches by length; `target` [items, ...] and `options` of the Trainer."""
    trainer = Trainer(model, loss=loss, seed=split.seed, **options)
    validation = (
        make_loader(split.items, split.held_out, target, batch_size=batch_size) if len(split.held_out) else None
    )
    return trainer.fit(
        make_loader(split.items, split.kept, target, batch_size=batch_size, seed=split.seed),
        epochs=epochs,
        validation_data=validation,
        callbacks=[] if patience is None else [EarlyStopping(patience=patience)],
    )


def train_autoencoder(encoder: FrontEncoder, split: SplitItems, *, loss: str = "mse", **fitting: Any) -> Any:
    """(an AutoEncoder on `encoder` trained to reconstruct the items' summaries, its History)."""
    model = AutoEncoder(encoder)
    return model, fit_items(model, split, summaries(encoder, split.items), loss=loss, **fitting)


def read_labels(collection: Collection, task: str) -> Targets:
    """The labels as training takes them.

    Raises:
        DataError: there are none, or as `read_targets`.
    """
    if collection.labels is None:
        raise DataError(
            f"{collection.source} has no labels to learn; put each file into the folder of its class, or name the "
            "labels by --target where a table or a FASTA description holds them"
        )
    return read_targets(collection.labels, len(collection), task, "the labels")


def train_head(
    encoder: FrontEncoder, split: SplitItems, targets: Targets, *, loss: str | None, frozen: int = 0, **fitting: Any
) -> tuple[Pretrained, History]:
    """A Classifier, or a Regressor of numbers, on `encoder`, trained on the labels.

    Args:
        loss: None for that of the task.
        frozen: how many of the dense layers stay as they are, and the front end below with them if there is any.
    """
    if targets.classes is None:
        model: Any = Regressor(encoder, targets.outputs)
    else:
        model = Classifier(encoder, targets.outputs)
    if frozen:
        encoder.frontend.requires_grad_(False)
        freeze_layers(encoder, frozen)
    history = fit_items(model, split, targets.values, loss=loss or default_loss(targets), **fitting)
    return model.requires_grad_(True), history


def default_loss(targets: Targets) -> str:
    return "mse" if targets.classes is None else "cross_entropy"


def front_encoder_of(folder: Path, kind: str) -> tuple[FrontEncoder, Reader]:
    """The encoder and the reader of a saved model, to go on from.

    Raises:
        DataError: it is no model of this kind of data.
    """
    saved = SavedModel(folder)
    if saved.reader is None or saved.reader.kind != kind or not isinstance(saved.encoder, FrontEncoder):
        what = "rows of numbers" if saved.reader is None else f"items of the kind {saved.reader.kind}"
        raise DataError(
            f"the model in {folder} takes {what}, and these are of the kind {kind}; give another one to --from"
        )
    return saved.encoder.train(), saved.reader


def save_items_model(
    model: Pretrained, split: SplitItems, out: Path, target: str | None, history: History, classes: Any = None
) -> None:
    """Save the model with its reader, and beside it how it was trained and what its outputs stand for."""
    model.save_pretrained(out, preprocessing=split.reader.to_dict())
    named = None if classes is None else [str(each) for each in classes]
    write_record(
        out,
        split.items.sha256,
        rows=len(split.items),
        held_out=split.fraction,
        seed=split.seed,
        target=target,
        history=history.history,
        classes=named,
    )


def read_items(saved: SavedModel, source: str, target: str | None = None, column: str | None = None) -> Any:
    """(Collection, Items) of what is in `source`, for a saved model with a front end."""
    assert saved.reader is not None
    found = collect(source, saved.reader.kind, target, column)
    return found, Items(saved.reader, found.items)


def evaluate_items(
    saved: SavedModel, record: dict[str, Any] | None, collection: Collection, items: Items, **options: Any
) -> tuple[EvaluationReport, str]:
    """What `evaluate` measures, of items: their summaries are the features. And a sentence on what was scored."""
    encoder = saved.encoder
    fit_rows, score_rows, why = rows_to_score(np.arange(len(items)), items.sha256, record, collection.source)
    reconstruction = encode_items(saved.model, items) if hasattr(saved.model, "decode") else None
    rows = map_items(encoder.summary, items, next(encoder.parameters()))
    report = measure_codes(
        rows,
        encode_items(encoder, items),
        reconstruction,
        collection.labels,
        fit_rows=fit_rows,
        score_rows=score_rows,
        names=[f"summary {number}" for number in range(rows.shape[1])],
        numbers=np.arange(len(items)),
        **options,
    )
    return report, why + " The features are the items' summaries."

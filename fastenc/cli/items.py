"""What the commands do with images, texts, sounds and other items that a front end turns into features."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import typer

from ..collected import (
    SplitItems,
    evaluate_items,
    front_encoder_of,
    make_encoder,
    read_items,
    read_labels,
    save_items_model,
    split_items,
    train_autoencoder,
    train_head,
)
from ..data import DataError
from ..evaluation import EvaluationReport
from ..frontends import FrontEncoder, collect
from ..frontends.batches import encode_items
from ..pipeline import SavedModel, one_sentence
from ..record import read_record
from ..vectors import write_vectors
from .options import Fitting, Network, describe_history, parse_widths


def refuse(kind: str, *groups: Any) -> None:
    """Refuse options that are of tables: fields of dataclasses that are not as by default."""
    for group in groups:
        for field in fields(group):
            if getattr(group, field.name) != field.default:
                raise DataError(f"--{field.name.replace('_', '-')} is not for items of the kind {kind}; leave it out")


@dataclass(frozen=True)
class ItemsJob:
    """What `fastenc train` and `fastenc finetune` are given alike, of items.

    data, kind        where they are, and what they are
    out               the folder of the model
    network, fitting  the options of those names; `trainer` are the Trainer's of them
    target, column    what holds the labels, and of a table of texts the texts
    """

    data: str
    kind: str
    out: Path
    network: Network
    fitting: Fitting
    trainer: dict[str, Any]
    target: str | None
    column: str | None

    def split(self, reader: Any = None) -> SplitItems:
        """The items, some of them held out; read as those of the model whose reader is given, if one is."""
        fitting = self.fitting
        collection = collect(self.data, self.kind, self.target, self.column)
        split = split_items(collection, fitting.validation_split, fitting.seed, reader)
        typer.echo(f"{len(split.kept)} items of the kind {self.kind} to train on, {len(split.held_out)} to validate on")
        if fitting.patience is not None and len(split.held_out) == 0:
            raise DataError(
                f"--patience needs items to validate on, and {self.data} leaves none; raise --validation-split"
            )
        return split

    def new_encoder(self, split: SplitItems) -> FrontEncoder:
        network = self.network
        return make_encoder(split.reader, parse_widths(network.widths), network.activation, network.dropout)

    def fit_options(self) -> dict[str, Any]:
        """Of the functions that train: epochs, rows of a batch, patience, and the Trainer's but the seed."""
        fitting = self.fitting
        own = {"epochs": fitting.epochs, "batch_size": fitting.batch_size, "patience": fitting.patience}
        return own | {name: value for name, value in self.trainer.items() if name != "seed"}


def train_items(job: ItemsJob, loss: str) -> None:
    """`fastenc train` of items: an autoencoder of their summaries."""
    split = job.split()
    torch.manual_seed(job.fitting.seed)
    encoder = job.new_encoder(split)
    typer.echo(f"front end {type(encoder.frontend).__name__}: {encoder.frontend.out_features} features")
    began = time.perf_counter()
    model, history = train_autoencoder(encoder, split, loss=loss, **job.fit_options())
    seconds = time.perf_counter() - began
    save_items_model(model, split, job.out, job.target, history)
    typer.echo(f"{seconds:.1f} s: {describe_history(history)}; saved in {job.out}")


def finetune_items(
    job: ItemsJob,
    *,
    strategy: str,
    start: Path | None,
    frozen: int | None,
    task: str,
    loss: str | None,
    pretraining_epochs: int | None,
) -> None:
    """`fastenc finetune` of items: a head on their labels, from scratch, pre-trained, or from a saved model."""
    if (strategy == "transfer") != (start is not None):
        raise DataError("--strategy transfer and --from DIR go together; give both or neither")
    encoder, reader = (None, None) if start is None else front_encoder_of(start, job.kind)
    split = job.split(reader)
    targets = read_labels(split.collection, task)
    torch.manual_seed(job.fitting.seed)
    if encoder is None:
        encoder = job.new_encoder(split)
    began = time.perf_counter()
    fitted = job.fit_options()
    if strategy == "pretrain":
        _, before = train_autoencoder(encoder, split, **{**fitted, "epochs": pretraining_epochs or job.fitting.epochs})
        typer.echo(f"pre-training: {describe_history(before)}")
    if frozen is None:
        frozen = len(encoder.layers) - 1 if strategy == "transfer" else 0
    with one_sentence():
        model, history = train_head(encoder, split, targets, loss=loss, frozen=frozen, **fitted)
    save_items_model(model, split, job.out, job.target, history, targets.classes)
    typer.echo(f"training: {describe_history(history)}")
    typer.echo(f"{time.perf_counter() - began:.1f} s; saved in {job.out}")


def encode_to_file(saved: SavedModel, data: str, output: Path, column: str | None) -> None:
    """`fastenc encode` of items: a vector for each, in the order of their names."""
    collection, items = read_items(saved, data, None, column)
    rows, width = write_vectors(output, [encode_items(saved.encoder, items)])
    names = output.with_name(f"{output.stem}.names.txt")
    names.write_text("".join(f"{name}\n" for name in collection.names), encoding="utf-8")
    typer.echo(f"{rows} vectors of {width} numbers written to {output}, the items' names to {names}")


def evaluate_folder(
    saved: SavedModel, folder: Path, data: str, target: str | None, column: str | None, **options: Any
) -> tuple[EvaluationReport, str]:
    """`fastenc evaluate` of items: the report, and a sentence on what was scored."""
    record = read_record(folder)
    if target is None and record is not None and record["target"] is not None:
        target = record["target"]
    collection, items = read_items(saved, data, target, column)
    return evaluate_items(saved, record, collection, items, **options)

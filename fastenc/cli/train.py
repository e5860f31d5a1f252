"""`fastenc train`: an autoencoder of a file that may be larger than memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..chunked import prepare_in_chunks
from ..data import Chunks, DataError
from ..encoder import AutoEncoder, Encoder
from ..explain import explain
from ..frontends import kind_of
from ..frontends.kinds import TABLE
from ..pipeline import check_model_folder, existing_parent, one_sentence, run_in_chunks
from ..private import PrivateFit, fit_private
from ..record import write_record
from ..report import dead_units
from ..training import EarlyStopping, Trainer
from .items import ItemsJob, refuse, train_items
from .options import (
    ColumnOption,
    DataArgument,
    Fitting,
    KindOption,
    Network,
    OutOption,
    Preparation,
    choice,
    one_or_several,
    parse_widths,
    report_rows,
)
from .privacy import Privacy, what_is_covered

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def train(
    data: DataArgument,
    out: OutOption,
    network: Network,
    preparation: Preparation,
    fitting: Fitting,
    privacy: Privacy,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="A column of labels: no feature, kept for evaluate. May be repeated."),
    ] = None,
    loss: Annotated[str, choice("Loss", "mse", "mae")] = "mse",
    dtype: Annotated[str, choice("Number format of the weights", *DTYPES)] = "float32",
    kind: KindOption = "auto",
    column: ColumnOption = None,
) -> None:
    """Train an autoencoder on DATA and save it, with its preprocessing, in --out.

    The preprocessing is learned from the training rows only. A model that is in --out already is replaced when
    training has succeeded, and not before. DATA may be larger than memory: it is read in chunks, and prepared rows that
    are many are kept in a file beside --out until the end.

    Of images, sounds, texts, recordings and sequences the autoencoder reconstructs a summary, such as a small picture.
    """
    check_model_folder(out)
    options = fitting.trainer()
    private = privacy.options(fitting)
    targets = one_or_several(target)
    kind = kind_of(data, kind, targets if isinstance(targets, str) else None)
    if kind != TABLE:
        refuse(kind, preparation, privacy)
        if isinstance(targets, list) or dtype != "float32":
            raise DataError("a front end takes one --target and computes in float32; leave the others and --dtype out")
        train_items(ItemsJob(data, kind, out, network, fitting, options, targets, column), loss)
        return
    chunks = Chunks(data, target=targets)
    folder: Path = existing_parent(out)
    rows = prepare_in_chunks(data, chunks, preparation.preprocessor(), folder, fitting.validation_split, fitting.seed)
    if fitting.patience is not None and len(rows.x_held_out) == 0:
        raise DataError(f"--patience needs validation rows, and {data} leaves none; raise --validation-split")
    report_rows(rows.dropped, rows.rows, rows.unseen)
    features = rows.x.shape[1]
    typer.echo(f"{len(rows.x)} rows to train on, {len(rows.x_held_out)} to validate on, {features} features")

    torch.manual_seed(fitting.seed)
    encoder = Encoder(
        features, parse_widths(network.widths), network.activation, dropout=network.dropout, dtype=DTYPES[dtype]
    )
    model = AutoEncoder(encoder)
    typer.echo(f"backend for {explain(model, torch.from_numpy(rows.x[: fitting.batch_size]).to(DTYPES[dtype]))}")
    validation = rows.x_held_out if len(rows.x_held_out) else None
    began = time.perf_counter()
    spent: PrivateFit | None = None
    if private is None:
        history = Trainer(model, loss=loss, **options).fit(
            rows.x,
            epochs=fitting.epochs,
            batch_size=fitting.batch_size,
            validation_data=validation,
            callbacks=[EarlyStopping(patience=fitting.patience)] if fitting.patience is not None else [],
        )
    else:
        with one_sentence():
            spent = fit_private(model, rows.x, loss=loss, validation_data=validation, **private)
        history = spent.history
    seconds = time.perf_counter() - began
    model.save_pretrained(out, preprocessing=rows.preprocessor.to_dict())
    write_record(
        out,
        rows.fingerprint,
        rows=rows.rows,
        held_out=fitting.validation_split,
        seed=fitting.seed,
        target=targets,
        history=history.history if spent is None else spent.validation_history,
        private=None if spent is None else spent.to_dict(),
    )
    losses = ", ".join(f"{name} {values[-1]:.6g}" for name, values in history.history.items())
    typer.echo(f"{len(history.epoch)} epochs in {seconds:.1f} s: {losses}")
    dead = dead_units(run_in_chunks(encoder.eval(), rows.x))
    if dead:
        typer.echo(f"{len(dead)} of the code's {encoder.out_features} units never change, and so tell nothing")
    typer.echo(f"saved in {out}")
    if spent is not None:
        typer.echo(f"{spent}\n{what_is_covered(rows.preprocessor, len(rows.x))}")

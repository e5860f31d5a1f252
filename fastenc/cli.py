"""The command line: `fastenc train | finetune | encode | evaluate | tune | info | bench`, also as `python -m fastenc`.

Exit codes: 0 done; 2 bad input, with one sentence that names it and the cure; 130 Ctrl-C; 1 an error of fastenc's own,
or a machine that cannot do it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from . import __version__
from .activation import ACTIVATIONS
from .backends import BACKENDS
from .data import DataError, Prepared, Preprocessor, load
from .data.augmentation import FeatureMask, GaussianNoise, Mixup
from .data.preprocessing import DATES, MISSING, SCALES, TEXTS
from .encoder import AutoEncoder, Encoder
from .evaluation import evaluate as measure_quality
from .explain import explain
from .finetuning.finetune import STRATEGIES
from .finetuning.pretraining import METHODS
from .finetuning.targets import TASKS
from .info import clear_tuning, describe
from .labelled import prepare, save
from .labelled import train as train_with_labels
from .pipeline import (
    SavedModel,
    check_model_folder,
    load_labelled,
    naming,
    rows_to_score,
    run_in_chunks,
    take,
)
from .pretrained import ModelFileError
from .record import read_record, split_rows, write_record
from .report import dead_units
from .training import EarlyStopping, History, Trainer
from .tune import tune as measure
from .vectors import check_folder_of, check_output, rows_file, write_row_numbers, write_vectors

try:
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError:
    print('fastenc: the command line needs typer; run: pip install "fastenc[app]"', file=sys.stderr)
    raise SystemExit(2) from None

OPTIMIZERS = ("adam", "adamw", "sgd")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
FINETUNING_LOSSES = ("cross_entropy", "mse", "mae", "huber", "cosine", "triplet")
TUNED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXTRAS = ("sklearn", "pandas", "pyarrow", "matplotlib")


class OneSentenceErrors(TyperGroup):
    """Turns the errors that users can cause into one sentence and exit code 2; others keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (DataError, ModelFileError, FloatingPointError) as error:
            message = str(error)
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            message = str(error)
        except OSError as error:
            if error.filename is None:
                raise
            message = f"{error.filename}: {error.strerror}"
        typer.echo(f"fastenc: {message}", err=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=OneSentenceErrors,
    help="Train encoders on tables and arrays, turn rows into vectors, and see how good the vectors are.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    app(prog_name="fastenc")


def choice(what: str, *names: str) -> Any:
    """An option that takes one of `names`."""

    def check(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}")
        return value

    return typer.Option(callback=check, metavar="NAME", help=f"{what}: {', '.join(names)}.")


def parse_numbers(text: str, what: str, example: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of {what}; write for example {example}")
    return numbers


def parse_widths(text: str) -> tuple[int, ...]:
    return parse_numbers(text, "layer widths", "128,64,32,16")


def parse_batches(text: str) -> tuple[int, ...]:
    return parse_numbers(text, "batch sizes", "32,4096")


def check_widths(text: str) -> str:
    parse_widths(text)
    return text


def check_batches(text: str) -> str:
    parse_batches(text)
    return text


def positive(value: float) -> float:
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value} is not a number greater than 0")
    return value


def fraction(value: float) -> float:
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{value} is not at least 0 and less than 1")
    return value


def inner_fraction(value: float) -> float:
    if not 0 < value < 1:
        raise typer.BadParameter(f"{value} is not more than 0 and less than 1")
    return value


DATA_HELP = "A .csv, .parquet or .npy file, or the word digits (scikit-learn's 1,797 handwritten digits)."
DataArgument = Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP, show_default=False)]
ModelArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A model folder.", show_default=False)]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


@app.command()
def train(
    data: DataArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to save the model in.", show_default=False)],
    target: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column of labels: no feature, kept for evaluate.")
    ] = None,
    widths: Annotated[
        str, typer.Option(callback=check_widths, help="Widths of the encoder's layers; the last is the code's.")
    ] = "128,64,32,16",
    activation: Annotated[str, choice("Activation of the encoder's layers", *ACTIVATIONS)] = "relu",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in each step.")] = 32,
    lr: Annotated[float, typer.Option(callback=positive, help="Learning rate.")] = 1e-3,
    optimizer: Annotated[str, choice("Optimiser", *OPTIMIZERS)] = "adam",
    loss: Annotated[str, choice("Loss", "mse", "mae")] = "mse",
    missing: Annotated[str, choice("What to do about rows with missing values", *MISSING)] = "impute",
    scale: Annotated[str, choice("Scaling of number columns", *SCALES)] = "standard",
    text: Annotated[str, choice("What text columns become", *TEXTS)] = "one-hot",
    dates: Annotated[str, choice("What to do about columns of dates", *DATES)] = "refuse",
    validation_split: Annotated[
        float, typer.Option(callback=fraction, help="Share of the rows, chosen at random, that is not trained on.")
    ] = 0.1,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop when validation got no better for so many epochs, and keep the best weights."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Makes a run repeatable.")] = 0,
    dropout: Annotated[float, typer.Option(callback=fraction, help="Share of hidden units dropped in a step.")] = 0.0,
    dtype: Annotated[str, choice("Number format of the weights", *DTYPES)] = "float32",
) -> None:
    """Train an autoencoder on DATA and save it, with its preprocessing, in --out.

    The preprocessing is learned from the training rows only. A model that is in --out already is replaced when
    training has succeeded, and not before.
    """
    check_model_folder(out)
    source = load(data, target=target)
    kept, held_out = split_rows(len(source), validation_split, seed)
    if len(kept) == 0:
        raise DataError(f"{data} has {len(source)} rows and --validation-split takes all of them; lower it")
    if patience is not None and len(held_out) == 0:
        raise DataError(f"--patience needs validation rows, and {data} leaves none; raise --validation-split")
    with naming(data):
        preprocessor = Preprocessor(missing, scale, text, dates).fit(take(source.features, np.sort(kept)))
        prepared = preprocessor.transform(source.features)
    is_held_out = np.isin(prepared.rows, held_out)
    x, x_held_out = prepared.x[~is_held_out], prepared.x[is_held_out]
    report_rows(prepared)
    typer.echo(f"{len(x)} rows to train on, {len(x_held_out)} to validate on, {x.shape[1]} features")

    torch.manual_seed(seed)
    encoder = Encoder(x.shape[1], parse_widths(widths), activation, dropout=dropout, dtype=DTYPES[dtype])
    model = AutoEncoder(encoder)
    typer.echo(f"backend for {explain(model, torch.from_numpy(x[:batch_size]).to(DTYPES[dtype]))}")
    began = time.perf_counter()
    history = Trainer(model, optimizer, lr, loss, seed=seed).fit(
        x,
        epochs=epochs,
        batch_size=batch_size,
        validation_data=x_held_out if len(x_held_out) else None,
        callbacks=[EarlyStopping(patience=patience)] if patience is not None else [],
    )
    seconds = time.perf_counter() - began
    model.save_pretrained(out, preprocessing=preprocessor.to_dict())
    split: dict[str, Any] = {"rows": len(source), "held_out": validation_split, "seed": seed, "target": target}
    write_record(out, prepared.x, **split, history=history.history)
    losses = ", ".join(f"{name} {values[-1]:.6g}" for name, values in history.history.items())
    typer.echo(f"{len(history.epoch)} epochs in {seconds:.1f} s: {losses}")
    dead = dead_units(np.concatenate(list(run_in_chunks(encoder.eval(), x))))
    if dead:
        typer.echo(f"{len(dead)} of the code's {encoder.out_features} units never change, and so tell nothing")
    typer.echo(f"saved in {out}")


@app.command()
def finetune(
    data: DataArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to save the model in.", show_default=False)],
    target: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="The column of labels or numbers to learn; for .npy, a .npy file of them."),
    ] = None,
    strategy: Annotated[str, choice("How to begin", *STRATEGIES)] = "scratch",
    encoder: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="The model whose encoder to begin with.")
    ] = None,
    unlabelled: Annotated[
        str | None, typer.Option(metavar="DATA", help="Rows without labels to pre-train on; by default those of DATA.")
    ] = None,
    pretraining: Annotated[str, choice("How to pre-train", *METHODS)] = "autoencoder",
    pretraining_epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows to pre-train on.")] = 100,
    frozen: Annotated[
        int | None,
        typer.Option(min=0, help="How many of the first layers not to train; for transfer all but the last."),
    ] = None,
    unfreeze_every: Annotated[
        int | None, typer.Option(min=1, help="Train one more of the frozen layers after so many epochs, top down.")
    ] = None,
    layer_decay: Annotated[
        float, typer.Option(callback=positive, max=1.0, help="Learning rate of each layer over that of the one above.")
    ] = 1.0,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train adapters of this rank, not the encoder, and merge them.")
    ] = None,
    task: Annotated[str, choice("What the target is", *TASKS)] = "auto",
    widths: Annotated[
        str, typer.Option(callback=check_widths, help="Widths of the encoder's layers; the last is the code's.")
    ] = "128,64,32,16",
    activation: Annotated[str, choice("Activation of the encoder's layers", *ACTIVATIONS)] = "relu",
    dropout: Annotated[float, typer.Option(callback=fraction, help="Share of hidden units dropped in a step.")] = 0.0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in each step.")] = 32,
    lr: Annotated[float, typer.Option(callback=positive, help="Learning rate.")] = 1e-3,
    optimizer: Annotated[str, choice("Optimiser", *OPTIMIZERS)] = "adam",
    loss: Annotated[str, choice("Loss; auto: cross_entropy or mse", "auto", *FINETUNING_LOSSES)] = "auto",
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Weight decay.")] = 0.0,
    l1: Annotated[float, typer.Option(min=0.0, help="L1 penalty on the weights.")] = 0.0,
    noise: Annotated[float, typer.Option(min=0.0, help="Gaussian noise added to the features in each epoch.")] = 0.0,
    mask: Annotated[float, typer.Option(callback=fraction, help="Share of the features hidden in each epoch.")] = 0.0,
    mixup: Annotated[float, typer.Option(min=0.0, help="Mix rows, and targets, by Beta(this, this); 0 for not.")] = 0.0,
    missing: Annotated[str, choice("What to do about rows with missing values", *MISSING)] = "impute",
    scale: Annotated[str, choice("Scaling of number columns", *SCALES)] = "standard",
    validation_split: Annotated[
        float, typer.Option(callback=fraction, help="Share of the rows, chosen at random, that is not trained on.")
    ] = 0.1,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop when validation got no better for so many epochs, and keep the best weights."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Makes a run repeatable.")] = 0,
) -> None:
    """Train an encoder and a head on the labels of DATA, and save them, with their preprocessing, in --out.

    From scratch; after pre-training on rows without labels (--strategy pretrain); or from the encoder of a model that
    was trained before (--strategy transfer --from DIR), whose preprocessing is then kept. fastenc encode and evaluate
    take what comes out; training.json beside it says what the outputs stand for.
    """
    check_model_folder(out)
    labelled = prepare(data, target, encoder, unlabelled, missing, scale, validation_split, seed)
    report_rows(labelled.prepared)
    training, held_out = (~labelled.is_held_out).sum(), labelled.is_held_out.sum()
    typer.echo(f"{training} rows to train on, {held_out} to validate on, {labelled.prepared.x.shape[1]} features")
    steps = [(GaussianNoise, noise), (FeatureMask, mask), (Mixup, mixup)]
    began = time.perf_counter()
    result = train_with_labels(
        labelled,
        strategy=strategy,
        encoder=encoder,
        pretraining=pretraining,
        pretraining_options={"epochs": pretraining_epochs} if strategy == "pretrain" else None,
        frozen=frozen,
        unfreeze_every=unfreeze_every,
        layer_decay=layer_decay,
        lora_rank=lora_rank,
        task=task,
        widths=parse_widths(widths),
        activation=activation,
        dropout=dropout,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        loss=None if loss == "auto" else loss,
        weight_decay=weight_decay,
        l1=l1,
        augment=[step(value) for step, value in steps if value > 0.0] or None,
        patience=patience,
        seed=seed,
    )
    seconds = time.perf_counter() - began
    save(result, labelled, out, validation_split, seed, target)
    if result.pretraining is not None:
        typer.echo(f"pre-training: {describe_history(result.pretraining.history)}; {result.pretraining.how}")
    typer.echo(f"training: {describe_history(result.history)}; {result.how}")
    typer.echo(f"{seconds:.1f} s; saved in {out}")


@app.command()
def encode(
    folder: ModelArgument,
    data: DataArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A .npy, .csv or .parquet file.", show_default=False)
    ],
) -> None:
    """Turn the rows of DATA into vectors with the model in DIR.

    The file gets one vector for each row, in the same order. If the model was trained with --missing drop, rows with
    missing values get none, and the row number of each vector, counted from 0, is written beside it: for vectors.npy
    in vectors.rows.npy.
    """
    check_output(output)
    saved = SavedModel(folder)
    kept, dropped, unseen = [], 0, 0

    def codes() -> Iterator[np.ndarray]:
        nonlocal dropped, unseen
        for block in saved.prepare_blocks(data, load(data).features):
            kept.append(block.rows)
            dropped, unseen = dropped + block.dropped, unseen + block.unseen
            yield from saved.codes(block.x)

    rows, width = write_vectors(output, codes())
    report_rows(Prepared(np.empty((0, 0), np.float32), np.concatenate(kept), dropped, unseen))
    if saved.preprocessor is not None and saved.preprocessor.missing == "drop":
        write_row_numbers(output, np.concatenate(kept))
        typer.echo(f"row numbers written to {rows_file(output)}")
    typer.echo(f"{rows} vectors of {width} numbers written to {output}")


@app.command()
def evaluate(
    folder: ModelArgument,
    data: DataArgument,
    target: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column of labels; by default the one given to train.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to a JSON file, too.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with tables and pictures, too.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A scorer of scikit-learn's, for a linear model of the labels."),
    ] = None,
    quantile: Annotated[
        float, typer.Option(callback=inner_fraction, help="Share of fitted rows below the anomaly score's threshold.")
    ] = 0.95,
) -> None:
    """Measure how much of DATA the codes of the model in DIR keep, beside PCA of the same size.

    If DATA is what the model was trained on, PCA and the classifiers are fitted on the rows that the model was trained
    on, and everything is scored on those that were held out. Otherwise they are fitted on 70% of the rows, chosen at
    random, and everything is scored on the other 30%: PCA then knows this very data, and the model may not.
    """
    for file in (json_file, html_file):
        if file is not None:
            check_folder_of(file)
    saved, record = SavedModel(folder), read_record(folder)
    source = load_labelled(data, target, None if record is None else record["target"])
    prepared = saved.prepare(data, source.features)
    report_rows(prepared)
    fit_rows, score_rows, why = rows_to_score(prepared, record, data)
    report = measure_quality(
        saved.model,
        prepared.x,
        None if source.target is None else source.target[prepared.rows],
        fit_rows=fit_rows,
        score_rows=score_rows,
        metric=metric,
        quantile=quantile,
        feature_names=None if saved.preprocessor is None else saved.preprocessor.feature_names,
        row_numbers=prepared.rows,
    )
    typer.echo(f"{why}\n\n{report}")
    if json_file is not None:
        report.save_json(json_file, model=str(folder), data=data, rows=why)
        typer.echo(f"\nwritten to {json_file}")
    if html_file is not None:
        report.save_html(html_file, f"{folder} on {data}", [why])
        typer.echo(f"\nwritten to {html_file}")


@app.command()
def tune(
    in_features: Annotated[int, typer.Option(min=1, help="Number of input features.", show_default=False)],
    widths: Annotated[
        str, typer.Option(callback=check_widths, help="Widths of the layers, one or several.")
    ] = "128,64,32,16",
    batch: Annotated[str, typer.Option(callback=check_batches, help="Numbers of rows.")] = "32,4096",
    dtype: Annotated[str, choice("Number format", *TUNED_DTYPES)] = "bf16",
    activation: Annotated[str, choice("Activation of the layers", *ACTIVATIONS)] = "relu",
) -> None:
    """Measure the kernels on this GPU for an encoder of your own, and keep what is fastest.

    The kernels in Triton, those in CUDA C++ if they are built, and eager PyTorch are measured, and the fastest is
    chosen from then on. What is kept is shown by fastenc info.
    """
    if reason := BACKENDS["triton"].why_unavailable():
        typer.echo(f"fastenc: there is nothing to tune here: {reason}", err=True)
        raise typer.Exit(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Encoder(in_features, parse_widths(widths), activation, device=device, dtype=TUNED_DTYPES[dtype])
    for rows in parse_batches(batch):
        typer.echo(str(measure(model, torch.zeros(rows, in_features, device=device, dtype=TUNED_DTYPES[dtype]))))


@app.command()
def info(
    clear_cache: Annotated[bool, typer.Option("--clear-cache", help="Forget what fastenc tune has measured.")] = False,
) -> None:
    """Print versions, processors, which backends are usable or why they are not, and what was tuned."""
    if clear_cache:
        typer.echo(f"removed {clear_tuning()}")
    typer.echo(describe())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(ctx: typer.Context) -> None:
    """Measure fastenc against eager PyTorch and others on this machine, or compare two measurements; bench --help."""
    from .benchmarks.__main__ import main as measure_all  # loads compilers and plots, which the other commands need not

    raise typer.Exit(measure_all(ctx.args, "fastenc bench"))


def describe_history(history: History) -> str:
    losses = ", ".join(f"{name} {values[-1]:.6g}" for name, values in history.history.items())
    return f"{len(history.epoch)} epochs, {losses}"


def report_rows(prepared: Prepared) -> None:
    """Say on stderr what preprocessing left out: nothing goes missing in silence."""
    if prepared.dropped:
        total = prepared.dropped + len(prepared.rows)
        typer.echo(f"{prepared.dropped} of {total} rows have missing values and are left out", err=True)
    if prepared.unseen:
        typer.echo(f"{prepared.unseen} text values were not in the training rows and count as none", err=True)

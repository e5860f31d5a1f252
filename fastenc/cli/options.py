"""Options that commands share: their help, their checks, and groups of them as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ..activation import ACTIVATIONS
from ..data import Preprocessor
from ..data.preprocessing import DATES, MISSING, SCALES, TEXTS
from ..pipeline import one_sentence
from ..training import Trainer
from ..training.precision import PRECISIONS
from ..training.schedules import SCHEDULES

OPTIMIZERS = ("adam", "adamw", "sgd")


def choice(what: str, *names: str) -> Any:
    """An option that takes one of `names`."""

    def check(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}")
        return value

    return typer.Option(callback=check, metavar="NAME", help=f"{what}: {', '.join(names)}.")


def parse_numbers(text: str, what: str, example: str, separator: str = ",") -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(separator))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of {what}; write for example {example}")
    return numbers


def parse_widths(text: str) -> tuple[int, ...]:
    return parse_numbers(text, "layer widths", "128,64,32,16")


def check_widths(text: str) -> str:
    parse_widths(text)
    return text


def positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value} is not a number greater than 0")
    return value


def not_negative(value: float | None) -> float | None:
    if value is not None and not 0 <= value < float("inf"):
        raise typer.BadParameter(f"{value} is not a number of at least 0")
    return value


def fraction(value: float | None) -> float | None:
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter(f"{value} is not at least 0 and less than 1")
    return value


def inner_fraction(value: float) -> float:
    if not 0 < value < 1:
        raise typer.BadParameter(f"{value} is not more than 0 and less than 1")
    return value


DATA_HELP = "A .csv, .parquet or .npy file, or the word digits (scikit-learn's 1,797 handwritten digits)."
DataArgument = Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP, show_default=False)]
ModelArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A model folder.", show_default=False)]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="The folder to save the model in.", show_default=False)]
WidthsOption = Annotated[
    str, typer.Option(callback=check_widths, help="Widths of the encoder's layers; the last is the code's.")
]


def one_or_several(names: list[str] | None) -> str | list[str] | None:
    """What was given by an option that may be given several times: none, the one, or a list."""
    return None if not names else names[0] if len(names) == 1 else names


@dataclass(frozen=True)
class Network:
    """The encoder to make."""

    widths: WidthsOption = "128,64,32,16"
    activation: Annotated[str, choice("Activation of the encoder's layers", *ACTIVATIONS)] = "relu"
    dropout: Annotated[float, typer.Option(callback=fraction, help="Share of hidden units dropped in a step.")] = 0.0


@dataclass(frozen=True)
class Preparation:
    """What becomes of the columns."""

    missing: Annotated[str, choice("What to do about rows with missing values", *MISSING)] = "impute"
    scale: Annotated[str, choice("Scaling of number columns", *SCALES)] = "standard"
    text: Annotated[str, choice("What text columns become", *TEXTS)] = "one-hot"
    dates: Annotated[str, choice("What to do about columns of dates", *DATES)] = "refuse"

    def preprocessor(self) -> Preprocessor:
        return Preprocessor(self.missing, self.scale, self.text, self.dates)


@dataclass(frozen=True)
class Fitting:
    """How training goes."""

    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 100
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in each step.")] = 32
    lr: Annotated[float, typer.Option(callback=positive, help="Learning rate.")] = 1e-3
    schedule: Annotated[str, choice("What the learning rate does over the epochs", "constant", *SCHEDULES)] = "constant"
    optimizer: Annotated[str, choice("Optimiser", *OPTIMIZERS)] = "adam"
    momentum: Annotated[float, typer.Option(callback=fraction, help="Momentum of --optimizer sgd.")] = 0.0
    nesterov: Annotated[bool, typer.Option("--nesterov", help="Nesterov's form of the momentum.")] = False
    weight_decay: Annotated[float, typer.Option(callback=not_negative, help="Weight decay.")] = 0.0
    l1: Annotated[float, typer.Option(callback=not_negative, help="L1 penalty on the weights.")] = 0.0
    clip_norm: Annotated[
        float | None, typer.Option(callback=positive, help="The most that the norm of all gradients may be.")
    ] = None
    clip_value: Annotated[
        float | None, typer.Option(callback=positive, help="The most that each element of a gradient may be.")
    ] = None
    accumulate: Annotated[int, typer.Option(min=1, help="Batches that make one update.")] = 1
    precision: Annotated[str, choice("Numbers to compute in; weights stay in float32", *PRECISIONS)] = "fp32"
    validation_split: Annotated[
        float, typer.Option(callback=fraction, help="Share of the rows, chosen at random, that is not trained on.")
    ] = 0.1
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop when validation got no better for so many epochs, and keep the best weights."),
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Makes a run repeatable.")] = 0

    def trainer(self) -> dict[str, Any]:
        """The Trainer's options.

        Raises:
            DataError: some do not go together; it is found before any work is done.
        """
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                *("optimizer", "lr", "momentum", "nesterov", "weight_decay", "l1", "clip_norm", "clip_value"),
                *("accumulate", "precision"),
            )
        }
        options["schedule"] = None if self.schedule == "constant" else self.schedule
        with one_sentence():
            Trainer(nn.Linear(1, 1), **options)
        return {**options, "seed": self.seed}


def report_rows(dropped: int, total: int, unseen: int) -> None:
    """Say on stderr what preprocessing left out: nothing goes missing in silence."""
    if dropped:
        typer.echo(f"{dropped} of {total} rows have missing values and are left out", err=True)
    if unseen:
        typer.echo(f"{unseen} text values were not in the training rows and count as none", err=True)


def describe_history(history: Any) -> str:
    losses = ", ".join(f"{name} {values[-1]:.6g}" for name, values in history.history.items())
    return f"{len(history.epoch)} epochs, {losses}"

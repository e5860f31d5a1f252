"""`fastenc tune`, `info` and `bench`: what this machine has, and how fast it is."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from ..activation import ACTIVATIONS
from ..backends import BACKENDS
from ..encoder import Encoder
from ..info import clear_tuning, describe
from ..tune import tune as measure
from .options import WidthsOption, choice, parse_numbers, parse_widths

TUNED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_batches(text: str) -> tuple[int, ...]:
    return parse_numbers(text, "batch sizes", "32,4096")


def check_batches(text: str) -> str:
    parse_batches(text)
    return text


def tune(
    in_features: Annotated[int, typer.Option(min=1, help="Number of input features.", show_default=False)],
    widths: WidthsOption = "128,64,32,16",
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


def info(
    clear_cache: Annotated[bool, typer.Option("--clear-cache", help="Forget what fastenc tune has measured.")] = False,
) -> None:
    """Print versions, processors, which backends are usable or why they are not, and what was tuned."""
    if clear_cache:
        typer.echo(f"removed {clear_tuning()}")
    typer.echo(describe())


def bench(ctx: typer.Context) -> None:
    """Measure fastenc against eager PyTorch and others on this machine, or compare two measurements; bench --help."""
    from ..benchmarks.__main__ import (
        main as measure_all,
    )  # loads compilers and plots, which the other commands need not

    raise typer.Exit(measure_all(ctx.args, "fastenc bench"))


def add_bench(app: typer.Typer) -> None:
    """Add `bench`, which reads its options itself."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(context_settings=settings, add_help_option=False)(bench)

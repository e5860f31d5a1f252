"""`fastenc explain-features`: which inputs drive which codes of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..attribution import METHODS, feature_attributions
from ..data import Chunks, DataError
from ..data.extras import require
from ..pipeline import SavedModel, one_sentence
from ..plots import save_plot
from .options import DataArgument, ModelArgument, choice, report_rows

TABLE, PICTURE = "attributions.csv", "attributions.png"


def explain_features(
    folder: ModelArgument,
    data: DataArgument,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help=f"Write {TABLE}, with all codes and features, and {PICTURE} here, too."),
    ] = None,
    code: Annotated[
        list[int] | None, typer.Option(min=0, metavar="K", help="Which code, from 0; may be repeated; all by default.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many features to print for each code.")] = 5,
    method: Annotated[str, choice("How", *METHODS)] = "integrated-gradients",
    rows: Annotated[
        int, typer.Option(min=1, help="At most so many rows of DATA, chosen at random, are looked at.")
    ] = 500,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the choice of rows.")] = 0,
) -> None:
    """Tell which inputs drive which numbers of the vectors that the model in DIR makes of DATA's rows.

    Each code's difference from that of the average row is shared among the features by integrated gradients, or another
    --method. The table has the features with the largest shares, whether the code goes up or down with each, and by how
    much for one unit of the feature as the model sees it (after scaling).
    """
    require("captum", "fastenc explain-features", "tools")
    saved = SavedModel(folder)
    if saved.reader is not None:
        raise DataError(
            f"the model in {folder} is of {saved.reader.kind} data, and features are explained of tables and arrays; "
            "use captum on model.encoder"
        )
    if out is not None and out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; give a folder to --out")
    x, total, dropped, unseen = some_rows(saved, data, rows, seed)
    report_rows(dropped, total + dropped, unseen)
    with one_sentence():
        found = feature_attributions(
            saved.encoder,
            x,
            method=method,
            codes=code or None,
            feature_names=None if saved.preprocessor is None else saved.preprocessor.feature_names,
        )
    which = f"all {total} rows of {data}"
    if len(x) < total:
        which = f"{len(x)} of the {total} rows of {data}, chosen at random"
    typer.echo(f"{method} over {which}, beside their mean\n\n{found.table(top)}")
    if found.dead:
        typer.echo(f"\nno input drives {', '.join(f'code {each}' for each in found.dead)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found.save_csv(out / TABLE)
        save_plot(found.draw, out / PICTURE, found.picture_size())
        typer.echo(f"\nwritten to {out / TABLE} and {out / PICTURE}")


def some_rows(saved: SavedModel, data: str, most: int, seed: int) -> tuple[np.ndarray, int, int, int]:
    """Prepared rows, at most `most` of them, chosen at random as the file is read once.

    Returns: float32 [rows, features] in their order; how many there were, were dropped, and had unseen texts.
    """
    random = np.random.default_rng(seed)
    held = keys = None
    total = dropped = unseen = 0
    for block, _ in saved.prepare_chunks(data, Chunks(data)):
        total, dropped, unseen = total + len(block.x), dropped + block.dropped, unseen + block.unseen
        # The rows with the smallest of random keys, one for each: a sample without knowing how many will come.
        drawn = random.random(len(block.x))
        held = block.x if held is None else np.concatenate([held, block.x])
        keys = drawn if keys is None else np.concatenate([keys, drawn])
        kept = np.sort(np.argsort(keys, kind="stable")[:most])
        held, keys = held[kept], keys[kept]
    assert held is not None
    return held, total, dropped, unseen

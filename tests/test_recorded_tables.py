"""The tables of README.md and docs/performance.md are those of benchmarks/results.

python tests/test_recorded_tables.py --write    # makes them so
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; last, for an installed fastenc to count

from benchmarks import fuse, memory, models, scaling, stacks, step
from benchmarks.fit import FUSED_ADAM
from benchmarks.report import Record, read_rows

ROOT = Path(__file__).parents[1]
WITH_AVX512, WITHOUT = "amd-epyc-zen5-2-cores-2026-11-24", "amd-epyc-zen3-2-cores-2026-11-29"
ADAM, JAX_SCAN = "eager, Adam", "JAX, jit and scan of the epoch"
ENCODER = (
    (stacks.FORWARD, "inference"),
    (stacks.PARAMETERS, "parameter gradients"),
    (stacks.EVERYTHING, "all gradients"),
)
ON = ("1 thread", "2 threads")


@functools.cache
def records(folder: str, question: str) -> list[Record]:
    file = ROOT / "benchmarks" / "results" / folder / f"{question}.json"
    return [record for record in read_rows(file) if record["missing"] is None]


def find(
    folder: str, question: str, peer: str, on: str, mode: str = "", dtype: str = "float32", **sizes: int
) -> Record:
    (found,) = (
        record
        for record in records(folder, question)
        if (record["peer"], record["place"], record["dtype"]) == (peer, on, dtype)
        and mode in ("", record["mode"])
        and sizes.items() <= record["sizes"].items()
    )
    return found


def ratio(record: Record) -> str:
    """Bold where it is a loss."""
    value = f"{record['ratio']['median']:.2f}"
    return f"**{value}**" if record["ratio"]["high"] < 1 else value


def row(*cells: str) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def fits(folder: str, threads: tuple[str, ...]) -> Iterator[str]:
    problems = ((100, 32), (784, 256), (784, 4096))
    peers = dict.fromkeys(record["peer"] for record in records(folder, "fit"))
    for peer in peers:
        at = [(width, batch, on) for width, batch in problems for on in threads]
        yield row(
            peer, *(ratio(find(folder, "fit", peer, on, batch=batch, **{"in": width})) for width, batch, on in at)
        )


def steps() -> Iterator[str]:
    problems = ((100, 32), (784, 32), (784, 256), (784, 4096))
    for folder, name, on in (
        (WITH_AVX512, "", ON[0]),
        (WITHOUT, "without AVX-512: ", ON[0]),
        (WITHOUT, "without AVX-512: ", ON[1]),
    ):
        for peer in (ADAM, FUSED_ADAM):
            found = (find(folder, "step", peer, on, step.TRAINER, batch=b, **{"in": width}) for width, b in problems)
            yield row(f"{name}Trainer, against {peer}", on, *map(ratio, found))


def fused_models() -> Iterator[str]:
    """All are told against the plain model; what is on record is each against the fused one."""
    for name, model in models.MODELS.items():
        cells = []
        for mode in (fuse.INFERENCE, fuse.TRAINING):
            of = functools.partial(find, WITHOUT, "fuse", on=ON[1], mode=f"{name}, {mode}")
            plain = of(peer=stacks.EAGER)
            compiled = (of(peer=peer)["ratio"]["median"] for peer in (fuse.COMPILED, fuse.BACKEND))
            cells += [ratio(plain), *(f"{plain['ratio']['median'] / other:.2f}" for other in compiled)]
        yield row(name, f"{model.batch:,}", *cells)


def encoders() -> Iterator[str]:
    for mode, name in ENCODER:
        for on in ON:
            found = (
                find(WITHOUT, "encoder", stacks.EAGER, on, mode, batch=batch) for batch in (1, 32, 256, 4096, 65536)
            )
            yield row(f"{name}, {on}", *map(ratio, found))


def curve(mode: str, varies: str, values: tuple[int, ...], name: str, peer: str = FUSED_ADAM) -> Iterator[str]:
    for on in ON:
        found = [find(WITHOUT, "scaling", peer, on, mode, **{varies: value}) for value in values]
        yield row(f"{name}, {on}", *(f"{record['gflops']:.3g}, {ratio(record)}" for record in found))


def batches() -> Iterator[str]:
    yield from curve(stacks.FORWARD, "batch", scaling.BATCHES, "inference", stacks.EAGER)
    yield from curve(scaling.BY_BATCH, "batch", scaling.BATCHES, "a step of its autoencoder")


def maps() -> Iterator[str]:
    found = (find(WITHOUT, "scaling", FUSED_ADAM, ON[1], scaling.BY_ROWS, rows=rows) for rows in scaling.DATA)
    yield row("us a step, 2 threads", *(f"{record['ours']['median']:,.0f}, {ratio(record)}" for record in found))


def limits() -> Iterator[str]:
    """What each of two numbers of threads could reach: the ratio that is measured, divided by the share of the peak."""
    for name, wanted, question, peer, sizes in (
        ("step, 784 in, batch 256, against Adam(fused=True)", "2.5", "step", FUSED_ADAM, {"in": 784, "batch": 256}),
        ("step, 784 in, batch 4,096", "1.7", "step", FUSED_ADAM, {"in": 784, "batch": 4096}),
        ("inference of the encoder, 32 rows", "2", "encoder", stacks.EAGER, {"batch": 32}),
        ("inference of the encoder, 65,536 rows", "1.5", "encoder", stacks.EAGER, {"batch": 65536}),
        ("fit, 100 in, batch 32, against JAX jit and scan", "1.7", "fit", JAX_SCAN, {"in": 100, "batch": 32}),
    ):
        mode = {"step": step.TRAINER, "encoder": stacks.FORWARD, "fit": ""}[question]
        both = [find(WITHOUT, question, peer, on, mode, **sizes) for on in ON]
        cells = [", ".join(map(ratio, both)), ", ".join(f"{record['share_of_peak']:.0%}" for record in both)]
        most = ", ".join(f"{record['ratio']['median'] / record['share_of_peak']:.1f}" for record in both)
        yield row(name, wanted, *cells, most)


def peaks_of_memory() -> Iterator[str]:
    for mode, name, dtype, sizes in (
        (memory.TRAINING, "fit, batch 256, fp32", "float32", {"batch": 256}),
        (memory.TRAINING, "fit, batch 4,096, fp32", "float32", {"batch": 4096}),
        (memory.TRAINING, "fit, batch 256, bf16", "bfloat16", {"batch": 256}),
        (memory.INFERENCE, "inference of the encoder, 65,536 rows, fp32", "float32", {}),
    ):
        peers = (ADAM, FUSED_ADAM) if mode == memory.TRAINING else (stacks.EAGER,)
        found = [find(WITHOUT, "memory", peer, ON[1], mode, dtype, **sizes) for peer in peers]
        values = [found[0]["ours"], *(one["theirs"] for one in found)]
        yield row(name, *(f"{value['median']:.1f}" for value in values), *[""] * (3 - len(values)))


class Table(NamedTuple):
    """file: of the repository. header, first: the table's first line, and how its first row begins. rows: all."""

    file: str
    header: str
    first: str
    rows: Callable[[], Iterator[str]]

    def around(self) -> tuple[str, str]:
        """The text of the file before the table's rows and from their end on."""
        text = (ROOT / self.file).read_text()
        lines = text.split("\n")
        begin = next(i for i in range(2, len(lines)) if lines[i - 2] == self.header and lines[i].startswith(self.first))
        end = next(i for i in range(begin, len(lines)) if not lines[i].startswith("|"))
        return "\n".join(lines[:begin]), "\n".join(lines[end:])

    def with_rows(self) -> str:
        before, after = self.around()
        return "\n".join([before, *self.rows(), after])


PERFORMANCE = "docs/performance.md"
ROWS_HEADER = row("rows", "1", "32", "256", "4,096", "65,536")
TABLES = {
    "fit": Table(
        "README.md",
        row("against", "100 in, batch 32", "784 in, batch 256", "784 in, batch 4,096"),
        "| eager, Adam |",
        lambda: fits(WITH_AVX512, ON[:1]),
    ),
    "fit without AVX-512": Table(
        "README.md",
        row("against", "100 in, batch 32, 1 thread", ON[1], f"784, 256, {ON[0]}", ON[1], f"784, 4,096, {ON[0]}", ON[1]),
        "| eager, Adam |",
        lambda: fits(WITHOUT, ON),
    ),
    "step": Table(
        "README.md",
        row("", "on", "100 in, batch 32", "784 in, batch 32", "784 in, batch 256", "784 in, batch 4,096"),
        "| Trainer, against eager, Adam |",
        steps,
    ),
    "fuse": Table(
        "README.md",
        row(
            "",
            "batch",
            *("inference: fuse", "`torch.compile`", 'its `backend="fastenc"`'),
            *("forward + backward: fuse", "`torch.compile`", 'its `backend="fastenc"`'),
        ),
        "| recommender",
        fused_models,
    ),
    "encoder": Table(PERFORMANCE, ROWS_HEADER, "| inference, 1 thread |", encoders),
    "scaling by batch": Table(
        PERFORMANCE,
        row("encoder 100-128-64-32-16, rows", "1", "16", "256", "4,096", "65,536", "2^20"),
        "| inference",
        batches,
    ),
    "scaling by width": Table(
        PERFORMANCE,
        row("3 layers and back, width", *map(str, scaling.WIDTHS[:-1]), "1,024"),
        "| a step",
        lambda: curve(scaling.BY_WIDTH, "width", scaling.WIDTHS, "a step"),
    ),
    "scaling by depth": Table(
        PERFORMANCE,
        row("width 128 and back, depth", *map(str, scaling.DEPTHS)),
        "| a step",
        lambda: curve(scaling.BY_DEPTH, "depth", scaling.DEPTHS, "a step"),
    ),
    "scaling by rows": Table(
        PERFORMANCE,
        row("an epoch over a .npy map, rows", *(f"{rows:,}" for rows in scaling.DATA)),
        "| us a step",
        maps,
    ),
    "limits": Table(
        PERFORMANCE, row("", "wanted", "measured", "share of the peak", "at the whole peak"), "| step,", limits
    ),
    "memory": Table(PERFORMANCE, row("", "ours", ADAM, FUSED_ADAM), "| fit, batch 256, fp32 |", peaks_of_memory),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_that_of_the_record(name: str) -> None:
    table = TABLES[name]
    assert (ROOT / table.file).read_text() == table.with_rows(), (
        "the records and the document differ: python tests/test_recorded_tables.py --write"
    )


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    for table in TABLES.values():
        (ROOT / table.file).write_text(table.with_rows())

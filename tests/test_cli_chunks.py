"""Commands on files larger than memory: the same bits as of the whole file, and memory that does not grow with it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from test_cli import fail, succeed

import fastenc
from fastenc import chunked, measured
from fastenc.data import Preprocessor, chunks, tables
from fastenc.pipeline import in_pieces

TRAIN = ["--target", "label", "--widths", "16,4", "--epochs", "2", "--dropout", "0.1"]


def make_table(rows=700):
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "age": random.normal(40, 10, rows),
            "children": random.integers(0, 5, rows).astype(float),
            "colour": random.choice(["red", "green", "blue"], rows),
            "label": random.choice(["a", "b"], rows),
        }
    )
    frame.loc[random.choice(rows, 60, replace=False), "age"] = np.nan
    frame.loc[range(200, 300), "age"] = np.nan  # whole chunks of which nothing is left where rows are dropped
    frame.loc[:250, "colour"] = frame["colour"][:251].where(frame["colour"] != "blue", "red")
    return frame


def run_all(folder, data, missing):
    """All that train, encode and evaluate write."""
    folder.mkdir()
    succeed("train", data, "--out", folder / "model", *TRAIN, "--missing", missing)
    for ending in ("npy", "csv", "parquet"):
        succeed("encode", folder / "model", data, "-o", folder / f"v.{ending}")
    succeed("evaluate", folder / "model", data, "--json", folder / "e.json")
    written = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    written["e.json"] = written["e.json"].replace(str(folder).encode(), b"")
    written["v.parquet"] = pd.read_parquet(folder / "v.parquet").to_numpy().tobytes()
    return written


@pytest.mark.parametrize("missing", ["impute", "drop"])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_chunks_change_no_bit(tmp_path, monkeypatch, ending, missing):
    data = tmp_path / f"data.{ending}"
    make_table().to_csv(data, index=False) if ending == "csv" else make_table().to_parquet(data, row_group_size=90)
    whole = run_all(tmp_path / "whole", data, missing)
    monkeypatch.setattr(tables, "_BLOCK", 2_000)
    monkeypatch.setattr(chunks, "_CHUNK_VALUES", 200)  # 50 rows
    monkeypatch.setattr(chunked, "IN_MEMORY", 1_000)
    pieces = run_all(tmp_path / "pieces", data, missing)
    assert whole.keys() == pieces.keys()
    assert [name for name in whole if whole[name] != pieces[name]] == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_rows_in_pieces():
    blocks = [np.full((rows, 2), rows) for rows in (3, 0, 10, 1, 1, 5)]
    pieces = list(in_pieces(blocks, 4))
    assert [len(piece) for piece in pieces] == [4, 4, 4, 4, 4]
    assert np.array_equal(np.concatenate(pieces), np.concatenate(blocks))
    assert [len(piece) for piece in in_pieces(blocks[:3], 5)] == [5, 5, 3]


def test_of_many_rows_some_are_measured(tmp_path, monkeypatch):
    data = tmp_path / "data.csv"
    make_table().to_csv(data, index=False)
    succeed("train", data, "--out", tmp_path / "model", *TRAIN)
    monkeypatch.setattr(measured, "MAX_VALUES", 1_500)  # of 700 rows with 5 features 300
    output = succeed("evaluate", tmp_path / "model", data)
    assert "Scored on the 70 rows that were held out" in output
    assert "For memory's sake 270 and 30 of them are taken, chosen at random" in output
    assert "Accuracy from" in output


def test_faults_name_the_row_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNK_VALUES", 200)
    frame = make_table()
    data = tmp_path / "data.parquet"
    frame["age"] = 1.0
    frame.loc[600, "age"] = np.nan
    frame.to_parquet(data)
    assert "(row 600, counted from 0)" in fail("train", data, "--out", tmp_path / "m", *TRAIN, "--missing", "error")
    x = np.ones((60, 5), np.float32)
    x[50, 1] = np.inf
    np.save(tmp_path / "x.npy", x)
    fastenc.Encoder(5, (2,)).save_pretrained(tmp_path / "plain")
    error = fail("encode", tmp_path / "plain", tmp_path / "x.npy", "-o", tmp_path / "v.npy")
    assert "x.npy: in rows 40 to 59: the data has NaN or Inf in 1 of 20 rows (row 10" in error


def test_a_full_disk_ends_training_in_one_sentence(tmp_path, monkeypatch):
    class Full:
        def write(self, block):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunked.tempfile, "TemporaryFile", lambda dir: Full())
    monkeypatch.setattr(chunked, "IN_MEMORY", 1_000)
    make_table().to_csv(tmp_path / "data.csv", index=False)
    error = fail("train", tmp_path / "data.csv", "--out", tmp_path / "model", *TRAIN)
    assert f"{tmp_path}: No space left on device; the prepared rows take" in error
    assert not (tmp_path / "model").exists()


# argv: a small file, a large one, a folder, bytes. All commands on the first; then on the second, where memory cannot
# grow by as many bytes.
IN_LITTLE_MEMORY = """
import resource, sys, typer.testing
from fastenc import cli, chunked, measured
from fastenc.data import chunks, learning, tables

# What is kept is bounded by these, by hundreds of megabytes; less will do for a file that is soon written.
tables._BLOCK, chunks._CHUNK_VALUES, chunked.IN_MEMORY, measured.MAX_VALUES = 1 << 20, 1 << 18, 1 << 20, 1 << 19
learning.KEPT_VALUES = 1 << 18

def run(*arguments):
    result = typer.testing.CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)

def run_all(data, folder):
    run("train", data, "--out", folder, "--widths", "2", "--epochs", "1", "--batch-size", "512")
    run("encode", folder, data, "-o", folder + "/../codes.npy")
    run("evaluate", folder, data)

run_all(sys.argv[1], sys.argv[3] + "/small")
with open("/proc/self/status") as file:
    now = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + int(sys.argv[4]),) * 2)
run_all(sys.argv[2], sys.argv[3] + "/large")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is looked up in /proc")
@pytest.mark.parametrize("ending", ["csv", "parquet", "npy"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    rows, columns = 200_000, 64
    for name, count in (("small", 20_000), ("large", rows)):
        x = np.random.default_rng(0).integers(0, 100, (count, columns), np.uint8)
        table = pa.table({f"c{column}": x[:, column] for column in range(columns)})
        path = tmp_path / f"{name}.{ending}"
        if ending == "csv":
            pyarrow.csv.write_csv(table, path)
        elif ending == "parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=10_000)
        else:
            np.save(path, x.astype(np.float32))
    allowed = rows * columns * 4 // 2  # half of what the prepared rows take, and less than any file but the Parquet's
    files = [str(tmp_path / f"{name}.{ending}") for name in ("small", "large")]
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, *files, str(tmp_path), str(allowed)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert np.load(tmp_path / "codes.npy", mmap_mode="r").shape == (rows, 2)


def test_learned_from_the_same_rows_as_fit(tmp_path):
    make_table().to_csv(tmp_path / "data.csv", index=False)
    frame = pd.read_csv(tmp_path / "data.csv").drop(columns="label")
    succeed("train", tmp_path / "data.csv", "--out", tmp_path / "model", *TRAIN, "--validation-split", 0)
    assert fastenc.load_preprocessing(tmp_path / "model") == Preprocessor().fit(frame).to_dict()

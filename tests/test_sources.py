"""load: every source gives the same rows, and every failure is one sentence that names the file and the cure."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fastenc.data import DataError, as_rows, load, sources
from fastenc.data.extras import require


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture
def parquet(tmp_path) -> Path:
    path = tmp_path / "x.parquet"
    pd.DataFrame({"a": [1.0, 2.0], "b": [3, 4], "label": ["x", "y"]}).to_parquet(path)
    return path


def test_digits():
    data = load("digits")
    assert data.name == "digits"
    assert len(data) == 1797
    assert data.features.shape == (1797, 64)
    assert data.target.dtype == np.int64
    assert set(data.target) == set(range(10))


@pytest.mark.parametrize("kind", ["csv", "parquet", "DataFrame", "Arrow Table"])
def test_table_with_target(tmp_path, parquet, kind):
    source = {
        "csv": write(tmp_path / "x.csv", b"a,b,label\n1.0,3,x\n2.0,4,y\n"),
        "parquet": parquet,
        "DataFrame": pd.read_parquet(parquet),
        "Arrow Table": pq.read_table(parquet),
    }[kind]
    data = load(source, target="label")
    assert list(data.features.columns) == ["a", "b"]
    assert as_rows(data.features).tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert data.target.tolist() == ["x", "y"]
    assert list(load(source).features.columns) == ["a", "b", "label"]
    assert load(source).target is None


@pytest.mark.parametrize("source", [[[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]])])
def test_array_in_memory(source):
    data = load(source)
    assert isinstance(data.features, np.ndarray)
    assert as_rows(data.features).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert data.target is None


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_a_read_only_map(tmp_path, order):
    values = np.arange(6.0).reshape(3, 2)
    np.save(tmp_path / "x.NPY.npy", np.asarray(values, order=order))
    data = load(tmp_path / "x.NPY.npy")
    assert isinstance(data.features, np.memmap)
    assert not data.features.flags.writeable
    assert np.array_equal(data.features, values)


def test_csv_details(tmp_path):
    content = '\ufeffa,b c,d\r\n 1, 2.5,"x, y\nz"\r\n\r\n,NA,\r\n3,inf,NaN\r\n'.encode()
    frame = load(write(tmp_path / "X.CSV", content)).features
    assert list(frame.columns) == ["a", "b c", "d"]
    assert frame["a"].isna().tolist() == [False, True, False]
    assert frame["b c"].tolist()[::2] == [2.5, float("inf")]
    assert frame["d"].isna().tolist() == [False, True, True]
    assert frame["d"][0] == "x, y\nz"


def test_quoted_line_breaks_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CSV_BLOCK", 64)
    texts = [f"{'x' * n}\n{n},\n{'y' * n}" for n in range(20)]
    pd.DataFrame({"n": range(20), "text": texts}).to_csv(tmp_path / "x.csv", index=False)
    frame = load(tmp_path / "x.csv").features
    assert frame["n"].tolist() == list(range(20))
    assert frame["text"].tolist() == texts


def test_header_of_numbers_that_count_up_is_a_header(tmp_path):
    pd.DataFrame(np.ones((2, 3))).to_csv(tmp_path / "x.csv", index=False)
    assert load(tmp_path / "x.csv").features.shape == (2, 3)


TARGETS = {
    "int": ([1, 2], np.int64),
    "nullable int": (pd.array([1, 2], "Int64"), np.int64),
    "float": ([1.5, 2.0], np.float64),
    "bool": ([True, False], np.bool_),
    "text": (["x", "y"], np.object_),
    "category": (pd.Categorical(["x", "y"]), np.object_),
}


@pytest.mark.parametrize(("values", "dtype"), TARGETS.values(), ids=TARGETS)
def test_target_dtype(values, dtype):
    target = load(pd.DataFrame({"a": [0, 0], "y": values}), target="y").target
    assert target.dtype == dtype
    assert target.tolist() == list(values)


BROKEN = {
    "empty.csv": (b"", "is empty"),
    "empty.parquet": (b"", "is empty"),
    "empty.npy": (b"", "is empty"),
    "blank.csv": (b"\n\n", "blank lines"),
    "header.csv": (b"a,b\n", "no rows"),
    "header_only.csv": (b"a,b", "a header and no rows"),
    "short.csv": (b"a,b\n1,2\n3\n", "1 field in line 3 and 2 in its header"),
    "long.csv": (b"a,b\n1,2\n3,4,5\n", "3 fields in line 3 and 2 in its header"),
    "quote.csv": (b'a,b\n"x,1\n3,4\n', "1 field in line 3"),
    "twice.csv": (b"a,b,a\n1,2,3\n", "two columns called 'a'"),
    "unnamed.csv": (b",a\n0,1\n", "column 0 of .* has no name"),
    "semicolons.csv": (b"a;b\n1;2\n", "separated by ';'; save it with commas"),
    "latin.csv": (b"a,b\ncaf\xe9,1\n", "column 'a' of .* is not UTF-8"),
    "latin_header.csv": (b"\xe9,b\n1,2\n", "is not UTF-8"),
    "headless.csv": (b"0.5,1\n1,2\n", "begins with numbers where the column names should be"),
    "text.parquet": (b"hello" * 10, "is not Parquet, or is cut short or broken"),
    "text.npy": (b"hello" * 10, "is not a .npy file"),
    "pickle.npy": (pickle.dumps([1, 2]), "is not a .npy file"),
    "data.xlsx": (b"x", r"ends in .xlsx; the known endings are \.csv, \.parquet or \.npy"),
    "data": (b"x", "ends in nothing"),
}


@pytest.mark.parametrize(("name", "content", "message"), [(k, *v) for k, v in BROKEN.items()], ids=BROKEN)
def test_broken_file(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load(write(tmp_path / name, content))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


ARRAYS = {
    "objects": (np.array([[1, None]], object), "pickled Python objects"),
    "1-D": (np.ones(3), "1 dimension"),
    "3-D": (np.ones((3, 2, 2)), "3 dimensions"),
    "no rows": (np.ones((0, 2)), "no rows"),
    "complex": (np.ones((3, 2)) + 1j, "complex"),
    "text": (np.array([["a"]]), "text such as 'a'"),
}


@pytest.mark.parametrize(("array", "message"), ARRAYS.values(), ids=ARRAYS)
def test_npy_that_is_not_rows_of_numbers(tmp_path, array, message):
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "bad.npy")
    assert "bad.npy" in str(caught.value)


@pytest.mark.parametrize("kept", [8, 20, 100, -1])
def test_truncated_npy(tmp_path, kept):
    np.save(tmp_path / "x.npy", np.ones((4, 5)))
    write(tmp_path / "x.npy", (tmp_path / "x.npy").read_bytes()[:kept])
    with pytest.raises(DataError, match=r"x\.npy is cut short or broken"):
        load(tmp_path / "x.npy")


def test_archive_with_the_ending_of_an_array(tmp_path):
    np.savez(tmp_path / "x.npz", np.ones((2, 2)))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(DataError, match=r"x\.npy is not a \.npy file"):
        load(tmp_path / "x.npy")


@pytest.mark.parametrize("kept", [4, 100, -10, -1])
def test_truncated_parquet(parquet, kept):
    write(parquet, parquet.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"x\.parquet is not Parquet, or is cut short or broken"):
        load(parquet)


def test_flipped_bits_in_parquet(parquet):
    content = bytearray(parquet.read_bytes())
    content[10] ^= 0xFF
    write(parquet, bytes(content))
    with pytest.raises(DataError, match=r"x\.parquet is not Parquet, or is cut short or broken"):
        load(parquet)


def test_parquet_with_one_name_twice(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet has two columns called 'a'"):
        load(tmp_path / "x.parquet")


def test_no_such_file_and_folder(tmp_path):
    with pytest.raises(DataError, match=r'no such file: .*nope\.csv; .*\.csv, \.parquet or \.npy, or "digits"'):
        load(tmp_path / "nope.csv")
    with pytest.raises(DataError, match="is a folder"):
        load(tmp_path)


def test_target_that_cannot_be(tmp_path):
    wide = pd.DataFrame({f"c{i}": [1, 2] for i in range(12)})
    with pytest.raises(DataError, match=r"no column 'label' .* its columns are c0, .*, c9, \.\.\.$"):
        load(wide, target="label")
    with pytest.raises(DataError, match="no column besides the target"):
        load(pd.DataFrame({"y": [1]}), target="y")
    with pytest.raises(DataError, match=r"column 'y' of the table has no value in 1 of 2 rows \(row 1"):
        load(pd.DataFrame({"a": [1, 2], "y": ["x", None]}), target="y")
    with pytest.raises(DataError, match="holds datetime64 values"):
        load(pd.DataFrame({"a": [1], "y": pd.to_datetime(["2020-01-01"])}), target="y")
    with pytest.raises(DataError, match="array without column names"):
        load(np.ones((2, 2)), target="y")
    with pytest.raises(DataError, match="its own labels"):
        load("digits", target="y")


def test_missing_extra_names_the_cure():
    with pytest.raises(
        ModuleNotFoundError, match=r'reading tables needs no_such_module; run: pip install "fastenc\[app\]"'
    ):
        require("no_such_module", "reading tables")


def test_import_is_light():
    # torch itself imports some of them where it finds them, tqdm for one.
    code = """
import sys, torch
before = set(sys.modules)
import fastenc.data
print({"pandas", "pyarrow", "sklearn", "scipy", "matplotlib", "typer", "tqdm"} & (set(sys.modules) - before))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"

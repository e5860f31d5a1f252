"""Vectors read back as they were, and files that are whole or not there."""

import numpy as np
import pandas as pd
import pytest

from fastenc.data import DataError
from fastenc.vectors import ENDINGS, check_output, rows_file, write_row_numbers, write_vectors

READERS = {".npy": np.load, ".csv": pd.read_csv, ".parquet": pd.read_parquet}


def test_every_ending_has_a_reader_here():
    assert set(READERS) == set(ENDINGS)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("sizes", [(1,), (3, 4, 1), (1000, 999)])
def test_chunks_read_back_bit_for_bit(tmp_path, ending, sizes):
    chunks = [np.random.default_rng(size).normal(size=(size, 5)).astype(np.float32) for size in sizes]
    path = tmp_path / f"vectors{ending}"
    assert write_vectors(path, iter(chunks)) == (sum(sizes), 5)
    vectors = READERS[ending](path)
    if ending != ".npy":
        assert list(vectors.columns) == ["code_0", "code_1", "code_2", "code_3", "code_4"]
    np.testing.assert_array_equal(np.asarray(vectors, np.float32), np.concatenate(chunks))
    assert list(tmp_path.iterdir()) == [path]


def test_npy_is_what_numpy_would_have_written_for_memory_maps(tmp_path):
    write_vectors(tmp_path / "vectors.npy", iter([np.ones((2, 3), np.float32), np.zeros((70_000, 3), np.float32)]))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    assert mapped.shape == (70_002, 3)
    assert mapped.dtype == np.float32
    assert mapped[:2].sum() == 6
    assert mapped[2:].sum() == 0


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_failure_half_way_leaves_the_old_file(tmp_path, ending):
    def chunks():
        yield np.ones((2, 3), np.float32)
        raise RuntimeError("half way")

    path = tmp_path / f"vectors{ending}"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"):
        write_vectors(path, chunks())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_row_numbers(tmp_path):
    write_row_numbers(tmp_path / "vectors.csv", np.array([0, 2, 5]))
    assert rows_file(tmp_path / "vectors.csv") == tmp_path / "vectors.rows.npy"
    rows = np.load(tmp_path / "vectors.rows.npy")
    assert rows.dtype == np.int64
    assert rows.tolist() == [0, 2, 5]


def test_refusals(tmp_path):
    with pytest.raises(DataError, match=r"\.npy, \.csv, \.parquet"):
        check_output(tmp_path / "vectors.txt")
    with pytest.raises(DataError, match="does not exist"):
        check_output(tmp_path / "no" / "vectors.npy")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        check_output(tmp_path / "folder.npy")

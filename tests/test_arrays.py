"""as_rows and as_target: arrays of every kind in, checked tensors out."""

from __future__ import annotations

import decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from fastenc.data import DataError, as_rows, as_target

VALUES = np.arange(6.0).reshape(3, 2)
EXPECTED = torch.arange(6.0).reshape(3, 2)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


def misaligned(array: np.ndarray) -> np.ndarray:
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    out = buffer[1:].view(array.dtype).reshape(array.shape)
    out[:] = array
    return out


SAME_VALUES = {
    "float64": VALUES,
    "float32": VALUES.astype(np.float32),
    "float16": VALUES.astype(np.float16),
    "long double": VALUES.astype(np.longdouble),
    "big-endian float32": VALUES.astype(">f4"),
    "big-endian float64": VALUES.astype(">f8"),
    "big-endian int16": VALUES.astype(">i2"),
    "int64": VALUES.astype(np.int64),
    "uint8": VALUES.astype(np.uint8),
    "uint64": VALUES.astype(np.uint64),
    "read-only float32": read_only(VALUES.astype(np.float32)),
    "transposed": np.ascontiguousarray(VALUES.T).T,
    "reversed": np.ascontiguousarray(VALUES[::-1])[::-1],
    "strided": np.repeat(VALUES, 2, axis=1).astype(np.float32)[:, ::2],
    "misaligned": misaligned(VALUES.astype(np.float32)),
    "nested list": VALUES.tolist(),
    "list of ints": VALUES.astype(int).tolist(),
    "list of tensors": list(EXPECTED),
    "torch float64": torch.from_numpy(VALUES),
    "torch bfloat16": EXPECTED.bfloat16(),
    "torch with grad": EXPECTED.clone().requires_grad_(),
    "torch transposed": EXPECTED.T.contiguous().T,
    "DataFrame": pd.DataFrame(VALUES, columns=["a", "b"]),
    "DataFrame, one name twice": pd.DataFrame(VALUES, columns=["a", "a"]),
    "DataFrame of nullable types": pd.DataFrame(
        {"a": pd.array([0, 2, 4], "Int64"), "b": pd.array([1.0, 3.0, 5.0], "Float64")}
    ),
    "DataFrame of Arrow types": pd.DataFrame({"a": pd.array([0, 2, 4], "int64[pyarrow]"), "b": [1.0, 3.0, 5.0]}),
    "Arrow Table": pa.table({"a": [0, 2, 4], "b": [1.0, 3.0, 5.0]}),
    "Arrow Table of decimals": pa.table({"a": [0, 2, 4], "b": [decimal.Decimal(n) for n in (1, 3, 5)]}),
    "Arrow RecordBatch": pa.record_batch({"a": [0, 2, 4], "b": [1.0, 3.0, 5.0]}),
}


@pytest.mark.parametrize("x", SAME_VALUES.values(), ids=SAME_VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_same_values_from_every_kind(x, dtype):
    rows = as_rows(x, dtype=dtype)
    assert rows.dtype == dtype
    assert rows.is_contiguous()
    assert not rows.requires_grad
    assert torch.equal(rows, EXPECTED.to(dtype))


@pytest.mark.parametrize(
    "x",
    [
        np.array([[True, False]]),
        torch.tensor([[True, False]]),
        [[True, False]],
        pd.DataFrame({"a": [True], "b": [False]}),
        pd.DataFrame({"a": pd.array([True], "boolean"), "b": pd.array([False], "boolean")}),
        pa.table({"a": [True], "b": [False]}),
    ],
    ids=lambda x: type(x).__name__,
)
def test_booleans_are_zero_and_one(x):
    assert as_rows(x).tolist() == [[1.0, 0.0]]


def test_memory_is_shared_where_it_can_be_and_when_read_only_if_asked_to():
    array = VALUES.astype(np.float32)
    assert as_rows(array).data_ptr() == array.ctypes.data
    tensor = EXPECTED.clone()
    assert as_rows(tensor).data_ptr() == tensor.data_ptr()
    frozen = read_only(array)
    as_rows(frozen).zero_()
    assert np.array_equal(frozen, VALUES)
    assert as_rows(frozen, writable=False).data_ptr() == frozen.ctypes.data
    assert as_target(frozen, 3, writable=False).data_ptr() == frozen.ctypes.data
    assert torch.equal(as_rows(read_only(VALUES), writable=False), EXPECTED)  # of another dtype: copied


def test_rows_that_are_not_finite_are_found_in_every_part(monkeypatch):
    monkeypatch.setattr("fastenc.data.arrays._PART", 4)
    x = np.zeros((7, 2), np.float32)
    x[[1, 2, 6], [0, 1, 1]] = np.nan, np.inf, -np.inf
    with pytest.raises(DataError, match=r"3 of 7 rows \(row 1, 2, 6, counted from 0\)"):
        as_rows(x)
    with pytest.raises(DataError, match=r"2 of 7 rows \(row 2, 6, counted from 0\)"):
        as_target(x[:, 1], 7)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_memory_map(tmp_path, mode):
    np.save(tmp_path / "x.npy", VALUES.astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode=mode)
    assert torch.equal(as_rows(mapped), EXPECTED)
    assert torch.equal(as_rows(mapped[1:]), EXPECTED[1:])


NULLS = {
    "nullable": pd.DataFrame(
        {
            "a": pd.array([1, None], "Int64"),
            "b": pd.array([1.5, None], "Float64"),
            "c": pd.array([True, None], "boolean"),
        }
    ),
    "Arrow types": pd.DataFrame(
        {"a": pd.array([1, None], "int64[pyarrow]"), "b": [1.5, None], "c": pd.array([True, None], "bool[pyarrow]")}
    ),
    "Arrow Table": pa.table({"a": [1, None], "b": [1.5, None], "c": [True, None]}),
}


@pytest.mark.parametrize("x", NULLS.values(), ids=NULLS)
def test_nulls_are_nan(x):
    rows = as_rows(x, finite=False)
    assert rows[0].tolist() == [1.0, 1.5, 1.0]
    assert rows[1].isnan().all()
    with pytest.raises(DataError, match=r"1 of 2 rows \(row 1, counted from 0\)"):
        as_rows(x)


def test_rows_with_nan_or_inf_are_counted_and_listed():
    x = np.zeros((20, 3))
    x[3, 1] = np.nan
    x[[5, 7, 9, 11, 13], 0] = np.inf
    with pytest.raises(DataError) as caught:
        as_rows(x, name="data.csv")
    assert str(caught.value) == (
        "data.csv has NaN or Inf in 6 of 20 rows (row 3, 5, 7, 9, 11, ..., counted from 0); fill them in with "
        'Preprocessor(missing="impute") or leave those rows out with Preprocessor(missing="drop")'
    )
    assert torch.equal(as_rows(x, finite=False).isfinite(), torch.from_numpy(np.isfinite(x)))


REFUSED = {
    "1-D": (np.ones(3), r"1 dimension where .* x\.reshape\(-1, 1\) .* x\[None\]"),
    "1-D list": ([1, 2], r"x\.reshape\(-1, 1\)"),
    "Series": (pd.Series([1, 2]), r"x\.reshape\(-1, 1\)"),
    "0-D": (torch.tensor(1.0), "0 dimensions"),
    "3-D": (np.ones((4, 2, 2)), r"3 dimensions, \[4, 2, 2\].*x\.reshape\(4, -1\)"),
    "no rows": (np.ones((0, 3)), "no rows"),
    "no rows, list": ([], "no rows"),
    "no rows, table": (pd.DataFrame({"a": []}), "no rows"),
    "no columns": (np.ones((3, 0)), "no columns"),
    "text": (np.array([["1", "2"]]), "column 0 of x holds text such as '1'.*Preprocessor"),
    "text in a list": ([[1, "red"]], "column 1 of x holds text such as 'red'.*Preprocessor"),
    "None in a list": ([[1, None]], "column 1 of x holds NoneType"),
    "numbers as objects": (np.array([[1, 2.5]], object), r"x\.astype\(float\)"),
    "ragged": ([[1, 2], [3]], "different lengths"),
    "complex": (VALUES + 1j, "complex"),
    "complex tensor": (EXPECTED.to(torch.complex64), "complex"),
    "complex column": (pd.DataFrame({"a": [1j]}), "column 'a' of x is complex"),
    "text column": (pd.DataFrame({"a": [1], "city": ["Rome"]}), "column 'city' of x holds .*Preprocessor"),
    "category column": (pd.DataFrame({"a": pd.Categorical([1, 2])}), "column 'a' of x holds category.*Preprocessor"),
    "date column": (pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}), "column 'when' of x holds dates"),
    "Arrow text column": (pa.table({"city": ["Rome"]}), "column 'city' of x holds string.*Preprocessor"),
    "Arrow date column": (pa.table({"t": pa.array([0], pa.timestamp("s"))}), "column 't' of x holds dates"),
    "dates": (np.zeros((2, 2), "M8[D]"), "dates"),
    "a path": ("data.csv", "type str"),
    "None": (None, "type NoneType"),
    "a number": (3.0, "type float"),
    "sparse": (torch.eye(2).to_sparse(), "sparse"),
    "meta": (torch.ones(2, 2, device="meta"), "meta"),
}


@pytest.mark.parametrize(("x", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(x, message):
    with pytest.raises(DataError, match=message):
        as_rows(x)


def test_number_of_columns():
    assert as_rows(VALUES, features=2).shape == (3, 2)
    with pytest.raises(DataError, match="x has 2 columns where 64 are expected"):
        as_rows(VALUES, features=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_rows_whose_sum_overflows_are_taken(dtype):
    largest = torch.finfo(dtype).max
    x = torch.full((600, 2000), largest, dtype=dtype)  # more than is looked at at a time
    assert torch.equal(as_rows(x, dtype=dtype), x)
    x[1], x[2] = -largest, 0.0
    x[1, 7], x[555, 9] = float("inf"), float("nan")
    with pytest.raises(DataError, match=r"2 of 600 rows \(row 1, 555, counted from 0\)"):
        as_rows(x, dtype=dtype)


@pytest.mark.parametrize(
    "x",
    [
        np.array([[1.0], [1e300]]),
        torch.tensor([[1.0], [1e300]], dtype=torch.float64),
        pd.DataFrame({"a": [1.0, 1e300]}),
    ],
    ids=lambda x: type(x).__name__,
)
def test_overflow_is_reported_even_if_inf_is_allowed(x):
    with pytest.raises(DataError, match=r"1 value too large for float32, the first 1e\+300 in row 1"):
        as_rows(x, finite=False)
    assert as_rows(x, dtype=torch.float64)[1].item() == 1e300


def test_inf_that_was_inf_is_no_overflow():
    assert as_rows(np.array([[np.inf, 1.0]]), finite=False).tolist() == [[float("inf"), 1.0]]


TARGETS = {
    "ints": ([1, 0, 2], torch.int64, [1, 0, 2]),
    "bools": (np.array([True, False, True]), torch.int64, [1, 0, 1]),
    "uint8": (np.array([1, 0, 2], np.uint8), torch.int64, [1, 0, 2]),
    "big-endian ints": (np.array([1, 0, 2], ">i4"), torch.int64, [1, 0, 2]),
    "read-only ints": (read_only(np.array([1, 0, 2])), torch.int64, [1, 0, 2]),
    "tensor": (torch.tensor([1, 0, 2]), torch.int64, [1, 0, 2]),
    "Series": (pd.Series([1, 0, 2]), torch.int64, [1, 0, 2]),
    "nullable Series": (pd.Series([1, 0, 2], dtype="Int64"), torch.int64, [1, 0, 2]),
    "Arrow": (pa.chunked_array([[1, 0], [2]]), torch.int64, [1, 0, 2]),
    "floats": (np.array([1.5, 0, 2]), torch.float32, [1.5, 0.0, 2.0]),
    "float columns": (np.array([[1.5], [0], [2]]), torch.float32, [[1.5], [0.0], [2.0]]),
    "int columns": ([[1, 2], [0, 1], [2, 0]], torch.float32, [[1.0, 2.0], [0.0, 1.0], [2.0, 0.0]]),
    "DataFrame": (pd.DataFrame({"a": [1.5, 0, 2]}), torch.float32, [[1.5], [0.0], [2.0]]),
}


@pytest.mark.parametrize(("y", "dtype", "values"), TARGETS.values(), ids=TARGETS)
def test_target(y, dtype, values):
    target = as_target(y, 3)
    assert target.dtype == dtype
    assert target.is_contiguous()
    assert target.tolist() == values


REFUSED_TARGETS = {
    "row count": ([1, 2], r"y has shape \[2\] and x has 3 rows"),
    "3-D": (np.ones((3, 1, 1)), r"y has shape \[3, 1, 1\]"),
    "text": (np.array(["a", "b", "a"]), r"text such as 'a'.*np\.unique\(y, return_inverse=True\)\[1\]"),
    "text Series": (pd.Series(["a", "b", "a"]), r"text such as 'a'.*np\.unique"),
    "NaN": ([1.0, float("nan"), 2.0], r"y has NaN or Inf in 1 of 3 rows \(row 1"),
    "null": (pd.Series([1, None, 2], dtype="Int64"), r"y has NaN or Inf in 1 of 3 rows \(row 1"),
    "overflow": ([1.0, 1e300, 2.0], "y holds 1 value too large for float32"),
    "huge labels": (np.array([1, 2, 2**63], np.uint64), "largest int64"),
    "a number": (5, "type int"),
}


@pytest.mark.parametrize(("y", "message"), REFUSED_TARGETS.values(), ids=REFUSED_TARGETS)
def test_refuses_target(y, message):
    with pytest.raises(DataError, match=message):
        as_target(y, 3)


def test_arguments_are_never_written_to():
    for x in (VALUES.copy(), VALUES.astype(np.float32), VALUES.astype(">f4")):
        before = x.tobytes()
        as_rows(x)
        as_target(x, 3)
        assert x.tobytes() == before

"""Preprocessor: what it learns, what it makes of it, and that what was saved gives the same bits."""

from __future__ import annotations

import copy
import json
import tracemalloc
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from fastenc.data import DataError, Preprocessor, learned, preprocessing, steps

NAN, INF = float("nan"), float("inf")
HOLES = np.array([[1.0, 2.0], [3.0, NAN], [5.0, INF], [9.0, 4.0]])


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "n": [1.0, 2.0, None, 4.0],
            "city": ["Rome", None, "Oslo", "Rome"],
            "yes": [True, False, True, True],
            "i": pd.array([1, None, 3, 5], "Int64"),
            "flag": pd.array([True, None, False, True], "boolean"),
            "size": pd.Categorical(["S", "L", None, "S"]),
            "price": [Decimal(1), None, Decimal("2.5"), Decimal(3)],
        }
    )


def saved(preprocessor: Preprocessor) -> Preprocessor:
    return Preprocessor.from_dict(json.loads(json.dumps(preprocessor.to_dict(), allow_nan=False)))


@pytest.mark.parametrize(("scale", "scaler"), [("standard", StandardScaler()), ("minmax", MinMaxScaler())])
def test_is_scikit_learns_pipeline(scale, scaler):
    rng = np.random.default_rng(0)
    train, test = rng.normal(5, 3, (200, 7)), rng.normal(5, 3, (50, 7))
    train[rng.random(train.shape) < 0.1] = NAN
    test[rng.random(test.shape) < 0.1] = NAN
    expected = make_pipeline(SimpleImputer(strategy="median"), scaler).fit(train).transform(test)
    prepared = Preprocessor(scale=scale).fit(train).transform(test)
    assert prepared.x.dtype == np.float32
    assert np.array_equal(prepared.x, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("missing", "rows", "x"),
    [
        ("impute", [0, 1, 2, 3], [[1, 2], [3, 3], [5, 3], [9, 4]]),
        ("drop", [0, 3], [[1, 2], [9, 4]]),
    ],
)
def test_missing_numbers(missing, rows, x):
    prepared = Preprocessor(missing, "none").fit(HOLES).transform(HOLES)
    assert prepared.x.tolist() == x
    assert prepared.rows.tolist() == rows
    assert prepared.rows.dtype == np.int64
    assert prepared.dropped == 4 - len(rows)


def test_missing_is_refused_where_asked():
    with pytest.raises(DataError, match=r'2 of 4 rows \(row 1, 2, counted from 0\); use missing="impute"'):
        Preprocessor("error").fit(HOLES)
    fitted = Preprocessor("error").fit(HOLES[[0, 3]])
    with pytest.raises(DataError, match=r"1 of 2 rows \(row 1"):
        fitted.transform(HOLES[:2])
    with pytest.raises(DataError, match="1 of 2 rows"):
        saved(fitted).transform(HOLES[:2])
    assert saved(fitted).transform(HOLES[:1]).x.tolist() == [[-1.0, -1.0]]


def test_dropping_every_row_is_refused():
    with pytest.raises(DataError, match=r'every row has a missing value, 2 of 2; use missing="imp'):
        Preprocessor("drop").fit(np.array([[1.0, NAN], [NAN, 1.0]]))
    with pytest.raises(DataError, match="every row has a missing value, 1 of 1"):
        Preprocessor("drop").fit(HOLES).transform(HOLES[1:2])


def test_dropped_rows_teach_nothing():
    fitted = Preprocessor("drop", "minmax").fit(np.array([[0.0, 1.0], [100.0, NAN], [10.0, 3.0]]))
    assert fitted.transform(np.array([[10.0, 3.0]])).x.tolist() == [[1.0, 1.0]]
    texts = pd.DataFrame({"n": [1.0, 2.0, None], "city": ["Rome", None, "Oslo"]})
    fitted = Preprocessor("drop", "none").fit(texts)
    assert fitted.feature_names == ["n", "city=Rome"]
    assert fitted.transform(texts).x.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("scale", ["standard", "minmax"])
@pytest.mark.parametrize("value", [0.1, -1e10, 1e-300, 0.0])
def test_constant_columns_become_exactly_zero(monkeypatch, scale, value):
    monkeypatch.setattr(learned, "_CHUNK", 130)  # several blocks: the mean is added up with rounding
    fitted = Preprocessor(scale=scale).fit(np.full((1000, 1), value))
    assert not fitted.transform(np.full((7, 1), value)).x.any()
    assert not saved(fitted).transform(np.full((7, 1), value)).x.any()


@pytest.mark.parametrize("scale", preprocessing.SCALES)
def test_one_row(scale):
    prepared = Preprocessor(scale=scale).fit(np.array([[3.0, -2.0]])).transform(np.array([[3.0, -2.0]]))
    assert prepared.x.tolist() == ([[3.0, -2.0]] if scale == "none" else [[0.0, 0.0]])


def test_table(table):
    fitted = Preprocessor(scale="none").fit(table)
    assert fitted.number_names == ["n", "i", "price"]
    assert fitted.feature_names == [
        *("n", "i", "price"),
        *("city=Oslo", "city=Rome", "city=(missing)"),
        *("yes=False", "yes=True"),
        *("flag=False", "flag=True", "flag=(missing)"),
        *("size=L", "size=S", "size=(missing)"),
    ]
    prepared = fitted.transform(table)
    assert prepared.x.tolist() == [
        [1.0, 1.0, 1.0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0],
        [2.0, 3.0, 2.5, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0],
        [2.0, 3.0, 2.5, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1],
        [4.0, 5.0, 3.0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0],
    ]
    assert prepared.unseen == 0


def test_table_with_rows_dropped(table):
    prepared = Preprocessor("drop").fit(table).transform(table)
    assert prepared.rows.tolist() == [0, 3]
    assert prepared.dropped == 2


def test_arrow_table(table):
    expected = Preprocessor().fit(table).transform(table).x
    arrow = pa.Table.from_pandas(table)
    assert np.array_equal(Preprocessor().fit(arrow).transform(arrow).x, expected)


def test_unseen_categories_are_zeros_and_counted(table):
    fitted = Preprocessor("impute").fit(table[["n", "city", "yes"]])
    new = pd.DataFrame({"n": [1.0, 1.0, 1.0], "city": ["Rome", "Paris", None], "yes": [None, True, True]})
    prepared = fitted.transform(new)
    assert prepared.unseen == 2  # Paris, and a missing value of `yes`, which training never missed
    assert prepared.x[:, 1:].tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 1, 0, 1]]


def test_columns_are_found_by_name(table):
    fitted = Preprocessor().fit(table)
    other = table.iloc[:, ::-1].assign(more="text")
    assert np.array_equal(fitted.transform(other).x, fitted.transform(table).x)
    with pytest.raises(DataError, match="the table has no column 'n', 'city', which training had"):
        fitted.transform(table.drop(columns=["n", "city"]))
    with pytest.raises(DataError, match="column 'n' held numbers in training and holds text now"):
        fitted.transform(table.assign(n="many"))
    with pytest.raises(DataError, match="this is an array"):
        fitted.transform(np.ones((2, 7)))


def test_columns_of_an_array_are_counted():
    fitted = Preprocessor().fit(HOLES)
    with pytest.raises(DataError, match="the data has 3 columns and training had 2"):
        fitted.transform(np.ones((2, 3)))
    frame = pd.DataFrame(HOLES, columns=["a", "b"])
    assert np.array_equal(fitted.transform(frame).x, fitted.transform(HOLES).x)


def test_a_column_that_is_all_missing_after_training(table):
    fitted = Preprocessor(scale="none").fit(table)
    prepared = fitted.transform(table.assign(n=pd.NaT, city=None))
    assert prepared.x[:, 0].tolist() == [2.0] * 4
    assert prepared.x[:, 5].tolist() == [1.0] * 4


def test_numbers_that_were_text_in_training():
    fitted = Preprocessor().fit(pd.DataFrame({"code": ["1", "2", None]}))
    assert fitted.transform(pd.DataFrame({"code": [1, 2]})).x.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert fitted.transform(pd.DataFrame({"code": [2.0, None]})).x.tolist() == [[0, 1, 0], [0, 0, 1]]


REFUSED_COLUMNS = {
    "all missing": ([None, None], "column 'bad' has no value in any of the 2 training rows; remove it"),
    "all NaN": ([NAN, NAN], "column 'bad' has no value"),
    "all Inf": ([INF, -INF], "column 'bad' has no value"),
    "timestamps": (pd.to_datetime(["2020-01-01", "2021-01-01"]), "column 'bad' holds dates or times; turn them into"),
    "dates": (pd.to_datetime(["2020-01-01", None]).date, "column 'bad' holds dates or times"),
    "durations": (pd.to_timedelta(["1s", "2s"]), "column 'bad' holds dates or times"),
    "periods": (pd.period_range("2020", "2021", freq="Y"), "column 'bad' holds dates or times"),
    "text and numbers": (["a", 1], "column 'bad' holds values of mixed kinds"),
    "lists": ([[1], [2]], "column 'bad' holds values of mixed kinds"),
    "bytes": ([b"a", b"b"], "column 'bad' holds bytes values"),
    "complex": ([1j, 2j], "column 'bad' holds complex values"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED_COLUMNS.values(), ids=REFUSED_COLUMNS)
@pytest.mark.parametrize("missing", ["impute", "drop"])
def test_refuses_column(missing, values, message):
    with pytest.raises(DataError, match=message):
        Preprocessor(missing).fit(pd.DataFrame({"good": [1.0, 2.0], "bad": values}))


def test_refuses_too_many_categories():
    texts = pd.DataFrame({"id": [str(n) for n in range(steps.MAX_CATEGORIES + 1)]})
    with pytest.raises(DataError, match="column 'id' has 1001 different texts"):
        Preprocessor().fit(texts)
    assert Preprocessor().fit(texts[1:]).transform(texts).unseen == 1


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.ones((0, 2)), "no rows"),
        (pd.DataFrame({"a": []}), "no rows"),
        (np.ones(3), "1 dimension"),
        (pd.DataFrame(np.ones((2, 2)), columns=["a", "a"]), "two columns called 'a'"),
        (np.array([["a", "b"]]), "text such as 'a'"),
    ],
)
def test_refuses_features(features, message):
    with pytest.raises(DataError, match=message):
        Preprocessor().fit(features)
    with pytest.raises(DataError, match=message):
        Preprocessor().fit(np.ones((2, 2))).transform(features)


@pytest.mark.parametrize("dtype", [">f4", ">f8", "f4", "f2", "i2", ">u4", "?"])
def test_dtype_of_the_array_does_not_matter(dtype):
    values = np.array([[0, 1], [1, 1], [1, 0]])
    array = values.astype(dtype)
    array.setflags(write=False)
    expected = Preprocessor().fit(values).transform(values).x
    assert np.array_equal(Preprocessor().fit(array).transform(array).x, expected)
    assert np.array_equal(array, values)


def test_too_large_for_float32_is_reported():
    fitted = Preprocessor(scale="none").fit(np.ones((2, 1)))
    with pytest.raises(DataError, match=r"column '0' is 1e\+39 in row 2 .* or use scale=\"standard\""):
        fitted.transform(np.array([[1.0], [2.0], [1e39]]))
    with pytest.raises(DataError, match=r"column '0' is 1e\+39 in row 0 .* correct or remove that row$"):
        Preprocessor().fit(np.array([[1.0], [2.0]])).transform(np.array([[1e39]]))
    large = np.array([[1e39], [3e39]])
    assert Preprocessor().fit(large).transform(large).x.tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize(("scale", "value"), [("standard", 1e200), ("minmax", 1e308)])
def test_too_large_for_float64_statistics_is_reported(scale, value):
    with pytest.raises(DataError, match=r"column '1' has values up to .* too large to scale"):
        Preprocessor(scale=scale).fit(np.array([[1.0, value], [2.0, -value]]))


@pytest.mark.parametrize("missing", ["impute", "drop"])
@pytest.mark.parametrize("scale", preprocessing.SCALES)
def test_saved_gives_the_same_bits(table, missing, scale):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(50, 5)) * 10.0 ** rng.integers(-8, 8, 5)
    values[rng.random(values.shape) < 0.05] = NAN
    for train, test in [(values[:30], values[30:]), (table, table[::-1]), (table[["city"]], table[["city"]])]:
        fitted = Preprocessor(missing, scale).fit(train)
        again = saved(fitted)
        assert again.to_dict() == fitted.to_dict()
        assert again.feature_names == fitted.feature_names
        first, second = fitted.transform(test), again.transform(test)
        assert first.x.tobytes() == second.x.tobytes()
        assert first.rows.tolist() == second.rows.tolist()
        assert first.unseen == second.unseen
        assert fitted.inverse_transform(first.x).tobytes() == again.inverse_transform(first.x).tobytes()


BREAK = {
    "no columns": (lambda d: d.update(columns=[], kinds=[]), "column names"),
    "repeated column": (lambda d: d.update(columns=["n", "n"]), "column names"),
    "kinds": (lambda d: d.update(kinds=["number"]), "broken"),
    "unknown kind": (lambda d: d.update(kinds=["number", "image"]), "neither number nor text"),
    "unknown scale": (lambda d: d.update(scale="log"), "scale is 'log'"),
    "medians absent": (lambda d: d.pop("medians"), "'medians' is absent"),
    "medians too many": (lambda d: d.update(medians=[1.0, 2.0]), "medians is not 1 finite numbers"),
    "medians NaN": (lambda d: d.update(medians=[NAN]), "medians is not 1 finite numbers"),
    "medians text": (lambda d: d.update(medians="x"), "broken"),
    "scale zero": (lambda d: d["scaler"].update(scale_=[0.0]), "a scale is not positive"),
    "scaler absent": (lambda d: d.update(scaler=None), "broken"),
    "categories absent": (lambda d: d.update(categories=[]), "lists of categories"),
    "categories repeated": (lambda d: d.update(categories=[["a", "a"]]), "not different texts"),
    "categories of numbers": (lambda d: d.update(categories=[[1]]), "not different texts"),
    "no category": (lambda d: d.update(categories=[[]]), "not different texts"),
    "older": (lambda d: d.update(version=0), "no format 0"),
    "newer": (lambda d: d.update(version=3), "format 3, newer than this fastenc; upgrade"),
    "another format": (lambda d: d.update(format="pickle"), "not a saved Preprocessor"),
}


@pytest.mark.parametrize(("change", "message"), BREAK.values(), ids=BREAK)
def test_broken_state_is_refused(table, change, message):
    state = copy.deepcopy(Preprocessor().fit(table[["n", "city"]]).to_dict())
    Preprocessor.from_dict(state)
    change(state)
    with pytest.raises(DataError, match=message):
        Preprocessor.from_dict(state)


@pytest.mark.parametrize("state", [None, [], "x", {}])
def test_something_else_is_refused(state):
    with pytest.raises(DataError, match="not a saved Preprocessor"):
        Preprocessor.from_dict(state)


def test_inverse_transform(table):
    for scale in preprocessing.SCALES:
        fitted = Preprocessor(scale=scale).fit(table)
        numbers = fitted.inverse_transform(fitted.transform(table).x)
        assert numbers.dtype == np.float64
        # The float32 in between keeps seven digits.
        assert np.round(numbers, 5).tolist() == [[1, 1, 1], [2, 3, 2.5], [2, 3, 2.5], [4, 5, 3]]
    with pytest.raises(DataError, match=r"x has shape \[2, 3\]; give \[rows, 14\]"):
        fitted.inverse_transform(np.ones((2, 3)))


def test_use_before_fit():
    for use in (lambda p: p.transform(HOLES), lambda p: p.inverse_transform(HOLES), lambda p: p.to_dict()):
        with pytest.raises(RuntimeError, match="call fit with the training rows first"):
            use(Preprocessor())


def test_a_fit_that_fails_changes_nothing():
    fitted = Preprocessor().fit(HOLES)
    before = fitted.to_dict()
    with pytest.raises(DataError):
        fitted.fit(np.full((2, 3), NAN))
    assert fitted.to_dict() == before


def test_unknown_options():
    with pytest.raises(ValueError, match="missing is 'fill'; it must be one of impute, drop, error"):
        Preprocessor(missing="fill")
    with pytest.raises(ValueError, match="scale is 'log'; it must be one of standard, minmax, none"):
        Preprocessor(scale="log")


def test_blocks_do_not_change_the_result(monkeypatch, table):
    many = pd.concat([table] * 5, ignore_index=True)
    for missing in ("impute", "drop"):
        fitted = Preprocessor(missing, "minmax").fit(many)
        whole = fitted.transform(many)
        with monkeypatch.context() as patch:
            patch.setattr(learned, "_CHUNK", 7)  # one row
            patch.setattr(steps, "_MEDIAN_VALUES", 1)  # one column
            assert Preprocessor(missing, "minmax").fit(many).to_dict() == fitted.to_dict()
            parts = fitted.transform(many)
        assert parts.x.tobytes() == whole.x.tobytes()
        assert parts.rows.tolist() == whole.rows.tolist()


def test_memory_map_is_never_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(learned, "_CHUNK", 1 << 14)
    monkeypatch.setattr(steps, "_MEDIAN_VALUES", 1 << 14)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32))
    features = np.load(tmp_path / "x.npy", mmap_mode="r")
    fitted = Preprocessor()
    tracemalloc.start()
    try:
        fitted.fit(features)
        fitting = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        prepared = fitted.transform(features)
        transforming = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert fitting < features.nbytes / 2
    assert transforming < prepared.x.nbytes + features.nbytes / 2

"""Learning and reading in chunks: what comes out is what all rows at once give; dates and hashed text on the way."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import fastenc
from fastenc.data import ChunkedRows, Chunks, DataError, Preprocessor, load, read_chunks
from fastenc.data import learning as learning_module
from fastenc.data import tables as tables_module


@pytest.fixture(scope="module")
def table():
    random = np.random.default_rng(0)
    rows = 500
    frame = pd.DataFrame(
        {
            "x": random.normal(1e4, 3.0, rows),
            "n": random.integers(0, 9, rows),
            "constant": 0.1,
            "colour": random.choice(["red", "green", "blue"], rows),
            "late": np.where(np.arange(rows) < 200, None, random.choice(["a", "b"], rows)),
        }
    )
    frame.loc[random.choice(rows, 40, replace=False), "x"] = np.nan
    frame.loc[:150, "n"] = np.nan  # nothing at all in the first chunks
    return frame


def in_chunks(preprocessor, frame, size=64):
    for start in range(0, len(frame), size):
        preprocessor.partial_fit(frame.iloc[start : start + size])
    return preprocessor


@pytest.mark.parametrize("scale", ["standard", "minmax", "none"])
@pytest.mark.parametrize("missing", ["impute", "drop"])
def test_learned_in_chunks_is_learned_at_once(table, missing, scale):
    whole = Preprocessor(missing, scale).fit(table)
    chunks = in_chunks(Preprocessor(missing, scale), table.iloc[:, ::-1].iloc[:, ::-1])
    assert chunks.to_dict() == whole.to_dict()
    assert chunks.feature_names == whole.feature_names
    again = Preprocessor.from_dict(chunks.to_dict())
    assert np.array_equal(again.transform(table).x, chunks.transform(table).x)


@pytest.mark.parametrize("size", [1, 37, 2_048, 20_000])
def test_the_size_of_chunks_changes_no_bit(monkeypatch, size):
    frame = values_frame(np.random.default_rng(0).normal(1e4, 3.0, (30_000, 1)))
    whole = Preprocessor().fit(frame)
    chunks = Preprocessor()
    for start in range(0, 2_000 if size == 1 else len(frame), size):
        chunks.partial_fit(frame.iloc[start : start + size])
        if start % 7 == 0:
            chunks.to_dict()  # to be asked in between changes nothing
    assert chunks.to_dict() == (whole if size > 1 else Preprocessor().fit(frame[:2_000])).to_dict()
    monkeypatch.setattr(learning_module, "KEPT_VALUES", 10_000)
    sampled = [in_chunks(Preprocessor(), frame, rows).to_dict() for rows in (30_000, 1_000)]
    assert sampled[0] == sampled[1]
    assert sampled[0] != whole.to_dict()


def test_constant_columns_in_chunks_become_exactly_zero(table):
    preprocessor = in_chunks(Preprocessor(), table[["constant", "x"]], 7)
    assert (preprocessor.transform(table).x[:, 0] == 0).all()


def test_it_can_be_used_between_chunks(table):
    preprocessor = Preprocessor().partial_fit(table.iloc[300:400])
    first = preprocessor.to_dict()["medians"]
    preprocessor.partial_fit(table.iloc[400:])
    assert preprocessor.to_dict()["medians"] != first
    assert preprocessor.to_dict() == Preprocessor().fit(table.iloc[300:]).to_dict()


def test_the_median_of_very_many_values_is_of_an_even_sample(monkeypatch):
    monkeypatch.setattr(learning_module, "KEPT_VALUES", 1_000)
    values = np.arange(100_000.0)[:, None]
    median = in_chunks(Preprocessor(), values_frame(values), 777).to_dict()["medians"][0]
    # The rank of a sample's median of 1,000 is off by sqrt(1/4 / 1000) = 1.6% in one of three; six times that never is.
    assert abs(median / 100_000 - 0.5) < 6 * 0.016
    assert median != 49_999.5


def values_frame(values):
    return pd.DataFrame({"v": values[:, 0]})


def test_faults_of_chunks_are_one_sentence(table):
    with pytest.raises(DataError, match=r"column 'colour' holds numbers and held texts in the rows before; make all"):
        Preprocessor().partial_fit(table).partial_fit(table.assign(colour=1.0))
    with pytest.raises(DataError, match=r"these rows have the columns x, n and those before had .*; give the same"):
        Preprocessor().partial_fit(table).partial_fit(table[["x", "n"]])
    with pytest.raises(DataError, match=r"column 'late' has no value in any of the 100 training rows; remove it"):
        Preprocessor().partial_fit(table.iloc[:100].drop(columns="n")).transform(table)
    with pytest.raises(DataError, match="every row has a missing value, 100 of 100"):
        Preprocessor("drop").partial_fit(np.array([[1.0, np.nan], [np.nan, 1.0]] * 50)).transform(table)
    strict = Preprocessor("error").partial_fit(np.ones((10, 2)))
    with pytest.raises(DataError, match=r"in 1 of 13 rows \(row 11, counted from 0\)"):
        strict.partial_fit(np.array([[1.0, 2.0], [np.nan, 3.0], [1.0, 1.0]]))
    assert strict._learner.rows == 10
    with pytest.raises(RuntimeError, match="partial_fit goes on from partial_fit only"):
        Preprocessor().fit(table).partial_fit(table)
    with pytest.raises(DataError, match="too large to scale in float64"):
        Preprocessor().partial_fit(np.array([[1e200], [-1e200]])).transform(np.ones((1, 1)))
    with pytest.raises(DataError, match=r'2000 different texts.*text="hash"'):
        Preprocessor().partial_fit(pd.DataFrame({"id": [f"id {i}" for i in range(2000)]}))


def test_dates_become_numbers():
    when = pd.to_datetime(["1970-01-02 12:00", "2024-02-29 00:00", None, "2020-06-01 00:00"])
    frame = pd.DataFrame({"when": when, "v": [1.0, 2.0, 3.0, 4.0]})
    preprocessor = Preprocessor(scale="none", dates="parts").fit(frame)
    assert preprocessor.feature_names == [
        "v",
        *(f"when.{part}" for part in ("days", "year", "month", "day", "weekday", "hour")),
    ]
    x = preprocessor.transform(frame).x
    assert x[0].tolist() == [1.0, 1.5, 1970, 1, 2, 4, 12]
    assert x[1].tolist() == [2.0, 19782, 2024, 2, 29, 3, 0]
    assert x[2, 2] == 2020  # the median of the years
    again = Preprocessor.from_dict(preprocessor.to_dict())
    assert np.array_equal(again.transform(frame).x, x)
    # The same as dates of Python, as text, in a time zone, and in chunks.
    assert np.array_equal(again.transform(frame.assign(when=frame["when"].dt.strftime("%Y-%m-%d %H:%M"))).x, x)
    assert np.array_equal(again.transform(frame.assign(when=frame["when"].dt.tz_localize("UTC"))).x, x)
    assert np.array_equal(again.transform(pa.Table.from_pandas(frame)).x, x)
    chunks = Preprocessor(scale="none", dates="parts").partial_fit(frame[:2]).partial_fit(frame[2:])
    assert np.array_equal(chunks.transform(frame).x, x)
    with pytest.raises(DataError, match=r"the table has no column 'when', which training had; add it"):
        again.transform(frame[["v"]])
    with pytest.raises(DataError, match=r"column 'when' held dates in training and holds something else now"):
        again.transform(frame.assign(when="noon"))
    with pytest.raises(DataError, match=r"an array without column names, and training had 'when'; give a table"):
        again.transform(frame[["v", "v"]].to_numpy())
    with pytest.raises(DataError, match=r'holds dates or times; turn them into numbers, as dates="parts" does'):
        Preprocessor().fit(frame)


def test_hashed_text():
    frame = pd.DataFrame({"note": ["big red house", "Red House!", None, "boat"], "v": [1.0, 2.0, 3.0, 4.0]})
    preprocessor = Preprocessor(text="hash", hash_size=256).fit(frame)
    assert preprocessor.feature_names == ["v", *(f"note#{index}" for index in range(256))]
    prepared = preprocessor.transform(frame)
    words = prepared.x[:, 1:]
    assert np.abs(words).sum(axis=1).tolist() == [3, 2, 1, 1]
    assert (words[0] * words[1]).sum() == 2  # two words shared
    assert (words[0] * words[3]).sum() == 0
    assert prepared.unseen == 0
    again = Preprocessor.from_dict(preprocessor.to_dict())
    assert np.array_equal(again.transform(frame).x, prepared.x)
    assert in_chunks(Preprocessor(text="hash", hash_size=256), frame, 2).to_dict() == preprocessor.to_dict()
    many = pd.DataFrame({"id": [f"id {i}" for i in range(2000)]})
    assert Preprocessor(text="hash", hash_size=8).fit(many).transform(many).x.shape == (2000, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": "bag"}, "text is 'bag'; it must be one of one-hot, hash"),
        ({"dates": "keep"}, "dates is 'keep'; it must be one of refuse, parts"),
        ({"hash_size": 0}, "hash_size is 0; it must be a whole number of at least 1"),
    ],
)
def test_unknown_options(options, words):
    with pytest.raises(ValueError, match=words):
        Preprocessor(**options)


def test_format_is_new_only_where_it_must_be(table):
    assert Preprocessor().fit(table).to_dict()["version"] == 1
    state = Preprocessor(text="hash").fit(table).to_dict()
    assert state["version"] == 2
    with pytest.raises(DataError, match="format 3, newer than this fastenc; upgrade"):
        Preprocessor.from_dict({**state, "version": 3})
    with pytest.raises(DataError, match="is broken: 'text' is absent; fit and save it again"):
        Preprocessor.from_dict({name: value for name, value in state.items() if name != "text"})


@pytest.fixture
def files(tmp_path, table):
    """The numbers of the table in each kind of file; Parquet has groups of 100 rows."""
    numbers = table[["x", "n"]].fillna(0.5)
    numbers.to_csv(tmp_path / "t.csv", index=False)
    pa.parquet.write_table(pa.Table.from_pandas(numbers), tmp_path / "t.parquet", row_group_size=100)
    np.save(tmp_path / "t.npy", numbers.to_numpy())
    return tmp_path, numbers


@pytest.mark.parametrize("ending", ["csv", "parquet", "npy"])
def test_chunks_are_the_rows_in_order(files, ending):
    folder, numbers = files
    chunks = list(read_chunks(folder / f"t.{ending}", rows=64))
    assert max(map(len, chunks)) <= 64
    found = np.concatenate([np.asarray(chunk.features) for chunk in chunks])
    assert np.array_equal(found, numbers.to_numpy())
    if ending != "npy":
        chunks = list(read_chunks(folder / f"t.{ending}", rows=64, target="n"))
        assert np.array_equal(np.concatenate([chunk.target for chunk in chunks]), numbers["n"])
        assert list(chunks[0].features.columns) == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, "no such file"),
        ("t.txt", b"a", "ends in .txt; the known endings are"),
        ("empty.csv", b"", r"is empty \(0 bytes\)"),
        ("header.csv", b"a,b\n", "has a header and no rows; add at least one row"),
        ("ragged.csv", b"a,b\n1,2\n3\n", "has 1 field in line 3 and 2 in its header"),
        ("broken.parquet", b"PAR1 no", "is not Parquet, or is broken"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        list(read_chunks(tmp_path / name))
    assert "\n" not in str(error.value)


LATE = ["2.5", "word", "true", "2020-01-01", "2020-01-01 10:00:00", "10:00:00"]


@pytest.mark.parametrize("early", ["1", "", "0.5", "2020-01-02"])
@pytest.mark.parametrize("late", LATE)
def test_a_column_is_what_it_is_in_the_whole_file(tmp_path, monkeypatch, early, late):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + f"{early},p\n" * 60 + f'{late},"q\nr"\n')
    whole = load(path).features
    monkeypatch.setattr(tables_module, "_BLOCK", 64)
    chunks = Chunks(path, rows=7)
    assert len(chunks) == 61
    for _ in range(2):
        found = pd.concat([chunk.features for chunk in chunks], ignore_index=True)
        pd.testing.assert_frame_equal(found, whole, check_dtype=early != "")  # pandas makes an object of nothing


def test_faults_beyond_the_first_block(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "_BLOCK", 64)
    contents = {
        "ragged.csv": (b"1,2,3\n", "has 3 fields in line 62 and 2 in its header"),
        "latin.csv": (b"1,\xff\n", "is not UTF-8 text in column 1, counted from 0; save the file as UTF-8"),
    }
    for name, (line, words) in contents.items():
        (tmp_path / name).write_bytes(b"a,b\n" + b"1,p\n" * 60 + line)
        with pytest.raises(DataError, match=words):
            list(Chunks(tmp_path / name))
    path = tmp_path / "t.csv"
    path.write_text("a,b,c\n" + "1,p,2\n" * 60 + ",q,2\n")
    with pytest.raises(DataError, match=r"target column 'a' of .*t.csv has no value in 1 of 61 rows \(row 60, counted"):
        list(Chunks(path, target="a", rows=7))
    chunks = Chunks(path)
    assert len(chunks) == 61
    path.write_text("a,b,c\n" + "1,p,2\n" * 70)
    with pytest.raises(DataError, match="had 61 rows and has 70 now"):
        list(chunks)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_several_targets(files, ending):
    folder, numbers = files
    path = folder / f"t.{ending}"
    frame = numbers.assign(word="w")
    frame.to_csv(path, index=False) if ending == "csv" else frame.to_parquet(path)
    chunks = list(Chunks(path, target=["n", "word"], rows=64))
    assert np.array_equal(np.concatenate([chunk.target["n"] for chunk in chunks]), numbers["n"])
    assert chunks[0].target["word"].tolist()[:2] == ["w", "w"]
    assert list(chunks[0].features.columns) == ["x"]
    with pytest.raises(DataError, match="no column besides the targets 'x' and 'n' and 'word'; give at least one feat"):
        list(Chunks(path, target=["x", "n", "word"]))
    with pytest.raises(DataError, match="the target 'n' is given twice"):
        list(Chunks(path, target=["n", "n"]))


def test_chunks_of_what_is_in_memory():
    digits = load("digits")
    chunks = list(Chunks("digits", rows=1000))
    assert np.array_equal(np.concatenate([chunk.target for chunk in chunks]), digits.target)
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
    assert Chunks(frame).columns == ["a", "b"]
    assert Chunks(frame, rows=1, target="b").__iter__().__next__().target.tolist() == ["x"]


def test_a_bad_row_in_a_later_chunk_is_named(files):
    folder, numbers = files
    numbers = numbers.copy()
    numbers.iloc[130, 0] = np.nan
    numbers.to_parquet(folder / "holes.parquet")
    with pytest.raises(DataError, match=r"holes.parquet, in rows 100 to 199: x has NaN or Inf in 1 of 100 rows"):
        list(ChunkedRows(folder / "holes.parquet", rows=100))
    with pytest.raises(ValueError, match="rows is 0"):
        list(read_chunks(folder / "t.csv", rows=0))
    with pytest.raises(ValueError, match="batch_size is 0"):
        ChunkedRows(folder / "t.csv", batch_size=0)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_trained_from_a_file_that_is_never_whole_in_memory(files, ending):
    folder, numbers = files
    preprocessor = Preprocessor()
    for chunk in read_chunks(folder / f"t.{ending}", rows=128):
        preprocessor.partial_fit(chunk.features)
    rows = ChunkedRows(folder / f"t.{ending}", preprocessor, batch_size=32, rows=128, seed=1)
    expected = preprocessor.transform(numbers).x
    first, second = (torch.cat(list(rows)).numpy() for _ in range(2))
    assert not np.array_equal(first, expected)
    assert not np.array_equal(first, second)
    for epoch in (first, second):
        assert np.array_equal(epoch[np.lexsort(epoch.T)], expected[np.lexsort(expected.T)])
    torch.manual_seed(0)
    trainer = fastenc.Trainer(fastenc.AutoEncoder(fastenc.Encoder(2, (8, 2), "tanh")), lr=0.02, seed=0)
    trainer.fit(rows.loader(), epochs=20, verbose=False)
    assert trainer.evaluate(expected)["loss"] < 0.2  # 1 is what the mean of the rows would give


def test_a_target_is_given_beside_the_rows(files):
    folder, numbers = files
    rows = ChunkedRows(folder / "t.parquet", target="n", shuffle=False, batch_size=50)
    x, y = next(iter(rows))
    assert np.array_equal(x[:, 0], numbers["x"][:50].astype(np.float32))
    assert np.array_equal(y, numbers["n"][:50].astype(np.float32))


ENCODES_WITHOUT_A_COPY = """
import resource, sys, numpy as np
import pandas, sklearn.impute, sklearn.preprocessing  # memory of their own
from fastenc import cli

with open("/proc/self/status") as file:
    now = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
x = np.load(sys.argv[2], mmap_mode="r")
resource.setrlimit(resource.RLIMIT_DATA, (now + x.nbytes * 3 // 4,) * 2)
cli.app(["encode", *sys.argv[1:3], "-o", sys.argv[3]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is looked up in /proc")
@pytest.mark.parametrize("prepared", [False, True])
def test_encode_takes_maps_larger_than_memory(tmp_path, prepared):
    rows, features = 200_000, 400  # 320 MB, of a file that takes no room on disk: it is empty but for its last row
    path = tmp_path / "x.npy"
    np.lib.format.open_memmap(path, "w+", np.float32, (rows, features))[-1] = 1.0
    preprocessing = Preprocessor().fit(np.eye(features)).to_dict() if prepared else None
    fastenc.Encoder(features, (2,)).save_pretrained(tmp_path / "model", preprocessing=preprocessing)
    arguments = [str(tmp_path / "model"), str(path), str(tmp_path / "out.npy")]
    command = [sys.executable, "-c", ENCODES_WITHOUT_A_COPY, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert np.load(tmp_path / "out.npy", mmap_mode="r").shape == (rows, 2)

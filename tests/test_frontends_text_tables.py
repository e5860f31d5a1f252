"""Texts in files: which tables are lists of texts, and what is collected of lines, files in folders, and columns."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from fastenc.data import DataError
from fastenc.frontends import collect, kind_of
from fastenc.frontends.text import TextReader
from fastenc.frontends.text_tables import holds_sentences, is_text_table

TEXTS = ["the soup was cold, sadly", "we met after the match", 'she said "no" twice today']
LABELS = ["food", "sport", "other"]


def write(path, **columns):
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(columns)
        lines.writerows(zip(*columns.values(), strict=True))
    return path


def parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("values", "sentences"),
    [
        (TEXTS, True),
        (["今日は雨が降っています。", "我们昨天去了公园。", "วันนี้ฝนตกหนัก"], True),
        (["Сегодня идёт дождь", "Мы говорили про погоду"], True),
        (["Jan 3 2020 10:00", "Feb 4 2021 11:30"], False),
        (["3 4 5 6 7", "1 2 3 4 5"], False),
        (["https://a.example/some/long/path", "https://b.example/the/other/one"], False),
        (["Ada Lovelace", "Emmy Noether", "Juan de la Vega"], False),
        (["bachelor of science", "master of arts"] * 20, False),  # the few values of a category
        (["red", "green"], False),
        ([1.0, 2.0, None], False),
        (["", None, " "], False),
        ([], False),
    ],
)
def test_sentences(values, sentences):
    assert holds_sentences(values) == sentences


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_of_texts(tmp_path, ending):
    make = {"csv": write, "parquet": parquet}[ending]
    alone = make(tmp_path / f"alone.{ending}", text=TEXTS)
    labelled = make(tmp_path / f"labelled.{ending}", label=LABELS, text=TEXTS)
    assert is_text_table(alone, None)
    assert is_text_table(labelled, "label")
    assert kind_of(str(labelled), target="label") == "text"
    # Without the target it may be a column to learn from; what is no column is for `load` to say.
    assert not is_text_table(labelled, None)
    assert not is_text_table(labelled, "lable")
    assert not is_text_table(labelled, "text")
    numbers = make(tmp_path / f"numbers.{ending}", a=[1, 2, 3], text=TEXTS, label=LABELS)
    assert not is_text_table(numbers, "label")
    assert kind_of(str(numbers), target="label") == "table"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b""),
        ("a.csv", b"\n\n"),
        ("a.csv", b"text\n"),
        ("a.csv", b"0.5,1.5\n2.5,3.5\n"),
        ("a.csv", b"text\n" + b"x" * 200_000),
        ("a.parquet", b"PAR1 and no more"),
        ("a.npy", b"\x93NUMPY"),
    ],
)
def test_what_cannot_be_read_is_no_table_of_texts(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert not is_text_table(path, None)


def test_a_table_is_collected(tmp_path):
    path = write(tmp_path / "a.csv", id=["7", "8", "9"], text=[*TEXTS[:2], ""], label=LABELS)
    found = collect(str(path), "text", target="label")
    assert (found.kind, found.source, len(found)) == ("text", str(path), 3)
    assert list(found.items) == [*TEXTS[:2], ""]
    assert list(found.names) == ["row 0", "row 1", "row 2"]
    assert found.labels.tolist() == LABELS
    assert found.labels.dtype == object
    assert collect(str(path), "text").labels is None
    assert list(collect(str(path), "text", column="label").items) == LABELS
    assert collect(str(path), "text", target="id").labels.tolist() == [7, 8, 9]


def test_labels_that_are_true_or_false_are_classes(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=TEXTS, good=[True, False, True])
    assert collect(str(path), "text", target="good").labels.tolist() == ["True", "False", "True"]


def test_lines_of_a_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one text\r\n\r\nthe third\u2028line\n".encode())
    found = collect(str(path), "text")
    assert list(found.items) == ["one text", "", "the third\u2028line"]
    assert list(found.names) == ["line 1", "line 2", "line 3"]
    assert found.labels is None
    assert kind_of(str(path)) == "text"


def test_files_in_folders(tmp_path):
    for name, text in (("food/1.txt", "cold soup"), ("food/2.txt", ""), ("sport/1.TXT", "a goal")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = collect(str(tmp_path), "text")
    assert kind_of(str(tmp_path)) == "text"
    assert list(found.names) == ["food/1.txt", "food/2.txt", "sport/1.TXT"]
    assert found.labels.tolist() == ["food", "food", "sport"]
    reader = TextReader().fit(found.items)
    assert [reader.decode(reader.read(item)) for item in found.items] == ["cold soup", "", "a goal"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"column": "words"}, "has no column 'words' of texts; its columns are id, text, more, label; name one"),
        ({"column": "label", "target": "label"}, "has no column 'label' of texts; its columns are id, text, more"),
        ({"column": "id"}, "column 'id' of .* holds numbers and no text"),
        ({"target": "labels"}, "several columns of sentences, text and more; name the column"),
        ({"column": "text", "target": "labels"}, "has no column 'labels' to be the target"),
    ],
)
def test_columns_that_are_not_there(tmp_path, options, reason):
    path = write(tmp_path / "a.csv", id=[1, 2, 3], text=TEXTS, more=TEXTS[::-1], label=LABELS)
    with pytest.raises(DataError, match=reason):
        collect(str(path), "text", **options)


def test_a_table_without_sentences(tmp_path):
    path = write(tmp_path / "a.csv", a=["1", "2"], b=["x", "y"])
    with pytest.raises(DataError, match="has no column that is plainly sentences; name the column of the texts"):
        collect(str(path), "text")
    assert list(collect(str(path), "text", column="b").items) == ["x", "y"]


def test_files_that_hold_no_texts(tmp_path):
    cases = {"empty.txt": (b"", "is empty"), "latin.txt": (b"caf\xe9\n", "not UTF-8"), "a.json": (b"[]", "no texts")}
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=reason):
            collect(str(tmp_path / name), "text")
    (tmp_path / "a.txt").write_text("rain\n")
    with pytest.raises(DataError, match="no labels; leave --target out"):
        collect(str(tmp_path / "a.txt"), "text", target="label")
    with pytest.raises(DataError, match="is no table and has no column 'text'"):
        collect(str(tmp_path / "a.txt"), "text", column="text")


def test_a_long_file_is_read_to_its_end(tmp_path):
    texts = [f"sentence number {number} of this long file" for number in range(3000)]
    path = write(tmp_path / "a.csv", text=texts, label=np.arange(3000) % 7)
    found = collect(str(path), "text", target="label")
    assert list(found.items) == texts
    assert found.labels.dtype == np.int64

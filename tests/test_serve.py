"""What the service answers to rows, texts and files: what the model gives, and what became of them on the way."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from http_service import (
    LinesReader,
    Numbers,
    NumbersReader,
    array_model,
    as_bytes,
    integer_model,
    people,
    refusal,
    save_model,
    serving,
    upload,
    vectors,
)

import fastenc
from fastenc.frontends import kinds
from fastenc.pipeline import SavedModel
from fastenc.serving.answers import principal_plane


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return SavedModel(save_model(tmp_path_factory.mktemp("people") / "model", people()))


@pytest.fixture(scope="module")
def client(saved):
    with serving(saved) as client:
        yield client


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    return array_model(tmp_path_factory.mktemp("array") / "model")


@pytest.fixture
def known_kinds(monkeypatch):
    """The stand-ins for the front ends and readers, as if they were of fastenc."""
    monkeypatch.setitem(kinds.FRONT_ENDS, "Numbers", Numbers)
    for reader in (NumbersReader, LinesReader):
        monkeypatch.setitem(kinds.KINDS, reader.kind, reader)


def codes(saved, features):
    return np.concatenate(list(saved.codes([saved.prepare("x", features).x])))


def records(frame):
    return [
        {name: None if pd.isna(value) else value for name, value in row.items()} for row in frame.to_dict("records")
    ]


def test_rows_and_files_give_what_the_model_gives(saved, client):
    frame = people()
    expected = codes(saved, frame)
    named = records(frame)
    answers = [
        client.post("encode", json={"rows": named}),
        client.post("encode", json={"rows": [dict(reversed(row.items())) for row in named]}),
        client.post("encode", json={"rows": [list(row.values()) for row in named]}),
        upload(client, "people.csv", frame.to_csv(index=False)),
        upload(client, "PEOPLE.PARQUET", as_bytes(lambda file: frame.to_parquet(file))),
    ]
    for answer in answers:
        np.testing.assert_array_equal(vectors(answer), expected)
        assert set(answer.json()) == {"vectors", "rows", "width"}


def test_arrays(array):
    saved, x = array
    with serving(saved) as client:
        np.testing.assert_array_equal(vectors(client.post("encode", json={"rows": x.tolist()})), codes(saved, x))
        np.testing.assert_array_equal(vectors(upload(client, "x.npy", as_bytes(np.save, x))), codes(saved, x))
        holes = x.copy()
        holes[2, 1] = np.nan
        sent = [[None if np.isnan(value) else value for value in row] for row in holes.tolist()]
        np.testing.assert_array_equal(vectors(client.post("encode", json={"rows": sent})), codes(saved, holes))
        assert "4 numbers" in refusal(client.post("encode", json={"rows": [{"a": 1}]}), 422)
        assert "row 1" in refusal(client.post("encode", json={"rows": [[1, 2, 3, 4], [1, 2]]}), 422)
        assert "no number" in refusal(client.post("encode", json={"rows": [[1, 2, 3, "4"]]}), 422)
        assert "no number" in refusal(client.post("encode", json={"rows": [[1, 2, 3, [4]]]}), 422)
        assert "too large" in refusal(client.post("encode", json={"rows": [[1, 2, 3, 10**400]]}), 422)


def test_a_model_without_preprocessing(tmp_path):
    fastenc.Encoder(3, (2,)).save_pretrained(tmp_path / "model")
    saved = SavedModel(tmp_path / "model")
    with serving(saved) as client:
        rows = [[1.0, 2.0, 3.0], [0.5, 0.25, -1.0]]
        np.testing.assert_array_equal(vectors(client.post("encode", json={"rows": rows})), codes(saved, np.array(rows)))
        assert "NaN" in refusal(client.post("encode", json={"rows": [[1.0, None, 3.0]]}), 422)
        assert client.get("health").json()["model"]["numbers"] == 3


def test_rows_that_are_left_out_are_told(tmp_path):
    saved = SavedModel(save_model(tmp_path / "model", people(), missing="drop"))
    with serving(saved) as client:
        answer = upload(client, "people.csv", people().to_csv(index=False))
        np.testing.assert_array_equal(vectors(answer), codes(saved, people()))
        assert answer.json()["source_rows"] == [row for row in range(40) if row != 3]
        assert answer.json()["dropped"] == 1
        assert "every row" in refusal(client.post("encode", json={"rows": records(people()[3:4])}), 422)


def test_texts_that_are_in_no_category_are_told(client):
    rows = records(people(4))
    rows[1]["colour"] = "octarine"
    assert client.post("encode", json={"rows": rows}).json()["unseen"] == 1


def test_dates(tmp_path):
    frame = pd.DataFrame({"when": pd.date_range("2024-01-30", periods=20, freq="h"), "v": np.arange(20.0)})
    saved = SavedModel(save_model(tmp_path / "model", frame, dates="parts"))
    with serving(saved) as client:
        assert client.get("health").json()["model"]["columns"] == ["v", "when"]
        rows = [{"when": when.isoformat(), "v": v} for when, v in zip(frame["when"], frame["v"], strict=True)]
        np.testing.assert_array_equal(vectors(client.post("encode", json={"rows": rows})), codes(saved, frame))
        assert "dates" in refusal(client.post("encode", json={"rows": [["2024-01-30", 1.0]]}), 422)
        assert "dates" in refusal(upload(client, "x.npy", as_bytes(np.save, np.ones((2, 2)))), 422)
        assert "'when'" in refusal(client.post("encode", json={"rows": [{"when": "soon", "v": 1.0}]}), 422)


def test_files_of_a_front_end(tmp_path, known_kinds):
    model = integer_model()
    model.save_pretrained(tmp_path / "model", preprocessing=NumbersReader().to_dict())
    items = ["1 2 3", "4", "5 6 7 8 9", "2 2"]
    expected = [model(torch.tensor([[float(n) for n in item.split()]])).detach().numpy()[0] for item in items]
    with serving(SavedModel(tmp_path / "model")) as client:
        files = [("file", (f"{number}.pts", item)) for number, item in enumerate(items)]
        answer = client.post("encode", files=files)
        np.testing.assert_array_equal(vectors(answer), expected)
        assert answer.json()["names"] == ["0.pts", "1.pts", "2.pts", "3.pts"]
        np.testing.assert_array_equal(vectors(upload(client, "one.pts", items[2])), expected[2:3])
        assert refusal(upload(client, "bad.pts", "one two"), 422) == "bad.pts holds no numbers; correct it"
        assert ".pts" in refusal(upload(client, "people.csv", "a\n1\n"), 415)
        assert "no rows" in refusal(client.post("encode", json={"rows": [[1]]}), 422)
        assert "no texts" in refusal(client.post("encode", json={"texts": ["/etc/hostname"]}), 422)


def test_texts_and_files_of_several_items(tmp_path, known_kinds):
    model = integer_model()
    model.save_pretrained(tmp_path / "model", preprocessing=LinesReader().to_dict())
    texts = ["ab", "c", "abcd"]
    expected = [model(torch.tensor([[float(ord(n)) for n in text]])).detach().numpy()[0] for text in texts]
    with serving(SavedModel(tmp_path / "model"), max_rows=3) as client:
        np.testing.assert_array_equal(vectors(client.post("encode", json={"texts": texts})), expected)
        answer = upload(client, "some.txt", "\n".join(texts))
        np.testing.assert_array_equal(vectors(answer), expected)
        assert answer.json()["names"] == ["line 0", "line 1", "line 2"]
        two = client.post("encode", files=[("file", ("a.txt", "ab\nc")), ("file", ("b.txt", "abcd"))])
        np.testing.assert_array_equal(vectors(two), expected)
        assert two.json()["names"] == ["a.txt, line 0", "a.txt, line 1", "b.txt, line 0"]
        assert "entry 1" in refusal(client.post("encode", json={"texts": ["a", 3]}), 422)
        assert "entry 1" in refusal(client.post("encode", json={"texts": ["a", ""]}), 422)
        assert refusal(upload(client, "none.txt", ""), 422) == "none.txt is empty; write some lines"
        assert "4 rows" in refusal(upload(client, "many.txt", "a\nb\nc\nd"), 413)
        assert '"texts"' in refusal(client.post("encode", json={"rows": [[1]]}), 422)
        assert client.get("health").json()["model"] == {
            **{"class": "FrontEncoder", "kind": "text", "width": 4},
            **{"files": [".txt", ".csv", ".parquet"], "texts": True},
        }


def test_the_map(array):
    saved, x = array
    with serving(saved) as client:
        answer = client.post("encode?map=true", json={"rows": x.tolist()}).json()
    points, explained = np.array(answer["map"]["points"]), answer["map"]["explained"]
    centred = codes(saved, x).astype(np.float64)
    centred -= centred.mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    # Both are backward stable in float64, and the singular values are apart.
    np.testing.assert_allclose(np.abs(points), np.abs(left * singular)[:, :2], atol=1e-10)
    np.testing.assert_allclose(explained, (singular**2 / (singular**2).sum())[:2], atol=1e-12)


def test_the_map_of_little():
    for x in (np.ones((1, 3)), np.ones((4, 3)), np.zeros((2, 1))):
        points, explained = principal_plane(x.astype(np.float32))
        assert points.shape == (len(x), 2)
        assert not points.any()
        assert not explained.any()
    points, explained = principal_plane(np.array([[1.0], [3.0]], np.float32))
    assert points.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert explained.tolist() == [1.0, 0.0]

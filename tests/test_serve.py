"""What the service answers: to rows, texts and files, and to what it must refuse."""

from __future__ import annotations

import io
import json
import pickle
import re
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from http_service import (
    LinesReader,
    Numbers,
    NumbersReader,
    connect,
    integer_model,
    people,
    read_all,
    save_model,
    serving,
    wait_until,
)

import fastenc
from fastenc.frontends import kinds
from fastenc.pipeline import SavedModel
from fastenc.serving import app as app_module
from fastenc.serving.answers import principal_plane
from fastenc.serving.guard import host_name
from fastenc.serving.inputs import shown_name

TOKEN = "a-token-of-some-length"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return SavedModel(save_model(tmp_path_factory.mktemp("people") / "model", people()))


@pytest.fixture(scope="module")
def client(saved):
    with serving(saved, max_rows=50, max_bytes=100_000) as client:
        yield client


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    """A model of four numbers, learned from an array, and rows for it."""
    x = np.random.default_rng(1).normal(size=(30, 4))
    return SavedModel(save_model(tmp_path_factory.mktemp("array") / "model", x)), x


@pytest.fixture
def known_kinds(monkeypatch):
    """The stand-ins for the front ends and readers, as if they were of fastenc."""
    monkeypatch.setitem(kinds.FRONT_ENDS, "Numbers", Numbers)
    for reader in (NumbersReader, LinesReader):
        monkeypatch.setitem(kinds.KINDS, reader.kind, reader)


def codes(saved, features):
    return np.concatenate(list(saved.codes([saved.prepare("x", features).x])))


def vectors(response):
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["rows"] == len(answer["vectors"])
    assert {len(vector) for vector in answer["vectors"]} == {answer["width"]}
    return np.array(answer["vectors"], np.float32)


def refusal(response, status):
    """The one sentence of a refusal."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    sentence = response.json()["error"]
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    return sentence


def upload(client, name, content, **options):
    return client.post("encode", files={"file": (name, content)}, **options)


def as_bytes(save, *arguments, **options):
    file = io.BytesIO()
    save(file, *arguments, **options)
    return file.getvalue()


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


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        (b"[" * 10_000, 400, "not JSON"),
        (b'{"rows": [[' + b"1" * 5000 + b"]]}", 400, "not JSON"),
        (b'{"rows": [[NaN, "red", 1]]}', 400, "give null"),
        (b"[1, 2]", 422, "one JSON object"),
        (b"{}", 422, "one JSON object"),
        (b'{"rows": [[1, "red", 2]], "texts": ["a"]}', 422, "either"),
        (b'{"rows": []}', 422, "at least one"),
        (b'{"rows": 3}', 422, "at least one"),
        (b'{"rows": [3]}', 422, "row 0"),
        (b'{"rows": [[1, "red", 2], {"age": 1}]}', 422, "row 1"),
        (b'{"rows": [[1, "red"]]}', 422, "age, colour, height"),
        (b'{"rows": [["old", "red", 2]]}', 422, "'age'"),
        (b'{"rows": [[[1], "red", 2]]}', 422, "'age'"),
        (b'{"rows": [{"age": 1}]}', 422, "'colour', 'height'"),
        (b'{"rows": [{"age": 1, "colour": "red", "height": 1}, {"age": 1, "colour": "red"}]}', 422, "'height'"),
        (b'{"texts": ["a"]}', 422, "no texts"),
        (json.dumps({"rows": [[1, "red", 2]] * 51}).encode(), 413, "51 rows"),
    ],
)
def test_bad_json_is_one_sentence(client, body, status, words):
    assert words in refusal(client.post("encode", content=body, headers=JSON), status)


class Trap:
    """Unpickled, it would be noticed."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_bad_files_are_one_sentence(client):
    frame = people(60)
    trap = as_bytes(np.save, np.array([[Trap()]], dtype=object), allow_pickle=True)
    for name, content, status, words in [
        ("trap.npy", trap, 422, "trap.npy holds pickled Python objects"),
        ("trap.pkl", pickle.dumps(Trap()), 415, ".csv or .npy or .parquet"),
        ("people", b"a,b\n1,2\n", 415, ".csv"),
        ("short.npy", as_bytes(np.save, np.ones((4, 3)))[:-5], 422, "short.npy is cut short"),
        ("text.parquet", b"not parquet", 422, "text.parquet is not Parquet"),
        ("ragged.csv", b"age,colour,height\n1,red,2\n1,2\n", 422, "ragged.csv"),
        ("empty.csv", b"", 422, "empty.csv is empty"),
        ("narrow.csv", b"age\n1\n", 422, "narrow.csv: the table has no column 'colour', 'height'"),
        ("many.csv", frame.to_csv(index=False).encode(), 413, "60 rows"),
        ("many.parquet", as_bytes(lambda file: frame.to_parquet(file)), 413, "60 rows"),
        ("../../etc/passwd.csv", b"", 422, "passwd.csv is empty"),
    ]:
        sentence = refusal(upload(client, name, content), status)
        assert words in sentence
        assert "/tmp" not in sentence
        assert "0.csv" not in sentence
    csv = people().to_csv(index=False)
    assert "2 files" in refusal(client.post("encode", files=[("file", ("a.csv", csv)), ("file", ("b.csv", csv))]), 422)
    assert "no file" in refusal(client.post("encode", files={"file": (None, "text")}), 422)
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    refusal(client.post("encode", content=b"nothing", headers=broken), 400)
    refusal(client.post("encode", content=b"", headers={"Content-Type": "multipart/form-data"}), 400)


def test_other_ways_to_ask_are_refused(client):
    assert "Content-Type" in refusal(client.post("encode", content=b"a,b\n1,2\n"), 415)
    assert "Content-Encoding" in refusal(
        client.post("encode", content=b"{}", headers={**JSON, "Content-Encoding": "gzip"}), 415
    )
    assert "/encode" in refusal(client.get("models"), 404)
    assert "POST" in refusal(client.get("encode"), 405)
    assert "map" in refusal(client.post("encode?map=perhaps", json={"rows": [[1, "red", 2]]}), 422)
    for path in ("docs", "redoc", "openapi.json"):
        refusal(client.get(path), 404)


def test_a_body_over_the_limit_is_refused_before_it_is_read(client):
    sent = 0

    def chunks():
        """A body without an end and without Content-Length; its end is the refusal."""
        nonlocal sent
        while not done.is_set():
            sent += 10_000
            yield b" " * 10_000
            if sent > 400_000:
                done.wait(0.01)
            assert sent < 50_000_000, "the server reads on"

    done = threading.Event()
    stated = connect(client.base_url)
    with stated:
        stated.sendall(
            b"POST /encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100001\r\nConnection: close\r\n\r\n"
        )
        assert stated.recv(1000).startswith(b"HTTP/1.1 413 ")  # nothing of the body was sent
    chunked = connect(client.base_url)
    with chunked:
        chunked.sendall(
            b"POST /encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
        thread = threading.Thread(target=lambda: send_chunks(chunked, chunks()))
        thread.start()
        assert chunked.recv(1000).startswith(b"HTTP/1.1 413 ")
        done.set()
        thread.join()
    exact = b'{"rows": [[1, "red", 2]]}'.ljust(100_000)
    assert len(vectors(client.post("encode", content=exact, headers=JSON))) == 1
    assert "100000 bytes" in refusal(client.post("encode", content=exact + b" ", headers=JSON), 413)
    assert "100000 bytes" in refusal(upload(client, "people.csv", b"a\n" * 60_000), 413)


def send_chunks(connection, chunks):
    try:
        for chunk in chunks:
            connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
    except OSError:
        pass  # the server has closed


def test_a_body_that_does_not_come_is_given_up(saved, monkeypatch):
    monkeypatch.setattr(app_module, "READ_SECONDS", 0.2)
    with serving(saved, queue=1) as client:
        with connect(client.base_url) as connection:
            connection.sendall(
                b"POST /encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\nConnection: close\r\n\r\n{"
            )
            assert read_all(connection).startswith(b"HTTP/1.1 408 ")
        assert len(vectors(client.post("encode", json={"rows": [[1, "red", 2]]}))) == 1


def test_a_client_that_leaves_does_no_harm(saved):
    with serving(saved, queue=1) as client:
        for _ in range(3):
            with connect(client.base_url) as connection:
                connection.sendall(
                    b"POST /encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 100\r\n\r\n{"
                )
        row = {"rows": [[1, "red", 2]]}
        wait_until(lambda: client.post("encode", json=row).status_code == 200, "the queue stays full")


class Blocked(torch.nn.Module):
    """An encoder that waits until it may go on."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.out_features, self.in_features = encoder, encoder.out_features, encoder.in_features
        self.may_go, self.calls = threading.Event(), 0

    def forward(self, x):
        self.calls += 1
        assert self.may_go.wait(60)
        return self.encoder(x)


def test_a_full_server_says_so(array, monkeypatch):
    saved, x = array
    blocked = Blocked(saved.encoder)
    monkeypatch.setattr(saved, "encoder", blocked)
    blocked.may_go.set()
    body = {"rows": x.tolist()}
    with serving(saved, queue=2) as client:
        blocked.may_go.clear()
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(client.post("encode", json=body))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: metric(client, "fastenc_inside_requests") == 2, "the requests do not come in")
        response = client.post("encode", json=body)
        assert "2 requests" in refusal(response, 503)
        assert response.headers["Retry-After"] == "1"
        assert client.get("health").json()["ready"]  # what needs no model goes on
        blocked.may_go.set()
        for thread in threads:
            thread.join()
        for answer in answers:
            assert len(vectors(answer)) == 30
        assert client.post("encode", json=body).status_code == 200


def metric(client, name, **labels):
    text = client.get("metrics").text
    wanted = "".join(f'{key}="{value}"' + "," for key, value in labels.items()).rstrip(",")
    line = re.search(rf"^{name}{re.escape('{' + wanted + '}') if wanted else ''} (\S+)$", text, re.MULTILINE)
    return float(line[1]) if line else 0.0


def test_metrics(saved):
    with serving(saved) as client:
        for _ in range(3):
            client.post("encode", json={"rows": [[1, "red", 2]] * 5})
        client.post("encode", json={})
        client.get("wherever/it/is")
        response = client.get("metrics")
        assert response.headers["content-type"].startswith("text/plain")
        assert metric(client, "fastenc_requests_total", path="/encode", status="200") == 3
        assert metric(client, "fastenc_requests_total", path="/encode", status="422") == 1
        assert metric(client, "fastenc_requests_total", path="other", status="404") == 1
        assert metric(client, "fastenc_request_seconds_count", path="/encode") == 4
        assert metric(client, "fastenc_rows_total") == 15
        assert metric(client, "fastenc_batch_rows_count") == 3
        assert metric(client, "fastenc_batch_rows_sum") == 15
        assert metric(client, "fastenc_queue_requests") == 0


def test_the_token(saved):
    body = {"rows": [[1, "red", 2]]}
    with serving(saved, token=TOKEN) as client:
        for headers in ({}, {"Authorization": TOKEN}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}):
            response = client.post("encode", json=body, headers=headers)
            assert "Bearer TOKEN" in refusal(response, 401)
            assert response.headers["WWW-Authenticate"] == "Bearer"
            refusal(client.get("metrics", headers=headers), 401)
            assert set(client.get("health", headers=headers).json()) == {"ready", "version", "token"}
            assert client.get("", headers=headers).status_code == 200
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert len(vectors(client.post("encode", json=body, headers=right))) == 1
        assert client.get("metrics", headers=right).status_code == 200
        assert client.get("health", headers=right).json()["model"]["columns"] == ["age", "colour", "height"]


def test_other_hosts_are_refused_where_there_is_no_token(saved):
    with serving(saved, hosts=("127.0.0.1", "localhost", "::1")) as client:
        for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"):
            assert client.get("health", headers={"Host": host}).status_code == 200
        for host in ("example.org", "localhost.example.org", "example.org:8000"):
            assert "Host" in refusal(client.get("health", headers={"Host": host}), 400)
    assert host_name("[2001:db8::1]:80") == "2001:db8::1"


def test_health_tells_of_the_model_and_not_where_it_is(client, tmp_path_factory):
    answer = client.get("health")
    assert answer.json() == {
        **{"ready": True, "version": fastenc.__version__, "token": False},
        "model": {
            **{"class": "AutoEncoder", "kind": "table", "width": 5, "columns": ["age", "colour", "height"]},
            **{"files": [".csv", ".npy", ".parquet"], "texts": False},
        },
        "limits": {"rows": 50, "bytes": 100_000},
    }


def test_errors_of_our_own_tell_nothing(array, monkeypatch):
    saved, x = array

    class Broken(Blocked):
        def forward(self, x):
            if self.may_go.is_set():
                raise RuntimeError("/a/secret/path is broken")
            return self.encoder(x)

    broken = Broken(saved.encoder)
    monkeypatch.setattr(saved, "encoder", broken)
    with serving(saved) as client:
        broken.may_go.set()
        assert "its log says more" in refusal(client.post("encode", json={"rows": x.tolist()}), 500)
        assert metric(client, "fastenc_requests_total", path="/encode", status="500") == 1
        broken.may_go.clear()
        assert len(vectors(client.post("encode", json={"rows": x.tolist()}))) == 30


def test_vectors_that_are_no_numbers_are_refused(tmp_path):
    model = fastenc.Encoder(2, (1,), activation="identity")
    torch.nn.init.constant_(model.layers[0].weight, 1e30)
    model.save_pretrained(tmp_path / "model")
    with serving(SavedModel(tmp_path / "model")) as client:
        assert "row 1" in refusal(client.post("encode", json={"rows": [[0, 0], [1e30, 1e30]]}), 422)


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


def test_the_page_needs_nothing_else(client):
    response = client.get("")
    page, policy = response.text, response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://|//[a-z]", page)
    assert not re.search(r"\bon\w+=|style=", page)  # which the policy would not let run
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a.csv", "a.csv"),
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\a.csv", "a.csv"),
        ("", "the file"),
        ("a\n\x00b.csv", "ab.csv"),
        ("x" * 300 + ".csv", "x" * 96 + ".csv"),
    ],
)
def test_names_of_files(name, shown):
    assert shown_name(name) == shown

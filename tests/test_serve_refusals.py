"""What the service must refuse, each time with one sentence: bad rows and files, bodies that are too large or do not
come, and whoever may not ask."""

from __future__ import annotations

import json
import pickle
import threading

import numpy as np
import pytest
import torch
from http_service import as_bytes, connect, people, read_all, refusal, save_model, serving, upload, vectors, wait_until

import fastenc
from fastenc.pipeline import SavedModel
from fastenc.serving import app as app_module
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


def test_vectors_that_are_no_numbers_are_refused(tmp_path):
    model = fastenc.Encoder(2, (1,), activation="identity")
    torch.nn.init.constant_(model.layers[0].weight, 1e30)
    model.save_pretrained(tmp_path / "model")
    with serving(SavedModel(tmp_path / "model")) as client:
        assert "row 1" in refusal(client.post("encode", json={"rows": [[0, 0], [1e30, 1e30]]}), 422)


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

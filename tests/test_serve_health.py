"""What whoever runs the service sees of it: health, metrics, its page, a full queue and errors of its own."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from http_service import array_model, people, refusal, save_model, serving, vectors, wait_until

import fastenc
from fastenc.pipeline import SavedModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return SavedModel(save_model(tmp_path_factory.mktemp("people") / "model", people()))


@pytest.fixture(scope="module")
def client(saved):
    with serving(saved, max_rows=50, max_bytes=100_000) as client:
        yield client


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    return array_model(tmp_path_factory.mktemp("array") / "model")


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


def metric(client, name, **labels):
    text = client.get("metrics").text
    wanted = "".join(f'{key}="{value}"' + "," for key, value in labels.items()).rstrip(",")
    line = re.search(rf"^{name}{re.escape('{' + wanted + '}') if wanted else ''} (\S+)$", text, re.MULTILINE)
    return float(line[1]) if line else 0.0


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


def test_the_page_needs_nothing_else(client):
    response = client.get("")
    page, policy = response.text, response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://|//[a-z]", page)
    assert not re.search(r"\bon\w+=|style=", page)  # which the policy would not let run
    assert response.headers["x-content-type-options"] == "nosniff"

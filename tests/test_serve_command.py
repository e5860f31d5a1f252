"""`fastenc serve` as a process: its options, its signals, and that nothing is lost on a restart."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import httpx
import pandas as pd
import pytest
import torch
from accuracy import Worst
from http_service import connect, finish, people, read_all, save_model, started, wait_until
from typer.testing import CliRunner

import fastenc
from fastenc import cli
from fastenc.pipeline import SavedModel
from fastenc.serving.server import is_loopback, listen

TOKEN = "a-token-of-some-length"
ROWS = {"rows": [[40.0, "red", 170.0], [20.0, "blue", 150.5]]}


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model", people())


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text(f"{TOKEN}\n")
    return path


def ask(url, **options):
    return httpx.post(f"{url}encode", json=ROWS, trust_env=False, timeout=60, **options)


def vectors(answer):
    return {"vectors": torch.tensor(answer["vectors"])}


def is_refused(url):
    """Whether no connection can be made any more."""
    try:
        connect(url).close()
    except ConnectionError:
        return True
    return False


def test_sigterm_lets_requests_under_way_be_answered_and_a_restart_changes_nothing(folder):
    with started(folder, "--threads", "1") as (child, url):
        before = ask(url).json()
        port = httpx.URL(url).port
        # One request has come half, and its rest follows when the server is told to stop and takes no more.
        body = b'{"rows": [[40.0, "red", 170.0], [20.0, "blue", 150.5]]}'
        half = connect(url)
        head = (
            f"POST /encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        half.sendall(head.encode() + b"\r\n\r\n" + body[:10])
        idle = connect(url)
        wait_until(lambda: "fastenc_inside_requests 1.0" in httpx.get(f"{url}metrics", trust_env=False).text, "not in")
        child.send_signal(signal.SIGTERM)
        wait_until(lambda: is_refused(url), "the server takes requests on")
        half.sendall(body[10:])
        answer = read_all(half)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert read_all(idle) == b""
        half.close()
        idle.close()
        code, errors = finish(child)
        assert code == 0, errors
        assert errors == ""
    with started(folder, "--threads", "1", "--port", port) as (_, url):
        assert httpx.URL(url).port == port
        assert ask(url).json() == before


def test_of_many_clients_none_gets_half_an_answer(folder):
    """Each request is answered, right, or refused by its connection: also those that come as the server stops."""
    with started(folder, "--wait-ms", "5") as (child, url):
        outcomes: list[object] = []

        def keep_asking() -> None:
            with httpx.Client(trust_env=False, timeout=60) as client:
                while True:
                    try:
                        response = client.post(f"{url}encode", json=ROWS)
                    except httpx.TransportError as error:
                        outcomes.append(error)
                        return
                    outcomes.append((response.status_code, response.json()))

        threads = [threading.Thread(target=keep_asking) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(outcomes) > 100, "no answers")
        child.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        code, errors = finish(child)
    assert code == 0, errors
    assert "Traceback" not in errors
    answers = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    assert len(outcomes) - len(answers) == len(threads)
    # Joined with others, rows may be rounded otherwise; each answer is as near to float64 as eager PyTorch is.
    saved = SavedModel(folder)
    frame = pd.DataFrame(ROWS["rows"], columns=["age", "colour", "height"])
    x = torch.from_numpy(saved.prepare("rows", frame).x)
    with torch.inference_mode(), fastenc.use_backend("reference"):
        eager = {"vectors": saved.encoder(x)}
        exact = {"vectors": saved.encoder.double()(x.double())}
    worst = Worst()
    for status, answer in answers:
        assert status == 200
        worst.add(vectors(answer), eager, exact)
    worst.check()
    assert not [outcome for outcome in outcomes if isinstance(outcome, httpx.TimeoutException)]


def test_ctrl_c_stops_it(folder):
    with started(folder) as (child, url):
        assert ask(url).status_code == 200
        child.send_signal(signal.SIGINT)
        code, errors = finish(child)
        assert code == 130
        assert "Traceback" not in errors


def test_a_new_model_is_served_after_a_restart(folder):
    with started(folder) as (_, url):
        before = ask(url).json()
        save_model(folder, people(), seed=1)
        assert ask(url).json() == before
    with started(folder) as (_, url):
        assert ask(url).json() != before


def test_options_reach_the_server(folder, token_file):
    options = ("--max-rows", 1, "--max-bytes", 1000, "--batch-rows", 1, "--wait-ms", 0, "--queue", 3, "--threads", 1)
    with started(folder, *options, "--token-file", token_file) as (child, url):
        assert ask(url).status_code == 401
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        response = ask(url, headers=bearer)
        assert response.status_code == 413
        assert "takes 1 at once" in response.json()["error"]
        response = httpx.post(f"{url}encode", content=b" " * 1001, headers=bearer, trust_env=False)
        assert response.status_code == 415
        health = httpx.get(f"{url}health", headers=bearer, trust_env=False).json()
        assert health["limits"] == {"rows": 1, "bytes": 1000}
        assert str(folder) not in str(health)
        child.send_signal(signal.SIGTERM)
        assert finish(child) == (0, "")


def fail(*arguments):
    """The one sentence on stderr."""
    result = CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("fastenc: ")]
    return line


def test_what_cannot_be_served_is_one_sentence(folder, tmp_path):
    assert "nowhere" in fail(tmp_path / "nowhere")
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}, cannot be listened on" in fail(folder, "--port", port)
    assert "cannot be listened on" in fail(folder, "--host", "192.0.2.1", "--port", 0, "--token", TOKEN)


def test_answers_are_sent_at_once():
    """Not after the 40 ms that Nagle's algorithm and delayed acknowledgements make together."""
    with listen("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP  # what asyncio goes by


def test_a_server_for_others_needs_a_token(folder, tmp_path):
    for host in ("0.0.0.0", "192.168.0.7", "::", "example.org"):
        assert "--token-file" in fail(folder, "--host", host)
    for token in ("short", "with spaces in between", "ünïcödé-letters-inside", "new\nline-in-the-middle"):
        assert "16 or more" in fail(folder, "--token", token)
        (tmp_path / "token").write_text(token, encoding="utf-8")
        assert "16 or more" in fail(folder, "--token-file", tmp_path / "token")
    assert "leave one of them out" in fail(folder, "--token", TOKEN, "--token-file", tmp_path / "token")
    assert "No such file" in fail(folder, "--token-file", tmp_path / "nowhere")
    assert is_loopback("127.0.0.1")
    assert is_loopback("127.8.8.8")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("")


def test_the_examples_of_the_docs(folder, token_file, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("the examples are of curl, which is not installed")
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    commands = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if block.startswith("curl")]
    assert len(commands) == 5
    people().to_csv(tmp_path / "people.csv", index=False)
    with started(folder, "--token-file", token_file) as (_, url):
        outputs = []
        for command in commands:
            command = command.replace("http://127.0.0.1:8000/", url)
            done = subprocess.run(
                ["sh", "-ec", command],
                cwd=tmp_path,
                env={"PATH": "/usr/bin:/bin", "TOKEN": TOKEN},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
    assert '"rows":2' in outputs[0]
    assert '"rows":2' in outputs[1]
    assert '"rows":40' in outputs[2]
    assert '"ready":true' in outputs[3]
    assert "fastenc_batch_rows_count 3.0" in outputs[4]

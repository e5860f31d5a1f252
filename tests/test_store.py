"""The file that keeps what was measured: several processes, broken files, folders that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from fastenc.kernels.store import Store


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastenc" / "tuning.json"


def test_entries_come_back(path):
    assert Store().get("a") is None
    assert not path.parent.exists()  # reading leaves nothing behind
    store = Store()
    assert store.put({"a": {"ms": 1.5}}) is None
    assert store.get("a") == {"ms": 1.5}
    assert Store().entries() == {"a": {"ms": 1.5}}
    assert {file.name for file in path.parent.iterdir()} == {"tuning.json", "tuning.lock"}


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store().path == tmp_path / ".cache" / "fastenc" / "tuning.json"


def test_what_others_wrote_is_kept(path):
    mine, theirs = Store(), Store()
    assert mine.entries() == theirs.entries() == {}
    theirs.put({"b": {"ms": 2}, "c": {"ms": 3}})
    mine.put({"a": {"ms": 1}, "c": {"ms": 4}})
    assert Store().entries() == mine.entries() == {"a": {"ms": 1}, "b": {"ms": 2}, "c": {"ms": 4}}


def test_processes_that_write_at_once(path):
    """Every entry of every process is there afterwards, and no reader ever meets half a file."""
    program = (
        "import sys; from fastenc.kernels.store import Store; store = Store()\n"
        "for i in range(40): assert store.put({f'{sys.argv[1]}-{i}': {'ms': i}}) is None\n"
    )
    writers = [subprocess.Popen([sys.executable, "-W", "error", "-c", program, name]) for name in "ab"]
    while any(writer.poll() is None for writer in writers):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Store().entries()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert Store().entries().keys() == {f"{name}-{i}" for name in "ab" for i in range(40)}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', '{"format": 2, "entries": {}}', '{"format": 1, "entries": [1]}', "\x00"],
)
def test_a_broken_file_is_one_warning_and_empty(path, text):
    path.parent.mkdir()
    path.write_text(text)
    store = Store()
    with pytest.warns(RuntimeWarning, match=r"cannot make sense of .*tuning\.json .*--clear-cache") as caught:
        assert store.get("a") is None
    store.get("b")
    assert len(caught) == 1


def test_a_broken_file_is_replaced_when_something_was_measured(path):
    path.parent.mkdir()
    path.write_text("{")
    store = Store()
    with pytest.warns(RuntimeWarning, match="cannot make sense"):
        store.put({"a": {"ms": 1}})
    assert Store().entries() == {"a": {"ms": 1}}


def test_entries_that_are_none(path):
    path.parent.mkdir()
    path.write_text(json.dumps({"format": 1, "entries": {"a": 3}}))
    with pytest.warns(RuntimeWarning, match="cannot make sense"):
        assert Store().entries() == {}


def test_a_folder_that_cannot_be_written(path):
    """Root may write anywhere, so a file stands where the folder should be."""
    path.parent.write_text("")
    store = Store()
    assert str(path.parent) in store.put({"a": {"ms": 1}})
    assert store.get("a") == {"ms": 1}
    assert Store().get("a") is None


def test_a_crash_while_writing_leaves_the_old_file(path, monkeypatch):
    store = Store()
    store.put({"a": {"ms": 1}})
    before = path.read_bytes()

    def fail(*args):
        raise KeyboardInterrupt

    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, fail)
        with pytest.raises(KeyboardInterrupt):
            store.put({"b": {"ms": 2}})
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(path.parents[1]))
        assert path.read_bytes() == before
        assert {file.name for file in path.parent.iterdir()} == {"tuning.json", "tuning.lock"}


def test_clear(path):
    store = Store()
    store.put({"a": {"ms": 1}})
    store.clear()
    assert store.entries() == Store().entries() == {}
    assert not path.exists()
    store.clear()


def test_forget_reads_again(path):
    store = Store()
    assert store.entries() == {}
    Store().put({"a": {"ms": 1}})
    assert store.entries() == {}
    store.forget()
    assert store.entries() == {"a": {"ms": 1}}


def test_the_file_is_for_people_too(path):
    Store().put({"b": {"ms": 1}, "a": {"ms": 2}})
    assert list(json.loads(Path(path).read_text())["entries"]) == ["a", "b"]

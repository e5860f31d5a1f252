"""The record of a training: a split that stays the same, and a record that is believed for its own model only."""

import numpy as np
import pytest

from fastenc import Encoder
from fastenc.record import RECORD_FILE, fingerprint, read_record, split_rows, write_record


@pytest.mark.parametrize(("rows", "fraction", "held_out"), [(10, 0.3, 3), (10, 0.0, 0), (1, 0.1, 0), (1797, 0.2, 359)])
def test_the_parts_of_a_split_are_all_rows(rows, fraction, held_out):
    kept, rest = split_rows(rows, fraction, seed=0)
    assert len(rest) == held_out
    assert sorted([*kept, *rest]) == list(range(rows))


def test_a_split_is_the_same_for_ever():
    kept, held_out = split_rows(10, 0.3, seed=0)  # written down: a saved model depends on it
    assert held_out.tolist() == [2, 8, 4]
    assert kept.tolist() == [9, 1, 6, 7, 3, 0, 5]


def test_a_fingerprint_is_of_shape_and_values():
    x = np.arange(6, dtype=np.float32)
    assert fingerprint(x.reshape(2, 3)) == fingerprint(x.reshape(3, 2).reshape(2, 3).copy())
    assert len({fingerprint(x.reshape(2, 3)), fingerprint(x.reshape(3, 2)), fingerprint(x.reshape(2, 3) + 1)}) == 3
    assert fingerprint(x.reshape(2, 3)[:, ::2]) == fingerprint(x.reshape(2, 3)[:, ::2].copy())


def save(folder):
    Encoder(3, (2,)).save_pretrained(folder)
    write_record(
        folder,
        fingerprint(np.ones((4, 3), np.float32)),
        rows=5,
        held_out=0.2,
        seed=7,
        target=None,
        history={"loss": [2.0, 1.0]},
    )


def test_a_record_reads_back(tmp_path):
    save(tmp_path)
    record = read_record(tmp_path)
    assert record.pop("model_sha256")
    assert record == {
        "rows_sha256": fingerprint(np.ones((4, 3), np.float32)),
        "rows": 5,
        "held_out": 0.2,
        "seed": 7,
        "target": None,
        "history": {"loss": [2.0, 1.0]},
    }
    assert not list(tmp_path.glob(".*"))


def test_a_record_of_another_model_or_broken_is_none(tmp_path):
    assert read_record(tmp_path) is None
    save(tmp_path)
    Encoder(3, (2,)).save_pretrained(tmp_path)
    assert read_record(tmp_path) is None
    for text in ("", "[]", "{}", "no JSON"):
        (tmp_path / RECORD_FILE).write_text(text)
        assert read_record(tmp_path) is None

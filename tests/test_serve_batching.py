"""Requests that come together are answered by one call, and each gets what it would get alone."""

from __future__ import annotations

import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from accuracy import Worst
from http_service import NumbersReader, integer_model, people, save_model, wait_until

import fastenc
from fastenc.data import DataError
from fastenc.pipeline import SavedModel
from fastenc.serving.batching import Batcher, ClosedError, FullError
from fastenc.serving.served import ITEMS_AT_ONCE, Inputs, ServedModel


class Model:
    """Doubles numbers; keeps what each call got, and waits where it is told to."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, requests):
        self.calls.append([list(rows) for rows in requests])
        assert self.may_go.wait(60)
        if any(-1 in rows for rows in requests):
            raise ValueError("-1 cannot be doubled")
        return [np.array(rows) * 2 for rows in requests]


def make(model, **options):
    return Batcher(model, **{"batch_rows": 100, "wait_s": 60.0, "queue": 100, **options})


def test_what_comes_during_a_call_is_joined():
    model = Model()
    batcher = make(model)
    model.may_go.clear()
    first = batcher.submit([0], 1)
    wait_until(lambda: model.calls, "no call")
    others = [batcher.submit([number, number], 2) for number in range(1, 5)]
    assert batcher.waiting == 4
    model.may_go.set()
    assert first.result(60).tolist() == [0]
    assert [other.result(60).tolist() for other in others] == [[2, 2], [4, 4], [6, 6], [8, 8]]
    assert model.calls == [[[0]], [[1, 1], [2, 2], [3, 3], [4, 4]]]
    batcher.close()


def test_a_call_has_no_more_rows_than_it_may():
    model = Model()
    sizes = []
    batcher = make(model, batch_rows=5, observe=lambda rows, seconds: sizes.append(rows))
    model.may_go.clear()
    answers = [batcher.submit([0], 1)]
    wait_until(lambda: model.calls, "no call")
    answers += [batcher.submit([1] * rows, rows) for rows in (2, 3, 1, 9, 5)]
    model.may_go.set()
    assert [len(answer.result(60)) for answer in answers] == [1, 2, 3, 1, 9, 5]
    batcher.close()
    assert sizes == [1, 5, 1, 9, 5]  # one of more than five rows goes alone


def test_a_request_waits_for_others_that_are_in_the_server():
    model = Model()
    batcher = make(model)
    with batcher.enter(), batcher.enter():
        first = batcher.submit([1], 1)
        time.sleep(0.05)
        assert not model.calls
        second = batcher.submit([2], 1)
        assert first.result(60).tolist() == [2]
        assert second.result(60).tolist() == [4]
    assert model.calls == [[[1], [2]]]
    with batcher.enter():
        with batcher.enter():
            third = batcher.submit([3], 1)
        assert third.result(60).tolist() == [6]  # the other one has left without a word
    batcher.close()


def test_a_request_waits_no_longer_than_it_may():
    batcher = make(Model(), wait_s=0.05)
    with batcher.enter(), batcher.enter():
        start = time.monotonic()
        assert batcher.submit([1], 1).result(60).tolist() == [2]
        assert time.monotonic() - start >= 0.05
    batcher.close()


def test_one_alone_does_not_wait():
    batcher = make(Model(), wait_s=600.0)
    with batcher.enter():
        assert batcher.submit([1], 1).result(60).tolist() == [2]
    batcher.close()


def test_a_bad_request_does_not_spoil_the_others():
    model = Model()
    batcher = make(model)
    with batcher.enter(), batcher.enter(), batcher.enter():
        answers = [batcher.submit(rows, len(rows)) for rows in ([1], [2, -1], [3])]
        assert answers[0].result(60).tolist() == [2]
        with pytest.raises(ValueError, match="-1"):
            answers[1].result(60)
        assert answers[2].result(60).tolist() == [6]
    batcher.close()


def test_a_request_that_was_given_up_is_left_out():
    model = Model()
    batcher = make(model)
    model.may_go.clear()
    first = batcher.submit([0], 1)
    wait_until(lambda: model.calls, "no call")
    second, third = batcher.submit([1], 1), batcher.submit([2], 1)
    assert second.cancel()
    model.may_go.set()
    assert first.result(60).tolist() == [0]
    assert third.result(60).tolist() == [4]
    assert model.calls == [[[0]], [[2]]]
    batcher.close()


def test_no_more_come_in_than_may():
    batcher = make(Model(), queue=2)
    with batcher.enter():
        with batcher.enter(), pytest.raises(FullError), batcher.enter():
            pass
        with batcher.enter():
            assert batcher.entered == 2
    assert batcher.entered == 0
    batcher.close()


def test_closing_answers_what_is_there_and_takes_no_more():
    model = Model()
    batcher = make(model)
    model.may_go.clear()
    answers = [batcher.submit([number], 1) for number in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    wait_until(lambda: batcher.closed, "it does not close")
    with pytest.raises(ClosedError):
        batcher.submit([9], 1)
    with pytest.raises(ClosedError), batcher.enter():
        pass
    model.may_go.set()
    closing.join(60)
    assert [answer.result(0).tolist() for answer in answers] == [[0], [2], [4], [6], [8]]


@pytest.mark.parametrize("widths", [(32, 8), (64, 128, 64, 3)])
def test_joined_rows_give_what_they_give_alone(tmp_path, widths):
    """Within rounding: both are as near to float64 as eager PyTorch is, by the rule of all kernels here."""
    x = np.random.default_rng(0).normal(size=(200, 20))
    served = ServedModel(SavedModel(save_model(tmp_path / "model", x, widths=widths)))
    rows = served.saved.prepare("x", x).x
    requests = [Inputs(part) for part in np.split(x, [1, 2, 9, 40, 41, 42, 120])]
    joined = np.concatenate([each.vectors for each in served.encode(requests)])
    alone = np.concatenate([served.encode([request])[0].vectors for request in requests])
    encoder = served.saved.encoder
    with torch.inference_mode(), fastenc.use_backend("reference"):
        eager = encoder(torch.from_numpy(rows))
        exact = encoder.double()(torch.from_numpy(rows).double())
    worst = Worst()
    for vectors in (joined, alone):
        worst.add({"vectors": torch.from_numpy(vectors)}, {"vectors": eager}, {"vectors": exact})
    worst.check()


def test_joined_items_give_what_they_give_alone_to_the_bit():
    """Of whole numbers, whose sums are exact: so none is lost, doubled or given to another."""
    generator = np.random.default_rng(0)
    arrays = [generator.integers(-9, 9, generator.integers(1, 30)).astype(np.float32) for _ in range(3 * ITEMS_AT_ONCE)]
    saved = SavedModel.__new__(SavedModel)
    saved.model = saved.encoder = integer_model().eval()
    saved.reader, saved.preprocessor = NumbersReader(), None
    served = ServedModel(saved)
    requests = [Inputs(part) for part in (arrays[:1], arrays[1:100], arrays[100:])]
    joined = [each.vectors for each in served.encode(requests)]
    assert [len(vectors) for vectors in joined] == [len(request) for request in requests]
    alone = np.concatenate([served.encode([Inputs([array])])[0].vectors for array in arrays])
    np.testing.assert_array_equal(np.concatenate(joined), alone)


def served_people(folder, **options):
    return ServedModel(SavedModel(save_model(folder / "model", people(), **options)))


def preparations(served, requests, monkeypatch):
    """What is prepared of some requests, and how many times preprocessing was called for it."""
    calls = []
    prepare = served.saved.prepare
    monkeypatch.setattr(served.saved, "prepare", lambda *arguments: calls.append(1) or prepare(*arguments))
    return served._prepare(requests), len(calls)


def assert_as_alone(parts, served, requests):
    for part, request in zip(parts, requests, strict=True):
        alone = served.saved.prepare("the rows", request.rows)
        np.testing.assert_array_equal(part.x, alone.x)
        np.testing.assert_array_equal(part.rows, alone.rows)
        assert (part.dropped, part.unseen) == (alone.dropped, alone.unseen)


@pytest.mark.parametrize("missing", ["impute", "drop"])
def test_tables_are_prepared_together_and_give_the_same_bits(tmp_path, monkeypatch, missing):
    served = served_people(tmp_path, missing=missing)
    frame = people()
    whole = frame.iloc[10:20].assign(age=range(10))  # whole numbers where others have fractions
    requests = [Inputs(part) for part in (frame.iloc[:1], frame.iloc[2:10], whole, frame.iloc[30:])]
    parts, calls = preparations(served, requests, monkeypatch)
    assert calls == 1
    assert_as_alone(parts, served, requests)
    assert parts[1].dropped == (missing == "drop")


def test_tables_that_are_not_alike_are_prepared_apart(tmp_path, monkeypatch):
    served = served_people(tmp_path)
    frame = people()
    numbers = frame.assign(colour=range(40))  # in no category, and text beside them would make them text
    for other in (numbers, frame[["height", "colour", "age"]], frame.assign(colour="octarine"), frame.assign(more=1)):
        requests = [Inputs(frame), Inputs(other)]
        parts, calls = preparations(served, requests, monkeypatch)
        assert calls >= 2
        assert_as_alone(parts, served, requests)
        monkeypatch.undo()


def test_a_table_that_cannot_be_prepared_does_not_spoil_another(tmp_path):
    served = served_people(tmp_path, missing="drop")
    batcher = Batcher(served.encode, batch_rows=100, wait_s=60.0, queue=9)
    frame = people()
    bad = [frame[3:4], frame.assign(age="old"), pd.DataFrame({"age": [1.0]})]
    with batcher.enter(), batcher.enter(), batcher.enter(), batcher.enter(), batcher.enter():
        answers = [batcher.submit(Inputs(rows), len(rows)) for rows in (frame[:3], *bad, frame[4:6])]
        assert [len(answers[place].result(60).vectors) for place in (0, 4)] == [3, 2]
        for place, words in ((1, "1 of 1"), (2, "'age' held numbers"), (3, "no column")):
            with pytest.raises(DataError, match=words):
                answers[place].result(60)
    batcher.close()

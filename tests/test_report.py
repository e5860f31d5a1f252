"""Figures against their definitions and against scikit-learn, and what cannot be measured said in words."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from fastenc.report import (
    class_numbers,
    dead_units,
    evaluate_codes,
    fit_pca,
    probe_accuracy,
    render_evaluation,
    row_errors,
    table,
    thinned,
)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return (data.data / 16).astype(np.float32), data.target


def halves(rows):
    return np.arange(0, rows, 2), np.arange(1, rows, 2)


def test_row_errors():
    assert row_errors(np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[1.0, 4.0], [3.0, 4.0]])).tolist() == [2.0, 12.5]


def test_pca_has_no_more_components_than_the_data():
    assert fit_pca(np.eye(3, 8), 5).n_components_ == 3
    assert fit_pca(np.ones((9, 2)), 5).n_components_ == 2


def test_codes_that_are_pca_get_pcas_figures(digits):
    x, labels = digits
    fit_rows, score_rows = halves(len(x))
    pca = PCA(16, random_state=0).fit(x[fit_rows])
    codes = pca.transform(x)
    evaluation = evaluate_codes(
        x, codes, pca.inverse_transform(codes), labels, fit_rows=fit_rows, score_rows=score_rows
    )
    errors = evaluation.reconstruction
    assert errors["fastenc"] == pytest.approx(errors["PCA, 16 components"])
    expected = np.square(pca.inverse_transform(codes[score_rows]) - x[score_rows]).mean()
    assert errors["PCA, 16 components"] == pytest.approx(expected)
    assert errors["mean of the fitted rows"] == pytest.approx(
        np.square(x[score_rows] - x[fit_rows].mean(axis=0)).mean()
    )
    for probe in ("nearest neighbour", "linear"):
        scores = evaluation.accuracy[probe]
        assert scores["code, 16 numbers"] == scores["PCA, 16 components"]
        assert 0.9 < scores["all 64 features"] <= 1
    assert (evaluation.fitted_rows, evaluation.scored_rows, evaluation.code_size) == (899, 898, 16)
    assert evaluation.notes == []
    assert json.loads(json.dumps(evaluation.to_dict()))["reconstruction"] == errors


def test_only_the_scored_rows_count(digits):
    x, labels = digits
    fit_rows, score_rows = halves(len(x))
    reconstruction = x.copy()
    reconstruction[fit_rows] += 100
    shuffled = labels.copy()
    shuffled[score_rows] = (labels[score_rows] + 1) % 10  # so that every right answer is wrong
    evaluation = evaluate_codes(x, x, reconstruction, shuffled, fit_rows=fit_rows, score_rows=score_rows)
    assert evaluation.reconstruction["fastenc"] == 0
    assert evaluation.accuracy["nearest neighbour"]["all 64 features"] < 0.1


def test_codes_without_information_are_seen(digits):
    x, labels = digits
    fit_rows, score_rows = halves(len(x))
    noise = np.random.default_rng(0).normal(size=(len(x), 16)).astype(np.float32)
    accuracy = probe_accuracy(noise[fit_rows], labels[fit_rows], noise[score_rows], labels[score_rows])
    assert max(accuracy.values()) < 0.2  # a guess is right once in ten


def test_a_thinned_table_keeps_all_classes_of_sorted_rows(digits, monkeypatch):
    monkeypatch.setattr("fastenc.report.MAX_PROBE_ROWS", 100)
    x, labels = digits
    order = np.argsort(labels, kind="stable")
    assert len(thinned(np.arange(100))) == 100
    assert len(thinned(np.arange(101))) == 51
    fit_rows, score_rows = halves(len(x))
    evaluation = evaluate_codes(x[order], x[order], None, labels[order], fit_rows=fit_rows, score_rows=score_rows)
    assert evaluation.accuracy["nearest neighbour"]["all 64 features"] > 0.8


def test_a_model_without_decoder_or_labels(digits):
    x, _ = digits
    fit_rows, score_rows = halves(len(x))
    evaluation = evaluate_codes(x, x[:, :4], None, None, fit_rows=fit_rows, score_rows=score_rows)
    assert "fastenc" not in evaluation.reconstruction
    assert evaluation.accuracy == {}
    assert "no decoder" in render_evaluation(evaluation)


@pytest.mark.parametrize(
    ("target", "numbers"),
    [
        (np.array([5, 7, 5, 7]), [0, 1, 0, 1]),
        (np.array([True, False, True, False]), [1, 0, 1, 0]),
        (np.array(["b", "a", "b", "a"]), [1, 0, 1, 0]),
        (np.array(["b", None, "a", "b", "a"], object), [1, -1, 0, 1, 0]),
        (np.array([1.0, np.nan, 2.0, 1.0, 2.0]), [0, -1, 1, 0, 1]),
    ],
)
def test_class_numbers(target, numbers):
    found, why_not = class_numbers(target)
    assert why_not is None
    assert found.tolist() == numbers


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (np.array([0.5, 1.5, 0.5, 1.5]), "fractions"),
        (np.array([3, 3, 3]), "at least two"),
        (np.arange(100), "100 different values"),
        (np.arange(100.0) // 4, "25 different values"),
    ],
)
def test_targets_that_are_no_classes_are_named(target, words, digits):
    assert words in class_numbers(target)[1]
    x = digits[0][: len(target)]
    rows = np.arange(len(target))
    evaluation = evaluate_codes(x, x, x, target, fit_rows=rows, score_rows=rows)
    assert evaluation.accuracy == {}
    assert words in evaluation.notes[0]


def test_rows_without_a_label_are_left_out_of_the_classifiers(digits):
    x, labels = digits
    fit_rows, score_rows = halves(len(x))
    missing = labels.astype(float)
    missing[::3] = np.nan
    evaluation = evaluate_codes(x, x, x, missing, fit_rows=fit_rows, score_rows=score_rows)
    assert evaluation.accuracy["nearest neighbour"]["all 64 features"] > 0.9
    assert (evaluation.fitted_rows, evaluation.scored_rows) == (899, 898)


def test_constant_data_gives_no_warning_and_no_ratio():
    x = np.ones((10, 3), np.float32)
    evaluation = evaluate_codes(x, x[:, :2], x, None, fit_rows=np.arange(5), score_rows=np.arange(5, 10))
    assert set(evaluation.reconstruction.values()) == {0.0}
    assert render_evaluation(evaluation)


def test_dead_units():
    codes = np.array([[0.0, 1.0, 2.0], [0.0, 3.0, 2.0]])
    assert dead_units(codes) == [0, 2]


def test_table():
    text = table(("what", "how many"), [("apples", "3"), ("pears", "12")])
    assert text.splitlines() == ["what    how many", "------  --------", "apples         3", "pears         12"]

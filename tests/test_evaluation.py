"""The report's figures against their definitions, what it says of bad input, its page and its JSON."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from torch import nn

import fastenc
from fastenc.data import DataError, Preprocessor
from fastenc.evaluation.quality import (
    anomalies,
    cluster_figures,
    code_statistics,
    feature_errors,
    interval,
    spread,
)


@pytest.fixture(scope="module")
def iris():
    frame, labels = load_iris(return_X_y=True, as_frame=True)
    return frame - frame.mean(), labels.to_numpy()


@pytest.fixture(scope="module")
def model(iris):
    torch.manual_seed(0)
    model = fastenc.AutoEncoder(fastenc.Encoder(4, (16, 2), final_activation="identity"))
    fastenc.Trainer(model, lr=0.01, seed=0).fit(iris[0], epochs=50, verbose=False)
    return model.eval()


@pytest.fixture(scope="module")
def report(model, iris):
    return fastenc.evaluate(model, *iris)


def test_feature_errors_and_spread():
    x, back = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[1.0, 4.0], [3.0, 4.0]])
    assert feature_errors(x, back).tolist() == [4.5, 10.0]
    figures = spread(np.arange(101.0))
    assert figures == {"mean": 50.0, "median": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}


def test_code_statistics():
    first, second = np.array([1.0, -1.0, 1.0, -1.0]), np.array([1.0, 1.0, -1.0, -1.0])
    codes = np.stack([first, second, np.full(4, 3.0), -2 * first], axis=1)
    found = code_statistics(codes)
    assert found["dead"] == [2]
    assert found["variance"] == [1.0, 1.0, 0.0, 4.0]
    assert found["correlation"][3] == [-1.0, 0.0, 0.0, 1.0]
    assert found["correlation"][2] == [0.0, 0.0, 0.0, 0.0]
    assert found["redundancy"] == pytest.approx(1 / 3)  # of three pairs one says the same
    assert code_statistics(np.stack([first, second], axis=1))["effective_dimensions"] == pytest.approx(2.0)
    assert code_statistics(np.stack([first, first], axis=1))["effective_dimensions"] == pytest.approx(1.0)
    nothing = code_statistics(np.ones((4, 2)))
    assert (nothing["dead"], nothing["redundancy"], nothing["effective_dimensions"]) == ([0, 1], 0.0, 0.0)


def test_clusters_that_are_there_are_found():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    codes = generator.normal(size=(90, 2)) * 0.05 + np.array([[0, 0], [1, 0], [0, 1]])[labels]
    found = cluster_figures(codes, labels, seed=0)
    assert found["adjusted_rand"] == 1.0
    assert found["normalized_mutual_information"] == pytest.approx(1.0)
    assert found["silhouette"] > 0.8
    assert cluster_figures(codes, None, seed=0)["clusters"] == 3
    shuffled = cluster_figures(codes, generator.permutation(labels), seed=0)
    assert shuffled["adjusted_rand"] < 0.1
    assert cluster_figures(np.ones((20, 2)), np.arange(20) % 2, seed=0) == {}
    assert cluster_figures(np.ones((20, 2)), None, seed=0) == {}


def test_interval_is_the_corrected_t_interval():
    low, high = interval(np.array([0.8, 0.9]), train=70, test=30, confidence=0.95)
    reach = 12.706204736 * np.sqrt(0.005 * (1 / 2 + 30 / 70))  # Student's t at 0.975 with one degree of freedom
    assert (low, high) == pytest.approx((0.85 - reach, 0.85 + reach))


def test_anomalies_are_those_above_the_fitted_quantile():
    found = anomalies(np.arange(101.0), np.array([1.0, 99.0, 96.0]), np.array([7, 8, 9]), 0.95)
    assert (found["threshold"], found["above"]) == (95.0, 2)
    assert [each["row"] for each in found["highest"]] == [8, 9, 7]


def test_the_report_measures_what_the_model_gives(report, model, iris):
    x, _ = iris
    kept, held_out = fastenc.record.split_rows(150, 0.3, 0)
    rows = torch.tensor(x.to_numpy(), dtype=torch.float32)[held_out]
    with torch.inference_mode():
        errors = np.square(model(rows).double().numpy() - rows.double().numpy())
    assert [each["error"] for each in report.features] == pytest.approx(errors.mean(axis=0), rel=1e-5)
    assert [each["name"] for each in report.features] == list(x.columns)
    assert report.rows["fastenc"]["max"] == pytest.approx(errors.mean(axis=1).max(), rel=1e-5)
    assert report.evaluation.reconstruction["fastenc"] == pytest.approx(errors.mean(), rel=1e-5)
    assert report.anomaly["highest"][0]["row"] == held_out[errors.mean(axis=1).argmax()]
    assert report.downstream["metric"] == "accuracy"
    for scores in report.downstream["scores"].values():
        assert scores["low"] < scores["mean"] < scores["high"]
        assert scores["mean"] == pytest.approx(np.mean(scores["each"]))
        assert len(scores["each"]) == 10
    assert set(report.clusters) == {"code", "PCA of the same size", "all features"}
    assert report.notes == []
    assert len(kept) == report.evaluation.fitted_rows


def test_the_same_call_gives_the_same_report(report, model, iris):
    assert fastenc.evaluate(model, *iris).to_dict() == report.to_dict()
    assert not model.training
    model.train()
    fastenc.evaluate(model, iris[0])
    assert model.training
    model.eval()


def test_page_and_json(report, tmp_path):
    report.save_html(tmp_path / "page.html", "iris <&>", ["Of 150 flowers."])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>iris &lt;&amp;&gt;</h1><p>Of 150 flowers.</p>" in page
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(pictures) == 6
    assert all(ElementTree.fromstring(picture) is not None for picture in pictures)
    assert not re.search(r'(src|href)="(?!#|data:)', page)  # it needs nothing else
    for name in ("petal width (cm)", "adjusted rand", "5 nearest neighbours", "threshold"):
        assert name in page
    report.save_json(tmp_path / "figures.json", model="m")
    figures = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert figures["model"] == "m"
    assert figures["anomaly"] == report.anomaly
    assert figures["row_errors"] == report.rows
    assert str(report).count("\n\n") >= 5
    assert report.to_html() == report.to_html()


def test_numbers_as_target_and_a_metric_of_ones_own():
    x, y = load_diabetes(return_X_y=True)
    encoder = fastenc.Encoder(10, (4,))

    def largest_error(true, predicted):
        return np.abs(true - predicted).max()

    report = fastenc.evaluate(encoder, x * 20, y, metric=largest_error, splits=3)
    assert report.downstream["metric"] == "largest_error"
    assert 0.2 < fastenc.evaluate(encoder, x * 20, y).downstream["scores"]["all features"]["mean"] < 0.7
    assert report.anomaly is None
    assert any("no decoder" in note for note in report.notes)
    assert "fastenc" not in report.to_html().split("<h2>Codes")[0].split("<h2>")[1]


def test_a_folder_brings_its_preprocessing(model, iris, tmp_path):
    x, labels = iris
    preprocessor = Preprocessor(missing="drop").fit(x)
    model.save_pretrained(tmp_path, preprocessing=preprocessor.to_dict())
    holes = x.copy()
    holes.iloc[[0, 149], 1] = np.nan
    report = fastenc.evaluate(tmp_path, holes, labels)
    direct = fastenc.evaluate(model, preprocessor.transform(x.iloc[1:149]).x, labels[1:149])
    assert report.rows == direct.rows
    assert report.downstream == direct.downstream
    assert [each["row"] - 1 for each in report.anomaly["highest"]] == [
        each["row"] for each in direct.anomaly["highest"]
    ]


def test_codes_of_two_classes_by_roc_auc():
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    report = fastenc.evaluate(fastenc.AutoEncoder(fastenc.Encoder(30, (4,))), x, y, metric="roc_auc", splits=3)
    assert report.downstream["scores"]["all features"]["mean"] > 0.95


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.full((20, 4), np.nan)}, "x has NaN or Inf in 20 of 20 rows"),
        ({"x": np.zeros((20, 3))}, "x has 3 columns where 4 are expected"),
        ({"x": np.zeros((0, 4))}, "x has no rows; give at least one"),
        ({"x": np.zeros((3, 4))}, "x has 3 usable rows and evaluate needs at least 4; add some"),
        ({"x": pd.DataFrame({"a": ["b"] * 9})}, "column 'a' of x holds str values"),
        ({"y": np.zeros(3)}, r"y has shape \[3\] and x has 150 rows; give one label for each row"),
        ({"metric": "best"}, "metric is 'best', which scikit-learn does not know"),
        ({"metric": lambda true, predicted: np.nan}, "gave nan; give one that is a number for every split"),
        ({"metric": "roc_auc"}, "the metric 'roc_auc' cannot be measured here .*; give another metric"),
        ({"fit_rows": [], "score_rows": [1]}, "must be row numbers, at least one of each"),
        ({"fit_rows": [0, 1], "score_rows": [150]}, "go from 150 to 150, and x has rows 0 to 149"),
        ({"splits": 1}, "splits is 1; it must be a whole number of at least 2"),
        ({"quantile": 1.0}, "quantile is 1.0; it must be above 0 and below 1"),
        ({"confidence": 0}, "confidence is 0; it must be"),
    ],
)
@pytest.mark.filterwarnings("ignore:Scoring failed")
def test_bad_input_is_one_sentence(model, iris, change, words):
    arguments = {"x": iris[0], "y": iris[1] if "x" not in change else None, **change}
    with pytest.raises((DataError, ValueError), match=words) as error:
        fastenc.evaluate(model, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(150, int), "the target has 1 class"),
        (np.arange(150) == 0, "a class has too few rows|all of one class"),
        (np.array([str(i) for i in range(150)]), "too many for classes"),
        (np.where(np.arange(150) < 3, 1.5, np.nan), "too few to split|one value"),
    ],
)
def test_labels_that_cannot_be_used_are_noted(model, iris, labels, words):
    report = fastenc.evaluate(model, iris[0], labels)
    assert report.downstream is None
    assert any(re.search(words, note) for note in report.notes)
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_a_label_unseen_in_the_fitted_rows_is_noted(model, iris):
    names = np.array(["setosa", "versicolor", "virginica"])[iris[1]]
    rows = {"fit_rows": np.arange(100), "score_rows": np.arange(90, 150)}
    note = "50 of the scored rows have a label that no fitted row has, such as virginica"
    assert any(note in each for each in fastenc.evaluate(model, iris[0], names, **rows).notes)


def test_a_model_that_writes_to_its_input_leaves_a_map_alone(iris, tmp_path):
    rows = iris[0].to_numpy(np.float32)
    np.save(tmp_path / "x.npy", rows)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for x in (mapped, rows):
        fastenc.evaluate(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), x)
    assert np.array_equal(rows, iris[0].to_numpy(np.float32))


def test_streams_are_refused_in_one_sentence(model):
    loader = torch.utils.data.DataLoader(torch.zeros(9, 4))
    with pytest.raises(DataError, match="x is of type DataLoader; give a tensor, a numpy array"):
        fastenc.evaluate(model, loader)
    with pytest.raises(fastenc.ModelFileError, match="there is no folder"):
        fastenc.evaluate("no such folder", np.zeros((9, 4)))


def test_constant_rows_and_broken_codes(model):
    report = fastenc.evaluate(model, np.ones((30, 4), np.float32))
    assert report.codes["dead"] == [0, 1]
    assert any("No clusters" in note for note in report.notes)
    assert "<svg" in report.to_html()
    broken = fastenc.Encoder(4, (2,))
    nn.init.constant_(broken.layers[0].weight, np.nan)
    with pytest.raises(DataError, match="codes that are NaN or Inf; train it again"):
        fastenc.evaluate(broken, np.ones((30, 4), np.float32))

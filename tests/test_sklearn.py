"""The estimators by scikit-learn's own checks, in its pipelines and searches, and what bad input says."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import estimator_checks_generator

import fastenc
from fastenc.sklearn import EncoderClassifier, EncoderOutlierDetector, EncoderRegressor, EncoderTransformer

ESTIMATORS = [EncoderTransformer, EncoderClassifier, EncoderRegressor, EncoderOutlierDetector]
QUICK = {"widths": (32, 8), "epochs": 20, "lr": 0.01}
# check -> why it is left out
EXCEPTED = {"check_array_api_input": "skips itself unless SCIPY_ARRAY_API was set before Python began"}
CHECKS = [
    (estimator, check)
    for each in ESTIMATORS
    for estimator, check in estimator_checks_generator(each(**QUICK))
    if check.func.__name__ not in EXCEPTED
]


@pytest.mark.parametrize(
    ("estimator", "check"),
    CHECKS,
    ids=[f"{type(estimator).__name__}-{check.func.__name__}" for estimator, check in CHECKS],
)
def test_scikit_learns_checks(estimator, check, one_thread):
    check(estimator)


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True, as_frame=True)


@pytest.mark.parametrize("each", ESTIMATORS)
def test_the_same_random_state_gives_the_same_model(each, iris):
    x, y = iris
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = (each(random_state=3, dropout=0.2, **QUICK).fit(x, y) for _ in range(2))
    other = each(random_state=4, dropout=0.2, **QUICK).fit(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [list(estimator.model_.parameters()) for estimator in (first, second, other)]
    assert all(torch.equal(one, same) for one, same in zip(*weights[:2], strict=True))
    assert not torch.equal(weights[0][0], weights[2][0])
    assert clone(first).get_params() == first.get_params()


@pytest.mark.parametrize("each", ESTIMATORS)
def test_a_pickled_estimator_gives_the_same(each, iris):
    x, y = iris
    fitted = each(random_state=0, **QUICK).fit(x, y)
    call = "transform" if each is EncoderTransformer else "predict"
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(getattr(again, call)(x), getattr(fitted, call)(x))
    assert again.feature_names_in_.tolist() == list(x.columns)


def test_training_takes_the_engine(iris, monkeypatch):
    """The fast path of Trainer, by what Trainer itself says."""
    from fastenc import sklearn

    trainers = []

    class Watched(sklearn.Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            trainers.append(self)

    monkeypatch.setattr(sklearn, "Trainer", Watched)
    for each in ESTIMATORS:
        each(**QUICK).fit(*iris)
    assert len(trainers) == 4
    assert all("by the C++ engine" in trainer.explain() for trainer in trainers)


def test_transform_and_back(iris):
    x, _ = iris
    transformer = EncoderTransformer((32, 4), epochs=200, lr=3e-3, random_state=0).set_output(transform="pandas")
    codes = transformer.fit_transform(x)
    assert list(codes.columns) == [f"encodertransformer{i}" for i in range(4)]
    back = transformer.inverse_transform(codes.to_numpy())
    errors = np.square((back - x.to_numpy()) / x.to_numpy().std(axis=0)).mean(axis=1)
    assert errors.mean() < 0.1  # 1 is what the mean of the rows would give
    assert -transformer.score_samples(x) == pytest.approx(errors, rel=1e-3, abs=1e-6)
    assert transformer.score(x) == pytest.approx(transformer.score_samples(x).mean())
    with pytest.raises(ValueError, match="X has 3 columns and a code has 4; give what transform makes"):
        transformer.inverse_transform(codes.to_numpy()[:, :3])


def test_in_a_pipeline_and_a_search(iris):
    x, y = iris
    pipeline = make_pipeline(EncoderTransformer(random_state=0, **QUICK), LogisticRegression(max_iter=1000))
    search = GridSearchCV(pipeline, {"encodertransformer__widths": [(16, 1), (16, 4)]}, cv=3).fit(x, y)
    assert search.best_params_ == {"encodertransformer__widths": (16, 4)}
    assert search.best_score_ > 0.8


def test_classifier_learns_and_gives_the_labels_back(iris):
    x, y = iris
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    classifier = EncoderClassifier(patience=5, random_state=0, lr=0.01)
    assert cross_val_score(classifier, x, names, cv=3).min() > 0.8
    fitted = classifier.fit(x, names)
    assert fitted.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    probabilities = fitted.predict_proba(x)
    assert probabilities.sum(axis=1) == pytest.approx(1.0)
    assert (fitted.classes_[probabilities.argmax(axis=1)] == fitted.predict(x)).all()
    assert "val_loss" in fitted.history_


def test_regressor_learns_in_the_units_of_the_target():
    x, y = load_diabetes(return_X_y=True)
    regressor = EncoderRegressor((32, 16), epochs=30, weight_decay=1.0, optimizer="adamw", random_state=0)
    assert cross_val_score(regressor, x, y, cv=3).mean() > 0.4
    two = np.stack([y, -1000 * y], axis=1)
    predicted = regressor.fit(x, two).predict(x)
    assert predicted.shape == two.shape
    assert regressor.score(x, two) > 0.5


def test_detector_finds_what_does_not_fit():
    x, y = load_breast_cancer(return_X_y=True)
    benign, malignant = x[y == 1], x[y == 0]
    detector = EncoderOutlierDetector(epochs=50, lr=3e-3, contamination=0.05, random_state=0).fit(benign[:250])
    assert (detector.predict(benign[:250]) == -1).mean() == pytest.approx(0.05, abs=1 / 250)
    rest = np.concatenate([benign[250:], malignant])
    labels = np.repeat([1, 0], [len(benign) - 250, len(malignant)])
    assert roc_auc_score(labels, detector.decision_function(rest)) > 0.9


def test_early_stopping_holds_out_some_of_each_class():
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    y = np.repeat([0, 1], [36, 4])
    _, _, (_, held_out) = EncoderClassifier(validation_fraction=0.25)._hold_out(x, y, "cross_entropy", 0)
    assert np.bincount(held_out).tolist() == [9, 1]
    # One row of a class cannot be on both sides: then any rows are held out.
    lonely = np.repeat([0, 1], [39, 1])
    assert len(EncoderClassifier(validation_fraction=0.25)._hold_out(x, lonely, "cross_entropy", 0)[2][1]) == 10
    EncoderClassifier(patience=2, **QUICK).fit(x, lonely)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs is 0; it must be a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5; it must be"),
        ({"patience": 0}, "patience is 0; it must be"),
        ({"activation": "swish"}, "activation is 'swish'; it must be one of identity, relu"),
        ({"final_activation": "softmax"}, "final_activation is 'softmax'; it must be one of"),
        ({"widths": ()}, r"widths is \(\); give the width of each layer, for example \(128, 64, 16\)"),
        ({"widths": (8, 0)}, r"widths is \(8, 0\); give"),
        ({"widths": 16}, "widths is 16; give"),
        ({"dropout": 1.5}, "dropout is 1.5; it must be"),
        ({"optimizer": "adagard"}, "adagard"),
        ({"lr": -1.0}, "lr"),
        ({"patience": 3, "validation_fraction": 0.0}, "validation_fraction is 0.0; patience needs a number between"),
        ({"patience": 3, "validation_fraction": 0.999}, "leaves no rows to train on; lower it, or set patience=None"),
    ],
)
@pytest.mark.parametrize("each", ESTIMATORS)
def test_wrong_settings_are_one_sentence(each, settings, words, iris):
    with pytest.raises(ValueError, match=words):
        each(**settings).fit(*iris)


def test_wrong_settings_of_one_estimator(iris):
    with pytest.raises(ValueError, match="loss is 'cross_entropy'; it must be one of mse, mae, huber"):
        EncoderRegressor(loss="cross_entropy").fit(*iris)
    with pytest.raises(ValueError, match=r"contamination is 0.7; it must be above 0 and at most 0.5"):
        EncoderOutlierDetector(contamination=0.7).fit(*iris)


BAD = {
    "NaN": (lambda x: x.where(x > 5.0), "contains NaN"),
    "Inf": (lambda x: x.replace(5.1, np.inf), "contains infinity"),
    "text": (lambda x: x.assign(**{"sepal length (cm)": "long"}), "could not convert string to float"),
    "empty": (lambda x: x.iloc[:0], "0 sample"),
    "flat": (lambda x: x.iloc[:, 0].to_numpy(), "Expected 2D array"),
    "large": (lambda x: x * 1e300, "too large for float32; scale them down"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("each", ESTIMATORS)
def test_bad_rows_are_one_sentence(each, fault, iris):
    x, y = iris
    make, words = BAD[fault]
    scale = fault != "large"
    with pytest.raises(ValueError, match=words):
        each(scale=scale, **QUICK).fit(make(x), y[: len(make(x))])
    fitted = each(scale=scale, **QUICK).fit(x.to_numpy() if fault == "flat" else x, y)
    with pytest.raises(ValueError, match=words):
        getattr(fitted, "transform" if each is EncoderTransformer else "predict")(make(x))


@pytest.mark.parametrize("each", ESTIMATORS)
def test_other_columns_are_refused(each, iris):
    x, y = iris
    name = "transform" if each is EncoderTransformer else "predict"
    with pytest.raises(ValueError, match=r"X has 3 features, but .* is expecting 4 features"):
        getattr(each(**QUICK).fit(x.to_numpy(), y), name)(x.to_numpy()[:, :3])
    call = getattr(each(**QUICK).fit(x, y), name)
    with pytest.raises(ValueError, match=r"(?s)feature names.*missing.*petal width"):
        call(x.drop(columns="petal width (cm)"))
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(each(), call.__name__)(x)


def test_bad_labels_are_one_sentence(iris):
    x, y = iris
    with pytest.raises(ValueError, match="y has one class, 1; a classifier needs rows of at least two"):
        EncoderClassifier().fit(x, np.ones(len(x), int))
    with pytest.raises(ValueError, match="continuous"):
        EncoderClassifier().fit(x, y + 0.5)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        EncoderRegressor().fit(x, y[:10])
    with pytest.raises(ValueError, match="contains NaN"):
        EncoderRegressor().fit(x, y.where(y > 0))


def test_fewer_rows_of_a_class_than_folds(iris):
    x, y = iris
    few = pd.concat([x[:20], x[60:63]]), pd.concat([y[:20], y[60:63]])
    with pytest.warns(UserWarning, match="least populated class"):
        scores = cross_val_score(EncoderClassifier(**QUICK), *few, cv=5)
    assert len(scores) == 5
    assert np.isfinite(scores).all()


def test_a_loss_that_explodes_is_one_sentence(iris):
    with pytest.raises(FloatingPointError, match="try a smaller lr"):
        EncoderRegressor(optimizer="sgd", lr=1e30, epochs=3).fit(*iris)


def test_it_is_found_in_fastenc_and_says_what_is_missing(monkeypatch):
    assert fastenc.__getattr__("sklearn").EncoderTransformer is EncoderTransformer
    with pytest.raises(AttributeError, match="has no attribute 'sklearm'"):
        _ = fastenc.sklearm
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for loaded in ("sklearn.base", "fastenc.sklearn"):
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(ModuleNotFoundError, match=r'fastenc.sklearn needs scikit-learn; run: pip install "fastenc'):
        fastenc.__getattr__("sklearn")

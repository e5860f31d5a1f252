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
EXCEPTED = {
    "check_array_api_input": "skips itself unless SCIPY_ARRAY_API was set before Python began",
    "check_sample_weight_equivalence_on_dense_data": "compares to 1e-7, and training is in float32, in batches; "
    "test_weights_are_rows_that_come_so_often compares what is left when all rows are one batch",
}
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
    from fastenc.sklearn import base

    trainers = []

    class Watched(base.Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            trainers.append(self)

    monkeypatch.setattr(base, "Trainer", Watched)
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


@pytest.mark.parametrize("each", ESTIMATORS)
def test_weights_are_rows_that_come_so_often(each, iris):
    """All rows in one batch: then only the rounding of sums in float32 differs, which 20 steps let grow."""
    x, y = (part.to_numpy() for part in iris)
    times = np.arange(len(x)) % 4  # of some rows none
    settings = {**QUICK, "activation": "tanh", "batch_size": 10_000, "random_state": 0}
    weighed = each(**settings).fit(x, y, sample_weight=times)
    repeated = each(**settings).fit(x.repeat(times, axis=0), y.repeat(times))
    plain = each(**settings).fit(x, y)
    call = (
        "transform" if each is EncoderTransformer else "score_samples" if each is EncoderOutlierDetector else "predict"
    )
    call = "predict_proba" if each is EncoderClassifier else call
    found, exact, other = (getattr(estimator, call)(x) for estimator in (weighed, repeated, plain))
    assert np.abs(found - exact).max() < 1e-3 * np.abs(other - exact).max()
    if each is EncoderOutlierDetector:
        assert weighed.offset_ == pytest.approx(repeated.offset_, rel=1e-4)


def test_the_threshold_is_the_highest_that_so_many_rows_lie_below():
    from fastenc.sklearn.reconstructing import _threshold

    scores = np.array([3.0, 1.0, 2.0, 4.0])
    assert [_threshold(scores, None, share) for share in (0.2, 0.25, 0.3, 0.5)] == [1.0, 2.0, 2.0, 3.0]
    weight = np.array([2.0, 1.0, 3.0, 1.0])
    copies = scores.repeat(weight.astype(int))
    for share in (0.05, 0.1, 1 / 7, 0.3, 0.5):
        assert (
            _threshold(scores, weight, share)
            == _threshold(scores, weight / 7, share)
            == _threshold(copies, None, share)
        )


def test_balanced_classes_count_alike(iris):
    x, y = iris
    rows = np.r_[0:50, 50:55]  # fifty of one class, five of another
    settings = {**QUICK, "random_state": 0}
    balanced = EncoderClassifier(class_weight="balanced", **settings).fit(x.iloc[rows], y.iloc[rows])
    by_hand = EncoderClassifier(class_weight={0: 0.55, 1: 5.5}, **settings).fit(x.iloc[rows], y.iloc[rows])
    weights = np.where(y.iloc[rows] == 0, 1, 10)
    weighed = EncoderClassifier(**settings).fit(x.iloc[rows], y.iloc[rows], sample_weight=weights)
    scaled_otherwise = EncoderClassifier(scale=False, class_weight="balanced", **settings)
    again = EncoderClassifier(scale=False, **settings).fit(x.iloc[rows], y.iloc[rows], sample_weight=weights)
    for one, other in ((balanced, by_hand), (scaled_otherwise.fit(x.iloc[rows], y.iloc[rows]), again)):
        assert np.allclose(one.predict_proba(x), other.predict_proba(x), atol=1e-5)
    assert not np.allclose(weighed.predict_proba(x), balanced.predict_proba(x), atol=1e-5)  # the scaler's weights
    with pytest.raises(ValueError, match="class_weight"):
        EncoderClassifier(class_weight="heavy").fit(x, y)


def test_weights_reach_validation_and_pipelines(iris):
    x, y = iris
    weight = np.where(y == 2, 0.0, 1.0)
    classifier = EncoderClassifier(patience=3, random_state=0, **QUICK).fit(x, y, sample_weight=weight)
    assert classifier.classes_.tolist() == [0, 1]
    pipeline = make_pipeline(EncoderRegressor(random_state=0, **QUICK))
    fitted = pipeline.fit(x, y, encoderregressor__sample_weight=weight)
    assert fitted.score(x, y, sample_weight=weight) > 0.8
    transformer = EncoderTransformer(**QUICK).fit(x, sample_weight=weight)
    scores = transformer.score_samples(x)
    assert transformer.score(x, sample_weight=weight) == pytest.approx(np.average(scores, weights=weight))


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (np.ones(3), r"sample_weight has shape \(3,\); give one number for each row, \(150,\)"),
        (-np.ones(150), "sample_weight has negative numbers; give how often each row counts"),
        (np.zeros(150), "sample_weight is 0 for every row"),
        (np.full(150, np.nan), "sample_weight contains NaN"),
    ],
    ids=["few", "negative", "zeros", "nan"],
)
@pytest.mark.parametrize("each", ESTIMATORS)
def test_wrong_weights_are_one_sentence(each, weight, words, iris):
    with pytest.raises(ValueError, match=words):
        each(**QUICK).fit(*iris, sample_weight=weight)


def test_early_stopping_holds_out_some_of_each_class():
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    y = np.repeat([0, 1], [36, 4])
    kept, held_out = EncoderClassifier(validation_fraction=0.25)._hold_out(40, y, 0)
    assert np.bincount(y[held_out]).tolist() == [9, 1]
    assert sorted([*kept, *held_out]) == list(range(40))
    # One row of a class cannot be on both sides: then any rows are held out.
    lonely = np.repeat([0, 1], [39, 1])
    assert len(EncoderClassifier(validation_fraction=0.25)._hold_out(40, lonely, 0)[1]) == 10
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

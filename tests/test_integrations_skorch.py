"""skorch: our models, and fused ones, in scikit-learn's hands."""

import copy
import pickle

import numpy as np
import pytest
import skorch
import torch
from integrated import Net, count_fused, fused, make, make_x, run_example
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_predict
from torch import nn

import fastenc
from fastenc import Classifier, Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

X, TARGET = make_x(60).numpy(), np.arange(60) % 3


def build(width=8, activation="relu"):
    return Classifier(Encoder(6, (width, 5), activation), 3)


def build_fused():
    return fastenc.fuse(Net(), inplace=True, verbose=False)


def classifier(module, **options):
    torch.manual_seed(0)
    options = {"criterion": nn.CrossEntropyLoss, "max_epochs": 2, "lr": 0.1, "verbose": 0, **options}
    return skorch.NeuralNetClassifier(module, **options)


def test_a_fused_module_trains_alike(monkeypatch):
    plain = make(Net)
    expected = classifier(copy.deepcopy(plain)).fit(X, TARGET).predict_proba(X)
    model = fused(plain)
    calls = count_fused(monkeypatch)
    actual = classifier(model).fit(X, TARGET)
    assert calls
    np.testing.assert_allclose(actual.predict_proba(X), expected, rtol=1e-5)
    calls.clear()
    cloned = clone(actual)
    cloned.fit(X, TARGET)
    assert calls  # a clone's module is fused, too


def test_search_over_an_encoders_options():
    search = GridSearchCV(classifier(build), {"module__width": [4, 8], "module__activation": ["relu", "gelu"]}, cv=2)
    search.fit(X, TARGET)
    best = search.best_estimator_.module_
    assert best.encoder.widths == (search.best_params_["module__width"], 5)
    assert best.encoder.activation == search.best_params_["module__activation"]


@pytest.mark.parametrize("module", [build, build_fused])
def test_pickled_and_saved(module, tmp_path):
    net = classifier(module).fit(X, TARGET)
    expected = net.predict_proba(X)
    assert np.array_equal(pickle.loads(pickle.dumps(net)).predict_proba(X), expected)
    net.save_params(f_params=tmp_path / "weights.pt")
    other = classifier(module).initialize()
    other.load_params(f_params=tmp_path / "weights.pt")
    assert np.array_equal(other.predict_proba(X), expected)
    assert cross_val_predict(net, X, TARGET, cv=2).shape == (60,)


def test_example():
    assert run_example("skorch")["search"].best_params_["module__width"] in (8, 32)

import copy

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from small_models import assert_same_weights, make_classifier, make_model, make_x
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fastenc
from fastenc import Encoder, Regressor
from fastenc.data import DataError
from fastenc.training import Callback, Trainer


@pytest.mark.parametrize(
    "form",
    [
        lambda labels: labels.numpy().astype("uint8"),
        lambda labels: pd.Series(labels.numpy()).astype("Int64"),
        lambda labels: labels.double(),
        lambda labels: labels.unsqueeze(1),
        lambda labels: F.one_hot(labels, 3).float(),
    ],
    ids=["uint8", "pandas", "whole floats", "column", "probabilities"],
)
def test_labels_in_any_form_train_the_same(form):
    x, labels = make_x(30), torch.arange(30) % 3
    plain, other = make_classifier(), make_classifier()
    Trainer(plain, loss="cross_entropy", seed=0).fit(x, labels, verbose=False)
    trainer = Trainer(other, loss="cross_entropy", seed=0)
    trainer.fit(x, form(labels), verbose=False)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert (
        trainer.evaluate(x, form(labels))["accuracy"]
        == Trainer(other, loss="cross_entropy").evaluate(x, labels)["accuracy"]
    )


def test_one_output_and_flat_targets():
    x = make_x()
    model = Regressor(Encoder(6, (4,)), 1)
    trainer = Trainer(model)
    flat, column = trainer.evaluate(x, x[:, 0]), trainer.evaluate(x, x[:, :1])
    assert flat == column
    assert flat["loss"] == pytest.approx(F.mse_loss(model(x), x[:, :1]).item(), rel=1e-6)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.numpy(),
        lambda x: np.asfortranarray(x.numpy()),
        lambda x: pd.DataFrame(x.numpy(), columns=list("abcdef")),
        lambda x: pa.table({name: x[:, index].numpy() for index, name in enumerate("abcdef")}),
        lambda x: x.double(),
        lambda x: x.tolist(),
    ],
    ids=["numpy", "fortran", "pandas", "arrow", "float64", "list"],
)
def test_arrays_of_any_kind(form):
    x = make_x()
    expected, model = make_model(), make_model()
    Trainer(expected, seed=0).fit(x, verbose=False)
    trainer = Trainer(model, seed=0)
    trainer.fit(form(x), verbose=False)
    assert_same_weights(model, expected)
    kind = torch.Tensor if isinstance(form(x), torch.Tensor) else np.ndarray
    assert isinstance(trainer.predict(form(x)), kind)
    assert isinstance(trainer.encode(form(x)), kind)


class Items(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


class Flow(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize(
    "form",
    [
        Items,
        lambda x: Items(x.double().numpy()),
        Flow,
        TensorDataset,
        lambda x: TensorDataset(x, x),
        lambda x: DataLoader(Items(x), batch_size=16),
        lambda x: DataLoader(TensorDataset(x, x), batch_size=16),
    ],
    ids=["dataset", "numpy items", "iterable", "tensors", "pairs", "loader", "loader of pairs"],
)
def test_datasets_and_loaders(form):
    x = make_x()
    expected, model = make_model(), make_model()
    options = {"epochs": 2, "batch_size": 16, "shuffle": False, "verbose": False}
    history = Trainer(expected, seed=0).fit(x, **options, validation_data=x)
    trainer = Trainer(model, seed=0)
    streamed = trainer.fit(form(x), **options, validation_data=form(x))
    assert_same_weights(model, expected)
    assert streamed.history["loss"] == history.history["loss"]
    assert streamed.history["val_loss"] == pytest.approx(history.history["val_loss"], rel=1e-6)
    np.testing.assert_allclose(trainer.predict(form(x)), trainer.predict(x), rtol=1e-5)


def test_a_loaders_own_batch_size_holds_and_shuffling_repeats():
    class Steps(Callback):
        count = 0

        def on_train_batch_end(self, batch, logs):
            self.count += 1

    steps, models = Steps(), [make_model(), make_model()]
    for model in models:
        loader = DataLoader(Items(make_x(50)), batch_size=10, shuffle=True)
        Trainer(model, seed=0).fit(loader, batch_size=1, callbacks=[steps], verbose=False)
    assert steps.count == 10
    assert_same_weights(*models)


def nan_row():
    x = make_x()
    x[3, 1] = float("nan")
    return x


X = make_x()
BAD_DATA = {
    "zero rows": (lambda t: t.fit(X[:0]), "x has no rows"),
    "features": (lambda t: t.fit(X[:, :4]), "x has 4 columns where 6 are expected"),
    "features to predict": (lambda t: t.encode(X[:, :4]), "x has 4 columns where 6 are expected"),
    "validation features": (lambda t: t.fit(X, validation_data=X[:, :4]), "validation x has 4 columns where 6"),
    "y rows": (lambda t: t.fit(X, X[:49]), r"y has shape \[49, 6\] and x has 50 rows"),
    "y columns": (lambda t: t.fit(X, X[:, :2]), r"the model gives \[6\] for a row and y has \[2\]"),
    "y flat": (lambda t: t.fit(X, X[:, 0]), r"the model gives \[6\] for a row and y has \[\]"),
    "nan": (lambda t: t.fit(nan_row()), "x has NaN or Inf in 1 of 50 rows"),
    "split leaves none to train": (lambda t: t.fit(X[:3], validation_split=0.9), "leaves 0 to train on and 3"),
    "split leaves none to measure": (lambda t: t.fit(X[:1], validation_split=0.0001), "leaves 0 to train on and 1"),
    "split of a dataset": (lambda t: t.fit(Items(X), validation_split=0.5), "give validation_data"),
    "empty dataset": (lambda t: t.fit(Items(X[:0])), "x has no rows"),
    "empty loader": (lambda t: t.fit(DataLoader(Flow(X[:0]))), "x gives no batches"),
    "dataset and y": (lambda t: t.fit(Items(X), X), "gives its targets itself"),
    "dataset of dicts": (lambda t: t.fit(Items([{"x": 1.0}])), "x gives a dict for a batch"),
    "dataset features": (lambda t: t.fit(Items(X[:, :4])), r"shape \[32, 4\] and the model takes 6 features"),
    "dataset targets": (lambda t: t.fit(TensorDataset(X, X[:, 0])), r"\[6\] for a row and the target has \[\]"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_in_words_and_the_model_is_as_it_was(case):
    call, message = BAD_DATA[case]
    model = make_model()
    with pytest.raises(DataError, match=message):
        call(Trainer(model))
    assert_same_weights(model, make_model())
    assert model.training


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(50) % 4, "y holds labels 0 to 3 and the model knows 0 to 2; give the model 4 classes"),
        (torch.arange(50) % 3 - 1, "y holds labels -1 to 1 and the model knows 0 to 2"),
        (torch.arange(50) / 2, "y holds numbers that are not whole; cross_entropy needs labels 0 to 2"),
        (torch.rand(50, 2), r"the model gives \[3\] for a row and y has \[2\]"),
        (None, "loss='cross_entropy' needs labels"),
    ],
    ids=["too high", "negative", "halves", "columns", "none"],
)
def test_bad_labels(labels, message):
    model = make_classifier()
    with pytest.raises(DataError, match=message):
        Trainer(model, loss="cross_entropy").fit(X, labels, verbose=False)
    assert_same_weights(model, make_classifier())


def test_bad_labels_of_a_loader():
    trainer = Trainer(make_classifier(), loss="cross_entropy")
    with pytest.raises(DataError, match="the target holds labels 0 to 3 and the model knows 0 to 2"):
        trainer.fit(TensorDataset(X, torch.arange(50) % 4), verbose=False)
    trainer.fit(TensorDataset(X, torch.arange(50) % 3), verbose=False)
    assert 0.0 <= trainer.evaluate(TensorDataset(X, torch.arange(50) % 3))["accuracy"] <= 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trainer(make_model(), "adan"), "optimizer is 'adan'; give one of sgd, adam, adamw"),
        (
            lambda: Trainer(make_model(), loss="mes"),
            "loss is 'mes'; give one of mse, mae, huber, cross_entropy, bce, bce_with_logits, cosine",
        ),
        (lambda: Trainer(make_model(), momentum=0.9), "momentum is 0.9 and adam takes none"),
        (lambda: Trainer(make_model(), torch.optim.SGD, lr=0.1), "set them on your optimiser"),
        (lambda: Trainer(make_model(), torch.optim.SGD(make_model().parameters())), "none of the model's parameters"),
        (lambda: Trainer(make_model().requires_grad_(False)), "no parameter to train"),
        (lambda: Trainer(nn.ReLU()), "no parameter to train"),
        (lambda: Trainer(make_model()).fit(X, epochs=0), "epochs is 0; it must be a whole number of at least 1"),
        (lambda: Trainer(make_model()).fit(X, batch_size=2.5), "batch_size is 2.5"),
        (lambda: Trainer(make_model()).predict(X, batch_size=0), "batch_size is 0"),
        (lambda: Trainer(make_model()).fit(X, validation_split=1.0), "validation_split is 1.0"),
        (lambda: Trainer(make_model()).fit(X, validation_data=(X, X, X, X)), "a tuple of 4"),
        (lambda: Trainer(make_model()).fit(X, verbose="yes"), "verbose is 'yes'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_default_device_does_not_matter(backend):
    """What Trainer makes beside the model is where the data is, on whatever device new tensors are by default."""
    x, results = torch.rand(100, 20), []
    model = fastenc.AutoEncoder(fastenc.Encoder(20, (8,), dropout=0.2))
    for device in ("cpu", "meta"):
        twin = copy.deepcopy(model)
        with torch.device(device), fastenc.use_backend(backend):
            fastenc.Trainer(twin, seed=1).fit(x, epochs=2, validation_split=0.2, verbose=False)
        results.append(twin.state_dict())
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_a_validation_split_of_one_class_is_told():
    x, labels = torch.rand(40, 6), torch.arange(40) % 2
    trainer = Trainer(make_classifier(2), loss="cross_entropy")
    trainer.fit(x, labels, validation_split=0.2, verbose=False)
    with pytest.warns(UserWarning, match=r"the last 0.2 of the rows.* are of one class; mix the rows before, or give"):
        trainer.fit(x, labels.sort().values, validation_split=0.2, verbose=False)

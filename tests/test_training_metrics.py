import pytest
import torch
import torchmetrics
from small_models import assert_same_weights, make_classifier, make_model, make_x
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastenc.training import Trainer
from fastenc.training.metrics import Metrics


def largest_error(prediction, target):
    return (prediction - target).abs().max()


def labels(rows):
    return torch.arange(rows) % 3


def test_functions_see_all_rows_at_once():
    trainer = Trainer(make_model(), metrics=[largest_error, F.mse_loss])
    x = make_x(50)
    results = trainer.evaluate(x, batch_size=8)
    prediction = trainer.predict(x, batch_size=8)
    assert list(results) == ["loss", "largest_error", "mse_loss"]
    assert results["largest_error"] == float((prediction - x).abs().max())
    assert results["mse_loss"] == float(F.mse_loss(prediction, x))


def test_torchmetrics_objects_see_batch_after_batch():
    accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
    matrix = {"f1": torchmetrics.classification.MulticlassF1Score(3), "top": accuracy}
    trainer = Trainer(make_classifier(), loss="cross_entropy", metrics=matrix)
    x, y = make_x(50), labels(50)
    for _ in range(2):  # they forget
        results = trainer.evaluate(x, y, batch_size=8)
        f1 = torchmetrics.functional.classification.multiclass_f1_score(trainer.predict(x), y, 3)
        assert results["f1"] == float(f1)
        assert results["top"] == pytest.approx(results["accuracy"], rel=2**-23)  # float32 and float64
    collection = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()])
    measured = Trainer(make_model(), metrics=[collection]).evaluate(x)
    assert list(measured) == ["loss", "MeanSquaredError", "MeanAbsoluteError"]


def test_history_has_them_of_training_and_validation():
    x, held_out = make_x(50), make_x(9)
    trainer = Trainer(make_model(), seed=0, metrics=[largest_error, torchmetrics.MeanSquaredError()])
    history = trainer.fit(x, epochs=3, validation_data=held_out, verbose=False).history
    names = ["loss", "largest_error", "mean_squared_error"]
    assert list(history) == [*names, *(f"val_{name}" for name in names)]
    last, val_last = trainer.evaluate(x), trainer.evaluate(held_out)
    for name in names[1:]:
        assert history[name][-1] == last[name]
        assert history[f"val_{name}"][-1] == val_last[name]
    plain = Trainer(make_model(), seed=0)
    plain.fit(x, epochs=3, validation_data=held_out, verbose=False)
    assert_same_weights(trainer.model, plain.model)
    assert trainer.explain() == plain.explain()
    assert "C++ engine" in trainer.explain()


def test_of_a_stream_they_are_measured_as_the_steps_are_taken():
    seen = []

    def count(prediction, target):
        assert not prediction.requires_grad
        seen.append((len(prediction), len(target)))
        return largest_error(prediction, target)

    class Once(DataLoader):
        def __iter__(self):
            self.reads = getattr(self, "reads", 0) + 1
            return super().__iter__()

    loader = Once(TensorDataset(make_x(50)), 8)
    loader_history = Trainer(make_model(), metrics=[count]).fit(loader, epochs=2, verbose=False).history
    assert list(loader_history) == ["loss", "count"]
    assert seen == [(50, 50)] * 2
    assert loader.reads == 2


def test_names():
    class Odd:
        def __call__(self, prediction, target):
            return 1

    assert list(Trainer(make_model(), metrics=[Odd()]).evaluate(make_x(3))) == ["loss", "odd"]


@pytest.mark.parametrize(
    ("metrics", "error", "match"),
    [
        ("accuracy", TypeError, "metrics is 'accuracy'; give a list of torchmetrics objects or functions"),
        (largest_error, TypeError, "metrics is <function .*; give a list"),
        (["accuracy"], TypeError, "a metric is 'accuracy'; give torchmetrics objects or functions of"),
        ([torchmetrics.MeanSquaredError], TypeError, "a metric is the class MeanSquaredError; give"),
        ([F.mse_loss, F.mse_loss], ValueError, "two metrics are called mse_loss; give metrics as a dict"),
        ({"loss": F.mse_loss}, ValueError, "loss is measured already; give metrics as a dict of other names"),
    ],
)
def test_what_is_no_metric(metrics, error, match):
    with pytest.raises(error, match=match):
        Trainer(make_model(), metrics=metrics)


def test_what_gives_no_number():
    trainer = Trainer(make_model(), metrics={"odd": lambda prediction, target: prediction})
    with pytest.raises(ValueError, match=r"the metric odd gives tensor\("):
        trainer.evaluate(make_x())
    with pytest.raises(TypeError, match="the model gives a tuple, and metrics need one tensor"):
        Metrics([F.mse_loss]).update((1, 2), 3)

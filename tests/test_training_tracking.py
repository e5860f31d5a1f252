import csv
import importlib
import math
import sys

import pytest
from small_models import make_model, make_x

from fastenc.training import CSVLogger, MLflow, ModelCheckpoint, TensorBoard, Trainer, WandB


def fit(callback, epochs=3, **options):
    callbacks = [callback, *options.pop("callbacks", ())]
    trainer = Trainer(make_model(), seed=0)
    trainer.fit(make_x(), epochs=epochs, validation_data=make_x(9), callbacks=callbacks, verbose=False, **options)
    return trainer.history.history


def read(path):
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def rows(history):
    return [
        {"epoch": epoch, "loss": loss, "val_loss": val_loss}
        for epoch, (loss, val_loss) in enumerate(zip(history["loss"], history["val_loss"], strict=True))
    ]


def test_csv(tmp_path):
    path = tmp_path / "deep" / "log.csv"
    history = fit(CSVLogger(path))
    assert read(path) == rows(history)
    assert path.read_text().startswith("epoch,loss,val_loss\n")
    assert read(path) == rows(fit(CSVLogger(path)))  # anew
    assert [path.name for path in path.parent.iterdir()] == ["log.csv"]


def test_csv_goes_on_with_the_fit(tmp_path):
    path, folder = tmp_path / "log.csv", tmp_path / "checkpoints"
    fit(CSVLogger(path), 2, callbacks=[ModelCheckpoint(folder)])
    fit(CSVLogger(path, append=True), 1)  # epoch 0 again: its line is replaced, and those after it
    assert len(read(path)) == 1
    fit(CSVLogger(path), 2)
    history = fit(CSVLogger(path, append=True), 4, callbacks=[ModelCheckpoint(folder)], resume=folder)
    assert read(path) == rows(history)
    path.write_text("epoch,other\n0,1\n")
    with pytest.raises(ValueError, match="has the columns epoch, other and epoch, loss, val_loss were measured; give"):
        fit(CSVLogger(path, append=True), 5, resume=folder)


def test_tensorboard_reads_its_event_files(tmp_path):
    history = fit(TensorBoard(tmp_path))
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "val_loss"]
    for name, values in history.items():
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [0, 1, 2]
        for event, value in zip(scalars, values, strict=True):
            assert math.isclose(event.value, value, rel_tol=2**-23)  # it keeps float32


@pytest.mark.filterwarnings("ignore")  # theirs
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = importlib.import_module("wandb")
    seen = []
    log = wandb.sdk.wandb_run.Run.log

    def watched(self, data, *args, **kwargs):
        seen.append(dict(data))
        return log(self, data, *args, **kwargs)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", watched)
    history = fit(WandB(project="fastenc-test", mode="offline", dir=str(tmp_path)))
    assert seen == rows(history)
    assert wandb.run is None  # it was ended
    wandb.teardown()  # its service writes by itself, until it ends
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"val_loss" in content
    assert b"fastenc-test" in content


@pytest.mark.filterwarnings("ignore")  # theirs
def test_mlflow_in_local_files(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = tmp_path.as_uri()
    callback = MLflow("digits", tracking_uri=uri, parameters={"widths": (5, 3)}, run_name="first")
    history = fit(callback)
    client = importlib.import_module("mlflow").MlflowClient(tracking_uri=uri)
    run = client.get_run(callback.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params == {"widths": "(5, 3)"}
    for name, values in history.items():
        measured = client.get_metric_history(callback.run_id, name)
        assert [(metric.step, metric.value) for metric in measured] == [*enumerate(values)]
    first = callback.run_id
    fit(callback, 1)
    experiment = client.get_experiment_by_name("digits")
    assert {run.info.run_id for run in client.search_runs([experiment.experiment_id])} == {first, callback.run_id}


@pytest.mark.filterwarnings("ignore")  # theirs
def test_mlflow_tells_which_fits_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    callback = MLflow(tracking_uri=tmp_path.as_uri())
    client = importlib.import_module("mlflow").MlflowClient(tracking_uri=tmp_path.as_uri())

    def status():
        return client.get_run(callback.run_id).info.status

    try:
        fit(callback, 1, augment=lambda x: x * math.nan)
    except FloatingPointError:
        assert status() == "FAILED"
        fit(callback, 1)  # an error that is handled around a fit is not its own
    assert status() == "FINISHED"


@pytest.mark.parametrize(
    ("callback", "module"), [(TensorBoard("x"), "tensorboard"), (WandB(), "wandb"), (MLflow(), "mlflow")]
)
def test_a_package_that_is_missing(monkeypatch, callback, module):
    monkeypatch.setitem(sys.modules, module, None)
    name = type(callback).__name__
    with pytest.raises(ModuleNotFoundError, match=rf'{name} needs {module}; run: pip install "fastenc\[track\]"'):
        fit(callback)

"""What a Trainer does under torchrun, run by every process of a test, and by the test itself as one process."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_models import make_x
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from fastenc import AutoEncoder, Classifier, Encoder, Trainer
from fastenc.training import Callback, CSVLogger, EarlyStopping, ModelCheckpoint
from fastenc.training.distributed import ProcessesError


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def make_model(kind: str, dtype: torch.dtype) -> nn.Module:
    """With the weights of process 0, whatever each has drawn."""
    torch.manual_seed(7 + rank())
    encoder = Encoder(6, (5, 3), activation="tanh", dtype=dtype)
    return Classifier(encoder, 3) if kind == "classifier" else encoder if kind == "encoder" else AutoEncoder(encoder)


def labels(rows: int) -> Tensor:
    return torch.arange(rows) * 7 % 3


def largest_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs().max()


def unlike(prediction: Tensor, target: Tensor) -> Tensor:
    """A loss of the whole batch: how alike its rows are, beside the distance."""
    return (prediction - target).square().mean() + cosine_similarity(prediction[:-1], prediction[1:], dim=1).mean()


class RowsSeen:
    """A metric that works as torchmetrics' do, and knows nothing of processes."""

    def reset(self) -> None:
        self.rows = 0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.rows += len(prediction)

    def compute(self) -> int:
        return self.rows


# name -> kind of model, loss, options of the Trainer, options of fit. 49 rows: the last batch of 16 has one.
CASES: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {
    "adam": ("autoencoder", "mse", {}, {}),
    "sgd": (
        "autoencoder",
        "mae",
        {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "l1": 1e-3, "clip_norm": 0.1},
        {"validation_split": 0.3, "batch_size": 11},
    ),
    "accumulate": ("autoencoder", "mse", {"accumulate": 3, "schedule": "cosine"}, {}),
    "classifier": ("classifier", "cross_entropy", {"weight_decay": 0.1}, {"validation_split": 0.3}),
    "metrics": ("autoencoder", "mse", {"metrics": [largest_error, RowsSeen()]}, {"validation_split": 0.3}),
    "info_nce": ("encoder", "info_nce", {}, {}),
    "triplet": ("encoder", "triplet", {"accumulate": 2}, {}),
    "a loss of its own": ("autoencoder", unlike, {"lr": 0.01}, {"batch_size": 17}),  # a row has no other there
    "stream": ("autoencoder", "mse", {"metrics": [largest_error]}, {}),
    "weights": ("autoencoder", "mse", {}, {"sample_weight": torch.arange(49) % 4, "validation_split": 0.3}),
    "weights of classes": (
        "classifier",
        "cross_entropy",
        {"accumulate": 2},
        {"sample_weight": torch.arange(49) % 3 + 1},
    ),
    "not shuffled": ("autoencoder", "bce_with_logits", {"metrics": {}}, {"shuffle": False}),
}


def fit_case(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The History's numbers and the weights after 3 epochs."""
    kind, loss, options, fit = CASES[name]
    model = make_model(kind, dtype)
    x = make_x(49).to(dtype)
    y = labels(49) if kind == "classifier" or loss == "triplet" else x[:, :3].flip(0) if loss == "info_nce" else None
    trainer = Trainer(model, loss=loss, seed=3, **options)
    if name == "stream":
        x = DataLoader(TensorDataset(x), batch_size=16, shuffle=True)
        fit = {"validation_data": DataLoader(TensorDataset(make_x(9).to(dtype)), batch_size=4)}
    history = trainer.fit(x, y, **{"epochs": 3, "batch_size": 16, "verbose": False, **fit}).history
    numbers = {key: torch.tensor(values, dtype=torch.float64) for key, values in history.items()}
    return {**numbers, **{key: value.clone() for key, value in model.state_dict().items()}}


def cases(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {name: fit_case(name) for name in CASES}


def others_of_a_trainer(folder: Path) -> dict[str, Any]:
    """partial_fit, evaluate, predict, find_lr, and what explain says."""
    trainer = Trainer(make_model("autoencoder", torch.float32), seed=3)
    x = make_x(49)
    found = {
        "partial_fit": [trainer.partial_fit(part) for part in x.split(20)],
        "evaluate": trainer.evaluate(x),
        "predict": trainer.predict(x),
        "find_lr": trainer.find_lr(x, steps=12).losses,
    }
    trainer.fit(x, verbose=False)
    return {**found, "explain": trainer.explain()}


def torchmetrics_add_up(folder: Path) -> dict[str, list[float]]:
    from torchmetrics.classification import MulticlassAccuracy  # seconds, which the other tests need not wait

    metrics = {"exact": MulticlassAccuracy(num_classes=3, average="micro")}
    trainer = Trainer(make_model("classifier", torch.float32), loss="cross_entropy", seed=3, metrics=metrics)
    return trainer.fit(make_x(49), labels(49), validation_split=0.3, epochs=2, verbose=False).history


def dropout(folder: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The masks of this process, and the weights."""
    masks = []

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                masks.append(torch.rand(4))
            return nn.functional.dropout(self.layer(x), 0.5, self.training)

    torch.manual_seed(1)
    model = Dropping()
    Trainer(model, seed=3).fit(make_x(32), epochs=2, batch_size=16, shuffle=False, verbose=False)
    return masks, dict(model.state_dict())


class Each(Callback):
    """Has work after each step, on one process alone, and stops in the third epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        self.losses.append(logs["loss"])
        if len(self.losses) == 10:
            self.trainer.stop_training = True


def stops_together(folder: Path) -> tuple[list[float], dict[str, list[float]]]:
    each = Each()
    trainer = Trainer(make_model("autoencoder", torch.float32), seed=3)
    stopping = EarlyStopping("loss", patience=3)
    trainer.fit(
        make_x(49), batch_size=16, epochs=9, callbacks=[each, stopping] if rank() == 0 else [stopping], verbose=False
    )
    return each.losses, trainer.history.history


def one_writer(folder: Path) -> dict[str, Any]:
    """Process 0 alone writes; the other's callbacks point to files that must not be there."""
    own = folder / f"written by {rank()}"
    callbacks = [CSVLogger(own / "log.csv"), ModelCheckpoint(own / "run", "loss", every_steps=2)]
    trainer = Trainer(make_model("autoencoder", torch.float32), seed=3)
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        trainer.fit(make_x(49), epochs=2, batch_size=16, callbacks=callbacks, verbose=True)
    trainer.save_checkpoint(own / "by hand")
    with (folder / "written by 0" / "log.csv").open() as file:
        logged = [float(row["loss"]) for row in csv.DictReader(file)]
    again = Trainer(make_model("autoencoder", torch.float32))
    again.load_checkpoint(folder / "written by 0" / "by hand")
    weights = zip(again.model.parameters(), trainer.model.parameters(), strict=True)
    return {
        "exists": own.exists(),
        "bar": "epoch" in shown.getvalue(),
        "logged": logged == trainer.history.history["loss"],
        "loaded": all(torch.equal(*pair) for pair in weights),
        "files": sorted(str(path.relative_to(own)) for path in own.rglob("*") if path.is_file()),
    }


def message(work: Callable[[], object]) -> str:
    """The error in words."""
    try:
        work()
    except (ValueError, RuntimeError, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Unequal(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((6,), float(index * (1 + rank())))


def bad_input(folder: Path) -> dict[str, str]:
    """Every process gets the error, and the next fit works."""
    x = make_x(49)

    def trainer(model: nn.Module | None = None, **options: Any) -> Trainer:
        return Trainer(make_model("autoencoder", torch.float32) if model is None else model, seed=3, **options)

    found = {}
    found["other data"] = message(lambda: trainer().fit(x + rank(), verbose=False))
    found["other rows"] = message(lambda: trainer().fit(x[: 49 - rank()], verbose=False))
    found["other data, evaluated"] = message(lambda: trainer().evaluate(x + rank()))
    found["other batch_size"] = message(lambda: trainer().fit(x, batch_size=16 + rank(), verbose=False))
    found["small batch_size"] = message(lambda: trainer().fit(x, batch_size=1, verbose=False))
    found["small loader"] = message(lambda: trainer().fit(DataLoader(TensorDataset(x)), verbose=False))
    found["other model"] = message(lambda: trainer(Encoder(6, (5 + rank(), 6))).fit(x, verbose=False))
    found["other batches"] = message(lambda: trainer().fit(Unequal(), verbose=False))
    found["sampler"] = message(
        lambda: trainer().fit(
            DataLoader(data := TensorDataset(x), batch_size=8, sampler=DistributedSampler(data)), verbose=False
        )
    )
    ddp = nn.parallel.DistributedDataParallel(make_model("autoencoder", torch.float32))
    found["DDP"] = message(lambda: trainer(ddp).fit(x, verbose=False))
    found["no checkpoint"] = message(lambda: trainer().fit(x, resume=folder / "nothing", verbose=False))
    found["NaN"] = message(lambda: trainer(lr=1e30).fit(x, epochs=2, verbose=False))
    found["none"] = message(lambda: trainer().fit(x, verbose=False))
    return found


def sharded_model(folder: Path) -> str:
    from torch.distributed.fsdp import fully_shard

    return message(lambda: Trainer(fully_shard(make_model("autoencoder", torch.float32))).fit(make_x(), verbose=False))


class Fails(Callback):
    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if rank() == 1:
            raise ValueError("only here")


def fails_on_one(folder: Path) -> str:
    """The other is told at once, and does not wait for half an hour."""
    trainer = Trainer(make_model("autoencoder", torch.float32), seed=3)
    found = message(lambda: trainer.fit(make_x(49), epochs=3, callbacks=[Fails()], verbose=False))
    dist.barrier()  # in PyTorch's own group, which has not been closed
    return found


class Dies(Callback):
    """As by `kill -9`, in the second epoch."""

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        assert self.trainer.fitting is not None
        if rank() == 1 and self.trainer.fitting.position.epoch == 1 and batch == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def lasting_fit(folder: Path, callbacks: list[Callback], dtype: torch.dtype = torch.float32, **fit: Any) -> Trainer:
    """What is killed and gone on with. In all, 3 epochs of 4 steps."""
    trainer = Trainer(make_model("autoencoder", dtype), seed=3, schedule="cosine")
    x = make_x(49).to(dtype)
    trainer.fit(x, epochs=3, batch_size=16, validation_split=0.1, callbacks=callbacks, verbose=False, **fit)
    return trainer


def killed(folder: Path) -> None:
    try:
        lasting_fit(folder, [ModelCheckpoint(folder / "run", every_steps=2), Dies()])
    except ProcessesError as error:
        print(f"seen: {error}", flush=True)
        raise


def resumed(folder: Path) -> dict[str, Tensor]:
    return numbers_of(lasting_fit(folder, [ModelCheckpoint(folder / "run", every_steps=2)], resume=folder / "run"))


def numbers_of(trainer: Trainer) -> dict[str, Tensor]:
    numbers = {key: torch.tensor(values, dtype=torch.float64) for key, values in trainer.history.history.items()}
    return {**numbers, **{key: value.clone() for key, value in trainer.model.state_dict().items()}}

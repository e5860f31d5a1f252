"""A car's place, and faults of its sensors, from the last two seconds of camera, lidar and inertial readings.

    python examples/driving.py               # about a minute; the pictures go to out/driving

The drives are simulated, with drop-outs of the sensors: driving_world.py has the equations, and the extended Kalman
filter that this is compared with. Two models are learned on drives without faults and scored on others:

- where: a Regressor gives the place, heading and speed at the end of two seconds. It is told neither the model of the
  car nor where the posts are, and knows nothing of what was before, which the filter does.
- faults: an AutoEncoder gives the summary of all sensors, of which some are hidden while it learns. A reading that
  differs from what the other sensors tell is an anomaly. The filter's score is its normalised innovation squared (NIS),
  the mean of the same two seconds, in which an outlier counts no more than what the filter's gate lets pass.
"""

from __future__ import annotations

from typing import Any

import driving_world as world
import numpy as np
import torch
from comparing import Row, arguments, write_results
from driving_pictures import draw_faults, draw_track
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastenc import AutoEncoder, Encoder, Regressor, Trainer
from fastenc.frontends import FrontEncoder
from fastenc.frontends.series import SeriesFrontEnd, SeriesReader
from fastenc.report import table

WINDOW, BINS = 20, 4
FAULTS = 2
EVERY = 3  # steps between two windows to train on, which share most of their readings
NET, KNOWN, LOST, STARTED = "network, 2 s", "filter, start known", "filter, start unknown", "filter, network's start"


def main() -> None:
    args = arguments(
        "Place and faults from camera, lidar and inertial readings.",
        "driving",
        epochs=10,
        seeds=1,
        over="the training windows",
        drives=(80, "to learn from; a quarter more to score"),
        seconds=(60.0, "of each drive, at least 21"),
    )
    scored = args.drives // 4
    places: dict[str, list[np.ndarray]] = {NET: [], KNOWN: [], LOST: [], STARTED: []}
    areas: dict[str, dict[str, list[float]]] = {"network": {}, "filter": {}}
    for seed in range(args.seeds):
        train, clean, faulty = (
            world.simulate(drives, args.seconds, 10 * seed + part, faults)
            for part, (drives, faults) in enumerate([(args.drives, 0), (scored, 0), (scored, FAULTS)])
        )
        reader = SeriesReader().fit([drive_table(readings) for readings in train.readings])
        estimates = where_each(args, seed, reader, train, clean)
        for name, states in estimates.items():
            places[name].append(errors(states, clean.state))
        scores = fault_scores(args, seed, reader, train, clean, faulty)
        for name, score in scores.items():
            for kind, area in fault_areas(score, faulty.fault).items():
                areas[name].setdefault(kind, []).append(area)
    print(f"{args.drives} drives of {args.seconds:g} s to learn from, {scored} to score; {args.seeds} seeds\n")
    print_places(places)
    print_areas(areas)
    draw_track(clean, estimates, args.out / "track.png")
    draw_faults(faulty, scores, areas, args.out / "faults.png")
    print(f"\nThe pictures are {args.out / 'track.png'} and {args.out / 'faults.png'}.")
    mean = {name: np.mean(found, axis=0)[0] for name, found in places.items()}
    write_results(
        args.out,
        [
            Row("driving: error of the place, m", mean[NET], f"Kalman {KNOWN}", mean[KNOWN], higher=False),
            Row(
                "driving: the filter, started by network, m", mean[STARTED], f"Kalman {LOST}", mean[LOST], higher=False
            ),
            *(
                Row(f"driving: {kind}, ROC AUC", np.mean(areas["network"][kind]), "Kalman filter, NIS", np.mean(found))
                for kind, found in areas["filter"].items()
            ),
        ],
    )


def drive_table(readings: np.ndarray) -> Any:
    import pandas as pd

    return pd.DataFrame(readings, columns=list(world.COLUMNS))


def windows(reader: SeriesReader, drives: world.Drives) -> Tensor:
    """Of each step, the standardised readings of the last WINDOW steps: [D, T - WINDOW + 1, WINDOW, C]."""
    read = np.stack([reader.read(readings) for readings in drives.readings])
    return torch.from_numpy(read).unfold(1, WINDOW, 1).mT


def encoder(reader: SeriesReader, **options: Any) -> FrontEncoder:
    front = SeriesFrontEnd(list(reader.sensors.values()), bins=BINS, depth=1, **options)
    return FrontEncoder(front, Encoder(front.out_features, (128, 64)))


def loader(x: Tensor, *target: Tensor, seed: int | None = None) -> DataLoader:
    """Of rows that are gathered a batch at a time; shuffled with a seed."""
    rows = TensorDataset(x, *target)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    order = torch.utils.data.RandomSampler(rows, generator=generator) if generator else range(len(rows))
    batches = torch.utils.data.BatchSampler(order, 128 if generator else 1024, drop_last=False)
    return DataLoader(rows, sampler=batches, batch_size=None)


# Where the car is.


def where_each(
    args: Any, seed: int, reader: SeriesReader, train: world.Drives, drives: world.Drives
) -> dict[str, np.ndarray]:
    """x, y, heading and speed [D, T, 4] by the network and by the filter, NaN at the first steps."""
    torch.manual_seed(seed)
    model = Regressor(encoder(reader, recurrent=32), 5)
    trainer = Trainer(model, lr=3e-3, loss="mse", schedule="cosine", seed=seed)
    x, states = windows(reader, train)[:, ::EVERY].flatten(0, 1), train.state[:, WINDOW - 1 :: EVERY].reshape(-1, 4)
    turned = unturned(states)
    mean, deviation = turned.mean(0), turned.std(0)
    target = torch.from_numpy(((turned - mean) / deviation).astype(np.float32))
    trainer.fit(loader(x, target, seed=seed), epochs=args.epochs, verbose=False)

    tested = windows(reader, drives)
    found = trainer.predict(loader(tested.flatten(0, 1))) * deviation + mean
    network = np.full(drives.state.shape, np.nan)
    network[:, WINDOW - 1 :] = np.column_stack(
        [found[:, :2], np.arctan2(found[:, 3], found[:, 2]), found[:, 4]]
    ).reshape(*tested.shape[:2], 4)

    first = drives.state[:, 0]
    nowhere = np.tile([0.0, 0.0, 0.0, turned[:, 4].mean()], (len(first), 1))
    estimates = {NET: network}
    for name, state, doubt, start in (
        (KNOWN, first, (0.1, 0.1, 0.01, 0.1), 1),
        (LOST, nowhere, (45.0, 45.0, 2.0, 2.0), 1),
        (STARTED, network[:, WINDOW - 1], (2.0, 2.0, 0.1, 1.0), WINDOW),
    ):
        unbiased = np.column_stack([state, np.zeros(len(state))])
        estimates[name] = world.run_filter(drives, unbiased, np.array([*doubt, world.TURN_BIAS]), start)[0][..., :4]
    estimates[STARTED][:, WINDOW - 1] = network[:, WINDOW - 1]
    return estimates


def unturned(states: np.ndarray) -> np.ndarray:
    """States [n, 4] with the heading as cosine and sine: [n, 5], without a jump at half a turn."""
    return np.column_stack([states[:, :2], np.cos(states[:, 2]), np.sin(states[:, 2]), states[:, 3]])


def errors(states: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Over all steps that have WINDOW steps: of the place root mean square, median and 99th percentile in m, of the
    heading root mean square in degrees, of the speed in m/s: [5].
    """
    states, truth = states[:, WINDOW - 1 :], truth[:, WINDOW - 1 :]
    place = np.hypot(*np.moveaxis((states - truth)[..., :2], -1, 0))
    heading = np.degrees(world.wrapped(states[..., 2] - truth[..., 2]))
    squares = [np.square(place), np.square(heading), np.square(states[..., 3] - truth[..., 3])]
    mean_place, mean_heading, mean_speed = (np.sqrt(square.mean()) for square in squares)
    return np.array([mean_place, np.median(place), np.percentile(place, 99), mean_heading, mean_speed])


# Whether a sensor has a fault.


def seen_bins(x: Tensor) -> Tensor:
    """Which numbers of the summary of windows [n, WINDOW, C] have any reading: bool [n, BINS * 2 * C]."""
    seen = (~x.isnan()).unflatten(1, (BINS, -1)).any(2)
    return seen.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1)


def mean_of_seen(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of those numbers of the target that are not NaN."""
    seen = ~target.isnan()
    return ((prediction - target.nan_to_num(0.0)).square() * seen).sum() / seen.sum()


def fault_scores(
    args: Any, seed: int, reader: SeriesReader, train: world.Drives, clean: world.Drives, faulty: world.Drives
) -> dict[str, np.ndarray]:
    """A score of each step [D, T], higher where a fault is likelier, by the network and by the filter."""
    torch.manual_seed(seed)
    model = AutoEncoder(encoder(reader, sensor_dropout=0.4))
    x = windows(reader, train)[:, ::EVERY].flatten(0, 1)
    target = model.encoder.summary(x).masked_fill(~seen_bins(x), torch.nan)
    trainer = Trainer(model, lr=3e-3, loss=mean_of_seen, schedule="cosine", seed=seed)
    trainer.fit(loader(x, target, seed=seed), epochs=args.epochs, verbose=False)

    usual = surprises(trainer, reader, windows(reader, clean)[:, ::EVERY].flatten(0, 1))
    squares = usual.nanmean(0)  # of each number of the summary, by the drives without faults
    levels = by_sensor(usual / squares, reader)
    centre = levels.nanmean(0)
    spread = (levels - centre).square().nanmean(0).sqrt()
    tested = windows(reader, faulty)
    found = (by_sensor(surprises(trainer, reader, tested.flatten(0, 1)) / squares, reader) - centre) / spread
    network = np.full(faulty.fault.shape, np.nan)
    network[:, WINDOW - 1 :] = found.nan_to_num(0.0).amax(1).reshape(tested.shape[:2]).numpy()

    start = np.column_stack([faulty.state[:, 0], np.zeros(len(faulty.state))])
    _, total, count = world.run_filter(faulty, start, np.array([0.1, 0.1, 0.01, 0.1, world.TURN_BIAS]), 1)
    total, count = (sliding_window_view(each, WINDOW, axis=1).sum(-1) for each in (total, count))
    kalman = np.full(faulty.fault.shape, np.nan)
    kalman[:, WINDOW - 1 :] = total / np.maximum(count, 1)
    return {"network": network, "filter": kalman}


def surprises(trainer: Trainer, reader: SeriesReader, x: Tensor) -> Tensor:
    """Each sensor's summary less what is given without it, squared: [n, BINS * 2 * C], NaN where nothing is seen."""
    summary, seen = trainer.model.encoder.summary(x), seen_bins(x)
    found = torch.full_like(summary, torch.nan)
    for channels in reader.sensors.values():
        hidden = x.clone()
        hidden[..., channels] = torch.nan
        own = torch.zeros(x.shape[2], dtype=torch.bool)
        own[channels] = True
        own = own.expand(BINS * 2, -1).flatten()
        given = torch.from_numpy(trainer.predict(loader(hidden)))
        found[:, own] = (given - summary).square().masked_fill(~seen, torch.nan)[:, own]
    return found


def by_sensor(surprise: Tensor, reader: SeriesReader) -> Tensor:
    """The logarithm of the mean of what is seen of each sensor: [n, sensors], NaN where nothing is."""
    of_channel = surprise.unflatten(1, (BINS * 2, -1))
    return torch.stack([of_channel[..., part].flatten(1).nanmean(1) for part in reader.sensors.values()], 1).log()


def fault_areas(score: np.ndarray, fault: np.ndarray) -> dict[str, float]:
    """The area under the ROC curve for each kind of fault beside no fault, and for all together.

    Steps whose window holds a fault that is over are left out: they are neither.
    """
    over = sliding_window_view(fault >= 0, WINDOW, axis=1).any(-1) & (fault[:, WINDOW - 1 :] < 0)
    score, fault = score[:, WINDOW - 1 :][~over], fault[:, WINDOW - 1 :][~over]
    areas = {}
    for number, kind in enumerate(world.FAULTS):
        rows = (fault == number) | (fault < 0)
        areas[kind] = float(roc_auc_score(fault[rows] >= 0, score[rows]))
    return {**areas, "all faults": float(roc_auc_score(fault >= 0, score))}


# What is shown.


def print_places(places: dict[str, list[np.ndarray]]) -> None:
    header = ("error at each step", "place, m", "median", "99%", "heading, degrees", "speed, m/s")
    rows = [(name, *(f"{each:.2f}" for each in np.mean(found, axis=0))) for name, found in places.items()]
    print(table(header, rows))
    print()


def print_areas(areas: dict[str, dict[str, list[float]]]) -> None:
    rows = [(kind, *(f"{np.mean(areas[name][kind]):.3f}" for name in areas)) for kind in areas["filter"]]
    print(table(("area under the ROC curve", *areas), rows))


if __name__ == "__main__":
    main()

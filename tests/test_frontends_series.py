"""Time series: what the reader takes and refuses, that padding and missing sensors change nothing, and training."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from fastenc import AutoEncoder, Classifier, Encoder, Trainer
from fastenc.data import DataError
from fastenc.frontends import FrontEncoder, Items, collect, encode_items, kind_of, make_loader, reader_from_dict
from fastenc.frontends.series import SeriesFrontEnd, SeriesReader
from fastenc.loading import load_with_preprocessing

NAMES = ["imu.ax", "imu.ay", "gps_x", "speed"]
SENSORS = [[0, 2], [1], [3, 4, 5]]
WITHOUT = torch.tensor([0, 2, 3, 4, 5])  # the second sensor


def frame(steps, seed=0, names=NAMES):
    values = np.random.default_rng(seed).normal(3.0, 2.0, (steps, len(names)))
    return pd.DataFrame(values, columns=names)


def recordings(rows=6, steps=24, seed=0):
    """A batch with single values, steps, and a sensor of the last row missing, in float64 to tell rounding apart."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, steps, 6, generator=random, dtype=torch.float64)
    x[torch.rand(x.shape, generator=random) < 0.2] = torch.nan
    x[1, 3:6] = torch.nan
    x[-1, :, 1] = torch.nan
    x[:, 0, 0] = x[:, -1, 0] = 1.0  # no step at the ends is without any value
    return x


def front_end(**options):
    torch.manual_seed(0)
    made = SeriesFrontEnd(SENSORS, width=8, kernel=3, **options)
    torch.nn.init.normal_(made.missing)
    return made.double()


def pad(x, steps):
    return torch.cat([x, torch.full((len(x), steps, x.shape[2]), torch.nan, dtype=x.dtype)], 1)


# The reader.


def test_fitted_numbers_leave_missing_values_out():
    a, b = frame(30), frame(50, 1)
    a.iloc[3:9, 0] = b.iloc[7, 2] = np.nan
    a["speed"] = np.nan
    reader = SeriesReader().fit([a, b])
    together = pd.concat([a, b])
    assert reader.columns == NAMES
    assert reader.sensors == {"imu": [0, 1], "gps": [2], "": [3]}
    np.testing.assert_allclose(reader.mean, together.mean())
    np.testing.assert_allclose(reader.deviation, together.std(ddof=0))
    read = reader.read(a)
    assert (read.dtype, read.shape) == (np.float32, (30, 4))
    expected = ((a - together.mean()) / together.std(ddof=0)).to_numpy(np.float32)
    np.testing.assert_array_equal(read, expected)  # NaN where it was


def test_channels_that_say_nothing():
    table = frame(20)
    table["speed"], table["gps_x"] = 0.1, np.nan
    reader = SeriesReader().fit([table, table])
    assert reader.deviation[2:].tolist() == [1.0, 1.0]
    read = reader.read(table)
    assert np.isnan(read[:, 2]).all()
    assert np.abs(read[:, 3]).max() <= 0.1 * np.finfo(np.float64).eps  # the rounding of the mean


def test_every_kind_of_item_is_read_alike(tmp_path):
    table = frame(12)
    table.iloc[2, 1] = np.nan
    reader = SeriesReader().fit([table])
    expected = reader.read(table)
    table.to_csv(tmp_path / "a.csv", index=False)
    np.save(tmp_path / "a.npy", table.to_numpy())
    csv, npy = (tmp_path / "a.csv"), (tmp_path / "a.npy")
    arrays = (table.to_numpy(), torch.tensor(table.to_numpy()), table[NAMES[::-1]], pa.Table.from_pandas(table))
    for item in (csv, str(csv), csv.read_bytes(), npy, npy.read_bytes(), *arrays):
        np.testing.assert_array_equal(reader.read(item), expected)


def test_a_csv_whose_sensor_is_wholly_empty(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("imu.ax,imu.ay,gps_x,speed\n1,2,,4\n5,,,8\n")
    read = SeriesReader().fit([frame(9), path]).read(path)
    assert np.isnan(read).tolist() == [[False, False, True, False], [False, True, True, False]]


def test_arrays_are_one_sensor():
    reader = SeriesReader().fit([np.ones((5, 3))])
    assert (reader.columns, reader.sensors) == (["0", "1", "2"], {"": [0, 1, 2]})


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (frame(3).drop(columns="gps_x"), "the recording has no column 'gps_x'; give it the columns of the other"),
        (frame(3).assign(extra=1.0), "has a column 'extra' that the first recording has not; leave it out"),
        (np.zeros((3, 5)), "has 5 columns where 4 are expected; give it those of the other recordings: imu.ax"),
        (frame(0), "has no rows; give at least one"),
        (frame(3).assign(speed="fast"), "column 'speed' of the recording holds 'fast' where numbers should be; leave"),
        (frame(3).assign(speed=pd.Timestamp(0)), "column 'speed' of the recording holds dates where numbers"),
        (frame(3).assign(speed=[1, 2, np.inf]), "column 'speed' of the recording holds inf in row 2, counted from 0"),
        (b"imu.ax,imu.ay\n1,2,3\n", "the recording has 3 fields in line 2 and 2 in its header"),
        (b"", "the recording is empty"),
        (np.zeros((2, 2, 2)), "has 3 dimensions"),
    ],
    ids=["lacking", "unknown", "count", "no rows", "text", "dates", "infinite", "bad CSV", "empty", "3-D"],
)
def test_what_cannot_be_read(item, words):
    with pytest.raises(DataError) as error:
        SeriesReader().fit([frame(5)]).read(item)
    assert words in str(error.value)


def test_values_that_float32_cannot_hold():
    reader = SeriesReader().fit([frame(5) * 1e-30])
    with pytest.raises(DataError, match="far beyond those of the fitted recordings"):
        reader.read(frame(5) * 1e30)


def test_fitting_names_the_file_that_differs(tmp_path):
    frame(5).to_csv(tmp_path / "a.csv", index=False)
    frame(5, names=["x", "y"]).to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(DataError, match=r"b\.csv has no column 'imu.ax'"):
        SeriesReader().fit([tmp_path / "a.csv", tmp_path / "b.csv"])
    with pytest.raises(DataError, match="no recordings to fit to"):
        SeriesReader().fit([])
    with pytest.raises(ValueError, match="call fit first"):
        SeriesReader().read(tmp_path / "a.csv")


def test_its_dict_is_json():
    reader = SeriesReader().fit([frame(20)])
    again = reader_from_dict(json.loads(json.dumps(reader.to_dict())))
    assert again.to_dict() == reader.to_dict()
    np.testing.assert_array_equal(again.read(frame(7, 1)), reader.read(frame(7, 1)))


def test_a_batch_is_padded_with_missing_values():
    reader = SeriesReader().fit([frame(20)])
    arrays = [reader.read(frame(steps)) for steps in (3, 5)]
    x = reader.batch(arrays)
    assert (x.shape, x.dtype) == ((2, 5, 4), torch.float32)
    assert x[0].isnan().all(1).tolist() == [False] * 3 + [True] * 2
    np.testing.assert_array_equal(x[1].numpy(), arrays[1])


# The front end.

OPTIONS = ({}, {"recurrent": 5}, {"depth": 3, "activation": "gelu"}, {"depth": 1, "kernel": 5})


def build(options):
    torch.manual_seed(0)
    made = SeriesFrontEnd(SENSORS, **{"width": 8, "kernel": 3, **options})
    torch.nn.init.normal_(made.missing)
    return made.double()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_changes_nothing(options):
    model, x = build(options), recordings()
    features = model(x)
    assert features.shape == (len(x), model.out_features)
    for padded in (pad(x, 1), pad(x, 40)):
        torch.testing.assert_close(model(padded), features)
        torch.testing.assert_close(model.summary(padded), model.summary(x))
    for row in range(len(x)):  # nor do the other rows
        torch.testing.assert_close(model(x[row : row + 1]), features[row : row + 1])
        torch.testing.assert_close(model.summary(x[row : row + 1]), model.summary(x)[row : row + 1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_missing_sensor_is_masked_out(options):
    model, x = build(options), recordings()
    whole = model(x)
    x[:, :, 1] = torch.nan
    x.requires_grad_()
    features = model(x)
    part = 2 * model.width
    torch.testing.assert_close(features[:, :part], whole[:, :part])
    torch.testing.assert_close(features[:, 2 * part : 3 * part], whole[:, 2 * part : 3 * part])
    assert torch.equal(features[:, part : 2 * part], model.missing[1].expand(len(x), -1))
    features.square().sum().backward()
    assert torch.equal(x.grad[x.isnan()], torch.zeros_like(x.grad[x.isnan()]))
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if name.startswith("encoders.1."):
            assert not parameter.grad.any(), name
    assert model.missing.grad[1].all()
    assert not model.missing.grad[0, model.width :].any()  # which no row lacks


def test_no_value_at_all():
    for options in OPTIONS:
        model = build(options)
        features = model(torch.full((2, 7, 6), torch.nan, dtype=torch.float64))
        torch.testing.assert_close(features, model(torch.full((2, 1, 6), torch.nan, dtype=torch.float64)))
        features.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        assert not model.summary(torch.full((2, 7, 6), torch.nan, dtype=torch.float64)).any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_what_is_there(options):
    model = build({**options, "activation": "tanh"})
    x = recordings(2, 4)
    seen = ~x.isnan()
    assert torch.autograd.gradcheck(lambda values: model(x.masked_scatter(seen, values)), x[seen].requires_grad_())


def test_values_and_gaps_are_told_apart():
    model, x = front_end(), recordings()
    x[0, 4, 0], filled = torch.nan, x.clone()
    filled[0, 4, 0] = 0.0  # what stands for a missing value within
    filled[0, 4, 2] = x[0, 4, 2] = 1.0
    assert not torch.allclose(model(filled)[0], model(x)[0])
    torch.testing.assert_close(model(filled)[1:], model(x)[1:])


@pytest.mark.parametrize("steps", [1, 2, 5000])
def test_lengths(steps):
    model = front_end(recurrent=4)
    x = recordings(3, steps)
    assert model(x).isfinite().all()
    assert model.summary(x).isfinite().all()


def test_the_recurrent_part_knows_the_order():
    x = recordings()
    rows = torch.arange(x.shape[1]).flip(0)
    for recurrent, same in ((0, True), (4, False)):
        model = SeriesFrontEnd(SENSORS, kernel=1, recurrent=recurrent).double()
        torch.manual_seed(0)
        assert torch.allclose(model(x), model(x[:, rows])) == same


def test_sensors_are_hidden_while_training_only():
    model, x = front_end(sensor_dropout=0.5), recordings(200)
    part = 2 * model.width
    torch.manual_seed(0)
    hidden = (model(x).view(200, 3, part) == model.missing).all(2)
    assert 0.3 < hidden[:, [0, 2]].double().mean() < 0.5  # rows of which all were to be hidden keep all
    assert not hidden.all(1).any()
    assert not (model.eval()(x).view(200, 3, part) == model.missing)[:, [0, 2]].all(2).any()


def test_summary():
    x = recordings(2, 8)
    model = SeriesFrontEnd(SENSORS, bins=2)
    found = model.summary(pad(x, 3)).view(2, 2, 2, 6)
    assert model.summary_features == found[0].numel() == 24
    for row, part in np.ndindex(2, 2):
        values = x[row, 4 * part : 4 * part + 4]
        for channel in range(6):
            seen = values[:, channel][~values[:, channel].isnan()]
            expected = torch.stack([seen.mean(), seen.std(correction=0)]) if len(seen) else torch.zeros(2).double()
            torch.testing.assert_close(found[row, part, :, channel], expected)
    single = model.summary(x[:1, :1]).view(2, 2, 6)
    assert not single[1].any()  # the second half of one step


def test_sensors_options_and_batches_are_checked():
    with pytest.raises(ValueError, match="give each channel, counted from 0, to one sensor"):
        SeriesFrontEnd([[0, 1], [1]])
    with pytest.raises(ValueError, match="an odd kernel"):
        SeriesFrontEnd([[0]], kernel=4)
    with pytest.raises(ValueError, match="sensor_dropout is 1"):
        SeriesFrontEnd([[0]], sensor_dropout=1.0)
    for shape in ((2, 3, 5), (2, 0, 6), (3, 6)):
        with pytest.raises(DataError, match=r"takes \[rows, steps, 6\]"):
            front_end()(torch.zeros(shape).double())


def test_bf16():
    """Under autocast all stays finite, with the learned vectors in float32 beside bf16 ones."""
    model, x = build({"recurrent": 4}).float(), recordings().float()
    with torch.autocast("cpu", torch.bfloat16):
        features = model(x)
    features.float().sum().backward()
    assert features.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# Training.


def swings(folder, rows=90, seed=0):
    """Recordings of two sensors: which of them leads tells the class; one of them is missing in a few."""
    random = np.random.default_rng(seed)
    for row in range(rows):
        label = ("slow", "quick", "drifting")[row % 3]
        steps = np.arange(random.integers(20, 60))
        phase = random.uniform(0, 2 * np.pi)
        swing = np.sin(2 * np.pi * steps / (5 if label == "quick" else 15) + phase)
        drift = 0.1 * steps * (label == "drifting")
        table = pd.DataFrame({"left.x": swing, "left.y": drift, "right.x": np.roll(swing, 2), "right.y": -drift})
        table += random.normal(0.0, 0.2, table.shape)
        if row % 7 == 0:
            table.loc[:, ["right.x", "right.y"]] = np.nan
        (folder / label).mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / label / f"{row:03}.csv", index=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swings")
    swings(folder)
    assert kind_of(str(folder), "series") == "series"
    collection = collect(str(folder), "series")
    reader = SeriesReader().fit(collection.items)
    assert reader.sensors == {"left": [0, 1], "right": [2, 3]}
    return collection, Items(reader, collection.items)


def test_classifier(found, tmp_path):
    collection, items = found
    names, labels = np.unique(collection.labels.astype(str), return_inverse=True)
    assert names.tolist() == ["drifting", "quick", "slow"]
    held = np.random.default_rng(0).permutation(len(items))
    train, test = held[30:], held[:30]
    torch.manual_seed(0)
    front = items.reader.front_end()
    model = Classifier(FrontEncoder(front, Encoder(front.out_features, (32, 16))), 3)
    target = torch.tensor(labels)
    trainer = Trainer(model, loss="cross_entropy", lr=3e-3, seed=0)
    trainer.fit(make_loader(items, train, target, seed=0), epochs=20, verbose=False)
    result = trainer.evaluate(make_loader(items, test, target))
    assert result["accuracy"] > 0.8  # a guess is right once in three
    model.eval()
    model.save_pretrained(tmp_path / "model", preprocessing=items.reader.to_dict())
    loaded, state = load_with_preprocessing(tmp_path / "model")
    again = Items(reader_from_dict(state), collection.items)
    np.testing.assert_array_equal(encode_items(loaded, again), encode_items(model, items))


def test_autoencoder(found, tmp_path):
    _, items = found
    torch.manual_seed(0)
    front = items.reader.front_end()
    model = AutoEncoder(FrontEncoder(front, Encoder(front.out_features, (32, 8))))
    trainer = Trainer(model, lr=3e-3, seed=0)
    loader = make_loader(items, np.arange(len(items)), model.encoder.summary, seed=0)
    before = trainer.evaluate(loader)["loss"]
    trainer.fit(loader, epochs=20, verbose=False)
    assert trainer.evaluate(loader)["loss"] < before / 2
    model.eval().save_pretrained(tmp_path / "model")
    loaded, _ = load_with_preprocessing(tmp_path / "model")
    np.testing.assert_array_equal(encode_items(loaded, items), encode_items(model, items))

"""Sound: files of every kind to samples, and samples to features that no padding and no other row changes."""

import contextlib
import copy
import json
import math

import numpy as np
import pytest
import soundfile
import torch
from accuracy import Worst

from fastenc import AutoEncoder, Classifier, Encoder, Trainer
from fastenc.data import DataError
from fastenc.frontends import (
    FrontEncoder,
    Items,
    collect,
    encode_items,
    kind_of,
    make_loader,
    reader_from_dict,
)
from fastenc.frontends.audio import PARTS, AudioFrontEnd, AudioReader, shares_of_time
from fastenc.loading import load_with_preprocessing

RIPPLE = 10 ** (-54 / 20)  # of the Kaiser window, beta 5, of scipy's resample_poly


def tone(hertz, rate=8000, samples=4000):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)


def write(path, samples, rate=8000, subtype="FLOAT"):
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


@pytest.mark.parametrize(
    ("name", "subtype", "step"),
    [
        ("a.wav", "PCM_U8", 2**-7),
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_24", 2**-23),
        ("a.wav", "PCM_32", 2**-24),  # of float32, in which it is read
        ("a.wav", "FLOAT", 2**-25),
        ("a.wav", "DOUBLE", 2**-25),
        ("a.flac", "PCM_16", 2**-15),
        ("a.flac", "PCM_24", 2**-23),
    ],
)
def test_formats(tmp_path, name, subtype, step):
    path = write(tmp_path / name, tone(440), subtype=subtype)
    reader = AudioReader().fit([path])
    found = reader.read(path)
    assert (reader.sample_rate, found.dtype, found.shape) == (8000, np.float32, (4000,))
    assert np.abs(found - tone(440)).max() <= step
    np.testing.assert_array_equal(reader.read(path.read_bytes()), found)


def test_ogg_keeps_the_pitch(tmp_path):
    found = AudioReader(8000).read(write(tmp_path / "a.ogg", tone(440), subtype="VORBIS"))
    assert len(found) == 4000
    assert np.abs(np.fft.rfft(found)).argmax() == 440 * 4000 // 8000


def test_channels_are_mixed(tmp_path):
    left, right = (tone(hertz).astype(np.float32) for hertz in (440, 700))
    path = write(tmp_path / "a.wav", np.stack([left, right], 1))
    np.testing.assert_array_equal(AudioReader(8000).read(path), (left + right) / 2)


def test_the_most_common_rate(tmp_path):
    paths = [write(tmp_path / f"{i}.wav", tone(440), rate) for i, rate in enumerate((16000, 8000, 8000, 16000, 8000))]
    assert AudioReader().fit(paths).sample_rate == 8000
    assert AudioReader().fit(paths[:4]).sample_rate == 16000  # of equals
    assert AudioReader(11025).fit(paths).sample_rate == 11025
    with pytest.raises(ValueError, match="knows no sample rate; fit it"):
        AudioReader().read(paths[0])


@pytest.mark.parametrize("rate", [16000, 44100, 11025, 4000])
def test_other_rates_are_resampled(tmp_path, rate):
    path = write(tmp_path / "a.wav", tone(500, rate, rate), rate)
    found = AudioReader(8000).read(path)
    assert len(found) == 8000
    middle = slice(1000, 7000)  # away from the ends, where the tone begins at once
    assert np.abs(found - tone(500, 8000, 8000))[middle].max() <= RIPPLE
    if rate > 12000:
        high = AudioReader(8000).read(write(tmp_path / "b.wav", tone(5500, rate, rate), rate))
        assert np.abs(high[middle]).max() <= RIPPLE  # and does not come back as 2500 Hz


def test_from_one_sample_to_a_minute(tmp_path):
    for samples in (1, 2, 255, 60 * 8000):
        path = write(tmp_path / "a.wav", tone(440, samples=samples) + 0.1)
        assert len(AudioReader(8000).read(path)) == samples
        assert len(AudioReader(4000).read(path)) == math.ceil(samples / 2)


BAD = {
    "text": (lambda path: path.write_text("la la la" * 100), "is not sound that can be read .* give WAV, FLAC or Ogg"),
    "empty": (lambda path: path.touch(), "is empty; copy it again"),
    "header": (lambda path: write(path, np.zeros(0)), "holds no samples; leave it out"),
    "silent": (lambda path: write(path, np.zeros(100)), "is silent"),
    "constant": (lambda path: write(path, np.full(100, 0.25)), "is silent"),
    "opposite": (lambda path: write(path, np.stack([tone(440), -tone(440)], 1)), "is silent, once its channels are"),
    "nan": (lambda path: write(path, np.array([0.1, np.nan, 0.2])), "holds NaN or Inf; write it again"),
    "inf": (lambda path: write(path, np.array([0.1, np.inf, 0.2])), "holds NaN or Inf; write it again"),
    "missing": (lambda path: None, "there is no file .*; give the path"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(tmp_path, kind):
    path = tmp_path / f"{kind}.wav"
    make, message = BAD[kind]
    make(path)
    with pytest.raises(DataError, match=message) as error:
        AudioReader(8000).read(path)
    assert path.name in str(error.value)
    if path.exists():
        with pytest.raises(DataError, match=f"the sound {message}"):
            AudioReader(8000).read(path.read_bytes())


def test_damaged_flac(tmp_path):
    """Cut off, or with other bytes in the middle, of noise, which it cannot make much smaller."""
    path = write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 20_000), subtype="PCM_16")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.flac (is damaged|ends after \d+ of 20000 samples).*; copy it again"):
        AudioReader(8000).read(path)
    with pytest.raises(DataError, match="there is no file"):
        AudioReader().fit([path, tmp_path / "b.flac"])


def test_any_bytes_give_samples_or_a_data_error(tmp_path):
    random, reader = np.random.default_rng(0), AudioReader(8000)
    for name, subtype in (("a.wav", "PCM_16"), ("a.flac", "PCM_16"), ("a.ogg", "VORBIS")):
        whole = write(tmp_path / name, tone(440), subtype=subtype).read_bytes()
        for _ in range(100):
            changed = bytearray(whole[: random.integers(1, len(whole) + 1)])
            for place in random.integers(0, min(200, len(changed)), random.integers(0, 4)):
                changed[place] = random.integers(256)
            with contextlib.suppress(DataError):
                assert np.isfinite(reader.read(bytes(changed))).all()


def rows(*lengths, seed=0):
    """Tones in noise as a batch."""
    random = np.random.default_rng(seed)
    arrays = [tone(random.uniform(200, 2000), samples=n) + 0.1 * random.standard_normal(n) for n in lengths]
    return AudioReader(8000).batch([array.astype(np.float32) for array in arrays])


def test_a_batch_is_padded_by_nan():
    x = rows(3, 5, 1)
    assert x.shape == (3, 5)
    assert x.dtype == torch.float32
    assert x.isnan().sum(1).tolist() == [2, 0, 4]


LENGTHS = (1, 10, 255, 256, 400, 1000, 4001, 8000)


@pytest.mark.parametrize("what", ["forward", "summary"])
def test_padding_and_other_rows_change_nothing(what):
    torch.manual_seed(0)
    front = AudioFrontEnd(8000).eval()
    exact_front = copy.deepcopy(front).double()
    x = rows(*LENGTHS)
    with torch.no_grad():
        together = getattr(front, what)(x)
        worst = Worst()
        for row, length in enumerate(LENGTHS):
            alone = x[row : row + 1, :length]
            exact = getattr(exact_front, what)(alone.double())
            expected = {"features": getattr(front, what)(alone)}
            worst.add({"features": together[row : row + 1]}, expected, {"features": exact})
            for padding in (1, 127, 1000):
                padded = torch.nn.functional.pad(alone, (0, padding), value=torch.nan)
                worst.add({"features": getattr(front, what)(padded)}, expected, {"features": exact})
    worst.check()
    width = {"forward": front.out_features, "summary": front.summary_features}[what]
    assert together.shape == (len(LENGTHS), width)
    assert together.isfinite().all()


def test_no_gradient_goes_to_padding_or_other_rows():
    torch.manual_seed(0)
    front, x = AudioFrontEnd(8000), rows(1000, 3000).requires_grad_()
    (front(x)[0] * torch.randn(front.out_features)).sum().backward()  # of the plain sum a LayerNorm has no slope
    assert (x.grad[0, :1000] != 0).any()
    assert (x.grad[0, 1000:] == 0).all()
    assert (x.grad[1] == 0).all()
    assert all((parameter.grad != 0).any() for parameter in front.parameters())


@pytest.mark.parametrize("rate", [1, 100, 1000, 4000, 8000, 22050, 44100, 192000])
def test_a_front_end_of_any_rate(rate):
    front = AudioReader(rate).front_end()
    config = front.get_config()
    assert json.loads(json.dumps(config)) == config
    assert front.spectra.n_fft >= 0.032 * rate
    assert 20 <= config["n_mels"] <= 40
    assert AudioFrontEnd(**config).get_config() == config
    assert front(torch.randn(2, 300)).shape == (2, front.out_features)


def test_the_shares_of_a_rows_quarters():
    for count in (1, 2, 3, 4, 8, 9):
        share = shares_of_time(torch.tensor([count]), 10, torch.float64)[0]
        torch.testing.assert_close(share.sum(1), torch.ones(PARTS, dtype=torch.float64), rtol=0, atol=1e-15)
        assert (share[:, count:] == 0).all()
    share = shares_of_time(torch.tensor([8]), 10, torch.float64)[0]
    assert share[1].tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert (shares_of_time(torch.tensor([1]), 1, torch.float64) == 1).all()


def test_the_summary_tells_what_came_first():
    low, high = tone(300), tone(2500)
    x = torch.from_numpy(np.stack([np.concatenate([low, high]), np.concatenate([high, low])])).float()
    summary = AudioFrontEnd(8000).summary(x).view(2, PARTS, 40)
    loudest = summary.argmax(2)
    assert (loudest[0, 0], loudest[0, 3]) == (loudest[1, 3], loudest[1, 0])
    assert loudest[0, 0] < loudest[0, 3]
    assert summary.abs().max() <= 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of two classes, rising and falling tones: their mean spectra are the same."""
    root, random = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for number in range(60):
        samples = int(random.integers(1500, 4000))
        sweep = np.geomspace(300, 1500, samples) * random.uniform(0.9, 1.1)
        for name, hertz in (("rising", sweep), ("falling", sweep[::-1])):
            sound = np.sin(2 * np.pi * np.cumsum(hertz) / 8000) + 0.1 * random.standard_normal(samples)
            write(root / name / f"{number}.wav", 0.5 * sound)
    return root


def test_a_classifier_of_files_in_folders(folder, tmp_path):
    assert kind_of(str(folder)) == "audio"
    found = collect(str(folder), "audio")
    assert len(found) == 120
    assert sorted(set(found.labels)) == ["falling", "rising"]
    reader = AudioReader().fit(found.items)
    items = Items(reader, found.items)
    target = torch.tensor([int(label == "rising") for label in found.labels])
    order = np.random.default_rng(0).permutation(120)
    train, test = order[:80], order[80:]
    torch.manual_seed(0)
    front = reader.front_end()
    model = Classifier(FrontEncoder(front, Encoder(front.out_features, (32, 16))), 2)
    trainer = Trainer(model, lr=3e-3, loss="cross_entropy", seed=0)
    trainer.fit(make_loader(items, train, target, seed=0), epochs=10, verbose=False)
    assert trainer.evaluate(make_loader(items, test, target))["accuracy"] > 0.9  # a guess is right half the time

    model.save_pretrained(tmp_path / "model", preprocessing=reader.to_dict())
    loaded, preprocessing = load_with_preprocessing(tmp_path / "model")
    again = Items(reader_from_dict(preprocessing), found.items)
    np.testing.assert_array_equal(encode_items(loaded, again), encode_items(model.eval(), items))


def test_an_autoencoder_of_the_summary(folder):
    found = collect(str(folder), "audio")
    reader = AudioReader().fit(found.items)
    items = Items(reader, found.items)
    torch.manual_seed(0)
    front = reader.front_end()
    model = AutoEncoder(FrontEncoder(front, Encoder(front.out_features, (64, 8), final_activation="identity")))
    loader = make_loader(items, np.arange(120), model.encoder.summary, seed=0)
    trainer = Trainer(model, lr=3e-3, seed=0)
    trainer.fit(loader, epochs=15, verbose=False)
    summaries = torch.cat([target for _, target in loader])
    assert trainer.evaluate(loader)["loss"] < summaries.var(0).mean() / 2


def test_training_in_bf16():
    torch.manual_seed(0)
    front, x = AudioFrontEnd(8000, channels=16, hidden=16), rows(1000, 2000, 3000, 500)
    model = Classifier(FrontEncoder(front, Encoder(front.out_features, (16,))), 2)
    batches = torch.utils.data.DataLoader([(x, torch.tensor([0, 1, 0, 1]))], batch_size=None)
    trainer = Trainer(model, lr=1e-2, loss="cross_entropy", precision="bf16", seed=0)
    losses = trainer.fit(batches, epochs=30, verbose=False).history["loss"]
    assert losses[-1] < losses[0] / 2

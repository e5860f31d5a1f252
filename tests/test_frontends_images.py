"""Images as features: that padding changes nothing, that all of it trains and is saved, and the page of the docs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import Worst
from PIL import Image
from small_images import SIZES, images
from small_models import assert_same_weights
from torch.nn import functional as F

from fastenc import AutoEncoder, Classifier, Encoder, Trainer
from fastenc.data import DataError, load
from fastenc.frontends import FrontEncoder, Items, collect, encode_items, kind_of, make_loader, reader_from_dict
from fastenc.frontends.images import ConvStem, ImageReader
from fastenc.loading import load_pretrained, load_with_preprocessing

DOCS = Path(__file__).parents[1] / "docs" / "applications" / "images.md"
STEMS = [{"strides": (1, 1, 2)}, {"strides": (2, 2, 2), "grid": 3}, {"channels": (5,), "strides": (3,), "grid": 1}]


def make_stem(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConvStem(**options)


# The front end


@pytest.mark.parametrize("options", STEMS, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_is_what_it_is_alone(options, channels):
    """Features, summary and gradients; the error may be twice that of the row alone, against float64."""
    reader, arrays = images(channels=channels)
    stem = make_stem(in_channels=channels, **options)
    exact = make_stem(in_channels=channels, **options).double()
    worst = Worst()
    for row, array in enumerate(arrays):
        alone = reader.batch([array])
        padded = F.pad(reader.batch(arrays), (0, 3, 0, 2), value=torch.nan)
        results = [
            results_of(stem, padded, row, array.shape),
            results_of(stem, alone, 0, array.shape),
            results_of(exact, alone.double(), 0, array.shape),
        ]
        assert results[0]["features"].shape == (stem.out_features,)
        assert results[0]["summary"].shape == (stem.summary_features,)
        worst.add(*results)
    worst.check()


def results_of(stem, x, row, shape):
    x = x.clone().requires_grad_()
    features = stem(x)[row]
    weights = torch.linspace(-1, 1, len(features), dtype=x.dtype)
    stem.zero_grad()
    (features * weights).sum().backward()
    assert x.grad.isfinite().all()
    outside = x.grad.clone()
    outside[row, :, : shape[1], : shape[2]] = 0
    assert not outside.any()  # no gradient to padding, nor to other rows
    grads = {name: parameter.grad.clone() for name, parameter in stem.named_parameters()}
    return {
        "features": features.detach(),
        "summary": stem.summary(x)[row].detach(),
        "grad_x": x.grad[row, :, : shape[1], : shape[2]],
        **grads,
    }


def test_alone_it_is_convolution_and_adaptive_pooling():
    for height, width in SIZES:
        stem = make_stem(strides=(1, 2, 2)).double()
        x = torch.rand(2, 3, height, width, dtype=torch.float64)
        out = 2 * x - 1
        for convolution in stem.convolutions:
            out = F.relu(F.conv2d(out, convolution.weight, convolution.bias, convolution.stride, padding=1))
        torch.testing.assert_close(stem(x), F.adaptive_avg_pool2d(out, 4).flatten(1))
        torch.testing.assert_close(stem.summary(x), F.adaptive_avg_pool2d(x, 8).flatten(1))


def test_gradients():
    stem = make_stem(channels=(3, 4), strides=(2, 1), grid=2).double()
    x = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    x[1, :, 3:], x[1, :, :, 2:] = torch.nan, torch.nan
    inside = x.isfinite()
    values = x[inside].requires_grad_()

    def features(values, *parameters):
        names = (name for name, _ in stem.named_parameters())
        return torch.func.functional_call(
            stem, dict(zip(names, parameters, strict=True)), (x.masked_scatter(inside, values),)
        )

    assert torch.autograd.gradcheck(features, (values, *stem.parameters()))


def test_the_summary_is_finite_and_in_0_to_1_whatever_is_missing():
    x = torch.rand(3, 1, 20, 30)
    x[0, :, 5:9] = torch.nan
    x[1] = torch.nan
    stem = make_stem(in_channels=1)
    summary = stem.summary(x)
    assert summary.isfinite().all()
    assert stem(x).isfinite().all()
    assert 0 <= summary.min() <= summary.max() <= 1
    assert not summary[1].any()


# As a whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """600 of scikit-learn's digits as PNG files, in a folder for each class, a third of them cut at the right."""
    folder = tmp_path_factory.mktemp("digits")
    digits = load("digits")
    for number, (row, label) in enumerate(zip(digits.features[:600], digits.target, strict=False)):
        (folder / str(label)).mkdir(exist_ok=True)
        pixels = (row.reshape(8, 8) * 15.9375).astype(np.uint8)
        Image.fromarray(pixels[:, : 8 - number % 3 // 2]).save(folder / str(label) / f"{number:04}.png")
    return folder


@pytest.fixture(scope="module")
def items(folder):
    found = collect(str(folder), kind_of(str(folder)))
    reader = ImageReader().fit(found.items)
    return found, Items(reader, found.items)


def make_encoder(reader, *widths):
    torch.manual_seed(0)
    front_end = reader.front_end()
    return FrontEncoder(front_end, Encoder(front_end.out_features, widths))


def test_a_folder_of_classes(folder, items):
    found, read = items
    assert found.kind == "image"
    assert len(found) == len(read) == 600
    assert found.names[0] == "0/0000.png"
    assert found.labels.tolist() == [name.split("/")[0] for name in found.names]
    assert read.reader.channels == 1
    assert set(read.lengths.tolist()) == {56, 64}


def test_a_corrupt_file_is_found_at_once(folder, tmp_path):
    (tmp_path / "a").mkdir()
    paths = [*sorted(folder.rglob("*.png"))[:2], tmp_path / "a" / "broken.png"]
    paths[-1].write_bytes(paths[0].read_bytes()[:60])
    with pytest.raises(DataError, match=r"broken\.png cannot be decoded"):
        Items(ImageReader(1), paths)


def test_a_classifier_learns_the_digits_and_is_saved(items, tmp_path):
    found, read = items
    y = torch.tensor(found.labels.astype(int))
    order = np.random.default_rng(0).permutation(len(read))
    train, test = order[:450], order[450:]
    model = Classifier(make_encoder(read.reader, 64, 32), 10)
    trainer = Trainer(model, lr=2e-3, loss="cross_entropy", seed=0)
    history = trainer.fit(
        make_loader(read, train, y, seed=0), validation_data=make_loader(read, test, y), epochs=10, verbose=False
    ).history
    assert history["val_accuracy"][-1] > 0.9  # a guess is right once in ten
    model.save_pretrained(tmp_path, preprocessing=read.reader.to_dict())
    same, preprocessing = load_with_preprocessing(tmp_path)
    assert_same_weights(same, model)
    again = Items(reader_from_dict(preprocessing), found.items)
    logits = encode_items(model.eval(), read)
    np.testing.assert_array_equal(encode_items(same, again), logits)
    assert (logits[test].argmax(1) == y[test].numpy()).mean() > 0.9


def test_an_autoencoder_reconstructs_the_summary(items, tmp_path):
    _, read = items
    model = AutoEncoder(make_encoder(read.reader, 64, 16), final_activation="sigmoid")
    loader = make_loader(read, np.arange(600), model.encoder.summary, seed=0)
    history = Trainer(model, lr=2e-3, seed=0).fit(loader, epochs=8, verbose=False).history
    summaries = torch.cat([target for _, target in loader])
    assert history["loss"][-1] < 0.6 * float(summaries.var(0, correction=0).mean())  # the mean summary's error
    model.save_pretrained(tmp_path)
    assert_same_weights(load_pretrained(tmp_path), model)


def test_the_page_of_the_docs_runs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(folder)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    output = capsys.readouterr().out
    assert "(600, 16)" in output
    assert float(re.search(r"accuracy: (\S+)", output)[1]) > 0.8

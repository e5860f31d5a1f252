"""Images as features: what is read of each kind of file, that padding changes nothing, and that all of it trains."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import Worst
from PIL import Image
from small_models import assert_same_weights
from torch.nn import functional as F

from fastenc import AutoEncoder, Classifier, Encoder, Trainer
from fastenc.data import DataError, load
from fastenc.frontends import FrontEncoder, Items, collect, encode_items, kind_of, make_loader, reader_from_dict
from fastenc.frontends.images import ConvStem, ImageReader
from fastenc.loading import load_pretrained, load_with_preprocessing

DOCS = Path(__file__).parents[1] / "docs" / "applications" / "images.md"
SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (8, 8), (17, 5), (33, 40)]
STEMS = [{"strides": (1, 1, 2)}, {"strides": (2, 2, 2), "grid": 3}, {"channels": (5,), "strides": (3,), "grid": 1}]


def random_image(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng((seed, height, width)).integers(0, 256, shape, np.uint8)


def encoded(array, form="PNG", mode=None, **options):
    """The bytes of a file."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()


def planes(array):
    return array.transpose(2, 0, 1)


def make_stem(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConvStem(**options)


def images(sizes=SIZES, channels=3):
    reader = ImageReader(channels)
    return reader, [reader.read(encoded(random_image(*size, channels))) for size in sizes]


# Reading


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_files_without_loss_are_read_to_the_pixel(form, tmp_path):
    array = random_image(5, 7)
    content = encoded(array, form, **({"lossless": True} if form == "WEBP" else {}))
    (tmp_path / "x.img").write_bytes(content)
    for item in (content, tmp_path / "x.img", str(tmp_path / "x.img")):
        read = ImageReader().read(item)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, planes(array))


def test_jpeg():
    flat = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    read = ImageReader().read(encoded(flat, "JPEG", quality=95))
    assert read.shape == (3, 16, 24)
    assert np.abs(read - planes(flat).astype(int)).max() <= 3  # YCbCr is rounded twice, and the block's mean quantised


def test_grey_and_colour_become_what_the_reader_has():
    grey, colour = random_image(4, 6, 1), random_image(4, 6)
    np.testing.assert_array_equal(ImageReader(3).read(encoded(grey)), np.stack([grey] * 3))
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    np.testing.assert_array_equal(ImageReader(1).read(encoded(colour)), luma[None])


def test_palette_and_black_and_white():
    array = random_image(6, 6) // 128 * 255  # eight colours, which a palette holds
    paletted = Image.fromarray(array).quantize(8, dither=Image.Dither.NONE)
    np.testing.assert_array_equal(ImageReader().read(encoded(paletted)), planes(np.asarray(paletted.convert("RGB"))))
    bits = random_image(6, 6, 1) > 127
    np.testing.assert_array_equal(ImageReader(1).read(encoded(Image.fromarray(bits))), bits[None] * np.uint8(255))


def test_what_is_transparent_is_white():
    array = np.dstack([random_image(2, 2), np.array([[255, 0], [0, 255]], np.uint8)])
    expected = np.where(array[..., 3:] == 255, array[..., :3], 255)
    np.testing.assert_array_equal(ImageReader().read(encoded(array)), planes(expected))
    paletted = Image.new("P", (2, 1))
    paletted.putpalette([0, 0, 0, 10, 20, 30])
    paletted.putpixel((1, 0), 1)
    read = ImageReader().read(encoded(paletted, transparency=0))
    assert read[:, 0].T.tolist() == [[255, 255, 255], [10, 20, 30]]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_stay_sixteen(form):
    array = np.array([[0, 1, 257], [65534, 65535, 32768]], np.uint16)
    read = ImageReader(3).read(encoded(array, form))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.stack([(array / 65535).astype(np.float32)] * 3))
    x = ImageReader(1).batch([ImageReader(1).read(encoded(array, form))])
    np.testing.assert_array_equal(x[0, 0].numpy(), read[0])


def test_floats_are_read_where_they_are_in_0_to_1():
    array = np.array([[0.0, 0.25], [0.5, 1.0]], np.float32)
    np.testing.assert_array_equal(ImageReader(1).read(encoded(array, "TIFF")), array[None])
    for bad in (1.5, -0.1, np.nan):
        with pytest.raises(DataError, match=r"^the image cannot be decoded \(its values are not all between 0 and 1"):
            ImageReader(1).read(encoded(np.full((2, 2), bad, np.float32), "TIFF"))


def test_a_photograph_is_turned_as_its_exif_says():
    array = random_image(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    np.testing.assert_array_equal(ImageReader().read(encoded(array, exif=exif)), planes(np.rot90(array, -1)))


def test_of_several_frames_the_first():
    first, second = (Image.fromarray(random_image(4, 4, seed=seed)) for seed in (1, 2))
    content = encoded(first, "TIFF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(ImageReader().read(content), planes(np.asarray(first)))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_large_images_are_scaled_down(form):
    array = np.zeros((300, 1000, 3), np.uint8)
    array[:, 500:] = 240
    read = ImageReader(largest=100).read(encoded(array, form))
    assert read.shape == (3, 30, 100)
    assert read[:, :, :45].max() <= 3
    assert read[:, :, 55:].min() >= 237
    assert ImageReader(largest=100).read(encoded(np.full((1, 1000), 65535, np.uint16))).shape == (3, 1, 100)
    assert ImageReader().read(encoded(random_image(20, 30))).shape == (3, 20, 30)  # and small ones left alone


def test_a_batch_is_padded_with_nan_below_and_to_the_right():
    reader, arrays = images([(2, 3), (4, 1)])
    x = reader.batch(arrays)
    assert (x.shape, x.dtype) == ((2, 3, 4, 3), torch.float32)
    for row, array in zip(x, arrays, strict=True):
        inside = row[:, : array.shape[1], : array.shape[2]]
        np.testing.assert_array_equal(inside.numpy(), array.astype(np.float32) / 255)
        assert int(row.isnan().sum()) == row.numel() - array.size
    assert [reader.length(array) for array in arrays] == [6, 4]


# What fit learns


def test_fit_decides_channels_and_strides(tmp_path):
    grey = [encoded(random_image(side, side + 1, 1)) for side in (8, 9, 200)]
    grey_in_colour = encoded(Image.fromarray(random_image(9, 9, 1)).convert("RGB"))
    reader = ImageReader().fit([*grey, grey_in_colour])
    assert (reader.channels, reader.side) == (1, 9)
    stem = reader.front_end()
    assert (stem.in_channels, stem.strides) == (1, (1, 1, 2))
    reader.fit([encoded(random_image(40, 90)), *grey])
    assert (reader.channels, reader.front_end().in_channels) == (3, 3)
    again = reader_from_dict(reader.to_dict())
    assert isinstance(again, ImageReader)
    assert vars(again) == vars(reader)
    sides = {1: (1, 1, 1), 8: (1, 1, 2), 16: (1, 2, 2), 32: (2, 2, 2), 63: (2, 2, 2), 64: (2, 2, 2, 2)}
    assert {side: ImageReader(side=side).front_end().strides for side in sides} == sides
    assert ImageReader(largest=50).fit([encoded(random_image(100, 300))]).side == 50


def test_bad_options():
    for options, words in (({"channels": 2}, "1 .grey. or 3"), ({"largest": 0}, "1 pixel"), ({"side": 0}, "1 pixel")):
        with pytest.raises(ValueError, match=words):
            ImageReader(**options)
    for options, words in (
        ({"strides": (2,)}, "3 channels and 1 strides"),
        ({"channels": (), "strides": ()}, "0 channels"),
        ({"grid": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            ConvStem(**options)
    with pytest.raises(ValueError, match=r"takes \[images, 3, height, width\], and x is \[2, 1, 8, 8\]; batch"):
        ConvStem()(torch.zeros(2, 1, 8, 8))


# Files that cannot be read


def png_of_size(width, height):
    """A PNG that says it is so large, and whose pixels end after a few bytes."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99)))


def test_each_bad_file_is_one_sentence_with_its_name_and_the_cure(tmp_path):
    whole = encoded(random_image(40, 40))
    bad = {
        "empty.png": (b"", r"is empty \(0 bytes\); write or copy it again"),
        "text.png": (b"not an image at all", "is not an image in PNG, JPEG, BMP, WEBP or TIFF, .*; save it again"),
        "cut.png": (whole[: len(whole) // 2], r"cannot be decoded \(.*\); save or copy it again"),
        "cut.jpg": (encoded(random_image(40, 40), "JPEG")[:-200], r"cannot be decoded \(.*\); save or copy it again"),
        "bomb.png": (
            png_of_size(10_000, 10_000),
            "has more than the 89478485 pixels that are decoded.*; scale it down",
        ),
        "large.png": (png_of_size(2**20, 2**20), "has more than the 89478485 pixels that are decoded.*; scale it down"),
        "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image in"),
    }
    for name, (content, words) in bad.items():
        (tmp_path / name).write_bytes(content)
        for act in (ImageReader().read, lambda path: ImageReader().fit([path])):
            with pytest.raises(DataError, match=rf"^{re.escape(str(tmp_path / name))} {words}"):
                act(tmp_path / name)
        with pytest.raises(DataError, match=r"^the image "):
            ImageReader().read(content)
    with pytest.raises(DataError, match=r"none\.png cannot be read \(No such file or directory\); give the path"):
        ImageReader().read(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot be read"):
        ImageReader().read(tmp_path)
    with pytest.raises(DataError, match="no images"):
        ImageReader().fit([])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_how_many_pixels_are_decoded_is_pillows_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = encoded(random_image(11, 10))
    with pytest.raises(DataError, match="more than the 100 pixels"):
        ImageReader().read(content)
    assert ImageReader().read(encoded(random_image(10, 10))).shape == (3, 10, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert ImageReader().read(content).shape == (3, 11, 10)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_broken_bytes_are_read_or_refused(form):
    """Whatever Pillow raises inside, nothing but a DataError comes out."""
    whole = encoded(random_image(24, 24), form)
    random = np.random.default_rng(0)
    refused = 0
    for trial in range(150):
        content = bytearray(whole)
        if trial % 3 == 0:
            del content[int(random.integers(1, len(content))) :]
        else:
            for place in random.integers(0, min(len(content), 80 if trial % 3 == 1 else len(content)), 4):
                content[place] = int(random.integers(256))
        try:
            array = ImageReader(largest=64).read(bytes(content))
        except DataError:
            refused += 1
        else:
            assert array.shape[0] == 3
            assert max(array.shape[1:]) <= 64
    assert refused > 10


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

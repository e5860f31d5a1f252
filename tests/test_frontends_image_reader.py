"""What is read of each kind of image file, what is learned from them, and what is said of those that are broken."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import encoded, images, random_image

from fastenc.data import DataError
from fastenc.frontends import reader_from_dict
from fastenc.frontends.images import ConvStem, ImageReader


def planes(array):
    return array.transpose(2, 0, 1)


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

"""Images of random pixels, as arrays, as files and read, for the tests of the front end of images."""

import io

import numpy as np
from PIL import Image

from fastenc.frontends.images import ImageReader

SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (8, 8), (17, 5), (33, 40)]


def random_image(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng((seed, height, width)).integers(0, 256, shape, np.uint8)


def encoded(array, form="PNG", **options):
    """The bytes of a file."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def images(sizes=SIZES, channels=3):
    """A reader, and what it reads of files of these sizes."""
    reader = ImageReader(channels)
    return reader, [reader.read(encoded(random_image(*size, channels))) for size in sizes]

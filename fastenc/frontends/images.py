"""Images: ImageReader reads files of any size with Pillow, ConvStem turns a padded batch of them into features."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import DataError
from ..data.extras import require
from .base import FrontEnd
from .reader import Reader

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")  # the only ones tried: some others of Pillow's start programs
SUMMARY_GRID = 8
KERNEL = 3
WIDTHS = (16, 32, 64, 64)  # of the convolutions


class ImageReader(Reader):
    """Files to arrays `[channels, height, width]`: uint8, or float32 in 0 to 1 where a file has more than 8 bits.

    Photographs are turned as their EXIF says, transparency lies over white, of several frames the first is taken.

    Args:
        channels: 1 for grey, 3 for red, green and blue; `fit` sets it.
        largest: pixels along the longer side; larger images are scaled down to it.
        side: the usual longer side, which decides the strides of `front_end`; `fit` sets it.
    """

    kind = "image"
    suffixes = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

    def __init__(self, channels: int = 3, largest: int = 256, side: int = 32) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels!r}; it must be 1 (grey) or 3 (red, green and blue)")
        if largest < 1 or side < 1:
            raise ValueError(f"largest is {largest} and side {side}; both must be at least 1 pixel")
        self.channels, self.largest, self.side = channels, largest, side

    def fit(self, items: Sequence[Any]) -> ImageReader:
        """Set `channels`, 1 where every pixel of every image is grey, and `side`, the median of the longer sides."""
        if not len(items):
            raise DataError("there are no images to learn from; give at least one")
        grey, sides = True, []
        for item in items:
            with _opened(item) as image:
                sides.append(max(_scaled(image.size, self.largest)))
                if grey:
                    pixels = _pixels(image, 3, self.largest)
                    grey = bool((pixels == pixels[:1]).all())
        self.channels, self.side = 1 if grey else 3, int(np.median(sides))
        return self

    def read(self, item: Any) -> np.ndarray:
        with _opened(item) as image:
            return _pixels(image, self.channels, self.largest)

    def length(self, array: np.ndarray) -> int:
        """The area in pixels."""
        return array.shape[1] * array.shape[2]

    def batch(self, arrays: Sequence[np.ndarray]) -> Tensor:
        """float32 `[images, channels, height, width]` in 0 to 1 of the largest sides, NaN below and to the right."""
        height, width = (max(array.shape[axis] for array in arrays) for axis in (1, 2))
        out = np.full((len(arrays), self.channels, height, width), np.nan, np.float32)
        for row, array in zip(out, arrays, strict=True):
            values = array.astype(np.float32)
            row[:, : array.shape[1], : array.shape[2]] = values / 255 if array.dtype == np.uint8 else values
        return torch.from_numpy(out)

    def front_end(self) -> ConvStem:
        """A ConvStem that halves the usual image as often as leaves it a grid of 4 x 4, at most four times."""
        halvings = sum(self.side >= 4 * 2**times for times in range(1, len(WIDTHS) + 1))
        strides = (1,) * (len(WIDTHS) - 1 - halvings) + (2,) * halvings
        return ConvStem(self.channels, WIDTHS[: len(strides)], strides)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "channels": self.channels, "largest": self.largest, "side": self.side}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> ImageReader:
        return cls(**{name: value for name, value in state.items() if name != "kind"})


@contextmanager
def _opened(item: Any) -> Iterator[Any]:
    """The Pillow image in a file or in the bytes of one; what goes wrong with it meanwhile is a DataError."""
    pillow = require("PIL.Image", "reading images", extra="frontends")
    name = "the image" if isinstance(item, bytes) else str(item)
    try:
        content = item if isinstance(item, bytes) else Path(item).read_bytes()
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror}); give the path of an image that can") from error
    if not content:
        raise DataError(f"{name} is empty (0 bytes); write or copy it again")
    limit = pillow.MAX_IMAGE_PIXELS
    bomb = DataError(
        f"{name} has more than the {limit} pixels that are decoded, since a small file could fill the memory; scale it "
        "down, or set PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    )
    try:
        with pillow.open(io.BytesIO(content), formats=FORMATS) as image:
            if limit is not None and image.width * image.height > limit:
                raise bomb
            if 0 in image.size:
                raise DataError(f"{name} is {image.width} x {image.height} pixels; give an image of at least 1 x 1")
            yield image
    except DataError:
        raise
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise bomb from error
    except pillow.UnidentifiedImageError as error:
        raise DataError(
            f"{name} is not an image in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or its beginning is broken; "
            "save it again as one of them"
        ) from error
    except Exception as error:  # where broken bytes lie decides what a decoder raises
        raise DataError(f"{name} cannot be decoded ({error}); save or copy it again") from error


def _scaled(size: tuple[int, int], largest: int) -> tuple[int, int]:
    """The size with its longer side at most `largest`, in the same proportions."""
    factor = min(1.0, largest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _pixels(image: Any, channels: int, largest: int) -> np.ndarray:
    """As `ImageReader.read`, of an image that is open and not yet decoded."""
    pillow = require("PIL.Image", "reading images", extra="frontends")
    operations = require("PIL.ImageOps", "reading images", extra="frontends")
    image.draft(None, _scaled(image.size, largest))  # a large JPEG is decoded at a half, a quarter or an eighth
    image = operations.exif_transpose(image)
    size = _scaled(image.size, largest)
    deep = image.mode.startswith("I") or image.mode == "F"
    if deep:
        image = pillow.fromarray(_unit_values(image))
    elif image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        over = pillow.new("RGBA", image.size, "white")
        over.alpha_composite(image.convert("RGBA"))
        image = over.convert("RGB")
    if not deep:
        image = image.convert("L" if channels == 1 else "RGB")
    if size != image.size:
        image = image.resize(size, pillow.Resampling.BILINEAR)  # the mean of what one pixel covers, weighted
    pixels = np.array(image)
    if pixels.ndim == 3:
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return np.repeat(pixels[None], channels, axis=0)


def _unit_values(image: Any) -> np.ndarray:
    """The values of a grey image of 16 bits, or of floats in 0 to 1, as float32 in 0 to 1."""
    values = np.asarray(image)
    if image.mode == "F":
        highest, what = 1, "0 and 1"
    else:
        highest, what = 65535, "0 and 65535"
    if not (values.min() >= 0 and values.max() <= highest):  # nor NaN
        raise ValueError(f"its values are not all between {what}")
    return (values / np.float64(highest)).astype(np.float32)


class ConvStem(FrontEnd):
    """Convolutions of 3 x 3 with ReLU, then the mean over each cell of a grid over the image: any size to one size.

    `[B, in_channels, H, W]` in 0 to 1, NaN where a row has no pixel -> `[B, channels[-1] * grid**2]`. Behind
    each convolution what lies outside a row's own image is set to zero, and the grid covers that image alone, by the
    cells of `F.adaptive_avg_pool2d`; so padding changes nothing, and there is no normalisation over a batch. A missing
    pixel inside an image counts as middle grey, and not in the means.

    Args:
        in_channels: 1 or 3, as the reader's `channels`.
        channels: of the output of each convolution.
        strides: of each convolution.
        grid: cells along a side.

    Raises:
        ValueError: as many strides as channels are needed, and numbers of at least 1; or x has another shape.
    """

    kind = "image"

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = WIDTHS[:3],
        strides: Sequence[int] = (2, 2, 2),
        grid: int = 4,
    ) -> None:
        super().__init__()
        channels, strides = tuple(channels), tuple(strides)
        if not channels or len(channels) != len(strides):
            raise ValueError(
                f"there are {len(channels)} channels and {len(strides)} strides; give each convolution both"
            )
        if min(in_channels, grid, *channels, *strides) < 1:
            raise ValueError("in_channels, channels, strides and grid must all be at least 1")
        self.in_channels, self.channels, self.strides, self.grid = in_channels, channels, strides, grid
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, KERNEL, stride, padding=KERNEL // 2)
            for before, after, stride in zip((in_channels, *channels), channels, strides, strict=False)
        )
        for convolution in cast("Iterator[nn.Conv2d]", iter(self.convolutions)):
            # He et al., arXiv:1502.01852: nothing else keeps the scale.
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, convolution.bias))
        self.out_features = channels[-1] * grid**2
        self.summary_features = in_channels * SUMMARY_GRID**2

    def get_config(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "channels": list(self.channels),
            "strides": list(self.strides),
            "grid": self.grid,
        }

    def forward(self, x: Tensor) -> Tensor:
        valid = self._valid(x)
        out = torch.where(valid, 2 * x - 1, 0)  # 0 is middle grey, at the border of an image as in its padding
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            valid = valid[:, :, ::stride, ::stride]
            out = F.relu(convolution(out)) * valid
        return _mean_in_cells(out, valid, self.grid).flatten(1)

    def summary(self, x: Tensor) -> Tensor:
        """The image in 8 x 8 pixels, in 0 to 1: `[B, in_channels * 64]`."""
        valid = self._valid(x)
        return _mean_in_cells(torch.where(valid, x, 0), valid, SUMMARY_GRID).flatten(1)

    def _valid(self, x: Tensor) -> Tensor:
        """Where a row has a pixel, bool `[B, 1, H, W]`."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"ConvStem takes [images, {self.in_channels}, height, width], and x is {list(x.shape)}; "
                "batch the images with the reader that the model was made with"
            )
        return ~x.isnan().any(1, keepdim=True)


def _mean_in_cells(x: Tensor, valid: Tensor, grid: int) -> Tensor:
    """The mean of the valid pixels of each cell, 0 where there are none: `[B, C, grid, grid]`.

    x      [B, C, H, W], 0 where not valid
    valid  [B, 1, H, W], bool; the grid of a row ends at its last valid row and column
    """
    down, across = _cells(valid.any(3), grid).to(x.dtype), _cells(valid.any(2), grid).to(x.dtype)

    def sums(values: Tensor) -> Tensor:
        return down @ values @ across.mT

    return sums(x) / sums(valid.to(x.dtype)).clamp(min=1)


def _cells(occupied: Tensor, grid: int) -> Tensor:
    """Whether a place is in a cell, bool `[B, 1, grid, places]`, of `occupied`, bool `[B, 1, places]`.

    Cell i of n places, up to the last that is occupied, is floor(i n / grid) to ceil((i + 1) n / grid), as of
    `F.adaptive_avg_pool2d`: cells overlap where grid does not divide n.
    """
    place = torch.arange(occupied.shape[-1], device=occupied.device)
    n = (occupied * (place + 1)).amax(-1)[..., None, None]
    cell = torch.arange(grid, device=occupied.device)[:, None]
    return (place >= cell * n // grid) & (place < -((cell + 1) * -n // grid))

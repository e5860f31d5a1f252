"""Sizes of the tiles in which the dense kernels compute a product [rows, depth] @ [depth, columns]."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from .configs import Config, shortlist
from .device import Target

GROUP = 8  # rows of tiles that are computed together, so that they share what they load of the right matrix
LEAST = 16  # of a tile's sides: the smallest that `tl.dot` takes


class Product(NamedTuple):
    """A product to choose tiles for."""

    rows: int
    columns: int
    depth: int
    dtype: torch.dtype
    precision: str  # as `device.precision` says
    left: int = 1  # matrices [rows, depth] that are loaded and combined into the left factor
    dropout: bool = False
    described: bool = False  # loaded by descriptors

    @property
    def tensor_cores(self) -> bool:
        return self.dtype.itemsize == 2 or self.precision == "tf32"


# rows, columns, depth, warps, stages. 16-bit; for tf32 half the depth, the same bytes.
_TENSOR_CORE_TILES = (
    (128, 128, 64, 8, 4),
    (128, 128, 32, 8, 4),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (64, 256, 32, 8, 4),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (128, 64, 32, 4, 4),
    (64, 128, 32, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 64, 32, 4, 5),
    (128, 32, 64, 4, 4),
    (64, 32, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (128, 16, 64, 4, 4),
    (32, 32, 128, 4, 4),
    (16, 128, 64, 4, 4),
    (16, 64, 128, 4, 4),
    (16, 32, 128, 2, 4),
    (16, 16, 128, 2, 4),
)
_FP32_TILES = (
    (64, 64, 16, 4, 4),
    (128, 64, 16, 8, 4),
    (64, 128, 16, 8, 4),
    (64, 64, 32, 8, 3),
    (64, 32, 16, 4, 4),
    (32, 64, 16, 4, 4),
    (128, 32, 16, 4, 4),
    (32, 32, 32, 4, 4),
    (64, 16, 32, 4, 4),
    (16, 64, 32, 4, 4),
    (32, 16, 32, 2, 4),
    (16, 32, 32, 2, 4),
    (16, 16, 32, 2, 4),
)


def shared_bytes(tiles: Config, product: Product, facts: Target) -> int:
    """Shared memory of a kernel with these tiles: of its pipeline, or of the sums as it lays them out to store them.

    The stage that is being multiplied is in registers, except where descriptors fill it or the tensor cores read it.
    """
    rows, columns, depth = tiles["rows"], tiles["columns"], tiles["depth"]
    stage = (product.left * rows + columns) * depth * product.dtype.itemsize
    in_registers = not (product.described or has_wgmma(facts))
    buffers = tiles["num_stages"] - in_registers
    return max(buffers * stage, rows * columns * 4)


def has_wgmma(facts: Target) -> bool:
    """Whether the tensor cores read their right factor from shared memory: sm_90's and sm_100's."""
    return 90 <= facts.arch < 120


@functools.lru_cache(maxsize=4096)
def _default_tiles(product: Product, facts: Target) -> tuple[tuple[str, int], ...]:
    # A left factor that is computed, in registers, is so for each tile of columns: rather few rows than few columns.
    # Without wgmma it is computed by several warps at once, and 128 rows of it do not fit; nor do dropout's numbers.
    few_rows = product.dropout or not (product.tensor_cores and (product.left == 1 or has_wgmma(facts)))
    rows = _block(product.rows, 64 if few_rows else 128)
    columns = _block(product.columns, 128 if product.tensor_cores else 64)
    while max(rows, columns) > 32:
        if 4 * triton.cdiv(product.rows, rows) * triton.cdiv(product.columns, columns) >= 3 * facts.processors:
            break
        if columns > rows:
            columns //= 2
        else:
            rows //= 2
    deepest = 128 // (product.left * product.dtype.itemsize) if product.tensor_cores else 16
    depth = _block(product.depth, deepest)
    warps = 8 if rows * columns >= 128 * 64 else 4 if rows * columns > 16 * 32 else 2
    tiles = {"rows": rows, "columns": columns, "depth": depth, "num_warps": warps, "num_stages": 4}
    while shared_bytes(tiles, product, facts) > facts.shared_memory and tiles["num_stages"] > 2:
        tiles["num_stages"] -= 1
    if product.left > 1 and product.dtype.itemsize == 2 and facts.arch == 120:
        tiles["maxnreg"] = 168  # unbidden, ptxas saves registers there until it spills
    return tuple(tiles.items())


def default_tiles(product: Product, facts: Target) -> Config:
    """The largest tiles of which most processors still have one, in a pipeline of up to 4 stages."""
    return dict(_default_tiles(product, facts))


def tile_candidates(product: Product, facts: Target) -> list[Config]:
    """Tiles to measure: the default, then those that fit the GPU's shared memory and are not mostly padding."""
    tiles = [default_tiles(product, facts)]
    for rows, columns, depth, warps, stages in _TENSOR_CORE_TILES if product.tensor_cores else _FP32_TILES:
        if rows > _block(product.rows, 256) or columns > _block(product.columns, 256):
            continue
        if product.tensor_cores and product.dtype.itemsize == 4:
            depth //= 2
        depth = min(depth, _block(product.depth, depth))
        tiles.append({"rows": rows, "columns": columns, "depth": depth, "num_warps": warps, "num_stages": stages})
    unique = [tile for i, tile in enumerate(tiles) if tile not in tiles[:i]]
    return shortlist(unique, [shared_bytes(tile, product, facts) for tile in unique], facts)


def _block(size: int, largest: int) -> int:
    """The power of two that covers `size`, from LEAST to `largest`."""
    return min(max(triton.next_power_of_2(size), LEAST), largest)

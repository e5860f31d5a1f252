"""Sizes of the tiles in which the dense kernels compute a product [rows, depth] @ [depth, columns]."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from .configs import MAX_CANDIDATES, Config, shortlist
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

    @property
    def tensor_cores(self) -> bool:
        return self.dtype.itemsize == 2 or self.precision == "tf32"


# rows, columns, depth (in 16-bit elements), warps, stages
_TENSOR_CORE_TILES = (
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 128, 32, 4, 4),
    (64, 256, 64, 8, 3),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (128, 64, 32, 4, 4),
    (128, 32, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 32, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (128, 16, 64, 4, 4),
    (32, 32, 128, 4, 4),
    (16, 128, 64, 4, 4),
    (16, 64, 128, 4, 4),
    (16, 32, 128, 2, 4),
    (16, 16, 128, 1, 4),
)
_FP32_TILES = (
    (64, 64, 32, 4, 3),
    (64, 64, 16, 4, 4),
    (128, 64, 16, 8, 3),
    (64, 128, 16, 8, 3),
    (64, 32, 32, 4, 3),
    (32, 64, 32, 4, 3),
    (128, 32, 16, 4, 3),
    (32, 32, 32, 4, 3),
    (64, 16, 32, 4, 3),
    (16, 64, 32, 4, 3),
    (32, 16, 32, 2, 3),
    (16, 32, 32, 2, 3),
    (16, 16, 32, 1, 4),
)


def shared_bytes(tiles: Config, product: Product) -> int:
    """Shared memory of a kernel with these tiles: of its pipeline, or of the sums as it lays them out to store them."""
    rows, columns, depth = tiles["rows"], tiles["columns"], tiles["depth"]
    stage = (product.left * rows + columns) * depth * product.dtype.itemsize
    return max(tiles["num_stages"] * stage, rows * columns * 4)


@functools.lru_cache(maxsize=4096)
def _default_tiles(product: Product, facts: Target) -> tuple[tuple[str, int], ...]:
    largest = 128 if product.tensor_cores else 64
    rows = _block(product.rows, largest)
    columns = _block(product.columns, largest)
    while max(rows, columns) > 32:
        if 4 * triton.cdiv(product.rows, rows) * triton.cdiv(product.columns, columns) >= 3 * facts.processors:
            break
        if columns > rows:
            columns //= 2
        else:
            rows //= 2
    depth = _block(product.depth, 32 if product.dtype.itemsize == 4 else 64)
    tiles = {"rows": rows, "columns": columns, "depth": depth}
    tiles["num_warps"] = 8 if rows * columns > 128 * 64 else 4 if rows * columns > 16 * 32 else 2
    tiles["num_stages"] = 4
    while shared_bytes(tiles, product) > facts.shared_memory // 2 and tiles["num_stages"] > 2:
        tiles["num_stages"] -= 1
    while shared_bytes(tiles, product) > facts.shared_memory:
        tiles["depth"] //= 2
    return tuple(tiles.items())


def default_tiles(product: Product, facts: Target) -> Config:
    """The largest tiles of which most processors still have one; a pipeline that leaves room for a second program."""
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
    return shortlist(unique, [shared_bytes(tile, product) for tile in unique], facts)[:MAX_CANDIDATES]


def _block(size: int, largest: int) -> int:
    """The power of two that covers `size`, from LEAST to `largest`."""
    return min(max(triton.next_power_of_2(size), LEAST), largest)

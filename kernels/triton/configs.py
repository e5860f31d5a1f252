"""What a configuration is, and what rules one out."""

from __future__ import annotations

from collections.abc import Iterable

from .device import Target

# Block sizes, num_warps, num_stages and maxnreg by the names that the kernel and Triton give them: without maxnreg the
# assembler may spill to let more blocks run at once. Other lower-case names are numbers for the launcher.
Config = dict[str, int]

MAX_CANDIDATES = 20


def pipelined_bytes(config: Config, itemsize: int, *tiles: tuple[int, int]) -> int:
    """Bytes of shared memory in which the pipeline holds `num_stages` of each of the tiles (rows, columns)."""
    return config["num_stages"] * itemsize * sum(rows * columns for rows, columns in tiles)


def waste(size: int, block: int) -> float:
    """The share of the work on padding when `size` is cut into blocks of `block`: 0 to 1."""
    padded = -(-size // block) * block
    return 1 - size / padded if padded else 0.0


def shortlist(configs: Iterable[Config], needs: Iterable[int], target: Target) -> list[Config]:
    """The first MAX_CANDIDATES of those whose need of shared memory (bytes) the target meets."""
    fitting = [config for config, need in zip(configs, needs, strict=True) if need <= target.shared_memory]
    return fitting[:MAX_CANDIDATES]

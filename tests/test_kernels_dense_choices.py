"""What the launchers of the dense kernels choose from sizes alone: tiles, 64-bit offsets, and the way backward."""

from __future__ import annotations

import itertools
from typing import Any

import interpreter
import pytest
import torch
from accuracy import assert_same, draw, eager, run, small_integers
from fastenc.kernels import dense_backward, dense_forward, dense_input_gradient, preact_gradient
from fastenc.kernels.configs import MAX_CANDIDATES
from fastenc.kernels.dense_tiles import Product, shared_bytes, tile_candidates
from fastenc.kernels.device import TARGETS, assumed
from guards import DEVICE

SIZES = ((1, 1, 1), (77, 33, 45), (4096, 128, 784), (65536, 784, 128), (8192, 1024, 1024))
KINDS = ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"))
PRODUCTS = [
    Product(*sizes, *kind, left, dropout)
    for sizes, kind, left, dropout in itertools.product(SIZES, KINDS, (1, 2), (False, True))
]


@pytest.mark.parametrize("arch", TARGETS)
def test_tiles_fit_the_gpu(arch):
    facts = TARGETS[arch]
    for product in PRODUCTS:
        tiles = tile_candidates(product, facts)
        assert 1 <= len(tiles) <= MAX_CANDIDATES
        assert len({tuple(tile.items()) for tile in tiles}) == len(tiles)
        for tile in tiles:
            assert shared_bytes(tile, product, facts) <= facts.shared_memory
            assert min(tile["rows"], tile["columns"], tile["depth"]) >= 16
            assert tile["rows"] < 2 * max(16, product.rows)
            assert tile["columns"] < 2 * max(16, product.columns)


@pytest.mark.parametrize("arch", TARGETS)
def test_descriptors_only_where_the_gpu_and_the_matrices_allow_them(arch):
    facts = TARGETS[arch]
    for product, describable in itertools.product(PRODUCTS, (False, True)):
        configs = dense_forward.candidates(product, describable, facts)
        assert configs[0] == dense_forward.default_config(product, describable, facts)
        assert 1 <= len(configs) <= MAX_CANDIDATES
        allowed = describable and arch >= 90 and product.tensor_cores
        assert any("described" in config for config in configs) == allowed
    large = Product(8192, 1024, 1024, torch.bfloat16, "ieee")
    assert ("described" in dense_forward.default_config(large, True, facts)) == (arch >= 90)


def test_what_descriptors_can_describe():
    matrix = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert dense_forward._describable(matrix)
    assert dense_forward._describable(matrix[:, 8:48])
    for odd in (
        matrix[:, 1:],  # 16-byte alignment
        matrix[:, ::2],
        matrix.t(),
        matrix[:1].expand(8, 64),
        torch.zeros(8, 63, dtype=torch.bfloat16),
        torch.zeros(8, 0, dtype=torch.bfloat16),
        torch.zeros(520, dtype=torch.bfloat16).as_strided((8, 64), (8, 1)),  # rows that overlap
    ):
        assert not dense_forward._describable(odd)


def test_wide_layers_by_rule():
    is_wide = dense_backward.is_wide
    assert not is_wide(32, 128, 4096, torch.bfloat16)
    assert not is_wide(32, 4096, 128, torch.float16)
    assert is_wide(32, 256, 256, torch.bfloat16)
    assert is_wide(32, 128, 784, torch.float32)
    assert not is_wide(32, 64, 784, torch.float32)


def test_long_sums_on_tensor_cores_are_left_to_cublas():
    is_wide = dense_backward.is_wide
    assert (is_wide(1023, 16, 16, torch.bfloat16), is_wide(1024, 16, 16, torch.bfloat16)) == (False, True)
    assert not is_wide(65536, 64, 64, torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="launches are counted by the interpreter")
def test_backward_follows_the_rule():
    for K, kernel in ((64, "dense_input_gradient_kernel"), (65, "preact_gradient_kernel")):
        tensors = torch.zeros(2, 65), torch.zeros(2, K), torch.zeros(65, K), torch.zeros(2, 65)
        with interpreter.watched() as launches:
            dense_backward.dense_backward(*tensors, "relu", (True, True, True))
        assert launches[0].kernel == kernel


class Recorder:
    """In place of a kernel: notes what it is launched with."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*arguments: Any, **constants: Any) -> None:
            self.constants = constants

        return launch


@pytest.mark.parametrize("stride", [16, 1 << 23], ids=["short", "long"])
def test_64_bit_offsets_where_a_stride_is_long(stride, monkeypatch):
    """A tile of 256 rows that are 2^23 elements apart ends beyond 2^31 elements."""
    recorder = Recorder()
    for module in (dense_forward, dense_input_gradient, preact_gradient):
        monkeypatch.setattr(module, f"{module.__name__.rpartition('.')[2]}_kernel", recorder)
    apart = torch.empty(300, stride, device="meta", dtype=torch.float16)[:, :16]
    near = torch.empty(300, 16, device="meta", dtype=torch.float16)
    for x in (apart, apart.t()):
        for weight in (x, torch.empty_like(x)):
            dense_forward.dense_forward(x, weight, None, "relu", False)
            assert recorder.constants["INT64"] == (stride > 16)
    bias = apart[:, 0]
    dense_forward.dense_forward(near, near, bias, "relu", False)
    assert recorder.constants["INT64"] == (stride > 16)
    for grad_out, saved, weight in ((apart, near, near.t()), (near, apart, near.t()), (near, near, apart.t())):
        dense_input_gradient.dense_input_gradient(grad_out, saved, weight, "relu")
        assert recorder.constants["INT64"] == (stride > 16)
    for grad_out, saved in ((apart, near), (near, apart)):
        preact_gradient.preact_gradient(grad_out, saved, "relu", (True, False))
        assert recorder.constants["INT64"] == (stride > 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_candidate_gives_the_same(dtype):
    """Of those for the newest GPU, on integers."""
    problem = small_integers(draw(70, (40, 48), "relu", dtype))
    expected = run(eager, problem)
    given = problem.map(lambda tensor: tensor.to(DEVICE))
    facts = TARGETS[100]
    products = Product(70, 48, 40, dtype, "ieee"), Product(70, 40, 48, dtype, "ieee", left=2)
    with assumed(facts):
        for config in dense_forward.candidates(products[0], DEVICE == "cpu", facts):
            out, _ = dense_forward.dense_forward(
                given.x, given.weights[0], given.biases[0], "relu", False, config=config
            )
            assert_same({"out": out.cpu()}, {"out": expected["out"]})
        for config in dense_input_gradient.candidates(products[1], facts):
            grad_x = dense_input_gradient.dense_input_gradient(
                given.grad_out, out, given.weights[0], "relu", config=config
            )
            assert_same({"grad_x": grad_x.cpu()}, {"grad_x": expected["grad_x"]})

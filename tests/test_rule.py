"""What `auto` chooses on GPUs by its model: on shapes that were measured, and on some of which the answer is argued."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch

from fastenc.backends import choice, rule

ENCODER = (784, 128, 64, 32, 16)


def problem(M, widths, activation="relu", dtype=torch.bfloat16, training=False, captured=False, tf32=False):
    tensor_cores = dtype.itemsize == 2 or tf32
    return rule.Problem(M, widths, (activation,) * (len(widths) - 1), dtype, tensor_cores, training, captured)


def faster(*args, arch: int = 80, kernels: rule.Kernels = rule.TRITON, **options) -> bool:
    return rule.ratio(problem(*args, **options), arch, kernels) * rule.GAIN > 1


def measured():
    """Each step measured on an H200: the problem, and microseconds of eager PyTorch and of the backends."""
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "nvidia-h200-2026-11-28"
    for row in json.loads((folder / "backends.json").read_text())["rows"]:
        widths, dtype = tuple(map(int, row["widths"].split("-"))), getattr(torch, row["dtype"])
        for way in ("graphs_us", "calls_us"):
            if way in row:
                options = {"training": row["training"], "captured": way == "graphs_us"}
                yield problem(row["rows"], widths, dtype=dtype, **options), row[way]


def test_agrees_with_what_was_measured():
    """The backend chosen is nowhere slower than eager PyTorch beyond noise, and is faster on the whole.

    Left out: steps whose sums cuBLAS makes since, after these measurements.
    """
    gains = []
    for step, times in measured():
        if step.training and step.tensor_cores and step.M >= 1024:
            continue
        ratios = {name: rule.ratio(step, 90, kernels) for name, kernels in choice.KERNELS.items()}
        best = max(ratios, key=ratios.__getitem__)
        gains.append(times["eager"] / times[best if ratios[best] * rule.GAIN > 1 else "eager"])
        assert gains[-1] > 0.97, (str(step), ratios, times)
    assert len(gains) > 80
    assert geometric_mean(gains) > 1.08


@pytest.mark.parametrize("arch", rule.DATASHEETS)
@pytest.mark.parametrize("training", [False, True])
def test_narrow_stacks_take_triton_in_a_cuda_graph(arch, training):
    """One launch for two operators a layer, and hidden outputs on chip."""
    for M in (1, 32, 4096):
        assert faster(M, ENCODER, arch=arch, training=training, captured=True)


@pytest.mark.parametrize("arch", rule.DATASHEETS)
def test_small_dense_layers_wait_for_a_cuda_graph(arch):
    """By themselves they are bound by the host, for which our launches cost more."""
    for training in (False, True):
        assert not faster(32, (64, 64), arch=arch, training=training)
        assert faster(32, (64, 64), arch=arch, training=training, captured=True)


@pytest.mark.parametrize("arch", rule.DATASHEETS)
def test_launches_from_cpp_cost_the_host_less(arch):
    """What is bound by them is better there than by Triton, and some of it is better than eager PyTorch there alone."""
    for M in (1, 32, 256):
        for widths in (ENCODER, (64, 32, 16)):
            for training in (False, True):
                both = problem(M, widths, training=training)
                assert rule.ratio(both, arch, rule.CUDA) > rule.ratio(both, arch, rule.TRITON)
        assert faster(M, ENCODER, arch=arch, training=True, kernels=rule.CUDA)
        assert not faster(M, ENCODER, arch=arch, training=True)


@pytest.mark.parametrize(("arch", "share"), [(80, 0.2), (89, 0.2), (90, 0.09), (103, 0.05), (120, 0.2)])
def test_large_products_of_warps_reach_less_of_newer_gpus(arch, share):
    wide = problem(65536, (4096, 4096))
    assert rule._share(wide, arch, rule.CUDA) == share
    assert rule._share(wide, arch, rule.TRITON) == 0.3
    stack = problem(1 << 20, ENCODER, captured=True)
    assert rule.ratio(stack, arch, rule.CUDA) < rule.ratio(stack, arch, rule.TRITON)


@pytest.mark.parametrize("arch", rule.DATASHEETS)
def test_what_is_left_to_cublas_is_never_modelled_slower_than_by_ourselves(arch):
    for M, N, K in ((32, 4096, 1024), (65536, 128, 784), (65536, 4096, 4096), (1, 64, 4096)):
        dense = problem(M, (K, N), captured=True)
        left = rule.CUDA._replace(choice=0.0, launch=0.0)
        alone = left._replace(leaves_products=False)
        assert rule.ratio(dense, arch, left) >= rule.ratio(dense, arch, alone)


def test_which_dense_layers_are_left_to_cublas():
    """Where a product is bound by arithmetic or sums are long; and gradients where dZ must be written anyhow."""
    assert rule.fuses(problem(65536, (784, 128)), 80, rule.CUDA) == (False, False)
    assert rule.fuses(problem(4096, (64, 64)), 80, rule.CUDA) == (True, False)
    assert rule.fuses(problem(4096, (1024, 4096)), 80, rule.CUDA) == (False, False)
    assert rule.fuses(problem(1, (4096, 64)), 80, rule.CUDA) == (False, False)
    assert rule.fuses(problem(65536, (784, 128), dtype=torch.float32), 80, rule.CUDA) == (False, False)
    # Without an activation there is nothing to fuse forward.
    assert not rule.fuses(problem(65536, (4096, 128), activation="identity"), 80, rule.CUDA)[0]


def test_wide_products_stay_with_cublas():
    """An A100 would need 78% and 92% of cuBLAS's rate from us; more is assumed of neither."""
    assert not faster(4096, (1024, 4096))
    assert not faster(8192, (3072, 768))
    assert not faster(8192, (3072, 768), arch=90)


def test_without_an_activation_there_is_nothing_to_fuse():
    for M in (32, 65536):
        assert not faster(M, (784, 128), activation="identity", captured=True)


def test_fp32_without_tensor_cores_is_bound_by_arithmetic():
    assert not faster(65536, ENCODER, dtype=torch.float32)
    assert faster(4096, ENCODER, dtype=torch.float32, tf32=True, captured=True)


def test_long_sums_of_few_programs_stay_with_cublas():
    assert not faster(1, (4096, 64), captured=True)


def test_the_share_of_cublas_decides():
    """Twice the operations of one rate take twice as long."""
    wide = problem(65536, (4096, 4096))
    sheet = rule.datasheet(80)
    eager = rule._eager(wide, sheet).device
    assert rule._ours(wide, 80, rule.TRITON).device == pytest.approx(eager / rule.TRITON.tensor.shares[80], rel=0.1)


def test_a_wide_product_on_an_a100_is_as_long_as_its_operations():
    """34 * 10^9 operations at 312 * 10^12 a second: 110 us; the activation's pass of 67 MB at 2.04 TB/s: 33 us."""
    device = rule._eager(problem(4096, (1024, 4096)), rule.datasheet(80)).device
    assert device == pytest.approx(110.1 + 32.9 + 2 * rule.KERNEL, abs=0.5)


def test_the_nearest_datasheet_below():
    assert rule.datasheet(87) is rule.DATASHEETS[86]
    assert rule.datasheet(103) is rule.DATASHEETS[100]
    assert rule.datasheet(75) is rule.DATASHEETS[80]


def test_empty_problems_have_an_answer():
    for widths in ((0, 4), (4, 0), (4, 4)):
        for kernels in (rule.TRITON, rule.CUDA):
            assert rule.ratio(problem(0, widths, training=True), 80, kernels) > 0


def test_in_words():
    assert str(problem(32, ENCODER)) == "32 rows, 784-128-64-32-16, relu, bfloat16, inference"
    both = problem(1, (3, 2), "gelu", torch.float32, training=True, captured=True, tf32=True)
    assert str(both) == "1 rows, 3-2, gelu, float32, TF32, training in a CUDA graph"

"""Guards find what was written around a tensor, and keep what matters to a kernel about it."""

import pytest
import torch
from guards import DEVICE, assert_guards_intact, guarded, guarded_allocations, poisoned


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12.0).view(3, 4),
        lambda: torch.arange(12).view(3, 4),
        lambda: torch.arange(12.0).to(torch.bfloat16).view(3, 4).t(),
        lambda: torch.arange(40.0, dtype=torch.float16).view(5, 8)[1:4, 1:6:2],
        lambda: torch.arange(4.0).expand(3, 4),
        lambda: torch.arange(3.0)[:, None].expand(3, 4),
        lambda: torch.arange(8.0).unfold(0, 4, 1),
        lambda: torch.empty(0, 4),
        lambda: torch.tensor(1.0),
    ],
)
def test_guarded_keeps_values_strides_and_alignment(make):
    tensor = make()
    copy_of_it = guarded(tensor)
    assert (copy_of_it.dtype, copy_of_it.stride(), copy_of_it.device.type) == (tensor.dtype, tensor.stride(), DEVICE)
    torch.testing.assert_close(copy_of_it.cpu(), tensor, rtol=0, atol=0)
    assert (copy_of_it.data_ptr() - tensor.storage_offset() * tensor.element_size()) % 64 == 0
    assert_guards_intact(copy_of_it)


@pytest.mark.parametrize("offset", [-1, 4, 15, 7 * 16 + 12])
def test_a_stray_write_around_a_tensor_is_found_even_if_it_is_nan(offset):
    tensor = guarded(torch.zeros(8, 16)[:, :4])
    for value in (1.0, torch.nan):
        memory = tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)
        before = memory.view(torch.int32).clone()
        memory.fill_(value)
        with pytest.raises(AssertionError, match=rf"1 elements around .* \{offset:+d} elements"):
            assert_guards_intact(tensor)
        memory.view(torch.int32).copy_(before)
    assert_guards_intact(tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_poisoned_is_nan(dtype):
    assert poisoned((3, 4), dtype).isnan().all()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda like: torch.empty(3, 4, device=DEVICE),
        lambda like: torch.empty((3, 4), dtype=torch.bfloat16, device=DEVICE),
        lambda like: like.new_empty(3, 4),
        lambda like: like.new_empty((3, 4), dtype=torch.float16),
        lambda like: torch.empty_like(like),
        lambda like: guarded(like),
    ],
)
def test_allocations_are_guarded_for_a_while(allocate):
    like = torch.ones(3, 4, device=DEVICE)
    plain = allocate(like)
    with guarded_allocations():
        made = allocate(like)
        assert (made.shape, made.dtype, made.stride()) == (plain.shape, plain.dtype, plain.stride())
        made.fill_(1.0)
    with pytest.raises(AssertionError, match="1 elements around a tensor"), guarded_allocations():
        allocate(like).as_strided((13,), (1,)).fill_(1.0)
    assert torch.empty(1).untyped_storage().nbytes() == 4


def test_allocations_are_poison():
    with guarded_allocations():
        made = [
            torch.empty(3, device=DEVICE),
            torch.empty_like(torch.ones(3, device=DEVICE)),
            torch.ones(3, device=DEVICE).new_empty(3),
        ]
    assert all(tensor.isnan().all() for tensor in made)

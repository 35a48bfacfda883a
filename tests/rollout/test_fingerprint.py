import pytest
import torch

from tulu_lightning.rollout.fingerprint import fingerprint, mark


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (7, 9), (1000, 700)])
def test_any_moved_or_changed_element_changes_the_mark(dtype, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    changed = tensor.clone()
    changed[-1, -1] = changed[-1, -1] * 1.01 + 0.01
    swapped = tensor.clone()
    swapped[0, 0], swapped[-1, -1] = tensor[-1, -1], tensor[0, 0]
    rolled = tensor.roll(1, 0)
    marks = {mark(t) for t in (tensor, changed, swapped, rolled, torch.zeros_like(tensor))}
    assert len(marks) == 5
    assert mark(tensor.clone()) == mark(tensor)


def test_blocks_of_a_large_tensor_cannot_change_places():
    half = 1 << 18
    tensor = torch.randn(2 * half)
    assert mark(torch.cat([tensor[half:], tensor[:half]])) != mark(tensor)


def test_a_transposed_square_differs_and_layout_in_memory_does_not_count():
    square = torch.randn(8, 8)
    assert mark(square.T) != mark(square)
    assert mark(square.T.contiguous().T) == mark(square)


def test_dtype_and_shape_are_part_of_the_mark():
    zeros = torch.zeros(4, 6)
    assert mark(zeros).startswith("float32[4,6]:")
    assert len({mark(zeros), mark(zeros.view(6, 4)), mark(zeros.bfloat16()), mark(zeros.int())}) == 4


def test_only_floating_tensors_are_cast():
    marks = fingerprint([("w", torch.ones(2)), ("i", torch.ones(2, dtype=torch.int64))], torch.bfloat16)
    assert marks["w"] == mark(torch.ones(2, dtype=torch.bfloat16))
    assert marks["i"].startswith("int64[2]:")


def test_scalars_and_empty_tensors_have_marks():
    assert mark(torch.tensor(1.5)).startswith("float32[]:")
    assert mark(torch.empty(0, 3)) == "float32[0,3]:" + "0" * 16

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from gid_yolo.ops.anchors import cell_anchors, from_fixed_point, grid_anchors, to_fixed_point

STRIDES = (8, 16, 32, 64, 128)
RATIOS = (0.5, 1.0, 2.0)


def sizes(scale: float) -> list[list[float]]:
    return [[scale * stride * 2 ** (i / 3) for i in range(3)] for stride in STRIDES]


@pytest.mark.parametrize(("height", "width"), [(128, 128), (256, 384), (512, 128)])
@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_equals_torchvision(height: int, width: int, scale: float) -> None:
    features = [torch.zeros(2, 1, height // s, width // s) for s in STRIDES]
    generator = AnchorGenerator(tuple(map(tuple, sizes(scale))), (RATIOS,) * len(STRIDES))
    expected = generator(ImageList(torch.zeros(2, 3, height, width), [(height, width)] * 2), features)[0]

    cells = torch.stack([cell_anchors(size, RATIOS) for size in sizes(scale)])
    anchors = grid_anchors(cells, features, STRIDES)

    assert anchors.shape == (sum(height * width // s**2 for s in STRIDES) * 9, 4)
    assert torch.equal(anchors, expected)


def test_anchors_that_fixed_point_cannot_hold_are_refused() -> None:
    """int32 in 1 / 65536 px ends at 2^31 / 2^16 = 32768 px, and would go on from its other end."""
    cells = torch.tensor([[-32767.5, -1.0, 32767.5, 1.0]])
    assert torch.equal(from_fixed_point(to_fixed_point(cells)), cells)
    with pytest.raises(ValueError, match=r"anchors reach 32768 px from their cell, which must be under 32768"):
        to_fixed_point(torch.tensor([[-1.0, -1.0, 1.0, 32768.0]]))


def test_grid_order_is_level_row_column_anchor() -> None:
    cells = torch.tensor([[[-1.0, -1, 1, 1], [-2, -1, 2, 1]], [[-3.0, -3, 3, 3], [-4, -3, 4, 3]]])  # (L=2, A=2, 4)
    features = [torch.zeros(1, 1, 3, 5), torch.zeros(1, 1, 2, 3)]  # 3 x 5 does not halve to whole cells
    strides = (8, 16)
    expected = [
        [a + shift for a, shift in zip(cell, (column * stride, row * stride) * 2, strict=True)]
        for level, feature, stride in zip(cells.tolist(), features, strides, strict=True)
        for row in range(feature.shape[2])
        for column in range(feature.shape[3])
        for cell in level
    ]
    assert grid_anchors(cells, features, strides).tolist() == expected


def test_levels_must_be_as_many_as_strides() -> None:
    with pytest.raises(ValueError):
        grid_anchors(torch.zeros(2, 1, 4), [torch.zeros(1, 1, 2, 2)], (8, 16))


@pytest.mark.parametrize(("height", "width"), [(320, 320), (352, 416), (96, 160)])
def test_fitted_steps_equal_torchvisions(height: int, width: int) -> None:
    # Maps as a network with padding makes them: every stride rounds up
    features = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in STRIDES]
    generator = AnchorGenerator(tuple(map(tuple, sizes(4.0))), (RATIOS,) * len(STRIDES))
    expected = generator(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), features)[0]
    cells = torch.stack([cell_anchors(size, RATIOS) for size in sizes(4.0)])
    assert torch.equal(grid_anchors(cells, features, STRIDES, fit_to=(height, width)), expected)
    assert not torch.equal(grid_anchors(cells, features, STRIDES), expected)  # P7 at least is not a whole map


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cells_of_half_precision_are_placed_exactly(dtype: torch.dtype) -> None:
    # 1 px is lost over 256 in bfloat16, over 2048 in float16
    cells, features = torch.tensor([[[0.0, 0, 8, 8]]]), [torch.zeros(1, 1, 2, 400)]
    anchors = grid_anchors(cells.to(dtype), features, (8,))
    assert anchors.dtype == torch.float32
    assert torch.equal(anchors, grid_anchors(cells, features, (8,)))

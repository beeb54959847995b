import pytest
import torch
import torch.nn.functional as F

from gid_yolo.detectors.neck import FPN


@pytest.mark.parametrize("p7_relu", [True, False])
@pytest.mark.parametrize("p6_from", ["p5", "c5"])
@torch.no_grad()
def test_pyramid_by_hand(p6_from: str, p7_relu: bool) -> None:
    channels = [4, 6, 10]
    neck = FPN(channels, 8, p6_from=p6_from, p7_relu=p7_relu)
    maps = [torch.randn(2, c, 12 // 2**i, 20 // 2**i) for i, c in enumerate(channels)]
    inner, layer = neck.fpn.inner_blocks, neck.fpn.layer_blocks

    def up(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=like.shape[-2:], mode="nearest")

    m5 = inner[2](maps[2])
    m4 = inner[1](maps[1]) + up(m5, maps[1])
    m3 = inner[0](maps[0]) + up(m4, maps[0])
    p3, p4, p5 = (layer[i](m) for i, m in enumerate((m3, m4, m5)))
    p6 = neck.fpn.extra_blocks.p6(p5 if p6_from == "p5" else maps[2])
    p7 = neck.fpn.extra_blocks.p7(p6.relu() if p7_relu else p6)
    for level, expected in zip(neck(maps), (p3, p4, p5, p6, p7), strict=True):
        torch.testing.assert_close(level, expected)


def test_unknown_source_is_an_error() -> None:
    with pytest.raises(ValueError, match="p6_from=c4"):
        FPN([4, 6, 10], 8, p6_from="c4")


@torch.no_grad()
def test_pooled_top_is_every_other_cell() -> None:
    neck = FPN([4, 6], 8, p6_from="pool")
    pyramid = neck([torch.randn(2, 4, 12, 20), torch.randn(2, 6, 5, 9)])
    assert len(pyramid) == 3
    assert torch.equal(pyramid[2], pyramid[1][:, :, ::2, ::2])

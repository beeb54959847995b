"""detectron2's names and shapes, written down here from its source; benchmarks/peers.py compares with the library."""

import math

import pytest
import torch

from gid_yolo.detectors.convert.detectron2 import convert_detectron2, is_detectron2

BLOCKS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3)}
CLASSES = 5


def norm(prefix: str, channels: int) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.weight": torch.rand(channels),
        f"{prefix}.bias": torch.rand(channels),
        f"{prefix}.running_mean": torch.rand(channels),
        f"{prefix}.running_var": torch.rand(channels) + 0.5,
    }


def conv(prefix: str, out: int, inside: int, size: int, *, bias: bool = True) -> dict[str, torch.Tensor]:
    weight = torch.randn(out, inside, size, size) / math.sqrt(inside * size * size)
    return {f"{prefix}.weight": weight} | ({f"{prefix}.bias": torch.randn(out)} if bias else {})


def bottom_up(depth: str) -> dict[str, torch.Tensor]:
    body = "backbone.bottom_up."
    state = conv(f"{body}stem.conv1", 64, 3, 7, bias=False) | norm(f"{body}stem.conv1.norm", 64)
    inside = 64
    for stage, count in enumerate(BLOCKS[depth]):
        width, out = 64 * 2**stage, 256 * 2**stage
        for block in range(count):
            name = f"{body}res{stage + 2}.{block}"
            if block == 0:
                state |= conv(f"{name}.shortcut", out, inside, 1, bias=False) | norm(f"{name}.shortcut.norm", out)
            shapes = ((width, inside, 1), (width, width, 3), (out, width, 1))
            for i, (o, c, k) in enumerate(shapes, start=1):
                state |= conv(f"{name}.conv{i}", o, c, k, bias=False) | norm(f"{name}.conv{i}.norm", o)
            inside = out
    return state


def retinanet(depth: str = "50") -> dict[str, torch.Tensor]:
    state = bottom_up(depth)
    for level, channels in ((3, 512), (4, 1024), (5, 2048)):
        state |= conv(f"backbone.fpn_lateral{level}", 256, channels, 1)
        state |= conv(f"backbone.fpn_output{level}", 256, 256, 3)
    state |= conv("backbone.top_block.p6", 256, 2048, 3) | conv("backbone.top_block.p7", 256, 256, 3)
    for subnet in ("cls_subnet", "bbox_subnet"):
        for i in range(4):
            state |= conv(f"head.{subnet}.{2 * i}", 256, 256, 3)
    state |= conv("head.cls_score", 9 * CLASSES, 256, 3) | conv("head.bbox_pred", 36, 256, 3)
    return state | {f"anchor_generator.cell_anchors.{i}": torch.rand(9, 4) for i in range(5)}


def faster_rcnn(depth: str = "50") -> dict[str, torch.Tensor]:
    state = bottom_up(depth)
    for level, channels in ((2, 256), (3, 512), (4, 1024), (5, 2048)):
        state |= conv(f"backbone.fpn_lateral{level}", 256, channels, 1)
        state |= conv(f"backbone.fpn_output{level}", 256, 256, 3)
    rpn, heads = "proposal_generator.rpn_head", "roi_heads"
    state |= conv(f"{rpn}.conv", 256, 256, 3) | conv(f"{rpn}.objectness_logits", 3, 256, 1)
    state |= conv(f"{rpn}.anchor_deltas", 12, 256, 1)
    for name, out, inside in (
        (f"{heads}.box_head.fc1", 1024, 256 * 49),
        (f"{heads}.box_head.fc2", 1024, 1024),
        (f"{heads}.box_predictor.cls_score", CLASSES + 1, 1024),
        (f"{heads}.box_predictor.bbox_pred", 4 * CLASSES, 1024),
    ):
        state |= {f"{name}.weight": torch.randn(out, inside) / math.sqrt(inside), f"{name}.bias": torch.randn(out)}
    return state


MAKERS = {"retinanet": retinanet, "faster_rcnn": faster_rcnn}


@pytest.mark.parametrize("kind", sorted(MAKERS))
@pytest.mark.parametrize("depth", sorted(BLOCKS))
def test_every_tensor_finds_its_place(kind: str, depth: str) -> None:
    state = MAKERS[kind](depth)
    assert is_detectron2(state)
    detector = convert_detectron2(state).build()
    own = detector.state_dict()
    weights = {k: v for k, v in state.items() if not k.startswith("anchor_generator.")}
    assert len(own) == len(weights)
    assert sum(v.numel() for v in own.values()) == sum(v.numel() for v in weights.values())
    assert detector.backbone.name == f"resnet{depth}"
    assert detector.num_classes == CLASSES
    # Images come as RGB in [0, 1], the filters as BGR in 0 to 255 less the mean of ImageNet's pixels
    assert torch.equal(own["backbone.body.conv1.weight"], state["backbone.bottom_up.stem.conv1.weight"][:, [2, 1, 0]])
    assert detector.backbone.mean.flatten().tolist() == pytest.approx([123.675 / 255, 116.28 / 255, 103.53 / 255])
    assert detector.backbone.std.flatten().tolist() == pytest.approx([1 / 255] * 3)
    block = detector.backbone.body.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))


def test_rows_go_by_ratio_then_size() -> None:
    state = retinanet()
    detector = convert_detectron2(state).build().eval()
    for size in range(3):
        for ratio in range(3):
            theirs, ours = 3 * size + ratio, 3 * ratio + size
            for name, other, values in (("cls_score", "cls_logits", CLASSES), ("bbox_pred", "box_deltas", 4)):
                expected = state[f"head.{name}.weight"][theirs * values : (theirs + 1) * values]
                found = getattr(detector.head, other).weight[ours * values : (ours + 1) * values]
                assert torch.equal(found, expected)
    # detectron2's anchors are not rounded: on P3 w = 32 * 2^(size / 3) / sqrt(h / w), h = w * ratio
    priors = detector.raw(torch.zeros(1, 3, 64, 64))[1].priors
    for size in range(3):
        for i, ratio in enumerate((0.5, 1.0, 2.0)):
            w = 32 * 2 ** (size / 3) / math.sqrt(ratio)
            assert priors[3 * i + size].tolist() == pytest.approx(
                [-w / 2, -w * ratio / 2, w / 2, w * ratio / 2], rel=1e-5
            )


def test_anchors_outlive_half_precision() -> None:
    detector = convert_detectron2(retinanet()).build().eval()
    images = torch.zeros(1, 3, 64, 64)
    before = detector.raw(images)[1].priors
    assert torch.equal(detector.half().float().raw(images)[1].priors, before)


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_what_does_not_fit_is_named(kind: str) -> None:
    state = MAKERS[kind]()
    del state["backbone.bottom_up.res4.5.conv2.norm.bias"]
    state["roi_heads.mask_head.predictor.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing backbone.body.layer3.5.bn2.bias; left over roi_heads.mask_head"):
        convert_detectron2(state).build()


def test_other_detectors_are_refused() -> None:
    state = {k: v for k, v in faster_rcnn().items() if k.startswith("backbone.")}
    with pytest.raises(ValueError, match="neither to detectron2's RetinaNet nor"):
        convert_detectron2(state)

import math

import pytest
import torch
from reference.boxes import decode, random_boxes
from reference.distill import smooth_l1
from reference.retinanet import torchvision_loss, torchvision_matches
from torchvision.ops import generalized_box_iou_loss

from gid_yolo.detectors import RetinaNet, build_detector
from gid_yolo.ops.boxes import decode_deltas
from gid_yolo.ops.structures import RawPredictions, Targets

CLASSES = 3


def count_anchors(height: int, width: int) -> int:
    return sum(9 * math.ceil(height / s) * math.ceil(width / s) for s in (8, 16, 32, 64, 128))


@pytest.fixture(scope="module")
def nano() -> RetinaNet:
    return build_detector("retina_nano", CLASSES).eval()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(256, 320), (96, 160), (32, 32)])
@torch.no_grad()
def test_shapes_and_layout(nano: RetinaNet, batch: int, height: int, width: int) -> None:
    images = torch.rand(batch, 3, height, width)
    features, raw = nano.raw(images)
    anchors = count_anchors(height, width)
    expected = [(batch, 64, math.ceil(height / s), math.ceil(width / s)) for s in nano.strides]
    assert [tuple(x.shape) for x in features] == expected
    assert raw.logits.shape == (batch, anchors, CLASSES)
    assert raw.regression.shape == (batch, anchors, 4)
    assert raw.priors.shape == (anchors, 4)

    detections = nano(images)
    assert detections.shape == (batch, 4 + CLASSES, anchors)
    for r in range(0, anchors, 97):
        x1, y1, x2, y2 = decode(raw.regression[-1, r].tolist(), raw.priors[r].tolist())
        x1, x2, y1, y2 = (min(max(v, 0), n) for v, n in ((x1, width), (x2, width), (y1, height), (y2, height)))
        box = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
        scores = raw.logits[-1, r].double().sigmoid().tolist()
        assert detections[-1, :, r].tolist() == pytest.approx([*box, *scores], rel=1e-4, abs=1e-3)


@torch.no_grad()
def test_predictions_belong_to_their_anchor(nano: RetinaNet) -> None:
    # Channel a * C + c of cell (y, x) of level l must be anchor a's class c at that cell, and likewise for deltas.
    features, raw = nano.raw(torch.rand(2, 3, 64, 96))
    start = 0
    for feature in features:
        logits = nano.head.cls_logits(nano.head.cls_tower(feature))
        deltas = nano.head.box_deltas(nano.head.reg_tower(feature))
        height, width = feature.shape[-2:]
        for y, x, a in ((0, 0, 0), (height - 1, width - 1, 8), (height // 2, width - 1, 4)):
            r = start + (y * width + x) * 9 + a
            assert torch.equal(raw.logits[:, r], logits[:, a * CLASSES : (a + 1) * CLASSES, y, x])
            assert torch.equal(raw.regression[:, r], deltas[:, a * 4 : (a + 1) * 4, y, x])
        start += height * width * 9
    assert start == raw.logits.shape[1]


@torch.no_grad()
def test_images_of_a_batch_are_independent(nano: RetinaNet) -> None:
    images = torch.rand(3, 3, 96, 160)
    torch.testing.assert_close(nano(images)[1:2], nano(images[1:2]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("scale", "octaves"), [(4.0, 3), (2.0, 1), (3.0, 2)])
@torch.no_grad()
def test_anchors_follow_the_settings(scale: float, octaves: int) -> None:
    detector = build_detector("retina_nano", 2, anchor_scale=scale, anchor_octaves=octaves, aspect_ratios=(0.5, 1.0))
    priors = detector.eval().raw(torch.zeros(1, 3, 128, 128))[1].priors
    first = []
    for ratio in (0.5, 1.0):
        for octave in range(octaves):
            side = 8 * scale * 2 ** (octave / octaves)
            w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
            first.append([round(v) for v in (-w / 2, -h / 2, w / 2, h / 2)])
    assert priors[: len(first)].tolist() == first
    assert priors.shape[0] == sum((128 // s) ** 2 for s in (8, 16, 32, 64, 128)) * 2 * octaves


@pytest.mark.parametrize("model", ["retina_nano", "retina_small"])
@pytest.mark.parametrize("prior", [0.01, 0.1])
@torch.no_grad()
def test_initial_probability_is_the_prior(model: str, prior: float) -> None:
    detector = build_detector(model, CLASSES, prior=prior).eval()
    assert detector.head.cls_logits.bias.sigmoid().tolist() == pytest.approx([prior] * 9 * CLASSES, rel=1e-5)
    scores = detector.raw(torch.rand(1, 3, 96, 160))[1].scores
    # The last convolution sums 9 * channels inputs, which are relu(N(0, 1)) behind GroupNorm (mean square 1/2), with
    # weights of std 0.01: logits vary by sigma around the bias, and a small probability by a factor exp(+-sigma).
    sigma = 0.01 * math.sqrt(9 * detector.fpn_channels / 2)
    assert prior * math.exp(-sigma) < scores.mean().item() < prior * math.exp(sigma)


def test_towers_before_a_norm_keep_the_scale_of_their_input() -> None:
    # He's initialisation: std = sqrt(2 / fan_in) with fan_in = 9 * channels; without a norm the paper's 0.01.
    for norm, std in (("gn", math.sqrt(2 / (9 * 64))), (None, 0.01)):
        head = build_detector("retina_nano", CLASSES, head_norm=norm).head
        for module in (*head.cls_tower, *head.reg_tower):
            if isinstance(module, torch.nn.Conv2d):
                # 9 * 64 * 64 = 36864 draws: the deviation of their std is std / sqrt(2 * 36864), 0.4 %
                assert module.weight.std().item() == pytest.approx(std, rel=0.02)


def make_objects(counts: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    boxes = [random_boxes((n,), image=(96.0, 160.0), smallest=8.0, largest=90.0) for n in counts]
    return [(b, torch.randint(0, CLASSES, (len(b),))) for b in boxes]


def to_targets(objects: list[tuple[torch.Tensor, torch.Tensor]]) -> Targets:
    index = torch.cat([torch.full((len(boxes),), i) for i, (boxes, _) in enumerate(objects)]).long()
    return Targets.from_flat(
        torch.cat([b for b, _ in objects]), torch.cat([x for _, x in objects]), index, len(objects)
    )


def make_raw(nano: RetinaNet, batch: int, dtype: torch.dtype = torch.float32) -> RawPredictions:
    with torch.no_grad():
        priors = nano.raw(torch.zeros(1, 3, 96, 160))[1].priors
    logits, deltas = torch.randn(batch, len(priors), CLASSES) * 2 - 2, torch.randn(batch, len(priors), 4)
    logits, deltas = logits.to(dtype).requires_grad_(), deltas.to(dtype).requires_grad_()
    return RawPredictions(logits, deltas, priors, decode_deltas)


@pytest.mark.parametrize("counts", [[3], [4, 0, 9], [1, 2, 30, 1], [0, 0], [0]])
def test_loss_equals_torchvision(nano: RetinaNet, counts: list[int]) -> None:
    objects, raw = make_objects(counts), make_raw(nano, len(counts))
    losses = nano.loss([], raw, to_targets(objects), (96, 160))
    gradients = torch.autograd.grad(sum(losses.values()), [raw.logits, raw.regression])

    logits, deltas = (x.detach().requires_grad_() for x in (raw.logits, raw.regression))
    cls_loss, box_loss = torchvision_loss(logits, deltas, raw.priors, objects)
    expected = torch.autograd.grad(cls_loss + box_loss, [logits, deltas])

    torch.testing.assert_close(losses["cls_loss"], cls_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["box_loss"], box_loss, rtol=1e-5, atol=0)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-8)


def test_smooth_l1_box_loss_equals_the_loop() -> None:
    beta = 0.3
    detector = build_detector("retina_nano", CLASSES, box_beta=beta).eval()
    objects, raw = make_objects([4, 1]), make_raw(detector, 2)
    from reference.boxes import encode

    images = []
    for b, (boxes, _) in enumerate(objects):
        matched = torchvision_matches(raw.priors, boxes).tolist()
        values = []
        for r, m in enumerate(matched):
            if m >= 0:
                target = encode(boxes[m].tolist(), raw.priors[r].tolist())
                values.append(
                    sum(smooth_l1(p, t, beta) for p, t in zip(raw.regression[b, r].tolist(), target, strict=True))
                )
        images.append(sum(values) / len(values))
    loss = detector.loss([], raw, to_targets(objects), (96, 160))["box_loss"].item()
    assert loss == pytest.approx(sum(images) / len(images), rel=1e-5)


def test_batch_is_the_mean_of_its_images(nano: RetinaNet) -> None:
    objects, raw = make_objects([4, 0, 9]), make_raw(nano, 3)
    together = nano.loss([], raw, to_targets(objects), (96, 160))
    for name, loss in together.items():
        single = [
            nano.loss(
                [],
                RawPredictions(raw.logits[b : b + 1], raw.regression[b : b + 1], raw.priors, raw.decoder),
                to_targets(objects[b : b + 1]),
                (96, 160),
            )[name].item()
            for b in range(3)
        ]
        assert loss.item() == pytest.approx(sum(single) / 3, rel=1e-5)


def test_batch_without_objects(nano: RetinaNet) -> None:
    raw = make_raw(nano, 2)
    losses = nano.loss([], raw, to_targets(make_objects([0, 0])), (96, 160))
    assert losses["box_loss"].item() == 0
    assert losses["cls_loss"].item() > 0
    sum(losses.values()).backward()
    assert not raw.regression.grad.any()
    assert torch.isfinite(raw.logits.grad).all()
    assert (raw.logits.grad > 0).all()  # every output is told to be background


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loss_computes_in_fp32(nano: RetinaNet, dtype: torch.dtype) -> None:
    targets, raw = to_targets(make_objects([3, 5])), make_raw(nano, 2, dtype)
    losses = nano.loss([], raw, targets, (96, 160))
    wide = RawPredictions(raw.logits.float(), raw.regression.float(), raw.priors, raw.decoder)
    for name, loss in nano.loss([], wide, targets, (96, 160)).items():
        assert losses[name].dtype == torch.float32
        assert torch.equal(losses[name], loss)


def test_training_step_reaches_every_parameter() -> None:
    detector = build_detector("retina_nano", CLASSES).train()
    _, raw = detector.raw(torch.rand(2, 3, 96, 160))
    sum(detector.loss([], raw, to_targets(make_objects([3, 5])), (96, 160)).values()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


def test_settings_of_the_head() -> None:
    detector = build_detector("retina_nano", 5, num_convs=3, fpn_channels=32, head_norm=None)
    convs = [m for m in detector.head.cls_tower if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.bias is not None) for c in convs] == [(32, 32, True)] * 3
    assert detector.head.cls_logits.out_channels == 9 * 5
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in detector.head.modules())


@torch.no_grad()
def test_sizes_in_place_of_a_scale() -> None:
    sizes = [[4.0, 9.0], [8.0, 17.0], [16.0, 33.0], [32.0, 65.0], [64.0, 129.0]]
    detector = build_detector("retina_nano", 2, anchor_sizes=sizes, aspect_ratios=(1.0,)).eval()
    priors = detector.raw(torch.zeros(1, 3, 128, 128))[1].priors
    # A square of side a at the origin, rounded to whole corners: half of 9 is 4.5, which rounds to even
    assert priors[0].tolist() == [-2, -2, 2, 2]
    assert priors[1].tolist() == [-4, -4, 4, 4]
    assert priors.shape[0] == sum((128 // s) ** 2 for s in (8, 16, 32, 64, 128)) * 2
    with pytest.raises(ValueError, match="must give 5 levels the same number"):
        build_detector("retina_nano", 2, anchor_sizes=sizes[:4])
    with pytest.raises(ValueError, match="box_loss=l2"):
        build_detector("retina_nano", 2, box_loss="l2")


def test_a_focus_without_a_finite_gradient_is_refused() -> None:
    build_detector("retina_nano", 2, focal_gamma=0.0)
    with pytest.raises(ValueError, match=r"focal_gamma=0\.5 must be 0 or at least 1"):
        build_detector("retina_nano", 2, focal_gamma=0.5)


def test_giou_box_loss_equals_torchvisions() -> None:
    detector = build_detector("retina_nano", CLASSES, box_loss="giou").eval()
    objects, raw = make_objects([4, 0]), make_raw(detector, 2)
    matched = torchvision_matches(raw.priors, objects[0][0])
    positive = matched >= 0
    boxes = raw.decoder(raw.regression[0], raw.priors)[positive]
    # The sum over the first image's positives by their number, the second image has none: half of it
    expected = generalized_box_iou_loss(boxes, objects[0][0][matched[positive]], reduction="mean") / 2
    torch.testing.assert_close(detector.loss([], raw, to_targets(objects), (96, 160))["box_loss"], expected)
    same = detector.response_reg_loss(raw, raw)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-5)

import io
import math
import warnings

import pytest
import torch
from reference.boxes import random_boxes
from reference.faster_rcnn import (
    box_losses,
    falling_keys,
    first_of_each_kind,
    make_roi_heads,
    make_rpn,
    rpn_losses,
)
from torch.nn.utils.rnn import pad_sequence

from gid_yolo.detectors import FasterRCNN, box_head, build_detector, rpn
from gid_yolo.distill import GIDLoss
from gid_yolo.errors import UserError
from gid_yolo.ops.anchors import from_fixed_point
from gid_yolo.ops.assign import positive_mask
from gid_yolo.ops.boxes import decode_deltas
from gid_yolo.ops.sample import SampleRule
from gid_yolo.ops.structures import RawPredictions, Targets

CLASSES, SIZE = 3, (96, 160)
RPN_RULE, ROI_RULE = SampleRule(0.7, 0.3, 256, 0.5), SampleRule(0.5, 0.5, 512, 0.25)
WEIGHTS, BETA = torch.tensor([10.0, 10.0, 5.0, 5.0]), 1 / 9


def level_sizes(height: int, width: int) -> list[int]:
    return [3 * math.ceil(height / s) * math.ceil(width / s) for s in (4, 8, 16, 32, 64)]


@pytest.fixture(scope="module")
def nano() -> FasterRCNN:
    torch.manual_seed(0)
    return build_detector("frcnn_nano", CLASSES).eval()


def make_objects(counts: list[int], classes: int = CLASSES) -> list[tuple[torch.Tensor, torch.Tensor]]:
    boxes = [random_boxes((n,), image=SIZE, smallest=8.0, largest=90.0) for n in counts]
    return [(b, torch.randint(0, classes, (len(b),))) for b in boxes]


def to_targets(objects: list[tuple[torch.Tensor, torch.Tensor]]) -> Targets:
    index = torch.cat([torch.full((len(boxes),), i) for i, (boxes, _) in enumerate(objects)]).long()
    return Targets.from_flat(
        torch.cat([b for b, _ in objects]), torch.cat([x for _, x in objects]), index, len(objects)
    )


def make_raw(nano: FasterRCNN, batch: int, dtype: torch.dtype = torch.float32) -> RawPredictions:
    with torch.no_grad():
        priors = nano.raw(torch.zeros(1, 3, *SIZE))[1].priors
    logits, deltas = torch.randn(batch, len(priors), 1) * 2, torch.randn(batch, len(priors), 4) * 0.4
    logits, deltas = logits.to(dtype).requires_grad_(), deltas.to(dtype).requires_grad_()
    return RawPredictions(logits, deltas, priors, decode_deltas)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(192, 160), (96, 160), (32, 32)])
@torch.no_grad()
def test_shapes(nano: FasterRCNN, batch: int, height: int, width: int) -> None:
    images = torch.rand(batch, 3, height, width)
    features, raw = nano.raw(images)
    anchors = sum(level_sizes(height, width))
    expected = [(batch, 64, math.ceil(height / s), math.ceil(width / s)) for s in nano.strides]
    assert [tuple(x.shape) for x in features] == expected
    assert raw.logits.shape == (batch, anchors, 1)
    assert raw.regression.shape == (batch, anchors, 4)
    assert raw.priors.shape == (anchors, 4)

    detections = nano(images)
    assert detections.shape == (batch, 100, 6)
    real = detections[..., 4] > 0
    assert (detections[..., 4].diff(dim=1) <= 0).all()
    assert (detections[~real] == 0).all()
    boxes, scores, labels = detections[real].split([4, 1, 1], dim=1)
    assert real.any()
    assert (scores > 0.05).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height, width, height])).all()
    assert set(labels.flatten().tolist()) <= set(range(CLASSES))


@torch.no_grad()
def test_predictions_belong_to_their_anchor(nano: FasterRCNN) -> None:
    features, raw = nano.raw(torch.rand(2, 3, 64, 96))
    start = 0
    for feature, stride in zip(features, nano.strides, strict=True):
        hidden = nano.rpn.tower(feature)
        logits, deltas = nano.rpn.objectness(hidden), nano.rpn.deltas(hidden)
        height, width = feature.shape[-2:]
        for y, x, a in ((0, 0, 0), (height - 1, width - 1, 2), (height // 2, width - 1, 1)):
            r = start + (y * width + x) * 3 + a
            assert torch.equal(raw.logits[:, r, 0], logits[:, a, y, x])
            assert torch.equal(raw.regression[:, r], deltas[:, a * 4 : (a + 1) * 4, y, x])
            # height over width of 0.5, 1, 2 at the area of a square of 4 strides, in whole pixels
            w, h = 4 * stride / math.sqrt((0.5, 1, 2)[a]), 4 * stride * math.sqrt((0.5, 1, 2)[a])
            x1, y1, x2, y2 = (round(v) for v in (-w / 2, -h / 2, w / 2, h / 2))
            cell = [x * stride + x1, y * stride + y1, x * stride + x2, y * stride + y2]
            assert raw.priors[r].tolist() == cell
        start += height * width * 3
    assert start == raw.logits.shape[1]


@torch.no_grad()
def test_images_of_a_batch_are_independent(nano: FasterRCNN) -> None:
    images = torch.rand(3, 3, *SIZE)
    torch.testing.assert_close(nano(images)[1:2], nano(images[1:2]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("before", "after"), [(1000, 3000), (60, 100), (300, 7)])
@pytest.mark.parametrize("min_score", [0.0, 0.6])
@torch.no_grad()
def test_proposals_equal_torchvision(nano: FasterRCNN, before: int, after: int, min_score: float) -> None:
    raw, sizes = make_raw(nano, 2), level_sizes(*SIZE)
    boxes, valid = rpn.select_proposals(raw, sizes, *SIZE, before_nms=before, after_nms=after, min_score=min_score)
    assert boxes.shape == (2, min(after, 5 * before), 4)
    expected, _ = make_rpn(before, after, min_score).filter_proposals(raw.boxes, raw.logits, [SIZE] * 2, sizes)
    for b in range(2):
        assert len(expected[b]) > 5
        torch.testing.assert_close(boxes[b][valid[b]], expected[b], rtol=1e-5, atol=1e-4)
        assert not boxes[b][~valid[b]].any()


@pytest.mark.parametrize("counts", [[3], [4, 0, 9], [0, 0], [0]])
@pytest.mark.parametrize("samples", [256, 5000])  # fewer than there are anchors, and more
def test_rpn_losses_equal_torchvision(nano: FasterRCNN, counts: list[int], samples: int) -> None:
    objects, raw = make_objects(counts), make_raw(nano, len(counts))
    rule = SampleRule(0.7, 0.3, samples, 0.5)
    losses = rpn.rpn_losses(raw, to_targets(objects), falling_keys(raw.logits[..., 0]), rule=rule, beta=BETA)
    expected = rpn_losses(make_rpn(samples=samples), raw, objects)
    torch.testing.assert_close(losses["rpn_cls_loss"], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["rpn_box_loss"], expected[1], rtol=1e-5, atol=0)
    assert (losses["rpn_box_loss"] > 0) == (sum(counts) > 0)
    inputs = [raw.logits, raw.regression]
    ours = torch.autograd.grad(sum(losses.values()), inputs)
    for gradient, other in zip(ours, torch.autograd.grad(sum(expected), inputs), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-8)


def linear_predictor(classes: int):
    """Logits and deltas as linear functions of the box, so that the order of the samples does not matter."""
    weights = [torch.randn(4, n).mul(0.02).requires_grad_() for n in (classes + 1, classes * 4)]
    return weights, lambda boxes: tuple(boxes @ weight for weight in weights)


@pytest.mark.parametrize("counts", [[3], [4, 0, 9], [0, 0], [40]])
@pytest.mark.parametrize("classes", [1, CLASSES])
@pytest.mark.parametrize("samples", [512, 24])  # more than there are, and fewer
def test_second_stage_losses_equal_torchvision(counts: list[int], classes: int, samples: int) -> None:
    objects = make_objects(counts, classes)
    near = [b.repeat(3, 1) + torch.randn(3 * len(b), 4) * 4 for b, _ in objects]
    lists = [torch.cat([x, random_boxes((50,), image=SIZE, smallest=8.0)]) for x in near]
    proposals = pad_sequence(lists, batch_first=True)
    valid = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in lists], batch_first=True)

    weights, predict = linear_predictor(classes)
    rule = SampleRule(0.5, 0.5, samples, 0.25)
    targets = to_targets(objects)
    boxes, valid = box_head.candidates(proposals, valid, targets)
    chosen = box_head.sample_boxes(boxes, valid, targets, falling_keys(valid), rule=rule, num_classes=classes)
    logits, deltas = predict(chosen.boxes)
    deltas = deltas.unflatten(-1, (classes, 4))
    losses = box_head.box_head_losses(logits, deltas, chosen, weights=WEIGHTS, beta=BETA)
    ours = torch.autograd.grad(sum(losses.values()), weights)

    cls_loss, box_loss = box_losses(make_roi_heads(samples), lists, objects, predict)
    torch.testing.assert_close(losses["cls_loss"], cls_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["box_loss"], box_loss, rtol=1e-5, atol=0)
    for gradient, other in zip(ours, torch.autograd.grad(cls_loss + box_loss, weights), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [1, CLASSES])
@pytest.mark.parametrize("max_det", [5, 100, 2000])  # 2000 are more than there are candidates
@torch.no_grad()
def test_final_detections_equal_torchvision(classes: int, max_det: int) -> None:
    lists = [random_boxes((n,), image=(SIZE[0] + 20, SIZE[1] + 20)) for n in (120, 1, 0)]  # some beyond the border
    proposals = pad_sequence(lists, batch_first=True)
    valid = torch.arange(120) < torch.tensor([[120], [1], [0]])
    logits, deltas = torch.randn(3, 120, classes + 1) * 2, torch.randn(3, 120, classes, 4)
    rows = box_head.final_detections(
        logits, deltas, proposals, valid, *SIZE, weights=WEIGHTS, min_score=0.05, nms_iou=0.5, max_det=max_det
    )
    assert rows.shape == (3, max_det, 6)
    theirs = torch.cat([deltas[:, :, :1], deltas], dim=2).flatten(2)[valid]
    boxes, scores, labels = make_roi_heads(count=max_det).postprocess_detections(
        logits[valid].roll(1, dims=1), theirs, lists, [SIZE] * 3
    )
    for b in range(3):
        real = rows[b][rows[b, :, 4] > 0]
        torch.testing.assert_close(real[:, :4], boxes[b], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(real[:, 4], scores[b], rtol=1e-5, atol=0)
        assert (real[:, 5] + 1).tolist() == labels[b].tolist()


@pytest.mark.parametrize("counts", [[3, 5], [2, 0], [0, 0]])
def test_training_step_reaches_every_parameter(counts: list[int]) -> None:
    detector = build_detector("frcnn_nano", CLASSES).train()
    features, raw = detector.raw(torch.rand(2, 3, *SIZE))
    losses = detector.loss(features, raw, to_targets(make_objects(counts)), SIZE)
    assert list(losses) == ["rpn_cls_loss", "rpn_box_loss", "cls_loss", "box_loss"]
    sum(losses.values()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []
    if sum(counts) == 0:
        assert losses["rpn_box_loss"] == losses["box_loss"] == 0
        assert not detector.head.box_deltas.weight.grad.any()
    else:
        assert min(losses.values()) > 0


def test_objects_without_area_are_harmless(nano: FasterRCNN) -> None:
    boxes = torch.tensor([[10.0, 10.0, 10.0, 40.0], [20.0, 20.0, 60.0, 70.0], [0.0, 0.0, 0.0, 0.0]])
    features, raw = nano.raw(torch.rand(1, 3, *SIZE))
    losses = nano.loss(features, raw, to_targets([(boxes, torch.tensor([0, 1, 2]))]), SIZE)
    assert all(torch.isfinite(loss) for loss in losses.values())
    gradients = torch.autograd.grad(sum(losses.values()), list(nano.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_proposals_carry_no_gradient(nano: FasterRCNN) -> None:
    features, raw = nano.raw(torch.rand(1, 3, *SIZE))
    boxes, _ = nano.proposals(features, raw, *SIZE)
    assert not boxes.requires_grad
    losses = nano.loss(features, raw, to_targets(make_objects([3])), SIZE)
    second_stage = losses["cls_loss"] + losses["box_loss"]
    assert torch.autograd.grad(second_stage, nano.rpn.deltas.weight, allow_unused=True) == (None,)


def test_more_proposals_in_training(nano: FasterRCNN) -> None:
    features, raw = nano.raw(torch.rand(1, 3, 192, 160))
    detector = build_detector("frcnn_nano", CLASSES, rpn_before_nms=[70, 50], rpn_after_nms=[90, 30])
    assert detector.train().proposals(features, raw, 192, 160)[0].shape[1] == 90
    assert detector.eval().proposals(features, raw, 192, 160)[0].shape[1] == 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_losses_compute_in_fp32(nano: FasterRCNN, dtype: torch.dtype) -> None:
    objects, raw = make_objects([3, 5]), make_raw(nano, 2, dtype)
    targets, keys = to_targets(objects), falling_keys(raw.logits[..., 0])
    wide = RawPredictions(raw.logits.float(), raw.regression.float(), raw.priors, raw.decoder)
    losses = rpn.rpn_losses(raw, targets, keys, rule=RPN_RULE, beta=BETA)
    expected = rpn.rpn_losses(wide, targets, keys, rule=RPN_RULE, beta=BETA)
    features = [torch.randn(2, 64, -(-SIZE[0] // s), -(-SIZE[1] // s)) for s in nano.strides]
    for values in (raw, wide):
        boxes, valid = nano.proposals(features, values, *SIZE)
        assert boxes.dtype == torch.float32
    chosen = box_head.sample_boxes(boxes, valid, targets, falling_keys(valid), rule=ROI_RULE, num_classes=CLASSES)
    logits, deltas = torch.randn(*chosen.labels.shape, CLASSES + 1), torch.randn(*chosen.labels.shape, CLASSES, 4)
    logits, deltas = logits.to(dtype), deltas.to(dtype)
    losses |= box_head.box_head_losses(logits, deltas, chosen, weights=WEIGHTS, beta=BETA)
    expected |= box_head.box_head_losses(logits.float(), deltas.float(), chosen, weights=WEIGHTS, beta=BETA)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected[name])


def test_autocast() -> None:
    detector = build_detector("frcnn_nano", CLASSES)
    images, targets = torch.rand(2, 3, *SIZE), to_targets(make_objects([3, 5]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, raw = detector.train().raw(images)
        losses = detector.loss(features, raw, targets, SIZE)
        rows = detector.eval()(images)
    assert raw.logits.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    assert rows.dtype == torch.float32
    sum(losses.values()).backward()


def test_random_sampling_keeps_the_torch_seed(nano: FasterRCNN) -> None:
    features, raw = nano.raw(torch.rand(1, 3, *SIZE))
    targets = to_targets(make_objects([4]))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append([v.item() for v in nano.loss(features, raw, targets, SIZE).values()])
    assert runs[0] == runs[1] != runs[2]
    with first_of_each_kind():
        fixed = [[v.item() for v in nano.loss(features, raw, targets, SIZE).values()] for _ in range(2)]
    assert fixed[0] == fixed[1]


def test_response_functions(nano: FasterRCNN) -> None:
    student, teacher = make_raw(nano, 2), make_raw(nano, 2).detach()
    boxes = random_boxes((2, 6), image=SIZE, smallest=8.0, largest=90.0)
    valid = torch.arange(6) < torch.tensor([[6], [2]])
    mask = nano.response_mask(student.priors, boxes, valid)
    assert torch.equal(mask, positive_mask(student.priors, boxes, valid, positive_iou=0.7))
    assert mask.sum(1).tolist()[0] >= 6 > 0  # every box keeps its best anchors

    cls, reg = nano.response_cls_loss(teacher, student), nano.response_reg_loss(teacher, student)
    assert cls.shape == reg.shape == mask.shape
    for b, r in ((0, 0), (1, 100), (1, 2000)):
        z, t = student.logits[b, r, 0].item(), 1 / (1 + math.exp(-teacher.logits[b, r, 0].item()))
        p = 1 / (1 + math.exp(-z))
        assert cls[b, r].item() == pytest.approx(-t * math.log(p) - (1 - t) * math.log(1 - p), rel=1e-4)
        gaps = (student.regression[b, r] - teacher.regression[b, r]).abs().tolist()
        smooth = [g - BETA / 2 if g >= BETA else g * g / (2 * BETA) for g in gaps]
        assert reg[b, r].item() == pytest.approx(sum(smooth), rel=1e-4)


def test_gid_loss_end_to_end() -> None:
    student = build_detector("frcnn_nano", CLASSES).train()
    teacher = build_detector("frcnn_nano", CLASSES, fpn_channels=96).eval()
    torch.nn.init.normal_(teacher.rpn.objectness.weight, std=0.1)
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        teacher_features, teacher_raw = teacher.raw(images)
    features, raw = student.raw(images)
    gid = GIDLoss(student.fpn_channels, teacher.fpn_channels)
    terms, instances = gid(
        teacher_features,
        features,
        teacher_raw,
        raw,
        functions=student,
        strides=student.strides,
        image_size=SIZE,
    )
    assert instances.valid.any(1).all()
    assert set(terms) == {"feat_loss", "rel_loss", "resp_loss"}
    for name, term in terms.items():
        assert torch.isfinite(term), name
        assert term > 0, name
    sum(terms.values()).backward()
    for part in (student.rpn.objectness, student.rpn.deltas, gid.adapt):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert student.head.cls_logits.weight.grad is None  # the second stage takes no part


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx(batch: int, dynamic: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    detector = build_detector("frcnn_nano", CLASSES, fit_strides=dynamic).eval()
    layers = [(detector.rpn.objectness, 0.1), (detector.rpn.deltas, 0.05), (detector.head.cls_logits, 0.2)]
    for layer, std in (*layers, (detector.head.box_deltas, 0.2)):
        torch.nn.init.normal_(layer.weight, std=std)
    images, file = torch.rand(batch, 3, *SIZE), io.BytesIO()
    axes = {"images": {0: "batch", 2: "height", 3: "width"}, "output0": {0: "batch"}} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            detector,
            images,
            file,
            dynamo=False,
            opset_version=17,
            input_names=["images"],
            output_names=["output0"],
            dynamic_axes=axes,
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape == ["batch" if dynamic else batch, 100, 6]
    others = [torch.rand(3, 3, 64, 64), torch.rand(1, 3, 160, 96)] if dynamic else []
    for x in (images, torch.zeros_like(images), *others):
        with torch.no_grad():
            expected = detector(x)
        rows = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-2)
        assert (rows[..., 4] > 0).any(1).all()


def test_settings() -> None:
    detector = build_detector(
        "frcnn_nano", 5, fpn_channels=32, head_norm=None, rpn_convs=2, head_convs=1, head_width=24, anchor_scale=8
    )
    assert [type(m).__name__ for m in detector.rpn.tower] == ["Conv2d", "ReLU"] * 2
    assert [type(m).__name__ for m in detector.head.tower] == ["Conv2d", "ReLU"]
    shapes = [tuple(m.weight.shape) for m in detector.head.layers if isinstance(m, torch.nn.Linear)]
    assert shapes == [(24, 32 * 49), (24, 24)]
    assert detector.head.cls_logits.out_features == 6
    assert detector.head.box_deltas.out_features == 20
    assert from_fixed_point(detector.cells)[:, 1].tolist() == [[-s, -s, s, s] for s in (16, 32, 64, 128, 256)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strides": [4, 8, 16, 32]}, "strides=.* must be of the backbone's 4 maps and the pooled one"),
        (
            {"strides": [8, 16, 32, 64, 128]},
            r"not those of the backbone's maps and the pooled one, \[4, 8, 16, 32, 64\]",
        ),
        ({"rpn_after_nms": [100]}, "rpn_after_nms=.* must be a list of 2 numbers"),
        ({"anchor_sizes": [[32], [64]]}, "anchor_sizes=.* must give 5 levels the same number of sizes"),
        ({"rpn_sample": 3}, "unexpected keyword argument 'rpn_sample'"),
        ({"backbone": "torchvision/mobilenet_v3_large"}, "must be of the backbone's 2 maps"),
        ({"head_norm": "bn"}, "head_norm=bn must be null or gn"),
    ],
)
def test_wrong_settings_are_said(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_detector("frcnn_nano", 2, **settings)

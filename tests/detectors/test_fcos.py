import math
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from reference.boxes import iou, random_boxes
from reference.fcos import (
    naive_decode,
    naive_giou,
    naive_inside,
    naive_priors,
    naive_response,
    sigmoid,
    torchvision_loss,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from gid_yolo.detectors import FCOS, build_detector
from gid_yolo.distill import GIDLoss, response_loss
from gid_yolo.errors import UserError
from gid_yolo.ops.points import decode_ltrb
from gid_yolo.ops.structures import RawPredictions, Targets

CLASSES = 3
SIZE = (96, 160)


def spread(detector: FCOS) -> FCOS:
    """Weights that make scores, boxes and centre-ness differ between points, as after training."""
    for conv in (detector.head.cls_logits, detector.head.box_ltrb, detector.head.centerness):
        torch.nn.init.normal_(conv.weight, std=0.1)
    torch.nn.init.constant_(detector.head.box_ltrb.bias, 2.0)
    torch.nn.init.constant_(detector.head.cls_logits.bias, -2.0)
    return detector


@pytest.fixture(scope="module")
def nano() -> FCOS:
    torch.manual_seed(0)
    return spread(build_detector("fcos_nano", CLASSES).eval())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(256, 320), (96, 160), (32, 32)])
@torch.no_grad()
def test_shapes_and_layout(nano: FCOS, batch: int, size: tuple[int, int]) -> None:
    images = torch.rand(batch, 3, *size)
    features, raw = nano.raw(images)
    priors, counts = naive_priors(*size)
    assert [tuple(x.shape[:2]) for x in features] == [(batch, 64)] * 5
    assert [x.shape[2] * x.shape[3] for x in features] == counts
    assert raw.logits.shape == (batch, len(priors), CLASSES)
    assert raw.regression.shape == (batch, len(priors), 4)
    assert raw.centerness.shape == (batch, len(priors))
    assert raw.priors.tolist() == priors
    assert raw.regression.min() >= 0
    assert (raw.regression > 0).any(dim=-1).any()

    detections = nano(images)
    assert detections.shape == (batch, 4 + CLASSES, len(priors))
    for r in range(0, len(priors), 37):
        x1, y1, x2, y2 = naive_decode(raw.regression[-1, r].tolist(), priors[r])
        (x1, x2), (y1, y2) = (
            [min(max(v, 0), n) for v in pair] for pair, n in (((x1, x2), size[1]), ((y1, y2), size[0]))
        )
        centerness = sigmoid(raw.centerness[-1, r].item())
        scores = [math.sqrt(sigmoid(z) * centerness) for z in raw.logits[-1, r].tolist()]
        expected = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, *scores]
        assert detections[-1, :, r].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)


@torch.no_grad()
def test_predictions_belong_to_their_point(nano: FCOS) -> None:
    features, raw = nano.raw(torch.rand(2, 3, 64, 96))
    start = 0
    for feature in features:
        logits = nano.head.cls_logits(nano.head.cls_tower(feature))
        box = nano.head.reg_tower(feature)
        ltrb, centerness = nano.head.box_ltrb(box).clamp(min=0), nano.head.centerness(box)[:, 0]
        height, width = feature.shape[-2:]
        for y, x in ((0, 0), (height - 1, width - 1), (height // 2, width - 1)):
            r = start + y * width + x
            assert torch.equal(raw.logits[:, r], logits[:, :, y, x])
            assert torch.equal(raw.regression[:, r], ltrb[:, :, y, x])
            assert torch.equal(raw.centerness[:, r], centerness[:, y, x])
        start += height * width
    assert start == raw.logits.shape[1]


@torch.no_grad()
def test_images_of_a_batch_are_independent(nano: FCOS) -> None:
    images = torch.rand(3, 3, *SIZE)
    torch.testing.assert_close(nano(images)[1:2], nano(images[1:2]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("norm", ["gn", None])
def test_settings_of_the_head(norm: str | None) -> None:
    detector = build_detector("fcos_nano", 5, num_convs=3, fpn_channels=32, head_norm=norm, prior=0.1)
    for layers in (detector.head.cls_tower, detector.head.reg_tower):
        convs = [m for m in layers if isinstance(m, torch.nn.Conv2d)]
        assert [(c.in_channels, c.out_channels, c.bias is not None) for c in convs] == [(32, 32, True)] * 3
        assert sum(isinstance(m, torch.nn.GroupNorm) for m in layers) == (3 if norm else 0)
    assert detector.head.cls_logits.bias.sigmoid().tolist() == pytest.approx([0.1] * 5)


@pytest.mark.parametrize("ranges", [[4.0], [8.0, 4.0], [-1.0, 4.0], [1.0, 2.0, 3.0]])
def test_ranges_are_checked(ranges: list[float]) -> None:
    with pytest.raises(UserError, match="level_ranges"):
        build_detector("fcos_nano", 2, level_ranges=ranges)


def make_objects(counts: list[int], classes: int = CLASSES) -> list[tuple[torch.Tensor, torch.Tensor]]:
    boxes = [random_boxes((n,), image=SIZE, smallest=8.0, largest=150.0) for n in counts]
    return [(b, torch.randint(0, classes, (len(b),))) for b in boxes]


def to_targets(objects: list[tuple[torch.Tensor, torch.Tensor]]) -> Targets:
    index = torch.repeat_interleave(torch.arange(len(objects)), torch.tensor([len(b) for b, _ in objects]))
    return Targets.from_flat(
        torch.cat([b for b, _ in objects]), torch.cat([x for _, x in objects]), index, len(objects)
    )


def make_raw(batch: int, dtype: torch.dtype = torch.float32, classes: int = CLASSES) -> RawPredictions:
    priors = torch.tensor(naive_priors(*SIZE)[0])
    logits = torch.randn(batch, len(priors), classes) * 2 - 2
    ltrb = (torch.randn(batch, len(priors), 4) * 2 + 1).clamp(min=0)  # a third without this side, as behind a ReLU
    logits, ltrb, centerness = (
        x.to(dtype).requires_grad_() for x in (logits, ltrb, torch.randn(batch, len(priors)) * 2)
    )
    return RawPredictions(logits, ltrb, priors, decode_ltrb, centerness)


def leaves(raw: RawPredictions) -> list[torch.Tensor]:
    return [raw.logits, raw.regression, raw.centerness]


@pytest.mark.parametrize("classes", [CLASSES, 1])
@pytest.mark.parametrize("counts", [[3], [4, 0, 9], [1, 2, 30, 1], [0, 0], [0]])
def test_loss_equals_torchvision(counts: list[int], classes: int) -> None:
    detector = build_detector("fcos_nano", classes, level_ranges=None)  # of them, only the settings count
    objects, raw = make_objects(counts, classes), make_raw(len(counts), classes=classes)
    losses = detector.loss([], raw, to_targets(objects), SIZE)
    gradients = torch.autograd.grad(sum(losses.values()), leaves(raw))

    theirs = [x.detach().requires_grad_() for x in leaves(raw)]
    expected = torchvision_loss(*theirs, raw.priors, naive_priors(*SIZE)[1], objects)
    for name, value in zip(("cls_loss", "box_loss", "ctr_loss"), expected, strict=True):
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=0)
        assert (value == 0) == (name != "cls_loss" and not any(counts))
    for gradient, other in zip(gradients, torch.autograd.grad(sum(expected), theirs), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


def test_settings_reach_the_assignment_and_the_focal_loss() -> None:
    objects, raw = make_objects([5, 2]), make_raw(2)
    before = build_detector("fcos_nano", CLASSES).loss([], raw, to_targets(objects), SIZE)
    for setting in ({"center_radius": 0.8}, {"level_ranges": [1.0, 2.0]}):
        losses = build_detector("fcos_nano", CLASSES, **setting).loss([], raw, to_targets(objects), SIZE)
        assert all(losses[name] != before[name] for name in losses)
    for setting in ({"focal_alpha": 0.5}, {"focal_gamma": 1.0}):
        losses = build_detector("fcos_nano", CLASSES, **setting).loss([], raw, to_targets(objects), SIZE)
        assert [name for name in losses if losses[name] != before[name]] == ["cls_loss"]


def test_batch_without_objects(nano: FCOS) -> None:
    raw = make_raw(2)
    losses = nano.loss([], raw, to_targets(make_objects([0, 0])), SIZE)
    assert losses["box_loss"].item() == losses["ctr_loss"].item() == 0
    sum(losses.values()).backward()
    assert (raw.logits.grad > 0).all()  # every output is told to be background
    assert not raw.regression.grad.any()
    assert not raw.centerness.grad.any()


def test_boxes_without_area_and_unmatched_points_leave_the_gradient_finite(nano: FCOS) -> None:
    raw = make_raw(1)
    with torch.no_grad():
        raw.regression[:, ::2] = 0  # predicted boxes without area, on matched and unmatched points
        raw.centerness[:, ::3] = 1e4
    flat = torch.tensor([[20.0, 20, 20, 20], [8, 8, 40, 8], [16, 16, 48, 60]])
    losses = nano.loss([], raw, to_targets([(flat, torch.tensor([0, 1, 2]))]), SIZE)
    sum(losses.values()).backward()
    assert losses["box_loss"] > 0
    assert all(torch.isfinite(x.grad).all() for x in leaves(raw))
    assert raw.regression.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loss_computes_in_fp32(nano: FCOS, dtype: torch.dtype) -> None:
    targets, raw = to_targets(make_objects([3, 5])), make_raw(2, dtype)
    teacher = make_raw(2, dtype).detach()
    wide, wide_teacher = (
        replace(r, logits=r.logits.float(), regression=r.regression.float(), centerness=r.centerness.float())
        for r in (raw, teacher)
    )
    losses = nano.loss([], raw, targets, SIZE)
    for name, loss in nano.loss([], wide, targets, SIZE).items():
        assert losses[name].dtype == torch.float32
        assert torch.equal(losses[name], loss)
    for function in (nano.response_cls_loss, nano.response_reg_loss):
        assert function(teacher, raw).dtype == torch.float32
        assert torch.equal(function(teacher, raw), function(wide_teacher, wide))


def test_nothing_waits_for_the_device(nano: FCOS) -> None:
    # A fake tensor has no values: whatever copies one to the host, or has a shape that depends on one, raises.
    with FakeTensorMode(), torch.device("cuda"):
        raw = make_raw_without_values()
        boxes, labels = torch.rand(2, 4, 4), torch.zeros(2, 4, dtype=torch.long)
        targets = Targets(boxes, labels, torch.ones(2, 4, dtype=torch.bool))
        losses = nano.loss([], raw, targets, SIZE)
        assert set(losses) == {"cls_loss", "box_loss", "ctr_loss"}
        mask = nano.response_mask(raw.priors, boxes, targets.valid)
        assert response_loss(raw, raw, mask, functions=nano).shape == ()


def make_raw_without_values() -> RawPredictions:
    return RawPredictions(
        torch.rand(2, 9, CLASSES), torch.rand(2, 9, 4), torch.rand(9, 4), decode_ltrb, torch.rand(2, 9)
    )


def test_training_step_reaches_every_parameter() -> None:
    detector = build_detector("fcos_nano", CLASSES).train()
    _, raw = detector.raw(torch.rand(2, 3, *SIZE))
    sum(detector.loss([], raw, to_targets(make_objects([3, 5])), SIZE).values()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


def test_one_image_can_be_learnt() -> None:
    detector = build_detector("fcos_nano", CLASSES).train()
    images = torch.rand(1, 3, *SIZE)
    objects = [(torch.tensor([[20.0, 16, 60, 70], [90, 30, 150, 60]]), torch.tensor([0, 2]))]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=4e-3)
    for _ in range(30):
        loss = sum(detector.loss(*detector.raw(images), to_targets(objects), SIZE).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():  # batch statistics: the running ones lag behind
        _, raw = detector.raw(images)
    for box, label in zip(*objects[0], strict=True):
        best = raw.confidences[0, :, label].argmax()
        assert raw.confidences[0, best].argmax() == label
        assert iou(raw.boxes[0, best].tolist(), box.tolist()) > 0.5


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_response_equals_the_loop(nano: FCOS, alpha: float, beta: float) -> None:
    teacher, student = make_raw(2).detach(), make_raw(2)
    boxes = random_boxes((2, 6), image=SIZE, smallest=10.0, largest=120.0)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 2:] = False
    mask = nano.response_mask(student.priors, boxes, valid)
    for row, image, ok in zip(mask, boxes, valid, strict=True):
        assert row.tolist() == naive_inside(student.priors.tolist(), image[ok].double().tolist())
    flat = (teacher.boxes[..., 2:] == teacher.boxes[..., :2]).any(-1) & mask
    assert flat.any()  # teacher's boxes without area count in the centre-ness alone
    assert not flat.all()
    loss = response_loss(teacher, student, mask, functions=nano, alpha=alpha, beta=beta)
    assert loss.item() == pytest.approx(naive_response(teacher, student, mask, alpha=alpha, beta=beta), rel=1e-4)
    loss.backward()
    for x, weight in zip(leaves(student), (alpha, beta, beta), strict=True):
        if weight:
            assert x.grad[mask].any()
            assert torch.isfinite(x.grad).all()
        assert not x.grad[~mask].any()


def test_box_loss_is_giou(nano: FCOS) -> None:
    teacher, student = make_raw(1).detach(), make_raw(1).detach()
    teacher = replace(teacher, centerness=torch.full_like(teacher.centerness, 1e4))  # certain of it, as the student is
    student = replace(student, centerness=teacher.centerness)
    loss = nano.response_reg_loss(teacher, student)[0]
    for r in range(0, len(loss), 17):
        a, b = student.boxes[0, r].double().tolist(), teacher.boxes[0, r].double().tolist()
        area = (b[2] - b[0]) * (b[3] - b[1])
        assert loss[r].item() == pytest.approx(naive_giou(a, b) if area > 0 else 0.0, rel=1e-4, abs=1e-5)


def test_identical_predictions_have_nothing_to_learn(nano: FCOS) -> None:
    student = make_raw(2)
    mask = torch.ones(2, len(student.priors), dtype=torch.bool)
    loss = response_loss(student.detach(), student, mask, functions=nano, alpha=1.0, beta=1.0)
    loss.backward()
    # The cross entropy is least, not zero, at the teacher's own probability; the parts of GIoU's gradient cancel up to
    # float32's rounding
    assert all(x.grad.abs().max() < 1e-6 for x in leaves(student))


@pytest.fixture(scope="module")
def pair() -> dict:
    """fcos_small as the teacher, fcos_nano as the student, two images."""
    torch.manual_seed(0)
    teacher, student = (spread(build_detector(f"fcos_{name}", CLASSES).eval()) for name in ("small", "nano"))
    images = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        pyramid, raw = teacher.raw(images)
    return {"teacher": teacher, "student": student, "images": images, "pyramid": pyramid, "raw": raw}


def test_distillation_end_to_end(pair: dict) -> None:
    student = pair["student"]
    gid = GIDLoss(student.fpn_channels, pair["teacher"].fpn_channels)
    pyramid, raw = student.raw(pair["images"])
    for tensor in (*pyramid, *leaves(raw)):
        tensor.retain_grad()
    terms, instances = gid(
        pair["pyramid"], pyramid, pair["raw"], raw, functions=student, strides=student.strides, image_size=SIZE
    )
    assert instances.valid.all()
    mask = [
        naive_inside(raw.priors.tolist(), [b for b, ok in zip(boxes, valid, strict=True) if ok])
        for boxes, valid in zip(instances.boxes.double().tolist(), instances.valid.tolist(), strict=True)
    ]
    assert student.response_mask(raw.priors, instances.boxes, instances.valid).tolist() == mask
    assert terms["resp_loss"].item() == pytest.approx(
        naive_response(pair["raw"], raw, torch.tensor(mask), alpha=0.1, beta=1.0), rel=1e-4
    )
    assert set(terms) == {"feat_loss", "rel_loss", "resp_loss"}
    assert all(term > 0 for term in terms.values())
    for term in terms.values():
        (gradient,) = torch.autograd.grad(term, pair["student"].neck.fpn.layer_blocks[0][0].weight, retain_graph=True)
        assert gradient.any()
    sum(terms.values()).backward()
    assert all(bool(x.grad.any()) and bool(torch.isfinite(x.grad).all()) for x in leaves(raw))
    assert all(p.grad is None for p in pair["teacher"].parameters())
    assert all(p.grad.any() for p in gid.parameters())
    student.zero_grad(set_to_none=True)


@pytest.mark.parametrize("fit_strides", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_onnx_equals_torch(nano: FCOS, dynamic: bool, fit_strides: bool, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(nano, "fit_strides", fit_strides)
    images = torch.rand(2, 3, *SIZE)
    axes = {"images": {0: "batch", 2: "height", 3: "width"}, "output0": {0: "batch", 2: "points"}} if dynamic else None
    names = {"input_names": ["images"], "output_names": ["output0"], "dynamic_axes": axes}
    path = tmp_path / "fcos.onnx"
    torch.onnx.export(nano, images, path, opset_version=17, dynamo=False, **names)  # as Ultralytics exports
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in [images, torch.rand(1, 3, 128, 96)] if dynamic else [images]:
        (found,) = session.run(None, {"images": batch.numpy()})
        expected = nano(batch).numpy()
        assert expected[:, 4:].max() > 0.3
        np.testing.assert_allclose(found[:, :4], expected[:, :4], atol=0.01)  # px
        np.testing.assert_allclose(found[:, 4:], expected[:, 4:], atol=1e-5)

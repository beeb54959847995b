from dataclasses import replace

import pytest
import torch
from reference.distill import naive_adapt, naive_feature, naive_relation, naive_response, naive_rois
from reference.gism import naive_gism
from reference.retinanet import torchvision_matches

from gid_yolo.detectors import build_detector
from gid_yolo.distill import GIDLoss, feature_loss, relation_loss, select_general_instances
from gid_yolo.distill.feature import plan_rois, roi_features
from gid_yolo.distill.levels import LevelRules
from gid_yolo.distill.pairing import pair_predictions
from gid_yolo.distill.response import TeachersHead
from gid_yolo.distill.standardize import standardized_crops, standardized_maps
from gid_yolo.ops.structures import Targets

SIZE = (64, 96)
NAMES = {"feature": "feat_loss", "relation": "rel_loss", "response": "resp_loss"}


@pytest.fixture(scope="module")
def pair() -> dict:
    """retina_small as the teacher, retina_nano as the student, three images."""
    torch.manual_seed(0)
    teacher, student = build_detector("retina_small", 3).eval(), build_detector("retina_nano", 3).eval()
    for detector in (teacher, student):  # heads at the start predict next to nothing: give their outputs a spread
        for conv in (detector.head.cls_logits, detector.head.box_deltas):
            torch.nn.init.normal_(conv.weight, std=0.05)
    images = torch.rand(3, 3, *SIZE)
    with torch.no_grad():
        pyramid, raw = teacher.raw(images)
    return {"teacher": teacher, "student": student, "images": images, "pyramid": pyramid, "raw": raw}


def make_loss(pair: dict, **settings) -> GIDLoss:
    return GIDLoss(pair["student"].fpn_channels, pair["teacher"].fpn_channels, **settings)


def run(pair: dict, gid: GIDLoss, keep: slice = slice(None), targets: Targets | None = None, levels=None):
    pyramid, raw = pair["student"].raw(pair["images"][keep])
    for tensor in (*pyramid, raw.logits, raw.regression):
        tensor.retain_grad()
    teacher = replace(pair["raw"], logits=pair["raw"].logits[keep], regression=pair["raw"].regression[keep])
    terms, instances = gid(
        [x[keep] for x in pair["pyramid"]],
        pyramid,
        teacher,
        raw,
        functions=pair["student"],
        strides=pair["student"].strides,
        image_size=SIZE,
        levels=levels,
        targets=targets,
    )
    return terms, instances, pyramid, raw


@pytest.mark.parametrize(
    ("normalize", "reduction", "top_k"), [("instance", "mean", 10), ("pixel", "sum", 4), ("instance", "mean", 0)]
)
def test_terms_equal_the_loops(pair: dict, normalize: str, reduction: str, top_k: int) -> None:
    gid = make_loss(
        pair,
        top_k=top_k,
        iou_threshold=0.4,
        weights={"feature": 2.0, "relation": 3.0, "response": 5.0},
        alpha=0.3,
        beta=0.7,
        roi_size=4,
        feature_normalize=normalize,
        relation_reduction=reduction,
    )
    terms, instances, pyramid, raw = run(pair, gid)
    teacher = pair["raw"]

    expected = naive_gism(
        teacher.scores, raw.scores, teacher.boxes, raw.boxes, top_k=top_k, iou_threshold=0.4
    )  # scores here are sigmoids: their fp32 differences are compared up to rounding
    for b, (indices, scores, boxes) in enumerate(expected):
        assert instances.indices[b].tolist() == indices
        assert instances.scores[b].tolist() == pytest.approx(scores, abs=1e-6)
        torch.testing.assert_close(instances.boxes[b], torch.tensor(boxes).reshape(-1, 4))

    strides = pair["student"].strides
    crops_t = naive_rois(pair["pyramid"], instances.boxes, strides, SIZE, 4).double()
    crops_s = naive_rois(pyramid, instances.boxes, strides, SIZE, 4).double()
    weight, bias = gid.adapt.conv.weight[..., 0, 0].double(), gid.adapt.conv.bias.double()
    adapted = naive_adapt(crops_s, weight, bias)
    mask = torch.stack([torchvision_matches(raw.priors, boxes) >= 0 for boxes in instances.boxes])
    oracle = {
        "feat_loss": 2 * naive_feature(crops_t, adapted, instances.valid, per_pixel=normalize == "pixel"),
        "rel_loss": 3 * naive_relation(crops_t, adapted, instances.valid, mean=reduction == "mean"),
        "resp_loss": 5
        * naive_response(
            teacher.logits, raw.logits, teacher.regression, raw.regression, mask, alpha=0.3, beta=0.7, box_beta=0.0
        ),
    }
    assert set(terms) == set(oracle)
    for name, value in oracle.items():
        assert terms[name].item() == pytest.approx(float(value.detach()), rel=1e-4)
        assert (terms[name].item() == 0) == (top_k == 0)
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in gid.parameters())


@pytest.mark.parametrize("standardize", ["raw", "crops", "maps", "teacher"])
def test_features_are_standardised_where_it_is_said(pair: dict, standardize: str) -> None:
    """feature.py's and relation.py's functions, of crops and maps that were standardised by hand."""
    gid = make_loss(pair, weights={"feature": 1.0, "relation": 1.0, "response": 0.0}, standardize=standardize)
    terms, instances, pyramid, _ = run(pair, gid)
    maps_t, maps_s = pair["pyramid"], pyramid
    if standardize in {"maps", "teacher"}:
        maps_t = standardized_maps(maps_t)
    if standardize == "maps":
        maps_s = standardized_maps(maps_s)
    plan = plan_rois(instances.boxes, pair["student"].strides, SIZE)
    crops_t, crops_s = (roi_features(x, plan, pair["student"].strides, size=10) for x in (maps_t, maps_s))
    crops_s = gid.adapt(crops_s)
    if standardize == "crops":
        crops_t, crops_s = standardized_crops(crops_t, instances.valid), standardized_crops(crops_s, instances.valid)
    assert terms["feat_loss"].item() == pytest.approx(feature_loss(crops_t, crops_s, instances.valid).item())
    assert terms["rel_loss"].item() == pytest.approx(relation_loss(crops_t, crops_s, instances.valid).item())
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in gid.adapt.parameters() if p.ndim > 1)


def test_an_unknown_standardisation_is_refused(pair: dict) -> None:
    with pytest.raises(ValueError, match="standardize=both must be one of raw, crops, maps, teacher"):
        make_loss(pair, standardize="both")


def test_defaults_are_the_papers(pair: dict) -> None:
    gid = make_loss(pair)
    assert (gid.top_k, gid.iou_threshold, gid.alpha, gid.beta) == (10, 0.3, 0.1, 1.0)  # sections 3.1 and 4
    assert gid.weights == {"feature": 5e-4, "relation": 40.0, "response": 1.0, "cross": 0.0}


def test_weights_scale_their_terms(pair: dict) -> None:
    gid = make_loss(pair)
    before = {name: term.item() for name, term in run(pair, gid)[0].items()}
    gid.weights = {name: 3 * weight for name, weight in gid.weights.items()}
    for name, term in run(pair, gid)[0].items():
        assert term.item() == pytest.approx(3 * before[name], rel=1e-5)


@pytest.mark.parametrize("missing", [("feature",), ("relation",), ("response",), ("feature", "relation")])
def test_terms_of_weight_zero_are_absent(pair: dict, missing: tuple[str, ...]) -> None:
    terms, *_ = run(pair, make_loss(pair, weights=dict.fromkeys(missing, 0.0)))
    assert set(terms) == {term for name, term in NAMES.items() if name not in missing}


def test_gradient_reaches_the_student_and_the_adapter_never_the_teacher(pair: dict) -> None:
    gid = make_loss(pair)
    terms, _, pyramid, raw = run(pair, gid)
    sum(terms.values()).backward()
    assert raw.logits.grad.any()
    assert raw.regression.grad.any()
    assert any(bool(x.grad.any()) for x in pyramid)
    assert all(p.grad.any() for p in gid.adapt.parameters())
    student, teacher = pair["student"], pair["teacher"]
    assert any(p.grad is not None and p.grad.any() for p in student.backbone.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    for p in student.parameters():
        assert p.grad is None or torch.isfinite(p.grad).all()
    student.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_each_term_teaches(pair: dict, name: str) -> None:
    gid = make_loss(pair)
    terms, _, pyramid, raw = run(pair, gid)
    inputs = [*pyramid, raw.logits, raw.regression, gid.adapt.conv.weight]
    gradients = torch.autograd.grad(terms[NAMES[name]], inputs, allow_unused=True)
    head, adapter = gradients[5:7], gradients[7]
    if name == "response":
        assert all(bool(g.any()) for g in head)
        assert adapter is None
    else:  # the selection passes no gradient to the predictions
        assert head == (None, None)
        assert adapter.any()
    assert any(g is not None and bool(g.any()) for g in gradients[:5])


def test_batch_is_the_mean_of_its_images(pair: dict) -> None:
    # The property that makes the loss the same however a batch is spread over processes.
    gid = make_loss(pair)
    together, instances, *_ = run(pair, gid)
    single = [run(pair, gid, slice(b, b + 1)) for b in range(3)]
    for name in NAMES.values():
        mean = sum(terms[name].item() for terms, *_ in single) / 3
        assert together[name].item() == pytest.approx(mean, rel=1e-4)
    for b in range(3):
        assert torch.equal(single[b][1].indices[0], instances.indices[b])


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(pair: dict) -> None:
    teacher = pair["teacher"]
    gid = GIDLoss(teacher.fpn_channels, teacher.fpn_channels)
    torch.nn.init.dirac_(gid.adapt.conv.weight)  # the identity
    torch.nn.init.zeros_(gid.adapt.conv.bias)
    same = {**pair, "student": teacher}
    terms, instances, pyramid, raw = run(same, gid)
    assert not instances.scores.any()
    assert instances.valid.any()
    assert terms["feat_loss"].item() == terms["rel_loss"].item() == 0
    sum(terms.values()).backward()
    assert raw.logits.grad.abs().max() < 1e-6
    assert not raw.regression.grad.any()
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in pyramid)
    teacher.zero_grad(set_to_none=True)


def test_one_instance_has_no_relation(pair: dict) -> None:
    terms, instances, *_ = run(pair, make_loss(pair, top_k=1))
    assert instances.valid.tolist() == [[True]] * 3
    assert terms["rel_loss"].item() == 0
    assert terms["feat_loss"].item() > 0
    assert terms["resp_loss"].item() > 0


def test_only_the_adapter_is_trained() -> None:
    gid = GIDLoss(8, 12, adapt_kernel=3)
    assert {name: tuple(p.shape) for name, p in gid.named_parameters()} == {
        "adapt.conv.weight": (12, 8, 3, 3),
        "adapt.conv.bias": (12,),
    }


def test_misaligned_models_are_an_error(pair: dict) -> None:
    teacher = build_detector("retina_nano", 2).eval()
    with torch.no_grad():
        pyramid, raw = teacher.raw(pair["images"])
    with pytest.raises(ValueError, match="aligned"):
        run({**pair, "pyramid": pyramid, "raw": raw}, GIDLoss(64, 64))


def test_misaligned_models_are_paired_by_overlap(pair: dict) -> None:
    # Half of the teacher's predictions are enough to pair: which they are is all the same to features and relations
    raw = pair["raw"]
    half = replace(raw, logits=raw.logits[:, ::2], regression=raw.regression[:, ::2], priors=raw.priors[::2])
    gid = make_loss(pair, aligned=False, weights={"response": 0.0})
    terms, instances, pyramid, student = run({**pair, "raw": half}, gid)
    student = student.detach()
    pairs = pair_predictions(half.scores, student.scores, half.boxes, student.boxes)
    assert torch.equal(instances.boxes, select_general_instances(*pairs).boxes)
    assert set(terms) == {"feat_loss", "rel_loss"}
    sum(terms.values()).backward()
    assert any(x.grad is not None and x.grad.any() for x in pyramid)


def test_responses_of_misaligned_models_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="response must be 0"):
        GIDLoss(64, 64, aligned=False)


@pytest.fixture(scope="module")
def targets(pair: dict) -> Targets:
    """Objects where the default loss finds instances, one of an image's each, so that every type exists."""
    _, found, *_ = run(pair, make_loss(pair))
    boxes = found.boxes[:, :1]
    return Targets(boxes, torch.zeros(3, 1, dtype=torch.long), torch.tensor([[True], [True], [False]]))


def test_types_restrict_what_is_distilled(pair: dict, targets: Targets) -> None:
    every, found, *_ = run(pair, make_loss(pair), targets=targets)
    kept, some, *_ = run(pair, make_loss(pair, types="pos"), targets=targets)
    assert torch.equal(found.types, some.types)
    assert torch.equal(some.valid, found.valid & (found.types == 0))
    assert some.valid.sum(1).tolist()[2] == 0  # an image without objects
    crops = torch.where(some.valid[..., None], found.boxes, 0.0)
    assert torch.equal(some.boxes, crops)
    assert kept["resp_loss"].item() != every["resp_loss"].item()


def test_the_ground_truth_is_distilled_in_their_place(pair: dict, targets: Targets) -> None:
    terms, instances, *_ = run(pair, make_loss(pair, types="gt"), targets=targets)
    assert torch.equal(instances.boxes, targets.boxes)
    assert torch.equal(instances.valid, targets.valid)
    assert terms["feat_loss"] > 0
    assert terms["resp_loss"] > 0
    assert terms["rel_loss"] == 0  # one object an image has none to relate to


def test_instances_outside_the_image_or_without_area(pair: dict) -> None:
    # Features there are those of an empty place, and no output answers for it
    boxes = torch.tensor([[5000.0, 5000, 5100, 5100], [-9000, -9000, -8000, -8000], [20, 20, 20, 20], [20, 20, 60, 20]])
    targets = Targets(boxes.expand(3, 4, 4), torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 4, dtype=torch.bool))
    gid = make_loss(pair, types="gt")
    terms, instances, pyramid, raw = run(pair, gid, targets=targets)
    assert instances.valid.all()
    assert terms["resp_loss"].item() == 0
    inputs = [*pyramid, raw.logits, raw.regression, *gid.parameters()]
    for term in terms.values():
        assert torch.isfinite(term)
        gradients = torch.autograd.grad(term, inputs, retain_graph=True, allow_unused=True)
        assert all(g is None or torch.isfinite(g).all() for g in gradients)


def test_types_need_targets(pair: dict) -> None:
    with pytest.raises(ValueError, match="need targets"):
        run(pair, make_loss(pair, types="neg"))


def test_autocast_stays_close(pair: dict) -> None:
    gid = make_loss(pair)
    exact, *_ = run(pair, gid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, *_ = run(pair, gid)
    for name, term in terms.items():
        assert torch.isfinite(term)
        assert term.dtype == torch.float32
        # The networks run in bf16 here, and a selected box may swap with its like: a bound of scale alone. The terms
        # of equal inputs and instances are held to tolerances in test_autocast.py.
        assert term.item() == pytest.approx(exact[name].item(), rel=0.5)


def crossing(pair: dict) -> TeachersHead:
    for parameter in pair["teacher"].parameters():
        parameter.requires_grad_(False)
    return TeachersHead(lambda x: pair["teacher"].predict(x, SIZE), pair["teacher"])


def test_the_teachers_head_reads_the_students_adapted_pyramid(pair: dict) -> None:
    only = {"feature": 0.0, "relation": 0.0, "response": 0.0, "cross": 3.0}
    gid = make_loss(pair, weights=only, top_k=4, alpha=0.3, beta=0.7)
    pyramid, raw = pair["student"].raw(pair["images"])
    for level in pyramid:
        level.retain_grad()
    settings = {"functions": pair["student"], "strides": pair["student"].strides, "image_size": SIZE}
    terms, instances = gid(pair["pyramid"], pyramid, pair["raw"], raw, **settings, head=crossing(pair))
    assert gid.term_names == list(terms) == ["cross_loss"]

    weight, bias = gid.adapt.conv.weight[..., 0, 0], gid.adapt.conv.bias
    adapted = [torch.einsum("tc,bchw->bthw", weight, x) + bias[:, None, None] for x in pyramid]
    logits, deltas = pair["teacher"].head(adapted)
    mask = torch.stack([torchvision_matches(raw.priors, boxes) >= 0 for boxes in instances.boxes])
    taught = pair["raw"]
    loss = naive_response(taught.logits, logits, taught.regression, deltas, mask, alpha=0.3, beta=0.7, box_beta=0.0)
    assert terms["cross_loss"].item() == pytest.approx(3 * float(loss.detach()), rel=1e-4)

    terms["cross_loss"].backward()
    assert pyramid[0].grad.abs().sum() > 0
    assert gid.adapt.conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in pair["teacher"].parameters())


def test_a_student_with_the_teachers_features_crosses_without_a_box_loss(pair: dict) -> None:
    gid = GIDLoss(96, 96, weights={"feature": 0.0, "relation": 0.0, "response": 0.0, "cross": 1.0}, alpha=0.0)
    with torch.no_grad():
        gid.adapt.conv.weight.copy_(torch.eye(96)[..., None, None])
        gid.adapt.conv.bias.zero_()
        settings = {"functions": pair["student"], "strides": pair["student"].strides, "image_size": SIZE}
        own = pair["student"].raw(pair["images"])[1]
        terms, instances = gid(pair["pyramid"], pair["pyramid"], pair["raw"], own, **settings, head=crossing(pair))
    assert instances.valid.all()
    assert terms["cross_loss"].item() == pytest.approx(0.0, abs=1e-6)  # |d - d| over 4 coordinates


def test_crossing_needs_the_head(pair: dict) -> None:
    with pytest.raises(ValueError, match="cross needs the teacher's head"):
        run(pair, make_loss(pair, weights={"cross": 1.0}))


def test_instances_weigh_by_their_gi_score(pair: dict) -> None:
    only = {"feature": 1.0, "relation": 0.0, "response": 0.0}
    gid = make_loss(pair, weights=only, weighting="score", top_k=4)
    terms, instances, pyramid, _ = run(pair, gid)
    strides = pair["student"].strides
    crops_t = naive_rois(pair["pyramid"], instances.boxes, strides, SIZE, 10).double()
    crops_s = naive_rois(pyramid, instances.boxes, strides, SIZE, 10).double()
    weight, bias = gid.adapt.conv.weight[..., 0, 0].double(), gid.adapt.conv.bias.double()
    squared = (crops_t - naive_adapt(crops_s, weight, bias)).square().sum((2, 3, 4))  # (B, K)
    images = []
    for scores, distances, valid in zip(instances.scores, squared, instances.valid, strict=True):
        images.append(sum(s * d for s, d, v in zip(scores, distances, valid, strict=True) if v) / valid.sum())
    assert 0 < instances.scores.min() < instances.scores.max() < 1  # so that they tell
    assert terms["feat_loss"].item() == pytest.approx(float(sum(images).detach()) / len(images), rel=1e-4)


@pytest.mark.parametrize(("level", "taken"), [("detector", None), ("prediction", 1), ("size", None)])
def test_crops_are_taken_from_the_level_that_the_rule_says(pair: dict, level: str, taken: int | None) -> None:
    rules = LevelRules(torch.ones_like, lambda boxes: torch.full(boxes.shape[:2], 2))
    for given, by_detector in ((rules, 2), (replace(rules, of_boxes=None), None)):  # the other has no second stage
        gid = make_loss(pair, level=level)
        terms, instances, pyramid, _ = run(pair, gid, levels=given)
        strides, boxes = pair["student"].strides, instances.boxes
        found = by_detector if level == "detector" else taken
        plan = plan_rois(boxes, strides, SIZE, None if found is None else torch.full(boxes.shape[:2], found))
        crops = [roi_features(x, plan, strides) for x in (pair["pyramid"], pyramid)]
        expected = 5e-4 * feature_loss(crops[0], gid.adapt(crops[1]), instances.valid).item()
        assert terms["feat_loss"].item() == pytest.approx(expected)


def test_predictions_without_a_rule_are_refused(pair: dict) -> None:
    with pytest.raises(ValueError, match="level=prediction needs the levels of the student's predictions"):
        run(pair, make_loss(pair, level="prediction"))

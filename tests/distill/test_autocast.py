"""Half precision against float32: every term's value and gradient, of inputs that autocast would hand over.

Autocast gives the distillation features and predictions that are rounded to float16 or bfloat16, and runs the
convolutions of the adaptations in that format. All else is computed in float32 here, so that a term differs from
float32's by the rounding of its inputs, by that of an adaptation's inputs, weights and outputs, and by that of the
gradient that is handed back: each is off by at most UNIT of itself, at random and in either direction.

What no tolerance can promise is the selection: see `test_near_ties_may_be_chosen_otherwise`.
"""

import pytest
import torch
from reference.boxes import random_boxes
from response_helpers import FAMILIES, SIZE, STRIDES, R, functions_of, leaves, make_raw, with_leaves
from torch import Tensor

from gid_yolo.distill import GIDLoss, select_general_instances
from gid_yolo.distill.gism import gi_scores
from gid_yolo.distill.methods import FineGrained, FitNet, Mimicking
from gid_yolo.ops.structures import RawPredictions, Targets

FORMATS = [torch.float16, torch.bfloat16]
# Half the distance of two neighbouring numbers over the smaller: 11 and 8 significant bits
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# A squared distance of t and s is off by 2 |t - s| (|dt| + |ds|), with |dt| <= UNIT |t| and, through an adaptation,
# |ds| <= 4 UNIT |s| (its input, rounded twice, its weight and its output): at most 2 (1 + 4) UNIT (|t| + |s|) / |t - s|
# of itself, where the last factor is about 1 for unlike features. Cross entropies and box losses are of first order.
VALUE = 10.0
# A gradient's norm: that of the term (as above, half of it, for it is linear in t - s), then the adaptation's weight
# again and the rounding on the way back
GRADIENT = 10.0
# Probabilities: |d sigmoid(z)| <= UNIT |z| s (1 - s), and |z| s (1 - s) is at most 0.224; two of them
SCORE = 0.45
# float16 ends at 6e-8 and keeps fewer digits under 6e-5: gradients are scaled as a gradient scaler does (2^16 at first)
SCALE = 2.0**10
WITH_IOU = {"retinanet_giou", "fcos", "yolo"}


def relative(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


def slopes_of(term: Tensor, groups: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """The gradient of each group as one vector: some parts are 0, as that of a bias, which changes no distance."""
    found = {}
    for name, inputs in groups.items():
        gradients = torch.autograd.grad(term * SCALE, inputs, retain_graph=True, allow_unused=True)
        if parts := [g.float().flatten() / SCALE for g in gradients if g is not None]:
            found[name] = torch.cat(parts)
    return found


def make_pyramid(channels: int) -> list[Tensor]:
    return [torch.randn(2, channels, SIZE[0] // s, SIZE[1] // s) for s in STRIDES]


def rounded(tensors: list[Tensor], dtype: torch.dtype, *, graph: bool = False) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_(graph) for x in tensors]


def make_targets() -> Targets:
    boxes = random_boxes((2, 4), image=SIZE, smallest=10.0, largest=50.0)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    return Targets(boxes.where(valid[..., None], 0.0), torch.zeros(2, 4, dtype=torch.long), valid)


class Scene:
    """One batch, in any precision. The ground truth stands for the instances, so that they are the same ones in all."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.pyramids = make_pyramid(8), make_pyramid(6)
        self.raws = make_raw(family), make_raw(family)
        self.targets = make_targets()
        self.gid = GIDLoss(6, 8, types="gt", roi_size=4)

    def crossed(self, dtype: torch.dtype) -> Tensor:
        """(B, R) True where the rounding changes which of two corners is the outer one, or whether boxes overlap.

        There the gradient of an IoU jumps, from one side of its kink to the other; its value does not.
        """
        orders = []
        for kind in (torch.float32, dtype):
            t, s = (with_leaves(raw, rounded(leaves(raw), kind)).boxes for raw in self.raws)
            orders.append(torch.cat([s - t, s[..., 2:] - t[..., :2], t[..., 2:] - s[..., :2]], dim=-1).sign())
        return (orders[0] != orders[1]).any(-1)

    def run(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Terms, and their gradients."""
        half = dtype != torch.float32
        theirs, own = rounded(self.pyramids[0], dtype), rounded(self.pyramids[1], dtype, graph=True)
        teacher, student = (
            with_leaves(raw, rounded(leaves(raw), dtype, graph=graph))
            for raw, graph in zip(self.raws, (False, True), strict=True)
        )
        with torch.autocast("cpu", dtype=dtype if half else torch.bfloat16, enabled=half):
            terms, _ = self.gid(
                theirs,
                own,
                teacher,
                student,
                functions=functions_of(self.family),
                strides=STRIDES,
                image_size=SIZE,
                targets=self.targets,
            )
        groups = {"pyramid": own, "adaptation": list(self.gid.parameters())}
        groups |= {f"prediction {i}": [x] for i, x in enumerate(leaves(student))}
        return terms, {name: slopes_of(term, groups) for name, term in terms.items()}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_terms_of_equation_9(family: str, dtype: torch.dtype) -> None:
    scene = Scene(family)
    exact, slopes = scene.run(torch.float32)
    terms, gradients = scene.run(dtype)
    assert set(terms) == {"feat_loss", "rel_loss", "resp_loss"}
    smooth = ~scene.crossed(dtype) if family in WITH_IOU else torch.ones(2, R, dtype=torch.bool)
    assert smooth.float().mean() > 0.8
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert relative(term, exact[name]) <= VALUE * UNIT[dtype], name
        assert set(gradients[name]) == set(slopes[name])
        for group, wanted in slopes[name].items():
            got = gradients[name][group]
            if group.startswith("prediction"):
                got, wanted = (x.view(2, R, -1)[smooth] for x in (got, wanted))
            assert relative(got, wanted) <= GRADIENT * UNIT[dtype], (name, group)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_alone_changes_no_term_but_through_the_adaptation(family: str, dtype: torch.dtype) -> None:
    # Of the same numbers, without an adaptation to compute: all of the rest is in float32 whatever autocast says
    scene = Scene(family)
    scene.gid.adapt = torch.nn.Identity()  # as wide as the teacher
    settings = {
        "functions": functions_of(family),
        "strides": STRIDES,
        "image_size": SIZE,
        "targets": scene.targets,
    }
    arguments = scene.pyramids[0], [x.roll(1, dims=0) for x in scene.pyramids[0]], *scene.raws
    expected, _ = scene.gid(*arguments, **settings)
    with torch.autocast("cpu", dtype=dtype):
        terms, _ = scene.gid(*arguments, **settings)
    for name, term in terms.items():
        assert torch.equal(term, expected[name]), name


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("method", ["fitnet", "fine_grained", "mimicking"])
def test_the_comparators(method: str, dtype: torch.dtype) -> None:
    maps, targets = (make_pyramid(8), make_pyramid(6)), make_targets()
    anchors = random_boxes((R,), image=SIZE, largest=60.0)
    module = {"fitnet": FitNet, "fine_grained": FineGrained, "mimicking": Mimicking}[method](6, 8, 1.0)

    def run(kind: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        theirs, own = rounded(maps[0], kind), rounded(maps[1], kind, graph=True)
        extra = {
            "fitnet": (),
            "fine_grained": (anchors, targets),
            "mimicking": ((targets.boxes, targets.valid), STRIDES, SIZE),
        }[method]
        half = kind != torch.float32
        with torch.autocast("cpu", dtype=kind if half else torch.bfloat16, enabled=half):
            term = module(theirs, own, *extra)
        return term, slopes_of(term, {"pyramid": own, "adaptation": list(module.parameters())})

    (exact, slopes), (term, gradients) = run(torch.float32), run(dtype)
    assert term.dtype == torch.float32
    assert relative(term, exact) <= VALUE * UNIT[dtype]
    for group, wanted in slopes.items():
        assert relative(gradients[group], wanted) <= GRADIENT * UNIT[dtype]


@pytest.mark.parametrize("dtype", FORMATS)
def test_scores_of_equation_1(dtype: torch.dtype) -> None:
    teacher, student = make_raw("retinanet", 50), make_raw("retinanet", 50)
    half = [with_leaves(raw, rounded(leaves(raw), dtype)) for raw in (teacher, student)]
    difference = gi_scores(half[0].scores, half[1].scores) - gi_scores(teacher.scores, student.scores)
    # 2^-23: float32's own rounding of the two
    assert 0 < difference.abs().max() <= SCORE * UNIT[dtype] + 2.0**-23


def predictions(logits: Tensor, boxes: Tensor, dtype: torch.dtype) -> RawPredictions:
    values = logits.to(dtype), torch.zeros(1, len(boxes), 4, dtype=dtype)
    return RawPredictions(*values, boxes, lambda deltas, priors: priors.expand(1, -1, 4))


@pytest.mark.parametrize("dtype", FORMATS)
def test_instances_are_the_same_where_scores_are_further_apart_than_the_rounding(dtype: torch.dtype) -> None:
    count = 24
    boxes = torch.tensor([[20.0 * i, 0.0, 20.0 * i + 15, 15.0] for i in range(count)])
    # Probabilities 3 SCORE UNIT apart and in no order: neither rounding can make two of them change places
    steps = torch.randperm(count) * 3 * SCORE * UNIT[dtype] + 0.3
    logits, none = steps.logit()[None, :, None], torch.full((1, count, 1), -20.0)
    chosen = [
        select_general_instances(teacher.scores, student.scores, teacher.boxes, student.boxes).indices
        for kind in (torch.float32, dtype)
        for teacher, student in [(predictions(logits, boxes, kind), predictions(none, boxes, kind))]
    ]
    assert torch.equal(*chosen)


@pytest.mark.parametrize("dtype", FORMATS)
def test_near_ties_may_be_chosen_otherwise(dtype: torch.dtype) -> None:
    # Two logits that half precision rounds to one number: float32 takes the larger, half precision the lower index
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    logits = torch.tensor([[[1.0], [1.0 + UNIT[dtype] / 4]]])
    chosen = []
    for kind in (torch.float32, dtype):
        teacher, student = predictions(logits, boxes, kind), predictions(torch.full((1, 2, 1), -20.0), boxes, kind)
        found = select_general_instances(teacher.scores, student.scores, teacher.boxes, student.boxes, top_k=1)
        chosen.append(found.indices.item())
        assert found.scores.item() == pytest.approx(teacher.scores.max().item(), abs=1e-6)
    assert chosen == [1, 0]


@pytest.mark.parametrize("dtype", FORMATS)
def test_features_as_large_as_the_format_allows(dtype: torch.dtype) -> None:
    # A squared sum over channels and pixels is 10^5 times what float16 holds
    scene = Scene("retinanet")
    scene.pyramids = tuple([x * 5000 for x in maps] for maps in scene.pyramids)
    assert not torch.isfinite((scene.pyramids[0][0].half() ** 2).sum())
    exact, _ = scene.run(torch.float32)
    terms, _ = scene.run(dtype)
    for name in ("feat_loss", "rel_loss"):
        assert relative(terms[name], exact[name]) <= VALUE * UNIT[dtype], name

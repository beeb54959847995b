"""What the distillation of a YOLO weighs beside its task, and its box loss."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.metrics import bbox_iou

from gid_yolo.engine.config import DEFAULTS
from gid_yolo.engine.distillation import make_projector
from gid_yolo.engine.teacher_student import TeacherStudentModel
from gid_yolo.engine.views import distillable


def pair(name: str) -> TeacherStudentModel:
    args = SimpleNamespace(**{**DEFAULTS, "nbs": 2, "epochs": 11})
    student, teacher = (DetectionModel(name, nc=3, verbose=False) for _ in range(2))
    student.args = teacher.args = args
    return TeacherStudentModel(student, teacher, make_projector(args, student, teacher)).train()


def batch() -> dict[str, Tensor]:
    boxes = torch.tensor([[0.3, 0.3, 0.3, 0.3], [0.7, 0.6, 0.3, 0.4], [0.5, 0.5, 0.6, 0.6]])
    index, classes = torch.tensor([0.0, 0, 1]), torch.tensor([[0.0], [1], [2]])
    return {"img": torch.rand(2, 3, 64, 96), "bboxes": boxes, "cls": classes, "batch_idx": index}


@pytest.mark.parametrize("name", ["yolov10n.yaml", "yolo26n.yaml"])
def test_distillation_keeps_its_weight_beside_a_branch_that_fades(name: str) -> None:
    # Ultralytics lets the weight of the one-to-many branch, which alone reaches the pyramid, fall from 0.8 to 0.1
    model, images = pair(name), batch()
    ratios, grown = [], []
    for updates in (0, 5, 10):  # of 11 epochs
        model.criterion = model.init_criterion()
        model.criterion.updates = updates - 1
        model.criterion.update()
        model.asked = "norms"
        total, items = model.loss(images)
        terms = sum(items[x] for x in model.term_names)
        own = model.student_model.loss(images, model.student_model(images["img"]))[0].sum()
        grown.append(((total - own) / (2 * terms)).item())  # of two images
        ratios.append([model.pulls[x].norm / model.pulls["task"].norm for x in model.term_names])
    # 0.8 - 0.7 * updates / 10
    assert grown == pytest.approx([0.8, 0.45, 0.1], rel=1e-3)
    for later in ratios[1:]:
        assert later == pytest.approx(ratios[0], rel=1e-3)


def test_one_branch_has_the_weight_of_its_loss() -> None:
    model, images = pair("yolo11n.yaml"), batch()
    model.loss(images)
    assert distillable(model.student_model).loss_scale(images) == 2  # images


def test_a_teachers_box_without_area_teaches_nothing() -> None:
    # reg_max = 1 has sides on either side of the point; a reversed box makes the hull of CIoU vanish
    view = distillable(DetectionModel("yolo26n.yaml", nc=3, verbose=False))
    student = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]]], requires_grad=True)
    teacher = torch.tensor([[[2.0, 2, 12, 12], [10, 10, 0, 0], [5, 5, 5, 9]]])
    loss = view.response_reg_loss(SimpleNamespace(boxes=teacher), SimpleNamespace(boxes=student))
    expected = 1 - bbox_iou(student[0, :1], teacher[0, :1], xywh=False, CIoU=True).item()
    assert loss[0].tolist() == pytest.approx([expected, 0, 0])
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all()
    assert gradient[0, 1:].abs().max() == 0

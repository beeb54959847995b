"""A distilled step queues its work and goes on: nothing is copied between host and device, and nothing is waited for.

Meta tensors have no values, so that whatever needs one on the host (`item`, `nonzero`, a shape that depends on values)
raises, forth and back; and every operation is looked at for a second device among what it is given and gives.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from ultralytics.nn.tasks import DetectionModel

from gid_yolo.engine.config import DEFAULTS
from gid_yolo.engine.detection_model import GIDDetectionModel, batch_targets, count_objects
from gid_yolo.engine.distillation import make_projector
from gid_yolo.engine.teacher_student import TeacherStudentModel

PAIRS = ["retina_nano", "fcos_nano", "frcnn_nano", "yolo11n.yaml"]
OWN_WAITS = ("frcnn", "yolo")  # kinds whose own loss waits, by its NMS or its assignment: Ultralytics', torchvision's


class OneDevice(TorchDispatchMode):
    """Raises where an operation has tensors of two devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if len(found) > 1:
            raise RuntimeError(f"{func} has tensors on {sorted(found)}.")
        return out


def make_pair(name: str, teacher: str | None = None, **settings) -> TeacherStudentModel:
    args = SimpleNamespace(**{**DEFAULTS, "nbs": 2, **settings})
    build = DetectionModel if name.startswith("yolo") else GIDDetectionModel
    student, teacher = (build(x, nc=3, verbose=False) for x in (name, teacher or name))
    student.args = teacher.args = args
    return TeacherStudentModel(student, teacher, make_projector(args, student, teacher)).train()


def make_batch(device: str, counted: bool = True) -> dict:
    images, objects = torch.rand(2, 3, 64, 96), 5
    batch = {"batch_idx": torch.tensor([0.0, 0, 1, 1, 1]), "cls": torch.zeros(objects, 1)}
    batch |= {"bboxes": torch.rand(objects, 4) * 0.5 + 0.25, "img": images}
    if counted:
        count_objects(batch)
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


SETTINGS = [
    *((name, {}) for name in PAIRS),
    *((name, {"gid_level": "prediction"}) for name in PAIRS),
    ("frcnn_nano", {"teacher": "retina_nano", "gid_response": 0}),  # which has not all of the student's levels
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_a_distilled_step_waits_for_nothing(name: str, settings: dict, monkeypatch) -> None:
    model = make_pair(name, **settings).to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which meta tensors have none of
    if name.startswith(OWN_WAITS):  # what distillation adds to it is looked at alone
        task = lambda batch, preds: (sum(x.sum() for x in tree_leaves(preds) if isinstance(x, torch.Tensor)), {})  # noqa: E731
        monkeypatch.setattr(model.student_model, "loss", task)
    batch = make_batch("meta")
    model.loss(batch)  # a first one may: what is made once goes to the device then
    with OneDevice():
        loss, items = model.loss(batch)
        loss.sum().backward()
    responses = {"resp_loss"} if model.projector.gid.aligned else set()
    assert {"feat_loss", "rel_loss", "gi_pos"} | responses <= set(items)
    assert all(p.grad is not None for p in model.projector.parameters())


def test_what_is_waited_for_is_seen(monkeypatch) -> None:
    model = make_pair("retina_nano").to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    batch = make_batch("meta", counted=False)
    with OneDevice(), pytest.raises(RuntimeError, match="meta"):
        model.loss(batch)


def test_a_counted_batch_has_the_same_targets() -> None:
    counted, other = make_batch("cpu"), make_batch("cpu", counted=False)
    other |= {key: value for key, value in counted.items() if key != "most_objects"}
    assert counted["most_objects"] == 3  # image 1 has three of the five
    for key, value in vars(batch_targets(counted)).items():
        assert torch.equal(value, getattr(batch_targets(other), key))
    empty = {"img": torch.rand(2, 3, 8, 8), "batch_idx": torch.zeros(0), "cls": torch.zeros(0, 1)}
    empty["bboxes"] = torch.zeros(0, 4)
    count_objects(empty)
    assert batch_targets(empty).boxes.shape == (2, 0, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; meta tensors stand for one above")
@pytest.mark.parametrize("name", [name for name in PAIRS if not name.startswith(OWN_WAITS)])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])  # Ultralytics' default is True
def test_a_distilled_step_waits_for_nothing_on_a_gpu(name: str, amp: bool, deterministic: bool) -> None:
    model, batch = make_pair(name).to("cuda"), make_batch("cuda")
    for mode in ("default", "error"):  # the first step may wait, for cuDNN's choices
        torch.cuda.set_sync_debug_mode(mode)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            with torch.autocast("cuda", enabled=amp):
                loss, _ = model.loss(batch)
            loss.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.use_deterministic_algorithms(False)

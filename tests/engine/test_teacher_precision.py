"""`teacher_precision=`: the teacher's pass alone in another format, and everything after it in float32."""

import pytest
import torch
from engine_helpers import FAST
from test_no_waiting import PAIRS, make_batch, make_pair
from ultralytics.utils import LOGGER
from ultralytics.utils.ops import xyxy2xywh

from gid_yolo.detectors.build import model_config
from gid_yolo.engine.config import thresholds
from gid_yolo.engine.teacher_student import check_precision
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.validator import GIDValidator
from gid_yolo.engine.views import distillable
from gid_yolo.errors import UserError


@pytest.mark.parametrize("name", PAIRS)
def test_a_pass_in_bfloat16_is_near_and_handed_on_in_float32(name: str) -> None:
    model, images = make_pair(name), make_batch("cpu")["img"]
    features, raw = model.taught(images)
    model.precision = torch.bfloat16
    rounded, rounded_raw = model.taught(images)
    for exact, near in zip([*features, raw.logits], [*rounded, rounded_raw.logits], strict=True):
        assert near.dtype == torch.float32
        error = (near - exact).norm() / exact.norm()
        assert 0 < error < 0.25  # of scale alone: random networks, whose group norms blow up what was rounded
    assert rounded_raw.regression.dtype == torch.float32
    assert torch.isfinite(torch.stack([x.sum() for x in model.loss(make_batch("cpu"))[1].values()])).all()


def test_a_yolo_is_measured_on_the_boxes_that_it_teaches() -> None:
    model, images = make_pair("yolo11n.yaml"), make_batch("cpu")["img"]
    model.precision = torch.bfloat16
    teacher = distillable(model.teacher_model)
    with model.in_precision(images.device):
        detections = teacher.detections(images)
    taught = model.taught(images)[1]
    torch.testing.assert_close(detections[:, :4].mT, xyxy2xywh(taught.boxes), rtol=0, atol=1e-4)
    exact, (plain, _) = teacher.detections(images), teacher.model(images)  # Ultralytics' own, in float32
    torch.testing.assert_close(exact, plain, rtol=1e-5, atol=1e-4)


def test_float32_takes_the_teacher_out_of_the_runs_own_precision() -> None:
    model, images = make_pair("retina_nano"), make_batch("cpu")["img"]
    features, raw = model.taught(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.taught(images)[1].logits.dtype == torch.bfloat16  # as the student's
        model.precision = torch.float32
        kept, kept_raw = model.taught(images)
    assert all(torch.equal(x, y) for x, y in zip([*features, raw.logits], [*kept, kept_raw.logits], strict=True))


def test_a_teacher_of_another_kind_is_measured_by_its_own_limits(data, teacher, tmp_path, monkeypatch) -> None:
    used = []
    found = GIDValidator.postprocess
    monkeypatch.setattr(GIDValidator, "postprocess", lambda v, x: (used.append(v.args.iou), found(v, x))[1])
    settings = {**FAST, "model": "fcos_nano", "data": str(data), "teacher": str(teacher), "gid_response": 0}
    trainer = GIDTrainer(overrides={**settings, "save_dir": str(tmp_path / "run"), "epochs": 1})
    trainer.train()
    first, last = thresholds(model_config("retina_nano"))["iou"], thresholds(model_config("fcos_nano"))["iou"]
    assert first != last
    assert (used[0], used[-1]) == (first, last)


@pytest.mark.parametrize("own", ["bf16", None])
def test_the_preflight_measures_the_teacher_as_it_will_teach(data, teacher, tmp_path, monkeypatch, own) -> None:
    said = []
    info = LOGGER.info
    monkeypatch.setattr(LOGGER, "info", lambda text="", *a, **k: (said.append(str(text)), info(text, *a, **k)))
    seen = []
    settings = {**FAST, "model": "retina_nano", "data": str(data), "teacher": str(teacher), "gid_feature": 1e-6}
    trainer = GIDTrainer(
        overrides={**settings, "save_dir": str(tmp_path / "run"), "teacher_precision": own, "epochs": 1}
    )
    layer = "detector.head.cls_logits"

    def watch(t) -> None:
        module = t.model.teacher_model.get_submodule(layer)
        module.register_forward_hook(lambda _, __, out: seen.append((len(out), out.dtype)))
        t.amp = own is None  # which a CPU has in bfloat16

    trainer.add_callback("on_pretrain_routine_end", watch)
    trainer.train()
    said_so = "frozen, evaluation mode, bfloat16" in next(text for text in said if "Preflight" in text)
    assert said_so == (own is not None)
    # 5 levels of 4 validation and of 2 x 4 training images; one blank image asks for the anchors alone
    assert [dtype for count, dtype in seen if count == 4] == [torch.bfloat16] * (5 * 3)


def test_a_format_that_the_device_lacks_is_refused(data, teacher, monkeypatch) -> None:
    settings = {**FAST, "model": "retina_nano", "data": str(data), "teacher": str(teacher)}
    with pytest.raises(UserError, match="teacher_precision=fp16 needs a GPU: on a CPU give bf16"):
        GIDTrainer(overrides={**settings, "teacher_precision": "fp16"}).train()
    with pytest.raises(UserError, match="teacher_precision=fp8 is unknown: choose from fp32, bf16, fp16"):
        GIDTrainer(overrides={**settings, "teacher_precision": "fp8"})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(UserError, match="cuda:0 does not compute in bfloat16; give fp16"):
        check_precision("bf16", torch.device("cuda:0"))
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        check_precision("bf16", torch.device("cpu"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="this CPU has no instructions for bfloat16; leave it out"):
        check_precision("bf16", torch.device("cpu"))
    check_precision(None, torch.device("cuda:0"))

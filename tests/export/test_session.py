"""The runtime against stock `yolo predict`, on real exports."""

import subprocess
import sys

import cv2
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto
from runtime_helpers import META, NAMES, export, handmade, one_sentence, picture
from ultralytics import YOLO

import gid_yolo.export.providers as providers
import gid_yolo.export.session as session
from gid_yolo import GID
from gid_yolo.cfg import model_names
from gid_yolo.detectors import model_config
from gid_yolo.engine.config import thresholds
from gid_yolo.export.arguments import check_counts
from gid_yolo.export.metadata import _LIMITS, _NMS_IOU
from gid_yolo.export.providers import CUDA
from gid_yolo.export.session import OnnxDetector

SHAPES = [(96, 128), (81, 117), (300, 40), (31, 401), (5, 7), (640, 480), (1, 90)]  # odd, tall, wide, tiny, large
FILES = {  # the three layouts, fixed and open sizes and batches
    "retina": ("retina_nano", {"batch": 1}),
    "fcos": ("fcos_nano", {"dynamic": True}),
    "frcnn": ("frcnn_nano", {"batch": 1}),
    "yolo": ("yolo11n.yaml", {"batch": 3}),
    "nms": ("yolo11n.yaml", {"batch": 2, "nms": True, "dynamic": True, "conf": 1e-7}),
    "end2end": ("yolo26n.yaml", {"nms": False}),  # its NMS-free head
}
SIZE = [96, 128]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            name, arguments = FILES[kind]
            made[kind] = export(tmp_path_factory.mktemp(kind), name, SIZE, **arguments)
        return made[kind]

    return get


@pytest.fixture(params=FILES)
def file(request, files):
    return files(request.param)


def busy_conf(detector, image):
    """A threshold that leaves about a hundred candidates of an image."""
    output = detector.run(detector.prepare([image]))[0]
    scores = output[:, 4] if detector.info.final else output[4:].max(0)
    return float(np.sort(scores)[-min(100, len(scores))])


def equal(found, results):
    for ours, theirs in zip(found, results, strict=True):
        data = theirs.boxes.data.numpy()
        order = np.argsort(-data[:, 4], kind="stable")
        np.testing.assert_array_equal(ours.boxes, data[order, :4])
        np.testing.assert_array_equal(ours.scores, data[order, 4])
        np.testing.assert_array_equal(ours.classes, data[order, 5])


def stock(path, images, *, conf, iou, **arguments):
    return YOLO(path, task="detect").predict(images, conf=conf, iou=iou, imgsz=SIZE, verbose=False, **arguments)


def test_it_finds_what_yolo_predict_finds(file):
    images = [picture(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    conf = busy_conf(OnnxDetector(file, provider="cpu"), images[0])
    detector = OnnxDetector(file, provider="cpu", conf=conf, iou=0.45, max_det=60)
    found = detector(images)
    assert sum(len(one) for one in found) > 50
    assert len({int(c) for one in found for c in one.classes}) > 1
    model = YOLO(file, task="detect")
    arguments = {"conf": conf, "iou": 0.45, "max_det": 60, "imgsz": SIZE, "verbose": False}
    equal(found, [model.predict(image, **arguments)[0] for image in images])


@pytest.mark.parametrize("kind", ["yolo", "nms"])
def test_more_images_than_the_files_batch(files, kind):
    images = [picture(80, 100, seed=i) for i in range(5)]
    conf = busy_conf(OnnxDetector(files(kind), provider="cpu"), images[0])
    detector = OnnxDetector(files(kind), provider="cpu", conf=conf)
    assert detector.batch in (2, 3)
    equal(detector(images), stock(files(kind), images, conf=conf, iou=detector.iou))


def test_nms_inside_takes_no_more_than_it_was_unrolled_for(files):
    assert OnnxDetector(files("nms"), provider="cpu", batch=1).batch == 1
    one_sentence("takes 2 and no more images in a run", lambda: OnnxDetector(files("nms"), provider="cpu", batch=3))


def test_a_dynamic_file_takes_any_batch_and_each_image_stands_for_itself(files):
    images = [picture(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    conf = busy_conf(OnnxDetector(files("fcos"), provider="cpu"), images[0])
    singles = [OnnxDetector(files("fcos"), provider="cpu", conf=conf)(image)[0] for image in images]
    together = OnnxDetector(files("fcos"), provider="cpu", conf=conf, batch=16)(images)
    for one, other in zip(singles, together, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        np.testing.assert_array_equal(one.classes, other.classes)


def test_a_dynamic_file_with_full_padding_and_another_size(files):
    image = picture(60, 200)
    for rect in (True, False):
        conf = busy_conf(OnnxDetector(files("fcos"), provider="cpu"), image)
        detector = OnnxDetector(files("fcos"), provider="cpu", conf=conf, imgsz=150, rect=rect)
        assert detector.prepare([image]).shape == ((1, 3, 64, 160) if rect else (1, 3, 160, 160))
        model = YOLO(files("fcos"), task="detect")
        equal(detector(image), model.predict(image, conf=conf, iou=0.6, imgsz=160, rect=rect, verbose=False))


def test_a_mixed_batch_is_padded_as_stock_does(files):
    images = [picture(60, 200), picture(200, 60)]
    conf = busy_conf(OnnxDetector(files("fcos"), provider="cpu"), images[0])
    detector = OnnxDetector(files("fcos"), provider="cpu", conf=conf)
    batch = detector.prepare(images)
    assert batch.shape == (2, 3, *SIZE)
    found = detector.finish(detector.run(batch), batch.shape[2:], [image.shape for image in images])
    equal(found, stock(files("fcos"), images, conf=conf, iou=detector.iou))


def test_paths_arrays_grey_alpha_and_rgb_are_the_same_image(files, tmp_path):
    image = picture(70, 90)
    path = tmp_path / "ä.png"
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    detector = OnnxDetector(files("retina"), provider="cpu", conf=0.0)
    (expected,) = detector(image)
    alpha = np.dstack([image, np.full((70, 90), 7, np.uint8)])
    for found in (detector(path), detector([str(path)]), detector(alpha), detector(image[..., ::-1], rgb=True)):
        np.testing.assert_array_equal(found[0].boxes, expected.boxes)
    grey = image[..., 0]
    for found in (detector(grey), detector(grey[..., None]), detector(grey, rgb=True)):
        np.testing.assert_array_equal(found[0].boxes, detector(np.dstack([grey] * 3))[0].boxes)
    model = YOLO(files("retina"), task="detect")
    for given in (path, alpha, grey):
        equal(detector(given), model.predict(given, conf=0.0, iou=0.5, verbose=False))


def test_nothing_found_and_nothing_given(file):
    (found,) = OnnxDetector(file, provider="cpu", conf=1.0)(picture(50, 50))
    assert (found.boxes.shape, found.scores.shape, found.classes.shape, len(found)) == ((0, 4), (0,), (0,), 0)
    assert found.labels == []
    assert OnnxDetector(file, provider="cpu")([]) == []


def test_detections_are_sorted_named_and_typed(files):
    detector = OnnxDetector(files("retina"), provider="cpu", conf=0.0, max_det=7)
    (found,) = detector(picture(50, 80))
    assert len(found) == 7
    assert np.all(np.diff(found.scores) <= 0)
    assert found.labels == [NAMES[c] for c in found.classes.tolist()]
    assert (found.boxes.dtype, found.scores.dtype, found.classes.dtype) == (np.float32, np.float32, np.int64)
    assert repr(detector) == "OnnxDetector(retina_nano.onnx: 3 classes, 96x128, runs on CPUExecutionProvider)"
    assert detector.provider == "CPUExecutionProvider"
    assert (detector.info.final, detector.info.fixed_size, detector.info.batch) == (False, True, 1)


def test_nms_thresholds_are_those_of_the_checkpoints():
    heads = {"retina": "RetinaNet", "fcos": "FCOS"}
    for name in model_names():
        if head := heads.get(name.split("_")[0]):
            assert thresholds(model_config(name))["iou"] == _NMS_IOU[head], name
    assert thresholds({"head": []}) == _LIMITS


def test_heads_are_named_so_in_the_files(files):
    stored = [OnnxDetector(files(kind), provider="cpu") for kind in ("retina", "fcos", "yolo")]
    assert [detector.iou for detector in stored] == [0.5, 0.6, 0.7]


def test_a_file_says_the_limits_it_is_evaluated_with(files):
    for kind in ("retina", "fcos", "yolo"):
        name = FILES[kind][0]
        config = {"head": []} if name.startswith("yolo") else model_config(name)
        assert OnnxDetector(files(kind), provider="cpu").info.limits == thresholds(config)
        assert GID(str(files(kind)))._thresholds() == thresholds(config)  # what gid-val and gid-predict go by


def test_half_precision_input(tmp_path):
    path = handmade(tmp_path / "a.onnx", [2, 3, 64, 96], [2, 7, 5], dtype=TensorProto.FLOAT16)
    detector = OnnxDetector(path, provider="cpu", conf=0.0)
    batch = detector.prepare([picture(64, 96)])
    assert batch.dtype == np.float16
    assert detector.run(batch).shape == (1, 7, 5)
    (found,) = detector(picture(64, 96))
    assert found.scores.dtype == np.float32


def test_neither_torch_nor_ultralytics_is_imported(files, tmp_path):
    code = (
        "import sys, numpy\n"
        "import gid_yolo.export.session as s, gid_yolo.export.timing\n"
        "def wrong(): return sorted({n.split('.')[0] for n in sys.modules} & {'torch', 'torchvision', 'ultralytics'})\n"
        "assert not wrong(), wrong()\n"
        "found = s.OnnxDetector(sys.argv[1], provider='cpu', conf=0.0)(numpy.zeros((50, 60, 3), numpy.uint8))\n"
        "print(len(found[0]), wrong())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(files("retina"))], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "300 []"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist"),
        (b"", "is not an ONNX file that onnxruntime"),
        (b"nothing", "is not an ONNX file that onnxruntime"),
    ],
)
def test_what_is_no_onnx_file(tmp_path, content, sentence):
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    one_sentence(sentence, lambda: OnnxDetector(path, provider="cpu"))
    one_sentence("is not a file", lambda: OnnxDetector(tmp_path))


def test_a_truncated_file(tmp_path, files):
    path = tmp_path / "a.onnx"
    path.write_bytes(files("retina").read_bytes()[:100_000])
    one_sentence("is not an ONNX file that onnxruntime", lambda: OnnxDetector(path))


@pytest.mark.parametrize(
    ("shape", "output", "meta", "sentence"),
    [
        ([1, 3, 64, 96], [1, 7, 5], {}, "does not say what it detects (no names, imgsz, stride, batch, task"),
        ([1, 3, 64, 96], [1, 7, 5], META | {"task": "segment"}, "is a model for task=segment"),
        ([1, 3, 64, 96], [1, 7, 5], META | {"names": "round, tall"}, "its metadata cannot be read"),
        ([1, 3, 64, 96], [1, 7, 5], META | {"stride": "__import__('os')"}, "must be a whole number of at least 1"),
        ([1, 1, 64, 96], [1, 7, 5], META, "it must have one input of (batch, 3, height, width) floats"),
        ([1, 3, 64], [1, 7, 5], META, "it must have one input"),
        ([1, 3, 64, 96], [1, 300, 7], META, "where (batch, 4 + 3, boxes) is expected"),  # RT-DETR's
        ([1, 3, 64, 96], [1, 7], META, "where (batch, 4 + 3, boxes) is expected"),
        ([1, 3, 64, 96], [1, 7, 5], META | {"end2end": "True"}, "where (batch, detections, 6) is expected"),
    ],
)
def test_files_of_another_kind(tmp_path, shape, output, meta, sentence):
    path = handmade(tmp_path / "a.onnx", shape, output, meta=meta)
    one_sentence(sentence, lambda: OnnxDetector(path, provider="cpu"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"conf": 25}, "conf=25 must be a number from 0 to 1."),
        ({"iou": -0.1}, "iou=-0.1 must be a number from 0 to 1."),
        ({"max_det": 0}, "max_det=0 must be a whole number of at least 1."),
        ({"threads": 0}, "threads=0 must be a whole number of at least 1."),
        ({"threads": 100_000}, "threads=100000 must be at most"),
        ({"conf": None}, "conf=None must be a number from 0 to 1."),
        ({"batch": 0}, "batch=0 must be a whole number of at least 1."),
        ({"batch": 2}, "takes 1 and no other number of images in a run."),
        ({"imgsz": 320}, "takes 64x96 and no other size."),
        ({"imgsz": "big"}, "imgsz=big must be a whole number, or height and width."),
        ({"provider": "vulkan"}, "provider=vulkan is not known: cpu, cuda, tensorrt"),
        ({"provider": "cuda:x"}, "provider=cuda:x is not known"),
    ],
)
def test_bad_arguments(tmp_path, arguments, sentence):
    path = handmade(tmp_path / "a.onnx", [1, 3, 64, 96], [1, 7, 5])
    one_sentence(sentence, lambda: OnnxDetector(path, **{"provider": "cpu", **arguments}))


def test_threads_are_at_most_the_cores_of_this_process(tmp_path, monkeypatch):
    path = handmade(tmp_path / "a.onnx", [1, 3, 64, 96], [1, 7, 5])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    OnnxDetector(path, provider="cpu", threads=3)
    sentence = "threads=4 must be at most 3, the cores of this machine."
    one_sentence(sentence, lambda: OnnxDetector(path, provider="cpu", threads=4))
    one_sentence(sentence, lambda: check_counts([("threads", 4)], 0))
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    OnnxDetector(path, provider="cpu", threads=5)


def test_bad_images(tmp_path):
    detector = OnnxDetector(handmade(tmp_path / "a.onnx", [1, 3, 64, 96], [1, 7, 5]), provider="cpu")
    broken = tmp_path / "a.jpg"
    broken.write_bytes(b"nothing")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for image, sentence in [
        (tmp_path / "missing.jpg", "missing.jpg cannot be read: No such file or directory."),
        (tmp_path, "cannot be read: Is a directory."),
        (broken, "is not an image that OpenCV"),
        (tmp_path / "empty.jpg", "is not an image that OpenCV"),
        (np.zeros((4, 4, 3)), "must be uint8 (0 to 255), not float64"),
        (np.zeros((2, 4, 4, 3), np.uint8), "give several images as a list"),
        (np.zeros((4, 4, 2), np.uint8), "must be (height, width, 3)"),
        (np.zeros((0, 4, 3), np.uint8), "must be (height, width, 3)"),
        (3, "a path or a numpy array, not int"),
        ([None], "a path or a numpy array, not NoneType"),
    ]:
        one_sentence(sentence, lambda image=image: detector(image))
    one_sentence("the input must be (batch, 3, 64, 96)", lambda: detector.run(np.zeros((1, 3, 64, 64), np.float32)))
    one_sentence("the input must be (batch, 3, 64, 96)", lambda: detector.run(np.zeros((3, 64, 96), np.float32)))
    one_sentence("the input must be (batch, 3, 64, 96)", lambda: detector.run(np.zeros((0, 3, 64, 96), np.float32)))


def test_a_run_that_fails_is_one_sentence(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : k is too large.\nNode: 7")

    detector = OnnxDetector(handmade(tmp_path / "a.onnx", [1, 3, 64, 96], [1, 7, 5]), provider="cpu")
    monkeypatch.setattr(session, "run", fail)
    one_sentence("a.onnx fails on (1, 3, 64, 96): k is too large.", lambda: detector(picture(9, 9)))


def test_a_provider_that_is_not_there_is_refused(tmp_path, monkeypatch):
    path = handmade(tmp_path / "a.onnx", [1, 3, 64, 96], [1, 7, 5])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    one_sentence("pip install onnxruntime-openvino", lambda: OnnxDetector(path, provider="openvino"))
    one_sentence("pip install onnxruntime-gpu", lambda: OnnxDetector(path, provider="cuda"))
    one_sentence("pip install onnxruntime-gpu", lambda: OnnxDetector(path, provider="tensorrt"))
    assert OnnxDetector(path).provider == "CPUExecutionProvider"


@pytest.mark.skipif(providers.gpu_count() > 0, reason="this machine has a GPU")
def test_no_quiet_way_back_to_the_cpu(tmp_path, monkeypatch):
    path = handmade(tmp_path / "a.onnx", [1, 3, 64, 96], [1, 7, 5])
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("a build of onnxruntime without CUDA")
    one_sentence("provider=cuda needs a GPU", lambda: OnnxDetector(path, provider="cuda"))
    monkeypatch.setattr(providers, "gpu_count", lambda: 1)  # a driver, but no libraries of CUDA that fit
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    one_sentence("provider=cuda:1 does not exist: there are 1 GPUs", lambda: OnnxDetector(path, provider="cuda:1"))
    one_sentence("could not start CUDAExecutionProvider", lambda: OnnxDetector(path, provider="cuda"))
    one_sentence("TensorrtExecutionProvider does not start", lambda: OnnxDetector(path, provider="tensorrt"))
    broken = tmp_path / "b.onnx"
    broken.write_bytes(b"nothing")
    one_sentence("is not an ONNX file", lambda: OnnxDetector(broken, provider="tensorrt"))
    with pytest.warns(UserWarning, match="could not start CUDAExecutionProvider"):  # said, and then the next best
        assert OnnxDetector(path).provider == "CPUExecutionProvider"

"""What files say of themselves: ranges, and limits that are known or not; and outputs that are no numbers."""

import numpy as np
import pytest
from runtime_helpers import META, handmade, one_sentence

from gid_yolo.export.session import OnnxDetector


@pytest.mark.parametrize(
    ("meta", "sentence"),
    [
        ({"limits": "{'conf': -1}"}, "conf=-1 must be a number from 0 to 1."),
        ({"limits": "{'iou': 5}"}, "iou=5 must be a number from 0 to 1."),
        ({"limits": "{'iou': None}"}, "iou=None must be a number from 0 to 1."),
        ({"limits": "{'max_det': 0}"}, "max_det=0 must be a whole number of at least 1."),
        ({"limits": "7"}, "its metadata cannot be read"),
        ({"args": "{'nms': True, 'iou': 2}", "end2end": "True"}, "iou=2 must be a number from 0 to 1."),
        ({"stride": "0"}, "stride=0 must be a whole number of at least 1."),
        ({"stride": "None"}, "stride=None must be a whole number of at least 1."),
        ({"imgsz": "0"}, "imgsz=0 must be a whole number of at least 1."),
        ({"imgsz": "[64, -32]"}, "imgsz=-32 must be a whole number of at least 1."),
        ({"imgsz": "[64, 64, 64]"}, "its metadata cannot be read"),
        ({"batch": "0"}, "batch=0 must be a whole number of at least 1."),
    ],
)
def test_metadata_out_of_range(tmp_path, meta, sentence):
    path = handmade(
        tmp_path / "a.onnx", ["batch", 3, "height", "width"], [1, 6, 6], meta=META | {"names": "['a', 'b']"}
    )
    OnnxDetector(path, provider="cpu")
    path = handmade(
        tmp_path / "a.onnx", ["batch", 3, "height", "width"], [1, 6, 6], meta=META | {"names": "['a', 'b']"} | meta
    )
    one_sentence(f"a.onnx cannot be run: {sentence}", lambda: OnnxDetector(path, provider="cpu"))


@pytest.mark.parametrize(
    ("meta", "limits", "known"),
    [
        ({}, {"conf": 0.001, "iou": 0.7, "max_det": 300}, True),  # NMS outside goes by what is asked for
        ({"head": "FCOS", "args": "{'conf': 0.4}"}, {"conf": 0.001, "iou": 0.6, "max_det": 300}, True),
        ({"end2end": "True"}, {"conf": 0.001, "iou": 0.7, "max_det": 6}, True),  # no NMS at all
        ({"args": "{'nms': True}"}, {"conf": 0.001, "iou": 0.7, "max_det": 6}, False),
        ({"args": "{'nms': True, 'conf': 0.4}"}, {"conf": 0.4, "iou": 0.7, "max_det": 6}, False),
        ({"args": "{'nms': True, 'conf': 0.4, 'iou': 0.3}"}, {"conf": 0.4, "iou": 0.3, "max_det": 6}, True),
        (
            {"args": "{'nms': True}", "limits": "{'conf': 0.1, 'iou': 0.2, 'max_det': 5}"},
            {"conf": 0.1, "iou": 0.2, "max_det": 5},
            True,
        ),
    ],
)
def test_what_a_file_says_of_the_limits_of_its_nms(tmp_path, meta, limits, known):
    path = handmade(tmp_path / "a.onnx", [1, 3, 64, 96], [1, 6, 6], meta=META | {"names": "['a', 'b']"} | meta)
    info = OnnxDetector(path, provider="cpu").info
    assert (dict(info.limits), info.limits_known) == (limits, known)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("final", [False, True])
def test_values_that_are_not_finite_are_no_result(tmp_path, final, value):
    meta = META | {"names": "['a', 'b']", "end2end": str(final)}
    detector = OnnxDetector(handmade(tmp_path / "a.onnx", [1, 3, 64, 96], [1, 6, 6], meta=meta), provider="cpu")
    sentence = "a.onnx gives values that are not finite: its weights or its precision are broken, export it again."
    for place, score in ((4, 0.9), (4, 0.1), (0, 0.9), (0, 0.1)):
        output = np.full((1, 6, 6), 0.1, np.float32)
        rows = output if final else output.transpose(0, 2, 1)
        rows[0, 2, 4] = score
        rows[0, 2, place] = value
        if place == 0 and score == 0.1:  # no detection
            assert not len(detector.finish(output, (64, 96), [(64, 96)])[0])
        else:
            one_sentence(sentence, lambda given=output: detector.finish(given, (64, 96), [(64, 96)]))

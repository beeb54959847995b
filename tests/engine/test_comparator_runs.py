"""The methods GID is compared with, through the command that trains."""

import csv

import pytest
from engine_helpers import FAST

from gid_yolo import GID
from gid_yolo.errors import UserError

TERMS = {"gid": {"feat_loss", "rel_loss", "resp_loss", "gi_pos", "gi_semi", "gi_neg"}}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, data) -> dict[str, str]:
    files = {}
    for name in ("retina_nano", "fcos_nano", "frcnn_nano", "yolo11n.yaml"):
        folder = tmp_path_factory.mktemp(name.partition(".")[0])
        GID(name).train(**FAST, data=str(data), save_dir=str(folder))
        files[name] = str(folder / "weights" / "best.pt")
    return files


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("retina_nano", "fitnet"),
        ("retina_nano", "fine_grained"),
        ("fcos_nano", "gid+fitnet"),
        ("frcnn_nano", "mimicking"),
        ("frcnn_nano", "gid+fitnet+fine_grained+mimicking"),
        ("yolo11n.yaml", "fitnet"),
    ],
)
def test_a_method_trains_a_detector_it_applies_to(data, tmp_path, teachers, name: str, methods: str) -> None:
    GID(name).train(
        **FAST, data=str(data), teacher=teachers[name], distill=methods, save_dir=str(tmp_path), gid_visualize_every=2
    )
    with (tmp_path / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    logged = {key.removeprefix("train/") for key in row if key.startswith("train/")}
    for method in ("gid", "fitnet", "fine_grained", "mimicking"):
        terms = TERMS.get(method, {f"{method}_loss"})
        assert terms <= logged if method in methods.split("+") else not terms & logged
        assert all(float(row[f"train/{term}"]) > 0 for term in terms & logged if term.endswith("_loss"))
    assert (tmp_path / "gi_types.csv").is_file() == methods.startswith("gid")


@pytest.mark.parametrize(
    ("name", "teacher", "methods", "says"),
    [
        ("fcos_nano", "fcos_nano", "fine_grained", "by anchors, which a fcos does not have"),
        ("yolo11n.yaml", "yolo11n.yaml", "fine_grained", "by anchors, which a yolo does not have"),
        (
            "retina_nano",
            "frcnn_nano",
            "fine_grained",
            "needs the same anchors, but the teacher is a faster_rcnn .*use fitnet, or gid",
        ),
        ("retina_nano", "retina_nano", "mimicking", "the student is a retinanet and the teacher a retinanet"),
        ("retina_nano", "retina_nano", "gid+hint", "distill=gid.hint names hint"),
    ],
)
def test_a_method_that_does_not_apply_is_refused(data, teachers, name, teacher, methods, says) -> None:
    with pytest.raises(UserError, match=says):
        GID(name).train(**FAST, data=str(data), teacher=teachers[teacher], distill=methods)

import shutil

import cv2
import numpy as np
import pytest
import torch
from engine_helpers import FAST
from ultralytics.data.augment import LetterBox

from gid_yolo import GID
from gid_yolo.analysis.visualize import _images, _prepare, visualize
from gid_yolo.cli import main
from gid_yolo.errors import UserError


def greens(path) -> int:
    """Pixels of pure green in the left half, which only ground truth has on these grey images."""
    picture = cv2.imread(str(path))
    left = picture[:, : picture.shape[1] // 2]
    return int((left == (0, 255, 0)).all(-1).sum())


@pytest.mark.parametrize("teacher", ["retina_nano", "fcos_nano"])  # aligned, and paired by overlap
def test_a_picture_for_every_image(data, checkpoints, tmp_path, teacher: str) -> None:
    models = f"model={checkpoints['retina_nano']}", f"teacher={checkpoints[teacher]}"
    source = f"source={data.parent / 'images' / 'val'}"
    assert main(["visualize", *models, source, f"project={tmp_path}", "name=figures"]) == 0
    pictures = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in pictures] == ["0.png", "1.png", "2.png", "3.png"]
    for path in pictures:
        assert cv2.imread(str(path)).shape == (640, 1280, 3)  # 64 px enlarged to 640, two beside each other
        assert greens(path) > 0


def test_sizes_fit_the_strides_of_both_models(data, checkpoints, tmp_path) -> None:
    GID("yolo11n.yaml").train(**FAST, data=str(data), save_dir=str(tmp_path / "yolo"))
    yolo = tmp_path / "yolo" / "weights" / "best.pt"
    source = data.parent / "images" / "val" / "0.png"
    settings = {"source": source, "imgsz": 100, "project": str(tmp_path), "name": "figures"}
    assert len(visualize(model=yolo, teacher=checkpoints["retina_nano"], **settings)) == 1  # 128 px


def test_without_labels_there_is_no_ground_truth(data, checkpoints, tmp_path) -> None:
    shutil.copy(data.parent / "images" / "val" / "0.png", tmp_path / "alone.png")
    model = GID(checkpoints["retina_nano"])
    (picture,) = model.visualize(
        checkpoints["retina_nano"], tmp_path / "alone.png", project=str(tmp_path), name="x", imgsz=64
    )
    assert greens(picture) == 0


def test_ground_truth_lies_where_the_image_does() -> None:
    # 100 x 50 px at 64 px: scaled by 0.64 to 64 x 32, which needs no padding to a multiple of 32
    image = np.zeros((50, 100, 3), dtype=np.uint8)
    image[10:30, 20:60] = (0, 0, 255)  # red in BGR
    boxes = np.array([[0.4, 0.4, 0.4, 0.4]], dtype=np.float32)  # x 20 to 60, y 10 to 30
    images, targets = _prepare(image, boxes, LetterBox(64, auto=True, stride=32), torch.device("cpu"))
    assert images.shape == (1, 3, 32, 64)
    assert images[0, :, 12, 25].tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(targets.boxes, torch.tensor([[[12.8, 6.4, 38.4, 19.2]]]))
    # 100 x 75 px: 64 x 48, padded by 8 above and below
    images, targets = _prepare(np.zeros((75, 100, 3), np.uint8), boxes, LetterBox(64, auto=True, stride=32), "cpu")
    torch.testing.assert_close(targets.boxes, torch.tensor([[[12.8, 17.6, 38.4, 36.8]]]))


def test_images_of_one_name_do_not_overwrite_each_other(data, tmp_path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(data.parent / "images" / "val" / "0.png", tmp_path / folder / "same.png")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{tmp_path}/a/same.png\n{tmp_path}/b/same.png\n")
    assert [name for name, *_ in _images(str(listed))] == ["same", "same_2"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"source": "nowhere/"}, "source=nowhere/ cannot be read"),
        ({"source": "."}, "cannot be read"),
        ({"gid_top_k": 0}, "gid_top_k=0 must be"),
        ({"gid_topk": 3}, "gid_top_k"),
    ],
)
def test_what_cannot_be_drawn(checkpoints, data, tmp_path, monkeypatch, arguments, says: str) -> None:
    monkeypatch.chdir(tmp_path)  # a folder without images
    given = {"source": data.parent / "images" / "val", **arguments}
    with pytest.raises(UserError, match=says):
        visualize(model=checkpoints["retina_nano"], teacher=checkpoints["retina_nano"], **given)


def test_labels_that_are_no_numbers_are_named(checkpoints, tmp_path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    cv2.imwrite(str(tmp_path / "images" / "x.png"), np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "labels" / "x.txt").write_text("0 0.5 half 0.1 0.1\n")
    with pytest.raises(UserError, match=r"labels/x\.txt cannot be read as labels .*half"):
        visualize(
            model=checkpoints["retina_nano"],
            teacher=checkpoints["retina_nano"],
            source=tmp_path / "images",
            project=str(tmp_path),
        )


def test_the_command_asks_for_what_it_needs(capsys, checkpoints) -> None:
    assert main(["visualize", f"model={checkpoints['retina_nano']}", "source=x"]) == 2
    assert "teacher= is missing" in capsys.readouterr().err
    assert main(["visualize", f"model={checkpoints['retina_nano']}", "teacher=x.pt"]) == 2
    assert "source= is missing" in capsys.readouterr().err

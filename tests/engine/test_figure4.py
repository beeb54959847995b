import numpy as np
import torch
from engine_helpers import FAST

from gid_yolo import GID
from gid_yolo.engine.figure4 import CYAN, GREEN, GREY, RED, SMALLEST, YELLOW, draw, heat_map, painted_boxes


def test_a_cell_heats_its_place() -> None:
    # Two levels with two anchors a cell: (4 * 4 + 2 * 2) * 2 = 40 predictions. The second anchor of the cell in row 1,
    # column 2 of the first level, number (1 * 4 + 2) * 2 + 1, covers the pixels 8 to 11 across and 4 to 7 down
    scores = torch.zeros(40)
    scores[13] = 0.8
    heat = heat_map(scores, [(4, 4), (2, 2)], (16, 16))
    assert heat.shape == (16, 16)
    row, column = divmod(int(heat.argmax()), 16)
    assert 4 <= row < 8
    assert 8 <= column < 12
    # A cell of the second level is 8 px wide: row 1, column 0 after the 32 of the first level
    scores = torch.zeros(40)
    scores[32 + (1 * 2 + 0) * 2] = 0.5
    row, column = divmod(int(heat_map(scores, [(4, 4), (2, 2)], (16, 16)).argmax()), 16)
    assert row >= 8
    assert column < 8


def test_the_hottest_level_shows() -> None:
    scores = torch.full((20,), 0.25)
    scores[16:] = 0.75
    torch.testing.assert_close(heat_map(scores, [(4, 4), (2, 2)], (8, 12)), torch.full((8, 12), 0.75))


def test_boxes_are_painted_by_their_largest_score() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 2], [2, 0, 6, 3], [-5, -5, -1, -1]])
    expected = np.zeros((4, 8), dtype=np.float32)
    expected[0:3, 2:6] = 0.25
    expected[0:2, 0:4] = 0.5
    assert painted_boxes(torch.tensor([0.5, 0.25, 1.0]), boxes, (4, 8)).numpy().tolist() == expected.tolist()
    assert not painted_boxes(torch.zeros(0), torch.zeros(0, 4), (4, 8)).any()


def test_colours_say_what_a_box_is() -> None:
    image = torch.zeros(3, SMALLEST, SMALLEST)  # not enlarged
    lefts = [10, 110, 210, 310, 410]
    boxes = torch.tensor([[x, 10.0, x + 50, 60.0] for x in lefts])
    picture = draw(image, boxes[:1], boxes[1:], torch.tensor([0, 1, 2, -1]), torch.zeros(SMALLEST, SMALLEST))
    assert picture.shape == (SMALLEST, 2 * SMALLEST, 3)
    assert [tuple(picture[30, x].tolist()) for x in lefts] == [GREEN, RED, YELLOW, CYAN, GREY]
    unknown = draw(image, boxes[:0], boxes, None, torch.zeros(SMALLEST, SMALLEST))
    assert {tuple(unknown[30, x].tolist()) for x in lefts} == {GREY}


def test_red_stays_red() -> None:
    image = torch.zeros(3, 320, 320)
    image[0] = 1.0  # RGB; the picture is BGR, twice as large
    picture = draw(image, torch.zeros(0, 4), torch.zeros(0, 4), None, torch.zeros(320, 320))
    assert picture.shape == (640, 1280, 3)
    assert tuple(picture[5, 5].tolist()) == RED


def test_pictures_are_drawn_during_training(data, tmp_path) -> None:
    GID("retina_nano").train(**FAST, data=str(data), save_dir=str(tmp_path / "teacher"))
    settings = {**FAST, "epochs": 2, "data": str(data), "teacher": str(tmp_path / "teacher" / "weights" / "best.pt")}
    GID("retina_nano").train(**settings, save_dir=str(tmp_path / "student"), gid_visualize_every=3)
    # Two epochs of two iterations, numbered from 0
    assert sorted(path.name for path in (tmp_path / "student" / "gi").iterdir()) == ["000000.png", "000003.png"]

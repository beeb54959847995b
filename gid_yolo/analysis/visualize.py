"""`gid-visualize`: figure 4 of the paper for a student, its teacher, and images of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from ultralytics.cfg import get_save_dir
from ultralytics.data.augment import LetterBox
from ultralytics.data.loaders import LoadImagesAndVideos
from ultralytics.data.utils import img2label_paths
from ultralytics.utils import LOGGER
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.instance import Instances
from ultralytics.utils.torch_utils import select_device

from gid_yolo.data.labels import read_boxes
from gid_yolo.distill.gism import select_general_instances
from gid_yolo.distill.pairing import pair_predictions
from gid_yolo.distill.types import TYPES, classify, count_types
from gid_yolo.engine.checkpoint import load_model
from gid_yolo.engine.config import check_keys
from gid_yolo.engine.figure4 import figure, write_picture
from gid_yolo.engine.modes import check_use, with_defaults
from gid_yolo.engine.preflight import misalignment
from gid_yolo.engine.teacher import share_classes
from gid_yolo.engine.teacher_student import freeze_teacher
from gid_yolo.engine.values import check_texts, check_values
from gid_yolo.engine.views import distillable
from gid_yolo.errors import UserError
from gid_yolo.ops.structures import Targets


@torch.no_grad()
def visualize(*, model: str | Path, teacher: str | Path, source: str | Path, **kwargs: Any) -> list[Path]:
    """Draw every image of `source` with its general instances, and the heat map of the GI score beside it.

    Ground truth is green; positive, semi-positive and negative instances are red, yellow and cyan, others grey. Ground
    truth is read from the label files that belong to the images by Ultralytics' convention (`labels/` beside
    `images/`); without one, types are unknown and all instances grey.

    Args:
        model: Checkpoint of the student.
        teacher: Checkpoint of the teacher.
        source: An image, a folder, a glob pattern, or a text file of paths.
        **kwargs: Arguments of `gid-train` that bear on it: imgsz, device, trust, gid_top_k, gid_iou, project, name,
            exist_ok.

    Returns:
        The pictures.

    Raises:
        UserError: Models or images that cannot be used.
    """
    check_keys(kwargs)
    check_texts({"teacher": teacher, "source": source}, ("source",))
    check_values(kwargs)
    check_use("visualize", kwargs)
    trust = kwargs.get("trust", False)
    student_model, teacher_model = load_model(model, trust=trust)[0], load_model(teacher, "teacher", trust)[0]
    args = with_defaults({"imgsz": student_model.args.get("imgsz", 640), **kwargs, "mode": "visualize"})
    check_values(vars(args))
    folder = get_save_dir(args, name=args.name or "visualize")
    device = select_device(args.device, verbose=False)
    networks = [freeze_teacher(network).to(device) for network in (teacher_model, student_model)]
    views = [distillable(network) for network in networks]
    if reason := misalignment(*networks):
        LOGGER.warning(f"{reason}: instances are paired by overlap.")
    shared = share_classes(teacher_model.names, student_model.names)
    index = (None, None) if shared is None else (shared.teacher, shared.student)
    chosen = [None if i is None else torch.tensor(i, device=device) for i in index]
    stride = max(int(network.stride.max()) for network in networks)
    letterbox = LetterBox(check_imgsz(args.imgsz, stride, min_dim=2), auto=True, stride=stride)

    pictures, counts = [], torch.zeros(len(TYPES))
    for name, image, labels in _images(source):
        images, targets = _prepare(image, labels, letterbox, device)
        outputs = [view.raw(images) for view in views]
        raws = [raw.select_classes(i) for (_, raw), i in zip(outputs, chosen, strict=True)]
        predictions = raws[0].scores, raws[1].scores, raws[0].boxes, raws[1].boxes
        found = select_general_instances(
            *(pair_predictions(*predictions) if reason else predictions),
            top_k=args.gid_top_k,
            iou_threshold=args.gid_iou,
        )
        if targets is not None:
            found = classify(found, targets)
            counts += torch.stack(list(count_types(found).values())).cpu()  # of one image
        shapes = None if reason else [(x.shape[-2], x.shape[-1]) for x in outputs[1][0]]
        picture = figure(0, images, (raws[0], raws[1]), found, targets, shapes)
        pictures.append(write_picture(folder / f"{name}.png", picture))
    if not pictures:
        raise UserError(f"source={source} holds no image that can be read.")
    total = ", ".join(f"{int(n)} {name}" for name, n in zip(TYPES, counts, strict=True))
    LOGGER.info(f"{len(pictures)} pictures in {folder} ({total}; red, yellow, cyan; ground truth green)")
    return pictures


def _images(source: str | Path) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.float32] | None]]:
    """(file name, BGR image, (M, 4) normalised xywh boxes or None) of every image of `source`."""
    try:
        loader = LoadImagesAndVideos(source)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UserError(f"source={source} cannot be read: {' '.join(str(error).split())}") from error
    if loader.video_flag and any(loader.video_flag):
        raise UserError(f"source={source} holds a video: give images.")
    seen: dict[str, int] = {}
    for paths, images, _ in loader:
        for path, image in zip(paths, images, strict=True):
            stem = Path(path).stem
            seen[stem] = seen.get(stem, 0) + 1
            yield stem if seen[stem] == 1 else f"{stem}_{seen[stem]}", image, _labels(path)


def _labels(image: str) -> NDArray[np.float32] | None:
    """The boxes of an image's label file; None where there is none.

    Raises:
        UserError: Its lines are neither boxes nor polygons.
    """
    path = Path(img2label_paths([image])[0])
    if not path.is_file() or path == Path(image):
        return None
    try:
        return np.array(read_boxes(path), dtype=np.float32).reshape(-1, 4)
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read as labels ({error}): a line is class x y width height, or class x1 y1 x2 y2 ..."
        ) from error


def _prepare(
    image: NDArray[np.uint8], boxes: NDArray[np.float32] | None, letterbox: LetterBox, device: torch.device
) -> tuple[Tensor, Targets | None]:
    """The network's input (1, 3, H, W), and the ground truth in its pixels."""
    known = np.zeros((0, 4), dtype=np.float32) if boxes is None else boxes
    labels = letterbox({"img": image, "instances": Instances(known, bbox_format="xywh", normalized=True)})
    pixels = torch.from_numpy(np.ascontiguousarray(labels["img"][..., ::-1])).to(device)  # (H, W, 3) RGB
    images = pixels.permute(2, 0, 1)[None].float() / 255
    if boxes is None:
        return images, None
    truth = torch.from_numpy(labels["instances"].bboxes).to(images)  # (M, 4) xyxy in pixels
    image_index = torch.zeros(len(truth), device=device)
    return images, Targets.from_flat(truth, image_index, image_index, 1)

"""Ultralytics' validation, and the paper's ten columns beside it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from torch import distributed as dist
from ultralytics.engine import validator as ultralytics_validator
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import LOGGER, RANK, ops

from gid_yolo.engine.coco_eval import CocoAccumulator, format_row
from gid_yolo.engine.config import ultralytics_args
from gid_yolo.engine.detection_model import limited
from gid_yolo.engine.matches import FILE, write_matches
from gid_yolo.engine.unusable import reading
from gid_yolo.files import replaced


class GIDValidator(DetectionValidator):
    """Measures Ultralytics' metrics during training, and COCO's ten columns in every other validation.

    Attributes:
        columns: The ten columns in percent after a validation outside training, else None.
    """

    def __init__(self, dataloader: Any = None, save_dir: Any = None, args: Any = None, _callbacks: Any = None) -> None:
        args = ultralytics_args(args if isinstance(args, dict) else vars(args)) if args is not None else None
        super().__init__(dataloader, save_dir, args, _callbacks)
        self.columns: dict[str, float] | None = None
        self.coco = CocoAccumulator(0)
        self.limits = contextlib.ExitStack()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Validate by the arguments' limits, which the model then forgets."""
        with self.limits:
            return super().__call__(*args, **kwargs)

    def get_model(self, model: Any, trainer: Any, **kwargs: Any) -> Any:
        """Ultralytics' hook before it loads a file, for which it takes it that a process of several has a GPU."""
        if trainer is None and RANK != -1 and str(self.args.device) == "cpu":
            ultralytics_validator.RANK = -1  # until `init_metrics`, so that it is loaded to the CPU
        return super().get_model(model, trainer, **kwargs)

    def build_dataset(self, img_path: str, mode: str = "val", batch: int | None = None) -> Any:
        """Ultralytics' data set, whose labels are kept in our caches."""
        with reading(self.args.data, self.args.split):
            return super().build_dataset(img_path, mode, batch)

    def init_metrics(self, model: Any) -> None:
        """Start empty; the model is loaded by now."""
        ultralytics_validator.RANK = RANK
        super().init_metrics(model)
        # Of several processes the first one evaluates all images, at the end
        self.columns, self.coco = None, CocoAccumulator(self.nc, beside=RANK == -1 and not self.training)
        network = model.model if getattr(model, "format", None) == "pt" else model
        args = self.args
        self.limits.enter_context(limited(network, conf=args.conf, iou=args.iou, max_det=args.max_det))

    def postprocess(self, preds: Any) -> list[dict[str, Any]]:
        """Ultralytics' NMS, image by image: of a batch it silently leaves out the images past a time limit."""
        found = preds[0] if isinstance(preds, list | tuple) else preds
        return [detections for image in found.split(1) for detections in super(GIDValidator, self).postprocess(image)]

    def update_metrics(self, preds: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        """Add a batch to both evaluations."""
        super().update_metrics(preds, batch)
        if self.training:
            return
        for i, pred in enumerate(preds):
            truth = self._prepare_batch(i, batch)
            found = self.scale_preds(pred, truth)
            boxes = ops.scale_boxes(
                truth["imgsz"], truth["bboxes"].clone(), truth["ori_shape"], ratio_pad=truth["ratio_pad"]
            )
            arrays = (boxes, truth["cls"], found["bboxes"], found["conf"], found["cls"])
            self.coco.add(*(x.float().cpu().numpy() for x in arrays), name=str(batch["im_file"][i]))

    def gather_stats(self) -> None:
        """Bring the images of all processes to the first one."""
        super().gather_stats()
        if RANK != -1 and not self.training:
            parts: list[Any] | None = [None] * dist.get_world_size() if RANK == 0 else None
            dist.gather_object(self.coco, parts, dst=0)
            if parts:
                self.coco = CocoAccumulator.merged(parts)

    def print_results(self) -> None:
        """Ultralytics' table, then the ten columns as one row, saved as `coco_metrics.json` beside their matches."""
        super().print_results()
        if self.training:
            return
        self.columns = self.coco.columns()
        LOGGER.info(format_row(self.columns, str(self.args.split)))
        write_matches(self.coco.matches(), self.save_dir / FILE)  # first: who finds the columns finds both
        path = self.save_dir / "coco_metrics.json"
        text = json.dumps({"split": self.args.split, "images": self.seen, **self.columns}, indent=2) + "\n"
        with replaced(path) as part:
            part.write_text(text)

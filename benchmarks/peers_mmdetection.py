r"""Converted detectors against mmdetection 3.x or 2.x, with random weights: the largest differences of outputs.

Their wheels are enough, on a CPU, without compiled operators; in a folder of their own they bring no other torch:

    pip install --target mm3 --no-deps mmdet==3.3.0 mmengine==0.10.7 mmcv-lite==2.1.0 addict yapf platformdirs tomli \
        termcolor rich markdown-it-py mdurl pygments terminaltables shapely scipy six
    PYTHONPATH=mm3 python benchmarks/peers_mmdetection.py

    echo "setuptools<70" > old.txt
    MMCV_WITH_OPS=0 PIP_CONSTRAINT=$PWD/old.txt pip install --target mm2 --no-deps mmdet==2.28.2 mmcv==1.7.2 addict \
        yapf platformdirs tomli terminaltables pycocotools scipy six
    PYTHONPATH=mm2 python benchmarks/peers_mmdetection.py
"""

import argparse
import logging
import sys
import types
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import HEADER, HEIGHT, WIDTH, final_difference, flat, line, shake, spread
from torch import Tensor, nn
from torchvision import ops

from gid_yolo.detectors.convert.mmdetection import convert_mmdetection

NAMES_2 = (
    "retinanet/retinanet_r50_fpn_1x_coco",
    "retinanet/retinanet_r101_caffe_fpn_1x_coco",
    "fcos/fcos_r50_caffe_fpn_gn-head_1x_coco",
    "fcos/fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco",
    "faster_rcnn/faster_rcnn_r50_caffe_fpn_1x_coco",
    "faster_rcnn/faster_rcnn_r101_fpn_1x_coco",
)
NAMES_3 = (
    "retinanet/retinanet_r50_fpn_1x_coco",
    "retinanet/retinanet_r50-caffe_fpn_1x_coco",
    "retinanet/retinanet_r101_fpn_1x_coco",
    "retinanet/retinanet_r101-caffe_fpn_1x_coco",
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco",
    "fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco",
    "fcos/fcos_r101-caffe_fpn_gn-head-1x_coco",
    "fcos/fcos_r101_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco",
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
    "faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco",
    "faster_rcnn/faster-rcnn_r101_fpn_1x_coco",
    "faster_rcnn/faster-rcnn_r101-caffe_fpn_1x_coco",
)


class RoIAlign(nn.Module):
    """The operator of mmcv by torchvision's, with mmcv's defaults."""

    def __init__(
        self,
        output_size: int,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        pool_mode: str = "avg",
        aligned: bool = True,
        use_torchvision: bool = False,
    ) -> None:
        super().__init__()
        assert pool_mode == "avg"
        self.output_size = (output_size, output_size)
        self.rest = (spatial_scale, sampling_ratio, aligned)

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Crops of (N, 5) boxes."""
        return ops.roi_align(features, rois, self.output_size, *self.rest)


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, cfg: Any, class_agnostic: bool = False) -> Any:
    """The function of mmcv by torchvision's."""
    assert cfg["type"] == "nms"
    assert not class_agnostic
    keep = ops.batched_nms(boxes.double(), scores.double(), groups, cfg["iou_threshold"])
    return torch.cat([boxes[keep], scores[keep, None]], -1), keep


class Operators(types.ModuleType):
    """`mmcv.ops`, whose compiled operators are not in mmcv-lite: two of them, and an empty class for any other."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = {"RoIAlign": RoIAlign, "batched_nms": batched_nms}
        return known.get(name) or type(name, (nn.Module,), {})


class Finder(MetaPathFinder, Loader):
    """Finds `Operators` under the name of `mmcv.ops` and of every module in it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Theirs alone."""
        return ModuleSpec(name, self, is_package=True) if f"{name}.".startswith("mmcv.ops.") else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """Nothing to read."""
        return Operators(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def prepare() -> Any:
    """mmdetection, importable without compiled operators."""
    sys.meta_path.insert(0, Finder())
    try:
        import mmdet
        import mmdet.models
    except ImportError as error:
        sys.exit(f"mmdetection cannot be imported ({error}): see --help.")
    if mmdet.__version__ >= "3":
        mmdet.utils.register_all_modules()
    return mmdet


def read(path: Path) -> Any:
    """One of their configurations."""
    try:
        from mmengine.config import Config
    except ImportError:
        from mmcv import Config
    return Config.fromfile(path)


def build(config: Any) -> nn.Module:
    """Their model with random weights, norms that are no identity, and outputs that deviate."""
    from mmdet import models

    torch.manual_seed(0)
    config.model.backbone.init_cfg = None  # which would be fetched
    if config.model.type != "FasterRCNN":
        config.model.test_cfg.nms_pre = 10**6  # of each level; here that is left to the caller of the NMS
    built = models.build_detector(config.model) if hasattr(models, "build_detector") else registered(config.model)
    model: Any = shake(built)
    model.img_norm_cfg = config.get("img_norm_cfg")  # 2.x normalises outside of the model
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        elif name.startswith("bbox_head.scales."):
            module.scale.data.uniform_(0.8, 1.2)
    image = torch.rand(3, HEIGHT, WIDTH)
    for layer, deviation, middle in last_layers(model):
        layer.bias.data.fill_(middle)
        spread(layer, deviation, lambda: predict(model, image))
        if isinstance(layer, nn.Conv2d) and hasattr(model, "rpn_head"):
            centre(layer, lambda: predict(model, image))
    return model


def registered(config: Any) -> nn.Module:
    """A model of 3.x."""
    from mmdet.registry import MODELS

    return MODELS.build(config)


def centre(layer: Any, run: Callable[[], Any]) -> None:
    """Set the mean of a last layer's outputs to 0: many objectness scores near 1 have no order in float32."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output[0].flatten(1)))
    run()
    layer.bias.data -= torch.cat(outputs, 1).mean(1)
    handle.remove()


def last_layers(model: Any) -> list[tuple[Any, float, float]]:
    """Every last layer with the deviation and the middle that its outputs are to have."""
    if hasattr(model, "roi_head"):
        box = model.roi_head.bbox_head
        return [
            (model.rpn_head.rpn_cls, 2.0, 0),
            (model.rpn_head.rpn_reg, 0.3, 0),
            (box.fc_cls, 3.0, 0),
            (box.fc_reg, 1.0, 0),
        ]
    head = model.bbox_head
    if not hasattr(head, "conv_centerness"):
        return [(head.retina_cls, 2.0, -4.0), (head.retina_reg, 0.3, 0)]
    distance = (1.5, 2.0) if head.norm_on_bbox else (0.5, 3.5)  # strides, or logarithms of pixels
    return [(head.conv_cls, 2.0, -4.0), (head.conv_reg, *distance), (head.conv_centerness, 1.0, 0)]


@torch.no_grad()
def predict(model: Any, image: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Their normalised input and their detections (boxes, scores, classes) of an RGB image in [0, 1]."""
    bgr = image.flip(0) * 255
    meta = {"img_shape": (HEIGHT, WIDTH), "ori_shape": (HEIGHT, WIDTH), "scale_factor": (1.0, 1.0)}
    if model.img_norm_cfg:
        import mmcv

        pixels = mmcv.imnormalize(
            bgr.permute(1, 2, 0).numpy(), **{k: np.array(v) for k, v in model.img_norm_cfg.items()}
        )
        inputs = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        classes = model.simple_test(inputs, [meta], rescale=False)[0]  # (N, 5) of each
        found = torch.from_numpy(np.concatenate(classes))
        labels = [label for label, rows in enumerate(classes) for _ in rows]
        return inputs, (found[:, :4], found[:, 4], torch.tensor(labels))
    from mmdet.structures import DetDataSample

    sample = DetDataSample()
    sample.set_metainfo(meta)
    data = model.data_preprocessor({"inputs": [bgr], "data_samples": [sample]})
    instances = model.predict(data["inputs"], data["data_samples"], rescale=False)[0].pred_instances
    return data["inputs"], (instances.bboxes, instances.scores, instances.labels)


def theirs(model: Any, pyramid: list[Tensor]) -> dict[str, Tensor]:
    """Outputs by name; of FCOS points for anchors, boxes for deltas, and the centre-ness behind the logits."""
    dense = not hasattr(model, "rpn_head")
    head = model.bbox_head if dense else model.rpn_head
    logits, deltas, *centerness = head(pyramid)
    priors = torch.cat(head.prior_generator.grid_priors([x.shape[-2:] for x in pyramid], device="cpu"))
    count = head.prior_generator.num_base_priors[0]
    outputs = {
        "anchors": priors,
        "logits": torch.cat([flat(x, count) for x in logits], 1),
        "deltas": torch.cat([flat(x, count) for x in deltas], 1),
    }
    if centerness:
        outputs["logits"] = torch.cat([outputs["logits"], torch.cat([flat(x, 1) for x in centerness[0]], 1)], -1)
        outputs["deltas"] = head.bbox_coder.decode(priors, outputs["deltas"][0])[None]
    return outputs


def values(raw: Any) -> dict[str, Tensor]:
    """Ours, as `theirs`."""
    if raw.centerness is None:
        return {"anchors": raw.priors, "logits": raw.logits, "deltas": raw.regression}
    points = (raw.priors[:, :2] + raw.priors[:, 2:]) / 2
    return {"anchors": points, "logits": torch.cat([raw.logits, raw.centerness[..., None]], -1), "deltas": raw.boxes}


def selected(ours: Any, images: Tensor, test: Any) -> Tensor:
    """(N, 6) final detections of ours, of a dense head by the thresholds and the NMS of their configuration."""
    if ours.end2end:
        return ours(images)[0]
    scores = ours.raw(images)[1].scores[0]  # (R, C); the threshold is on the class alone
    index, labels = (scores > test.score_thr).nonzero(as_tuple=True)
    out = ours(images)[0].T  # (R, 4 + C)
    boxes, confidence = ops.box_convert(out[index, :4], "cxcywh", "xyxy"), out[index, 4 + labels]
    keep = ops.batched_nms(boxes.double(), confidence.double(), labels, test.nms.iou_threshold)[: test.max_per_img]
    return torch.cat([boxes[keep], confidence[keep, None], labels[keep, None]], -1)


@torch.no_grad()
def compare(configs: Path, name: str) -> str:
    """One line of the table."""
    config = read(configs / f"{name}.py")
    text = config.pretty_text
    model: Any = build(config)
    ours = convert_mmdetection(model.state_dict(), {"cfg": text}).build().eval()
    image = torch.rand(3, HEIGHT, WIDTH)
    inputs, found = predict(model, image)
    pyramid = model.extract_feat(inputs)
    features, raw = ours.raw(image[None])
    rows = selected(ours, image[None], config.model.test_cfg)
    final = final_difference(rows, *found)
    return line(name.partition("/")[2], (features, pyramid), values(raw), theirs(model, pyramid), final)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compare configurations whose name contains this")
    options = parser.parse_args()
    logging.disable()
    mmdet = prepare()
    print(
        f"mmdetection {mmdet.__version__}, random weights, {HEIGHT}x{WIDTH}; difference over largest value\n\n{HEADER}"
    )
    for name in NAMES_3 if mmdet.__version__ >= "3" else NAMES_2:
        if options.only in name:
            print(compare(Path(mmdet.__path__[0]) / ".mim/configs", name), flush=True)


if __name__ == "__main__":
    main()

"""mmdetection's detectors, built from its own configurations, against ours made from their checkpoints.

With random weights that are not degenerate: the largest difference of an output over its largest value. mmdetection is
run from its wheel, on a CPU, without a build; its compiled operations are taken from torchvision:

    pip install --target peers --no-deps mmdet==3.3.0 mmengine==0.10.7 mmcv-lite==2.1.0 addict yapf terminaltables \
        platformdirs rich markdown-it-py mdurl pygments shapely termcolor tomli scipy six
    PYTHONPATH=peers python benchmarks/peers_mmdetection.py
"""

import logging
import sys
import tempfile
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from peers import CLASSES, HEADER, HEIGHT, WIDTH, final_difference, flat, row, shake, spread
from torch import Tensor, nn
from torchvision.ops import RoIAlign, batched_nms

from gid_yolo.engine.checkpoint import load_model

CONFIGS = (
    "retinanet/retinanet_r50_fpn_1x_coco",
    "retinanet/retinanet_r101-caffe_fpn_1x_coco",
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco",
    "fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco",
    "fcos/fcos_r101-caffe_fpn_gn-head-1x_coco",
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
    "faster_rcnn/faster-rcnn_r101_fpn_1x_coco",
    "faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco",
)


def provide_operations() -> None:
    """`mmcv.ops` from torchvision: what these detectors call, and empty names for what they only import."""

    def nms(
        boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: dict[str, Any], class_agnostic: bool = False
    ) -> tuple[Tensor, Tensor]:
        keep = batched_nms(boxes, scores, torch.zeros_like(idxs) if class_agnostic else idxs, nms_cfg["iou_threshold"])
        return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep

    class Align(RoIAlign):
        def __init__(self, output_size: int, spatial_scale: float, sampling_ratio: int = 0, aligned: bool = True):
            super().__init__((output_size, output_size), spatial_scale, sampling_ratio, aligned)

    class Operations(types.ModuleType):
        """Any name that is asked for, as an empty module; any module below it, as one of these."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (nn.Module,), {})

    class Finder(MetaPathFinder, Loader):
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            return ModuleSpec(name, self, is_package=True) if name.split(".")[:2] == ["mmcv", "ops"] else None

        def create_module(self, spec: ModuleSpec) -> types.ModuleType:
            module = Operations(spec.name)
            vars(module).update(batched_nms=nms, RoIAlign=Align)
            return module

        def exec_module(self, module: types.ModuleType) -> None:
            pass

    sys.meta_path.insert(0, Finder())


def build(config: Path) -> tuple[Any, Any]:
    """A model of mmdetection with random weights, and its configuration."""
    from mmdet.registry import MODELS
    from mmengine import Config

    cfg = Config.fromfile(config)
    for head in (cfg.model.get("bbox_head"), (cfg.model.get("roi_head") or {}).get("bbox_head")):
        if head:
            head["num_classes"] = CLASSES
    torch.manual_seed(0)
    text = cfg.pretty_text  # building takes entries out of it
    model: Any = shake(MODELS.build(cfg.model))
    if hasattr(model, "roi_head"):
        head, rpn = model.roi_head.bbox_head, model.rpn_head
        layers = (rpn.rpn_cls, rpn.rpn_reg, head.fc_cls, head.fc_reg)
        outputs = (2.0, 0.3, 3.0, 1.0)
    elif hasattr(model.bbox_head, "scales"):
        head = model.bbox_head
        for i, scale in enumerate(head.scales):
            scale.scale.data.fill_(0.8 + 0.1 * i)
        layers, outputs = (head.conv_cls, head.conv_reg, head.conv_centerness), (2.0, 0.5, 2.0)
        if not head.norm_on_bbox:
            nn.init.constant_(head.conv_reg.bias, 3.0)  # distances of about exp(3) px
    else:
        layers, outputs = (model.bbox_head.retina_cls, model.bbox_head.retina_reg), (2.0, 0.3)
    image = [torch.rand(3, HEIGHT, WIDTH) * 255]
    for layer, deviation in zip(layers, outputs, strict=True):
        spread(layer, deviation, lambda _: model.predict(*prepared(model, image)))
    return model, text


def prepared(model: Any, images: list[Tensor]) -> tuple[Tensor, list[Any]]:
    """Images (3, H, W), BGR in 0 to 255, as mmdetection's network takes them."""
    from mmdet.structures import DetDataSample

    samples = []
    for image in images:
        shape = tuple(image.shape[-2:])
        sample = DetDataSample()
        sample.set_metainfo({"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)})
        samples.append(sample)
    data = model.data_preprocessor({"inputs": [x.byte() for x in images], "data_samples": samples})
    return data["inputs"], data["data_samples"]


def theirs(model: Any, inputs: Tensor, strides: tuple[int, ...]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs by name, and the pyramid; distances of FCOS in strides, as ours are."""
    pyramid = list(model.extract_feat(inputs))
    head = model.rpn_head if hasattr(model, "rpn_head") else model.bbox_head
    logits, regression, *_ = head(tuple(pyramid))
    shapes = [x.shape[-2:] for x in pyramid]
    anchors = torch.cat(head.prior_generator.grid_priors(shapes, device="cpu"))
    if hasattr(head, "scales"):
        sides = torch.cat([torch.full((h * w, 1), stride) for (h, w), stride in zip(shapes, strides, strict=True)])
        anchors = torch.cat([anchors - sides / 2, anchors + sides / 2], dim=1)
        regression = [x / stride for x, stride in zip(regression, strides, strict=True)]
        count = 1
    else:
        count = head.num_base_priors
    return {
        "anchors": anchors,
        "logits": torch.cat([flat(x, count) for x in logits], 1),
        "deltas": torch.cat([flat(x, count) for x in regression], 1),
    }, pyramid


@torch.no_grad()
def main() -> None:
    logging.disable()
    provide_operations()
    try:
        import mmdet
        from mmdet.utils import register_all_modules
    except ImportError as error:
        sys.exit(f"mmdetection cannot be imported ({error}): see the first lines of this file.")
    register_all_modules()
    folder = Path(mmdet.__file__).parent / ".mim" / "configs"
    print(f"mmdetection {mmdet.__version__}, random weights, {HEIGHT}x{WIDTH}; difference over largest value\n")
    print(HEADER, flush=True)
    for name in CONFIGS:
        model, text = build(folder / f"{name}.py")
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "model.pth"
            torch.save({"meta": {"cfg": text}, "state_dict": model.state_dict()}, file)
            ours: Any = load_model(file)[0].detector.eval()
        pixels = (torch.rand(1, 3, HEIGHT, WIDTH) * 255).byte().float()  # RGB
        inputs, samples = prepared(model, [pixels[0].flip(0)])
        final = "-"
        if ours.end2end:
            found = model.predict(inputs, samples, rescale=False)[0].pred_instances
            final = final_difference(ours(pixels / 255)[0], found.bboxes, found.scores, found.labels)
        print(row(Path(name).name, ours, pixels / 255, *theirs(model, inputs, ours.strides), final), flush=True)


if __name__ == "__main__":
    main()

"""FP32 ONNX files as INT8: static, with the ranges of real images, in QDQ form."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from gid_yolo.errors import UserError
from gid_yolo.export.providers import first_line

LAYERS = {"Conv", "Gemm"}  # what computes; a MatMul between two activations (attention) gains nothing
_ACTIVATIONS = {"Relu", "Clip"}  # between layers they become the range of a quantised tensor, and cost nothing
# Behind these come decisions and coordinates: what reaches a layer through them alone is no feature map
_DECISIONS = {"TopK", "NonMaxSuppression", "NonZero", "Softmax"}
_IR_VERSION = 10  # the newest that every onnxruntime in use loads


def quantize_int8(source: Path, target: Path, batches: Sequence[np.ndarray]) -> Path:
    """Static INT8: weights per channel (symmetric), activations unsigned with the range seen on real images.

    Layers between the image and the predictions are quantised, with the ReLUs between them. In float stay the last
    layer of each head, whose rounding would move boxes and scores; what is made of them (decoding, sigmoid, softmax,
    NMS); and what is no layer, such as the sum of two tensors of other ranges, which lost accuracy and saved no time.

    Args:
        source: FP32 file.
        target: File to write.
        batches: Images as the file takes them, (B, 3, H, W) RGB in [0, 1], to find the ranges with.

    Returns:
        `target`, with the metadata of `source`.

    Raises:
        UserError: No images, a file that is quantised already, one without layers, or a failure; `target` is then as it
            was before.
    """
    with conversion(source, target, "INT8") as (model, made):
        if any(node.op_type in {"QuantizeLinear", "DynamicQuantizeLinear"} for node in model.graph.node):
            raise UserError(f"{source} is quantised already: give the FP32 file.")
        if not len(batches):
            raise UserError(f"{source} cannot be quantised without images to find the ranges on.")
        chosen = quantise_names(model.graph)
        if not chosen:
            raise UserError(f"{source} has no layer to quantise: convolutions behind which another layer comes.")
        logger, level = logging.getLogger(), logging.getLogger().level
        logger.setLevel(logging.ERROR)  # it recommends a preparation that onnxslim has done
        try:
            quantize_static(
                model,  # by its path, onnxruntime would write and delete a file of its own beside it
                made,
                _Reader(model.graph.input[0].name, batches),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                # onnxruntime's fast kernels on x86 take unsigned activations and signed weights: signed activations
                # were not faster than FP32 at all
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=sorted(LAYERS | _ACTIVATIONS),
                nodes_to_quantize=chosen,
            )
        finally:
            logger.setLevel(level)
        quantised = onnx.load(made)
        del quantised.metadata_props[:]  # onnxruntime adds its own
        quantised.metadata_props.extend(model.metadata_props)
        save(quantised, made)
    return target


@contextmanager
def conversion(source: Path, target: Path, precision: str) -> Iterator[tuple[ModelProto, Path]]:
    """A file's contents, and a place for what is made of them, which becomes `target` at the end if all went well.

    Raises:
        UserError: Anything failed; nothing is left behind.
    """
    try:
        model = onnx.load(source)
        with TemporaryDirectory(prefix=".convert-", dir=target.parent) as folder:
            made = Path(folder) / target.name
            yield model, made
            made.replace(target)
    except UserError:
        raise
    except Exception as error:  # those of onnxruntime and protobuf have no common base below Exception
        raise UserError(f"{source} cannot be made {precision}: {first_line(error)}") from error


def quantise_names(graph: GraphProto) -> list[str]:
    """Names of the layers and activations behind which, on the way of the features, another layer comes."""
    onward = leading_on(graph)
    return [node.name for node in graph.node if node.op_type in LAYERS | _ACTIVATIONS and node.name in onward]


def leading_on(graph: GraphProto) -> set[str]:
    """Names of all nodes behind which another layer comes, not counting ways through a decision."""
    consumers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        if node.op_type not in _DECISIONS:
            for name in node.input[: 1 if node.op_type == "RoiAlign" else None]:  # its boxes are no features
                consumers[name].append(node)
    onward: set[str] = set()
    for node in reversed(graph.node):  # which stand in the order of their computation
        after = (consumer for name in node.output for consumer in consumers[name])
        if any(consumer.op_type in LAYERS or consumer.name in onward for consumer in after):
            onward.add(node.name)
    return onward


class _Reader(CalibrationDataReader):
    """The batches one by one, as onnxruntime's calibration asks for them."""

    def __init__(self, name: str, batches: Sequence[np.ndarray]) -> None:
        self.name, self.batches = name, batches
        self.left: Iterator[np.ndarray] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input, or None at the end."""
        images = next(self.left, None)
        return None if images is None else {self.name: images}

    def rewind(self) -> None:
        """Begin again."""
        self.left = iter(self.batches)


def save(model: ModelProto, path: Path) -> None:
    """Save as a version that onnxruntime loads."""
    model.ir_version = min(model.ir_version, _IR_VERSION)
    onnx.save(model, path)

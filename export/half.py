"""FP32 ONNX files as FP16: layers and feature maps in half precision, coordinates and decisions in full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from gid_yolo.errors import UserError
from gid_yolo.export.check import noise_of
from gid_yolo.export.quantize import LAYERS, conversion, leading_on, save
from gid_yolo.export.session import open_session

LARGEST = 65_504  # of FP16's numbers
# Operators on feature maps, and which of their inputs are such (the others are shapes and sizes). Normalisation is not
# among them: its sums leave the range of FP16. Nor is softmax, whose sums lose digits.
_ALL, _FIRST = slice(None), slice(1)
_FEATURE_INPUTS = {
    **dict.fromkeys([*LAYERS, "MatMul", "Add", "Sub", "Mul", "Div", "Concat", "Clip"], _ALL),
    **dict.fromkeys(["Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Identity"], _ALL),
    **dict.fromkeys(["MaxPool", "AveragePool", "GlobalAveragePool"], _ALL),
    **dict.fromkeys(["Reshape", "Transpose", "Split", "Resize", "Flatten", "Slice"], _FIRST),
}


def to_fp16(source: Path, target: Path, images: np.ndarray | None = None) -> Path:
    """Half precision between the image and the predictions; the file's input and output stay FP32.

    Boxes are pixels, which FP16 knows to half a pixel only from 512 on: the decoding of the predictions, the scores and
    the NMS are computed in FP32. On x86 onnxruntime has no FP16 layers: such a file is smaller there, but not faster,
    and answers as if FP16 had no largest number, so that it is looked here whether everything stays under that.

    Args:
        source: FP32 file.
        target: File to write.
        images: (B, 3, H, W) in [0, 1] as the file takes them, to look by; noise where None.

    Returns:
        `target`, with the metadata of `source`.

    Raises:
        UserError: A weight or a value between layers that FP16 cannot hold, or a failure; `target` is then as it was.
    """
    with conversion(source, target, "FP16") as (model, made):
        graph = model.graph
        nodes = _feature_nodes(graph)
        halves = {name for node in nodes for name in node.output if name}  # tensors that become FP16
        _halve_inputs(graph, nodes, halves)
        _widen_outputs(graph, nodes, halves)
        for value in graph.value_info:  # types of intermediate tensors, which onnxruntime finds by itself
            if value.name in halves:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        _check_range(source, sorted(halves), images, made.with_name("range.onnx"))
        save(model, made)
    return target


def _check_range(source: Path, names: list[str], images: np.ndarray | None, place: Path) -> None:
    """Run an FP32 file, and refuse it where a tensor of one of the names leaves the range of FP16.

    Args:
        source: It.
        names: Of what will be FP16.
        images: See `to_fp16`.
        place: For a copy of the file that gives the largest number of each.

    Raises:
        UserError: Which, and how far.
    """
    measured = onnx.load(source)
    largest = [f"largest_{i}" for i in range(len(names))]
    for name, place_of in zip(names, largest, strict=True):
        size = helper.make_node("Abs", [name], [f"{place_of}_size"], f"{place_of}_abs")
        measured.graph.node.extend([size, helper.make_node("ReduceMax", size.output, [place_of], place_of, keepdims=0)])
        measured.graph.output.append(helper.make_tensor_value_info(place_of, TensorProto.FLOAT, []))
    save(measured, place)
    session = open_session(place)
    images = noise_of(session) if images is None else images
    found = session.run(largest, {session.get_inputs()[0].name: images})
    for name, value in zip(names, map(float, found), strict=True):
        if not value <= LARGEST:  # NaN is no number of FP16's either
            raise UserError(
                f"{name} reaches {value:.3g}, over {LARGEST:,}, which FP16 cannot hold: export FP32 or INT8."
            )


def _feature_nodes(graph: GraphProto) -> list[NodeProto]:
    """All layers, and what lies between two of them and works on feature maps."""
    onward, features, nodes = leading_on(graph), set(), []
    for node in graph.node:
        inputs = node.input[_FEATURE_INPUTS.get(node.op_type, slice(0))]
        between = node.name in onward and any(name in features for name in inputs)
        if node.op_type in LAYERS or between:
            features |= set(node.output)
            nodes.append(node)
    return nodes


def _halve_inputs(graph: GraphProto, nodes: list[NodeProto], halves: set[str]) -> None:
    """Give the nodes FP16 weights, and a cast of each tensor that is not FP16 already."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    casts: dict[str, str] = {}
    for node in nodes:
        for i in range(len(node.input))[_FEATURE_INPUTS[node.op_type]]:
            name = node.input[i]
            if not name or name in halves:
                continue
            if name not in casts:
                casts[name] = f"{name}_fp16"
                if name in weights:
                    graph.initializer.append(_half(weights[name], casts[name]))
                else:
                    cast = helper.make_node("Cast", [name], [casts[name]], f"{name}_to_fp16", to=TensorProto.FLOAT16)
                    graph.node.insert(_place_behind(graph, name), cast)
            node.input[i] = casts[name]
    used = {name for node in graph.node for name in node.input}
    for name, tensor in weights.items():
        if name not in used:
            graph.initializer.remove(tensor)


def _widen_outputs(graph: GraphProto, nodes: list[NodeProto], halves: set[str]) -> None:
    """Give everything else an FP32 cast of what the nodes give."""
    inside = {node.name for node in nodes}
    outputs = {value.name for value in graph.output}
    for node in list(nodes):
        for k, name in enumerate(node.output):
            if name in outputs:  # keeps its name in FP32
                node.output[k] = f"{name}_fp16"
                for other in nodes:
                    other.input[:] = [node.output[k] if x == name else x for x in other.input]
                cast = helper.make_node("Cast", [node.output[k]], [name], f"{name}_to_fp32", to=TensorProto.FLOAT)
                graph.node.insert(_place_behind(graph, node.output[k]), cast)
                continue
            outside = [other for other in graph.node if name in other.input and other.name not in inside]
            if outside:
                cast = helper.make_node("Cast", [name], [f"{name}_fp32"], f"{name}_to_fp32", to=TensorProto.FLOAT)
                for other in outside:
                    other.input[:] = [f"{name}_fp32" if x == name else x for x in other.input]
                graph.node.insert(_place_behind(graph, name), cast)


def _place_behind(graph: GraphProto, name: str) -> int:
    """Where in the list of nodes a tensor is known; 0 for an input of the graph."""
    return next((i + 1 for i, node in enumerate(graph.node) if name in node.output), 0)


def _half(tensor: TensorProto, name: str) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        halved = values.astype(np.float16)
    if np.isinf(halved).any() and not np.isinf(values).any():
        raise UserError(f"{tensor.name} has weights over {LARGEST:,}, which FP16 cannot hold: export FP32.")
    return numpy_helper.from_array(halved, name)

"""3x3 convolutions of an FP32 ONNX file by Winograd's algorithm: fewer multiplications, and on a CPU less time.

onnxruntime's own convolutions run near the peak of a CPU, so that only fewer multiplications are faster. F(4x4, 3x3)
(Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015) makes 4x4 values of a map out of a tile of 6x6
by 36 products of channels in place of 144: Y = A^T [(G g G^T) * (B^T d B)] A, with g the filter and d the tile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.polynomial import polynomial
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

OUT, TAPS = 4, 3
TILE = OUT + TAPS - 1
# Where the polynomials behind the algorithm are evaluated, besides infinity. With these the rounding is twice that of
# the convolution itself; with the paper's 0, 1, -1, 2 and -2 it is four times
POINTS = np.array([0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)])
# Of fewer channels (in times out) or tiles the transforms cost what the products save
MIN_CHANNELS, MIN_TILES = 64 * 64, 16


def to_winograd(source: Path, target: Path) -> int:
    """Replace the convolutions that gain by it: 3x3, stride 1, wide, on maps of a known and sufficient size.

    Args:
        source: FP32 file.
        target: File to write, with the metadata of `source`.

    Returns:
        How many were replaced.
    """
    model = onnx.load(source)
    writer = _Writer(model)
    nodes = [new for node in model.graph.node for new in writer.replace(node)]
    unused = writer.replaced - {name for node in nodes for name in node.input}  # small levels may share the weights
    weights = [tensor for tensor in model.graph.initializer if tensor.name not in unused]
    shared = [numpy_helper.from_array(value, name) for name, value in writer.constants.items()]
    for field, values in ((model.graph.node, nodes), (model.graph.initializer, weights + shared)):
        del field[:]
        field.extend(values)
    onnx.save(model, target)
    return writer.count


class _Writer:
    """Writes the nodes that replace a convolution, and collects the constants that they share."""

    def __init__(self, model: ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(model).graph
        values = [*graph.input, *graph.value_info]
        self.shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.constants: dict[str, np.ndarray] = {}
        self.replaced: set[str] = set()  # names of weights
        self.nodes: list[NodeProto] = []
        self.count = 0

    def replace(self, node: NodeProto) -> list[NodeProto]:
        """The nodes in its place, or the node itself where there is nothing to gain."""
        if not _is_plain(node) or node.input[1] not in self.weights:
            return [node]
        weight = self.weights[node.input[1]]
        height, width = self.shapes.get(node.input[0], [0] * 4)[2:]  # 0 is an axis of unknown size
        tiles = _tiles(height) * _tiles(width)
        c_out, c_in = weight.dims[:2]
        if c_out * c_in < MIN_CHANNELS or tiles < MIN_TILES:
            return [node]
        x = self.add("Transpose", node.input[0], perm=[0, 2, 3, 1])
        x = self.add("Reshape", x, self.shape(-1, height * width, c_in))
        x = self.add("Pad", x, self.constant("pad", np.array([0, 0, 0, 0, 1, 0])))  # a cell for the zeros outside
        x = self.add("Gather", x, self.constant(f"cells_{height}x{width}", _cells(height, width)), axis=1)
        x = self.add("Reshape", x, self.shape(-1, TILE**2, tiles * c_in))
        x = self.add("MatMul", self.constant("B", _float32(_on_both_axes(_input_matrix()))), x)
        x = self.add("Reshape", x, self.shape(-1, TILE**2, tiles, c_in))
        x = self.add("MatMul", x, self.filters(weight))  # (B, 36, T, c_out)
        x = self.add("Reshape", x, self.shape(-1, TILE**2, tiles * c_out))
        x = self.add("MatMul", self.constant("A", _float32(_on_both_axes(_powers(OUT).T))), x)
        x = self.add("Reshape", x, self.shape(-1, OUT**2 * tiles, c_out))
        for bias in node.input[2:]:
            x = self.add("Add", x, bias)
        x = self.add("Gather", x, self.constant(f"places_{height}x{width}", _places(height, width)), axis=1)
        x = self.add("Reshape", x, self.shape(-1, height, width, c_out))
        self.add("Transpose", x, perm=[0, 3, 1, 2])
        nodes, self.nodes = self.nodes, []
        nodes[-1].output[0] = node.output[0]
        self.replaced.add(weight.name)
        self.count += 1
        return nodes

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Name of the output of one node more."""
        name = f"winograd_{self.count}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, key: str, value: np.ndarray) -> str:
        """Name of a tensor in the file."""
        self.constants[f"winograd_{key}"] = value
        return f"winograd_{key}"

    def shape(self, *sizes: int) -> str:
        """Name of what `Reshape` takes."""
        return self.constant("x".join(map(str, sizes)), np.array(sizes))

    def filters(self, weight: TensorProto) -> str:
        """Name of (36, c_in, c_out), G g G^T of each filter; one for all levels that share the filters."""
        name = f"winograd_{weight.name}"
        if name not in self.constants:
            filters = numpy_helper.to_array(weight).astype(np.float64)
            both = _on_both_axes(_filter_matrix()) @ filters.reshape(-1, TAPS**2).T  # (36, c_out * c_in)
            self.constants[name] = _float32(both.reshape(TILE**2, *filters.shape[:2]).swapaxes(1, 2))
        return name


def _is_plain(node: NodeProto) -> bool:
    """True of a 3x3 convolution of stride 1 that keeps the size of the map."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    one, wanted = [1, 1], ([TAPS, TAPS], [1] * 4)
    return (
        node.op_type == "Conv"
        and (found.get("kernel_shape"), found.get("pads")) == wanted
        and found.get("strides", one) == found.get("dilations", one) == one
        and found.get("group", 1) == 1
    )


def _tiles(size: int) -> int:
    return -(-size // OUT)


def _cells(height: int, width: int) -> np.ndarray:
    """(36 * T,) cell of the map that each place of each tile is; H * W where it is outside."""
    rows, columns = (np.arange(TILE)[:, None] + OUT * np.arange(_tiles(n)) - 1 for n in (height, width))
    rows, columns = rows[:, None, :, None], columns[:, None]  # (6, 1, rows of tiles, 1), (6, 1, columns of tiles)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return np.where(inside, rows * width + columns, height * width).flatten()


def _places(height: int, width: int) -> np.ndarray:
    """(H * W,) place of each cell of the map among the 16 * T results of the tiles."""
    rows, columns = np.arange(height)[:, None], np.arange(width)
    place = rows % OUT * OUT + columns % OUT
    return ((place * _tiles(height) + rows // OUT) * _tiles(width) + columns // OUT).flatten()


def _powers(count: int) -> np.ndarray:
    """(6, count) powers of the points 0 to count - 1, and of infinity: A, and G up to the scale of its rows."""
    return np.vstack([np.vander(POINTS, count, increasing=True), np.eye(count)[-1]])


def _filter_matrix() -> np.ndarray:
    """(6, 3) G: Lagrange's denominators are in it, so that the other two need none."""
    distances = POINTS[:, None] - POINTS + np.eye(len(POINTS))
    return _powers(TAPS) / np.append(distances.prod(1), 1)[:, None]


def _input_matrix() -> np.ndarray:
    """(6, 6) B^T: coefficients of the polynomials that are 0 at all points but one, or at all of them."""
    rows = [polynomial.polyfromroots(np.delete(POINTS, i)) for i in range(len(POINTS))]
    return np.vstack([*(np.append(row, 0) for row in rows), polynomial.polyfromroots(POINTS)])


def _on_both_axes(matrix: np.ndarray) -> np.ndarray:
    return np.kron(matrix, matrix)


def _float32(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value, dtype=np.float32)

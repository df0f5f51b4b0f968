"""Row-wise int8: each row of activations has its own scale, each output column of weights too.

So a row's result does not depend on the other rows, which per-tensor dynamic quantisation
(`DynamicQuantizeLinear`) cannot promise. Built from standard operators.

Weights keep 7 bits: CPUs without VNNI add pairs of 8-bit products in 16 bits, and 255 * 64 * 2
is the largest sum of two that fits. Every CPU then computes the same integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto

from lance_edge_export.graph import FLOAT, Graph, node

WEIGHT_LEVELS = 63  # 7 bits, symmetric
ACTIVATION_LEVELS = 127  # 8 bits, symmetric around the zero point
ZERO_POINT = np.array(128, dtype=np.uint8)
STEP = np.array(1 / ACTIVATION_LEVELS, dtype=np.float32)
ONE = np.array(1, dtype=np.float32)
SMALLEST_SCALE = np.array(1e-12, dtype=np.float32)  # an all-zero row has no scale of its own

MIN_COLUMNS = (
    64  # narrower layers (the heads) stay in fp32: they cost nothing and decide everything
)


def row_wise_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its wide linear layers and embedding tables in int8."""
    graph = Graph(model)
    replacements: dict[str, list[NodeProto]] = {}
    quantised: set[str] = set()
    for candidate in graph.nodes:
        if _is_linear(candidate, graph):
            steps = (
                [] if candidate.input[0] in quantised else _quantise_rows(candidate.input[0], graph)
            )
            quantised.add(candidate.input[0])
            replacements[candidate.output[0]] = steps + _integer_matmul(candidate, graph)
        elif _is_embedding(candidate, graph):
            replacements[candidate.output[0]] = _integer_gather(candidate, graph)
    graph.replace(replacements)
    return graph.finish()


def quantise_columns(
    weight: npt.NDArray[Any],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """weight [K, N] -> integers [K, N] and scales [N] with weight ~ integers * scales"""
    return _symmetric(weight, 0, WEIGHT_LEVELS)


def quantise_table(table: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """table [V, H] -> integers [V, H] and scales [V, 1] with table ~ integers * scales"""
    integers, scales = _symmetric(table, 1, ACTIVATION_LEVELS)
    return integers, scales[:, None]


def _symmetric(
    values: npt.NDArray[Any], axis: int, levels: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    largest = np.abs(values).max(axis, keepdims=True)
    scales = np.maximum(largest / levels, SMALLEST_SCALE).astype(np.float32)
    integers: npt.NDArray[np.int8] = np.rint(values / scales).astype(np.int8)
    return integers, scales.squeeze(axis)


def _is_linear(candidate: NodeProto, graph: Graph) -> bool:
    weight = graph.constants.get(candidate.input[1]) if candidate.op_type == "MatMul" else None
    return weight is not None and weight.ndim == 2 and weight.shape[1] >= MIN_COLUMNS


def _is_embedding(candidate: NodeProto, graph: Graph) -> bool:
    table = graph.constants.get(candidate.input[0]) if candidate.op_type == "Gather" else None
    axis = next((a.i for a in candidate.attribute if a.name == "axis"), 0)
    return table is not None and axis == 0 and table.ndim == 2 and table.dtype == np.float32


def _quantise_rows(source: str, graph: Graph) -> list[NodeProto]:
    """source [..., K] -> `source/int8` [..., K] and `source/scale` [..., 1]"""
    constant = graph.constant
    return [
        node("Abs", [source], f"{source}/magnitude"),
        node(
            "ReduceMax",
            [f"{source}/magnitude", constant("int8/last_axis", np.array([-1], dtype=np.int64))],
            f"{source}/largest",
            keepdims=1,
        ),
        node(
            "Max",
            [f"{source}/largest", constant("int8/smallest", SMALLEST_SCALE)],
            f"{source}/positive",
        ),
        node("Mul", [f"{source}/positive", constant("int8/step", STEP)], f"{source}/scale"),
        node("Div", [source, f"{source}/scale"], f"{source}/levels"),
        node(
            "QuantizeLinear",
            [f"{source}/levels", constant("int8/one", ONE), constant("int8/zero", ZERO_POINT)],
            f"{source}/int8",
        ),
    ]


def _integer_matmul(matmul: NodeProto, graph: Graph) -> list[NodeProto]:
    source, weight = matmul.input
    (output,) = matmul.output
    integers, scales = quantise_columns(graph.constants[weight])
    return [
        node(
            "MatMulInteger",
            [f"{source}/int8", graph.constant(f"{weight}/int8", integers), "int8/zero"],
            f"{output}/integers",
        ),
        node("Cast", [f"{output}/integers"], f"{output}/floats", to=FLOAT),
        node(
            "Mul",
            [f"{output}/floats", graph.constant(f"{weight}/scale", scales)],
            f"{output}/columns",
        ),
        node("Mul", [f"{output}/columns", f"{source}/scale"], output),
    ]


def _integer_gather(gather: NodeProto, graph: Graph) -> list[NodeProto]:
    table, ids = gather.input
    (output,) = gather.output
    integers, scales = quantise_table(graph.constants[table])
    return [
        node("Gather", [graph.constant(f"{table}/int8", integers), ids], f"{output}/integers"),
        node("Cast", [f"{output}/integers"], f"{output}/floats", to=FLOAT),
        node("Gather", [graph.constant(f"{table}/scale", scales), ids], f"{output}/scale"),
        node("Mul", [f"{output}/floats", f"{output}/scale"], output),
    ]

"""Graph rewrites that keep the result and save work on every back-end."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from onnx import NodeProto

from lance_edge_export.graph import Graph, node


def merge_projections(model: onnx.ModelProto) -> onnx.ModelProto:
    """One MatMul + Add + Split for linear layers that read the same tensor (query, key and value)."""
    graph = Graph(model)
    readers = graph.consumers()
    siblings: dict[tuple[str, int], list[tuple[NodeProto, NodeProto]]] = defaultdict(list)
    for matmul in graph.nodes:
        if matmul.op_type != "MatMul" or matmul.input[1] not in graph.constants:
            continue
        weight = graph.constants[matmul.input[1]]
        following = readers[matmul.output[0]]
        if weight.ndim != 2 or len(following) != 1 or following[0].op_type != "Add":
            continue
        if any(name in graph.constants for name in following[0].input):
            siblings[matmul.input[0], weight.shape[0]].append((matmul, following[0]))
    replacements: dict[str, list[NodeProto]] = {}
    for (source, _), layers in siblings.items():
        if len(layers) < 2:
            continue
        weights = [graph.constants[matmul.input[1]] for matmul, _ in layers]
        biases = [
            next(graph.constants[name] for name in add.input if name in graph.constants)
            for _, add in layers
        ]
        outputs = [add.output[0] for _, add in layers]
        name = f"{outputs[0]}/merged"
        widths = np.array([weight.shape[1] for weight in weights], dtype=np.int64)
        first, *rest = layers
        replacements[first[0].output[0]] = [
            node(
                "MatMul",
                [source, graph.constant(f"{name}/weight", np.concatenate(weights, 1))],
                f"{name}/product",
            ),
            node(
                "Add",
                [f"{name}/product", graph.constant(f"{name}/bias", np.concatenate(biases))],
                f"{name}/sum",
            ),
            node(
                "Split", [f"{name}/sum", graph.constant(f"{name}/widths", widths)], outputs, axis=-1
            ),
        ]
        replacements[first[1].output[0]] = []
        for matmul, add in rest:
            replacements[matmul.output[0]] = replacements[add.output[0]] = []
    graph.replace(replacements)
    return graph.finish()

"""A graph with its wide products and embedding tables in fp16, and casts around them.

Fused attentions are fp16 too. What is between them stays in fp32: norms and residual sums need its
range, and the heads decide everything and cost nothing.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import NodeProto

from lance_edge_export.fused import ATTENTION
from lance_edge_export.graph import FLOAT, HALF, Graph, node
from lance_edge_export.layers import MIN_COLUMNS, checked_layers


def half_products(model: onnx.ModelProto, keep_fp32: Collection[str] = ()) -> onnx.ModelProto:
    """The same graph; its inputs and outputs keep their types.

    keep_fp32  layers that stay in fp32, by the names of `linear_layers`

    Raises ExportError if there is no layer of a name in keep_fp32.
    """
    graph = Graph(model)
    checked_layers(model, keep_fp32)
    narrowed: set[str] = set()
    replacements = {}
    for candidate in graph.nodes:
        output = candidate.output[0]
        if candidate.op_type == "MatMul" and not _stays(candidate, graph, keep_fp32):
            before = [item for name in candidate.input for item in _narrow(name, graph, narrowed)]
            inputs = [_narrow_name(name) for name in candidate.input]
            product = node("MatMul", inputs, f"{output}/half")
        elif candidate.op_type == ATTENTION:
            before = [
                item for name in candidate.input[:3] for item in _narrow(name, graph, narrowed)
            ]
            product = NodeProto()
            product.CopyFrom(candidate)
            product.input[:3] = [_narrow_name(name) for name in candidate.input[:3]]
            product.output[0] = f"{output}/half"
        elif candidate.op_type == "Gather" and _is_float_table(candidate, graph):
            before = _narrow(candidate.input[0], graph, narrowed)
            inputs = [_narrow_name(candidate.input[0]), candidate.input[1]]
            product = node("Gather", inputs, f"{output}/half")
        else:
            continue
        cast = node("Cast", [f"{output}/half"], output, to=FLOAT)
        replacements[output] = [*before, product, cast]
    graph.replace(replacements)
    return graph.finish()


def _stays(candidate: NodeProto, graph: Graph, keep_fp32: Collection[str]) -> bool:
    weight = graph.constants.get(candidate.input[1])
    is_head = weight is not None and weight.shape[-1] < MIN_COLUMNS
    return is_head or candidate.output[0] in keep_fp32


def _is_float_table(candidate: NodeProto, graph: Graph) -> bool:
    table = graph.constants.get(candidate.input[0])
    return table is not None and table.ndim == 2 and table.dtype == np.float32


def _narrow(name: str, graph: Graph, narrowed: set[str]) -> list[NodeProto]:
    """The cast of a tensor to fp16, unless it is a constant or has been cast before."""
    if name in graph.constants:
        graph.constant(_narrow_name(name), graph.constants[name].astype(np.float16))
        return []
    if name in narrowed:
        return []
    narrowed.add(name)
    return [node("Cast", [name], _narrow_name(name), to=HALF)]


def _narrow_name(name: str) -> str:
    return f"{name}/narrow"

"""A bundle's screener in floating point and in standard operators, as TensorRT's parsers read it.

TensorRT has no integer product with one scale a row of activations, and no zero points. So the
integers of `quantise.py` become float weights again: the same weights, without the rounding of the
activations. A graph that has no integers passes through.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import NodeProto

from lance_edge.errors import ExportError
from lance_edge_export.fused import unfuse
from lance_edge_export.graph import PRODUCT, Graph, attribute, node
from lance_edge_export.half import half_products
from lance_edge_export.plain_decoder import FloatPrecision
from lance_edge_export.quantise import BALANCED, COLUMNS, LEVELS

QUANTISED = ("MatMulInteger", PRODUCT, "QuantizeLinear")
OPSET = 20  # the oldest that float graphs of our exporter can be called: older parsers read those


def float_screener(model: onnx.ModelProto, precision: FloatPrecision) -> onnx.ModelProto:
    """The graph in standard floating point operators.

    In fp16, embedding tables, wide layers and attention's products are fp16. What is between them,
    norms, softmax, residual sums, and the heads stay in fp32.

    Raises ExportError for integers that are not in the form that `int8_products` writes.
    """
    floats = plain_gelu(unfuse(float_products(model)))
    return half_products(floats) if precision == "fp16" else floats


def float_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with the weights that its integers stand for."""
    graph = Graph(model)
    makers, readers = graph.producers(), graph.consumers()
    replacements: dict[str, list[NodeProto]] = {}
    for candidate in graph.nodes:
        if candidate.op_type == PRODUCT:
            source, weight = _factors(candidate, makers, graph)
            (output,) = candidate.output
            if output.endswith(COLUMNS):  # each row's scale comes after
                (scaled,) = _follow(candidate, ("Mul",), readers)
                (output,) = scaled.output
            replacements[output] = [node("MatMul", [source, weight], output)]
        elif _is_integer_table(candidate, graph):
            table, ids = candidate.input
            scaled = _follow(candidate, ("Cast", "Mul"), readers)[1]
            scale = makers[scaled.input[1]].input[0]
            values = graph.constants[table].astype(np.float32) * graph.constants[scale]
            output = scaled.output[0]
            floats = graph.constant(f"{table}/float", values)
            replacements[output] = [node("Gather", [floats, ids], output)]
    graph.replace(replacements)
    graph.drop_unread()
    left = {item.op_type for item in graph.nodes} & set(QUANTISED)
    if left:
        raise _unknown_form(", ".join(sorted(left)))
    _lower_opset(graph.model)
    return graph.finish()


def plain_gelu(model: onnx.ModelProto) -> onnx.ModelProto:
    """Gelu as x / 2 * (1 + erf(x / sqrt 2)): the operator came with opset 20, its parts are old."""
    graph = Graph(model)
    root = graph.constant("plain/root_half", np.array(1 / math.sqrt(2), np.float32))
    one = graph.constant("plain/one", np.array(1, np.float32))
    half = graph.constant("plain/half", np.array(0.5, np.float32))
    replacements = {}
    for candidate in graph.nodes:
        if candidate.op_type != "Gelu":
            continue
        if attribute(candidate, "approximate", b"none") == b"tanh":
            raise ExportError(
                "the screener's graph has a Gelu by tanh, which no plan is made of yet"
            )
        (x,), (output,) = candidate.input, candidate.output
        replacements[output] = [
            node("Mul", [x, root], f"{output}/scaled"),
            node("Erf", [f"{output}/scaled"], f"{output}/erf"),
            node("Add", [f"{output}/erf", one], f"{output}/above"),
            node("Mul", [x, half], f"{output}/half"),
            node("Mul", [f"{output}/half", f"{output}/above"], output),
        ]
    graph.replace(replacements)
    return graph.finish()


def _factors(product: NodeProto, makers: dict[str, NodeProto], graph: Graph) -> tuple[str, str]:
    """The float input of an integer product, and its float weights, as a constant."""
    narrow, name, _, scales, *_ = product.input
    quantise = makers.get(narrow)
    if quantise is None or quantise.op_type != "QuantizeLinear":
        raise _unknown_form(product.op_type)
    weight = graph.constants[name].astype(np.float32) * graph.constants[scales]
    source = quantise.input[0]
    if source.endswith(LEVELS):
        source = makers[source].input[0]
    if source.endswith(BALANCED):
        source, balance = makers[source].input
        weight = graph.constants[balance][:, None] * weight
    return source, graph.constant(f"{name}/float", weight)


def _follow(
    start: NodeProto, kinds: tuple[str, ...], readers: dict[str, list[NodeProto]]
) -> list[NodeProto]:
    """The chain of nodes after one, each the only reader of the one before."""
    chain = [start]
    for kind in kinds:
        following = readers[chain[-1].output[0]]
        if len(following) != 1 or following[0].op_type != kind:
            raise _unknown_form(start.op_type)
        chain += following
    return chain[1:]


def _is_integer_table(candidate: NodeProto, graph: Graph) -> bool:
    table = graph.constants.get(candidate.input[0]) if candidate.op_type == "Gather" else None
    return table is not None and table.dtype == np.int8


def _lower_opset(model: onnx.ModelProto) -> None:
    """Opset 21 and 20 differ in types that no float graph has; the checker would find others."""
    for domain in model.opset_import:
        if domain.domain == "":
            domain.version = min(domain.version, OPSET)


def _unknown_form(what: str) -> ExportError:
    return ExportError(
        f"the screener's graph has a {what} in a form that this version does not know; export the "
        "bundle again with this version of lance-edge"
    )

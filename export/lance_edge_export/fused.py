"""Attention, and a residual sum with its norm, as one operator each; and back.

ONNX Runtime has both for the CPU and for CUDA, and its own optimiser finds neither in graphs that torch
exports now. TensorRT's parsers know neither, and fuse the plain operators themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from lance_edge_export.graph import Graph, contributed, node

NORM, ATTENTION = "SkipLayerNormalization", "MultiHeadAttention"
TOKENS_FIRST = [0, 2, 1, 3]  # [rows, tokens, heads, width] <-> [rows, heads, tokens, width]
KEYS = [0, 2, 3, 1]  # the keys' transpose: [rows, heads, width, tokens]
LOWEST = -10000.0  # what MultiHeadAttention adds where nothing may be read
READ = "attention/read"  # which tokens may be read, as MultiHeadAttention takes it: int32


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its attentions and its sums before norms as single operators, where they have
    the form that BERT-like encoders do; others are left as they are."""
    graph = Graph(model)
    _fuse_norms(graph)
    _fuse_attentions(graph)
    graph.drop_unread()
    return graph.finish()


def unfuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in standard operators again."""
    graph = Graph(model)
    replacements = {}
    for candidate in graph.nodes:
        if candidate.op_type == NORM:
            replacements[candidate.output[0]] = _plain_norm(candidate)
        elif candidate.op_type == ATTENTION:
            replacements[candidate.output[0]] = _plain_attention(candidate, graph)
    graph.replace(replacements)
    graph.drop_unread()
    return graph.finish()


def _fuse_norms(graph: Graph) -> None:
    makers, readers = graph.producers(), _readers(graph)
    replacements: dict[str, list[NodeProto]] = {}
    for norm in graph.nodes:
        total = makers.get(norm.input[0])
        if norm.op_type != "LayerNormalization" or not _is_sum(total, graph):
            continue
        if len(readers[norm.input[0]]) > 1 or _attribute(norm, "axis", -1) != -1:
            continue
        first, second = total.input
        inputs = [first, second, *norm.input[1:]]
        biased = makers.get(first)
        if len(norm.input) == 3 and len(readers[first]) == 1 and _bias(biased, graph):
            inputs = [_other(biased, _bias(biased, graph)), *inputs[1:], _bias(biased, graph)]
            replacements[first] = []
        replacements[total.output[0]] = []
        epsilon = _attribute(norm, "epsilon", 1e-5)
        replacements[norm.output[0]] = [contributed(NORM, inputs, norm.output[0], epsilon=epsilon)]
    graph.replace(replacements)


def _plain_norm(norm: NodeProto) -> list[NodeProto]:
    (output,) = norm.output
    first, second, *weights = norm.input
    steps = []
    if len(weights) == 3:
        steps = [node("Add", [first, weights[2]], f"{output}/biased")]
        first = f"{output}/biased"
    total = f"{output}/sum"
    epsilon = _attribute(norm, "epsilon", 1e-5)
    plain = node("LayerNormalization", [total, *weights[:2]], output, axis=-1, epsilon=epsilon)
    return [*steps, node("Add", [first, second], total), plain]


@dataclass(frozen=True)
class Attention:
    """One attention in plain operators.

    inputs  queries, keys and values  [rows, tokens, heads * width]
    output  [rows, tokens, heads * width]
    inside  the tensors between them, which nothing else reads
    """

    inputs: Sequence[str]
    output: str
    heads: int
    scale: float
    inside: Sequence[str]


class _OtherForm(Exception):
    """What is looked at is not built as it would have to be."""


def _fuse_attentions(graph: Graph) -> None:
    makers, readers = graph.producers(), _readers(graph)
    replacements: dict[str, list[NodeProto]] = {}
    read = [node("Cast", ["mask"], READ, to=TensorProto.INT32)]
    for softmax in graph.nodes:
        if softmax.op_type != "Softmax":
            continue
        try:
            found = _attention(softmax, graph, makers, readers)
        except _OtherForm:
            continue
        inputs = [*found.inputs, "", READ]
        settings = {"num_heads": found.heads, "scale": found.scale}
        fused = contributed(ATTENTION, inputs, found.output, **settings)
        replacements |= {name: [] for name in found.inside}
        replacements[found.output] = [*read, fused]
        read = []
    graph.replace(replacements)


def _attention(
    softmax: NodeProto,
    graph: Graph,
    makers: dict[str, NodeProto],
    readers: dict[str, list[NodeProto]],
) -> Attention:
    """The attention around a softmax. Raises _OtherForm."""

    def made(name: str, *ops: str, perm: Sequence[int] | None = None) -> NodeProto:
        return _expect(makers.get(name), ops, perm)

    def read(name: str, op: str, perm: Sequence[int] | None = None) -> NodeProto:
        return _expect(readers[name][0] if readers[name] else None, [op], perm)

    masked = made(softmax.input[0], "Add")
    scaled = made(masked.input[0], "Div", "Mul")
    scores = made(scaled.input[0], "MatMul")
    weighed = read(softmax.output[0], "MatMul")
    turned = read(weighed.output[0], "Transpose", TOKENS_FIRST)
    merged = read(turned.output[0], "Reshape")
    parts = [
        made(scores.input[0], "Transpose", perm=TOKENS_FIRST),
        made(scores.input[1], "Transpose", perm=KEYS),
        made(weighed.input[1], "Transpose", perm=TOKENS_FIRST),
    ]
    split = [made(part.input[0], "Reshape") for part in parts]
    chain = [*split, *parts, scores, scaled, masked, softmax, weighed, turned]
    inside = [item.output[0] for item in chain]
    factor = graph.constants.get(scaled.input[1])
    if (
        any(len(readers[name]) != 1 for name in inside)
        or factor is None
        or factor.size != 1
        or not _is_the_mask(masked.input[1], graph, makers)
    ):
        raise _OtherForm
    scale = float(factor) if scaled.op_type == "Mul" else 1 / float(factor)
    heads = _heads(split[0].input[1], graph, makers)
    return Attention([item.input[0] for item in split], merged.output[0], heads, scale, inside)


def _expect(
    candidate: NodeProto | None, ops: Sequence[str], perm: Sequence[int] | None
) -> NodeProto:
    """The node, if it is one of these operators. Raises _OtherForm."""
    if candidate is None or candidate.op_type not in ops:
        raise _OtherForm
    if perm is not None and _attribute(candidate, "perm", None) != perm:
        raise _OtherForm
    return candidate


def _heads(shape: str, graph: Graph, makers: dict[str, NodeProto]) -> int:
    """The third length of a shape [rows, tokens, heads, width]. Raises _OtherForm if it is not fixed."""
    lengths = graph.constants.get(shape)
    if lengths is None:
        parts = _expect(makers.get(shape), ["Concat"], None).input
        lengths = graph.constants.get(parts[2]) if len(parts) == 4 else None
    else:
        lengths = lengths[2:3]
    if lengths is None or lengths.size != 1:
        raise _OtherForm
    return int(lengths.item())


def _plain_attention(fused: NodeProto, graph: Graph) -> list[NodeProto]:
    (output,) = fused.output
    heads, scale = _attribute(fused, "num_heads", 0), _attribute(fused, "scale", 0.0)
    split = graph.constant(f"{output}/split", np.array([0, 0, heads, -1], dtype=np.int64))
    merge = graph.constant(f"{output}/merge", np.array([0, 0, -1], dtype=np.int64))
    factor = graph.constant(f"{output}/scale", np.array(scale, dtype=np.float32))
    one = graph.constant(f"{READ}/one", np.array(1, dtype=np.float32))
    lowest = graph.constant(f"{READ}/lowest", np.array(LOWEST, dtype=np.float32))
    axes = graph.constant(f"{READ}/axes", np.array([1, 2], dtype=np.int64))
    steps = []
    for name, part, order in zip(
        fused.input[:3], "qkv", (TOKENS_FIRST, KEYS, TOKENS_FIRST), strict=True
    ):
        steps += [
            node("Reshape", [name, split], f"{output}/{part}"),
            node("Transpose", [f"{output}/{part}"], f"{output}/{part}/heads", perm=order),
        ]
    return [
        *steps,
        node("Cast", [fused.input[4]], f"{output}/read", to=TensorProto.FLOAT),
        node("Sub", [one, f"{output}/read"], f"{output}/unread"),
        node("Mul", [f"{output}/unread", lowest], f"{output}/penalty"),
        node("Unsqueeze", [f"{output}/penalty", axes], f"{output}/mask"),
        node("MatMul", [f"{output}/q/heads", f"{output}/k/heads"], f"{output}/scores"),
        node("Mul", [f"{output}/scores", factor], f"{output}/scaled"),
        node("Add", [f"{output}/scaled", f"{output}/mask"], f"{output}/masked"),
        node("Softmax", [f"{output}/masked"], f"{output}/shares", axis=-1),
        node("MatMul", [f"{output}/shares", f"{output}/v/heads"], f"{output}/mixed"),
        node("Transpose", [f"{output}/mixed"], f"{output}/tokens", perm=TOKENS_FIRST),
        node("Reshape", [f"{output}/tokens", merge], output),
    ]


def _readers(graph: Graph) -> dict[str, list[NodeProto]]:
    """Tensor name -> the nodes that read it; for the graph's outputs one more."""
    readers = graph.consumers()
    for value in graph.model.graph.output:
        readers[value.name].append(NodeProto(op_type="output"))
    return readers


def _is_the_mask(name: str, graph: Graph, makers: dict[str, NodeProto]) -> bool:
    """Whether a tensor is 0 where the input `mask` is 1 and very low where it is 0, for all queries."""
    steps = []
    for op in ("Mul", "Sub", "Cast", "Unsqueeze"):
        step = makers.get(name)
        if step is None or step.op_type != op:
            return False
        steps.append(step)
        name = step.input[1 if op == "Sub" else 0]
    factor, one = (graph.constants.get(steps[0].input[1]), graph.constants.get(steps[1].input[0]))
    return (
        name == "mask" and factor is not None and one is not None and factor <= LOWEST and one == 1
    )


def _is_sum(candidate: NodeProto | None, graph: Graph) -> bool:
    """Whether a node adds two tensors, neither of them a constant."""
    return (
        candidate is not None
        and candidate.op_type == "Add"
        and not any(name in graph.constants for name in candidate.input)
    )


def _bias(candidate: NodeProto | None, graph: Graph) -> str:
    """The constant vector that a node adds; "" if it does something else."""
    if candidate is None or candidate.op_type != "Add":
        return ""
    vectors = [
        name
        for name in candidate.input
        if name in graph.constants and graph.constants[name].ndim == 1
    ]
    return vectors[0] if vectors else ""


def _other(candidate: NodeProto, name: str) -> str:
    first, second = candidate.input
    return second if first == name else first


def _attribute(candidate: NodeProto, name: str, default: Any) -> Any:
    for attribute in candidate.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default

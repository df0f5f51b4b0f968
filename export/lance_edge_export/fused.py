"""Attention, and a residual sum with its norm, as one operator each; and back.

ONNX Runtime has both for the CPU and for CUDA, and finds neither by itself when it loads a graph that torch
exports now. TensorRT's parsers know neither, and fuse the plain operators themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from lance_edge_export.graph import Graph, attribute, contributed, node

NORM, ATTENTION = "SkipLayerNormalization", "MultiHeadAttention"
TOKENS_FIRST = [0, 2, 1, 3]  # [rows, tokens, heads, width] <-> [rows, heads, tokens, width]
KEYS_TURNED = [0, 2, 3, 1]  # [rows, tokens, heads, width] -> [rows, heads, width, tokens]
LOWEST = -10000.0  # added to the scores of what may not be read
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
    """The same graph in standard operators again; in fp32, whatever the attentions' type was."""
    graph = Graph(model)
    replacements = {}
    mask = _plain_mask(graph)
    for candidate in graph.nodes:
        if candidate.op_type == NORM:
            replacements[candidate.output[0]] = _plain_norm(candidate)
        elif candidate.op_type == ATTENTION:
            replacements[candidate.output[0]] = mask + _plain_attention(candidate, graph)
            mask = []
    graph.replace(replacements)
    graph.drop_unread()
    return graph.finish()


def _fuse_norms(graph: Graph) -> None:
    makers, readers = graph.producers(), _readers(graph)
    replacements: dict[str, list[NodeProto]] = {}
    for norm in graph.nodes:
        if norm.op_type != "LayerNormalization" or attribute(norm, "axis", -1) != -1:
            continue
        total = makers.get(norm.input[0])
        if total is None or total.op_type != "Add" or len(readers[norm.input[0]]) > 1:
            continue
        # The operator wants a summand of the sum's shape first: a linear layer's output.
        first, second = total.input
        linear = _linear(first, makers, graph)
        if linear is None:
            first, second = second, first
            linear = _linear(first, makers, graph)
        if linear is None:
            continue
        inputs = [first, second, *norm.input[1:]]
        product, bias = linear
        if bias and len(norm.input) == 3 and len(readers[first]) == 1:
            inputs = [product, second, *norm.input[1:], bias]
            replacements[first] = []
        replacements[total.output[0]] = []
        epsilon = attribute(norm, "epsilon", 1e-5)
        replacements[norm.output[0]] = [contributed(NORM, inputs, norm.output[0], epsilon=epsilon)]
    graph.replace(replacements)


def _linear(name: str, makers: dict[str, NodeProto], graph: Graph) -> tuple[str, str] | None:
    """A linear layer's product and its bias, "" if it has none, by its output; None if it is none."""
    maker, bias = makers.get(name), ""
    if maker is not None and maker.op_type == "Add":
        constants = [item for item in maker.input if item in graph.constants]
        if not constants:
            return None
        bias = constants[0]
        name = next(item for item in maker.input if item != bias)
        maker = makers.get(name)
    weight = graph.constants.get(maker.input[1]) if maker and maker.op_type == "MatMul" else None
    if weight is None or (bias and graph.constants[bias].shape != weight.shape[1:]):
        return None
    return name, bias


def _plain_norm(norm: NodeProto) -> list[NodeProto]:
    (output,) = norm.output
    first, second, *weights = norm.input
    steps = []
    if len(weights) == 3:
        steps = [node("Add", [first, weights[2]], f"{output}/biased")]
        first = f"{output}/biased"
    total = f"{output}/sum"
    epsilon = attribute(norm, "epsilon", 1e-5)
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
        settings = {
            "num_heads": found.heads,
            "scale": found.scale,
            "mask_filter_value": LOWEST,
        }
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
        made(scores.input[1], "Transpose", perm=KEYS_TURNED),
        made(weighed.input[1], "Transpose", perm=TOKENS_FIRST),
    ]
    split = [made(part.input[0], "Reshape") for part in parts]
    chain = [*split, *parts, scores, scaled, masked, softmax, weighed, turned]
    inside = [item.output[0] for item in chain]
    factor = _scalar(scaled.input[1], graph)
    heads = {_heads(item.input[1], graph, makers) for item in split}
    if (
        any(len(readers[name]) != 1 for name in inside)
        or attribute(softmax, "axis", -1) not in (-1, 3)
        or factor is None
        or len(heads) > 1
        or len(_lengths(merged.input[1], graph, makers)) != 3
        or not _is_the_mask(masked.input[1], graph, makers)
    ):
        raise _OtherForm
    scale = factor if scaled.op_type == "Mul" else 1 / factor
    return Attention(
        [item.input[0] for item in split], merged.output[0], heads.pop(), scale, inside
    )


def _expect(
    candidate: NodeProto | None, ops: Sequence[str], perm: Sequence[int] | None
) -> NodeProto:
    """The node, if it is one of these operators. Raises _OtherForm."""
    if candidate is None or candidate.op_type not in ops:
        raise _OtherForm
    if perm is not None and attribute(candidate, "perm", None) != perm:
        raise _OtherForm
    return candidate


def _heads(shape: str, graph: Graph, makers: dict[str, NodeProto]) -> int:
    """The third length of a shape [rows, tokens, heads, width]. Raises _OtherForm if it is not fixed."""
    lengths = _lengths(shape, graph, makers)
    heads = lengths[2] if len(lengths) == 4 else None
    if heads is None or heads < 1:
        raise _OtherForm
    return heads


def _lengths(shape: str, graph: Graph, makers: dict[str, NodeProto]) -> list[int | None]:
    """A shape's lengths, None for those that depend on the input. Raises _OtherForm."""
    if shape in graph.constants:
        return [int(length) for length in graph.constants[shape]]
    lengths: list[int | None] = []
    for part in _expect(makers.get(shape), ["Concat"], None).input:
        value = graph.constants.get(part)
        lengths += [None] if value is None else [int(length) for length in value.reshape(-1)]
    return lengths


def _plain_mask(graph: Graph) -> list[NodeProto]:
    """What attentions add to their scores, from the tokens that they may read  [rows, 1, 1, tokens]"""
    one = graph.constant(f"{READ}/one", np.array(1, dtype=np.float32))
    lowest = graph.constant(f"{READ}/lowest", np.array(LOWEST, dtype=np.float32))
    axes = graph.constant(f"{READ}/axes", np.array([1, 2], dtype=np.int64))
    return [
        node("Cast", [READ], f"{READ}/float", to=TensorProto.FLOAT),
        node("Sub", [one, f"{READ}/float"], f"{READ}/not"),
        node("Mul", [f"{READ}/not", lowest], f"{READ}/penalty"),
        node("Unsqueeze", [f"{READ}/penalty", axes], f"{READ}/mask"),
    ]


def _plain_attention(fused: NodeProto, graph: Graph) -> list[NodeProto]:
    (output,) = fused.output
    name = f"{output}/attention"
    heads, scale = attribute(fused, "num_heads", 0), attribute(fused, "scale", 0.0)
    split = graph.constant(f"{name}/split", np.array([0, 0, heads, -1], dtype=np.int64))
    merge = graph.constant(f"{name}/merge", np.array([0, 0, -1], dtype=np.int64))
    factor = graph.constant(f"{name}/scale", np.array(scale, dtype=np.float32))
    steps = []
    for source, part, order in zip(
        fused.input[:3], "qkv", (TOKENS_FIRST, KEYS_TURNED, TOKENS_FIRST), strict=True
    ):
        steps += [
            node("Reshape", [source, split], f"{name}/{part}"),
            node("Transpose", [f"{name}/{part}"], f"{name}/{part}/heads", perm=order),
        ]
    return [
        *steps,
        node("MatMul", [f"{name}/q/heads", f"{name}/k/heads"], f"{name}/scores"),
        node("Mul", [f"{name}/scores", factor], f"{name}/scaled"),
        node("Add", [f"{name}/scaled", f"{READ}/mask"], f"{name}/masked"),
        node("Softmax", [f"{name}/masked"], f"{name}/shares", axis=-1),
        node("MatMul", [f"{name}/shares", f"{name}/v/heads"], f"{name}/mixed"),
        node("Transpose", [f"{name}/mixed"], f"{name}/tokens", perm=TOKENS_FIRST),
        node("Reshape", [f"{name}/tokens", merge], output),
    ]


def _readers(graph: Graph) -> dict[str, list[NodeProto]]:
    """Tensor name -> the nodes that read it; for the graph's outputs one more."""
    readers = graph.consumers()
    for value in graph.model.graph.output:
        readers[value.name].append(NodeProto(op_type="output"))
    return readers


def _is_the_mask(name: str, graph: Graph, makers: dict[str, NodeProto]) -> bool:
    """Whether a tensor is 0 where the input `mask` is 1 and very low where it is 0, for all queries."""
    steps = {}
    for op in ("Mul", "Sub", "Cast", "Unsqueeze"):
        steps[op] = makers.get(name, NodeProto())
        if steps[op].op_type != op:
            return False
        name = steps[op].input[1 if op == "Sub" else 0]
    factor = _scalar(steps["Mul"].input[1], graph)
    one = _scalar(steps["Sub"].input[0], graph)
    axes = graph.constants.get(steps["Unsqueeze"].input[1])
    return (
        name == "mask"
        and factor is not None
        and factor <= LOWEST
        and one == 1
        and axes is not None
        and axes.tolist() == [1, 2]
    )


def _scalar(name: str, graph: Graph) -> float | None:
    """The value of a constant that has one; None for anything else."""
    value = graph.constants.get(name)
    return float(value.item()) if value is not None and value.size == 1 else None

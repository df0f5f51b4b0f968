"""The refiner's ONNX graph: a decoder of the Llama family over a static cache, several new tokens a step.

The graph is written node by node, not traced: it stays small, its names are those of the weights
file, and each choice in it stands in one place. Inputs and outputs:

ids     [1, T] int64     new tokens; they follow the `past` tokens in the cache
past    [1] int32        tokens kept in the cache: lowering it forgets the rest
first   [1] int64        the first of the T rows whose next token is wanted
past.key.i, past.value.i      [1, kv heads, capacity, head size]; updated in place
tokens  [T - first]      most likely next token after each wanted row
mean, deviation  [C]     the second look's latent severities, read at row `first`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from lance_edge.llama import LlamaShape, RopeScaling
from lance_edge.weights import (
    LEVELS,
    WEIGHTS,
    Entry,
    Precision,
    gate_block,
    hadamard,
    hidden_block,
    layout,
)
from lance_edge_export.graph import CONTRIBUTED, FLOAT, PRODUCT, contributed, node

OPSET, IR = 21, 10
HIDDEN = -1e30  # a score of zero weight; minus infinity would make rows of nothing else NaN
WINDOWED = ".window"  # after the names of rotary tables of layers with a window


def rotary_rates(base: float, head_size: int, scaling: RopeScaling | None) -> npt.NDArray[Any]:
    """By how much each pair of a head's dimensions turns from one position to the next  [head_size / 2]"""
    half = head_size // 2
    rates: npt.NDArray[Any] = base ** (-np.arange(half) / half)
    if scaling is None:
        return rates
    if scaling.kind == "linear":
        return rates / scaling.factor
    turns = scaling.original_context * rates / (2 * np.pi)
    span = scaling.high_factor - scaling.low_factor
    kept = np.clip((turns - scaling.low_factor) / span, 0, 1)  # 1: as it was; 0: slowed down
    result: npt.NDArray[Any] = rates * (kept + (1 - kept) / scaling.factor)
    return result


def decoder_graph(
    shape: LlamaShape, categories: int, precision: Precision, context: int
) -> onnx.ModelProto:
    """The graph without its weights: they are named as external data of the weights file.

    context  positions that the rotary tables cover: the longest cache
    """
    entries = layout(shape, categories, precision)
    return assemble(Builder(shape, precision, context), entries, categories)


def assemble(builder: Builder, entries: list[Entry], categories: int) -> onnx.ModelProto:
    """The graph that a builder makes, over the weights that `entries` describe."""
    shape = builder.shape
    builder.tables()
    hidden = builder.embed("ids")
    for layer in range(shape.layers):
        hidden = builder.layer(layer, hidden)
    builder.outputs(hidden)
    cache: list[str | int | None] = ["batch", shape.kv_heads, "capacity", shape.head_size]
    kept = [f"{kind}.{layer}" for layer in range(shape.layers) for kind in ("key", "value")]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        builder.nodes,
        "decoder",
        [
            value("ids", TensorProto.INT64, [1, "T"]),
            value("past", TensorProto.INT32, [1]),
            value("first", TensorProto.INT64, [1]),
            *(value(f"past.{name}", builder.cache_type, cache) for name in kept),
        ],
        [
            value("tokens", TensorProto.INT64, ["wanted"]),
            value("log_probabilities", FLOAT, ["wanted"]),
            value("mean", FLOAT, [categories]),
            value("deviation", FLOAT, [categories]),
            *(value(f"present.{name}", builder.cache_type, cache) for name in kept),
        ],
        [*builder.constants.values(), *map(_external, entries)],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*domain) for domain in builder.domains],
        ir_version=builder.ir_version,
        producer_name="lance-edge",
    )


class Builder:
    """Collects nodes; each method adds one part of the network and returns its output's name."""

    domains: Sequence[tuple[str, int]] = (("", OPSET), (CONTRIBUTED, 1))
    ir_version = IR
    cache_type: int = FLOAT

    def __init__(self, shape: LlamaShape, precision: Precision, context: int) -> None:
        self.shape, self.precision, self.context = shape, precision, context
        # A window that no cache exceeds hides nothing.
        windows = [shape.window(layer) for layer in range(shape.layers)]
        self.windows = [0 if size >= context else size for size in windows]
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def add(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(node(op, inputs, output, **attributes))
        return output

    def constant(self, name: str, value: object, dtype: type[np.generic]) -> str:
        made = numpy_helper.from_array(np.array(value, dtype), name)
        if self.constants.setdefault(name, made) != made:
            raise ValueError(f"the graph already has another constant called {name}")
        return name

    def tables(self) -> None:
        """What all layers share: lengths, rotary tables, the quantised inputs' zero point."""
        shape = self.shape
        self.rotary_tables("", rotary_rates(shape.rope_base, shape.head_size, shape.rope_scaling))
        if shape.window_rope_base:
            rates = rotary_rates(shape.window_rope_base, shape.head_size, None)
            self.rotary_tables(WINDOWED, rates)
        self.add("Shape", ["ids"], "T", start=1, end=2)
        self.positions()
        if self.precision == "int8":
            self.constant("middle", LEVELS, np.uint8)
            self.add("Expand", [self.constant("middle.row", [LEVELS], np.uint8), "T"], "middle.T")

    def positions(self) -> None:
        """Where the new tokens stand, as attention wants to know it."""
        self.add("Cast", ["T"], "T.int32", to=TensorProto.INT32)
        self.add("Add", ["past", "T.int32"], "total.row")
        self.add("Sub", ["total.row", self.constant("one.int32", [1], np.int32)], "last")
        self.add("Squeeze", ["total.row"], "total")
        if any(self.windows):
            self.masks()

    def masks(self) -> None:
        """What hides the tokens before a window from each row, for every size of window.

        GroupQueryAttention has an attribute for windows, but ONNX Runtime 1.23 takes it for one
        token more than 1.31 does. So this is added to attention's scores  [1, 1, T, total]
        """
        zero, one = (self.constant(n, v, np.int64) for n, v in (("at0", 0), ("by1", 1)))
        self.add("Cast", ["total"], "total.int64", to=TensorProto.INT64)
        self.add("Range", [zero, "total.int64", one], "columns")
        self.add("Cast", ["past"], "past.int64", to=TensorProto.INT64)
        self.add("Squeeze", ["T"], "T.scalar")
        self.add("Range", [zero, "T.scalar", one], "new")
        self.add("Add", ["new", "past.int64"], "positions")
        axis = self.constant("minus1", [-1], np.int64)
        self.add("Unsqueeze", ["positions", axis], "positions.column")
        self.add("Sub", ["positions.column", "columns"], "distance")  # [T, total]
        hidden = self.constant("hidden", HIDDEN, np.float32)
        seen = self.constant("seen", 0, np.float32)
        axes = self.constant("axes01", [0, 1], np.int64)
        for size in sorted({*self.windows} - {0}):
            name = f"window.{size}"
            self.add(
                "Less", ["distance", self.constant(f"{name}.size", size, np.int64)], f"{name}.near"
            )
            self.add("Where", [f"{name}.near", seen, hidden], f"{name}.rows")
            self.add("Unsqueeze", [f"{name}.rows", axes], name)

    def rotary_tables(self, name: str, rates: npt.NDArray[Any]) -> None:
        angle = np.arange(self.context)[:, None] * rates  # [context, half]
        self.constant(f"cos{name}", np.cos(angle), np.float32)
        self.constant(f"sin{name}", np.sin(angle), np.float32)

    def embed(self, ids: str) -> str:
        self.add("Gather", ["embedding", ids], "embed.columns", axis=1)  # [H, 1, T]
        self.add("Transpose", ["embed.columns"], "embed.rows", perm=[1, 2, 0])
        return self.turn(self.float_rows(ids), "enter", "embed")

    def float_rows(self, ids: str) -> str:
        """The embeddings, `embed.rows`, in fp32."""
        if self.precision == "fp32":
            return "embed.rows"
        self.add("Cast", ["embed.rows"], "embed.float", to=FLOAT)
        self.add("Gather", ["embedding.scale", ids], "embed.scale")
        self.add("Unsqueeze", ["embed.scale", self.constant("minus1", [-1], np.int64)], "embed.s")
        return self.add("Mul", ["embed.float", "embed.s"], "embed.scaled")

    def turn(self, x: str, by: str, output: str) -> str:
        """Into the stream between the layers or out of it, which may be a rotated one."""
        return self.add("MatMul" if self.shape.rotatable else "Mul", [x, by], output)

    def layer(self, index: int, hidden: str) -> str:
        name = f"{index}."
        qkv = self.product(f"{name}qkv", self.read(f"{name}qkv.norm", hidden))
        o = self.product(f"{name}o", self.attention(index, qkv))
        if self.shape.post_norms:
            o = self.scaled_norm(f"{name}after_attention", o)
        hidden = self.add("Add", [hidden, o], f"{name}middle")
        both = self.product(f"{name}gate_up", self.read(f"{name}gate_up.norm", hidden))
        self.nodes.append(
            node("Split", [both], [f"{name}gate", f"{name}up"], axis=-1, num_outputs=2)
        )
        x = self.add("Mul", [self.activation(name), f"{name}up"], f"{name}gated")
        down = self.product(f"{name}down", self.rotate_gated(x))
        if self.shape.post_norms:
            down = self.scaled_norm(f"{name}after_mlp", down)
        return self.add("Add", [hidden, down], f"{name}out")

    def read(self, name: str, hidden: str) -> str:
        """What a product reads of the stream."""
        x = self.norm(name, hidden)
        if self.shape.rotatable:
            return x
        return self.rotate_blocks(x, ".hidden", hidden_block(self.shape), self.shape.hidden)

    def attention(self, index: int, qkv: str) -> str:
        """Queries of the new tokens over all that is kept; updates the cache  [1, T, heads * size]"""
        name, shape = f"{index}.", self.shape
        table = WINDOWED if shape.window(index) and shape.window_rope_base else ""
        mask = ["", f"window.{self.windows[index]}"] if self.windows[index] else []
        inputs = self.normed_heads(index, qkv) if shape.head_norms else [qkv, "", ""]
        optional: dict[str, Any] = {}
        if shape.attention_scale:
            optional["scale"] = shape.attention_scale
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [
                    *inputs,
                    f"past.key.{index}",
                    f"past.value.{index}",
                    "last",
                    "total",
                    f"cos{table}",
                    f"sin{table}",
                    *mask,
                ],
                [f"{name}attended", f"present.key.{index}", f"present.value.{index}"],
                name=f"{name}attention",
                domain=CONTRIBUTED,
                num_heads=shape.heads,
                kv_num_heads=shape.kv_heads,
                do_rotary=1,
                **optional,
            )
        )
        return f"{name}attended"

    def normed_heads(self, index: int, qkv: str) -> list[str]:
        """Queries, keys and values apart; each head's queries and keys normalised."""
        shape = self.shape
        name = f"{index}."
        width, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        sizes = self.constant("qkv.sizes", [width, kv, kv], np.int64)
        parts = [f"{name}q", f"{name}k", f"{name}v"]
        self.nodes.append(node("Split", [qkv, sizes], parts, axis=-1))
        heads = self.constant("heads", [0, 0, -1, shape.head_size], np.int64)
        flat = self.constant("heads.flat", [0, 0, -1], np.int64)
        for part in parts[:2]:
            self.add("Reshape", [part, heads], f"{part}.heads")
            normed = self.scaled_norm(f"{part}_norm", f"{part}.heads")
            self.add("Reshape", [normed, flat], f"{part}.normed")
        return [f"{name}q.normed", f"{name}k.normed", f"{name}v"]

    def activation(self, name: str) -> str:
        """Of the gate."""
        if self.shape.activation == "gelu_tanh":
            return self.add("Gelu", [f"{name}gate"], f"{name}gelu", approximate="tanh")
        # x * sigmoid(alpha * x): what ONNX Runtime would make of Sigmoid and Mul.
        return self.add("QuickGelu", [f"{name}gate"], f"{name}silu", alpha=1.0, domain=CONTRIBUTED)

    def rotate_gated(self, x: str) -> str:
        """Spread outliers over their block (see `make_weights`)."""
        return self.rotate_blocks(x, "", gate_block(self.shape), self.shape.intermediate)

    def rotate_blocks(self, x: str, kind: str, block: int, width: int) -> str:
        """Each block of so many neighbours times a Hadamard matrix; `kind` ends the constants' names."""
        turn = self.constant(f"turn{kind}", hadamard(np.eye(block, dtype=np.float32)), np.float32)
        blocks = self.constant(f"blocks{kind}", [1, -1, block], np.int64)
        rows = self.constant(f"rows{kind}", [1, -1, width], np.int64)
        self.add("Reshape", [x, blocks], f"{x}.blocks")
        self.add("MatMul", [f"{x}.blocks", turn], f"{x}.turned")
        return self.add("Reshape", [f"{x}.turned", rows], f"{x}.rotated")

    def outputs(self, hidden: str) -> None:
        normed = self.turn(self.norm("final", hidden), "leave", "normed")
        end = self.constant("end", [2**31 - 1], np.int64)
        axis = self.constant("axis1", [1], np.int64)
        wanted = self.add("Slice", [normed, "first", end, axis], "wanted")
        if self.precision == "int8":
            self.add("Shape", [wanted], "wanted.T", start=1, end=2)
            self.add("Expand", ["middle.row", "wanted.T"], "middle.wanted")
        # A cap on the logits, as some Gemma networks have, would not change which is the largest, and is not
        # in the log-probabilities.
        matrix = "embedding" if self.shape.tied else "output"
        logits = self.product(matrix, wanted, middle="middle.wanted")
        self.add("ArgMax", [logits], "tokens.row", axis=-1, keepdims=0)
        zero = self.constant("zero", [0], np.int64)
        self.add("Squeeze", ["tokens.row", zero], "tokens")
        # The largest logit's log-probability: -log of the sum of exp(logit - largest).
        vocabulary = self.constant("vocabulary", [-1], np.int64)
        self.add("ReduceMax", [logits, vocabulary], "largest", keepdims=1)
        self.add("Sub", [logits, "largest"], "below.largest")
        self.add("ReduceLogSumExp", ["below.largest", vocabulary], "surprise", keepdims=0)
        self.add("Neg", ["surprise"], "log_probabilities.row")
        self.add("Squeeze", ["log_probabilities.row", zero], "log_probabilities")
        one = self.constant("one", [1], np.int64)
        state = self.add("Slice", [wanted, zero, one, axis], "state")
        flat = self.add("Reshape", [state, self.constant("row", [1, -1], np.int64)], "state.row")
        for look in ("mean", "deviation"):
            self.add("Gemm", [flat, f"look.{look}", f"look.{look}.bias"], f"look.{look}.row")
        self.add("Squeeze", ["look.mean.row", zero], "mean")
        self.add("Softplus", ["look.deviation.row"], "look.deviation.soft")
        self.add("Squeeze", ["look.deviation.soft", zero], "deviation.open")
        self.add("Add", ["deviation.open", self.constant("least", 1e-3, np.float32)], "deviation")

    def norm(self, name: str, hidden: str) -> str:
        """The root mean square norm; its weights are folded into the product that follows."""
        return self.norm_by(
            self.constant("ones", np.ones(self.shape.hidden), np.float32), hidden, name
        )

    def scaled_norm(self, weight: str, x: str) -> str:
        """The root mean square norm with its weights."""
        return self.norm_by(weight, x, weight)

    def norm_by(self, weight: str, x: str, name: str) -> str:
        # In ONNX's own domain by name, though only ONNX Runtime has it.
        return self.add(
            "SimplifiedLayerNormalization",
            [x, weight],
            f"{name}.out",
            axis=-1,
            epsilon=self.shape.norm_epsilon,
        )

    def product(self, weight: str, x: str, middle: str = "middle.T") -> str:
        """x @ weight, and its bias if it has one; in int8, each row of x is quantised on its own,
        so that no row's result depends on its neighbours."""
        multiply = self.float_product if self.precision == "fp32" else self.int8_product
        if weight.rpartition(".")[2] not in self.shape.biases:
            return multiply(weight, x, middle, f"{weight}.out")
        plain = multiply(weight, x, middle, f"{weight}.plain")
        return self.add("Add", [plain, f"{weight}.bias"], f"{weight}.out")

    def float_product(self, weight: str, x: str, middle: str, output: str) -> str:
        return self.add("MatMul", [x, weight], output)

    def int8_product(self, weight: str, x: str, middle: str, output: str) -> str:
        name = f"{weight}.in"
        self.add("Abs", [x], f"{name}.abs")
        axes = self.constant("minus1", [-1], np.int64)
        self.add("ReduceMax", [f"{name}.abs", axes], f"{name}.max", keepdims=1)  # [1, T, 1]
        share = self.constant("share", 1 / LEVELS, np.float32)
        self.add("Mul", [f"{name}.max", share], f"{name}.scale")
        flat = self.constant("flat", [-1], np.int64)
        self.add("Reshape", [f"{name}.scale", flat], f"{name}.scale.row")
        self.add("QuantizeLinear", [x, f"{name}.scale.row", middle], f"{name}.int8", axis=1)
        unit = self.constant("unit", 1, np.float32)
        factors = [f"{name}.int8", weight, unit, f"{weight}.scale", "middle"]
        self.nodes.append(contributed(PRODUCT, factors, f"{weight}.scaled"))
        return self.add("Mul", [f"{weight}.scaled", f"{name}.scale"], output)


def _external(entry: Entry) -> TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(entry.dtype)
    tensor = TensorProto(name=entry.name, data_type=kind, dims=entry.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (
        ("location", WEIGHTS),
        ("offset", str(entry.offset)),
        ("length", str(entry.bytes)),
    ):
        tensor.external_data.add(key=key, value=value)
    return tensor

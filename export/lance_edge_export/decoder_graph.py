"""The refiner's ONNX graph: a Llama decoder over a static cache, several new tokens a step.

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

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from lance_edge.llama import LlamaShape
from lance_edge.weights import LEVELS, WEIGHTS, Entry, Precision, gate_block, hadamard, layout
from lance_edge_export.graph import FLOAT, node

OPSET, CONTRIB, IR = 21, "com.microsoft", 10


def decoder_graph(
    shape: LlamaShape, categories: int, precision: Precision, context: int
) -> onnx.ModelProto:
    """The graph without its weights: they are named as external data of the weights file.

    context  positions that the rotary tables cover: the longest cache
    """
    entries = layout(shape, categories, precision)
    return assemble(Builder(shape, precision), entries, categories, context)


def assemble(
    builder: Builder, entries: list[Entry], categories: int, context: int
) -> onnx.ModelProto:
    """The graph that a builder makes, over the weights that `entries` describe."""
    shape = builder.shape
    builder.tables(context)
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

    domains: Sequence[tuple[str, int]] = (("", OPSET), (CONTRIB, 1))
    ir_version = IR
    cache_type: int = FLOAT

    def __init__(self, shape: LlamaShape, precision: Precision) -> None:
        self.shape, self.precision = shape, precision
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def add(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(node(op, inputs, output, **attributes))
        return output

    def constant(self, name: str, value: object, dtype: type[np.generic]) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def tables(self, context: int) -> None:
        """What all layers share: lengths, rotary tables, the quantised inputs' zero point."""
        half = self.shape.head_size // 2
        rate = self.shape.rope_base ** (-np.arange(half) / half)
        angle = np.arange(context)[:, None] * rate  # [context, half]
        self.constant("cos", np.cos(angle), np.float32)
        self.constant("sin", np.sin(angle), np.float32)
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

    def embed(self, ids: str) -> str:
        self.add("Gather", ["embedding", ids], "embed.columns", axis=1)  # [H, 1, T]
        self.add("Transpose", ["embed.columns"], "embed.rows", perm=[1, 2, 0])
        return self.add("MatMul", [self.float_rows(ids), "enter"], "embed")

    def float_rows(self, ids: str) -> str:
        """The embeddings, `embed.rows`, in fp32."""
        if self.precision == "fp32":
            return "embed.rows"
        self.add("Cast", ["embed.rows"], "embed.float", to=FLOAT)
        self.add("Gather", ["embedding.scale", ids], "embed.scale")
        self.add("Unsqueeze", ["embed.scale", self.constant("minus1", [-1], np.int64)], "embed.s")
        return self.add("Mul", ["embed.float", "embed.s"], "embed.scaled")

    def layer(self, index: int, hidden: str) -> str:
        name = f"{index}."
        x = self.norm(f"{name}qkv.norm", hidden)
        qkv = self.product(f"{name}qkv", x)
        o = self.product(f"{name}o", self.attention(index, qkv))
        hidden = self.add("Add", [hidden, o], f"{name}middle")
        x = self.norm(f"{name}gate_up.norm", hidden)
        both = self.product(f"{name}gate_up", x)
        self.nodes.append(
            node("Split", [both], [f"{name}gate", f"{name}up"], axis=-1, num_outputs=2)
        )
        self.add("Sigmoid", [f"{name}gate"], f"{name}sigmoid")
        self.add("Mul", [f"{name}gate", f"{name}sigmoid"], f"{name}silu")
        x = self.add("Mul", [f"{name}silu", f"{name}up"], f"{name}gated")
        down = self.product(f"{name}down", self.rotate_gated(x))
        return self.add("Add", [hidden, down], f"{name}out")

    def attention(self, index: int, qkv: str) -> str:
        """Queries of the new tokens over all that is kept; updates the cache  [1, T, heads * size]"""
        kept = [f"past.key.{index}", f"past.value.{index}"]
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [qkv, "", "", *kept, "last", "total", "cos", "sin"],
                [f"{index}.attended", f"present.key.{index}", f"present.value.{index}"],
                name=f"{index}.attention",
                domain=CONTRIB,
                num_heads=self.shape.heads,
                kv_num_heads=self.shape.kv_heads,
                do_rotary=1,
            )
        )
        return f"{index}.attended"

    def rotate_gated(self, x: str) -> str:
        """Spread outliers over their block (see `make_weights`)."""
        block = gate_block(self.shape)
        turn = self.constant("turn", hadamard(np.eye(block, dtype=np.float32)), np.float32)
        blocks = self.constant("blocks", [1, -1, block], np.int64)
        rows = self.constant("rows", [1, -1, self.shape.intermediate], np.int64)
        self.add("Reshape", [x, blocks], f"{x}.blocks")
        self.add("MatMul", [f"{x}.blocks", turn], f"{x}.turned")
        return self.add("Reshape", [f"{x}.turned", rows], f"{x}.rotated")

    def outputs(self, hidden: str) -> None:
        normed = self.add("MatMul", [self.norm("final", hidden), "leave"], "normed")
        end = self.constant("end", [2**31 - 1], np.int64)
        axis = self.constant("axis1", [1], np.int64)
        wanted = self.add("Slice", [normed, "first", end, axis], "wanted")
        if self.precision == "int8":
            self.add("Shape", [wanted], "wanted.T", start=1, end=2)
            self.add("Expand", ["middle.row", "wanted.T"], "middle.wanted")
        logits = self.product("embedding", wanted, middle="middle.wanted")
        self.add("ArgMax", [logits], "tokens.row", axis=-1, keepdims=0)
        zero = self.constant("zero", [0], np.int64)
        self.add("Squeeze", ["tokens.row", zero], "tokens")
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
        ones = self.constant("ones", np.ones(self.shape.hidden), np.float32)
        # In ONNX's own domain by name, though only ONNX Runtime has it.
        return self.add(
            "SimplifiedLayerNormalization",
            [hidden, ones],
            f"{name}.out",
            axis=-1,
            epsilon=self.shape.norm_epsilon,
        )

    def product(self, weight: str, x: str, middle: str = "middle.T") -> str:
        """x @ weight; in int8, each row of x is quantised on its own, so that no row's result
        depends on its neighbours."""
        if self.precision == "fp32":
            return self.add("MatMul", [x, weight], f"{weight}.out")
        name = f"{weight}.in"
        self.add("Abs", [x], f"{name}.abs")
        axes = self.constant("minus1", [-1], np.int64)
        self.add("ReduceMax", [f"{name}.abs", axes], f"{name}.max", keepdims=1)  # [1, T, 1]
        share = self.constant("share", 1 / LEVELS, np.float32)
        self.add("Mul", [f"{name}.max", share], f"{name}.scale")
        flat = self.constant("flat", [-1], np.int64)
        self.add("Reshape", [f"{name}.scale", flat], f"{name}.scale.row")
        self.add("QuantizeLinear", [x, f"{name}.scale.row", middle], f"{name}.int8", axis=1)
        self.add("MatMulInteger", [f"{name}.int8", weight, "middle"], f"{weight}.int32")
        # One DequantizeLinear would do both, but takes a third longer (ONNX Runtime 1.31).
        self.add("Cast", [f"{weight}.int32"], f"{weight}.float", to=FLOAT)
        self.add("Mul", [f"{weight}.float", f"{weight}.scale"], f"{weight}.scaled")
        return self.add("Mul", [f"{weight}.scaled", f"{name}.scale"], f"{weight}.out")


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

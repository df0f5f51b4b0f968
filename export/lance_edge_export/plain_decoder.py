"""The decoder graph in standard operators and floating point, as TensorRT's parsers read it.

Inputs, outputs and names are those of `decoder_graph`, so one runtime drives both. What differs:

- products are floating point: TensorRT has no integer product with one scale a row;
- the cache is written with ScatterND, and attention masks by absolute position, so that several new
  tokens a step and a lowered `past` work;
- with floating point weights the gated activations are not rotated: nothing is rounded to 8 bits. Their
  weights are turned back.

In fp16 and int8, the cache and the inputs of products are fp16. In fp16 so are the layers' weights; in int8,
they stay the bundle's integers, which become fp16 where a product reads them: a step of a few tokens takes
as long as reading the weights does. Sums along the residual stream, norms, rotary positions, softmax and the
second look stay in fp32. So do the logits: fp16 has 11 bits, and close ones of 49,152 would round to one
number. (With an fp16 embedding and a cast before the product, a plan holds it twice: rtx 1.7.1 folds the
cast.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from lance_edge.llama import LlamaShape
from lance_edge.weights import (
    ALIGNMENT,
    Array,
    Entry,
    gate_block,
    layout,
    matrix_sizes,
    rotate_blocks,
)
from lance_edge_export.decoder_graph import Builder, assemble
from lance_edge_export.graph import FLOAT, HALF

FloatPrecision = Literal["fp32", "fp16"]
PlainPrecision = Literal["fp32", "fp16", "int8"]  # of the weights

# The embedding once more, by tokens and in fp16: TensorRT takes integers as weights of products alone.
LOOKUP = "embedding.lookup"
HIDDEN = -1e9  # added to the scores of positions that a token may not see


def plain_decoder_graph(
    shape: LlamaShape, categories: int, precision: PlainPrecision, context: int
) -> onnx.ModelProto:
    """The graph without its weights: they are named as external data of a file in `plain_layout`."""
    entries = plain_layout(shape, categories, precision)
    return assemble(PlainBuilder(shape, precision, context), entries, categories)


def plain_layout(shape: LlamaShape, categories: int, precision: PlainPrecision) -> list[Entry]:
    """The arrays of the graph's weights file in order; the layers' matrices are in the precision."""
    halves = set() if precision == "fp32" else _layers(shape)
    if precision == "int8":
        halves = {f"{name}.scale" for name in halves}
    wanted = layout(shape, categories, "int8" if precision == "int8" else "fp32")
    if precision == "int8":
        wanted.append(Entry(LOOKUP, np.dtype("f2"), (shape.vocabulary, shape.hidden), 0))
    entries: list[Entry] = []
    end = 0
    for entry in wanted:
        dtype = np.dtype("f2") if entry.name in halves else entry.dtype
        made = Entry(entry.name, dtype, entry.shape, -(-end // ALIGNMENT) * ALIGNMENT)
        entries.append(made)
        end = made.offset + made.bytes
    return entries


def plain_weights(
    weights: Mapping[str, Array], shape: LlamaShape, entries: list[Entry]
) -> Iterator[tuple[str, Array]]:
    """The arrays that `entries` name, made one by one.

    weights  those of a pulled weights file, in int8 with scales or in fp32; for int8, in int8
    """
    for entry in entries:
        if entry.name == LOOKUP:
            array = _floats("embedding", weights).T
        elif entry.dtype == np.int8:
            array = weights[entry.name]
        else:
            array = _floats(entry.name, weights)
            if entry.name.endswith(".down"):
                array = rotate_blocks(array, gate_block(shape), 0)  # its own inverse
        yield entry.name, np.ascontiguousarray(array, entry.dtype)


class PlainBuilder(Builder):
    """Adds the same parts in standard operators."""

    def __init__(self, shape: LlamaShape, precision: PlainPrecision, context: int) -> None:
        super().__init__(shape, "fp32", context)
        self.integers, self.half = precision == "int8", precision != "fp32"
        self.cache_type = HALF if self.half else FLOAT
        # The first opsets that have all operators, and integers that become fp16: old parsers read those.
        self.domains = (("", 19 if self.integers else 18),)
        self.ir_version = 9 if self.integers else 8

    def embed(self, ids: str) -> str:
        if not self.integers:
            return super().embed(ids)
        self.add("Gather", [LOOKUP, ids], "embed.half")  # [1, T, H]
        return self.turn(self.add("Cast", ["embed.half"], "embed.rows", to=FLOAT), "enter", "embed")

    def positions(self) -> None:
        """Rotary rows, where to write, and what each new token may see; shared by all layers."""
        heads, group = self.shape.kv_heads, self.shape.heads // self.shape.kv_heads
        integer, zero = np.int64, self.constant("zero", [0], np.int64)
        one = self.constant("one", [1], integer)
        count = len(self.table("cos"))
        order = self.constant("order", np.arange(count), integer)
        self.add("Cast", ["past"], "past.int64", to=TensorProto.INT64)
        self.add("Slice", [order, zero, "T"], "order.T")
        self.add("Add", ["order.T", "past.int64"], "positions")
        for name in ("cos", "sin"):
            self.add("Gather", [name, "positions"], f"{name}.T")  # [T, half]

        # ScatterND's indices: (0, head, position) of each row that is written
        head = np.stack([np.zeros(heads, integer), np.arange(heads)], -1)[None, :, None]
        self.constant("heads", head, integer)  # [1, kv heads, 1, 2]
        self.add("Concat", [one, self.constant("kv", [heads], integer), "T", one], "column", axis=0)
        self.add("Concat", [one, one, "T", one], "cell", axis=0)
        pair = self.constant("pair", [2], integer)
        self.add("Concat", [one, one, "T", pair], "pairs", axis=0)
        self.add("Expand", ["heads", "pairs"], "written.heads")
        self.add("Reshape", ["positions", "cell"], "positions.cell")
        self.add("Expand", ["positions.cell", "column"], "written.positions")
        self.add("Concat", ["written.heads", "written.positions"], "written", axis=-1)

        self.add("Shape", ["past.key.0"], "capacity", start=2, end=3)
        self.add("Slice", [order, zero, "capacity"], "seen.by")
        self.add("Unsqueeze", ["positions", self.constant("axis1", [1], integer)], "seen.from")
        self.add("LessOrEqual", ["seen.by", "seen.from"], "seen")  # [T, capacity]
        shown, hidden = (
            self.constant(name, value, np.float32)
            for name, value in (("shown", 0), ("hidden", HIDDEN))
        )
        self.add("Where", ["seen", shown, hidden], "bias.T")
        # The heads that share keys stand below one another, as rows of one product.
        self.add("Tile", ["bias.T", self.constant("group", [group, 1], integer)], "bias")

    def table(self, name: str) -> Array:
        """A constant's value."""
        return onnx.numpy_helper.to_array(self.constants[name])

    def norm(self, name: str, hidden: str) -> str:
        last = self.constant("minus1", [-1], np.int64)
        self.add("Mul", [hidden, hidden], f"{name}.squares")
        self.add("ReduceMean", [f"{name}.squares", last], f"{name}.mean", keepdims=1)
        least = self.constant("norm.epsilon", self.shape.norm_epsilon, np.float32)
        self.add("Add", [f"{name}.mean", least], f"{name}.above")
        self.add("Sqrt", [f"{name}.above"], f"{name}.root")
        return self.add("Div", [hidden, f"{name}.root"], f"{name}.out")

    def product(self, weight: str, x: str, middle: str = "") -> str:
        """x @ weight, in the graph's precision, logits in fp32; the result is fp32."""
        matrix = self.matrix(weight)
        if weight == "embedding":
            return self.add("MatMul", [x, matrix], f"{weight}.out")
        return self.multiply(x, matrix, f"{weight}.out")

    def matrix(self, weight: str) -> str:
        """A matrix in floating point: in the type of its scales, if it is of integers."""
        if not self.integers:
            return weight
        return self.add("DequantizeLinear", [weight, f"{weight}.scale"], f"{weight}.float", axis=1)

    def attention(self, index: int, qkv: str) -> str:
        name, shape = f"{index}.", self.shape
        heads, kv, size = shape.heads, shape.kv_heads, shape.head_size
        widths = self.constant("qkv.widths", [heads + kv, kv], np.int64)
        split = self.constant("qk.widths", [heads, kv], np.int64)
        by_head = self.constant("by_head", [1, -1, heads + 2 * kv, size], np.int64)
        by_group = self.constant("by_group", [1, kv, -1, size], np.int64)
        by_query = self.constant("by_query", [1, heads, -1, size], np.int64)
        flat = self.constant("flat.heads", [1, -1, heads * size], np.int64)

        self.add("Reshape", [qkv, by_head], f"{name}heads")
        self.add("Transpose", [f"{name}heads"], f"{name}turned", perm=[0, 2, 1, 3])
        self.split([f"{name}turned", widths], [f"{name}qk", f"{name}v"])
        self.split([self.rotary(f"{name}qk"), split], [f"{name}q", f"{name}k"])
        key = self.keep(f"key.{index}", f"{name}k")
        value = self.keep(f"value.{index}", f"{name}v")

        scale = self.constant("attention.scale", size**-0.5, np.float32)
        self.add("Mul", [f"{name}q", scale], f"{name}q.scaled")
        self.add("Reshape", [f"{name}q.scaled", by_group], f"{name}q.rows")
        self.add("Transpose", [key], f"{name}k.columns", perm=[0, 1, 3, 2])
        scores = self.multiply(f"{name}q.rows", f"{name}k.columns", f"{name}scores")
        self.add("Add", [scores, "bias"], f"{name}scores.seen")  # [1, kv, group * T, capacity]
        self.add("Softmax", [f"{name}scores.seen"], f"{name}shares", axis=-1)
        found = self.multiply(f"{name}shares", value, f"{name}found")
        self.add("Reshape", [found, by_query], f"{name}found.heads")
        self.add("Transpose", [f"{name}found.heads"], f"{name}found.tokens", perm=[0, 2, 1, 3])
        return self.add("Reshape", [f"{name}found.tokens", flat], f"{name}attended")

    def rotary(self, x: str) -> str:
        """Each head's halves (a, b) at a position -> (a cos - b sin, b cos + a sin)."""
        self.nodes.append(
            onnx.helper.make_node("Split", [x], [f"{x}.a", f"{x}.b"], axis=-1, num_outputs=2)
        )
        for half, table in (("a", "cos"), ("b", "sin"), ("b", "cos"), ("a", "sin")):
            self.add("Mul", [f"{x}.{half}", f"{table}.T"], f"{x}.{half}.{table}")
        self.add("Sub", [f"{x}.a.cos", f"{x}.b.sin"], f"{x}.a.turned")
        self.add("Add", [f"{x}.b.cos", f"{x}.a.sin"], f"{x}.b.turned")
        return self.add("Concat", [f"{x}.a.turned", f"{x}.b.turned"], f"{x}.turned", axis=-1)

    def keep(self, name: str, new: str) -> str:
        """The cache with the new rows in their places."""
        return self.add(
            "ScatterND", [f"past.{name}", "written", self.narrowed(new)], f"present.{name}"
        )

    def activation(self, name: str) -> str:
        if self.shape.activation == "gelu_tanh":
            return super().activation(name)
        self.add("Sigmoid", [f"{name}gate"], f"{name}sigmoid")
        return self.add("Mul", [f"{name}gate", f"{name}sigmoid"], f"{name}silu")

    def rotate_gated(self, x: str) -> str:
        return super().rotate_gated(x) if self.integers else x

    def multiply(self, x: str, y: str, output: str) -> str:
        """x @ y in the graph's precision; x and the result are fp32."""
        if not self.half:
            return self.add("MatMul", [x, y], output)
        self.add("MatMul", [self.narrowed(x), y], f"{output}.half")
        return self.add("Cast", [f"{output}.half"], output, to=FLOAT)

    def narrowed(self, x: str) -> str:
        """x in the precision of products."""
        return self.add("Cast", [x], f"{x}.narrow", to=HALF) if self.half else x

    def split(self, inputs: list[str], outputs: list[str]) -> None:
        """Parts along the heads' axis."""
        self.nodes.append(onnx.helper.make_node("Split", inputs, outputs, axis=1))


def _floats(name: str, weights: Mapping[str, Array]) -> Array:
    """An array in floating point, whether it is stored in int8 or not."""
    scale = weights.get(f"{name}.scale")
    return weights[name] if scale is None else weights[name].astype(np.float32) * scale


def _layers(shape: LlamaShape) -> set[str]:
    """The matrices of the layers."""
    return {f"{layer}.{name}" for layer in range(shape.layers) for name in matrix_sizes(shape)}

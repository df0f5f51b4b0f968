"""Wide products in int8 or fp8, as TensorRT computes them: with QuantizeLinear and DequantizeLinear around.

TensorRT's 8-bit products have one scale for their whole input, fixed when the plan is built, and one a
column for their weights ("explicit quantization"). Channels that stand out would cost all others their
precision. So they are balanced first (SmoothQuant, Xiao et al., ICML 2023); by how much is chosen on real
prompts: what keeps the product's output closest. (Cutting off the largest inputs too brought nothing.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto

from lance_edge_export.graph import FLOAT, HALF, Graph, node
from lance_edge_export.half import half_products
from lance_edge_export.layers import Feed, layers_by_source, observed
from lance_edge_export.quantise import BALANCE_EXPONENTS, balance_of

EightBit = Literal["int8", "fp8"]
EIGHT_BIT: tuple[EightBit, ...] = get_args(EightBit)

Float = npt.NDArray[np.float32]

TYPES: dict[EightBit, Any] = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}
SAMPLE = 1024  # rows of a product's input that schemes are compared on
SMALLEST = np.float32(2.0**-14)  # fp16's smallest number of full precision; scales are fp16


@dataclass(frozen=True)
class FixedScheme:
    """How a product's input becomes 8 bits: x / balance / scale, rounded  [K], scalar"""

    balance: Float
    scale: np.float32


def eight_bit_products(
    model: onnx.ModelProto, feeds: Sequence[Feed], form: EightBit, keep_fp16: Collection[str] = ()
) -> onnx.ModelProto:
    """An fp32 graph with its wide linear layers in 8 bits, and all else as `half_products` has it.

    feeds      inputs of real prompts
    keep_fp16  layers that are fp16 too, by the names of `linear_layers`

    Raises ExportError if there is no layer of a name in keep_fp16.
    """
    sources = layers_by_source(model, keep_fp16)
    narrow = [layer.output[0] for layers in sources.values() for layer in layers]
    graph = Graph(half_products(model, narrow))
    replacements: dict[str, list[NodeProto]] = {}
    for source, rows in observed(model, list(sources), feeds):
        weights = [graph.constants[layer.input[1]] for layer in sources[source]]
        scheme = fixed_scheme(rows, weights, form)
        steps = _narrow_input(source, scheme, form, graph)
        for layer, weight in zip(sources[source], weights, strict=True):
            (output,) = layer.output
            balanced = weight * scheme.balance[:, None]
            replacements[output] = [*steps, *_product(source, output, balanced, form, graph)]
            steps = []
    graph.replace(replacements)
    return graph.finish()


def fixed_scheme(rows: Float, weights: Sequence[Float], form: EightBit) -> FixedScheme:
    """The balance that keeps the products' outputs closest, and the scale that the largest input needs.

    rows [rows, K] inputs of real prompts, weights [K, N]
    """
    sample = rows[:: max(1, len(rows) // SAMPLE)]
    outputs = [sample @ weight for weight in weights]
    channels = np.abs(rows).max(0)

    def scheme(balance: Float) -> FixedScheme:
        largest = (channels / balance).max()
        return FixedScheme(balance, _half_scale(largest / np.float32(LARGEST[form])))

    def error(candidate: FixedScheme) -> float:
        inputs = _rounded(sample / candidate.balance, candidate.scale, form)
        return sum(
            float(
                np.square(y - inputs @ _rounded_columns(w * candidate.balance[:, None], form)).sum()
            )
            for y, w in zip(outputs, weights, strict=True)
        )

    balances = [np.ones_like(channels)]
    balances += [
        balance_of(channels, weights, exponent).astype(np.float32) for exponent in BALANCE_EXPONENTS
    ]
    return min(map(scheme, balances), key=error)


def narrowed(values: Float, scale: Float | np.float32, form: EightBit) -> npt.NDArray[Any]:
    """values / scale in 8 bits, rounded to the nearest."""
    levels = np.clip(values / scale, -LARGEST[form], LARGEST[form])
    stored: npt.NDArray[Any] = (np.rint(levels) if form == "int8" else levels).astype(TYPES[form])
    return stored


def narrow_columns(weight: Float, form: EightBit) -> tuple[npt.NDArray[Any], Float]:
    """weight [K, N] -> 8 bits [K, N] and scales [N] with weight ~ stored * scales"""
    scales = _half_scale(np.abs(weight).max(0) / np.float32(LARGEST[form]))
    return narrowed(weight, scales, form), scales


def _rounded(values: Float, scale: Float | np.float32, form: EightBit) -> Float:
    result: Float = narrowed(values, scale, form).astype(np.float32) * scale
    return result


def _rounded_columns(weight: Float, form: EightBit) -> Float:
    stored, scales = narrow_columns(weight, form)
    result: Float = stored.astype(np.float32) * scales
    return result


def _half_scale(scale: Any) -> Any:
    """A scale, or several, that fp16 holds exactly."""
    return np.maximum(scale, SMALLEST).astype(np.float16).astype(np.float32)


def _narrow_input(
    source: str, scheme: FixedScheme, form: EightBit, graph: Graph
) -> list[NodeProto]:
    """source [..., K] -> `source/8bit`, which is fp16 again

    int8 is made from fp32: on the CPU, ONNX Runtime up to 1.29 cuts fp16 off instead of rounding it
    (its pull request 32452). fp8 is made from fp16: made from fp32, ONNX Runtime moves it before
    operators that do not take fp8.
    """
    balanced, steps = source, []
    if (scheme.balance != 1).any():
        balanced = f"{source}/balanced"
        factors = graph.constant(f"{source}/balance", 1 / scheme.balance)
        steps = [node("Mul", [source, factors], balanced)]
    values, scale, scale16 = balanced, f"{source}/scale", f"{source}/scale16"
    graph.constant(scale16, np.array(scheme.scale, np.float16))
    if form == "int8":
        graph.constant(scale, np.array(scheme.scale, np.float32))
    else:
        values, scale = f"{source}/narrow16", scale16
        steps.append(node("Cast", [balanced], values, to=HALF))
    zero = graph.constant(f"{form}/zero", np.zeros((), TYPES[form]))
    return [
        *steps,
        node("QuantizeLinear", [values, scale, zero], f"{source}/{form}"),
        node("DequantizeLinear", [f"{source}/{form}", scale16, zero], f"{source}/8bit"),
    ]


def _product(
    source: str, output: str, weight: Float, form: EightBit, graph: Graph
) -> list[NodeProto]:
    stored, scales = narrow_columns(weight, form)
    parts = [
        graph.constant(f"{output}/weight", stored),
        graph.constant(f"{output}/weight/scale", scales.astype(np.float16)),
        graph.constant(f"{output}/weight/zero", np.zeros(len(scales), TYPES[form])),
    ]
    return [
        node("DequantizeLinear", parts, f"{output}/weight16", axis=1),
        node("MatMul", [f"{source}/8bit", f"{output}/weight16"], f"{output}/product16"),
        node("Cast", [f"{output}/product16"], output, to=FLOAT),
    ]

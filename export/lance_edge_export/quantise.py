"""int8 in which a row's result does not depend on the other rows.

Per-tensor dynamic quantisation (`DynamicQuantizeLinear`) cannot promise that: its scale is the largest
row's. Here a layer's input has a fixed scale, chosen on real prompts, or each of its rows has its own,
where a fixed one would cost too much or no prompts are given. Each output column of the weights has its own.

A fixed scale is the faster one: one node rounds the input, and ONNX Runtime's own `MatMulIntegerToFloat`
multiplies and scales. A scale a row takes seven more.

Activations are unsigned, with a zero point per layer. CPUs without VNNI add two neighbouring products in
16 bits, and cut off what does not fit. So two neighbouring weights of a column sum up to 128 at most: even
the largest sum, 255 * 128, fits, and every CPU computes the same integers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto

from lance_edge_export.graph import FLOAT, PRODUCT, Graph, attribute, contributed, node
from lance_edge_export.layers import Feed, layers_by_source, observed

# How the tensors between an input and its product end; `float_screener` reads them.
BALANCED, LEVELS, COLUMNS = "/balanced", "/levels", "/columns"

WEIGHT_LEVELS = 127  # 8 bits, symmetric; tables too
PAIR_LEVELS = 128  # of two neighbouring weights of a column together
ACTIVATION_LEVELS = 255  # 8 bits, unsigned, around a zero point
# Tried per layer; low ones suit inputs that are mostly positive.
ZERO_POINTS = (128, 96, 64, 32, 16)
ONE = np.array(1, dtype=np.float32)
SMALLEST_SCALE = np.array(1e-12, dtype=np.float32)  # an all-zero row has no scale of its own

# How much of the range of a layer's inputs a fixed scale covers; what lies beyond is cut off.
COVERED = (1.0, 0.9, 0.8, 0.7, 0.6)
FIXED_MAY_COST = 2.0  # times the error of one scale a row

BALANCE_EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
HESSIAN_DAMPING = 0.01
HESSIAN_BLOCK = 128
COMPARED_ROWS = 512  # of a layer's inputs, on which schemes are compared


def int8_products(
    model: onnx.ModelProto, feeds: Sequence[Feed] = (), keep_fp32: Collection[str] = ()
) -> onnx.ModelProto:
    """The same graph with its wide linear layers and embedding tables in int8.

    feeds      inputs of real prompts; with them, each layer's input channels are balanced, its input
               has a fixed scale if that costs little, and its weights are rounded so that the layer's
               output, not each weight, stays close
    keep_fp32  layers that are left as they are, by the names of `linear_layers`

    Raises ExportError if there is no layer of a name in keep_fp32.
    """
    graph = Graph(model)
    sources = layers_by_source(model, keep_fp32)
    seen = observed(model, list(sources), feeds) if feeds else ((name, None) for name in sources)
    replacements: dict[str, list[NodeProto]] = {}
    for source, found in seen:
        layers = sources[source]
        rows = None if found is None else found.astype(np.float64)
        weights = [graph.constants[layer.input[1]].astype(np.float64) for layer in layers]
        scheme = choose_scheme(rows, weights) if rows is not None else plain_scheme(weights[0])
        steps = _quantise_input(source, scheme, graph)
        for layer, weight in zip(layers, weights, strict=True):
            balanced = weight * scheme.balance[:, None]
            if rows is None:
                columns = quantise_columns(balanced)
            else:
                columns = round_for_output(balanced, rows / scheme.balance)
            replacements[layer.output[0]] = steps + _integer_matmul(layer, columns, scheme, graph)
            steps = []
    for candidate in graph.nodes:
        if _is_embedding(candidate, graph):
            replacements[candidate.output[0]] = _integer_gather(candidate, graph)
    graph.replace(replacements)
    return graph.finish()


@dataclass(frozen=True)
class Scheme:
    """How a layer's input becomes 8-bit integers: x / balance / scale + zero_point, rounded.

    balance     what each input channel is divided by, so that none's size hides the others  [K]
    zero_point  the integer that stands for 0
    scale       of all rows; None if each row has its own
    """

    balance: npt.NDArray[np.float64]
    zero_point: int
    scale: float | None = None

    def rounded(self, rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What the integers stand for, balanced  [rows, K]"""
        balanced = rows / self.balance
        scales = self.scale or row_scales(balanced, self.zero_point)
        levels = np.rint(balanced / scales)
        result: npt.NDArray[np.float64] = scales * np.clip(
            levels, -self.zero_point, ACTIVATION_LEVELS - self.zero_point
        )
        return result


def plain_scheme(weight: npt.NDArray[Any]) -> Scheme:
    """The scheme of a layer whose inputs nobody has seen."""
    return Scheme(np.ones(len(weight)), ZERO_POINTS[0])


def choose_scheme(
    rows: npt.NDArray[np.float64], weights: Sequence[npt.NDArray[np.float64]]
) -> Scheme:
    """The scheme that keeps the layers' outputs closest; a fixed scale where it costs little.

    rows [rows, K], weights [K, N]. Each row counts alike, however large it is. Balance: SmoothQuant
    (Xiao et al., ICML 2023, eq. 4), with the exponent chosen per layer.
    """
    sample = rows[:: -(-len(rows) // COMPARED_ROWS)]
    outputs = np.concatenate([sample @ weight for weight in weights], 1)
    sizes = np.maximum(np.square(outputs).sum(1), SMALLEST_SCALE)
    lowest, highest = rows.min(0), rows.max(0)
    channels = np.maximum(-lowest, highest)

    def rounded(balance: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate([_rounded_columns(w * balance[:, None]) for w in weights], 1)

    def best(schemes: Iterable[Scheme], columns: npt.NDArray[Any]) -> tuple[float, Scheme]:
        moved = ((scheme, scheme.rounded(sample) @ columns - outputs) for scheme in schemes)
        errors = (((np.square(off).sum(1) / sizes).sum(), scheme) for scheme, off in moved)
        return min(errors, key=lambda item: item[0])

    halfway = balance_of(channels, weights, 0.5)
    tried = (Scheme(halfway, zero_point) for zero_point in ZERO_POINTS)
    zero_point = best(tried, rounded(halfway))[1].zero_point
    balances = [balance_of(channels, weights, exponent) for exponent in BALANCE_EXPONENTS]
    balances.append(np.ones(rows.shape[1]))
    own, fixed = [], []
    for balance in balances:
        columns = rounded(balance)
        own.append(best([Scheme(balance, zero_point)], columns))
        covering = (one_scale(lowest, highest, balance, covered) for covered in COVERED)
        fixed.append(best(covering, columns))
    own_error, own_scheme = min(own, key=lambda item: item[0])
    fixed_error, fixed_scheme = min(fixed, key=lambda item: item[0])
    return fixed_scheme if fixed_error <= own_error * FIXED_MAY_COST**2 else own_scheme


def one_scale(
    lowest: npt.NDArray[np.float64],
    highest: npt.NDArray[np.float64],
    balance: npt.NDArray[np.float64],
    covered: float,
) -> Scheme:
    """One scale for all rows, whose integers reach over this share of their range.

    lowest, highest  value of each channel  [K]
    """
    low = covered * min(float((lowest / balance).min()), 0.0)
    high = covered * max(float((highest / balance).max()), 0.0)
    scale = max((high - low) / ACTIVATION_LEVELS, float(SMALLEST_SCALE))
    return Scheme(balance, round(-low / scale), float(np.float32(scale)))


def balance_of(
    channels: npt.NDArray[Any], weights: Sequence[npt.NDArray[Any]], exponent: float
) -> npt.NDArray[Any]:
    """What to divide a layer's input channels by, and multiply its weights' rows by  [K]

    channels  the largest input of each  [K]
    exponent  how much of what stands out goes to the weights (SmoothQuant, eq. 4)
    """
    largest_input = np.maximum(channels, 1e-5)
    largest_weight = np.maximum(np.max([np.abs(weight).max(1) for weight in weights], 0), 1e-5)
    balance = largest_input**exponent / largest_weight ** (1 - exponent)
    result: npt.NDArray[Any] = balance / np.exp(np.log(balance).mean())
    return result


def row_scales(rows: npt.NDArray[np.float64], zero_point: int) -> npt.NDArray[np.float64]:
    """The scale that each row needs  [rows, 1]"""
    positive = rows.max(1, keepdims=True) / (ACTIVATION_LEVELS - zero_point)
    result: npt.NDArray[np.float64] = np.maximum(
        np.maximum(positive, -rows.min(1, keepdims=True) / zero_point), SMALLEST_SCALE
    )
    return result


def round_for_output(
    weight: npt.NDArray[np.float64], rows: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Like quantise_columns, but each row's rounding error is made good by the rows after it.

    weight [K, N], rows [rows, K] the inputs it will meet. GPTQ (Frantar et al., ICLR 2023, alg. 1).
    """
    weight = weight.copy()
    channels = len(weight)
    hessian = rows.T @ rows / len(rows)
    hessian += np.eye(channels) * max(HESSIAN_DAMPING * np.trace(hessian) / channels, 1e-12)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    scales = column_scales(weight)
    integers = np.zeros(weight.shape, dtype=np.int8)
    for start in range(0, channels, HESSIAN_BLOCK):
        end = min(start + HESSIAN_BLOCK, channels)
        errors = np.zeros((end - start, weight.shape[1]))
        for k in range(start, end):
            most = _free(integers[k - 1]) if k % 2 else WEIGHT_LEVELS
            integers[k] = np.clip(np.rint(weight[k] / scales), -most, most)
            errors[k - start] = (weight[k] - integers[k] * scales) / factor[k, k]
            weight[k + 1 : end] -= np.outer(factor[k, k + 1 : end], errors[k - start])
        weight[end:] -= factor[start:end, end:].T @ errors
    return integers, scales


def quantise_columns(
    weight: npt.NDArray[Any],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """weight [K, N] -> integers [K, N] and scales [N] with weight ~ integers * scales"""
    scales = column_scales(weight)
    integers = np.rint(weight / scales).astype(np.int8)
    return integers, scales


def column_scales(weight: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The finest scales with which neighbouring integers sum up to PAIR_LEVELS at most  [N]"""
    sizes = np.abs(weight)
    pairs = sizes[: len(sizes) // 2 * 2].reshape(-1, 2, sizes.shape[1]).sum(1)
    # Rounding may add one to a pair's sum.
    largest = np.maximum(pairs.max(0, initial=0) / (PAIR_LEVELS - 1), sizes.max(0) / WEIGHT_LEVELS)
    scales: npt.NDArray[np.float32] = np.maximum(largest, SMALLEST_SCALE).astype(np.float32)
    return scales


def quantise_table(table: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """table [V, H] -> integers [V, H] and scales [V, 1] with table ~ integers * scales"""
    largest = np.abs(table).max(1, keepdims=True)
    scales = np.maximum(largest / WEIGHT_LEVELS, SMALLEST_SCALE).astype(np.float32)
    return np.rint(table / scales).astype(np.int8), scales


def _free(neighbour: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """How large an integer next to these may be  [N]"""
    result: npt.NDArray[np.int64] = np.minimum(
        PAIR_LEVELS - np.abs(neighbour.astype(np.int64)), WEIGHT_LEVELS
    )
    return result


def _rounded_columns(weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    integers, scales = quantise_columns(weight)
    result: npt.NDArray[np.float64] = integers.astype(np.float64) * scales
    return result


def _is_embedding(candidate: NodeProto, graph: Graph) -> bool:
    table = graph.constants.get(candidate.input[0]) if candidate.op_type == "Gather" else None
    axis = attribute(candidate, "axis", 0)
    return table is not None and axis == 0 and table.ndim == 2 and table.dtype == np.float32


def _quantise_input(source: str, scheme: Scheme, graph: Graph) -> list[NodeProto]:
    """source [..., K] -> `source/int8` [..., K] and `source/scale`, a scalar or [..., 1]"""
    constant = graph.constant
    balanced, steps = source, []
    if (scheme.balance != 1).any():
        balanced = f"{source}{BALANCED}"
        factors = constant(f"{source}/balance", (1 / scheme.balance).astype(np.float32))
        steps = [node("Mul", [source, factors], balanced)]
    zero = _zero(scheme.zero_point, graph)
    if scheme.scale is not None:
        scale = constant(f"{source}/scale", np.array(scheme.scale, dtype=np.float32))
        return [*steps, node("QuantizeLinear", [balanced, scale, zero], f"{source}/int8")]
    last = constant("int8/last_axis", np.array([-1], dtype=np.int64))
    levels = scheme.zero_point
    above = constant(
        f"int8/above_{levels}", np.array(1 / (ACTIVATION_LEVELS - levels), dtype=np.float32)
    )
    below = constant(f"int8/below_{levels}", np.array(-1 / levels, dtype=np.float32))
    return [
        *steps,
        node("ReduceMax", [balanced, last], f"{source}/largest", keepdims=1),
        node("ReduceMin", [balanced, last], f"{source}/smallest", keepdims=1),
        node("Mul", [f"{source}/largest", above], f"{source}/scale_above"),
        node("Mul", [f"{source}/smallest", below], f"{source}/scale_below"),
        node(
            "Max",
            [
                f"{source}/scale_above",
                f"{source}/scale_below",
                constant("int8/tiny", SMALLEST_SCALE),
            ],
            f"{source}/scale",
        ),
        node("Div", [balanced, f"{source}/scale"], f"{source}{LEVELS}"),
        node(
            "QuantizeLinear",
            [f"{source}{LEVELS}", constant("int8/one", ONE), zero],
            f"{source}/int8",
        ),
    ]


def _integer_matmul(
    matmul: NodeProto,
    columns: tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]],
    scheme: Scheme,
    graph: Graph,
) -> list[NodeProto]:
    source, weight = matmul.input
    (output,) = matmul.output
    integers, scales = columns
    parts = [
        graph.constant(f"{weight}/int8", integers),
        f"{source}/scale" if scheme.scale is not None else graph.constant("int8/one", ONE),
        graph.constant(f"{weight}/scale", scales),
        _zero(scheme.zero_point, graph),
    ]
    if scheme.scale is not None:
        return [contributed(PRODUCT, [f"{source}/int8", *parts], output)]
    return [
        contributed(PRODUCT, [f"{source}/int8", *parts], f"{output}{COLUMNS}"),
        node("Mul", [f"{output}{COLUMNS}", f"{source}/scale"], output),
    ]


def _zero(zero_point: int, graph: Graph) -> str:
    return graph.constant(f"int8/zero_{zero_point}", np.array(zero_point, dtype=np.uint8))


def _integer_gather(gather: NodeProto, graph: Graph) -> list[NodeProto]:
    table, ids = gather.input
    (output,) = gather.output
    integers, scales = quantise_table(graph.constants[table])
    return [
        node(
            "Gather", [graph.constant(f"{table}/int8", integers), ids], f"{output}/table_integers"
        ),
        node("Cast", [f"{output}/table_integers"], f"{output}/table_floats", to=FLOAT),
        node("Gather", [graph.constant(f"{table}/scale", scales), ids], f"{output}/table_scale"),
        node("Mul", [f"{output}/table_floats", f"{output}/table_scale"], output),
    ]

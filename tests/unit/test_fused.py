"""Attention and norms as single operators: the same results, there and back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lance_edge_engines import open_session
from lance_edge_export.float_screener import float_screener
from lance_edge_export.fused import ATTENTION, NORM, fuse, unfuse
from lance_edge_export.half import half_products
from lance_edge_export.quantise import int8_products

WIDTH, HEADS = 64, 4
Change = tuple[str, str, str]  # operator, inputs, output


def layer(values: dict[str, list[int]] | None = None, **changed: Change) -> onnx.ModelProto:
    """One layer of an encoder: attention and a sum with its norm.

    values   other integer constants
    changed  other nodes, by their outputs
    """
    rng = np.random.default_rng(5)

    def weight(*shape: int) -> Any:
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    constants = {
        **{name: weight(WIDTH, WIDTH) for name in ("wq", "wk", "wv", "wo")},
        **{name: weight(WIDTH) for name in ("bias", "gain", "shift")},
        "table": weight(40, WIDTH),
        "split": np.array([0, 0, HEADS, -1]),
        "merge": np.array([0, 0, -1]),
        "axes": np.array([1, 2]),
        "root": np.array((WIDTH // HEADS) ** 0.5, np.float32),
        "one": np.array(1, np.float32),
        "lowest": np.array(-3e38, np.float32),
        **{name: np.array(value) for name, value in (values or {}).items()},
    }
    first, keys = [0, 2, 1, 3], [0, 2, 3, 1]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Unsqueeze", ["mask", "axes"], ["m1"]),
        helper.make_node("Cast", ["m1"], ["m2"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["one", "m2"], ["m3"]),
        helper.make_node("Mul", ["m3", "lowest"], ["penalty"]),
        *(helper.make_node("MatMul", ["x", f"w{part}"], [part]) for part in "qkv"),
        *(helper.make_node("Reshape", [part, "split"], [f"{part}4"]) for part in "qkv"),
        helper.make_node("Transpose", ["q4"], ["qh"], perm=first),
        helper.make_node("Transpose", ["k4"], ["kh"], perm=keys),
        helper.make_node("Transpose", ["v4"], ["vh"], perm=first),
        helper.make_node("MatMul", ["qh", "kh"], ["scores"]),
        helper.make_node("Div", ["scores", "root"], ["scaled"]),
        helper.make_node("Add", ["scaled", "penalty"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "vh"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["back"], perm=first),
        helper.make_node("Reshape", ["back", "merge"], ["attended"]),
        helper.make_node("MatMul", ["attended", "wo"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["biased"]),
        helper.make_node("Add", ["biased", "x"], ["sum"]),
        helper.make_node(
            "LayerNormalization", ["sum", "gain", "shift"], ["out"], axis=-1, epsilon=1e-3
        ),
    ]
    for node in nodes:
        if change := changed.get(node.output[0]):
            op, inputs, output = change
            node.CopyFrom(helper.make_node(op, inputs.split(), [output]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "layer",
        [value(name, TensorProto.INT64, ["rows", "tokens"]) for name in ("ids", "mask")],
        [value("out", TensorProto.FLOAT, ["rows", "tokens", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto) -> Any:
    ids = np.random.default_rng(6).integers(0, 40, (3, 9))
    mask = (np.arange(9) < np.array([[9], [4], [1]])).astype(np.int64)
    session = open_session(model.SerializeToString(), "cpu", threads=1)
    return session.run({"ids": ids, "mask": mask})["out"]


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_a_layer_becomes_two_operators_and_computes_the_same() -> None:
    fused = fuse(layer())
    assert kinds(fused) == {"Gather": 1, "Cast": 1, "MatMul": 4, ATTENTION: 1, NORM: 1}
    np.testing.assert_allclose(run(fused), run(layer()), atol=1e-5)


def test_the_way_back_has_standard_operators_alone() -> None:
    back = unfuse(fuse(layer()))
    assert [known.domain for known in back.opset_import] == [""]
    np.testing.assert_allclose(run(back), run(layer()), atol=1e-5)
    onnx.checker.check_model(back, full_check=True)


def test_tensorrt_is_given_standard_operators() -> None:
    assert {node.domain for node in float_screener(fuse(layer()), "fp16").graph.node} == {""}


def test_fusing_leaves_its_input_as_it_was() -> None:
    model = layer()
    before = model.SerializeToString(deterministic=True)
    fuse(model)
    assert model.SerializeToString(deterministic=True) == before


def test_fused_attention_may_be_fp16() -> None:
    half = half_products(fuse(layer()))
    attention = next(node for node in half.graph.node if node.op_type == ATTENTION)
    assert all(name.endswith("/narrow") for name in attention.input[:3])
    lost = np.abs(run(half) - run(layer())).max() / np.abs(run(layer())).max()
    assert 0 < lost < 5e-3


@pytest.mark.parametrize(
    "changed",
    [
        {"penalty": ("Mul", "m3 one", "penalty")},
        {"m3": ("Sub", "m2 one", "m3")},
        {"m1": ("Unsqueeze", "ids axes", "m1")},
        {"scaled": ("Div", "scores penalty", "scaled")},
        {"masked": ("Sub", "scaled penalty", "masked")},
        {"kh": ("Identity", "k4", "kh")},
        {"back": ("Identity", "mixed", "back")},
        {"k4": ("Reshape", "k merge", "k4")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_attention_of_another_form_is_left_alone(changed: dict[str, Change]) -> None:
    fused = kinds(fuse(layer(**changed)))
    assert (fused[ATTENTION], fused["Softmax"]) == (0, 1)


@pytest.mark.parametrize(
    "values", [{"axes": [1, 3]}, {"split": [0, 0, -1, 16]}, {"merge": [0, -1]}], ids=str
)
def test_an_attention_of_other_lengths_is_left_alone(values: dict[str, list[int]]) -> None:
    fused = kinds(fuse(layer(values)))
    assert (fused[ATTENTION], fused["Softmax"]) == (0, 1)


def test_a_softmax_over_queries_is_left_alone() -> None:
    model = layer()
    (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
    softmax.attribute[0].i = 2
    assert kinds(fuse(model))[ATTENTION] == 0


@pytest.mark.parametrize("form", ["fp32", "fp16"])
@pytest.mark.parametrize("scaled", ["fixed", "rows", "no"])
def test_what_was_fused_and_rounded_comes_back_for_tensorrt(form: Any, scaled: str) -> None:
    ids = np.random.default_rng(7).integers(0, 40, (20, 12))
    feeds = [{"ids": ids, "mask": np.ones_like(ids)}] if scaled == "fixed" else []
    model = fuse(layer()) if scaled == "no" else int8_products(fuse(layer()), feeds)
    assert ("MatMulIntegerToFloat" in kinds(model)) == (scaled != "no")
    plain = float_screener(model, form)
    assert {node.domain for node in plain.graph.node} == {""}
    lost = np.abs(run(plain) - run(layer())).max() / np.abs(run(layer())).max()
    assert lost < 0.05


def test_fp16_attention_comes_back_too() -> None:
    plain = float_screener(half_products(fuse(layer())), "fp16")
    assert {node.domain for node in plain.graph.node} == {""}
    assert np.abs(run(plain) - run(layer())).max() < 0.02


def test_a_sum_that_is_no_linear_layers_is_left_alone() -> None:
    """Its first summand might have fewer rows than its second, which the operator does not take."""
    assert kinds(fuse(layer(biased=("Tanh", "product", "biased"))))[NORM] == 0


def test_nodes_without_inputs_are_no_trouble() -> None:
    model = layer()
    made = helper.make_node("Constant", [], ["unused"], value_float=1.0)
    model.graph.node.insert(0, made)
    assert kinds(fuse(model))[ATTENTION] == 1


def test_what_else_is_read_is_kept() -> None:
    """A graph that gives its scores away, and the sum before its norm, keeps both."""
    model = layer()
    value = helper.make_tensor_value_info
    for name, shape in (("shares", [None] * 4), ("sum", [None] * 3)):
        model.graph.output.append(value(name, TensorProto.FLOAT, shape))
    fused = kinds(fuse(model))
    assert (fused[ATTENTION], fused[NORM], fused["LayerNormalization"]) == (0, 0, 1)
    np.testing.assert_allclose(run(fuse(model)), run(layer()), atol=1e-5)


@pytest.mark.parametrize("inputs", ["sum gain", "sum gain shift"])
def test_a_norm_may_have_no_shift(inputs: str) -> None:
    model = layer(out=("LayerNormalization", inputs, "out"))
    fused = fuse(model)
    assert kinds(fused)[NORM] == 1
    np.testing.assert_allclose(run(fused), run(model), atol=1e-5)
    np.testing.assert_allclose(run(unfuse(fused)), run(model), atol=1e-5)

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

WIDTH, HEADS = 64, 4
Change = tuple[str, str, str]  # operator, inputs, output


def layer(**changed: Change) -> onnx.ModelProto:
    """One layer of an encoder: attention and a sum with its norm. Nodes are changed by their outputs."""
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
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_attention_of_another_form_is_left_alone(changed: dict[str, Change]) -> None:
    fused = kinds(fuse(layer(**changed)))
    assert (fused[ATTENTION], fused["Softmax"]) == (0, 1)


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

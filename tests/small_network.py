"""A graph with what the quantisers look for, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from lance_edge_engines import open_session

Array = npt.NDArray[Any]


def small_network() -> onnx.ModelProto:
    """An embedding table, a norm, two wide layers with a Gelu between them, and a head."""
    rng = np.random.default_rng(3)

    def weight(*shape: int) -> Any:
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    channels = np.exp(rng.standard_normal(64)).astype(
        np.float32
    )  # some stand out, so balance helps
    constants = {
        "table": weight(40, 64) * channels,
        "gain": np.ones(64, np.float32) * channels,
        "shift": np.zeros(64, np.float32),
        "up": weight(64, 128),
        "down": weight(128, 64),
        "head": weight(64, 3),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("LayerNormalization", ["rows", "gain", "shift"], ["normed"]),
        helper.make_node("MatMul", ["normed", "up"], ["wide"]),
        helper.make_node("Gelu", ["wide"], ["bent"]),
        helper.make_node("MatMul", ["bent", "down"], ["narrow"]),
        helper.make_node("Add", ["narrow", "normed"], ["sum"]),
        helper.make_node("MatMul", ["sum", "head"], ["out"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "small",
        [value("ids", TensorProto.INT64, ["tokens"])],
        [value("out", TensorProto.FLOAT, ["tokens", 3])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto, ids: Array) -> Array:
    session = open_session(model.SerializeToString(), "cpu", threads=1)
    return session.run({"ids": ids})["out"]

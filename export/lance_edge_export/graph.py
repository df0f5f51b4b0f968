"""Small helpers to read and rebuild an ONNX graph. Knows nodes, not models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from lance_edge.errors import ExportError

CONTRIBUTED = "com.microsoft"  # the domain of ONNX Runtime's own operators
PRODUCT = "MatMulIntegerToFloat"  # one of them: a product of 8-bit integers, scaled


class Graph:
    """An ONNX model while it is being rewritten.

    Nodes are replaced by lists of nodes, in place, so the order stays topological.
    Raises ExportError for a constant that cannot be read.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.constants: dict[str, npt.NDArray[Any]] = {
            tensor.name: _array(tensor) for tensor in self.model.graph.initializer
        }

    @property
    def nodes(self) -> Sequence[NodeProto]:
        return list(self.model.graph.node)

    def consumers(self) -> dict[str, list[NodeProto]]:
        """Tensor name -> the nodes that read it."""
        readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.model.graph.node:
            for name in node.input:
                readers[name].append(node)
        return readers

    def producers(self) -> dict[str, NodeProto]:
        """Tensor name -> the node that makes it."""
        return {name: node for node in self.model.graph.node for name in node.output}

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        """Add a constant under this name, or reuse it; returns the name."""
        if name in self.constants and not np.array_equal(self.constants[name], value):
            raise ValueError(f"the graph already has another constant called {name}")
        self.constants[name] = value
        return name

    def replace(self, replacements: dict[str, list[NodeProto]]) -> None:
        """Put a list of nodes in the place of each node, named by its first output."""
        nodes = [
            new
            for node in self.model.graph.node
            for new in replacements.get(node.output[0], [node])
        ]
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def drop_unread(self) -> None:
        """Remove the nodes that no output depends on."""
        needed = {value.name for value in self.model.graph.output}
        kept = []
        for node in reversed(self.model.graph.node):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        del self.model.graph.node[:]
        self.model.graph.node.extend(reversed(kept))

    def finish(self) -> onnx.ModelProto:
        """The rewritten model, checked, with the constants that are still used."""
        used = {name for node in self.model.graph.node for name in node.input}
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value, order="C"), name)
            for name, value in self.constants.items()
            if name in used
        )
        del self.model.graph.value_info[:]
        standard = [known for known in self.model.opset_import if known.domain != CONTRIBUTED]
        del self.model.opset_import[:]
        self.model.opset_import.extend(standard)
        if any(node.domain == CONTRIBUTED for node in self.nodes):
            self.model.opset_import.append(helper.make_opsetid(CONTRIBUTED, 1))
        onnx.checker.check_model(self.model)
        return self.model


def node(
    op: str, inputs: Iterable[str], output: str | Sequence[str], **attributes: Any
) -> NodeProto:
    """A node of the standard domain."""
    outputs = [output] if isinstance(output, str) else list(output)
    return helper.make_node(op, list(inputs), outputs, name=f"{outputs[0]}/{op}", **attributes)


def contributed(
    op: str, inputs: Iterable[str], output: str | Sequence[str], **attributes: Any
) -> NodeProto:
    """A node of ONNX Runtime's own domain."""
    return node(op, inputs, output, domain=CONTRIBUTED, **attributes)


def attribute(candidate: NodeProto, name: str, default: Any) -> Any:
    """A node's attribute, or what the operator takes where it is not given."""
    for found in candidate.attribute:
        if found.name == name:
            return helper.get_attribute_value(found)
    return default


def _array(tensor: TensorProto) -> npt.NDArray[Any]:
    try:
        return numpy_helper.to_array(tensor)
    except (LookupError, TypeError, ValueError) as error:
        raise ExportError(f"the graph's {tensor.name!r} cannot be read ({error})") from error


FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16

"""A graph's wide linear layers, and what they see and answer on real prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto

from lance_edge.errors import ExportError
from lance_edge.screener import pad
from lance_edge.tokenizer import Window
from lance_edge_engines import Session, open_session
from lance_edge_export.graph import Graph

T = TypeVar("T")
Feed = Mapping[str, npt.NDArray[Any]]

# Narrower layers (the heads) stay in fp32: they cost nothing and decide everything.
MIN_COLUMNS = 64

CALIBRATION_PROMPTS = 256  # whose activations are looked at; no labels are used
REPORTED_PROMPTS = 16  # on which the layers' errors are measured
WORST = 5  # layers that are named
OBSERVED_AT_ONCE = 4  # tensors whose values are held together


def linear_layers(model: onnx.ModelProto) -> dict[str, NodeProto]:
    """The wide linear layers by the names of their outputs, in the graph's order."""
    graph = Graph(model)
    return {node.output[0]: node for node in graph.nodes if _is_linear(node, graph)}


def checked_layers(model: onnx.ModelProto, kept: Collection[str]) -> dict[str, NodeProto]:
    """The same; raises ExportError if there is no layer of a name in `kept`."""
    layers = linear_layers(model)
    if unknown := sorted(set(kept) - set(layers)):
        raise ExportError(
            f"there is no layer {unknown[0]!r} to keep; there are {', '.join(layers)}"
        )
    return layers


def layers_by_source(model: onnx.ModelProto, kept: Collection[str]) -> dict[str, list[NodeProto]]:
    """The wide linear layers but for those in `kept`, by the tensor that they read.

    Raises ExportError if there is no layer of a name in `kept`.
    """
    sources: dict[str, list[NodeProto]] = defaultdict(list)
    for name, layer in checked_layers(model, kept).items():
        if name not in kept:
            sources[layer.input[0]].append(layer)
    return sources


def set_apart(items: Sequence[T], count: int) -> tuple[list[T], list[T]]:
    """So many of the items at most, from all over them, and the others."""
    wanted = min(count, len(items))
    chosen = {index * len(items) // wanted for index in range(wanted)}
    apart: tuple[list[T], list[T]] = ([], [])
    for index, item in enumerate(items):
        apart[index not in chosen].append(item)
    return apart


def first_windows(prompts: Sequence[Sequence[Window]]) -> list[Feed]:
    """The first window of each prompt as a graph's inputs."""
    return [pad([windows[0]], len(windows[0].ids)) for windows in prompts]


def layer_errors(
    before: onnx.ModelProto, after: onnx.ModelProto, feeds: Sequence[Feed]
) -> dict[str, float]:
    """How far each linear layer's output moved, relative to its size; the worst first.

    sqrt(sum (y' - y)^2 / sum y^2) over all feeds, the errors of the layers before it included
    """
    names = list(linear_layers(before))
    moved, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    sessions = [watching(model, names) for model in (before, after)]
    for feed in feeds:
        wanted, found = (session.run(feed) for session in sessions)
        for name in names:
            expected = wanted[name].astype(np.float64)
            moved[name] += float(np.square(found[name] - expected).sum())
            size[name] += float(np.square(expected).sum())
    for session in sessions:
        session.close()
    errors = {name: relative(moved[name], size[name]) for name in names}
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def relative(moved: float, size: float) -> float:
    """The square root of a share; of a layer that gives nothing (a pruned one), 0 or infinity."""
    return (moved / size) ** 0.5 if size else float("inf") if moved else 0.0


def observed(
    model: onnx.ModelProto, names: Sequence[str], feeds: Sequence[Feed]
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Some tensors in turn, with their values over all feeds, as rows  [rows, K]

    The feeds are read once for every few tensors: the values of all would fill the memory.
    """
    for start in range(0, len(names), OBSERVED_AT_ONCE):
        some = names[start : start + OBSERVED_AT_ONCE]
        session = watching(model, some)
        seen: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in some}
        for feed in feeds:
            outputs = session.run(feed)
            for name in some:
                seen[name].append(outputs[name].reshape(-1, outputs[name].shape[-1]))
        session.close()
        for name in some:
            yield name, np.concatenate(seen.pop(name))


def watching(model: onnx.ModelProto, names: Sequence[str]) -> Session:
    """A session on the CPU whose outputs are these tensors too."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    # Without a type: the runtime infers it.
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return open_session(watched.SerializeToString(), "cpu")


def _is_linear(candidate: NodeProto, graph: Graph) -> bool:
    weight = graph.constants.get(candidate.input[1]) if candidate.op_type == "MatMul" else None
    return weight is not None and weight.ndim == 2 and weight.shape[1] >= MIN_COLUMNS

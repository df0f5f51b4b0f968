"""What ONNX Runtime makes of a graph when it loads it: nodes before and after, fused operators."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx

from lance_edge_export.graph import CONTRIBUTED


@dataclass(frozen=True)
class Fusion:
    """The nodes of a graph before and after it was loaded on the CPU.

    fused  operators of ONNX Runtime's own, which stand for several standard ones, and how often
    left   the other operators after loading, the most frequent first
    """

    before: int
    after: int
    fused: dict[str, int]
    left: dict[str, int]


def fusion(model: onnx.ModelProto) -> Fusion:
    """How ONNX Runtime's own optimiser changes a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loaded.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        loaded = onnx.load(path)
    own = {node.op_type for node in model.graph.node if node.domain != CONTRIBUTED}
    after = Counter(node.op_type for node in loaded.graph.node)
    return Fusion(
        before=len(model.graph.node),
        after=len(loaded.graph.node),
        fused={op: count for op, count in after.most_common() if op not in own},
        left={op: count for op, count in after.most_common() if op in own},
    )

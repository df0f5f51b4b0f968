"""Checkpoint to fp32 ONNX."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from lance_edge_training.model import Screener

OPSET = 21  # the newest that onnxruntime 1.23 (Python 3.10) reads in full
IR_VERSION = 10


class ScreenerGraph(nn.Module):
    """The screener with the inputs and outputs of its graph.

    ids, mask [rows, tokens] -> mean, deviation [rows, categories],
    contributions [rows, tokens, categories]
    """

    def __init__(self, screener: Screener) -> None:
        super().__init__()
        self.screener = screener

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reading = self.screener(ids, mask)
        return reading.labels.mean, reading.labels.deviation, reading.contributions


def export_screener(screener: Screener) -> onnx.ModelProto:
    """The fp32 graph of a screener, for any number of rows and tokens."""
    ids = torch.arange(1, 25).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    free = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=512)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices of torch.export about its own internals
        path = Path(folder) / "screener.onnx"
        torch.onnx.export(
            ScreenerGraph(screener).eval(),
            (ids, mask),
            path,
            input_names=["ids", "mask"],
            output_names=["mean", "deviation", "contributions"],
            dynamic_shapes={"ids": free, "mask": free},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        model = onnx.load(path)
    model.ir_version = IR_VERSION
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]  # source lines of the exporting machine
        node.doc_string = ""
    return model

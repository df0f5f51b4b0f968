"""Checkpoint to fp32 ONNX."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn

OPSET = 21  # the newest that onnxruntime 1.23 (Python 3.10) reads in full
IR_VERSION = 10


def export_screener(network: nn.Module, longest: int = 512) -> onnx.ModelProto:
    """The fp32 graph of a screener, for any number of rows and up to `longest` tokens.

    network  ids, mask [rows, tokens] -> mean, deviation [rows, categories],
             contributions [rows, tokens, categories]
    """
    ids = torch.arange(1, 25).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    free = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=longest)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices of torch.export about its own internals
        path = Path(folder) / "screener.onnx"
        torch.onnx.export(
            network.eval(),
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

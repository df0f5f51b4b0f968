"""The development sets, cut into a half to calibrate on and a half to report on, and the latents
a screener gives their prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lance_edge.screener import FloatArray, pad, runs, sigmoid, spread_of
from lance_edge.tokenizer import Tokenizer
from lance_edge_engines import FakeSession, Session, TensorSpec
from lance_edge_training.data import HARMFUL_SEVERITY, Example
from lance_edge_training.model import Screener, Served

Half = Literal["calibration", "report"]

HARD_BENIGN_SOURCES = ("coconot", "cyberseceval_frr", "hatecheck")
HARMFUL_SOURCES = ("catqa", "figstep_safebench", "hatecheck")


@dataclass(frozen=True)
class Latents:
    """p(z_label | x) of n prompts: the window with the highest severity of each category  [n, C]"""

    mean: FloatArray
    deviation: FloatArray

    def severity(
        self, slope: FloatArray | float = 1.0, intercept: FloatArray | float = 0.0
    ) -> FloatArray:
        """Severities after z' = slope * z + intercept  [n, C]"""
        return sigmoid((slope * self.mean + intercept) / spread_of(slope * self.deviation))


def torch_session(screener: Screener) -> Session:
    """A trained screener behind the interface of the runtime's sessions."""
    return network_session(Served(screener), screener.head.mean.out_features)


def network_session(network: nn.Module, categories: int) -> Session:
    """The same for any network with a screener graph's inputs and outputs (see `Served`)."""
    names = ("mean", "deviation", "contributions")

    def compute(inputs: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, npt.NDArray[np.float32]]:
        with torch.inference_mode():
            outputs = network(torch.from_numpy(inputs["ids"]), torch.from_numpy(inputs["mask"]))
        return {name: value.numpy() for name, value in zip(names, outputs, strict=True)}

    float32, int64 = np.dtype(np.float32), np.dtype(np.int64)
    return FakeSession(
        compute,
        inputs=[TensorSpec(name, int64, (None, None)) for name in ("ids", "mask")],
        outputs=[
            TensorSpec("mean", float32, (None, categories)),
            TensorSpec("deviation", float32, (None, categories)),
            TensorSpec("contributions", float32, (None, None, categories)),
        ],
    )


def latents(session: Session, tokenizer: Tokenizer, texts: Sequence[str]) -> Latents:
    """The latents of each text."""
    prompts = [tokenizer.encode(text) for text in texts]
    owners = [index for index, windows in enumerate(prompts) for _ in windows]
    flat = [window for windows in prompts for window in windows]
    found: dict[int, tuple[FloatArray, FloatArray]] = {}
    for length, indices in runs([len(window.ids) for window in flat]):
        outputs = session.run(pad([flat[index] for index in indices], length))
        for row, index in enumerate(indices):
            mean, deviation = outputs["mean"][row], outputs["deviation"][row]
            known = found.get(owners[index])
            if known is None:
                found[owners[index]] = (mean, deviation)
                continue
            higher = mean / spread_of(deviation) > known[0] / spread_of(known[1])
            found[owners[index]] = (
                np.where(higher, mean, known[0]),
                np.where(higher, deviation, known[1]),
            )
    ordered = [found[index] for index in range(len(texts))]
    return Latents(
        np.stack([mean for mean, _ in ordered]).astype(np.float64),
        np.stack([deviation for _, deviation in ordered]).astype(np.float64),
    )


def half(example: Example) -> Half:
    """Which half of the development data an example is in; a contrast group stays together."""
    digest = hashlib.sha256((example.group or example.prompt).encode("utf-8")).digest()
    return "calibration" if digest[0] % 2 else "report"


def truth(examples: Sequence[Example], categories: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """Severity of each category (coarse labels count as 0 or 1) and where it is known, both [n, C]"""
    target = np.zeros((len(examples), len(categories)))
    known = np.zeros_like(target)
    for row, example in enumerate(examples):
        values = example.labels if example.severity is None else example.severity
        for name, value in values.items():
            target[row, categories.index(name)] = value
            known[row, categories.index(name)] = 1
        if example.severity is not None:
            known[row] = 1
    return target, known


def is_hard_benign(example: Example) -> bool:
    """A benign prompt that looks hazardous."""
    return example.harmful is False and (
        example.kind == "hard_benign" or example.source in HARD_BENIGN_SOURCES
    )


def evaluation_sets(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Named sets as indices: `benign/...`, `hard_benign/...` and `harmful/...`."""
    sets: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        pair = example.kind != "prompt"
        if is_hard_benign(example):
            sets.setdefault(f"hard_benign/{'pairs' if pair else example.source}", []).append(index)
        elif example.harmful is False:
            sets.setdefault("benign/plain", []).append(index)
        elif example.harmful:
            if pair:
                sets.setdefault(f"harmful/pairs_{example.kind}", []).append(index)
            elif example.source in HARMFUL_SOURCES:
                sets.setdefault(f"harmful/{example.source}", []).append(index)
            elif example.severity is not None:
                sets.setdefault("harmful/graded", []).append(index)
            else:
                sets.setdefault("harmful/other", []).append(index)
    return dict(sorted(sets.items()))


def positive(target: FloatArray) -> npt.NDArray[np.bool_]:
    """Where a severity counts as the category being present."""
    result: npt.NDArray[np.bool_] = target >= HARMFUL_SEVERITY
    return result

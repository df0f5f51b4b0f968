"""A model repository for NVIDIA's Triton Inference Server, made from a bundle.

    screener   the screener's graph alone (ONNX Runtime back-end): tokens in, latent severities out
    pipeline   prompts to verdicts (Python back-end): what `Pipeline.screen` and `refine` say
    refiner    the same model, which refines unless a request says otherwise, in a process and queue of its own

A refiner's decoder keeps a cache from step to step and its rewrites must be read again before they
are given back, so no model of the repository is the decoder's graph alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lance_edge.bundle import Bundle
from lance_edge.screener import PAD_MULTIPLE, RUN_TOKENS
from lance_edge_engines import TensorSpec, open_session
from lance_edge_export.portable import copy_bundle

MODELS = ("screener", "pipeline", "refiner")
PROMPTS = 64  # in a batch, at most
# numpy's name of a type -> Triton's
TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}


def write_repository(bundle: Bundle, folder: Path, with_weights: bool) -> list[Path]:
    """Write the models into a folder; returns the folders of the bundles that lie in them.

    with_weights  put the refiner's weights in; without them there is no model `refiner`
    """
    write_screener(bundle, folder / "screener")
    tasks = {"pipeline": "screen"}
    if with_weights and bundle.manifest.refiner is not None:
        tasks["refiner"] = "refine"
    return [write_guard(bundle, folder / name, task, with_weights) for name, task in tasks.items()]


def write_screener(bundle: Bundle, folder: Path) -> None:
    """The model `screener`: the graph as it is, its tensors as ONNX Runtime reads them here."""
    graph = bundle.read(bundle.manifest.screener.graph)
    session = open_session(graph, "cpu")
    config = screener_config(bundle.manifest.screener.window, session.inputs, session.outputs)
    session.close()
    _write(folder, config, {"model.onnx": graph})


def write_guard(bundle: Bundle, folder: Path, task: str, with_weights: bool) -> Path:
    """A model that serves verdicts, with the bundle in it; returns the bundle's folder."""
    code = Path(__file__).with_name("triton_model.py").read_bytes()  # only Triton can import it
    _write(folder, guard_config(folder.name, task), {"model.py": code})
    inside = folder / "1" / "bundle"
    copy_bundle(bundle, inside, with_weights)
    return inside


def screener_config(
    window: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> str:
    """The config.pbtxt of `screener`."""
    return f"""\
# Windows of token ids to latent severities, before calibration; `pipeline` reads texts.
# Requests of one length share a run: pad each to its next multiple of {PAD_MULTIPLE} tokens (mask 0).
name: "screener"
backend: "onnxruntime"
# A run reads {RUN_TOKENS} tokens at most; more at once only cost memory.
max_batch_size: {max(1, RUN_TOKENS // window)}
input [
{_tensors(inputs)}
]
output [
{_tensors(outputs)}
]
# No delay: nobody waits for company, and batches fill while the one before is read.
dynamic_batching {{ }}
"""


def guard_config(name: str, task: str) -> str:
    """The config.pbtxt of `pipeline` and `refiner`."""
    # Prompts are rewritten one after the other: in a batch, the first would wait for the last.
    batching = (
        "# No delay: nobody waits for company, and batches fill while the one before is read.\n"
        "dynamic_batching { }"
        if task == "screen"
        else "# No dynamic batching: rewrites are made one by one, so the first would wait for the last."
    )
    return f"""\
# Prompts to verdicts. lance-edge must be installed in the Python that Triton's back-end starts.
name: "{name}"
backend: "python"
max_batch_size: {PROMPTS}
input [
  {{ name: "prompt" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "task" data_type: TYPE_STRING dims: [ 1 ] optional: true }}
]
output [
  {{ name: "verdict" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "decision" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "refined" data_type: TYPE_STRING dims: [ 1 ] }}
]
# task: screen or refine, where a request does not say. device: as in lance_edge.load.
parameters [
  {{ key: "task" value: {{ string_value: "{task}" }} }},
  {{ key: "device" value: {{ string_value: "auto" }} }}
]
# One process, which chooses its device itself; Triton would start one for each GPU.
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
{batching}
"""


def _tensors(specs: Sequence[TensorSpec]) -> str:
    """Entries without the first axis, which is the batch."""
    rows = []
    for spec in specs:
        dims = ", ".join(str(length or -1) for length in spec.shape[1:])
        rows.append(
            f'  {{ name: "{spec.name}" data_type: {TYPES[spec.dtype.name]} dims: [ {dims} ] }}'
        )
    return ",\n".join(rows)


def _write(folder: Path, config: str, files: dict[str, bytes]) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    for name, contents in files.items():
        (version / name).write_bytes(contents)

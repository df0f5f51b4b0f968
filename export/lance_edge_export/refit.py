"""Weights back into stripped plans, on the machine that runs them.

A stripped plan is machine code without weights: small to ship, once for each kind of GPU, beside one
bundle for all. The weights come from the graph that the plan was built from, which is written anew from
the bundle and must be the same to the byte, its weights' file too.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lance_edge.bundle import Bundle
from lance_edge.errors import ExportError, InvalidOption
from lance_edge.graphs import Part, planned_parts, sources
from lance_edge_engines.cuda import Device
from lance_edge_engines.plan_record import RECORD, PlanEntry, PlanRecord, check_plan
from lance_edge_engines.session import SessionError
from lance_edge_engines.trt import collecting_logger, import_runtime
from lance_edge_export.build_plan import complaint
from lance_edge_export.place import check_new, whole
from lance_edge_export.plan_graphs import EightBits, write_graph
from lance_edge_export.to_plan import STRIPPED, WHOLE, Report


def refit_plans(
    folder: Path,
    record: PlanRecord,
    bundle: Bundle,
    out: Path,
    eight_bits: EightBits | None,
    gpu: int,
    report: Report,
) -> PlanRecord:
    """Put the weights back into a folder's plans; the new folder appears whole or not at all.

    record      of the folder, as `read_record` gives it
    eight_bits  what int8 and fp8 plans were made with
    gpu         number of the GPU that will run them

    Raises InvalidOption for plans that have their weights, PlanStale for those that do not fit this
    machine or bundle, ExportError if their graph comes out otherwise than when they were built,
    DeviceUnavailable without the runtime or a GPU, SessionError if the runtime refuses.
    """
    check_new(out)
    if not all(entry.stripped for entry in record.plans.values()):
        raise InvalidOption(f"the plans in {folder} have their weights; run them as they are")
    runtime = import_runtime(record.runtime)
    device = Device(gpu)
    try:
        with whole(out, new=True) as new:
            plans: dict[str, PlanEntry] = {}
            for part in planned_parts(folder, record):
                entry = record.plans[part]
                what = f"putting the {part}'s weights back"
                report(what, 0.0)
                found = check_plan(
                    folder, record, part, runtime.__version__, device.gpu, sources(bundle, part)
                )
                device.use()
                contents = refit_part(runtime, part, entry, found, bundle, eight_bits)
                plans[part] = replace(
                    entry,
                    file=entry.file.removesuffix(STRIPPED) + WHOLE,
                    sha256=hashlib.sha256(contents).hexdigest(),
                    bytes=len(contents),
                    stripped=False,
                )
                (new / plans[part].file).write_bytes(contents)
                report(what, 1.0)
            refitted = replace(record, plans=plans)
            (new / RECORD).write_text(refitted.to_json(), encoding="utf-8")
    finally:
        device.close()
    return refitted


def refit_part(
    runtime: Any,
    part: Part,
    entry: PlanEntry,
    contents: bytes,
    bundle: Bundle,
    eight_bits: EightBits | None,
) -> bytes:
    """One plan with its weights."""
    with tempfile.TemporaryDirectory() as scratch:
        graph = write_graph(bundle, part, entry.precision, Path(scratch), eight_bits)
        if graph.sha256() != entry.graph_sha256:
            prompts = "" if eight_bits is None else "the --calibration and --keep-fp16, and "
            raise ExportError(
                f"the {part}'s graph comes out otherwise than when its plan was built; use {prompts}"
                "the versions of lance-edge and onnx that it was built with, or build the plan here"
            )
        return refitted_plan(runtime, contents, graph.path)


def refitted_plan(trt: Any, contents: bytes, graph: Path) -> bytes:
    """A stripped plan with the weights of an ONNX file. Raises SessionError if the runtime refuses."""
    log = collecting_logger(trt)
    engine = trt.Runtime(log).deserialize_cuda_engine(contents)
    if engine is None:
        raise SessionError(f"the runtime cannot load the stripped plan: {complaint(log)}")
    refitter = trt.Refitter(engine, log)
    if not trt.OnnxParserRefitter(refitter, log).refit_from_file(str(graph)):
        raise SessionError(f"the runtime cannot take the weights of {graph.name}: {complaint(log)}")
    if not refitter.refit_cuda_engine():
        missing = ", ".join(refitter.get_missing_weights()[:3])
        raise SessionError(
            f"the runtime cannot refit the plan (weights it lacks: {missing or 'none'}): "
            f"{complaint(log)}"
        )
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    refitted = engine.serialize_with_config(config)
    if refitted is None:
        raise SessionError(f"the runtime cannot write the refitted plan: {complaint(log)}")
    return bytes(refitted)

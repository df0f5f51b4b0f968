"""Real plans by TensorRT for RTX, which builds without a GPU: its parser and its compiler take both
graphs in both precisions. Running them needs a GPU, and no test here has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_refiner
from small_network import small_network

import lance_edge
from lance_edge.bundle import open_bundle
from lance_edge.errors import ExportError
from lance_edge.graphs import Part
from lance_edge.weights import matrix_sizes
from lance_edge_engines.cuda import Gpu
from lance_edge_engines.plan_record import Profile, check_plan, read_record
from lance_edge_export.build_plan import Built, known_targets
from lance_edge_export.plain_decoder import PlainPrecision
from lance_edge_export.plan_graphs import EightBits, PlanGraph, write_graph
from lance_edge_export.qdq import EIGHT_BIT, EightBit, eight_bit_products
from lance_edge_export.to_plan import PlanOptions, build_part, build_plans, job_of, run_build

trt: Any = pytest.importorskip(
    "tensorrt_rtx", reason="needs tensorrt_rtx (the rtx extra; wheels for Linux x86_64 and Windows)"
)
OPTIONS = PlanOptions("rtx", targets=("sm_86",))


def silent(*_: Any) -> None:
    pass


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, plans of its kind would be read back."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def refining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with its refiner's weights in it."""
    folder = tiny_refiner.write_bundle(tmp_path_factory.mktemp("rtx") / "bundle")
    contents = tiny_refiner.weights_file("int8")
    (folder / "refiner.weights").write_bytes(contents)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"]["refiner.weights"] = manifest["refiner"]["weights"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_the_tiny_bundles_plans(refining: Path, tmp_path: Path) -> None:
    """Both graphs, as `lance-edge plan` builds them."""
    out = tmp_path / "plans"
    told: list[float] = []
    bundle = open_bundle(refining)
    build_plans(
        bundle, ("screener", "refiner"), out, OPTIONS, lambda what, share: told.append(share)
    )
    record = read_record(out)
    assert record.version == trt.__version__
    assert max(told) == 1.0 and len(set(told)) > 3
    for name, entry in record.plans.items():
        contents = check_plan(out, record, name, trt.__version__, Gpu("any", "sm_86"), None)
        assert len(contents) == entry.bytes > 10_000
        assert entry.engine is None and entry.not_read_back
    refiner = record.plans["refiner"].network
    assert refiner["kinds"]["SCATTER"] == 2 * tiny_refiner.SHAPE.layers
    # Strongly typed: what is fp16 follows from the graph.
    assert refiner["types"]["HALF"] > 20 and refiner["types"]["FLOAT"] > 100


@pytest.mark.parametrize("part", ["screener", "refiner"])
def test_fp32_has_no_halves(refining: Path, tmp_path: Path, part: Part) -> None:
    built = build(refining, part, "fp32", tmp_path)
    assert built.network is not None
    assert "HALF" not in built.network["types"]


def test_a_refiner_with_int8_weights(refining: Path, tmp_path: Path) -> None:
    """The plan keeps the integers: it does not fold them into fp16."""
    halves, integers = tmp_path / "fp16", tmp_path / "int8"
    for folder in (halves, integers):
        folder.mkdir()
    build(refining, "refiner", "fp16", halves)
    built = build(refining, "refiner", "int8", integers)
    assert built.network is not None
    assert built.network["kinds"]["DEQUANTIZE"] == 4 * tiny_refiner.SHAPE.layers + 1
    shape = tiny_refiner.SHAPE
    numbers = shape.layers * sum(rows * columns for rows, columns in matrix_sizes(shape).values())
    sizes = [(folder / "x.plan").stat().st_size for folder in (halves, integers)]
    assert sizes[0] - sizes[1] > 0.9 * numbers  # a byte instead of two


def build(bundle: Path, part: Part, precision: PlainPrecision, folder: Path) -> Built:
    graph = write_graph(open_bundle(bundle), part, precision, folder)
    return run_build(job_of(graph, folder / "x.plan", OPTIONS), silent)


@pytest.mark.parametrize("form", EIGHT_BIT)
def test_products_in_8_bits(form: EightBit, tmp_path: Path) -> None:
    """The parser reads the types, and the compiler has kernels for them."""
    path = tmp_path / "small.onnx"
    path.write_bytes(
        eight_bit_products(small_network(), [{"ids": np.arange(40)}], form).SerializeToString()
    )
    profile: Profile = {"ids": ((1,), (16,), (64,))}
    graph = PlanGraph("screener", path, form, {}, [profile])
    options = PlanOptions("rtx", form, targets=("sm_89",), eight_bits=EightBits(["hello"]))
    built = run_build(job_of(graph, tmp_path / "x.plan", options), silent)
    assert built.network is not None
    assert built.network["types"][form.upper()] == 4  # both inputs, both weights
    assert built.network["kinds"]["QUANTIZE"] == 2
    assert built.network["kinds"]["DEQUANTIZE"] == 4


@pytest.mark.slow
def test_the_default_screeners_plan(tmp_path: Path) -> None:
    entry, _ = build_part(
        open_bundle(lance_edge.default_bundle()), "screener", tmp_path, OPTIONS, silent
    )
    weights = 22.6e6  # parameters, 2 bytes each in fp16
    assert 2 * weights < entry.bytes < 3 * weights
    assert entry.network["kinds"]["NORMALIZATION"] == 13


def test_the_runtimes_own_words_reach_the_user(refining: Path, tmp_path: Path) -> None:
    """A profile that the graph cannot have."""
    graph = write_graph(open_bundle(refining), "screener", "fp32", tmp_path)
    graph.profiles[0]["mask"] = ((2, 8), (2, 8), (2, 8))
    graph.profiles[0]["ids"] = ((1, 8), (1, 8), (1, 8))
    with pytest.raises(ExportError, match=r"rtx cannot build the plan: .*contradictory"):
        run_build(job_of(graph, tmp_path / "x.plan", OPTIONS), silent)


def test_a_damaged_graph_is_refused_by_the_parser(refining: Path, tmp_path: Path) -> None:
    graph = write_graph(open_bundle(refining), "screener", "fp32", tmp_path)
    graph.path.write_bytes(graph.path.read_bytes()[:200])
    with pytest.raises(ExportError, match=r"the parser refuses screener\.onnx"):
        run_build(job_of(graph, tmp_path / "x.plan", OPTIONS), silent)


def test_targets_are_those_of_the_installed_version() -> None:
    targets = known_targets(trt)
    assert {"sm_86", "sm_89", "sm_120"} <= set(targets)
    assert all(isinstance(value, trt.ComputeCapability) for value in targets.values())


def test_the_parts_of_the_api_that_the_fake_has_are_there() -> None:
    """What the stand-in for `tensorrt_rtx` offers, the real one must, so that its tests mean something."""
    import fake_tensorrt

    fake = fake_tensorrt.make("tensorrt_rtx", trt.__version__)
    real = {
        "Engine": "ICudaEngine",
        "Context": "IExecutionContext",
        "Config": "IBuilderConfig",
        "Profile": "IOptimizationProfile",
        "Network": "INetworkDefinition",
        "Parser": "OnnxParser",
        "Tensor": "ITensor",
        "Builder": "Builder",
        "Runtime": "Runtime",
        "Refitter": "Refitter",
        "ParserRefitter": "OnnxParserRefitter",
        "SerializationConfig": "ISerializationConfig",
    }
    ours = {"module", "log", "model", "tell", "profiles", "array", "targets", "workspace"}
    for stand_in, name in real.items():
        methods = {
            key for key, value in vars(getattr(fake_tensorrt, stand_in)).items() if callable(value)
        }
        missing = [
            m for m in methods if not m.startswith("_") and not hasattr(getattr(trt, name), m)
        ]
        assert set(missing) <= ours, name
    for name in (
        "BuilderFlag",
        "TensorIOMode",
        "TensorLocation",
        "ProfilingVerbosity",
        "DataType",
        "SerializationFlag",
    ):
        for member in getattr(fake, name).__members__:
            known = hasattr(getattr(trt, name), member)
            assert known or (name, member) == ("TensorIOMode", "NONE"), (name, member)

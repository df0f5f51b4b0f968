"""Sessions: the table of devices, ONNX Runtime's CPU back-end, and the fake that tests use."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from lance_edge import graphs
from lance_edge.bundle import open_bundle
from lance_edge.graphs import open_graphs
from lance_edge_engines import (
    BACKENDS,
    DeviceUnavailable,
    FakeSession,
    SessionError,
    available_devices,
    open_session,
)

INPUTS = {"ids": np.array([[2, 4, 3]]), "mask": np.ones((1, 3), dtype=np.int64)}


@pytest.fixture(scope="module")
def graph() -> bytes:
    return tiny.graph().SerializeToString()


def test_cpu_session_runs(graph: bytes) -> None:
    session = open_session(graph, "cpu", threads=1)
    outputs = session.run(INPUTS)
    assert session.device == "cpu"
    assert outputs["mean"].tolist() == [[4.0, -4.0, -4.0]]
    assert {spec.name: spec.shape for spec in session.inputs}["ids"] == (None, None)
    assert {spec.name: spec.shape for spec in session.outputs}["mean"] == (None, 3)


def test_auto_says_what_it_chose(graph: bytes) -> None:
    devices = available_devices()
    assert set(devices) == set(BACKENDS)
    expected = "cuda" if devices["cuda"] is None else "cpu"
    assert open_session(graph, "auto").device == expected


def test_unknown_device_is_refused(graph: bytes) -> None:
    with pytest.raises(DeviceUnavailable, match="no device 'tpu'; choose from auto, cpu"):
        open_session(graph, "tpu")


@pytest.mark.skipif(available_devices()["cuda"] is None, reason="this machine has CUDA")
def test_cuda_never_falls_back(graph: bytes) -> None:
    with pytest.raises(DeviceUnavailable, match=r"lance-edge\[gpu\]"):
        open_session(graph, "cuda")


def test_a_provider_that_does_not_start_is_an_error(
    graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists CUDA because it was compiled in, then quietly runs on the CPU."""
    import onnxruntime

    real = onnxruntime.InferenceSession

    def on_cpu(graph: bytes, options: Any, providers: list[str]) -> Any:
        assert providers == ["CUDAExecutionProvider"]
        return real(graph, options, providers=["CPUExecutionProvider"])

    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
    loaded: list[str] = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: loaded.append("cuda"))
    with pytest.raises(DeviceUnavailable, match="could not start CUDAExecutionProvider"):
        open_session(graph, "cuda")
    assert loaded == ["cuda"]  # those that pip installed, before the provider looks for them


def test_missing_runtime_names_the_extra(graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceUnavailable, match=r"install `lance-edge\[cpu\]`"):
        open_session(graph, "cpu")
    with pytest.raises(DeviceUnavailable, match=r"no device can run the graph; cuda: .*; cpu: "):
        open_session(graph)


def test_damaged_graph_is_a_session_error() -> None:
    with pytest.raises(SessionError, match="cannot load the graph"):
        open_session(b"not a graph", "cpu")


@pytest.mark.parametrize(
    "inputs",
    [
        {"ids": INPUTS["ids"]},
        {**INPUTS, "ids": INPUTS["ids"].astype(np.float32)},
        {**INPUTS, "ids": INPUTS["ids"] + 10_000},
    ],
    ids=["missing", "wrong type", "out of range"],
)
def test_inputs_that_do_not_fit_are_session_errors(graph: bytes, inputs: dict[str, Any]) -> None:
    session = open_session(graph, "cpu")
    with pytest.raises(SessionError, match="the graph failed on cpu"):
        session.run(inputs)


def test_closed_sessions_refuse(graph: bytes) -> None:
    for session in (open_session(graph, "cpu"), FakeSession(lambda inputs: dict(inputs))):
        session.close()
        with pytest.raises(SessionError, match="closed"):
            session.run(INPUTS)


def test_fake_session_computes() -> None:
    session = FakeSession(lambda inputs: {"sum": inputs["ids"].sum(-1)})
    assert session.run(INPUTS)["sum"].tolist() == [9]


@pytest.mark.parametrize(
    ("asked", "precision", "expected"),
    [("auto", "int8", "cpu"), ("auto", "fp16", "auto"), ("cuda", "int8", "cuda")],
)
def test_auto_runs_int8_on_the_cpu(
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    precision: str,
    expected: str,
) -> None:
    """ONNX Runtime has no CUDA kernels for the products of int8 graphs."""
    opened = open_bundle(tiny_bundle)
    manifest = replace(
        opened.manifest, screener=replace(opened.manifest.screener, precision=precision)
    )
    chosen: list[str] = []
    monkeypatch.setattr(
        graphs, "open_session", lambda graph, device, threads: chosen.append(device)
    )
    open_graphs(replace(opened, manifest=manifest), asked).screener()
    assert chosen == [expected]


def test_the_runtime_reports_nothing_to_its_maker(tmp_path: Path) -> None:
    """ONNX Runtime 1.32 leaves a device id below the user's home when it may report."""
    code = "import lance_edge_engines, onnxruntime; onnxruntime.get_available_providers()"
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

"""The doctor's probes, on made-up files, commands and drivers; a probe never raises."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lance_edge.doctor import gather, trials
from lance_edge.doctor.machine import Clock, Cpu, Jetson, Memory
from lance_edge.doctor.trials import SQUARE, LoadedLibrary, RuntimeReport, ask
from lance_edge_engines.driver import Driver, Gpu, read_driver

X86 = """processor\t: 0
model name\t: AMD EPYC 9354
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni
"""
ARM = """processor\t: 0
Features\t: fp asimd evtstrm aes asimddp i8mm
CPU part\t: 0xd42
"""
MEMINFO = "MemTotal:        8000000 kB\nMemFree:  1 kB\nMemAvailable:    5000000 kB\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def write(root: Path, **files: str | int) -> None:
    """Files below the root; `__` in a name stands for a slash."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))


def silent(command: Sequence[str]) -> str | None:
    """A machine on which no command is there."""
    return None


def answers(**said: str) -> Any:
    """A machine on which these commands print this."""
    return lambda command: said.get(command[0].replace("-", "_"))


# Files and commands


@pytest.mark.parametrize(
    ("text", "name", "instructions"),
    [
        (X86, "AMD EPYC 9354", ("avx2", "avx512_vnni")),
        (ARM, None, ("neon", "dotprod", "i8mm")),
        ("flags\t: fpu\n", None, ()),
    ],
)
def test_cpu(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    name: str | None,
    instructions: tuple[str, ...],
) -> None:
    monkeypatch.setattr(gather.platform, "processor", lambda: "")
    write(root, proc__cpuinfo=text)
    found = gather.cpu(root)
    assert (found.name, found.instructions) == (name, instructions)
    assert found.cores >= 1


def test_cpu_without_proc(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather.platform, "processor", lambda: "arm")
    assert gather.cpu(root) == Cpu("arm", gather.cpu(root).cores, None)


def test_memory_is_the_machines(root: Path) -> None:
    write(root, proc__meminfo=MEMINFO)
    assert gather.memory(root) == Memory(8_192_000_000, 5_120_000_000)


def test_a_containers_limit_counts(root: Path) -> None:
    write(root, proc__meminfo=MEMINFO)
    limits = root / "sys/fs/cgroup"
    limits.mkdir(parents=True)
    (limits / "memory.max").write_text("2000000000\n")
    (limits / "memory.current").write_text("500000000\n")
    assert gather.memory(root) == Memory(2_000_000_000, 1_500_000_000)
    (limits / "memory.max").write_text("max\n")
    assert gather.memory(root) == Memory(8_192_000_000, 5_120_000_000)


def test_nvidia_on_the_bus(root: Path) -> None:
    assert gather.nvidia_device(root) is None
    write(
        root,
        sys__bus__pci__devices__0__vendor="0x8086\n",
        sys__bus__pci__devices__0__class="0x030000\n",
    )
    write(
        root,
        sys__bus__pci__devices__1__vendor="0x10de\n",
        sys__bus__pci__devices__1__class="0x040300\n",
    )
    assert gather.nvidia_device(root) is False  # its sound device alone is no GPU
    write(
        root,
        sys__bus__pci__devices__2__vendor="0x10de\n",
        sys__bus__pci__devices__2__class="0x030200\n",
    )
    assert gather.nvidia_device(root) is True


def test_driver_release(root: Path) -> None:
    assert gather.driver_release(root, silent) is None
    write(
        root,
        proc__driver__nvidia__version="NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  "
        "540.4.0  Release Build\nGCC version: gcc 11.4.0\n",
    )
    assert gather.driver_release(root, silent) == "540.4.0"
    said = answers(nvidia_smi="580.65.06\n580.65.06\n")
    assert gather.driver_release(root, said) == "580.65.06"


def test_jetson(root: Path) -> None:
    assert gather.jetson(root, silent) is None
    write(root, **{"proc__device-tree__model": "Raspberry Pi 5 Model B\0"})
    assert gather.jetson(root, silent) is None
    write(
        root,
        **{"proc__device-tree__model": "NVIDIA Jetson Orin Nano Developer Kit\0"},
        etc__nv_tegra_release="# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
        sys__devices__system__cpu__cpufreq__policy0__scaling_cur_freq=729_600,
        sys__devices__system__cpu__cpufreq__policy0__scaling_min_freq=729_600,
        sys__devices__system__cpu__cpufreq__policy0__scaling_max_freq=1_728_000,
    )
    gpu = root / "sys/class/devfreq/17000000.gpu"
    gpu.mkdir(parents=True)
    for part, hertz in (("cur", 306_000_000), ("min", 306_000_000), ("max", 1_020_000_000)):
        (gpu / f"{part}_freq").write_text(str(hertz))
    found = gather.jetson(root, answers(nvpmodel="NV Power Mode: 25W\n1\n"))
    assert found == Jetson(
        "NVIDIA Jetson Orin Nano Developer Kit",
        "36.4.3",
        "25W",
        (Clock("cpu", 729, 729, 1728), Clock("gpu", 306, 306, 1020)),
    )
    assert found.jetpack == 6


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [("35.4.1", 5), ("36.4.3", 6), ("38.2.0", 7), ("32.7.1", None), (None, None)],
)
def test_jetpack_follows_from_jetson_linux(l4t: str | None, jetpack: int | None) -> None:
    assert Jetson("Jetson", l4t, None).jetpack == jetpack


def test_a_jetson_that_says_little(root: Path) -> None:
    write(root, etc__nv_tegra_release="something else")
    assert gather.jetson(root, silent) == Jetson(None, None, None)


def test_jetpacks_tensorrt(root: Path) -> None:
    assert gather.jetpack_python(root) is None
    folder = root / "usr/lib/python3.10/dist-packages"
    (folder / "tensorrt").mkdir(parents=True)
    assert gather.jetpack_python(root) == str(folder)


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert gather.free_bytes(tmp_path / "not" / "yet") == pytest.approx(
        gather.free_bytes(tmp_path), rel=0.1
    )


@pytest.mark.parametrize(
    "command",
    [["there-is-no-such-command"], [sys.executable, "-c", "raise SystemExit(1)"], ["bad\0name"]],
)
def test_commands_that_fail_say_nothing(command: list[str]) -> None:
    assert gather.output_of(command) is None


def test_commands_that_work_are_heard() -> None:
    assert gather.output_of([sys.executable, "-c", "print(7)"]) == "7\n"


def test_a_probe_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no luck")

    for name in ("memory", "driver", "driver_release", "nvidia_device", "jetson", "jetpack_python"):
        monkeypatch.setattr(gather, name, fail)
    monkeypatch.setattr(gather, "_cache_folder", fail)
    monkeypatch.setattr(gather, "runtime", lambda: RuntimeReport(fault="not asked"))
    monkeypatch.setattr(gather, "find_spec", fail)
    monkeypatch.setattr(gather.metadata, "version", fail)
    found = gather.gather()
    assert found.memory is found.driver is found.jetson is found.tensorrt is None
    assert (found.packages, found.cache, found.cache_free_bytes) == ({}, "none", None)
    assert found.bundle.fault is None


# The bundle


def test_a_bundle_that_was_edited(tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    (copy / "screener.onnx").write_bytes(b"cut")
    found = gather.bundle_state(copy)
    assert found.fault is not None and "screener.onnx has 3 bytes" in found.fault
    missing = gather.bundle_state(tmp_path / "none").fault
    assert missing is not None and "manifest.json is missing" in missing


def test_the_default_bundles_refiner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lance_edge.bundle import open_bundle
    from lance_edge.cache import weights_path

    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path))
    found = gather.bundle_state(None)
    assert (found.fault, found.refiner) == (None, "missing")
    bundle = open_bundle()
    spec = bundle.manifest.refiner
    assert spec is not None
    assert found.refiner_bytes == 2 * spec.base.bytes + spec.weights.bytes
    weights_path(bundle, spec).write_bytes(b"half of them")
    assert gather.bundle_state(None).refiner == "damaged"
    monkeypatch.setattr("lance_edge.cache.is_whole", lambda path, spec: True)
    assert gather.bundle_state(None).refiner == "ready"


# Libraries, in processes of their own


def test_the_graph_is_what_it_says() -> None:
    from onnx import TensorProto, helper

    floats = (TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", *floats)],
        [helper.make_tensor_value_info("y", *floats)],
    )
    opset = helper.make_opsetid("", 17)
    made = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    assert made.SerializeToString() == SQUARE


def test_a_device_counts_only_if_the_graph_gives_the_right_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import numpy as np

    import lance_edge_engines
    from lance_edge_engines import DeviceUnavailable, FakeSession

    report = trials.try_runtime()
    assert report.refusals["cpu"] is None and report.wheel in ("onnxruntime", "onnxruntime-gpu")
    assert "CPUExecutionProvider" in report.offered

    wrong = FakeSession(lambda inputs: {"y": np.zeros(1)})

    def open_session(graph: bytes, device: str) -> FakeSession:
        if device == "cuda":
            raise DeviceUnavailable("no kernel image is available")
        return wrong

    monkeypatch.setattr(lance_edge_engines, "open_session", open_session)
    assert trials.try_runtime().refusals == {
        "cpu": "3 * 3 is 0.0 there",
        "cuda": "no kernel image is available",
    }


def test_an_answer_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt_of_tests.py").write_text("__version__ = '10.3.0'\nprint('loading')\n")
    (tmp_path / "broken_of_tests.py").write_text("raise OSError('libnvinfer.so.11: not found')\n")
    (tmp_path / "crashing_of_tests.py").write_text("import os\nos.abort()\n")
    paths = [str(tmp_path), *filter(None, sys.path)]
    monkeypatch.setenv(
        "PYTHONPATH", ":".join(paths) if sys.platform != "win32" else ";".join(paths)
    )
    assert ask("tensorrt_of_tests", LoadedLibrary)[0] == LoadedLibrary("10.3.0")
    assert ask("broken_of_tests", LoadedLibrary)[0] == LoadedLibrary(
        fault="libnvinfer.so.11: not found"
    )
    assert ask("crashing_of_tests", LoadedLibrary) == (None, "")
    monkeypatch.syspath_prepend(tmp_path)
    crashed = gather.library("crashing_of_tests")
    assert crashed is not None and "ends the process" in (crashed.fault or "")


def test_what_onnx_runtime_complains_of_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are those of onnxruntime-gpu 1.31.1 on a machine without CUDA."""
    complaint = (
        "[ONNXRuntimeError] : 1 : FAIL : Failed to load library /site/onnxruntime/capi/"
        "libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared object "
        "file: No such file or directory"
    )
    monkeypatch.setattr(gather, "ask", lambda name, kind: (RuntimeReport("1.31.1"), complaint))
    assert gather.runtime().missing == "libcublasLt.so.13"
    monkeypatch.setattr(gather, "ask", lambda name, kind: (RuntimeReport("1.31.1"), "a warning"))
    assert gather.runtime().missing is None
    monkeypatch.setattr(gather, "ask", lambda name, kind: (None, ""))
    assert "ends the process" in (gather.runtime().fault or "")


def test_what_is_not_installed_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*arguments: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(gather, "ask", no_process)
    monkeypatch.setattr(gather, "find_spec", lambda name: None)
    assert gather.library("tensorrt") is None
    assert gather.runtime() == RuntimeReport(fault="onnxruntime is not installed")


# The driver


class FakeCuda:
    """libcuda.so.1 with the GPUs it is given, as (name, major, minor, bytes)."""

    def __init__(self, version: int, gpus: Sequence[tuple[str, int, int, int]], status: int = 0):
        self.version, self.gpus, self.status = version, gpus, status

    def cuDriverGetVersion(self, out: Any) -> int:  # noqa: N802
        out._obj.value = self.version
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, out: Any) -> int:  # noqa: N802
        out._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:  # noqa: N802
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, out: Any, size: int, device: Any) -> int:  # noqa: N802
        out.value = self.gpus[device.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, device: Any) -> int:  # noqa: N802
        out._obj.value = self.gpus[device.value][3]
        return 0

    def cuDeviceGetAttribute(self, out: Any, number: int, device: Any) -> int:  # noqa: N802
        out._obj.value = self.gpus[device.value][{75: 1, 76: 2}[number]]
        return 0


def test_a_driver_names_its_gpus() -> None:
    library = FakeCuda(
        12060, [("Orin", 8, 7, 7_990_000_000), ("NVIDIA H100", 9, 0, 80_000_000_000)]
    )
    assert read_driver(library) == Driver(
        "12.6",
        (Gpu("Orin", "8.7", 7_990_000_000), Gpu("NVIDIA H100", "9.0", 80_000_000_000)),
    )


def test_a_driver_without_a_gpu() -> None:
    assert read_driver(FakeCuda(13000, (), 100)) == Driver("13.0", ())


def test_a_driver_that_does_not_start() -> None:
    assert "different releases" in (read_driver(FakeCuda(13000, (), 803)).fault or "")
    assert read_driver(FakeCuda(0, (), 999)) == Driver(None, (), "cuInit returned 999")


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "load_library", lambda: None)
    assert gather.driver() is None

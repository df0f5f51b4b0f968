"""Building plans: options, a process of its own, a folder that is whole or not there, a command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_tensorrt
import onnx
import pytest
import tiny_refiner
from fake_tensorrt import FakeMemory
from typer.testing import CliRunner

from lance_edge.bundle import Bundle, open_bundle
from lance_edge.cli import app
from lance_edge.errors import BundleError, ExportError, InvalidOption, RefinerMissing
from lance_edge_engines import DeviceUnavailable, SessionError, cuda, driver
from lance_edge_engines.cuda import Gpu, NoSuchGpu
from lance_edge_engines.plan_record import read_record
from lance_edge_export import build_plan, to_plan
from lance_edge_export.build_plan import Job, build, share_done
from lance_edge_export.plan_cli import parse_device, parse_targets
from lance_edge_export.plan_graphs import EightBits, write_graph
from lance_edge_export.to_plan import PlanOptions, build_plans, check_fp8, run_build, summary

FAKE = """
import sys
from fake_tensorrt import make
sys.modules[__name__] = make("tensorrt_rtx", "1.7.1.116")
"""
# In the child alone: another way to build.
BUILDER = """
import fake_tensorrt, os, sys, time
if "lance_edge_export.build_plan" in sys.orig_argv:
    fake_tensorrt.Builder.build_serialized_network = """


def silent(*_: Any) -> None:
    pass


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARIES", ("libno-such-driver.so",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for child processes


@pytest.fixture
def rtx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fake as the installed `tensorrt_rtx`, for this process and its children; its file."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "tensorrt_rtx.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    monkeypatch.syspath_prepend(folder)
    return folder / "tensorrt_rtx.py"


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake 10.3 in this process, with a GPU."""
    fake = fake_tensorrt.make("tensorrt", "10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(build_plan, "Device", lambda number: FakeMemory(Gpu("Orin", "sm_87")))
    monkeypatch.setattr(to_plan, "run_build", build)


def built(bundle: Path, out: Path, *parts: Any, **options: Any) -> list[tuple[str, float]]:
    """Build plans; what was told on the way."""
    told: list[tuple[str, float]] = []
    chosen = PlanOptions(**{"runtime": "rtx", **options})
    build_plans(
        open_bundle(bundle), parts or ("screener",), out, chosen, lambda *step: told.append(step)
    )
    return told


def left_in(folder: Path) -> set[str]:
    """What a failed build has left there."""
    return {path.name for path in folder.iterdir()} - {"packages", "bundle"}


def test_a_folder_with_plans_and_their_record(rtx: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """By a real child process, without a GPU."""
    out = tmp_path / "deep" / "plans"
    told = built(tiny_bundle, out, targets=("sm_86",), precision="fp16")
    record = read_record(out)
    (entry,) = record.plans.values()
    assert {path.name for path in out.iterdir()} == {"plan.json", entry.file}
    assert [path.name for path in out.parent.iterdir()] == ["plans"]
    assert (record.runtime, record.version) == ("rtx", "1.7.1.116")
    bundle = open_bundle(tiny_bundle)
    assert record.bundle["sha256"] == bundle.sha256
    assert entry.sources == {"screener.onnx": bundle.manifest.files["screener.onnx"].sha256}
    assert len(entry.graph_sha256) == 64
    assert (entry.bytes, entry.targets) == ((out / entry.file).stat().st_size, ("sm_86",))
    assert entry.file.startswith("screener-rtx-fp16-")
    assert entry.profiles[0]["ids"] == ((1, 8), (1, 16), (128, 16))
    assert entry.engine is None and entry.not_read_back
    assert entry.network["layers"] == 9  # 8 nodes, and a cast behind the table in fp16
    assert set(entry.build) == {"seconds", "cpu_seconds", "peak_mib"}
    if sys.platform == "linux":
        assert 10 < entry.build["peak_mib"] < 2000
    shares = [share for what, share in told if what == "building the screener's plan"]
    assert shares == [0.0, 0.25, 1.0, 1.0]
    assert any(f"not read back: {entry.not_read_back}" in line for line in summary(record))


def test_what_a_plan_is_built_from_changes_its_name(
    rtx: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_plan, "run_build", build)
    names = set()
    for number, options in enumerate(
        [{}, {"precision": "fp32"}, {"targets": ("sm_86",)}, {"targets": ("sm_89",)}, {}]
    ):
        out = tmp_path / str(number)
        built(tiny_bundle, out, **options)
        names.add(read_record(out).plans["screener"].file)
    assert len(names) == 4  # the first and the last are the same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorrt", "targets": ("sm_87",)}, "leave --target out"),
        ({"version_compatible": True}, "--version-compatible: only --runtime tensorrt"),
        ({"hardware_compatible": True}, "--hardware-compatible: only --runtime tensorrt"),
        ({"timing_cache": Path("x")}, "--timing-cache: only --runtime tensorrt"),
        ({"precision": "int8"}, "int8 and fp8 need real prompts"),
        ({"eight_bits": EightBits(["hello"])}, "other precisions take none"),
        ({"precision": "fp8", "eight_bits": EightBits(["hello"])}, "no --target was given"),
        (
            {"precision": "fp8", "eight_bits": EightBits(["hello"]), "targets": ("sm_89", "sm_86")},
            "fp8 is for GPUs from sm_89 on, and sm_86 was given",
        ),
        (
            {"targets": ("sm_87", "sm_86")},
            "has no target sm_87; choose from sm_75, sm_86, sm_89, sm_120",
        ),
    ],
)
def test_options_that_do_not_fit(
    rtx: Path, tiny_bundle: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidOption, match=message):
        built(tiny_bundle, tmp_path / "plans", **options)
    assert not left_in(tmp_path)


def test_fp8_is_the_screeners(rtx: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    options = {"precision": "fp8", "eight_bits": EightBits(["hello"]), "targets": ("sm_89",)}
    with pytest.raises(InvalidOption, match="fp8 is for the screener, and only the refiner's"):
        built(tiny_bundle, tmp_path / "plans", "refiner", **options)
    assert not left_in(tmp_path)
    with pytest.raises(InvalidOption, match="there are none"):
        EightBits([])


def test_a_plan_in_8_bits_says_what_they_change(
    rtx: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_plan, "run_build", build)
    out = tmp_path / "plans"
    built(tiny_bundle, out, precision="int8", eight_bits=EightBits(["hello the bomb", "the cake"]))
    record = read_record(out)
    entry = record.plans["screener"]
    assert (entry.precision, entry.parity and entry.parity.prompts) == ("int8", 2)
    assert entry.file.startswith("screener-rtx-int8-")
    (line,) = [line for line in summary(record) if "8 bits against fp32" in line]
    assert "on 2 prompts: severities differ by at most 0.000, 0.00% of" in line


def test_a_folder_that_exists_is_left_alone(rtx: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "plans"
    out.mkdir()
    with pytest.raises(InvalidOption, match="plans exists; name another folder"):
        built(tiny_bundle, out)
    assert not list(out.iterdir())


def test_a_bundle_without_a_refiner(rtx: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no refiner; .* --only screener"):
        built(tiny_bundle, tmp_path / "plans", "screener", "refiner")
    assert not left_in(tmp_path)


def test_a_refiner_that_was_never_pulled(
    rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path / "bundle" / "empty"))
    bundle = tiny_refiner.write_bundle(tmp_path / "bundle")
    with pytest.raises(RefinerMissing, match="run `lance-edge pull`"):
        built(bundle, tmp_path / "plans", "refiner")
    assert not left_in(tmp_path)


def test_parts_are_checked_before_the_first_is_built(
    rtx: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path / "empty"))
    never_pulled = open_bundle(tiny_refiner.write_bundle(tmp_path / "bundle"))
    manifest = never_pulled.manifest
    assert manifest.refiner is not None
    shape = replace(manifest.refiner.shape, head_norms=True)
    odd = replace(manifest, refiner=replace(manifest.refiner, shape=shape))
    told: list[str] = []
    for bundle, error, message in (
        (open_bundle(tiny_bundle), ExportError, "has no refiner"),
        (never_pulled, RefinerMissing, "run `lance-edge pull`"),
        (replace(never_pulled, manifest=odd), ExportError, "has head_norms, which no plan"),
    ):
        with pytest.raises(error, match=message):
            build_plans(
                bundle,
                ("screener", "refiner"),
                tmp_path / "plans",
                PlanOptions("rtx"),
                lambda what, share: told.append(what),
            )
    assert told == []


def in_a_file(model: onnx.ModelProto) -> bytes:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")
    return model.SerializeToString()


def of_opset_22(model: onnx.ModelProto) -> bytes:
    model.opset_import[0].version = 22
    return model.SerializeToString()


def without_inputs(model: onnx.ModelProto) -> bytes:
    del model.graph.input[:]
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (in_a_file, BundleError, "has a tensor that lies in a file, and it may read none"),
        (of_opset_22, ExportError, "is of opset 22, and plans are made of opset 21 at most"),
        (without_inputs, BundleError, "is no valid ONNX model"),
        (lambda _: b"no protobuf", BundleError, "is no ONNX model"),
        (lambda _: bytes([0x42, 1, 0x80]), BundleError, "is no ONNX model"),  # in its opset
    ],
    ids=["file", "opset", "inputs", "bytes", "message"],
)
def test_a_graph_that_no_plan_is_made_of(
    rtx: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: Callable[[onnx.ModelProto], bytes],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(bytes(10**6))
    bundle = open_bundle(tiny_bundle)
    contents = changed(onnx.load_model_from_string(bundle.read("screener.onnx")))
    monkeypatch.setattr(Bundle, "read", lambda self, name: contents)
    with pytest.raises(error, match=message):
        build_plans(bundle, ("screener",), tmp_path / "plans", PlanOptions("rtx"), silent)


def test_a_pulled_refiner(rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path))
    folder = tiny_refiner.write_pulled(tmp_path / "bundle")
    spec = tiny_refiner.spec()
    built(folder, tmp_path / "plans", "screener", "refiner")
    plans = read_record(tmp_path / "plans").plans
    assert list(plans) == ["screener", "refiner"]
    assert plans["refiner"].sources["refiner.weights"] == spec.weights.sha256
    assert len(list((tmp_path / "plans").iterdir())) == 3  # no graph, no weights, no log


@pytest.mark.parametrize(
    ("builds", "message"),
    [
        ("lambda *_: os.abort()", r"the builder died \(signal 6\).*--workspace"),
        ("lambda *_: os._exit(9)", r"the builder died \(exit code 9\)"),
        ("lambda *_: 1 / 0", r"the builder died \(exit code 1\): ZeroDivisionError"),
        (
            "lambda self, *_: fake_tensorrt.fail(self.log, 'no room for kernels')",
            "rtx cannot build the plan: no room for kernels",
        ),
    ],
    ids=["abort", "exit", "exception", "refusal"],
)
def test_a_failing_builder_is_an_error_message(
    rtx: Path, tiny_bundle: Path, tmp_path: Path, builds: str, message: str
) -> None:
    rtx.write_text(BUILDER + builds + FAKE, encoding="utf-8")
    with pytest.raises(ExportError, match=message):
        built(tiny_bundle, tmp_path / "plans")
    assert not left_in(tmp_path)


def test_an_interrupted_build_leaves_nothing(rtx: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    class Stop(KeyboardInterrupt):
        pass

    def interrupt(what: str, share: float) -> None:
        if share > 0:
            raise Stop

    chosen = PlanOptions("rtx")
    with pytest.raises(Stop):
        build_plans(open_bundle(tiny_bundle), ("screener",), tmp_path / "plans", chosen, interrupt)
    assert not left_in(tmp_path)


def test_a_builder_ends_when_its_parent_is_gone(
    rtx: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    rtx.write_text(BUILDER + "lambda *_: time.sleep(60)" + FAKE, encoding="utf-8")
    path = write_job(tiny_bundle, tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-m", "lance_edge_export.build_plan", str(path)],
        stdin=subprocess.PIPE,
        env=to_plan.child_environment(),
    )
    with child:
        time.sleep(0.1)
        assert child.poll() is None
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(timeout=30) == 1


def write_job(bundle: Path, folder: Path, **changes: Any) -> Path:
    path = folder / "job.json"
    path.write_text(json.dumps(vars(job(bundle, folder, **changes))), encoding="utf-8")
    return path


def job(bundle: Path, folder: Path, **changes: Any) -> Job:
    graph = write_graph(open_bundle(bundle), "screener", "fp32", folder)
    values: dict[str, Any] = {
        "runtime": "tensorrt",
        "graph": str(graph.path),
        "out": str(folder / "screener.plan"),
        "profiles": graph.profiles,
        "targets": [],
        "gpu": 0,
        "workspace": None,
        "timing": None,
        "version_compatible": False,
        "hardware_compatible": False,
        "stripped": False,
    }
    return Job(**{**values, **changes})


# What the builder is asked for


def test_the_builders_settings(tensorrt: None, tiny_bundle: Path, tmp_path: Path) -> None:
    answer = build(job(tiny_bundle, tmp_path), silent)
    last = fake_tensorrt.Builder.last
    assert last is not None
    assert last.flags == set()  # no TF32: fp32 is fp32
    assert last.workspace == 2**29  # half of what is free
    assert last.profiling_verbosity.name == "DETAILED"
    assert (answer.gpu, answer.sm, answer.not_read_back) == ("Orin", "sm_87", None)
    assert answer.engine is not None
    assert (answer.engine["layers"], answer.engine["profiles"]) == (8, 1)
    assert answer.engine["formats"] == {"Half": 2}
    assert answer.engine["tensors"]["ids"] == {"type": "INT64", "shape": [-1, -1], "host": False}


def test_a_stripped_plan_needs_a_gpu(rtx: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"rtx strips plans only on a machine with a GPU"):
        built(tiny_bundle, tmp_path / "plans", stripped=True)
    assert not left_in(tmp_path)


def test_a_workspace_can_be_given(tensorrt: None, tiny_bundle: Path, tmp_path: Path) -> None:
    build(job(tiny_bundle, tmp_path, workspace=5 * 2**20), silent)
    assert fake_tensorrt.Builder.last is not None
    assert fake_tensorrt.Builder.last.workspace == 5 * 2**20


def test_times_are_kept_between_builds(tensorrt: None, tiny_bundle: Path, tmp_path: Path) -> None:
    timing = tmp_path / "times"
    for expected in (b"timed ", b"timed timed "):
        build(job(tiny_bundle, tmp_path, timing=str(timing)), silent)
        assert timing.read_bytes() == expected
    timing.write_bytes(b"other GPU")
    with pytest.raises(SessionError, match="timing cache of another GPU or version; delete it"):
        build(job(tiny_bundle, tmp_path, timing=str(timing)), silent)
    assert timing.read_bytes() == b"other GPU"


def test_times_that_cannot_be_kept_cost_no_plan(
    tensorrt: None, tiny_bundle: Path, tmp_path: Path
) -> None:
    out, timing = tmp_path / "plans", tmp_path / "nowhere" / "times"
    built(tiny_bundle, out, runtime="tensorrt", timing_cache=timing)
    record = read_record(out)
    assert (out / record.plans["screener"].file).is_file()
    (line,) = [line for line in summary(record) if "measured times were not kept" in line]
    assert str(timing) in line


def test_a_gpu_that_is_not_there_is_not_passed_over(
    rtx: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_of_this_number(number: int) -> FakeMemory:
        raise NoSuchGpu(f"there is no GPU {number}")

    monkeypatch.setattr(build_plan, "Device", none_of_this_number)
    with pytest.raises(NoSuchGpu, match="there is no GPU 7"):
        build(job(tiny_bundle, tmp_path, runtime="rtx", gpu=7), silent)


@pytest.mark.parametrize(("capability", "refused"), [("8.7", True), ("8.9", False), ("9.0", False)])
def test_fp8_needs_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: str, refused: bool
) -> None:
    found = driver.Driver(
        "13.0", (driver.Gpu("Other", "7.5", 1), driver.Gpu("Orin", capability, 1))
    )
    monkeypatch.setattr(to_plan, "load_library", object)
    monkeypatch.setattr(to_plan, "read_driver", lambda library: found)
    options = PlanOptions("tensorrt", "fp8", gpu=1, eight_bits=EightBits(["hello"]))
    expected = pytest.raises(InvalidOption, match="from sm_89 on, and Orin is sm_87; use")
    with expected if refused else nullcontext():
        check_fp8(options)


def test_a_graph_that_the_parser_refuses(tensorrt: None, tiny_bundle: Path, tmp_path: Path) -> None:
    wanted = job(tiny_bundle, tmp_path)
    from lance_edge_export.decoder_graph import decoder_graph

    graph = decoder_graph(tiny_refiner.SHAPE, 3, "fp32", 64)
    del graph.graph.initializer[:]
    Path(wanted.graph).write_bytes(graph.SerializeToString())
    with pytest.raises(SessionError, match=r"refuses screener\.onnx: no importer for GroupQuery"):
        build(wanted, silent)


def test_tensorrt_needs_a_gpu(
    tensorrt: None, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_plan, "Device", cuda.Device)
    with pytest.raises(DeviceUnavailable, match="no NVIDIA driver"):
        built(tiny_bundle, tmp_path / "plans", runtime="tensorrt")
    assert not left_in(tmp_path)


def test_a_plan_for_another_gpu_is_not_read_back(
    rtx: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_plan, "Device", lambda number: FakeMemory(Gpu("H100", "sm_90")))
    monkeypatch.setattr(to_plan, "run_build", build)
    built(tiny_bundle, tmp_path / "plans")
    entry = read_record(tmp_path / "plans").plans["screener"]
    assert entry.not_read_back == "the plan is not for this machine's GPU, H100 (sm_90)"
    assert entry.gpu is None  # rtx plans are not bound to it


def test_the_share_of_nested_phases() -> None:
    assert share_done([(0, 2)]) == 0
    assert share_done([(1, 2), (1, 2)]) == 0.75
    assert share_done([(2, 2), (3, 3)]) == 1  # a phase that is not closed yet adds nothing


def test_noise_on_standard_output_is_no_progress(
    rtx: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    rtx.write_text(FAKE + "print('{'); print('3'); print('[1]')", encoding="utf-8")
    shares: list[float] = []
    run_build(job(tiny_bundle, tmp_path, runtime="rtx"), shares.append)
    assert shares == [0.25, 1.0]


# The command


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command(rtx: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "plans"
    arguments = (tiny_bundle, "--runtime", "rtx", "--only", "screener", "--out", out)
    code, printed, errors = call(*arguments, "--target", "sm_86,sm_89,sm_86")
    assert code == 0, errors
    assert f"wrote {out}" in printed
    assert "for sm_86, sm_89" in printed
    assert "building the screener's plan" in errors
    code, _, errors = call(*arguments)
    assert code == 2
    assert "exists; name another folder" in errors


def test_a_missing_runtime_names_its_extra(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for runtime, module in (("rtx", "tensorrt_rtx"), ("tensorrt", "tensorrt")):
        monkeypatch.setitem(sys.modules, module, None)
        code, _, errors = call(tiny_bundle, "--runtime", runtime, "--out", tmp_path / "plans")
        assert code == 3
        assert f"install `lance-edge[{runtime}]`" in errors
    assert not left_in(tmp_path)


@pytest.mark.parametrize(
    ("text", "targets"), [("", ()), ("sm_86", ("sm_86",)), (" sm_86, sm_120,", ("sm_86", "sm_120"))]
)
def test_targets(text: str, targets: tuple[str, ...]) -> None:
    assert parse_targets(text) == targets


@pytest.mark.parametrize("text", ["86", "sm_8", "sm-86", "SM86"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(InvalidOption, match="a target looks like sm_86"):
        parse_targets(text)


@pytest.mark.parametrize(("text", "number"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_devices(text: str, number: int) -> None:
    assert parse_device(text) == number


@pytest.mark.parametrize("text", ["cpu", "cuda:", "cuda:-1", "0"])
def test_devices_that_are_none(text: str) -> None:
    with pytest.raises(InvalidOption, match="plans are built on cuda:0"):
        parse_device(text)

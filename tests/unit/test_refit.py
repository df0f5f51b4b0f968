"""Stripped plans: built without weights, refused as they are, made whole on the machine that runs them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
import tiny_refiner
from fake_tensorrt import FakeMemory
from typer.testing import CliRunner

from lance_edge.bundle import open_bundle
from lance_edge.cli import app
from lance_edge.errors import ExportError, InvalidOption
from lance_edge_engines import SessionError
from lance_edge_engines.cuda import Gpu
from lance_edge_engines.plan_record import PlanRecord, PlanStale, read_record
from lance_edge_engines.trt import open_plan
from lance_edge_export import build_plan, plan_graphs, refit, to_plan
from lance_edge_export.build_plan import build
from lance_edge_export.plan_graphs import EightBits
from lance_edge_export.refit import refit_plans, refitted_plan
from lance_edge_export.to_plan import PlanOptions, build_plans

VERSIONS = pytest.mark.parametrize("version", ["10.3.0", "11.4.1"])


def silent(*_: Any) -> None:
    pass


@pytest.fixture
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The fake `tensorrt` of a version, with a GPU."""
    version = (
        request.node.callspec.params.get("version") if hasattr(request.node, "callspec") else None
    )
    fake = fake_tensorrt.make("tensorrt", version or "11.4.1")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(build_plan, "Device", gpu)
    monkeypatch.setattr(refit, "Device", gpu)
    monkeypatch.setattr(to_plan, "run_build", build)
    return fake


def gpu(number: int = 0) -> FakeMemory:
    return FakeMemory(Gpu("Orin", "sm_87"))


def built(bundle: Path, out: Path, *parts: Any, **options: Any) -> PlanRecord:
    chosen = PlanOptions(**{"runtime": "tensorrt", "precision": "fp32", **options})
    return build_plans(open_bundle(bundle), parts or ("screener",), out, chosen, silent)


def made_whole(folder: Path, bundle: Path, eight_bits: EightBits | None = None) -> PlanRecord:
    out = folder.with_name("whole")
    return refit_plans(folder, read_record(folder), open_bundle(bundle), out, eight_bits, 0, silent)


def answers(folder: Path) -> dict[str, np.ndarray]:
    session = open_plan(folder, "screener", memory=gpu())
    ids = np.array([[2, 4, 5, 6, 3, 0, 0, 0]])
    found = session.run({"ids": ids, "mask": (ids > 0).astype(np.int64)})
    session.close()
    return found


@VERSIONS
def test_a_refitted_plan_is_the_one_built_with_weights(
    runtime: ModuleType, version: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    stripped, plain = tmp_path / "stripped", tmp_path / "plain"
    (before,) = built(tiny_bundle, stripped, stripped=True).plans.values()
    built(tiny_bundle, plain)
    assert fake_tensorrt.Builder.last is not None and not fake_tensorrt.Builder.last.flags
    assert before.stripped and before.file.endswith(".stripped.plan")
    with pytest.raises(SessionError, match=r"without its weights; put them back with `lance-edge"):
        open_plan(stripped, "screener", memory=gpu())
    (after,) = made_whole(stripped, tiny_bundle).plans.values()
    (wanted,) = read_record(plain).plans.values()
    assert (after.file, after.sha256, after.stripped) == (wanted.file, wanted.sha256, False)
    whole = tmp_path / "whole"
    assert {path.name for path in whole.iterdir()} == {"plan.json", after.file}
    for name, value in answers(plain).items():
        assert np.abs(value).max() > 0
        assert (answers(whole)[name] == value).all()


def test_the_refiners_weights_too(
    runtime: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path))
    bundle = tiny_refiner.write_pulled(tmp_path / "bundle")
    parts = ("screener", "refiner")
    built(bundle, tmp_path / "stripped", *parts, stripped=True)
    plain = built(bundle, tmp_path / "plain", *parts)
    refitted = made_whole(tmp_path / "stripped", bundle)
    for part in parts:
        assert refitted.plans[part].sha256 == plain.plans[part].sha256


@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_a_graph_that_comes_out_otherwise(
    runtime: ModuleType, tiny_bundle: Path, tmp_path: Path, form: Any
) -> None:
    """As with other prompts to choose scales on, or another version of onnx."""
    prompts = EightBits(["hello the bomb", "the cake"]) if form == "int8" else None
    stripped = tmp_path / "stripped"
    built(tiny_bundle, stripped, precision=form, eight_bits=prompts, stripped=True)
    made_whole(stripped, tiny_bundle, prompts)
    shutil.rmtree(tmp_path / "whole")
    record = (stripped / "plan.json").read_text(encoding="utf-8")
    (entry,) = read_record(stripped).plans.values()
    line = f'"graph_sha256": "{entry.graph_sha256}"'
    changed = record.replace(line, '"graph_sha256": "other"')
    (stripped / "plan.json").write_text(changed, encoding="utf-8")
    needed = "the --calibration and --keep-fp16, and the versions" if prompts else "the versions"
    with pytest.raises(ExportError, match=rf"comes out otherwise .*; use {needed}"):
        made_whole(stripped, tiny_bundle, prompts)
    assert not list(tmp_path.glob("whole*")) and not list(tmp_path.glob(".whole*"))


def test_weights_that_come_out_otherwise(
    runtime: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path))
    bundle = tiny_refiner.write_pulled(tmp_path / "bundle")
    built(bundle, tmp_path / "stripped", "refiner", precision="fp16", stripped=True)
    made = plan_graphs.plain_weights
    monkeypatch.setattr(
        plan_graphs,
        "plain_weights",
        lambda *given: ((name, array * 0) for name, array in made(*given)),
    )
    with pytest.raises(ExportError, match="the refiner's graph comes out otherwise"):
        made_whole(tmp_path / "stripped", bundle)


def test_another_bundle_is_refused(
    runtime: ModuleType, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tiny_bundle, tmp_path / "stripped", stripped=True)
    monkeypatch.setattr(refit, "sources", lambda *_: {"screener.onnx": "0" * 64})
    with pytest.raises(PlanStale, match=r"another screener\.onnx .*--stripped --out"):
        made_whole(tmp_path / "stripped", tiny_bundle)


def test_plans_that_have_their_weights(
    runtime: ModuleType, tiny_bundle: Path, tmp_path: Path
) -> None:
    built(tiny_bundle, tmp_path / "plain")
    with pytest.raises(InvalidOption, match="have their weights; run them as they are"):
        made_whole(tmp_path / "plain", tiny_bundle)


def test_what_the_runtime_refuses(runtime: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    (entry,) = built(tiny_bundle, tmp_path / "stripped", stripped=True).plans.values()
    contents = (tmp_path / "stripped" / entry.file).read_bytes()
    with pytest.raises(SessionError, match=r"cannot load the stripped plan: .* no magic tag"):
        refitted_plan(runtime, b"other", tmp_path / "screener.onnx")
    model = fake_tensorrt.onnx.load_from_string(open_bundle(tiny_bundle).read("screener.onnx"))
    del model.graph.initializer[:]
    (tmp_path / "empty.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SessionError, match=r"cannot refit the plan \(weights it lacks: \w"):
        refitted_plan(runtime, contents, tmp_path / "empty.onnx")


def test_a_plan_that_the_runtime_cannot_write(
    runtime: ModuleType, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(engine: fake_tensorrt.Engine, config: Any) -> None:
        fake_tensorrt.fail(engine.log, "no memory to write it")

    built(tiny_bundle, tmp_path / "stripped", stripped=True)
    monkeypatch.setattr(fake_tensorrt.Engine, "serialize_with_config", refuse)
    with pytest.raises(SessionError, match="cannot write the refitted plan: no memory to write it"):
        made_whole(tmp_path / "stripped", tiny_bundle)
    assert not (tmp_path / "whole").exists()


def test_the_commands(runtime: ModuleType, tiny_bundle: Path, tmp_path: Path) -> None:
    def call(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [*map(str, arguments)])
        return result.exit_code, result.stdout, result.stderr

    stripped, whole = tmp_path / "stripped", tmp_path / "whole"
    options = ("--runtime", "tensorrt", "--only", "screener", "--stripped", "--out", stripped)
    code, printed, errors = call("plan", tiny_bundle, *options)
    assert (code, "MB, without weights, fp16" in printed) == (0, True), errors
    code, printed, errors = call("refit", stripped, tiny_bundle, "--out", whole)
    assert (code, f"wrote {whole}" in printed, "without weights" in printed) == (0, True, False)
    assert "putting the screener's weights back" in errors
    code, _, errors = call("refit", stripped, tiny_bundle, "--out", whole)
    assert (code, "exists; name another folder" in errors) == (2, True)
    code, _, errors = call("refit", tmp_path / "none", tiny_bundle, "--out", tmp_path / "more")
    assert (code, "plan.json is missing" in errors) == (3, True)

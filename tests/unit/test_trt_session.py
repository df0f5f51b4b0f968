"""TensorRT sessions against stand-ins for three APIs: the plans come from our own builder, the fakes
compute them, and the addresses and lengths they are given must be right."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
import tiny
import tiny_refiner
from fake_tensorrt import ORIN, FakeMemory
from tiny_refiner import SHAPE
from typer.testing import CliRunner

import lance_edge
from lance_edge import cli
from lance_edge.bundle import Calibration, open_bundle
from lance_edge.decoder import Decoder
from lance_edge.errors import InvalidOption
from lance_edge.graphs import sources
from lance_edge.refiner import Refiner
from lance_edge.verify import check_goldens
from lance_edge.weights import make_weights
from lance_edge_engines import DeviceUnavailable, SessionError, cuda, driver, open_session, trt
from lance_edge_engines.cuda import Device, Gpu, NoSuchGpu
from lance_edge_engines.plan_record import PlanStale, read_record
from lance_edge_engines.trt import MODULES, import_runtime, open_plan
from lance_edge_export import build_plan, to_plan
from lance_edge_export.plain_decoder import plain_decoder_graph, plain_layout, plain_weights
from lance_edge_export.to_plan import PlanOptions, build_plans

APIS = {
    "10.3": ("tensorrt", "10.3.0"),
    "11.4": ("tensorrt", "11.4.1.7"),
    "rtx": ("rtx", "1.7.1.116"),
}


@pytest.fixture(params=APIS)
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A runtime's name; its fake is installed, and there is a GPU with sm_86."""
    runtime, version = APIS[request.param]
    module = MODULES[runtime]
    monkeypatch.setitem(sys.modules, module, fake_tensorrt.make(module, version))
    monkeypatch.setattr(build_plan, "Device", lambda number: FakeMemory(Gpu("Fake 3000", "sm_86")))
    # In this process, so that the fakes are seen.
    monkeypatch.setattr(to_plan, "run_build", lambda job, tell: build_plan.build(job, tell))
    return runtime


@pytest.fixture
def refining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with the tiny refiner, and its weights as if they were pulled."""
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path / "cache"))
    return tiny_refiner.write_pulled(tmp_path / "bundle")


@pytest.fixture
def memory() -> FakeMemory:
    return FakeMemory(Gpu("Fake 3000", "sm_86"))


Plans = Callable[..., Path]


@pytest.fixture
def plans(api: str, refining: Path, tmp_path: Path) -> Plans:
    """Builds plans of the tiny bundle with the fake."""

    def build(*parts: Any, **options: Any) -> Path:
        out = tmp_path / "plans"
        chosen = PlanOptions(api, **{"precision": "fp32", **options})  # type: ignore[arg-type]
        build_plans(open_bundle(refining), parts, out, chosen, lambda what, share: None)
        return out

    return build


@pytest.fixture(autouse=True)
def all_memory_is_freed() -> Iterator[None]:
    yield
    gc.collect()
    leaked = len(FakeMemory.BLOCKS)
    FakeMemory.BLOCKS.clear()
    assert leaked == 0


def prompt(rows: int, tokens: int) -> dict[str, Any]:
    rng = np.random.default_rng(rows * tokens)
    ids = rng.integers(0, len(tiny.WORDS), (rows, tokens))
    return {"ids": ids, "mask": (ids > 1).astype(np.int64)}


def test_a_screeners_plan_says_what_its_graph_does(plans: Plans, memory: FakeMemory) -> None:
    session = open_plan(plans("screener"), "screener", memory=memory)
    reference = open_session(tiny.graph().SerializeToString(), "cpu", threads=1)
    assert {spec.name: spec.shape for spec in session.inputs}["ids"] == (None, None)
    assert session.outputs[0].dtype == np.float32
    # From small to large and back: buffers grow, and what is left in them does not matter.
    for rows, tokens in ((1, 8), (32, 16), (3, 8), (1, 16)):
        inputs = prompt(rows, tokens)
        found, expected = session.run(inputs), reference.run(inputs)
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert found[name].tolist() == values.tolist(), name
    session.close()


def reference_decoder() -> Decoder:
    """The same graph in ONNX Runtime."""
    weights = dict(make_weights(tiny_refiner.network(), tiny_refiner.delta(), "int8"))
    categories = len(tiny.CATEGORIES)
    entries = plain_layout(SHAPE, categories, "fp32")
    session = open_session(
        plain_decoder_graph(SHAPE, categories, "fp32", tiny_refiner.CONTEXT).SerializeToString(),
        "cpu",
        threads=1,
        weights=dict(plain_weights(weights, SHAPE, entries)),
    )
    return Decoder(session, tiny_refiner.prefix(), len(tiny_refiner.language().prefix), 1024)


def test_a_refiners_plan_decodes_with_rollback(plans: Plans, memory: FakeMemory) -> None:
    """Prefill and verify steps, so both profiles; the cache stays on the device."""
    session = open_plan(plans("refiner"), "refiner", memory=memory)
    planned = with_prefix(session)
    reference = reference_decoder()
    rng = np.random.default_rng(1)
    caches = [planned.start(150), reference.start(150)]
    for count, back in ((60, 0), (5, 3), (17, 16), (1, 0), (40, 40), (17, 1)):
        ids = rng.integers(3, SHAPE.vocabulary, count).tolist()
        first = int(rng.integers(0, count))
        steps = [d.step(c, ids, first) for d, c in zip((planned, reference), caches, strict=True)]
        assert steps[0].tokens == steps[1].tokens
        assert steps[0].mean.tolist() == steps[1].mean.tolist()
        for cache in caches:
            cache.rollback(cache.length - back)
    kept = [cache.state.read("value.1")[:, :, : cache.length] for cache in caches]
    assert kept[0].tolist() == kept[1].tolist()
    session.close()


def with_prefix(session: Any) -> Decoder:
    return Decoder(session, tiny_refiner.prefix(), len(tiny_refiner.language().prefix), 1024)


def test_two_states_do_not_mix(plans: Plans, memory: FakeMemory) -> None:
    session = open_plan(plans("refiner"), "refiner", memory=memory)
    decoder = with_prefix(session)
    one, other = decoder.start(30), decoder.start(50)
    alone = decoder.start(30)
    expected = [decoder.step(alone, ids).tokens for ids in ([5, 6, 7], [8, 9])]
    found = []
    for ids in ([5, 6, 7], [8, 9]):
        found.append(decoder.step(one, ids).tokens)
        decoder.step(other, [11, 12])
    assert found == expected
    session.close()


def test_a_half_cache_is_filled_from_floats(plans: Plans, memory: FakeMemory) -> None:
    session = open_plan(plans("refiner", precision="fp16"), "refiner", memory=memory)
    state = session.allocate(12)
    values = {"key.0": np.arange(1 * 1 * 3 * 32, dtype=np.float32).reshape(1, 1, 3, 32)}
    state.load(values)
    found = state.read("key.0")
    assert found.dtype == np.float16 and found.shape == (1, SHAPE.kv_heads, 12, SHAPE.head_size)
    assert found[:, :, :3].tolist() == values["key.0"].tolist()
    assert not found[:, :, 3:].any()
    session.close()


def test_a_state_with_several_heads_keeps_each_head_in_its_place(memory: FakeMemory) -> None:
    from lance_edge_engines import TensorSpec
    from lance_edge_engines.trt import PlanState

    spec = TensorSpec("past.key.0", np.dtype(np.float32), (None, 3, None, 4))
    state = PlanState([spec], 5, memory)
    value = np.arange(24, dtype=np.float32).reshape(1, 3, 2, 4)
    state.load({"key.0": value})
    assert state.read("key.0")[:, :, :2].tolist() == value.tolist()
    assert not state.read("key.0")[:, :, 2:].any()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            prompt(129, 8),
            r"no profile of the plan has room for ids of \(129, 8\), which may be \(1, 8",
        ),
        (prompt(1, 24), r"no profile of the plan has room for ids of \(1, 24\)"),
        ({"ids": prompt(1, 8)["ids"]}, "differ in mask"),
        ({**prompt(1, 8), "x": np.zeros(1)}, "differ in x"),
        (
            {**prompt(1, 8), "mask": np.ones((1, 8), np.int32)},
            "mask is int64 and what was given int32",
        ),
        (
            {**prompt(1, 8), "ids": np.full((1, 8), 99)},
            "the plan failed on .*indices element out of",
        ),
    ],
    ids=["rows", "tokens", "missing", "unknown", "type", "fails"],
)
def test_inputs_that_do_not_fit(
    plans: Plans, memory: FakeMemory, inputs: dict[str, Any], message: str
) -> None:
    session = open_plan(plans("screener"), "screener", memory=memory)
    with pytest.raises(SessionError, match=message):
        session.run(inputs)
    assert session.run(prompt(1, 8))["mean"].shape == (1, 3)  # it still runs
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.run(prompt(1, 8))
    session.close()  # twice is fine


def test_a_session_goes_on_after_the_device_had_no_room(plans: Plans, memory: FakeMemory) -> None:
    session = open_plan(plans("screener"), "screener", memory=memory)
    expected = session.run(prompt(1, 8))["mean"].tolist()
    memory.full = True
    with pytest.raises(SessionError, match="out of memory"):
        session.run(prompt(32, 16))
    assert session.run(prompt(1, 8))["mean"].tolist() == expected  # in live blocks
    memory.full = True
    with pytest.raises(SessionError, match="out of memory"):
        session.run(prompt(64, 16))
    session.close()  # frees none twice


def test_a_failed_run_leaves_the_state_as_it_was(plans: Plans, memory: FakeMemory) -> None:
    session = open_plan(plans("refiner"), "refiner", memory=memory)
    decoder = with_prefix(session)
    cache = decoder.start(20)
    before = cache.state.read("key.0").tolist()
    with pytest.raises(SessionError, match="the plan failed"):
        decoder.step(cache, [10**6, 3])
    assert cache.state.read("key.0").tolist() == before
    session.close()


# A pipeline on plans


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What opens plans finds a GPU."""
    monkeypatch.setattr(trt, "Device", lambda number: FakeMemory(Gpu("Fake 3000", "sm_86")))


@pytest.fixture
def not_pulled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked for after the plans were built: the machine that runs them never pulled the weights."""
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path / "empty"))


PARITY = {
    "prompts": 9,
    "largest_difference": 0.1,
    "mean_difference": 0.0,
    "flipped_decisions": 0.0,
    "worst_layers": {},
}
PROMPTS = ["hello the cake", "hello the bomb", "kill safely", "the minor", "spy " * 60]


def test_a_pipeline_on_plans_says_what_its_graphs_say(
    api: str, plans: Plans, gpu: None, refining: Path
) -> None:
    with (
        lance_edge.load(refining, "cpu", threads=1, looks="1") as expected,
        lance_edge.load(refining, threads=1, looks="1", plans=plans("screener")) as planned,
    ):
        assert (planned.device, expected.device) == (api, "cpu")
        for found, wanted in zip(
            planned.screen_many(PROMPTS), expected.screen_many(PROMPTS), strict=True
        ):
            assert found.severity == wanted.severity
            assert (found.decision, found.spans) == (wanted.decision, wanted.spans)
            assert found.device == api


def test_plans_need_no_pulled_weights(
    plans: Plans, gpu: None, refining: Path, request: pytest.FixtureRequest
) -> None:
    """Both plans hold their weights; the second look, which is the refiner's, is taken too."""
    folder = plans("screener", "refiner")
    request.getfixturevalue("not_pulled")
    with lance_edge.load(refining, plans=folder) as pipeline:
        assert pipeline.screen("kill safely").look == 2
        refiner = pipeline.refiner
        reading = refiner.read("hello the bomb")
        found = refiner.rewrite(reading, "violence: no violence")
        verdict = pipeline.refine("hello the bomb")
        assert verdict.steps and verdict.decision in ("rewrite", "block")
        assert verdict.steps[0].critique
    with refiner_on_the_cpu() as reference:
        wanted = reference.rewrite(reference.read("hello the bomb"), "violence: no violence")
    assert (found.ids, found.steps, found.accepted) == (wanted.ids, wanted.steps, wanted.accepted)


@contextmanager
def refiner_on_the_cpu() -> Iterator[Refiner]:
    """The decoder that plans are made from, in ONNX Runtime."""
    neutral = [Calibration(slope=1.0, intercept=0.0, threshold=0.5) for _ in tiny.CATEGORIES]
    refiner = Refiner(
        reference_decoder(),
        tiny_refiner.language(),
        neutral,
        tiny_refiner.PROMPT_TOKENS,
        tiny_refiner.LEAST_KEPT,
    )
    yield refiner
    refiner.close()


def test_what_has_no_plan_runs_on_the_device(
    api: str, plans: Plans, gpu: None, refining: Path
) -> None:
    with lance_edge.load(refining, "cpu", threads=1, plans=plans("screener")) as pipeline:
        assert (pipeline.screener.device, pipeline.refiner.decoder.device) == (api, "cpu")


def changed(folder: Path, part: str, **values: Any) -> Path:
    """The folder, with other values in the record of a plan."""
    path = folder / "plan.json"
    record = json.loads(path.read_text())
    record["plans"][part] |= values
    path.write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("part", ["screener", "refiner"])
def test_a_pipeline_refuses_another_bundles_plans(
    plans: Plans, gpu: None, refining: Path, part: str
) -> None:
    """Also the refiner's, which is only opened when it is needed."""
    name = f"{part}.onnx"
    folder = changed(plans("screener", "refiner"), part, sources={name: "0" * 64})
    with pytest.raises(PlanStale, match=f"was built from another {name}.* than the bundle's"):
        lance_edge.load(refining, plans=folder)


def test_a_folder_without_plans_is_refused(refining: Path, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=r"plan.json is missing; build plans with `lance-edge"):
        lance_edge.load(refining, plans=tmp_path)
    file = tmp_path / "plan.json"
    file.write_text('{"format": 3, "plans": {}}')
    with pytest.raises(SessionError, match="it has plans of nothing"):
        lance_edge.load(refining, plans=tmp_path)
    with pytest.raises(SessionError, match="name the folder that `lance-edge plan` wrote"):
        lance_edge.load(refining, plans=file)


def test_plans_of_unknown_parts_are_refused(plans: Plans, refining: Path) -> None:
    folder = plans("screener")
    path = folder / "plan.json"
    record = json.loads(path.read_text())
    record["plans"]["odd"] = record["plans"]["screener"]
    path.write_text(json.dumps(record))
    with pytest.raises(SessionError, match="has plans of odd; build the plans again"):
        lance_edge.load(refining, plans=folder)


def test_a_public_key_cannot_vouch_for_plans(refining: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="plans are not signed"):
        lance_edge.load(refining, plans=tmp_path, public_key=tmp_path / "key.pem")


@pytest.mark.parametrize(
    ("largest", "allowed"), [(0.003, 1e-5 + 1e-2), (0.0, 1e-5 + 1e-2), (0.11, 1e-5 + 0.11)]
)
def test_verify_allows_what_8_bits_were_measured_to_change(
    plans: Plans, gpu: None, refining: Path, largest: float, allowed: float
) -> None:
    parity = PARITY | {"largest_difference": largest}
    folder = changed(plans("screener"), "screener", precision="fp8", parity=parity)
    with lance_edge.load(refining, threads=1, looks="1", plans=folder) as pipeline:
        assert check_goldens(pipeline).tolerance == pytest.approx(allowed)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parity": "abc"}, "is not a record of plans"),
        ({"parity": {"x": 1}}, "is not a record of plans"),
        ({"parity": PARITY | {"largest_difference": "0.1"}}, "must be numbers from 0 to 1"),
        ({"parity": PARITY | {"largest_difference": float("inf")}}, "must be numbers from 0 to 1"),
        ({"parity": PARITY | {"mean_difference": float("nan")}}, "must be numbers from 0 to 1"),
        ({"precision": ["x"]}, r"there is no precision \['x'\]"),
        ({"sources": None}, "sources must be an object"),
        ({"targets": "sm_86"}, "targets a list"),
    ],
)
def test_a_record_with_odd_values_is_refused(
    plans: Plans, refining: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(SessionError, match=message):
        lance_edge.load(refining, plans=changed(plans("screener"), "screener", **values))


def test_commands_take_plans(
    api: str, plans: Plans, gpu: None, refining: Path, request: pytest.FixtureRequest
) -> None:
    folder = plans("screener", "refiner", precision="fp16")
    request.getfixturevalue("not_pulled")
    options = ["--bundle", str(refining), "--plans", str(folder)]
    flagged = CliRunner().invoke(
        cli.app, ["screen", "hello the bomb", "--format", "json", *options]
    )
    (record,) = json.loads(flagged.stdout)
    assert (flagged.exit_code, record["device"], record["decision"]) == (1, api, "rewrite")
    refined = CliRunner().invoke(cli.app, ["refine", "hello the bomb", "-q", *options])
    assert refined.exit_code == 1, refined.output
    verified = CliRunner().invoke(cli.app, ["verify", *options])
    assert verified.exit_code == 0, verified.output
    # The bundle's own 1e-5, and what fp16 adds.
    assert f" prompts on {api}: " in verified.stdout and "(allowed 0.01)" in verified.stdout
    for part in ("screener", "refiner"):
        assert f"{read_record(folder).plans[part].file}: the {part}, fits" in verified.stdout


def test_a_missing_folder_of_plans_is_said(refining: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    result = CliRunner().invoke(
        cli.app, ["refine", "hello", "--bundle", str(refining), "--plans", str(missing)]
    )
    assert result.exit_code == 3
    assert "plan.json is missing; build plans with `lance-edge plan" in result.stderr


# Whether a plan fits


@pytest.fixture
def record_path(plans: Plans) -> Path:
    return plans("screener")


def test_a_plan_from_another_bundle_is_stale(
    record_path: Path, memory: FakeMemory, refining: Path, api: str
) -> None:
    wanted = sources(open_bundle(refining), "screener")
    open_plan(record_path, "screener", wanted, memory=memory).close()
    with pytest.raises(PlanStale, match=r"was built from another screener.onnx than") as caught:
        open_plan(record_path, "screener", {"screener.onnx": "0" * 64}, memory=memory)
    target = " --target sm_75,sm_86,sm_89,sm_120" if api == "rtx" else ""
    wanted_again = f"--runtime {api} --precision fp32 --only screener{target} --out {record_path}"
    assert f"run `lance-edge plan BUNDLE {wanted_again}.new`" in str(caught.value)


def test_a_plan_of_another_version_is_stale(
    record_path: Path, memory: FakeMemory, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = fake_tensorrt.make(MODULES[api], "12.0.1")  # type: ignore[index]
    monkeypatch.setitem(sys.modules, MODULES[api], newer)  # type: ignore[index]
    with pytest.raises(PlanStale, match=r"was built by version [\d.]+ and 12.0.1 is installed"):
        open_plan(record_path, "screener", memory=memory)


@pytest.mark.parametrize("api", ["10.3"], indirect=True)
def test_newer_versions_may_run_compatible_plans(plans: Plans) -> None:
    from lance_edge_engines.plan_record import check_plan

    folder = plans("screener", version_compatible=True)
    assert fake_tensorrt.Builder.last is not None
    assert "VERSION_COMPATIBLE" in fake_tensorrt.Builder.last.flags
    record, gpu = read_record(folder), Gpu("Fake 3000", "sm_86")
    assert check_plan(folder, record, "screener", "11.4.1", gpu, None)
    with pytest.raises(PlanStale, match=r"was built by version 10\.3\.0 and 10\.2\.9 is"):
        check_plan(folder, record, "screener", "10.2.9", gpu, None)


@pytest.mark.parametrize("api", ["10.3", "11.4"], indirect=True)
def test_a_tensorrt_plan_runs_on_its_gpu_alone(record_path: Path) -> None:
    with pytest.raises(
        PlanStale, match=r"built on Fake 3000 \(sm_86\) and this GPU is Orin \(sm_87"
    ):
        open_plan(record_path, "screener", memory=FakeMemory(ORIN))
    with pytest.raises(PlanStale, match="this GPU is Fake 4000"):
        open_plan(record_path, "screener", memory=FakeMemory(Gpu("Fake 4000", "sm_86")))


@pytest.mark.parametrize("api", ["10.3"], indirect=True)
def test_hardware_compatible_plans_run_on_newer_gpus(plans: Plans) -> None:
    folder = plans("screener", hardware_compatible=True)
    last = fake_tensorrt.Builder.last
    assert last is not None and last.hardware_compatibility_level.name == "AMPERE_PLUS"
    open_plan(folder, "screener", memory=FakeMemory(ORIN)).close()
    with pytest.raises(PlanStale):
        open_plan(folder, "screener", memory=FakeMemory(Gpu("T4", "sm_75")))


@pytest.mark.parametrize("api", ["rtx"], indirect=True)
def test_an_rtx_plan_runs_on_its_targets(plans: Plans) -> None:
    folder = plans("screener", targets=("sm_86", "sm_89"))
    last = fake_tensorrt.Builder.last
    assert last is not None and last.targets == ["SM86", "SM89"]
    open_plan(folder, "screener", memory=FakeMemory(Gpu("Other", "sm_89"))).close()
    with pytest.raises(
        PlanStale,
        match=r"was built for sm_86, sm_89 and this GPU \(Orin\) is sm_87; .* --target sm_87 --out",
    ):
        open_plan(folder, "screener", memory=FakeMemory(ORIN))


@pytest.mark.parametrize("api", ["rtx"], indirect=True)
def test_an_rtx_plan_without_targets_is_for_those_that_the_runtime_knows(plans: Plans) -> None:
    folder = plans("screener")
    last = fake_tensorrt.Builder.last
    assert last is not None and last.targets == []  # the runtime's own choice
    known = ("sm_75", "sm_86", "sm_89", "sm_120")
    assert read_record(folder).plans["screener"].targets == known
    open_plan(folder, "screener", memory=FakeMemory(Gpu("Other", "sm_120"))).close()
    for named in (folder, changed(folder, "screener", targets=())):
        with pytest.raises(PlanStale, match=r"this GPU \(Orin\) is sm_87; .* --target sm_87 --out"):
            open_plan(named, "screener", memory=FakeMemory(ORIN))


def test_damage_is_found_before_the_runtime_sees_it(record_path: Path, memory: FakeMemory) -> None:
    (plan,) = record_path.glob("*.plan")
    contents = plan.read_bytes()
    plan.write_bytes(contents[:-1] + b"x")
    with pytest.raises(PlanStale, match="is not the file that"):
        open_plan(record_path, "screener", memory=memory)
    plan.unlink()
    with pytest.raises(PlanStale, match="is missing"):
        open_plan(record_path, "screener", memory=memory)


def test_a_part_that_was_not_built_is_named(record_path: Path, memory: FakeMemory) -> None:
    with pytest.raises(SessionError, match="has no plan 'refiner', only screener"):
        open_plan(record_path, "refiner", memory=memory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "plan.json is missing; build plans with `lance-edge plan"),
        ("{", "is not valid JSON"),
        ("[]", "is not a record of plans"),
        ('{"format": 4}', "has format 4 and this version reads 3"),
        ('{"format": 3, "plans": {"screener": {"file": "../x"}}}', "not a plain file name"),
        ('{"format": 3, "plans": {"screener": {"odd": 1}}}', "unknown keys odd"),
    ],
)
def test_a_record_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(SessionError, match=message):
        open_plan(tmp_path, "screener", memory=FakeMemory())


def test_a_plan_that_the_runtime_refuses(record_path: Path, memory: FakeMemory) -> None:
    import hashlib

    record = read_record(record_path)
    entry = record.plans["screener"]
    (record_path / entry.file).write_bytes(b"nothing")
    known = replace(entry, sha256=hashlib.sha256(b"nothing").hexdigest())
    text = replace(record, plans={"screener": known}).to_json()
    (record_path / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(SessionError, match="cannot load the plan: the plan has no magic tag"):
        open_plan(record_path, "screener", memory=memory)


# Without a runtime, without a GPU


@pytest.mark.parametrize("runtime", MODULES)
def test_a_missing_runtime_names_its_extra(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULES[runtime], None)
    with pytest.raises(DeviceUnavailable, match=rf"install `lance-edge\[{runtime}\]`"):
        import_runtime(runtime)


def test_a_runtime_without_libraries_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(DeviceUnavailable, match=r"without its libraries .libnvinfer.*JetPack"):
        import_runtime("tensorrt")


def test_no_driver_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARIES", ("libno-such-driver.so",))
    with pytest.raises(DeviceUnavailable, match="no NVIDIA driver"):
        Device()


class FakeDriver:
    """libcuda with one GPU; `fails` maps a call to its error code."""

    def __init__(self, fails: dict[str, int] | None = None) -> None:
        self.fails = fails or {}
        self.calls: list[str] = []
        self.functions: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in self.functions:
            self.functions[name] = Call(self, name)
        return self.functions[name]


class Call:
    argtypes: Any = None
    restype: Any = None

    def __init__(self, driver: FakeDriver, name: str) -> None:
        self.driver, self.name = driver, name

    def __call__(self, *arguments: Any) -> int:
        assert self.argtypes is None or len(arguments) == len(self.argtypes), self.name
        self.driver.calls.append(self.name)
        if self.name in self.driver.fails:
            return self.driver.fails[self.name]
        out = getattr(arguments[0], "_obj", None)  # what byref points to
        if self.name == "cuDeviceGetCount":
            out.value = 1
        elif self.name == "cuDeviceGetName":
            arguments[0].value = b"Orin"
        elif self.name == "cuDeviceGetAttribute":
            out.value = {75: 8, 76: 7}[arguments[1]]
        elif self.name in ("cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuMemAlloc_v2"):
            out.value = 4096
        elif self.name == "cuMemGetInfo_v2":
            out.value = 123
        elif self.name == "cuGetErrorString":
            arguments[1]._obj.value = b"it broke"
        return 0


def test_the_drivers_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    device = Device()
    assert device.gpu == Gpu("Orin", "sm_87")
    assert device.free_bytes() == 123
    address = device.allocate(0)
    array = np.zeros(3, np.float32)
    device.write(address, array)
    device.read(array, address)
    device.wait()
    device.free(address)
    device.close()
    assert address == 4096
    assert driver.calls[:2] == ["cuInit", "cuDeviceGetCount"]
    assert set(driver.calls) == set(cuda._CALLS) - {"cuGetErrorString"}


@pytest.mark.parametrize(
    ("fails", "number", "error", "message"),
    [
        ({"cuInit": 100}, 0, DeviceUnavailable, r"cuInit failed: it broke \(100\)"),
        ({}, 1, NoSuchGpu, "there is no GPU 1: the driver lists 1"),
        ({"cuStreamCreate": 2}, 0, SessionError, r"cuStreamCreate failed: it broke \(2\)"),
    ],
)
def test_the_drivers_errors(
    fails: dict[str, int], number: int, error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(fails))
    with pytest.raises(error, match=message):
        Device(number)


def test_fakes_lack_what_their_versions_lack() -> None:
    ten, eleven = (fake_tensorrt.make("tensorrt", version) for version in ("10.3.0", "11.4.1"))
    assert hasattr(ten.BuilderFlag, "FP16") and not hasattr(eleven.BuilderFlag, "FP16")
    assert not hasattr(eleven.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    assert isinstance(ten, ModuleType) and not hasattr(ten, "ComputeCapability")

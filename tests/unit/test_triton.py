"""Triton repositories: configurations that Triton's schema accepts, and the model.py that is shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import fake_triton
import jsonschema
import pytest
import tiny
import tiny_refiner
from fake_triton import request
from typer.testing import CliRunner

import lance_edge
from lance_edge import cli
from lance_edge.bundle import default_bundle, open_bundle
from lance_edge.cache import weights_path
from lance_edge.refiner import Reading, Refiner, Rewrite
from lance_edge_engines import SessionError, TensorSpec, open_session
from lance_edge_export.triton import guard_config, screener_config, write_screener

SCHEMA = jsonschema.Draft202012Validator(
    json.loads(files("lance_edge").joinpath("verdict.schema.json").read_text())
)
INTERNAL, INVALID = fake_triton.TritonError.INTERNAL, fake_triton.TritonError.INVALID_ARG


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the tiny bundle with its refiner; tests must not change it."""
    folder = tmp_path_factory.mktemp("triton")
    bundle = tiny_refiner.write_bundle(folder / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANCE_EDGE_CACHE", str(folder))
        opened = open_bundle(bundle)
        assert opened.manifest.refiner is not None
        path = weights_path(opened, opened.manifest.refiner)
        path.write_bytes(tiny_refiner.weights_file("int8"))
        done = CliRunner().invoke(
            cli.app, ["pack", str(bundle), "--format", "triton", "--out", str(folder / "models")]
        )
    assert (done.exit_code, done.stdout) == (0, f"wrote {folder / 'models'}\n"), done.stderr
    return folder / "models"


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server's machine: Triton's module is there, nothing was ever pulled."""
    fake_triton.install(monkeypatch)
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path / "empty"))


@pytest.fixture
def model(repository: Path) -> Iterator[Any]:
    started = fake_triton.start(repository, "pipeline", task="screen", device="cpu")
    yield started
    started.finalize()


@pytest.fixture
def guard(repository: Path) -> Iterator[lance_edge.Pipeline]:
    """What the model must agree with."""
    with lance_edge.load(repository / "pipeline" / "1" / "bundle", "cpu") as pipeline:
        yield pipeline


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "timings"}


def verdicts(response: Any) -> list[dict[str, Any]]:
    assert response.error is None, response.error.message
    found = [json.loads(text) for text in response.texts("verdict")]
    for verdict in found:
        SCHEMA.validate(verdict)
    return found


# The shipped model.py


def test_each_request_gets_its_own_verdicts(model: Any, guard: lance_edge.Pipeline) -> None:
    asked = [["hello"], ["bomb", "the cake", "minor"], ["spy"]]
    responses = model.execute([request(prompts) for prompts in asked])
    assert len(responses) == len(asked)
    for prompts, response in zip(asked, responses, strict=True):
        expected = [untimed(guard.screen(prompt).to_dict()) for prompt in prompts]
        assert [untimed(verdict) for verdict in verdicts(response)] == expected
        assert response.texts("decision") == [verdict["decision"] for verdict in expected]
        assert response.texts("refined") == [""] * len(prompts)
    assert responses[1].texts("decision") == ["rewrite", "allow", "block"]


def test_prompts_of_all_requests_are_screened_together(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[str]] = []
    judge = model.guard.judge

    def counted(prompts: Sequence[Any]) -> list[lance_edge.Verdict]:
        batches.append([prompt.text for prompt in prompts])
        return judge(prompts)

    monkeypatch.setattr(model.guard, "judge", counted)
    model.execute([request(["hello"]), request([""]), request(["bomb", "cake"])])
    assert batches == [["hello", "bomb", "cake"]]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (request([""]), "prompt 0: the prompt is empty"),
        (request(["hello", " \n"]), "prompt 1: the prompt is empty"),
        (request(["a\0b"]), "prompt 0: the prompt has a NUL character"),
        (request(["hello", b"a\xff"]), "prompt 1: it is not valid UTF-8 (byte 2)"),
        (request(["hello"], ["translate"]), "prompt 0: there is no task 'translate'; choose from"),
        (request(["hello"], [b"\xff"]), "task 0: it is not valid UTF-8 (byte 1)"),
        (fake_triton.InferenceRequest([]), "the request has no input `prompt`"),
    ],
)
def test_a_bad_request_fails_alone(model: Any, bad: Any, said: str) -> None:
    before, failed, after = model.execute([request(["bomb"]), bad, request(["hello"])])
    assert failed.error.message.startswith(said)
    assert (failed.error.code, failed.output_tensors) == (INVALID, [])
    assert (before.texts("decision"), after.texts("decision")) == (["rewrite"], ["allow"])


def test_a_request_may_choose_its_task(
    model: Any, guard: lance_edge.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rewrite(refiner: Refiner, reading: Reading, critique: str) -> Rewrite:
        ids = tuple(refiner.tokenizer.encode("the cake"))
        return Rewrite(ids, "the cake", True, -1.0, 1, 0, 0, 0.5)

    monkeypatch.setattr(Refiner, "rewrite", rewrite)
    tasks = ["refine", "screen", "refine"]
    screened, mixed = model.execute(
        [request(["bomb"]), request(["the bomb", "the bomb", "hello"], tasks)]
    )
    assert (screened.texts("decision"), screened.texts("refined")) == (["rewrite"], [""])
    assert mixed.texts("refined") == ["the cake", "", ""]
    assert [untimed(verdict) for verdict in verdicts(mixed)] == [
        untimed(found.to_dict())
        for found in (guard.refine("the bomb"), guard.screen("the bomb"), guard.refine("hello"))
    ]


def test_screening_does_not_load_the_refiner(model: Any) -> None:
    model.execute([request(["hello", "bomb"])])
    assert model.guard._refiner is None


def test_the_model_refiner_refines_unless_told_otherwise(
    repository: Path, guard: lance_edge.Pipeline
) -> None:
    model = fake_triton.start(repository, "refiner", task="refine", device="cpu")
    assert model.guard._refiner is not None  # loaded before the first request
    (response,) = model.execute([request(["bomb", "hello"])])
    expected = [untimed(guard.refine(prompt).to_dict()) for prompt in ("bomb", "hello")]
    assert expected[0]["steps"], "the network wrote nothing"
    assert [untimed(verdict) for verdict in verdicts(response)] == expected
    model.finalize()
    with pytest.raises(SessionError, match="closed"):
        model.guard.screen("hello")


def test_a_graph_that_fails_is_an_error_of_its_task_alone(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(prompts: Sequence[Any]) -> list[lance_edge.Verdict]:
        raise SessionError("out of memory")

    monkeypatch.setattr(model.guard, "repair", fail)
    screened, refined = model.execute([request(["bomb"]), request(["bomb"], ["refine"])])
    assert screened.texts("decision") == ["rewrite"]
    assert (refined.error.message, refined.error.code) == ("out of memory", INTERNAL)


def copied(repository: Path, target: Path) -> Path:
    """A repository with `pipeline` alone, of the test's own."""
    version = target / "pipeline" / "1"
    (version / "bundle").mkdir(parents=True)
    original = repository / "pipeline" / "1"
    for path in (original / "model.py", *(original / "bundle").iterdir()):
        (version / path.relative_to(original)).write_bytes(path.read_bytes())
    return target


def test_a_policy_beside_the_bundle_counts(repository: Path, tmp_path: Path) -> None:
    own = copied(repository, tmp_path / "models")
    policy = own / "pipeline" / "1" / "policy.json"
    policy.write_text('{"actions": {"violence": "block"}}', encoding="utf-8")
    model = fake_triton.start(own, "pipeline", task="screen", device="cpu")
    (response,) = model.execute([request(["bomb"])])
    assert response.texts("decision") == ["block"]
    policy.write_text("[1]", encoding="utf-8")
    with pytest.raises(lance_edge.InvalidOption, match=r"policy\.json must hold an object"):
        fake_triton.start(own, "pipeline", task="screen", device="cpu")


def test_a_model_with_a_damaged_bundle_or_wrong_task_does_not_start(
    repository: Path, tmp_path: Path
) -> None:
    own = copied(repository, tmp_path / "models")
    with pytest.raises(ValueError, match="there is no task 'sing'"):
        fake_triton.start(own, "pipeline", task="sing", device="cpu")
    (own / "pipeline" / "1" / "bundle" / "screener.onnx").write_bytes(b"other")
    with pytest.raises(lance_edge.BundleCorrupt, match=r"screener\.onnx"):
        fake_triton.start(own, "pipeline", task="screen", device="cpu")


def test_without_weights_refining_is_an_error_of_that_request(
    repository: Path, tmp_path: Path
) -> None:
    out = tmp_path / "models"
    bundle = repository / "pipeline" / "1" / "bundle"
    options = ["--format", "triton", "--without-weights", "--out", str(out)]
    done = CliRunner().invoke(cli.app, ["pack", str(bundle), *options])
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["pipeline", "screener"]
    model = fake_triton.start(out, "pipeline", task="screen", device="cpu")
    screened, refused = model.execute([request(["bomb"]), request(["bomb"], ["refine"])])
    assert screened.texts("decision") == ["rewrite"]
    assert "run `lance-edge pull` once" in refused.error.message


# The configurations


def parse(text: str) -> Any:
    """As Triton reads it: unknown names and wrong types are errors."""
    schema = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2",
        reason="tritonclient is not installed (tritonclient[grpc], in the dev extra)",
    )
    from google.protobuf import text_format

    return text_format.Parse(text, schema.ModelConfig())


def dims(tensors: Any) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in tensors}


def test_the_schema_refuses_what_is_not_in_it() -> None:
    text_format = pytest.importorskip("google.protobuf.text_format", reason="no protobuf")
    with pytest.raises(text_format.ParseError, match="no field named"):
        parse(guard_config("pipeline", "screen") + "max_batch: 3")


@pytest.mark.parametrize("name", ["tiny", "default"])
def test_the_screeners_configuration_fits_its_graph(
    name: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(tiny_bundle if name == "tiny" else default_bundle())
    write_screener(bundle, tmp_path / "screener")
    config = parse((tmp_path / "screener" / "config.pbtxt").read_text(encoding="utf-8"))
    assert (config.name, config.backend) == ("screener", "onnxruntime")
    graph = (tmp_path / "screener" / "1" / "model.onnx").read_bytes()
    assert graph == bundle.read("screener.onnx")
    session = open_session(graph, "cpu")
    for tensors, specs in ((config.input, session.inputs), (config.output, session.outputs)):
        assert all(spec.shape[0] is None for spec in specs)  # Triton's batch
        assert dims(tensors) == {spec.name: [n or -1 for n in spec.shape[1:]] for spec in specs}
    assert dims(config.output)["mean"] == [len(bundle.categories)]
    types = {tensor.name: tensor.data_type for tensor in (*config.input, *config.output)}
    kinds = type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name
    assert types["ids"] == types["mask"] == kinds["TYPE_INT64"].number
    assert types["mean"] == types["contributions"] == kinds["TYPE_FP32"].number
    assert config.HasField("dynamic_batching")
    assert config.max_batch_size * bundle.manifest.screener.window <= 1024
    session.close()


def test_a_window_longer_than_a_run_still_makes_a_batch() -> None:
    import numpy as np

    spec = TensorSpec("ids", np.dtype(np.int64), (None, None))
    assert parse(screener_config(4096, [spec], [spec])).max_batch_size == 1


@pytest.mark.parametrize(("name", "task"), [("pipeline", "screen"), ("refiner", "refine")])
def test_the_configuration_of_verdicts(repository: Path, name: str, task: str) -> None:
    config = parse((repository / name / "config.pbtxt").read_text(encoding="utf-8"))
    assert (config.name, config.backend) == (name, "python")
    assert dims(config.input) == {"prompt": [1], "task": [1]}
    assert {tensor.name: tensor.optional for tensor in config.input} == {
        "prompt": False,
        "task": True,
    }
    assert dims(config.output) == {"verdict": [1], "decision": [1], "refined": [1]}
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters == {"task": task, "device": "auto"}
    assert config.HasField("dynamic_batching") == (task == "screen")
    (group,) = config.instance_group
    assert group.count == 1
    fake_triton.start(repository, name, **parameters).finalize()  # all that it asks for is there


def test_a_bundle_without_a_refiner_has_no_model_for_it(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    done = CliRunner().invoke(
        cli.app, ["pack", str(tiny_bundle), "--format", "triton", "--out", str(out)]
    )
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["pipeline", "screener"]
    model = fake_triton.start(out, "pipeline", task="screen", device="cpu")
    (refused,) = model.execute([request(["bomb"], ["refine"])])
    assert "has no refiner" in refused.error.message
    assert tiny.CATEGORIES[0] in model.execute([request(["bomb"])])[0].texts("verdict")[0]

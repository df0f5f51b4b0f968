"""From a checkpoint to a bundle: every stage computes what the one before does."""

# ruff: noqa: E402 - what follows importorskip must not be imported without torch

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch", reason="needs torch (the export extra)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the export extra)")
pytest.importorskip("onnxscript", reason="needs onnxscript (the export extra)")

import onnx
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import lance_edge
from lance_edge.bundle import CloseReading, ScreenerSpec, open_bundle
from lance_edge.errors import ParityError
from lance_edge.screener import FloatArray, pad
from lance_edge.tokenizer import Tokenizer
from lance_edge.verify import check_goldens
from lance_edge_engines import open_session
from lance_edge_export import cli as export
from lance_edge_export import pack
from lance_edge_export import screener as flow
from lance_edge_export.graph import PRODUCT
from lance_edge_export.optimise import merge_projections
from lance_edge_export.parity import BOUNDS, Bounds, Parity, compare, gate
from lance_edge_export.quantise import (
    Scheme,
    choose_scheme,
    column_scales,
    int8_products,
    one_scale,
    quantise_columns,
    quantise_table,
    round_for_output,
)
from lance_edge_export.to_onnx import export_screener
from lance_edge_training.checkpoint import load_screener, new_screener, save_screener
from lance_edge_training.model import Screener, Served

pytestmark = pytest.mark.train

OUTPUTS = ("mean", "deviation", "contributions")
THRESHOLDS = {"violence": 0.3, "privacy": 0.6, "child": 0.85}

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained, calibrated checkpoint, wide enough for int8 layers; tests must not change it."""
    encoder, folder = (tmp_path_factory.mktemp(name) for name in ("encoder", "checkpoint"))
    words = tiny.tokenizer()
    config = transformers.BertConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    torch.manual_seed(0)
    made = transformers.BertModel(config, add_pooling_layer=False)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):  # zero in a fresh model, where mixed-up biases would not show
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(encoder)
    words.save(str(encoder / "tokenizer.json"))
    screener = new_screener(encoder, 3, "variational")
    with torch.no_grad():
        screener.head.mean.weight *= 4  # so that severities differ from prompt to prompt
        screener.head.mean.bias[:] = -1.0
    taxonomy = [{"name": n, "title": n.title(), "action": "rewrite"} for n in tiny.CATEGORIES]
    description = {"window": 16, "overlap": 4, "provenance": {"sources": ["own"]}}
    save_screener(screener, folder, encoder / "tokenizer.json", taxonomy, description)
    calibration = {
        name: {"slope": 1.0 + 0.1 * n, "intercept": 0.1 * n, "threshold": THRESHOLDS[name]}
        for n, name in enumerate(tiny.CATEGORIES)
    }
    (folder / "calibration.json").write_text(json.dumps(calibration))
    return folder


@pytest.fixture(scope="module")
def screener(checkpoint: Path) -> Screener:
    return load_screener(checkpoint)[0]


@pytest.fixture(scope="module")
def fp32(screener: Screener) -> onnx.ModelProto:
    return export_screener(Served(screener))


@pytest.fixture(scope="module")
def int8(fp32: onnx.ModelProto) -> onnx.ModelProto:
    return int8_products(merge_projections(fp32))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 prompts of 1 to 60 words, as JSON lines."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rng = random.Random(0)
    texts = [" ".join(rng.choices(list(tiny.WORDS), k=rng.randint(1, 60))) for _ in range(200)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module", params=["fp32", "int8"])
def exported(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The bundle that the command writes at each precision, from the checkpoint to the end."""
    out = tmp_path_factory.mktemp("exported") / request.param
    result = run(checkpoint, prompts, out, "--precision", request.param, "--encoder", "random")
    assert result.exit_code == 0, result.output
    return out


# The command


def test_the_bundle_says_what_it_is(exported: Path) -> None:
    bundle = open_bundle(exported)
    manifest = bundle.manifest
    assert manifest.screener.precision == exported.name
    assert (manifest.screener.window, manifest.screener.overlap) == (16, 4)
    assert tuple(category.name for category in bundle.categories) == tiny.CATEGORIES
    assert {n: c.threshold for n, c in bundle.calibration.items()} == THRESHOLDS
    assert list(manifest.parity) == (["fp32"] if exported.name == "fp32" else ["fp32", "int8"])
    assert manifest.parity[exported.name]["prompts"] == 200
    assert manifest.provenance["encoder"] == "random"
    assert set(bundle.verify()) == {path.name for path in exported.iterdir()} - {"manifest.json"}


def test_close_reading_is_written_into_the_bundle(
    checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    options = ("--precision", "fp32", "--close-reading")
    result = run(checkpoint, prompts, tmp_path / "close", *options)
    assert result.exit_code == 0, result.output
    assert open_bundle(tmp_path / "close").manifest.screener.close == CloseReading(8, 2)


def test_the_bundle_reproduces_its_goldens(exported: Path) -> None:
    with lance_edge.load(exported, device="cpu") as pipeline:
        check = check_goldens(pipeline)
    assert check.passed
    assert check.prompts > 8  # of the first 16 prompts, those not close to a threshold


def test_the_bundle_gives_the_checkpoints_severities(
    exported: Path, checkpoint: Path, prompts: Path
) -> None:
    # int8 rounds activations to 1 of 255 levels and weights to 1 of 127, in four layers.
    tolerance = {"fp32": 1e-5, "int8": 0.02}[exported.name]
    texts = texts_of(prompts)
    with lance_edge.load(exported, device="cpu") as pipeline:
        found = [list(verdict.severity.values()) for verdict in pipeline.screen_many(texts)]
    np.testing.assert_allclose(found, severities_of(checkpoint, texts), atol=tolerance)


def test_a_verdict_does_not_depend_on_its_batch(exported: Path, prompts: Path) -> None:
    tolerance = {"fp32": 1e-5, "int8": 1e-4}[exported.name]  # the design's invariant
    texts = texts_of(prompts)[:60]
    with lance_edge.load(exported, device="cpu") as pipeline:
        together = pipeline.screen_many(texts)
        alone = [pipeline.screen(text) for text in texts]
    for one, other in zip(alone, together, strict=True):
        assert one.severity == pytest.approx(other.severity, abs=tolerance, rel=0)


def test_the_bundles_graph_is_smaller_in_int8(fp32: onnx.ModelProto, int8: onnx.ModelProto) -> None:
    kinds = Counter(node.op_type for node in int8.graph.node)
    assert kinds[PRODUCT] == 4  # in each layer: query, key and value; and the wide one
    assert weight_bytes(int8) < 0.6 * weight_bytes(fp32)


def test_without_calibration_nothing_is_exported(
    checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "calibration.json").unlink()
    result = run(bare, prompts, tmp_path / "out")
    assert result.exit_code == 3
    wanted = "has no calibration.json; run `python -m lance_edge_training.calibrate`"
    assert wanted in plain_text(result)
    assert not (tmp_path / "out").exists()


def test_an_unknown_precision_is_refused(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    result = run(checkpoint, prompts, tmp_path / "out", "--precision", "int4")
    assert result.exit_code == 2
    assert "'int4' is not one of 'fp32', 'fp16', 'int8'" in plain_text(result)


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_stage_out_of_bounds_writes_nothing(
    checkpoint: Path,
    prompts: Path,
    fp32: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: Any,
    existing: bool,
) -> None:
    monkeypatch.setattr(flow, "export_screener", lambda *_: fp32)
    monkeypatch.setitem(BOUNDS, "int8", Bounds(1e-9, 1e-9, 0.0))
    out = tmp_path / "out"
    if existing:
        tiny.write_bundle(out)
    before = contents(tmp_path)
    result = run(checkpoint, prompts, out)
    assert result.exit_code == 3
    assert "int8: largest difference is" in plain_text(result)
    assert contents(tmp_path) == before


def test_the_order_of_the_calibration_does_not_matter(
    checkpoint: Path, prompts: Path, fp32: onnx.ModelProto, tmp_path: Path, monkeypatch: Any
) -> None:
    """The taxonomy orders the graph's outputs; calibration.json is read by name."""
    monkeypatch.setattr(flow, "export_screener", lambda *_: fp32)
    compared: list[list[float]] = []

    def recorded(before: FloatArray, after: FloatArray, thresholds: FloatArray) -> Parity:
        compared.append(thresholds.tolist())
        return compare(before, after, thresholds)

    monkeypatch.setattr(flow, "compare", recorded)
    shuffled = shutil.copytree(checkpoint, tmp_path / "shuffled")
    values = json.loads((shuffled / "calibration.json").read_text())
    (shuffled / "calibration.json").write_text(json.dumps(dict(reversed(values.items()))))
    assert run(shuffled, prompts, tmp_path / "out").exit_code == 0
    assert compared == [list(THRESHOLDS.values())] * 2


def test_golden_prompts_can_be_given(
    checkpoint: Path, prompts: Path, fp32: onnx.ModelProto, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(flow, "export_screener", lambda *_: fp32)
    (tmp_path / "golden.txt").write_text("hello the cake\nthe minor\n")
    out = tmp_path / "out"
    run(checkpoint, prompts, out, "--golden-prompts", tmp_path / "golden.txt")
    goldens = json.loads((out / "goldens.json").read_text())
    assert [golden["prompt"] for golden in goldens] == ["hello the cake", "the minor"]


def test_the_card_admits_an_encoder_that_was_not_recorded(
    checkpoint: Path, prompts: Path, fp32: onnx.ModelProto, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(flow, "export_screener", lambda *_: fp32)
    assert run(checkpoint, prompts, tmp_path / "out").exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Training data: own." in card
    assert "Encoder: not recorded." in card


def test_a_file_without_prompts_is_refused(
    checkpoint: Path, fp32: onnx.ModelProto, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(flow, "export_screener", lambda *_: fp32)
    (tmp_path / "none.jsonl").write_text("")
    result = run(checkpoint, tmp_path / "none.jsonl", tmp_path / "out")
    assert result.exit_code == 3
    assert "none.jsonl" in plain_text(result)


# torch to ONNX


@pytest.mark.parametrize(("rows", "tokens"), [(1, 3), (1, 8), (2, 12), (5, 16), (17, 40), (3, 512)])
def test_the_fp32_graph_computes_what_torch_does(
    screener: Screener, fp32: onnx.ModelProto, rows: int, tokens: int
) -> None:
    inputs = random_inputs(rows, tokens)
    with torch.inference_mode():
        reading = screener(*(torch.from_numpy(inputs[name]) for name in ("ids", "mask")))
    labels = reading.labels
    expected = (labels.mean, labels.deviation, reading.contributions)
    for found, value in zip(outputs(fp32, inputs), expected, strict=True):
        np.testing.assert_allclose(found, value.numpy(), atol=1e-5)


def test_the_graph_holds_no_paths_of_the_exporting_machine(fp32: onnx.ModelProto) -> None:
    text = fp32.SerializeToString()
    assert b".py" not in text
    assert str(Path(__file__).parents[2]).encode() not in text


def test_merged_projections_compute_the_same_with_fewer_matmuls(fp32: onnx.ModelProto) -> None:
    merged = merge_projections(fp32)
    inputs = random_inputs(5, 16)
    for found, value in zip(outputs(merged, inputs), outputs(fp32, inputs), strict=True):
        np.testing.assert_allclose(found, value, atol=1e-6)
    before, after = (Counter(n.op_type for n in model.graph.node) for model in (fp32, merged))
    assert after["MatMul"] == before["MatMul"] - 4  # query, key and value of two layers
    assert after["Split"] == before["Split"] + 2


def test_merging_leaves_its_input_as_it_was(fp32: onnx.ModelProto) -> None:
    before = fp32.SerializeToString(deterministic=True)
    int8_products(merge_projections(fp32))
    assert fp32.SerializeToString(deterministic=True) == before


def test_layers_of_different_inputs_are_not_merged() -> None:
    """Two linear layers in a row: each reads another tensor."""
    rng = np.random.default_rng(0)
    constants = {
        "W": rng.normal(size=(8, 8)).astype(np.float32),
        "b": rng.normal(size=8).astype(np.float32),
    }
    nodes = [
        ("MatMul", "x W", "p"),
        ("Add", "p b", "q"),
        ("MatMul", "q W", "r"),
        ("Add", "r b", "y"),
    ]
    model = graph_of(nodes, constants, width=8)
    assert merge_projections(model).graph.node == model.graph.node


# int8


def test_quantised_columns_are_within_half_a_step() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(48, 64)) * 10.0 ** rng.uniform(-3, 2, 64)).astype(np.float32)
    integers, scales = quantise_columns(weight)
    assert (integers.dtype, integers.shape, scales.shape) == (np.int8, (48, 64), (64,))
    sums = np.abs(integers.astype(int)).reshape(24, 2, 64).sum(1)  # of neighbouring weights
    assert sums.max() <= 128
    assert (sums.max(0) >= 126).all()  # each column uses its range
    error = np.abs(integers * scales.astype(np.float64) - weight)
    assert (error <= scales * 0.5 * (1 + 1e-5)).all()


def test_quantised_tables_are_within_half_a_step() -> None:
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(30, 32)) * 10.0 ** rng.uniform(-3, 2, (30, 1))).astype(np.float32)
    integers, scales = quantise_table(table)
    assert (integers.dtype, integers.shape, scales.shape) == (np.int8, (30, 32), (30, 1))
    assert np.abs(integers.astype(int)).max(1).tolist() == [127] * 30  # each row uses its range
    error = np.abs(integers * scales.astype(np.float64) - table)
    assert (error <= scales * 0.5 * (1 + 1e-5)).all()


def test_columns_and_rows_of_zeros_stay_zero() -> None:
    for quantise in (quantise_columns, quantise_table):
        integers, scales = quantise(np.zeros((4, 64), dtype=np.float32))
        assert not integers.any()
        assert (scales > 0).all()


def test_neighbouring_products_fit_in_16_bits() -> None:
    """CPUs without VNNI add pairs of products there: 255 * 128 fits, also after GPTQ's rounding."""
    rows = np.random.default_rng(1).normal(size=(200, 48))
    for seed in range(5):
        weight = random_weight(48, 64, seed).astype(np.float64) ** 3  # some stand out
        for integers, _ in (quantise_columns(weight), round_for_output(weight, rows)):
            sizes = np.abs(integers.astype(int))
            assert (sizes[0::2] + sizes[1::2]).max() <= 128


def test_rounding_for_the_output_is_closer_than_rounding_each_weight() -> None:
    rng = np.random.default_rng(2)
    weight = random_weight(48, 64).astype(np.float64)
    rows = rng.normal(size=(400, 48)) @ rng.normal(size=(48, 48))  # correlated, as activations are
    moved = [
        np.square(rows @ (integers * scales - weight)).sum()
        for integers, scales in (round_for_output(weight, rows), quantise_columns(weight))
    ]
    assert moved[0] < 0.8 * moved[1]


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_accumulations_are_exact(rows: int) -> None:
    model = int8_products(linear(random_weight(384, 64)))
    x = np.random.default_rng(1).normal(size=(rows, 384)).astype(np.float32)
    assert_exact(model, x)


def test_the_largest_accumulations_are_exact() -> None:
    """All products of one sign and of the largest size: pairs that saturate would show."""
    model = int8_products(linear(np.ones((384, 64), dtype=np.float32)))
    assert_exact(model, np.stack([np.full(384, 2.5), np.full(384, -2.5)]).astype(np.float32))


def test_an_int8_layer_is_close_to_its_fp32_layer() -> None:
    weight = random_weight(384, 64)
    x = np.random.default_rng(1).normal(size=(9, 384)).astype(np.float32)
    (found,) = outputs(int8_products(linear(weight)), {"x": x}, ("y",))
    # At most half a step each, 1/127 of the row's largest value and the column's scale; over the
    # 384 terms they add up like independent draws, of which twice the root of the squares is far out.
    steps_x, steps_w = np.abs(x).max(1, keepdims=True) / 127, column_scales(weight)
    error_x = 0.5 * steps_x * np.linalg.norm(weight, axis=0)
    error_w = 0.5 * steps_w * np.linalg.norm(x, axis=1, keepdims=True)
    assert (np.abs(found - x @ weight) < 2 * (error_x + error_w)).all()
    assert np.abs(found - x @ weight).max() > 0


@pytest.mark.parametrize("fixed", [False, True], ids=["a scale a row", "a fixed scale"])
@pytest.mark.parametrize("others", [0, 1, 3, 16, 100])
def test_a_rows_output_does_not_depend_on_other_rows(others: int, fixed: bool) -> None:
    """Bit for bit, even if the other rows are a thousand times larger."""
    seen = [{"x": np.random.default_rng(1).normal(size=(64, 48)).astype(np.float32)}]
    model = int8_products(linear(random_weight(48, 64)), seen if fixed else [])
    assert len(fixed_matmuls(model)) == fixed
    session = open_session(model.SerializeToString(), "cpu")
    rng = np.random.default_rng(2)
    row = rng.normal(size=(1, 48)).astype(np.float32)
    batch = np.concatenate([row, 1000 * rng.normal(size=(others, 48)).astype(np.float32)])
    assert np.array_equal(session.run({"x": batch})["y"][:1], session.run({"x": row})["y"])


def test_a_row_of_zeros_gives_zeros() -> None:
    model = int8_products(linear(random_weight(48, 64)))
    (found,) = outputs(model, {"x": np.zeros((2, 48), dtype=np.float32)}, ("y",))
    assert np.array_equal(found, np.zeros((2, 64)))


def test_a_fixed_scale_is_taken_where_it_costs_little() -> None:
    """Rows of one size share a scale well; where one row is a thousand times larger, it takes all levels."""
    rng = np.random.default_rng(3)
    weight = [random_weight(48, 64).astype(np.float64)]
    alike = rng.normal(size=(300, 48))
    assert choose_scheme(alike, weight).scale is not None
    unlike = alike * np.where(np.arange(300) % 10 == 0, 1000, 1)[:, None]
    assert choose_scheme(unlike, weight).scale is None


@pytest.mark.parametrize("low", [-3.0, 0.0, 2.0])
def test_one_scale_covers_its_share_of_the_range(low: float) -> None:
    rows = np.linspace(low, 5, 480).reshape(10, 48)
    scheme = one_scale(rows.min(0), rows.max(0), np.ones(48), 1.0)
    assert scheme.scale == pytest.approx((5 - min(low, 0)) / 255, rel=1e-6)
    assert 0 <= scheme.zero_point <= 255
    assert (
        np.abs(scheme.rounded(rows) - rows).max() <= scheme.scale
    )  # the zero point is rounded too
    half = one_scale(rows.min(0), rows.max(0), np.ones(48), 0.5)
    assert half.rounded(rows).max() == pytest.approx(2.5, rel=0.01)


def test_a_fixed_scale_computes_what_its_scheme_says() -> None:
    x = np.random.default_rng(4).normal(0.5, 1, size=(300, 47)).astype(np.float32)  # odd, for pairs
    weight = random_weight(47, 64)
    model = int8_products(linear(weight), [{"x": x}])
    (found,) = outputs(model, {"x": x}, ("y",))
    scheme = choose_scheme(x.astype(np.float64), [weight.astype(np.float64)])
    (matmul,) = fixed_matmuls(model)
    constants = constants_of(model)
    columns = constants[matmul.input[1]] * constants[matmul.input[3]].astype(np.float64)
    np.testing.assert_allclose(found, scheme.rounded(x.astype(np.float64)) @ columns, atol=0.02)
    assert 0 < np.abs(found - x @ weight).mean() < 0.015 * np.abs(x @ weight).mean()


def test_a_scheme_cuts_off_what_its_integers_do_not_reach() -> None:
    scheme = Scheme(np.ones(2), 100, 0.5)
    assert scheme.rounded(np.array([[-80.0, 100.0]])).tolist() == [[-50.0, 77.5]]


@pytest.mark.parametrize(("columns", "quantised"), [(63, 0), (64, 1)])
def test_narrow_layers_stay_in_fp32(columns: int, quantised: int) -> None:
    model = int8_products(linear(random_weight(48, columns)))
    assert len(integer_matmuls(model)) == quantised


def test_a_row_is_quantised_once_for_all_layers_that_read_it() -> None:
    constants = {"W": random_weight(48, 64), "V": random_weight(48, 64, seed=1)}
    nodes = [("MatMul", "x W", "p"), ("MatMul", "x V", "q"), ("Add", "p q", "y")]
    model = int8_products(graph_of(nodes, constants, width=48))
    kinds = Counter(node.op_type for node in model.graph.node)
    assert (kinds["QuantizeLinear"], kinds[PRODUCT]) == (1, 2)


def test_embeddings_are_looked_up_in_int8(fp32: onnx.ModelProto, int8: onnx.ModelProto) -> None:
    words = [n for n, value in constants_of(fp32).items() if value.shape == (14, 32)]
    assert len(words) == 1
    assert words[0] not in constants_of(int8)
    integers, scales = (constants_of(int8)[f"{words[0]}/{part}"] for part in ("int8", "scale"))
    table = constants_of(fp32)[words[0]]
    assert (np.abs(integers * scales - table) <= 0.51 * scales).all()


# The parity gate


def test_parity_by_hand() -> None:
    before = np.array([[0.1, 0.2], [0.6, 0.1], [0.4, 0.9], [0.5, 0.0]])
    after = np.array([[0.1, 0.2], [0.4, 0.1], [0.6, 0.9], [0.5, 0.1]])
    thresholds = np.array([0.5, 0.8])
    # The second prompt is no longer flagged; the third is flagged by another category as well.
    found = compare(before, after, thresholds)
    assert found.prompts == 4
    assert found.largest_difference == pytest.approx(0.2)
    assert found.mean_difference == pytest.approx(0.5 / 8)
    assert found.flipped_decisions == 0.25


def test_a_severity_at_its_threshold_is_flagged() -> None:
    at, below = np.array([[0.5]]), np.array([[0.49]])
    assert compare(at, below, np.array([0.5])).flipped_decisions == 1.0
    assert compare(at, at, np.array([0.5])).flipped_decisions == 0.0


@pytest.mark.parametrize(
    ("parity", "message"),
    [
        (Parity(9, 0.21, 0.0, 0.0), "int8: largest difference is 0.21 and may be 0.2"),
        (Parity(9, 0.0, 0.06, 0.0), "int8: mean difference is 0.06 and may be 0.05"),
        (Parity(9, 0.0, 0.0, 0.02), "int8: flipped decisions is 0.02 and may be 0.01"),
    ],
)
def test_the_gate_names_the_figure_out_of_bounds(parity: Parity, message: str) -> None:
    with pytest.raises(ParityError, match=f"{message}; nothing was written"):
        gate("int8", parity, Bounds(0.2, 0.05, 0.01))


def test_the_gate_lets_figures_at_their_bounds_pass() -> None:
    gate("int8", Parity(9, 0.2, 0.05, 0.01), Bounds(0.2, 0.05, 0.01))
    with pytest.raises(ParityError):
        gate("int8", Parity(9, 0.2, 0.05, 0.011), Bounds(0.2, 0.05, 0.01))


def test_the_gate_stops_a_stage_that_is_not_a_number() -> None:
    before, after = np.array([[0.1, 0.2]]), np.array([[0.1, np.nan]])
    parity = compare(before, after, np.array([0.5, 0.5]))
    with pytest.raises(ParityError):
        gate("fp32", parity, BOUNDS["fp32"])


# Packing


def test_prompts_too_close_to_a_threshold_are_no_goldens(tiny_bundle: Path) -> None:
    severity = tiny.severity_of(tiny.BIAS + 8)  # of `bomb`; the tiny bundle's tolerance is 1e-5
    for distance, kept in ((1e-6, ["hello"]), (-1e-6, ["hello"]), (1e-4, ["bomb", "hello"])):
        with lance_edge.load(tiny_bundle, thresholds={"violence": severity + distance}) as pipeline:
            goldens = pack.goldens(pipeline, ["bomb", "hello"])
        assert [golden["prompt"] for golden in goldens] == kept


def test_prompts_that_may_be_read_closely_are_no_goldens(tmp_path: Path) -> None:
    folder = tiny.write_bundle(tmp_path / "close", window=40)
    long = "hello " * 12
    with lance_edge.load(folder) as pipeline:
        assert len(pack.goldens(pipeline, ["hello", long])) == 2
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["screener"]["close"] = asdict(CloseReading(window=8, overlap=4))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with lance_edge.load(folder) as pipeline:
        assert [golden["prompt"] for golden in pack.goldens(pipeline, ["hello", long])] == ["hello"]


def test_goldens_hold_what_the_runtime_says(guard: lance_edge.Pipeline) -> None:
    (golden,) = pack.goldens(guard, ["spy"])
    assert golden["decision"] == "rewrite"
    assert golden["severity"] == pytest.approx(guard.screen("spy").severity, abs=1e-6)


def test_a_packed_bundle_stands_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "models" / "tiny"
    write(out, tiny_bundle, "1.0")
    assert list(out.parent.iterdir()) == [out]  # no .partial, no .old
    with lance_edge.load(out, device="cpu") as pipeline:
        assert pipeline.screen("bomb").flagged == ("violence",)
        assert check_goldens(pipeline).passed


def test_a_bundle_replaces_the_one_before_it(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    write(out, tiny_bundle, "1.0")
    (out / "stray").touch()
    write(out, tiny_bundle, "2.0")
    assert list(tmp_path.iterdir()) == [out]
    assert open_bundle(out).manifest.version == "2.0"
    assert not (out / "stray").exists()


@pytest.mark.parametrize("step", ["write", "assemble", "goldens", "move"])
def test_a_crash_leaves_the_old_bundle_readable(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: Any, step: str
) -> None:
    out = tmp_path / "tiny"
    write(out, tiny_bundle, "1.0")
    with monkeypatch.context() as patched:
        crash_at(step, patched)
        with pytest.raises(Crash):
            write(out, tiny_bundle, "2.0")
    assert open_bundle(out).manifest.version == "1.0"
    assert open_bundle(out).verify()
    write(out, tiny_bundle, "3.0")
    assert list(tmp_path.iterdir()) == [out]  # what the crash left behind is gone
    assert open_bundle(out).manifest.version == "3.0"


def test_what_an_earlier_crash_left_behind_is_removed(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    write(out, tiny_bundle, "1.0")
    for left in (".tiny.partial-1", ".tiny.old-1"):
        shutil.copytree(tiny_bundle, tmp_path / left)
        (tmp_path / left / "stray").touch()
    write(out, tiny_bundle, "2.0")
    assert list(tmp_path.iterdir()) == [out]
    assert not (out / "stray").exists()


class Crash(OSError):
    pass


def crash_at(step: str, patched: Any) -> None:
    def crash(*_: object, **__: object) -> None:
        raise Crash(step)

    if step == "write":
        patched.setattr(pack, "json_bytes", crash)
    elif step == "move":
        replace = Path.replace

        def crash_of_partial(path: Path, target: Path) -> Path:
            if ".partial-" in path.name:
                raise Crash(step)
            return replace(path, target)

        patched.setattr(Path, "replace", crash_of_partial)
    else:
        patched.setattr(pack, step, crash)


def write(out: Path, checkpoint: Path, version: str) -> None:
    """Pack the tiny bundle's graph, with its own files as the checkpoint's."""
    spec = ScreenerSpec("screener.onnx", "tokenizer.json", "fp32", 16, 4, 1e-5)
    graph = tiny.graph().SerializeToString()
    names = ("tokenizer.json", "taxonomy.json", "calibration.json")
    described = {name: (checkpoint / name).read_bytes() for name in names}
    pack.write_bundle(out, "tiny", version, graph, spec, described, {}, {}, ["bomb", "hello"])


def run(checkpoint: Path, prompts: Path, out: Path, *options: object) -> Any:
    given = ["--checkpoint", checkpoint, "--prompts", prompts, "--out", out, *options]
    return CliRunner().invoke(export.app, ["screener", *map(str, given)])


def plain_text(result: Any) -> str:
    """The output without the frames and line breaks that rich puts around errors."""
    return " ".join(result.output.replace("│", " ").split())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_of(prompts: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]


def severities_of(checkpoint: Path, texts: list[str]) -> FloatArray:
    """sigmoid(mean / sqrt(1 + pi deviation^2 / 8)) of torch's outputs, calibrated; of a prompt's
    windows the largest  [texts, C]"""
    screener, _ = load_screener(checkpoint)
    words = Tokenizer((checkpoint / "tokenizer.json").read_bytes(), 16, 4)
    values = json.loads((checkpoint / "calibration.json").read_text()).values()
    slope = np.array([value["slope"] for value in values])
    intercept = np.array([value["intercept"] for value in values])
    windows = [words.encode(text) for text in texts]
    inputs = pad([window for prompt in windows for window in prompt], 16)
    with torch.inference_mode():
        labels = screener(*(torch.from_numpy(inputs[name]) for name in ("ids", "mask"))).labels
    mean, deviation = labels.mean.double().numpy(), labels.deviation.double().numpy()
    spread = np.sqrt(1 + np.pi * (slope * deviation) ** 2 / 8)
    severity = 1 / (1 + np.exp(-(slope * mean + intercept) / spread))
    starts = np.cumsum([0] + [len(prompt) for prompt in windows[:-1]])
    largest: FloatArray = np.maximum.reduceat(severity, starts)
    return largest


def random_inputs(rows: int, tokens: int) -> Arrays:
    """Rows of different lengths; the first fills its width."""
    rng = np.random.default_rng(rows * tokens)
    ids = rng.integers(4, 14, (rows, tokens))
    lengths = np.append(tokens, rng.integers(1, tokens + 1, rows - 1))
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    return {"ids": ids * mask, "mask": mask}


def outputs(model: onnx.ModelProto, inputs: Arrays, names: Any = OUTPUTS) -> list[Any]:
    values = open_session(model.SerializeToString(), "cpu").run(inputs)
    return [values[name] for name in names]


def random_weight(rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def linear(weight: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """x [rows, K] -> y = x W [rows, N]"""
    return graph_of([("MatMul", "x W", "y")], {"W": weight}, width=len(weight))


def graph_of(nodes: list[tuple[str, str, str]], constants: Arrays, width: int) -> onnx.ModelProto:
    """A graph from x [rows, width] to y."""
    made = helper.make_graph(
        [helper.make_node(op, inputs.split(), [output]) for op, inputs, output in nodes],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", None])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def integer_matmuls(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == PRODUCT]


def fixed_matmuls(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Those whose input has one scale for all rows."""
    return [node for node in integer_matmuls(model) if node.input[2] != "int8/one"]


def constants_of(model: onnx.ModelProto) -> Arrays:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def weight_bytes(model: onnx.ModelProto) -> int:
    return sum(value.nbytes for value in constants_of(model).values())


def assert_exact(model: onnx.ModelProto, x: np.ndarray[Any, Any]) -> None:
    """The graph's integers are numpy's: its quantised input, less the zero point, times the weights.

    Their scale is 1 before the columns' scales come, so the sums can be read back.
    """
    (matmul,) = integer_matmuls(model)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    constants = constants_of(model)
    ones = np.ones_like(constants[matmul.input[3]])
    for tensor in watched.graph.initializer:
        if tensor.name == matmul.input[3]:
            tensor.CopyFrom(numpy_helper.from_array(ones, tensor.name))
    kinds = {matmul.input[0]: TensorProto.UINT8, matmul.output[0]: TensorProto.FLOAT}
    for name, kind in kinds.items():
        watched.graph.output.append(helper.make_tensor_value_info(name, kind, ["rows", None]))
    quantised, found = outputs(watched, {"x": x}, (matmul.input[0], matmul.output[0]))
    weight = constants[matmul.input[1]].astype(np.int64)
    assert np.array_equal(found, (quantised.astype(np.int64) - 128) @ weight)

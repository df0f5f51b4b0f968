"""Products in 8 bits with fixed scales: close to fp32, in the form that TensorRT's parsers read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from small_network import run, small_network
from typer.testing import CliRunner

import lance_edge
from lance_edge.bundle import open_bundle
from lance_edge.cli import app
from lance_edge.errors import ExportError, ParityError
from lance_edge_export import plan_graphs
from lance_edge_export.parity import Bounds
from lance_edge_export.plan_graphs import EightBits, write_graph
from lance_edge_export.qdq import (
    EIGHT_BIT,
    EightBit,
    eight_bit_products,
    fixed_scheme,
    narrow_columns,
    narrowed,
)

IDS = np.arange(40)
FORMS = pytest.mark.parametrize("form", EIGHT_BIT)


def lost(model: onnx.ModelProto) -> float:
    """The largest error of the small network's output, relative to its largest value."""
    exact = run(small_network(), IDS)
    return float(np.abs(run(model, IDS) - exact).max() / np.abs(exact).max())


@FORMS
def test_a_network_in_8_bits_stays_close(form: EightBit) -> None:
    narrow = eight_bit_products(small_network(), [{"ids": IDS}], form)
    assert 1e-4 < lost(narrow) < 0.12  # fp8 has 4 significant bits
    kinds = [node.op_type for node in narrow.graph.node]
    assert kinds.count("QuantizeLinear") == 2  # the inputs of the two wide layers
    assert kinds.count("DequantizeLinear") == 4  # and their weights
    stored = {item.name: item.data_type for item in narrow.graph.initializer}
    wanted = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}[form]
    assert stored["wide/weight"] == stored["narrow/weight"] == wanted
    assert "up" not in stored and "down" not in stored
    assert stored["table/narrow"] == onnx.TensorProto.FLOAT16
    assert stored["head"] == onnx.TensorProto.FLOAT


@FORMS
def test_a_layer_may_stay_fp16(form: EightBit) -> None:
    feeds = [{"ids": IDS}]
    kept = eight_bit_products(small_network(), feeds, form, ["wide"])
    stored = {item.name: item.data_type for item in kept.graph.initializer}
    assert stored["up/narrow"] == onnx.TensorProto.FLOAT16
    assert "wide/weight" not in stored and "narrow/weight" in stored
    all_kept = eight_bit_products(small_network(), feeds, form, ["wide", "narrow"])
    assert not any(node.op_type == "QuantizeLinear" for node in all_kept.graph.node)
    assert lost(all_kept) < lost(eight_bit_products(small_network(), feeds, form)) / 10
    with pytest.raises(ExportError, match=r"no layer 'odd' to keep; there are wide, narrow"):
        eight_bit_products(small_network(), feeds, form, ["odd"])


def test_a_channel_that_stands_out_is_balanced() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 16)).astype(np.float32)
    rows[:, 3] *= 100
    weight = rng.standard_normal((16, 8)).astype(np.float32)
    scheme = fixed_scheme(rows, [weight], "int8")
    assert scheme.balance[3] > 3 * np.median(scheme.balance)
    exact = rows @ weight

    def error(balance: Any, scale: Any) -> float:
        inputs = narrowed(rows / balance, scale, "int8").astype(np.float32) * scale
        stored, scales = narrow_columns(weight * balance[:, None], "int8")
        return float(np.square(exact - inputs @ (stored.astype(np.float32) * scales)).mean())

    plain = error(np.ones(16, np.float32), np.abs(rows).max() / 127)
    assert error(scheme.balance, scheme.scale) < plain / 3


@FORMS
def test_the_largest_input_is_not_cut_off(form: EightBit) -> None:
    rows = np.random.default_rng(1).uniform(-1, 1, (2000, 4)).astype(np.float32)
    rows[7, 2] = -5.0
    scheme = fixed_scheme(rows, [np.eye(4, dtype=np.float32)], form)
    inputs = rows / scheme.balance
    back = narrowed(inputs, scheme.scale, form).astype(np.float32) * scheme.scale
    assert back[7, 2] == pytest.approx(inputs[7, 2], rel=0.01)


@FORMS
def test_columns_have_their_own_scales_and_zeros_stay_zeros(form: EightBit) -> None:
    weight = np.array([[0.5, 300.0, 0.0], [-1.0, 100.0, 0.0]], np.float32)
    stored, scales = narrow_columns(weight, form)
    assert stored.dtype == (np.int8 if form == "int8" else ml_dtypes.float8_e4m3fn)
    assert (scales == scales.astype(np.float16)).all()
    back = stored.astype(np.float32) * scales
    assert np.abs(back - weight).max(0) == pytest.approx([0, 0, 0], abs=300 / 16)
    assert (back[:, 2] == 0).all()
    assert np.abs(back[:, 0] - weight[:, 0]).max() < 1 / 16


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [golden.prompt for golden in open_bundle(lance_edge.default_bundle()).goldens()]


@FORMS
def test_the_default_screener_in_8_bits(form: EightBit, prompts: list[str], tmp_path: Path) -> None:
    bundle = open_bundle(lance_edge.default_bundle())
    graph = write_graph(bundle, "screener", form, tmp_path, EightBits(prompts))
    assert graph.parity is not None
    assert graph.parity.flipped_decisions == 0
    assert 1e-4 < graph.parity.largest_difference < 0.15
    kinds = [node.op_type for node in onnx.load(graph.path).graph.node]
    assert kinds.count("QuantizeLinear") == 24  # four products' inputs in each of six layers
    assert len(graph.parity.worst_layers) == 5
    assert graph.path.stat().st_size < 36e6  # products in 8 bits, tables in fp16


def test_others_judge_the_scales_than_those_they_were_chosen_on(
    prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_graphs, "CALIBRATION_PROMPTS", 10)
    monkeypatch.setattr(plan_graphs, "FIXED_SCALES", Bounds(1.0, 1.0, 1.0))  # 10 are too few
    bundle = open_bundle(lance_edge.default_bundle())
    graph = write_graph(bundle, "screener", "int8", tmp_path, EightBits(prompts))
    assert graph.parity is not None and graph.parity.prompts == len(prompts) - 10


def test_8_bits_that_change_too_much_fail(
    prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_graphs, "FIXED_SCALES", Bounds(1e-6, 1e-6, 0.0))
    bundle = open_bundle(lance_edge.default_bundle())
    with pytest.raises(ParityError, match=r"int8: largest difference is .* --keep-fp16 LAYER"):
        write_graph(bundle, "screener", "int8", tmp_path, EightBits(prompts[:4]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "contents", "message"),
    [
        (("--precision", "fp16"), '{"prompt": "hello"}', "are for --precision int8 and fp8"),
        (("--precision", "int8"), "", "holds no prompts"),
        (("--precision", "int8"), '{"prompt": "hello"}\n{"text": 1}', r":2: .*prompt"),
        (("--precision", "fp8"), None, "is not a file"),
    ],
)
def test_wrong_calibration_files_are_wrong_usage(
    options: tuple[str, ...], contents: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    if contents is not None:
        path.write_text(contents, encoding="utf-8")
    arguments = ["plan", "--runtime", "rtx", "--out", str(tmp_path / "plans"), *options]
    result = CliRunner().invoke(app, [*arguments, "--calibration", str(path)])
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "plans").exists()


def test_prompts_that_came_with_the_package_are_the_default() -> None:
    from lance_edge_export.plan_cli import PROMPTS, read_calibration

    wanted = read_calibration("int8", None, ["x"])
    assert wanted is not None
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    assert list(wanted.prompts) == [json.loads(line)["prompt"] for line in lines]
    assert wanted.keep_fp16 == ("x",)

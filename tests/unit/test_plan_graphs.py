"""The graphs that plans are built from: what they compute is what the bundle's graphs compute."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import tiny_refiner
from onnx import TensorProto, helper, numpy_helper
from small_network import run, small_network
from tiny_refiner import SHAPE

import lance_edge
from lance_edge.bundle import open_bundle
from lance_edge.decoder import Cache, Decoder
from lance_edge.draft import LONGEST
from lance_edge.errors import ExportError
from lance_edge.screener import Screener
from lance_edge.tokenizer import Tokenizer
from lance_edge.verify import own_rounding
from lance_edge.weights import Array, Precision, make_weights
from lance_edge_engines import open_session
from lance_edge_export.decoder_graph import decoder_graph
from lance_edge_export.float_screener import float_products, float_screener
from lance_edge_export.plain_decoder import (
    PlainPrecision,
    plain_decoder_graph,
    plain_layout,
    plain_weights,
)
from lance_edge_export.plan_graphs import (
    longest_step,
    refiner_profiles,
    refiner_spec,
    screener_profiles,
    write_refiner,
)
from lance_edge_export.quantise import int8_products

CATEGORIES = len(tiny.CATEGORIES)
NAMES = [f"{kind}.{layer}" for layer in range(SHAPE.layers) for kind in ("key", "value")]

# The screener


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("balanced", [False, True], ids=["no feeds", "balanced"])
def test_integers_become_the_weights_they_stand_for(balanced: bool) -> None:
    before, ids = small_network(), np.arange(40)
    quantised = int8_products(before, [{"ids": ids}] if balanced else [])
    assert ("ReduceMax" in kinds(quantised)) != balanced  # each row's own scale
    floats = float_products(quantised)
    assert kinds(floats) == kinds(before)
    assert [known.domain for known in floats.opset_import] == [""]
    scale = np.abs(run(before, ids)).max()
    lost = np.abs(run(quantised, ids) - run(before, ids)).max() / scale
    left = np.abs(run(floats, ids) - run(before, ids)).max() / scale
    # What is left is the rounding of the weights; that of the activations is gone.
    assert 0 < left < lost < 0.1


def test_a_float_graph_passes_through() -> None:
    before, ids = small_network(), np.arange(40)
    floats = float_screener(before, "fp32")
    assert kinds(floats) - kinds(before) == {"Erf", "Mul"}  # in place of Gelu
    assert np.abs(run(floats, ids) - run(before, ids)).max() < 1e-5


def test_fp16_holds_weights_and_tables_but_not_heads() -> None:
    ids = np.arange(40)
    half = float_screener(small_network(), "fp16")
    types = {item.name: item.data_type for item in half.graph.initializer}
    narrow = {name for name, kind in types.items() if kind == TensorProto.FLOAT16}
    assert narrow == {"table/narrow", "up/narrow", "down/narrow"}
    exact = run(small_network(), ids)
    lost = np.abs(run(half, ids) - exact).max() / np.abs(exact).max()
    assert 0 < lost < 2e-3


def test_a_constant_of_an_unknown_type_is_refused() -> None:
    model = tiny.graph()
    model.graph.initializer[0].data_type = 77
    with pytest.raises(ExportError, match=r"the graph's 'table' cannot be read \(77\)"):
        float_screener(model, "fp32")


def test_unknown_integers_are_refused() -> None:
    model = small_network()
    nodes = model.graph.node
    at = next(index for index, node in enumerate(nodes) if node.output[0] == "wide")
    nodes[at].CopyFrom(helper.make_node("Cast", ["integers"], ["wide"], to=TensorProto.FLOAT))
    nodes.insert(at, helper.make_node("MatMulInteger", ["q", "up8", "qz"], ["integers"]))
    nodes.insert(at, helper.make_node("DynamicQuantizeLinear", ["normed"], ["q", "qs", "qz"]))
    up = np.ones((64, 128), np.uint8)
    model.graph.initializer.append(numpy_helper.from_array(up, "up8"))
    with pytest.raises(
        ExportError, match="MatMulInteger in a form that this version does not know"
    ):
        float_products(model)


@pytest.fixture(scope="module")
def severities() -> Any:
    """What the default bundle's screener, or a form of it, says of the golden prompts."""
    bundle = open_bundle(lance_edge.default_bundle())
    spec = bundle.manifest.screener
    tokenizer = Tokenizer(bundle.read(spec.tokenizer), spec.window, spec.overlap)
    calibration = [bundle.calibration[category.name] for category in bundle.categories]
    prompts = [tokenizer.encode(golden.prompt) for golden in bundle.goldens()]

    @cache
    def of(form: str) -> Array:
        model = onnx.load_model_from_string(bundle.read(spec.graph))
        if form != "bundle":
            model = float_screener(model, form)  # type: ignore[arg-type]
        session = open_session(model.SerializeToString(), "cpu", threads=1)
        return np.stack([item.severity for item in Screener(session, calibration).score(prompts)])

    return of


def test_the_default_screener_decides_as_before(severities: Any) -> None:
    bundle = open_bundle(lance_edge.default_bundle())
    thresholds = np.array([bundle.calibration[item.name].threshold for item in bundle.categories])
    before, after = severities("bundle"), severities("fp32")
    allowed = max(bundle.manifest.screener.tolerance, own_rounding(bundle))
    assert 0 < np.abs(before - after).max() <= allowed
    assert ((before >= thresholds) == (after >= thresholds)).all()


def test_fp16_hardly_moves_the_default_screener(severities: Any) -> None:
    # 11 bits in each factor; measured 1.3e-4.
    assert np.abs(severities("fp32") - severities("fp16")).max() < 1e-3


# The decoder


def weights_of(precision: Precision) -> dict[str, Array]:
    return dict(make_weights(tiny_refiner.network(), tiny_refiner.delta(), precision))


@cache
def plain(precision: PlainPrecision, stored: Precision = "int8") -> Decoder:
    """The tiny refiner in the form that plans are built from."""
    graph = spelled_out(plain_decoder_graph(SHAPE, CATEGORIES, precision, tiny_refiner.CONTEXT))
    entries = plain_layout(SHAPE, CATEGORIES, precision)
    weights = dict(plain_weights(weights_of(stored), SHAPE, entries))
    session = open_session(graph.SerializeToString(), "cpu", threads=1, weights=weights)
    return with_prefix(session)


def spelled_out(graph: onnx.ModelProto) -> onnx.ModelProto:
    """DequantizeLinear as what it computes: ONNX Runtime would make a product of it that rounds its
    inputs to 8 bits too, and TensorRT does not."""
    nodes = []
    for item in graph.graph.node:
        if item.op_type != "DequantizeLinear":
            nodes.append(item)
            continue
        (weight, scale), (output,) = item.input, item.output
        kind = TensorProto.FLOAT if weight == "embedding" else TensorProto.FLOAT16
        nodes.append(helper.make_node("Cast", [weight], [f"{output}.cast"], to=kind))
        nodes.append(helper.make_node("Mul", [f"{output}.cast", scale], [output]))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    return graph


@cache
def dequantised() -> Decoder:
    """The bundle's fp32 graph over the weights that the int8 file stands for."""
    stored = weights_of("int8")
    weights = {
        name: array * stored[f"{name}.scale"] if f"{name}.scale" in stored else array
        for name, array in stored.items()
        if not name.endswith(".scale")
    }
    graph = decoder_graph(SHAPE, CATEGORIES, "fp32", tiny_refiner.CONTEXT)
    return with_prefix(open_session(graph.SerializeToString(), "cpu", threads=1, weights=weights))


def with_prefix(session: Any) -> Decoder:
    length = len(tiny_refiner.language().prefix)
    return Decoder(session, tiny_refiner.prefix(), length, tiny_refiner.CONTEXT)


def walk(*decoders: Decoder) -> tuple[list[list[int]], list[Array], list[Cache]]:
    """Steps of many sizes with rollbacks between them: tokens and second looks of each decoder."""
    rng = np.random.default_rng(5)
    caches = [decoder.start(260) for decoder in decoders]
    tokens: list[list[int]] = [[] for _ in decoders]
    looks: list[list[Array]] = [[] for _ in decoders]
    for count in (40, 1, 17, 5, 64, 2, 17, 9, 33, 3):
        ids = rng.integers(3, SHAPE.vocabulary, count).tolist()
        first = int(rng.integers(0, count))
        back = int(rng.integers(0, count + 1))
        for index, decoder in enumerate(decoders):
            step = decoder.step(caches[index], ids, first)
            tokens[index] += step.tokens
            looks[index].append(np.concatenate([step.mean, step.deviation]))
            caches[index].rollback(caches[index].length - back)
    return tokens, [np.stack(item) for item in looks], caches


def agreement(one: list[int], other: list[int]) -> float:
    return float(np.mean([a == b for a, b in zip(one, other, strict=True)]))


def test_the_plain_decoder_computes_what_the_bundles_graph_does() -> None:
    """fp32 both, the same weights: they differ by the order of sums alone."""
    tokens, looks, caches = walk(plain("fp32"), dequantised())
    assert tokens[0] == tokens[1]
    assert np.abs(looks[0] - looks[1]).max() < 1e-4
    for name in NAMES:
        kept = [item.state.read(name)[:, :, : item.length] for item in caches]
        assert np.abs(kept[0] - kept[1]).max() < 1e-4


def test_it_agrees_with_the_int8_decoder_but_for_rounding() -> None:
    tokens, _, _ = walk(plain("fp32"), tiny_refiner.decoder("int8", prefix=tiny_refiner.prefix()))
    assert agreement(*tokens) > 0.88  # random weights: many near ties; measured 0.94
    assert len(set(tokens[0])) > 20


def test_a_fp32_bundle_becomes_plain_too() -> None:
    tokens, _, _ = walk(
        plain("fp32", "fp32"), tiny_refiner.decoder("fp32", prefix=tiny_refiner.prefix())
    )
    assert tokens[0] == tokens[1]


def test_fp16_keeps_a_half_cache_and_nearly_all_tokens() -> None:
    tokens, looks, caches = walk(plain("fp32"), plain("fp16"))
    assert agreement(*tokens) > 0.97
    assert 0 < np.abs(looks[0] - looks[1]).max() < 0.05
    assert caches[1].state.read("key.0").dtype == np.float16


def test_int8_weights_are_those_of_fp16() -> None:
    """The same integers, which become fp16 in the graph instead of before it."""
    tokens, looks, caches = walk(plain("fp16"), plain("int8"))
    assert agreement(*tokens) > 0.94  # random weights: many near ties; measured 0.97
    assert 0 < np.abs(looks[0] - looks[1]).max() < 0.01
    assert caches[1].state.read("key.0").dtype == np.float16
    stored = {entry.name: entry for entry in plain_layout(SHAPE, CATEGORIES, "int8")}
    assert stored["0.qkv"].dtype == stored["0.down"].dtype == stored["embedding"].dtype == np.int8
    assert (stored["0.qkv.scale"].dtype, stored["embedding.scale"].dtype) == ("f2", "f4")
    weights = weights_of("int8")
    smallest = min(weights[f"0.{name}.scale"].min() for name in ("qkv", "o", "gate_up", "down"))
    assert smallest > 2**-14  # where fp16 keeps all its bits


def test_int8_weights_need_an_int8_bundle(tmp_path: Path) -> None:
    refiner = SimpleNamespace(shape=SHAPE, precision="fp32")
    bundle: Any = SimpleNamespace(path="here", manifest=SimpleNamespace(refiner=refiner))
    with pytest.raises(ExportError, match=r"here has fp32 weights, .* --precision fp16"):
        write_refiner(bundle, "int8", tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_what_lies_past_the_kept_tokens_is_not_seen(precision: PlainPrecision) -> None:
    decoder, ids = plain(precision), [9, 8, 7, 6]
    clean, used = decoder.start(60), decoder.start(60)
    decoder.step(used, [20] * 50)
    used.rollback(clean.length)
    one, other = decoder.step(clean, ids), decoder.step(used, ids)
    assert one.tokens == other.tokens
    assert one.mean.tolist() == other.mean.tolist()


@pytest.mark.parametrize(("precision", "opset"), [("fp32", 18), ("fp16", 18), ("int8", 19)])
def test_only_standard_operators(precision: PlainPrecision, opset: int) -> None:
    graph = plain_decoder_graph(SHAPE, CATEGORIES, precision, 64)
    assert [(item.domain, item.version) for item in graph.opset_import] == [("", opset)]
    assert {node.domain for node in graph.graph.node} == {""}


# Lengths


def test_profiles_cover_what_the_runtime_asks_for(tmp_path: Any) -> None:
    bundle = open_bundle(tiny_refiner.write_bundle(tmp_path / "bundle"))
    spec = bundle.manifest.refiner
    assert spec is not None
    verify, read = refiner_profiles(bundle, spec)
    assert verify["ids"] == ((1, 1), (1, LONGEST + 1), (1, LONGEST + 1))
    language = tiny_refiner.language()
    prompt = language.before_critique([5] * spec.prompt_tokens)
    assert read["ids"][2][1] == longest_step(bundle, spec) >= len(prompt) + 1
    assert verify["past.key.1"][2] == (1, SHAPE.kv_heads, spec.context, SHAPE.head_size)
    assert verify["first"][2] == (LONGEST,)


@pytest.mark.parametrize(("window", "longest"), [(128, 128), (16, 16), (20, 24)])
def test_the_screeners_profile_reaches_a_padded_window(window: int, longest: int) -> None:
    (profile,) = screener_profiles(window)
    assert profile["ids"] == profile["mask"]
    assert profile["ids"][0] == (1, 8)
    assert profile["ids"][2] == (128, longest)  # as many short prompts as share a run


def test_what_a_plan_cannot_hold_is_named() -> None:
    shape = replace(SHAPE, biases=("qkv",), head_norms=True)
    spec = SimpleNamespace(shape=shape)
    bundle: Any = SimpleNamespace(path="here", manifest=SimpleNamespace(refiner=spec))
    with pytest.raises(ExportError, match="has biases, head_norms, which no plan is made of yet"):
        refiner_spec(bundle, "fp16")

"""The graphs of a bundle as files that TensorRT parses, and the lengths their plans must cover."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lance_edge.bundle import Bundle, Calibration, RefinerSpec
from lance_edge.cache import open_weights, sha256_of
from lance_edge.draft import LONGEST
from lance_edge.errors import BundleError, ExportError, InvalidOption, ParityError
from lance_edge.graphs import Part, sources
from lance_edge.language import LanguageTokenizer
from lance_edge.refiner import CRITIQUE_TOKENS
from lance_edge.screener import PAD_MULTIPLE, RUN_TOKENS, FloatArray
from lance_edge.tokenizer import Tokenizer, Window
from lance_edge.weights import WEIGHTS, contents
from lance_edge_engines import open_session
from lance_edge_engines.external import Malformed, tensors_in_files
from lance_edge_engines.plan_record import PlanParity, PlanPrecision, Profile, Span
from lance_edge_export.float_screener import float_screener
from lance_edge_export.layers import (
    CALIBRATION_PROMPTS,
    REPORTED_PROMPTS,
    WORST,
    first_windows,
    layer_errors,
    set_apart,
)
from lance_edge_export.parity import FIXED_SCALES, compare, gate, severities
from lance_edge_export.plain_decoder import (
    PlainPrecision,
    plain_decoder_graph,
    plain_layout,
    plain_weights,
)
from lance_edge_export.qdq import EightBit, eight_bit_products

COMPARED_PROMPTS = 1024  # on which the parity gate compares, at most
ROWS = RUN_TOKENS // PAD_MULTIPLE  # windows in one run of the screener, at most
NEWEST_OPSET = 21  # that the exporter writes, and `float_screener` knows how to lower
VERIFY = LONGEST + 1  # rows of a step: a draft and the token before it


@dataclass(frozen=True)
class PlanGraph:
    """One graph, written as ONNX.

    path       with its weights in it or beside it
    precision  of its products
    sources    the bundle's files it was made from: name -> SHA-256
    profiles   lengths that its plan must cover
    parity     what its 8 bits change; None for floating point
    """

    part: Part
    path: Path
    precision: PlanPrecision
    sources: dict[str, str]
    profiles: list[Profile]
    parity: PlanParity | None = None

    def sha256(self) -> str:
        """Of the graph and, where they lie beside it, of its weights."""
        digest = hashlib.sha256()
        weights = self.path.with_name(WEIGHTS)
        for path in (self.path, *([weights] if weights.exists() else [])):
            digest.update(bytes.fromhex(sha256_of(path)))
        return digest.hexdigest()


@dataclass(frozen=True)
class EightBits:
    """What 8-bit products are made with.

    prompts    real ones: scales are chosen on 256 of them, and the parity gate compares on up to 1,024
               others, where there are others
    keep_fp16  the screener's layers that stay fp16, by name
    """

    prompts: Sequence[str]
    keep_fp16: Collection[str] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InvalidOption("scales of 8 bits need real prompts, and there are none")


# What a shape may have beyond Llama that `plain_decoder` does not know.
NOT_PLANNED = {
    "activation",
    "attention_scale",
    "biases",
    "head_norms",
    "post_norms",
    "tied",
    "window_rope_base",
    "windows",
}


def check_part(bundle: Bundle, part: Part, precision: PlanPrecision) -> None:
    """Raises what `write_graph` raises for what a bundle has or lacks, without writing anything."""
    if part == "screener":
        read_screener(bundle, precision)
    else:
        open_weights(bundle, refiner_spec(bundle, refiner_precision(precision)))


def write_graph(
    bundle: Bundle,
    part: Part,
    precision: PlanPrecision,
    folder: Path,
    eight_bits: EightBits | None = None,
) -> PlanGraph:
    """Write one graph of a bundle into a folder.

    eight_bits  what the screener needs for int8 and fp8

    Raises ExportError if the bundle has no such part or no plan is made of it, BundleError if its
    graph cannot be read, RefinerMissing if it was never pulled, ParityError if 8 bits change more
    than they may.
    """
    if part == "refiner":
        return write_refiner(bundle, refiner_precision(precision), folder)
    return write_screener(bundle, precision, folder, eight_bits)


def write_screener(
    bundle: Bundle, precision: PlanPrecision, folder: Path, eight_bits: EightBits | None = None
) -> PlanGraph:
    """The screener in floating point, or with 8-bit products."""
    spec = bundle.manifest.screener
    model = read_screener(bundle, precision)
    parity: PlanParity | None = None
    if precision == "fp32" or precision == "fp16":
        graph = float_screener(model, precision)
    else:
        assert eight_bits is not None
        graph, parity = eight_bit_screener(bundle, model, precision, eight_bits)
    path = folder / "screener.onnx"
    path.write_bytes(graph.SerializeToString())
    made_from, profiles = sources(bundle, "screener"), screener_profiles(spec.window)
    return PlanGraph("screener", path, precision, made_from, profiles, parity)


def read_screener(bundle: Bundle, precision: PlanPrecision) -> onnx.ModelProto:
    """The bundle's graph, which may name no files. Raises BundleError, ExportError."""
    spec = bundle.manifest.screener
    if spec.precision == "fp16" and precision != "fp16":
        raise ExportError(
            f"{bundle.path} has an fp16 screener; build its plan with --precision fp16"
        )
    contents = bundle.read(spec.graph)
    where = bundle.path / spec.graph
    try:
        if any(tensors_in_files(contents)):
            raise BundleError(f"{where} has a tensor that lies in a file, and it may read none")
        model = onnx.load_model_from_string(contents)
    except (Malformed, DecodeError) as error:
        raise BundleError(
            f"{where} is no ONNX model ({error}); copy or export the bundle again"
        ) from error
    opsets = [known.version for known in model.opset_import if known.domain in ("", "ai.onnx")]
    newest = max(opsets, default=0)
    if newest > NEWEST_OPSET:
        raise ExportError(
            f"{where} is of opset {newest}, and plans are made of opset {NEWEST_OPSET} at most; "
            "export the bundle with this version of lance-edge"
        )
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise BundleError(
            f"{where} is no valid ONNX model ({error}); copy or export the bundle again"
        ) from error
    return model


def eight_bit_screener(
    bundle: Bundle, model: onnx.ModelProto, form: EightBit, wanted: EightBits
) -> tuple[onnx.ModelProto, PlanParity]:
    """The screener with 8-bit products, and what they change against the same graph in fp32.

    Both are computed on the CPU, which takes the scales as TensorRT does; its kernels may round the
    sums otherwise. Raises ParityError, which names the worst layers.
    """
    spec = bundle.manifest.screener
    tokenizer = Tokenizer(bundle.read(spec.tokenizer), spec.window, spec.overlap)
    chosen, others = set_apart(wanted.prompts, CALIBRATION_PROMPTS)
    feeds = first_windows([tokenizer.encode(prompt) for prompt in chosen])
    judges = set_apart(others or chosen, COMPARED_PROMPTS)[0]
    encoded = [tokenizer.encode(prompt) for prompt in judges]
    floats = float_screener(model, "fp32")
    graph = eight_bit_products(floats, feeds, form, wanted.keep_fp16)
    calibration = [bundle.calibration[category.name] for category in bundle.categories]
    before, after = (severities_of(stage, encoded, calibration) for stage in (floats, graph))
    figures = compare(before, after, np.array([item.threshold for item in calibration]))
    worst = dict(list(layer_errors(floats, graph, feeds[:REPORTED_PROMPTS]).items())[:WORST])
    try:
        gate(form, figures, FIXED_SCALES)
    except ParityError as error:
        named = ", ".join(f"{name} ({moved:.3f})" for name, moved in worst.items())
        raise ParityError(
            f"{error}; the layers that moved most: {named}; --keep-fp16 LAYER keeps one"
        ) from error
    return graph, PlanParity(**figures.to_dict(), worst_layers=worst)


def severities_of(
    model: onnx.ModelProto, prompts: list[list[Window]], calibration: list[Calibration]
) -> FloatArray:
    """What a graph says on the CPU  [prompts, C]"""
    session = open_session(model.SerializeToString(), "cpu")
    try:
        return severities(session, prompts, calibration)
    finally:
        session.close()


def write_refiner(bundle: Bundle, precision: PlainPrecision, folder: Path) -> PlanGraph:
    """The decoder in standard operators, and its weights in a file of their own.

    In int8 the weights are the bundle's integers, and products are fp16: it needs no scales of inputs.
    """
    spec = refiner_spec(bundle, precision)
    categories = len(bundle.categories)
    entries = plain_layout(spec.shape, categories, precision)
    weights = open_weights(bundle, spec)
    with (folder / WEIGHTS).open("wb") as out:
        for _, piece in contents(entries, plain_weights(weights, spec.shape, entries)):
            out.write(piece)
    path = folder / "refiner.onnx"
    graph = plain_decoder_graph(spec.shape, categories, precision, spec.context)
    path.write_bytes(graph.SerializeToString())
    made_from, profiles = sources(bundle, "refiner"), refiner_profiles(bundle, spec)
    return PlanGraph("refiner", path, precision, made_from, profiles)


def refiner_precision(precision: PlanPrecision) -> PlainPrecision:
    """Of the refiner's plan, where the screener's has `precision`."""
    return "fp16" if precision == "fp8" else precision


def refiner_spec(bundle: Bundle, precision: PlainPrecision) -> RefinerSpec:
    """Raises ExportError if the bundle has none that a plan of this precision is made of."""
    spec = bundle.manifest.refiner
    if spec is None:
        raise ExportError(
            f"{bundle.path} has no refiner; build a plan of its screener with --only screener"
        )
    beyond = sorted(set(spec.shape.essentials()) & NOT_PLANNED)
    if beyond:
        raise ExportError(
            f"the refiner of {bundle.path} has {', '.join(beyond)}, which no plan is made of yet; "
            "build a plan of its screener with --only screener"
        )
    if precision == "int8" and spec.precision != "int8":
        raise ExportError(
            f"the refiner of {bundle.path} has {spec.precision} weights, and an int8 plan is made of int8 "
            "ones; build its plan with --only refiner --precision fp16"
        )
    return spec


def screener_profiles(window: int) -> list[Profile]:
    """One: from a short prompt to full batches of whole windows."""
    longest = -(-window // PAD_MULTIPLE) * PAD_MULTIPLE
    usual = min(longest, 8 * PAD_MULTIPLE)
    shapes: Span = ((1, PAD_MULTIPLE), (1, usual), (ROWS, longest))
    return [{"ids": shapes, "mask": shapes}]


def refiner_profiles(bundle: Bundle, spec: RefinerSpec) -> list[Profile]:
    """Two: a step that checks a draft, and one that reads a prompt or a critique.

    `first` is a value: the graph takes the number of logits from it.
    """
    longest = longest_step(bundle, spec)
    usual = max(VERIFY, longest // 4)
    verify: Profile = {
        "ids": ((1, 1), (1, VERIFY), (1, VERIFY)),
        "first": ((0,), (0,), (VERIFY - 1,)),
    }
    read: Profile = {
        "ids": ((1, 1), (1, usual), (1, longest)),
        "first": ((0,), (usual - 1,), (longest - 1,)),
    }
    kept = cache_span(spec)
    names = [f"past.{kind}.{i}" for i in range(spec.shape.layers) for kind in ("key", "value")]
    return [{**profile, **dict.fromkeys(names, kept)} for profile in (verify, read)]


def cache_span(spec: RefinerSpec) -> Span:
    """A cache of two tokens to one for the whole context."""
    lengths: Sequence[int] = (2, spec.context // 4, spec.context)
    heads, size = spec.shape.kv_heads, spec.shape.head_size
    least, usual, most = ((1, heads, length, size) for length in lengths)
    return least, usual, most


def longest_step(bundle: Bundle, spec: RefinerSpec) -> int:
    """Tokens that one step reads at most: the longest prompt, or the longest critique."""
    tokenizer = LanguageTokenizer(bundle.read(spec.tokenizer), spec.template)
    reading = len(tokenizer.before_critique([0] * spec.prompt_tokens))
    return max(reading, CRITIQUE_TOKENS + len(tokenizer.after_prompt(""))) + 1

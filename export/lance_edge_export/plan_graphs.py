"""The graphs of a bundle as files that TensorRT parses, and the lengths their plans must cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from lance_edge.bundle import Bundle, RefinerSpec
from lance_edge.cache import open_weights
from lance_edge.draft import LONGEST
from lance_edge.errors import ExportError
from lance_edge.graphs import Part, sources
from lance_edge.language import LanguageTokenizer
from lance_edge.refiner import CRITIQUE_TOKENS
from lance_edge.screener import PAD_MULTIPLE, RUN_TOKENS
from lance_edge.weights import WEIGHTS, contents
from lance_edge_engines.plan_record import Profile, Span
from lance_edge_export.float_screener import float_screener
from lance_edge_export.plain_decoder import (
    FloatPrecision,
    plain_decoder_graph,
    plain_layout,
    plain_weights,
)

ROWS = RUN_TOKENS // PAD_MULTIPLE  # windows in one run of the screener, at most
VERIFY = LONGEST + 1  # rows of a step: a draft and the token before it


@dataclass(frozen=True)
class PlanGraph:
    """One graph, written as ONNX.

    path      with its weights in it or beside it
    sources   the bundle's files it was made from: name -> SHA-256
    profiles  lengths that its plan must cover
    """

    part: Part
    path: Path
    sources: dict[str, str]
    profiles: list[Profile]


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


def write_graph(bundle: Bundle, part: Part, precision: FloatPrecision, folder: Path) -> PlanGraph:
    """Write one graph of a bundle into a folder.

    Raises ExportError if the bundle has no such part, RefinerMissing if it was never pulled.
    """
    write = {"screener": write_screener, "refiner": write_refiner}[part]
    return write(bundle, precision, folder)


def write_screener(bundle: Bundle, precision: FloatPrecision, folder: Path) -> PlanGraph:
    """The screener in floating point."""
    spec = bundle.manifest.screener
    if spec.precision == "fp16" and precision == "fp32":
        raise ExportError(
            f"{bundle.path} has an fp16 screener; build its plan with --precision fp16"
        )
    model = onnx.load_model_from_string(bundle.read(spec.graph))
    path = folder / "screener.onnx"
    path.write_bytes(float_screener(model, precision).SerializeToString())
    return PlanGraph("screener", path, sources(bundle, "screener"), screener_profiles(spec.window))


def write_refiner(bundle: Bundle, precision: FloatPrecision, folder: Path) -> PlanGraph:
    """The decoder in standard operators, and its weights in a file of their own."""
    spec = refiner_spec(bundle)
    categories = len(bundle.categories)
    entries = plain_layout(spec.shape, categories, precision)
    weights = open_weights(bundle, spec)
    with (folder / WEIGHTS).open("wb") as out:
        for _, piece in contents(entries, plain_weights(weights, spec.shape, entries)):
            out.write(piece)
    path = folder / "refiner.onnx"
    graph = plain_decoder_graph(spec.shape, categories, precision, spec.context)
    path.write_bytes(graph.SerializeToString())
    return PlanGraph("refiner", path, sources(bundle, "refiner"), refiner_profiles(bundle, spec))


def refiner_spec(bundle: Bundle) -> RefinerSpec:
    """Raises ExportError if the bundle has none."""
    if bundle.manifest.refiner is None:
        raise ExportError(
            f"{bundle.path} has no refiner; build a plan of its screener with --only screener"
        )
    beyond = sorted(set(bundle.manifest.refiner.shape.essentials()) & NOT_PLANNED)
    if beyond:
        raise ExportError(
            f"the refiner of {bundle.path} has {', '.join(beyond)}, which no plan is made of yet; "
            "build a plan of its screener with --only screener"
        )
    return bundle.manifest.refiner


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

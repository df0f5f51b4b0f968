"""A refiner of a few hundred kilobytes: a Llama network as a GGUF file in a wheel, a delta, a bundle.

All of it is random and seeded: what the network writes means nothing, but it is the same every
time. The GGUF file is written by the `gguf` package, so our reader is tested against another's
work; `checkpoint` says what is in it, in the names and layouts of a Hugging Face checkpoint.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lance_edge.bundle import (
    BaseSpec,
    Calibration,
    CategoryTemplate,
    FileEntry,
    RefinerSpec,
    SecondLook,
    Template,
    Templates,
    file_entry,
    open_bundle,
)
from lance_edge.cache import weights_path
from lance_edge.decoder import Decoder
from lance_edge.gguf import Float32Array, Gguf
from lance_edge.language import LanguageTokenizer
from lance_edge.llama import GgufLlama, LlamaShape
from lance_edge.weights import Array, Precision, layout, make_weights, total_bytes
from lance_edge_engines import open_session
from lance_edge_export.decoder_graph import decoder_graph

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("h", "e"), ("Ġ", "t"), ("Ġt", "he"))
BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
VOCABULARY = (*CONTROL, *BYTES, *(left + right for left, right in MERGES))

SHAPE = LlamaShape(
    layers=2,
    hidden=96,
    intermediate=128,
    heads=3,
    kv_heads=1,
    vocabulary=len(VOCABULARY),
    context=1024,
    rope_base=10000.0,
    norm_epsilon=2**-17,  # a float32, as GGUF stores it
)
CONTEXT, PROMPT_TOKENS = 1024, 96
RANK = 4
LEAST_KEPT = 0.5
LOW, HIGH, SHARE = -2.0, 2.0, 0.5  # of the second look; "kill safely" is left open, "bomb" is not

PACKAGE, MEMBER = "tiny-base==1.0", "tiny_base/tiny.gguf"
WHEEL = "tiny_base-1.0-py3-none-any.whl"

TEMPLATE = Template(
    prefix="<|im_start|>prompt\n",
    read="<|im_end|>\n<|im_start|>critique\n",
    write="<|im_end|>\n<|im_start|>rewrite\n",
    end="<|im_end|>",
)
TEMPLATES = Templates(
    line="{topic} ({strength}){elements}: {direction}",
    elements=" in {quoted}",
    strengths={"0.8": "extreme", "0.0": "faint"},
    tokens=112,
    categories={
        name: CategoryTemplate(topic=name, direction=f"no {name}") for name in tiny.CATEGORIES
    },
)

# layer's matrix -> (GGUF's name, its type, [out, in])
_WIDTH = SHAPE.heads * SHAPE.head_size
_KV_WIDTH = SHAPE.kv_heads * SHAPE.head_size
LINEARS = {
    "self_attn.q_proj": ("attn_q", Kind.Q8_0, (_WIDTH, SHAPE.hidden)),
    "self_attn.k_proj": ("attn_k", Kind.F32, (_KV_WIDTH, SHAPE.hidden)),
    "self_attn.v_proj": ("attn_v", Kind.Q8_0, (_KV_WIDTH, SHAPE.hidden)),
    "self_attn.o_proj": ("attn_output", Kind.Q4_1, (SHAPE.hidden, _WIDTH)),
    "mlp.gate_proj": ("ffn_gate", Kind.Q4_1, (SHAPE.intermediate, SHAPE.hidden)),
    "mlp.up_proj": ("ffn_up", Kind.Q4_1, (SHAPE.intermediate, SHAPE.hidden)),
    "mlp.down_proj": ("ffn_down", Kind.Q8_0, (SHAPE.hidden, SHAPE.intermediate)),
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


# The base


@cache
def _tensors() -> dict[str, tuple[Kind, Float32Array]]:
    """Checkpoint name -> its type in the file, and its weights before they are quantised."""
    rng = np.random.default_rng(7)

    def normal(*shape: int, scale: float) -> Float32Array:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    found = {
        "model.embed_tokens": (Kind.Q8_0, normal(SHAPE.vocabulary, SHAPE.hidden, scale=0.3)),
        "model.norm": (Kind.F32, 1 + normal(SHAPE.hidden, scale=0.2)),
    }
    for layer in range(SHAPE.layers):
        for name, (_, kind, (rows, columns)) in LINEARS.items():
            # Large, so that what it writes varies; but with sharp attention int8 would be far off.
            gain = 1.0 if name.endswith(("q_proj", "k_proj")) else 2.5
            weight = normal(rows, columns, scale=gain * columns**-0.5)
            found[f"model.layers.{layer}.{name}"] = (kind, weight)
        for name in NORMS:
            weight = 1 + normal(SHAPE.hidden, scale=0.2)
            found[f"model.layers.{layer}.{name}"] = (Kind.F32, weight)
    return found


@cache
def checkpoint() -> dict[str, Float32Array]:
    """What the base file holds, as the `gguf` package reads it: Hugging Face's names, no suffix."""
    return {
        name: gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        for name, (kind, weight) in _tensors().items()
    }


@cache
def base_gguf() -> bytes:
    """The base network with its tokenizer as a GGUF file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(SHAPE.layers)
        writer.add_embedding_length(SHAPE.hidden)
        writer.add_feed_forward_length(SHAPE.intermediate)
        writer.add_head_count(SHAPE.heads)
        writer.add_head_count_kv(SHAPE.kv_heads)
        writer.add_context_length(SHAPE.context)
        writer.add_rope_freq_base(SHAPE.rope_base)
        writer.add_layer_norm_rms_eps(SHAPE.norm_epsilon)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(VOCABULARY)
        writer.add_token_types([3 if token in CONTROL else 1 for token in VOCABULARY])
        writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
        for name, (kind, weight) in _tensors().items():
            stored = gguf.quants.quantize(_as_llama_cpp(name, weight), kind)
            writer.add_tensor(_gguf_name(name), stored, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _gguf_name(name: str) -> str:
    if name in ("model.embed_tokens", "model.norm"):
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[name] + ".weight"
    _, _, layer, part = name.split(".", 3)
    short = LINEARS[part][0] if part in LINEARS else NORMS[part]
    return f"blk.{layer}.{short}.weight"


def _as_llama_cpp(name: str, weight: Float32Array) -> Float32Array:
    """Its converter makes neighbours of the two halves of each head's rotary dimensions."""
    heads = {"q_proj": SHAPE.heads, "k_proj": SHAPE.kv_heads}.get(name.rsplit(".", 1)[-1])
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3)).reshape(weight.shape)


@cache
def network() -> GgufLlama:
    """The base as our reader has it."""
    return GgufLlama(Gguf(memoryview(base_gguf())))


def write_base(folder: Path) -> Path:
    """The base file by itself; returns its path."""
    path = folder / Path(MEMBER).name
    path.write_bytes(base_gguf())
    return path


def write_wheel(folder: Path, members: Mapping[str, bytes] | None = None) -> Path:
    """The wheel that publishes the base, or one with other members; returns its path."""
    path = folder / WHEEL
    members = {MEMBER: base_gguf()} if members is None else members
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in {**members, "tiny_base-1.0.dist-info/METADATA": b"Name: x"}.items():
            info = zipfile.ZipInfo(name)  # dated 1980: the same bytes every time
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, contents)
    return path


def tokenizer() -> Tokenizer:
    """The base's tokenizer: three merges, else a token a byte."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    made = Tokenizer(models.BPE(ids, list(MERGES)))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(CONTROL))
    return made


def language() -> LanguageTokenizer:
    return LanguageTokenizer(tokenizer().to_str().encode(), TEMPLATE)


# What is learned


@cache
def delta(categories: int = len(tiny.CATEGORIES)) -> dict[str, Array]:
    """Low-rank changes to the last layer, the second look's head, and the embedding's balance."""
    rng = np.random.default_rng(11)
    found: dict[str, Array] = {}
    layer = SHAPE.layers - 1
    for name, (_, _, (rows, columns)) in LINEARS.items():
        for side, shape, size in (("a", (RANK, columns), columns), ("b", (rows, RANK), rows)):
            found[f"{layer}.{name}.{side}"] = rng.integers(-127, 128, shape).astype(np.int8)
            scale = rng.uniform(0.5, 1.0, size) * 2e-3
            found[f"{layer}.{name}.{side}_scale"] = scale.astype(np.float32)
    for name in ("mean", "deviation"):
        weight = 0.1 * rng.standard_normal((SHAPE.hidden, categories))
        found[f"look.{name}"] = weight.astype(np.float32)
        found[f"look.{name}.bias"] = rng.standard_normal(categories).astype(np.float32)
    balance = np.exp(0.3 * rng.standard_normal(SHAPE.hidden))
    found["embedding.balance"] = balance.astype(np.float32)
    return found


@cache
def weights_file(precision: Precision) -> bytes:
    """The weights file as the layout describes it, every array put in its place."""
    entries = layout(SHAPE, len(tiny.CATEGORIES), precision)
    contents = bytearray(total_bytes(entries))
    arrays = dict(make_weights(network(), delta(), precision))
    for entry in entries:
        contents[entry.offset : entry.offset + entry.bytes] = arrays[entry.name].tobytes()
    return bytes(contents)


def decoder(
    precision: Precision,
    changes: Mapping[str, Array] | None = None,
    prefix: Mapping[str, Array] | None = None,
) -> Decoder:
    """The tiny network on one thread.

    changes  other arrays of the delta
    prefix   keys and values of the template's first tokens; none without
    """
    learned = {**delta(), **(changes or {})}
    categories = learned["look.mean"].shape[1]
    graph = decoder_graph(SHAPE, categories, precision, CONTEXT).SerializeToString()
    weights = dict(make_weights(network(), learned, precision))
    session = open_session(graph, "cpu", threads=1, weights=weights)
    length = 0 if prefix is None else len(language().prefix)
    return Decoder(session, prefix or {}, length, CONTEXT)


@cache
def prefix() -> dict[str, Array]:
    """Keys and values of the template's first tokens, read in fp32."""
    ids = language().prefix
    reader = decoder("fp32")
    read = reader.start(len(ids))
    reader.step(read, ids)
    names = [f"{kind}.{layer}" for layer in range(SHAPE.layers) for kind in ("key", "value")]
    return {name: read.state.read(name)[:, :, : len(ids)] for name in names}


# The bundle


def spec(precision: Precision = "int8") -> RefinerSpec:
    base, weights = base_gguf(), weights_file(precision)
    return RefinerSpec(
        graph="refiner.onnx",
        tokenizer="refiner_tokenizer.json",
        delta="refiner_delta.npz",
        prefix="refiner_prefix.npz",
        second_look="second_look.json",
        precision=precision,
        context=CONTEXT,
        prompt_tokens=PROMPT_TOKENS,
        least_kept=LEAST_KEPT,
        shape=SHAPE,
        template=TEMPLATE,
        base=BaseSpec(PACKAGE, MEMBER, hashlib.sha256(base).hexdigest(), len(base)),
        weights=FileEntry(hashlib.sha256(weights).hexdigest(), len(weights)),
    )


@cache
def files(precision: Precision = "int8") -> dict[str, bytes]:
    """The files that a refiner adds to a bundle."""
    neutral = Calibration(slope=1.0, intercept=0.0, threshold=tiny.THRESHOLD)
    look = SecondLook(dict.fromkeys(tiny.CATEGORIES, neutral), LOW, HIGH, SHARE)
    graph = decoder_graph(SHAPE, len(tiny.CATEGORIES), precision, CONTEXT)
    names = spec(precision)
    return {
        "gradients.json": json.dumps(asdict(TEMPLATES)).encode(),
        names.graph: graph.SerializeToString(),
        names.tokenizer: tokenizer().to_str().encode(),
        names.delta: npz(delta()),
        names.prefix: npz(prefix()),
        names.second_look: json.dumps(asdict(look)).encode(),
    }


def npz(arrays: Mapping[str, Array]) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def write_bundle(
    folder: Path,
    precision: Precision = "int8",
    refiner: Mapping[str, Any] | None = None,
    replaced: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the tiny screener's bundle with a refiner in it.

    refiner   other values in the manifest's entry
    replaced  other contents of files; all hashes agree with them
    """
    tiny.write_bundle(folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name, contents in {**files(precision), **(replaced or {})}.items():
        (folder / name).write_bytes(contents)
        manifest["files"][name] = asdict(file_entry(contents))
    manifest["gradients"] = "gradients.json"
    manifest["refiner"] = {**asdict(spec(precision)), **(refiner or {})}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def write_pulled(folder: Path) -> Path:
    """The same bundle, and its weights in the cache ($LANCE_EDGE_CACHE) as if they were pulled."""
    bundle = open_bundle(write_bundle(folder))
    path = weights_path(bundle, spec())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(weights_file("int8"))
    return folder

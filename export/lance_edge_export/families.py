"""Checkpoints of the Llama family in Hugging Face's format: what config.json means, and the weights.

FAMILIES is the list of architectures. What a family does differently is data: fields of
LlamaShape, and the names of its norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lance_edge.errors import BundleError, ExportError
from lance_edge.gguf import Float32Array
from lance_edge.llama import HEAD_NORMS, LINEARS, NORMS, POST_NORMS, LlamaShape, RopeScaling
from lance_edge.weights import PACKED
from lance_edge_export.tensors import (
    TensorFolder,
    inside,
    listed,
    read_json,
    refuse_other_weights,
)

CONFIG = "config.json"
LANES = 16  # ONNX Runtime rotates heads whose size is a multiple of it

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"


class Config:
    """The values of a config.json; a key that is not there has its family's default."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_json(path)

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        return number(value, self.wrong(key, "a number above 0"))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def wrong(self, key: str, wanted: str) -> ExportError:
        """What to raise for a value that does not fit."""
        return ExportError(
            f"{self.path}: {key} must be {wanted}, not {self.get(key)!r}; a refiner of another "
            "kind cannot be exported"
        )

    def refuse(self, key: str, *harmless: object) -> None:
        """Raise ExportError if a key asks for what this export cannot do."""
        if self.get(key) not in (None, False, *harmless):
            raise self.wrong(key, "left out: that is not supported")


def number(value: object, error: ExportError) -> float:
    """The value, if it is a finite number above 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise error
    if not 0 < value < math.inf:
        raise error
    return float(value)


@dataclass(frozen=True)
class Family:
    """How an architecture is read.

    norms        our name of a norm -> the checkpoint's
    norm_offset  what is added to a norm's stored weights
    """

    shape: Callable[[Config], LlamaShape]
    norms: Mapping[str, str]
    norm_offset: float = 0.0


class Checkpoint:
    """The network in a checkpoint folder; a `Source`."""

    def __init__(self, folder: Path) -> None:
        """Raises ExportError if this is no network that we know, or its files contradict each other."""
        if not folder.is_dir():
            raise ExportError(f"{folder} is no folder; give a checkpoint's, with its {CONFIG}")
        config = Config(inside(folder, CONFIG))
        refuse_other_weights(config.values, folder)
        self.architecture = architecture(config)
        self.family = FAMILIES[self.architecture]
        self.shape = read_shape(config, self.family)
        self.tensors = TensorFolder(folder)
        check_tensors(self.tensors, self.family, self.shape)

    def embedding(self) -> Float32Array:
        """[vocabulary, hidden]"""
        return self.tensors.tensor(EMBEDDING)

    def output(self) -> Float32Array:
        """[vocabulary, hidden]"""
        return self.tensors.tensor(OUTPUT)

    def final_norm(self) -> Float32Array:
        """[hidden]"""
        return self._norm(FINAL_NORM)

    def norm(self, layer: int, name: str) -> Float32Array:
        """[hidden] or [head_size]"""
        return self._norm(in_layer(layer, self.family.norms[name]))

    def linear(self, layer: int, name: str) -> Float32Array:
        """[out, in]"""
        return self.tensors.tensor(in_layer(layer, name))

    def bias(self, layer: int, name: str) -> Float32Array:
        """[out]"""
        return self.tensors.tensor(in_layer(layer, name, "bias"))

    def _norm(self, name: str) -> Float32Array:
        weight = self.tensors.tensor(name)
        offset = self.family.norm_offset
        return weight + weight.dtype.type(offset) if offset else weight


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
FINAL_NORM = "model.norm.weight"


def in_layer(layer: int, name: str, part: str = "weight") -> str:
    """A tensor's name in the checkpoint."""
    return f"model.layers.{layer}.{name}.{part}"


def architecture(config: Config) -> str:
    """The one architecture that a config names. Raises ExportError if we do not know it."""
    named = config.get("architectures")
    if isinstance(named, list) and len(named) == 1 and named[0] in FAMILIES:
        return str(named[0])
    raise ExportError(
        f"{config.path}: architectures is {named!r}, and a refiner can be exported from one of "
        f"{', '.join(FAMILIES)}"
    )


def read_shape(config: Config, family: Family) -> LlamaShape:
    """What a config describes. Raises ExportError for what this export cannot do."""
    config.refuse("quantization_config")
    config.refuse("attn_logit_softcapping")
    config.refuse("use_bidirectional_attention")
    config.refuse("partial_rotary_factor", 1.0)
    try:
        shape = family.shape(config)
    except BundleError as error:
        raise ExportError(f"{config.path}: {error}") from error
    if shape.head_size % LANES:
        raise ExportError(
            f"{config.path}: heads of {shape.head_size} dimensions cannot be rotated by ONNX "
            f"Runtime, which needs a multiple of {LANES}; such a network cannot be exported"
        )
    return shape


def check_tensors(tensors: TensorFolder, family: Family, shape: LlamaShape) -> None:
    """Raises ExportError if the weights are not those that config.json describes."""
    wanted, found = expected_tensors(family, shape), dict(tensors.names)
    for name in [name for name in found if name.endswith("rotary_emb.inv_freq")]:
        del found[name]  # older checkpoints kept what follows from the config
    if shape.tied and OUTPUT in found and EMBEDDING in found:
        del found[OUTPUT]
        if not np.array_equal(tensors.tensor(OUTPUT), tensors.tensor(EMBEDDING)):
            raise ExportError(
                f"{tensors.folder} has an {OUTPUT} that is not its embedding, and {CONFIG} says "
                "that they are one; set tie_word_embeddings to false if it was trained"
            )
    if missing := sorted(set(wanted) - set(found)):
        raise ExportError(f"{tensors.folder} lacks {listed(missing)}, which {CONFIG} asks for")
    if extra := sorted(set(found) - set(wanted)):
        raise ExportError(
            f"{tensors.folder} has {listed(extra)}, of which {CONFIG} says nothing; weights "
            "cannot be left out"
        )
    for name, sizes in wanted.items():
        if found[name] != sizes:
            raise ExportError(
                f"{name} in {tensors.folder} has the shape {list(found[name])}, and {CONFIG} "
                f"describes {list(sizes)}; they do not belong together"
            )


def expected_tensors(family: Family, shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """The names and shapes that a checkpoint of this shape has."""
    table = (shape.vocabulary, shape.hidden)
    found: dict[str, tuple[int, ...]] = {EMBEDDING: table, FINAL_NORM: (shape.hidden,)}
    if not shape.tied:
        found[OUTPUT] = table
    sizes = linear_sizes(shape)
    biased = {name for packed in shape.biases for name in PACKED[packed]}
    for layer in range(shape.layers):
        for name, (rows, columns) in sizes.items():
            found[in_layer(layer, name)] = (rows, columns)
            if name in biased:
                found[in_layer(layer, name, "bias")] = (rows,)
        for name in (*NORMS, *(POST_NORMS if shape.post_norms else ())):
            found[in_layer(layer, family.norms[name])] = (shape.hidden,)
        for name in HEAD_NORMS if shape.head_norms else ():
            found[in_layer(layer, family.norms[name])] = (shape.head_size,)
    return found


def linear_sizes(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    """(out, in) of each of LINEARS."""
    width, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sizes = {
        "self_attn.q_proj": (width, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, width),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }
    assert sizes.keys() == LINEARS.keys()
    return sizes


# The families


def llama(config: Config) -> LlamaShape:
    """Llama 1 to 3.2, SmolLM2 and others that took the architecture over."""
    biases = (*_attention_biases(config), *(("gate_up", "down") if config.flag("mlp_bias") else ()))
    return _shape(config, biases=biases)


def mistral(config: Config) -> LlamaShape:
    """Mistral: all layers have the window, if there is one."""
    shape = _shape(config)
    window = 0 if config.get("sliding_window") is None else config.integer("sliding_window")
    return _shape(config, windows=(window,) * shape.layers if window else ())


def qwen2(config: Config) -> LlamaShape:
    """Qwen 2 and 2.5: biases of queries, keys and values."""
    return _shape(config, biases=("qkv",), windows=_qwen_windows(config))


def qwen3(config: Config) -> LlamaShape:
    """Qwen 3: no biases, but norms of each head's queries and keys."""
    return _shape(
        config,
        head_size=config.integer("head_dim", 128),
        biases=_attention_biases(config),
        head_norms=True,
        windows=_qwen_windows(config),
    )


def gemma3(config: Config) -> LlamaShape:
    """Gemma 3, text only: five layers with a window, then one without."""
    layers = config.integer("num_hidden_layers")
    pattern = config.integer("sliding_window_pattern", 6)
    usual = [FULL if layer % pattern == pattern - 1 else SLIDING for layer in range(layers)]
    windows = _windows(config, usual, config.integer("sliding_window", 4096))
    local = _rope(config, SLIDING).get("rope_theta", config.number("rope_local_base_freq", 1e4))
    return _shape(
        config,
        activation="gelu_pytorch_tanh",
        head_size=config.integer("head_dim", 256),
        tied=config.flag("tie_word_embeddings", default=True),
        biases=_attention_biases(config),
        head_norms=True,
        post_norms=True,
        embedding_scale=config.integer("hidden_size") ** 0.5,
        attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        windows=windows,
        rope_base=1e6,
        window_rope_base=number(local, config.wrong("rope_parameters", "a rotary base")),
    )


_LLAMA_NORMS = {
    **{name: name for name in NORMS},
    **{name: f"self_attn.{name}" for name in HEAD_NORMS},
}
_GEMMA_NORMS = {
    **_LLAMA_NORMS,
    "post_attention_layernorm": "pre_feedforward_layernorm",  # the norm before the gated product
    "after_attention": "post_attention_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
FAMILIES = {
    "LlamaForCausalLM": Family(llama, _LLAMA_NORMS),
    "MistralForCausalLM": Family(mistral, _LLAMA_NORMS),
    "Qwen2ForCausalLM": Family(qwen2, _LLAMA_NORMS),
    "Qwen3ForCausalLM": Family(qwen3, _LLAMA_NORMS),
    "Gemma3ForCausalLM": Family(gemma3, _GEMMA_NORMS, norm_offset=1.0),
}


def _shape(
    config: Config, activation: str = "silu", rope_base: float = 1e4, **differences: Any
) -> LlamaShape:
    """What all families say in the same words; `activation` and `rope_base` where they say nothing."""
    key = "hidden_act" if config.get("hidden_activation") is None else "hidden_activation"
    named = config.get(key) or activation
    if named not in ACTIVATIONS:
        raise config.wrong(key, f"one of {', '.join(ACTIVATIONS)}")
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    rope = _rope(config, FULL)
    base = rope.get("rope_theta", config.number("rope_theta", rope_base))
    values: dict[str, Any] = {
        "head_size": config.integer("head_dim", hidden // heads),
        "tied": config.flag("tie_word_embeddings"),
        **differences,
    }
    return LlamaShape(
        layers=config.integer("num_hidden_layers"),
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        vocabulary=config.integer("vocab_size"),
        context=config.integer("max_position_embeddings"),
        rope_base=number(base, config.wrong("rope_parameters", "a rotary base")),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[named],
        rope_scaling=_scaling(config, rope),
        **values,
    )


def _attention_biases(config: Config) -> tuple[str, ...]:
    return ("qkv", "o") if config.flag("attention_bias") else ()


def _qwen_windows(config: Config) -> tuple[int, ...]:
    if not config.flag("use_sliding_window"):
        return ()
    first = config.integer("max_window_layers", 28)
    layers = range(config.integer("num_hidden_layers"))
    usual = [SLIDING if layer >= first else FULL for layer in layers]
    return _windows(config, usual, config.integer("sliding_window", 4096))


def _windows(config: Config, usual: list[str], window: int) -> tuple[int, ...]:
    """Each layer's window; `usual` are the kinds of layers where the config does not name them."""
    kinds = config.get("layer_types") or usual
    if not isinstance(kinds, list) or not set(kinds) <= {FULL, SLIDING}:
        raise config.wrong("layer_types", f"a list of {FULL} and {SLIDING}")
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


def _rope(config: Config, kind: str) -> Mapping[str, Any]:
    """How a kind of layer is rotated: `rope_parameters` since transformers 5, `rope_scaling` before."""
    key = "rope_scaling" if config.get("rope_parameters") is None else "rope_parameters"
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise config.wrong(key, "an object")
    by_kind = {name: values for name, values in found.items() if name in (FULL, SLIDING)}
    if by_kind:
        found = by_kind.get(kind, {})
    elif kind == SLIDING:
        return {}  # what is said of all layers is said of those without a window, in Gemma
    if not isinstance(found, dict):
        raise config.wrong(key, f"an object for each of {FULL} and {SLIDING}")
    return found


def _scaling(config: Config, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    wrong = config.wrong(
        "rope_scaling" if config.get("rope_parameters") is None else "rope_parameters",
        "of the type default, linear or llama3, with its factors",
    )
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", number(rope.get("factor"), wrong))
    if kind != "llama3":
        raise wrong
    return RopeScaling(
        "llama3",
        number(rope.get("factor"), wrong),
        number(rope.get("low_freq_factor"), wrong),
        number(rope.get("high_freq_factor"), wrong),
        int(number(rope.get("original_max_position_embeddings"), wrong)),
    )

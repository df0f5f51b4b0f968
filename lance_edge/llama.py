"""What a language model of the Llama family is made of, and one in a GGUF file.

Names are those of a Hugging Face Llama checkpoint; matrices are [out, in].
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol

from lance_edge.errors import BaseCorrupt, BundleError
from lance_edge.gguf import Float32Array, Gguf

LINEARS = {  # in one layer: our name -> GGUF's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


# What a network may have beyond those: a norm of each head's queries and keys, and norms of what
# attention and the gated product add to the stream.
HEAD_NORMS = ("q_norm", "k_norm")
POST_NORMS = ("after_attention", "after_mlp")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary rates were slowed down for longer texts.

    linear  all of them, by `factor`
    llama3  those with a wavelength above original_context / low_factor by `factor`, those below
            original_context / high_factor not at all, those between in part
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 0 < self.low_factor < self.high_factor):
            raise BundleError(
                "a rotary scaling needs a factor above 0 and 0 < low_factor < high_factor, "
                f"not {self.factor}, {self.low_factor} and {self.high_factor}"
            )


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a network; `vocabulary` tokens, `context` positions.

    From `head_size` on, what other families than Llama have; the defaults are Llama's.

    head_size         of queries, keys and values; 0 for hidden / heads
    tied              the output matrix is the embedding
    biases            the packed products (`weights.PACKED`) that add one
    head_norms        each head's queries and keys are normalised before they are rotated
    post_norms        what attention and the gated product give is normalised before it is added
    activation        of the gate
    embedding_scale   what embeddings are multiplied by
    attention_scale   what products of queries and keys are multiplied by; 0 for head_size ** -0.5
    windows           for each layer, how many tokens it attends to, itself included; 0 for all.
                      None at all: all layers attend to all tokens
    rope_scaling      of the rotary rates that follow from rope_base
    window_rope_base  of the layers with a window, never scaled; 0 for rope_base like the others
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    rope_base: float
    norm_epsilon: float
    head_size: int = 0
    tied: bool = True
    biases: tuple[str, ...] = ()
    head_norms: bool = False
    post_norms: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    windows: tuple[int, ...] = ()
    rope_scaling: RopeScaling | None = None
    window_rope_base: float = 0.0

    def __post_init__(self) -> None:
        sizes = (self.layers, self.hidden, self.intermediate, self.vocabulary, self.context)
        if min(*sizes, self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads:
            raise BundleError(
                "a network needs sizes above 0, and as many heads as its key and value heads or a "
                f"multiple of it; not {asdict(self)}"
            )
        if self.windows and len(self.windows) != self.layers:
            raise BundleError(f"{self.layers} layers cannot have {len(self.windows)} windows")
        if self.head_size == 0:
            object.__setattr__(self, "head_size", self.hidden // self.heads)

    @property
    def rotatable(self) -> bool:
        """Whether the stream between the layers can be rotated (`weights.make_weights`): a norm of
        what a product gives scales channels that would no longer be there."""
        return not self.post_norms

    def window(self, layer: int) -> int:
        """How many tokens a layer attends to, itself included; 0 for all."""
        return self.windows[layer] if self.windows else 0

    def essentials(self) -> dict[str, Any]:
        """The values by name, without those that a shape has anyway."""
        optional = {item.name: item.default for item in fields(self) if item.default is not MISSING}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in optional or replace(self, **{name: optional[name]}) != self
        }


class Source(Protocol):
    """Where a network's weights come from, one array at a time."""

    @property
    def shape(self) -> LlamaShape: ...

    def embedding(self) -> Float32Array:
        """[vocabulary, hidden]"""
        ...

    def output(self) -> Float32Array:
        """Where the shape is not tied  [vocabulary, hidden]"""
        ...

    def final_norm(self) -> Float32Array:
        """What the last norm multiplies by  [hidden]"""
        ...

    def norm(self, layer: int, name: str) -> Float32Array:
        """What one of NORMS, HEAD_NORMS or POST_NORMS multiplies by  [hidden] or [head_size]"""
        ...

    def linear(self, layer: int, name: str) -> Float32Array:
        """One of LINEARS  [out, in]"""
        ...

    def bias(self, layer: int, name: str) -> Float32Array:
        """What one of LINEARS adds, where the shape has it  [out]"""
        ...


class GgufLlama:
    """A Llama network in a GGUF file; a Source."""

    def __init__(self, gguf: Gguf) -> None:
        """Raises BaseCorrupt if the file does not describe a Llama network."""
        self._gguf = gguf
        read = gguf.metadata.get
        try:
            self.shape = LlamaShape(
                layers=int(gguf.metadata["llama.block_count"]),
                hidden=int(gguf.metadata["llama.embedding_length"]),
                intermediate=int(gguf.metadata["llama.feed_forward_length"]),
                heads=int(gguf.metadata["llama.attention.head_count"]),
                kv_heads=int(gguf.metadata["llama.attention.head_count_kv"]),
                vocabulary=len(gguf.metadata["tokenizer.ggml.tokens"]),
                context=int(gguf.metadata["llama.context_length"]),
                rope_base=float(read("llama.rope.freq_base", 10000.0)),
                norm_epsilon=float(gguf.metadata["llama.attention.layer_norm_rms_epsilon"]),
                tied="output.weight" not in gguf.names,
            )
        except KeyError as error:
            raise BaseCorrupt(f"the GGUF file has no {error}; it is no Llama network") from error
        except (TypeError, ValueError, BundleError) as error:
            raise BaseCorrupt(f"the GGUF file describes no Llama network ({error})") from error

    def embedding(self) -> Float32Array:
        """[vocabulary, hidden]"""
        return self._gguf.tensor("token_embd.weight")

    def output(self) -> Float32Array:
        """[vocabulary, hidden]"""
        return self._gguf.tensor("output.weight")

    def final_norm(self) -> Float32Array:
        """[hidden]"""
        return self._gguf.tensor("output_norm.weight")

    def norm(self, layer: int, name: str) -> Float32Array:
        """One of NORMS  [hidden]"""
        return self._gguf.tensor(f"blk.{layer}.{NORMS[name]}.weight")

    def linear(self, layer: int, name: str) -> Float32Array:
        """One of LINEARS  [out, in]"""
        weight = self._gguf.tensor(f"blk.{layer}.{LINEARS[name]}.weight")
        if name == "self_attn.q_proj":
            return _halves(weight, self.shape.heads)
        if name == "self_attn.k_proj":
            return _halves(weight, self.shape.kv_heads)
        return weight

    def bias(self, layer: int, name: str) -> Float32Array:
        """GGUF's Llama networks have none, and so says the shape."""
        raise BaseCorrupt(f"the GGUF file has no bias of {name} in layer {layer}")


def _halves(weight: Float32Array, heads: int) -> Float32Array:
    """GGUF pairs a head's rotary dimensions as neighbours; checkpoints keep them in two halves."""
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)

"""The base language model's weights under one set of names. Knows GGUF's names and layouts.

Names are those of a Hugging Face Llama checkpoint; matrices are [out, in].
"""

from __future__ import annotations

from dataclasses import dataclass

from lance_edge.errors import BaseCorrupt
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


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama network; `vocabulary` tokens, `context` positions."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    rope_base: float
    norm_epsilon: float

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


class GgufLlama:
    """A Llama network in a GGUF file whose output matrix is its embedding."""

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
            )
        except KeyError as error:
            raise BaseCorrupt(f"the GGUF file has no {error}; it is no Llama network") from error
        except (TypeError, ValueError) as error:
            raise BaseCorrupt(f"the GGUF file describes no Llama network ({error})") from error

    def embedding(self) -> Float32Array:
        """[vocabulary, hidden]"""
        return self._gguf.tensor("token_embd.weight")

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


def _halves(weight: Float32Array, heads: int) -> Float32Array:
    """GGUF pairs a head's rotary dimensions as neighbours; checkpoints keep them in two halves."""
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)

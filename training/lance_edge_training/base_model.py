"""The base language model from its GGUF file as torch modules and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from lance_edge.gguf import Gguf
from lance_edge.llama import LINEARS, NORMS, GgufLlama


def load_base(path: Path) -> LlamaForCausalLM:
    """The network in float32, in evaluation mode."""
    network = GgufLlama(Gguf(memoryview(path.read_bytes())))
    shape = network.shape
    config = LlamaConfig(  # type: ignore[no-untyped-call]
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        rope_theta=shape.rope_base,
        rms_norm_eps=shape.norm_epsilon,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        attn_implementation="sdpa",
    )
    model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    weights = {
        "model.embed_tokens.weight": network.embedding(),
        "model.norm.weight": network.final_norm(),
    }
    for layer in range(shape.layers):
        for name in LINEARS:
            weights[f"model.layers.{layer}.{name}.weight"] = network.linear(layer, name)
        for name in NORMS:
            weights[f"model.layers.{layer}.{name}.weight"] = network.norm(layer, name)
    state = {name: torch.from_numpy(weight.copy()) for name, weight in weights.items()}
    state["lm_head.weight"] = (
        state["model.embed_tokens.weight"]
        if shape.tied
        else torch.from_numpy(network.output().copy())
    )
    model.load_state_dict(state)
    return model.eval()  # type: ignore[no-any-return]


def base_tokenizer(path: Path) -> Tokenizer:
    """The byte-level BPE tokenizer that the file's metadata describes, its control tokens special."""
    metadata = Gguf(memoryview(path.read_bytes())).metadata
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    if (
        metadata.get("tokenizer.ggml.model") != "gpt2"
        or metadata.get("tokenizer.ggml.pre") != "smollm"
    ):
        raise ValueError(f"{path} has a tokenizer that is not SmolLM's; give a tokenizer.json")
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF token type
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [t for t, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    return tokenizer

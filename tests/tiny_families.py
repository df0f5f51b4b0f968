"""Checkpoints of a few hundred kilobytes, one of each family: random, seeded, made by transformers.

What they write means nothing; but every part that a family has is there and large enough to matter.
The tokenizer and the template are those of `tiny_refiner`. Imports torch when a checkpoint is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tiny_refiner

from lance_edge.llama import LlamaShape, Source

CONTEXT = 1024
VOCABULARY = (
    len(tiny_refiner.VOCABULARY) + 10
)  # as in many checkpoints, more than the tokenizer has
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,  # no power of two
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (transformers' classes without "Config" and "ForCausalLM", values of the config)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"head_dim": 16, "rope_scaling": _LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "smollm2": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"hidden_size": 64, "tie_word_embeddings": True, "rope_theta": 1e5},
    ),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        {"head_dim": 32, "sliding_window": 7},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {
            "hidden_size": 64,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {"head_dim": 48, "tie_word_embeddings": True},  # no power of two
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "sliding_window": 6,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 20,
            "rope_theta": 1e5,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "final_logit_softcapping": 20.0,
        },
    ),
}


def make_model(family: str) -> Any:
    """The family's network in transformers, in float32."""
    import torch
    import transformers

    network, config, values = FAMILIES[family]
    model = getattr(transformers, network)(
        getattr(transformers, config)(**{**_SIZES, **values})
    ).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values_ = torch.randn(parameter.shape, generator=random)
            if "norm" in name:  # around what a fresh network has: one, or zero that is added to one
                parameter.add_(0.3 * values_)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * values_)
            elif "embed" in name:  # else a network that scales it would write one token for ever
                scale = getattr(model.model.embed_tokens, "embed_scale", 1.0)
                parameter.copy_(0.5 * values_ / scale)
            else:
                parameter.copy_(1.5 * parameter.shape[1] ** -0.5 * values_)
    return model


def write_checkpoint(folder: Path, family: str, **saving: Any) -> Path:
    """A checkpoint folder as transformers writes it, with a tokenizer; `saving` goes to
    save_pretrained."""
    make_model(family).save_pretrained(folder, **saving)
    tiny_refiner.tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_template(folder: Path) -> Path:
    path = folder / "template.json"
    path.write_text(json.dumps(asdict(tiny_refiner.TEMPLATE)), encoding="utf-8")
    return path


class Reshaped:
    """A source under another shape, to see what a part of the shape does."""

    def __init__(self, source: Source, shape: LlamaShape) -> None:
        self._source = source
        self.shape = shape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Set values of a config.json; None leaves a key out."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")

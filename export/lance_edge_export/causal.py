"""A Hugging Face checkpoint of a causal language model to the files that a bundle holds of a refiner.

Such a network was not trained here: it has no second look, its template is given, and its weights
lie in the bundle. Each stage is compared with the one before; the first with transformers.
"""

from __future__ import annotations

import gc
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from lance_edge.bundle import (
    Bundle,
    Calibration,
    RefinerSpec,
    SecondLook,
    Template,
    Templates,
)
from lance_edge.cache import sha256_of
from lance_edge.draft import LONGEST
from lance_edge.errors import BundleError, ExportError
from lance_edge.language import LanguageTokenizer
from lance_edge.llama import LlamaShape
from lance_edge.refiner import CRITIQUE_TOKENS, longest_rewrite
from lance_edge.weights import Array, Precision
from lance_edge_export import refiner
from lance_edge_export.decoder_graph import decoder_graph
from lance_edge_export.families import CONFIG, Checkpoint
from lance_edge_export.tensors import check_vocabulary, inside, read_json

TOKENIZER = "tokenizer.json"
OPEN_AT = 1e9  # no margin of a first look is as large: the band of the second look is empty
# Share of the next tokens that a stage must not change. A network that was not trained for the template
# is unsure of more of them than one that was: int8 kept 92 % and 95 % of SmolLM2-135M's.
LEAST_AGREEMENT = {"fp32": 0.995, "int8": 0.88}
ROWS = 64  # whose logits torch computes at once

Sample = tuple[str, str, str]  # prompt, critique, rewrite


def export_checkpoint(
    folder: Path,
    template: Template,
    categories: Sequence[str],
    precision: Precision,
    least_kept: float,
    least_known: float,
    least_log_probability: float | None,
    samples: Sequence[Sample],
    workspace: Path,
) -> refiner.RefinerFiles:
    """The files of a refiner, with its weights in `workspace`.

    samples  texts on which the stages are compared

    Raises ExportError if the checkpoint cannot be exported, ParityError if a stage changes more than
    it may.
    """
    network = Checkpoint(folder)
    serialized = inside(folder, TOKENIZER).read_bytes()
    tokenizer = read_tokenizer(folder, serialized, template, network.shape.vocabulary)
    context = min(refiner.CONTEXT, network.shape.context)
    prompt_tokens = longest_prompt(tokenizer, context)
    rows = sample_rows(tokenizer, samples, prompt_tokens, context)
    delta = no_second_look(network.shape, len(categories))
    prefix, parity, weights = refiner.compare_stages(
        network,
        delta,
        len(categories),
        tokenizer,
        rows,
        transformers_tokens(folder, tokenizer.prefix, rows),
        precision,
        LEAST_AGREEMENT,
        context,
        workspace,
    )
    spec = RefinerSpec(
        graph="refiner.onnx",
        tokenizer="refiner_tokenizer.json",
        delta=None,
        prefix="refiner_prefix.npz",
        second_look="second_look.json",
        precision=precision,
        context=context,
        prompt_tokens=prompt_tokens,
        least_kept=least_kept,
        shape=network.shape,
        template=template,
        base=None,
        weights=weights,
        least_known=least_known,
        least_log_probability=least_log_probability,
    )
    graph = decoder_graph(network.shape, len(categories), precision, context)
    neutral = Calibration(slope=1.0, intercept=0.0, threshold=0.5)
    look = SecondLook(dict.fromkeys(categories, neutral), OPEN_AT, OPEN_AT, share=0.0)
    files = {
        spec.graph: graph.SerializeToString(),
        spec.tokenizer: serialized,
        spec.prefix: refiner.npz(prefix),
        spec.second_look: json.dumps(asdict(look), indent=2).encode(),
    }
    return refiner.RefinerFiles(
        spec, files, parity, provenance(network), refiner.weights_file(workspace, precision)
    )


def read_template(path: Path | None) -> Template:
    """A template from its file. Raises ExportError."""
    names = [item.name for item in fields(Template)]
    if path is None:
        raise ExportError(
            "a checkpoint that was not trained here has no template; give --template FILE, a JSON "
            f"object with the texts {', '.join(names)}"
        )
    values = read_json(path)
    if set(values) != set(names) or not all(isinstance(text, str) for text in values.values()):
        raise ExportError(f"{path} must hold the texts {', '.join(names)}, and nothing else")
    return Template(**values)


def golden_samples(bundle: Bundle, templates: Templates) -> list[Sample]:
    """Where no pairs are given: the bundle's golden prompts, with a critique, copied."""
    first = next(iter(templates.categories.values()))
    critique = templates.line.format(
        topic=first.topic,
        strength=templates.strength(1.0),
        elements="",
        direction=first.direction,
    )
    return [(golden.prompt, critique, golden.prompt) for golden in bundle.goldens()]


def read_tokenizer(
    folder: Path, serialized: bytes, template: Template, vocabulary: int
) -> LanguageTokenizer:
    """Raises ExportError if the tokenizer does not fit the template or the network."""
    try:
        tokenizer = LanguageTokenizer(serialized, template)
    except BundleError as error:
        raise ExportError(f"{folder / TOKENIZER} with this template: {error}") from error
    check_vocabulary(folder / TOKENIZER, tokenizer.size - 1, vocabulary)
    return tokenizer


def longest_prompt(tokenizer: LanguageTokenizer, context: int) -> int:
    """How many tokens a prompt may have, so that all that follows it fits the context.

    Raises ExportError if that is next to nothing.
    """
    around = len(tokenizer.before_critique([])) + len(tokenizer.after_prompt(""))
    room = min(context - 400, context - around - CRITIQUE_TOKENS - longest_rewrite(0) - LONGEST - 1)
    tokens = min(refiner.PROMPT_TOKENS, room * 2 // 5)
    if tokens < 16:
        raise ExportError(
            f"a context of {context} tokens has no room for a prompt, its critique, its rewrite and "
            f"the template's {around} tokens; shorten the template, or take another checkpoint"
        )
    return tokens


def sample_rows(
    tokenizer: LanguageTokenizer, samples: Sequence[Sample], prompt_tokens: int, context: int
) -> list[tuple[list[int], int]]:
    """The samples that fit, as token ids. Raises ExportError if none does, or a text gets lost."""
    rows = []
    for prompt, critique, rewrite in samples:
        given, back = (
            unicodedata.normalize("NFC", text)
            for text in (prompt, tokenizer.decode(tokenizer.encode(prompt)))
        )
        if given != back:
            raise ExportError(
                f"the tokenizer makes {back[:60]!r} of {given[:60]!r}; a refiner needs one that "
                "keeps every character"
            )
        ids, first = refiner.sample_ids(tokenizer, prompt, critique, rewrite)
        if tokenizer.count(prompt) <= prompt_tokens and len(tokenizer.prefix) + len(ids) < context:
            rows.append((ids, first))
    if not rows:
        raise ExportError(
            f"none of the {len(samples)} samples for the parity gate fits {prompt_tokens} tokens of "
            "prompt; give --pairs with shorter ones"
        )
    return rows


def no_second_look(shape: LlamaShape, categories: int) -> dict[str, Array]:
    """A head of zeros: it says the same of every prompt, and nobody asks it."""
    head: dict[str, Array] = {}
    for name in ("look.mean", "look.deviation"):
        head[name] = np.zeros((shape.hidden, categories), np.float32)
        head[f"{name}.bias"] = np.zeros(categories, np.float32)
    return head


def transformers_tokens(
    folder: Path, prefix: list[int], rows: Sequence[tuple[list[int], int]]
) -> list[list[int]]:
    """The next tokens that transformers' own implementation says, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    found = []
    with torch.inference_mode():
        for ids, first in rows:
            states = model.model(torch.tensor([prefix + ids]), use_cache=False)
            wanted = states.last_hidden_state[0, len(prefix) + first :]
            output = model.get_output_embeddings()
            found.append(
                [t for part in wanted.split(ROWS) for t in output(part).argmax(-1).tolist()]
            )
    del model
    gc.collect()  # its memory is needed for the stages
    return found


def provenance(network: Checkpoint) -> dict[str, Any]:
    """What a refiner was made from, for the manifest."""
    folder = network.tensors.folder
    names = [CONFIG, TOKENIZER, *network.tensors.files]
    return {
        "architecture": network.architecture,
        "files": {name: sha256_of(folder / name) for name in names},
    }

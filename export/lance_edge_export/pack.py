"""Writes a bundle: graphs, tokenizer, taxonomy, calibration, goldens, card and manifest."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lance_edge.bundle import (
    FORMAT,
    MANIFEST,
    Bundle,
    FileEntry,
    Manifest,
    RefinerSpec,
    ScreenerSpec,
    Templates,
    file_entry,
    open_bundle,
)
from lance_edge.errors import ExportError
from lance_edge.pipeline import Pipeline, assemble
from lance_edge.weights import WEIGHTS
from lance_edge_export.place import whole

if TYPE_CHECKING:  # it needs torch
    from lance_edge_export.refiner import RefinerFiles

GOLDENS = "goldens.json"
GRADIENTS = "gradients.json"


def write_bundle(
    out: Path,
    name: str,
    version: str,
    graph: bytes,
    spec: ScreenerSpec,
    described: Mapping[str, bytes],
    parity: dict[str, Any],
    provenance: dict[str, Any],
    golden_prompts: list[str],
) -> None:
    """Write the bundle next to `out` and move it there when it is whole.

    described  contents of tokenizer.json, taxonomy.json and calibration.json

    The goldens are what the packed runtime itself says of `golden_prompts` on this machine.
    """
    files = {
        **described,
        spec.graph: graph,
        GOLDENS: b"[]\n",
    }
    manifest = Manifest(
        FORMAT,
        name,
        version,
        {},
        "taxonomy.json",
        "calibration.json",
        GOLDENS,
        spec,
        parity=parity,
        provenance=provenance,
    )
    files["README.md"] = card(
        manifest, json.loads(files["taxonomy.json"]), json.loads(files["calibration.json"])
    )
    with whole(out) as partial:
        _write(partial, manifest, files)
        files[GOLDENS] = goldens_file(partial, golden_prompts)
        _write(partial, manifest, files)


def add_refiner(
    bundle: Bundle, out: Path, version: str, exported: RefinerFiles, gradients: bytes
) -> None:
    """Write a bundle's copy with a refiner in it next to `out`, and move it there when it is whole."""
    before = bundle.manifest
    replaced = refiner_files(before.refiner) - set(exported.files)
    files = {name: bundle.read(name) for name in before.files if name not in replaced}
    files |= {GRADIENTS: gradients, **exported.files}
    measured = {k: v for k, v in before.parity.items() if not k.startswith("refiner ")}
    manifest = replace(
        before,
        version=version,
        gradients=GRADIENTS,
        refiner=exported.spec,
        provenance={**before.provenance, "refiner": exported.provenance},
        parity={**measured, **{f"refiner {k}": v for k, v in exported.parity.items()}},
    )
    taxonomy, calibration = (json.loads(files[n]) for n in (before.taxonomy, before.calibration))
    files["README.md"] = card(manifest, taxonomy, calibration)
    with whole(out) as partial:
        apart = {}
        if exported.weights is not None:
            shutil.move(exported.weights, partial / WEIGHTS)
            apart[WEIGHTS] = exported.spec.weights
        _write(partial, manifest, files, apart)
        open_bundle(partial).verify()


def read_gradients(bundle: Bundle, path: Path | None) -> tuple[Templates, bytes]:
    """The templates of the gradients and the bytes they were read from: a file's, or the bundle's.

    Raises ExportError if there are none, BundleError if they do not fit the taxonomy.
    """
    if path is not None:
        contents = path.read_bytes()
        return bundle.parse_gradients(path, contents), contents
    name = bundle.manifest.gradients
    if name is None:
        raise ExportError(f"{bundle.path} has no gradients; give --gradients FILE")
    return bundle.gradients(), bundle.read(name)


def refiner_files(spec: RefinerSpec | None) -> set[str]:
    """The files that only a refiner needs."""
    if spec is None:
        return set()
    names = {spec.graph, spec.tokenizer, spec.prefix, spec.second_look, WEIGHTS}
    return names | ({spec.delta} if spec.delta else set())


def goldens_file(folder: Path, prompts: list[str]) -> bytes:
    """The goldens of a bundle that is being made. Raises ExportError if no prompt can be one."""
    # It is not signed yet, whatever its owner's key; and goldens are of the first look alone.
    with assemble(open_bundle(folder), "cpu", looks="1") as pipeline:
        kept = goldens(pipeline, prompts)
    if not kept:
        raise ExportError(
            "none of the golden prompts is short and clear of every threshold on this bundle; export it "
            "with others (--golden-prompts)"
        )
    return json_bytes(kept)


def goldens(pipeline: Pipeline, prompts: list[str]) -> list[dict[str, Any]]:
    """Prompts with the severities and decisions that every machine must reproduce.

    Prompts too close to a threshold are left out: rounding may decide there. So are, where windows are
    read closely, those that are long enough for it: rounding may decide whether they are.
    """
    spec = pipeline.bundle.manifest.screener
    margin = 2 * spec.tolerance
    longest = spec.close.window if spec.close else math.inf
    prompts = [
        prompt
        for prompt in prompts
        if all(len(window.ids) <= longest for window in pipeline.encode(prompt).windows)
    ]
    thresholds = dict(zip(pipeline.policy.categories, pipeline.policy.thresholds, strict=True))
    kept = []
    for prompt, verdict in zip(prompts, pipeline.screen_many(prompts), strict=True):
        if all(abs(value - thresholds[name]) > margin for name, value in verdict.severity.items()):
            severity = {name: round(value, 6) for name, value in verdict.severity.items()}
            kept.append({"prompt": prompt, "decision": verdict.decision, "severity": severity})
    return kept


# Of the model card: what the screener is, where its data is described, what is known of its limits.
OURS = (
    """A screener for prompts to language models: per category a severity in 0..1 with a standard
deviation, and the words that carry it. It reads English; other languages were not trained and
not measured.""",
    "Licences and attributions are in NOTICE of the lance-edge repository.",
    """The rates are in docs/quality.md of the repository,
with the commands that reproduce them. Severities of political opinion, crime fiction
and distress without a plan are the least certain.""",
)
CLASSIFIER = (
    """A screener for prompts to language models, made of a classifier: per category a severity in
0..1, as its own sigmoid or softmax gives it. It names no words, and has no deviation.""",
    "See the classifier's own card for its data, languages and licence.",
    "How often is not measured here; see the classifier's own card.",
)


def card(manifest: Manifest, taxonomy: list[dict[str, Any]], calibration: dict[str, Any]) -> bytes:
    """The bundle's model card."""
    rows = "\n".join(
        f"| {entry['name']} | {entry['title']} | {entry['action']} | {calibration[entry['name']]['threshold']:.3f} |"
        for entry in taxonomy
    )
    stages = "\n".join(
        f"- {stage}: `{json.dumps(figures)}`" for stage, figures in manifest.parity.items()
    )
    sources = ", ".join(manifest.provenance.get("sources", [])) or "not recorded"
    about, made, limits = OURS if "classifier" not in manifest.provenance else CLASSIFIER
    refiner = ""
    if manifest.refiner is not None:
        refiner = f"""
## Refiner
A language model that rewrites flagged prompts of up to {manifest.refiner.prompt_tokens} tokens\
{origin(manifest)} A rewrite can be clumsy or
miss the point; it is given back only if nothing in it is flagged.
"""
    return f"""# {manifest.name} {manifest.version}

{about}

Precision {manifest.screener.precision}; windows of {manifest.screener.window} tokens that share
{manifest.screener.overlap}. Longer prompts are read window by window and never cut.

| category | title | action | threshold |
|---|---|---|---|
{rows}
{refiner}
## Made from
Encoder: {manifest.provenance.get("encoder") or "not recorded"}.
Training data: {sources}. {made}

## Export parity
{stages}

## Limits
It judges the prompt alone, not the answer or the conversation. It is a statistical model: it
misses hazards and flags harmless prompts. {limits}
""".encode()


def origin(manifest: Manifest) -> str:
    """Where a refiner's weights come from, for the card; ends its sentence."""
    assert manifest.refiner is not None
    base = manifest.refiner.base
    if base is None:
        architecture = manifest.provenance.get("refiner", {}).get("architecture", "")
        return f""": the network
of a checkpoint ({architecture}), with its weights in this bundle. It has no second look."""
    return f""", and reads
prompts that the screener leaves open: a low-rank change to {base.package}
({base.member}). Its weights are made by `lance-edge pull`."""


def _write(
    folder: Path,
    manifest: Manifest,
    files: dict[str, bytes],
    apart: Mapping[str, FileEntry] | None = None,
) -> None:
    """`apart` are files that lie there already."""
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    values = asdict(manifest)
    entries = {name: file_entry(contents) for name, contents in files.items()} | dict(apart or {})
    values["files"] = {name: asdict(entry) for name, entry in entries.items()}
    if manifest.refiner is not None:
        values["refiner"]["shape"] = manifest.refiner.shape.essentials()
    (folder / MANIFEST).write_bytes(json_bytes(values))


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

"""Copies of a bundle for other machines: with the refiner's weights inside, nothing is left to pull."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from lance_edge.bundle import MANIFEST, Bundle, RefinerSpec, open_bundle
from lance_edge.cache import CHUNK, weights_path
from lance_edge.errors import BundleCorrupt, InvalidOption, RefinerMissing
from lance_edge.weights import WEIGHTS


def copy_bundle(bundle: Bundle, folder: Path, with_weights: bool) -> None:
    """Copy the files that a bundle's manifest names to a new folder, each verified as it is read.

    with_weights  put the refiner's weights in too, if there is a refiner: the manifest then names
                  them, so the copy's identity differs from the bundle's. Without, none are in it

    Raises RefinerMissing if they were never pulled, BundleFileMissing or BundleCorrupt.
    """
    original = _manifest_bytes(bundle)
    values = json.loads(original)
    files = {name: entry for name, entry in values["files"].items() if name != WEIGHTS}
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_bytes(bundle.read(name))
    spec = bundle.manifest.refiner
    if spec is not None and spec.base is None and not with_weights:
        raise InvalidOption(
            f"the refiner's weights of {bundle.path} lie in the bundle, and no pull can make them; "
            "pack it with them"
        )
    if with_weights and spec is not None:
        _copy_weights(weights_path(bundle, spec), folder / WEIGHTS, spec)
        files[WEIGHTS] = asdict(spec.weights)
    changed = json.dumps({**values, "files": files}, indent=2, ensure_ascii=False) + "\n"
    same = files == values["files"]
    (folder / MANIFEST).write_bytes(original if same else changed.encode())
    open_bundle(folder).verify()


def _manifest_bytes(bundle: Bundle) -> bytes:
    path = bundle.path / MANIFEST
    contents = path.read_bytes()
    if hashlib.sha256(contents).hexdigest() != bundle.sha256:
        raise BundleCorrupt(path, "changed while it was copied", "copy it again")
    return contents


def _copy_weights(source: Path, target: Path, spec: RefinerSpec) -> None:
    """Copy by pieces, hashing as they go: the file is larger than all others together."""
    if not source.is_file():
        raise RefinerMissing(source)
    digest = hashlib.sha256()
    with source.open("rb") as file, target.open("wb") as out:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            out.write(chunk)
    if digest.hexdigest() != spec.weights.sha256:
        raise BundleCorrupt(
            source,
            "does not have the SHA-256 that the manifest says",
            "run `lance-edge pull` again" if spec.base else "copy the bundle again",
        )

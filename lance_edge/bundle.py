"""A directory with all that a deployment needs, read and verified. Knows files, not sessions.

Every file is hashed before its bytes are used, and what was hashed is what is used: the
bytes are read once. Nothing is unpickled and no path leaves the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

from lance_edge.errors import BundleCorrupt, BundleError, BundleFileMissing
from lance_edge.verdict import Decision

FORMAT = 1
MANIFEST = "manifest.json"
PRECISIONS = ("fp32", "fp16", "int8")

T = TypeVar("T")


@dataclass(frozen=True)
class Category:
    """One rejection category of a taxonomy.

    action     what to do with a prompt it flags
    mlcommons  hazards of the MLCommons taxonomy (S1..S14) it overlaps
    openai     categories of OpenAI's moderation API it overlaps
    """

    name: str
    title: str
    action: Decision
    mlcommons: tuple[str, ...] = ()
    openai: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.action not in get_args(Decision):
            raise BundleError(
                f"category {self.name}: {self.action!r} is no action; {get_args(Decision)} are"
            )
        if self.name == "none":
            raise BundleError(
                "a category may not be called `none`: that is the share of no category"
            )


@dataclass(frozen=True)
class Calibration:
    """One category's z' = slope * z + intercept on the latent severity, and its threshold."""

    slope: float
    intercept: float
    threshold: float

    def __post_init__(self) -> None:
        if not self.slope > 0:
            raise BundleError(f"a calibration's slope must be above 0, not {self.slope}")
        if not 0 < self.threshold < 1:
            raise BundleError(f"a threshold must be between 0 and 1, not {self.threshold}")


@dataclass(frozen=True)
class ScreenerSpec:
    """How the screener's graph is to be fed.

    window     tokens it reads at once, special tokens included
    overlap    tokens that neighbouring windows share
    tolerance  how far outputs may be from the goldens on any machine
    """

    graph: str
    tokenizer: str
    precision: str
    window: int
    overlap: int
    tolerance: float

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise BundleError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if not 0 <= self.overlap < self.window - 2:
            raise BundleError(
                f"an overlap of {self.overlap} does not fit a window of {self.window}"
            )


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

    parity      what the export measured, by stage
    provenance  what the models were made from
    """

    format: int
    name: str
    version: str
    files: dict[str, FileEntry]
    taxonomy: str
    calibration: str
    goldens: str
    screener: ScreenerSpec
    parity: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory.

    sha256  of the manifest, which holds the hash of every other file
    """

    path: Path
    sha256: str
    manifest: Manifest
    categories: tuple[Category, ...]
    calibration: dict[str, Calibration]

    def read(self, name: str) -> bytes:
        """A file's verified contents. Raises BundleFileMissing or BundleCorrupt."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path / MANIFEST} names {name} but has no hash for it")
        return _read_verified(self.path, name, entry)

    def verify(self) -> list[str]:
        """Hash every file; returns their names. Raises BundleFileMissing or BundleCorrupt."""
        for name in self.manifest.files:
            self.read(name)
        return list(self.manifest.files)


def default_bundle() -> Path:
    """The folder of the bundle that is installed with the package."""
    return Path(__file__).parent / "bundles" / "default"


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read a bundle's manifest, taxonomy and calibration.

    Raises BundleFileMissing, BundleCorrupt, or BundleError for what this version does not know.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise BundleFileMissing(folder / MANIFEST)
    contents = (folder / MANIFEST).read_bytes()
    manifest = _manifest(folder / MANIFEST, contents)
    bundle = Bundle(folder, hashlib.sha256(contents).hexdigest(), manifest, (), {})
    categories = tuple(
        _build(Category, _lists_to_tuples(entry), folder / manifest.taxonomy)
        for entry in _parse(folder / manifest.taxonomy, bundle.read(manifest.taxonomy), list)
    )
    calibration = {
        name: _build(Calibration, entry, folder / manifest.calibration)
        for name, entry in _parse(
            folder / manifest.calibration, bundle.read(manifest.calibration), dict
        ).items()
    }
    names = [category.name for category in categories]
    if not names or len(set(names)) < len(names):
        raise BundleError(
            f"{folder / manifest.taxonomy} must name at least one category, each once"
        )
    if set(calibration) != set(names):
        odd = ", ".join(sorted(set(calibration) ^ set(names)))
        raise BundleError(f"taxonomy and calibration of {folder} differ in {odd}")
    return Bundle(folder, bundle.sha256, manifest, categories, calibration)


def file_entry(contents: bytes) -> FileEntry:
    """The manifest's record of a file."""
    return FileEntry(hashlib.sha256(contents).hexdigest(), len(contents))


def _manifest(path: Path, contents: bytes) -> Manifest:
    values = _parse(path, contents, dict)
    found = values.get("format")
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        remedy = "install a newer lance-edge" if newer else "export the bundle again"
        raise BundleError(
            f"{path} has bundle format {found!r} and this version reads {FORMAT}; {remedy}"
        )
    for key in ("files", "screener"):
        if not isinstance(values.get(key), dict):
            raise BundleError(f"{path} has no {key!r}")
    entries = {name: _build(FileEntry, entry, path) for name, entry in values["files"].items()}
    for name in entries:
        if Path(name).name != name:
            raise BundleError(f"{path} names {name!r}, which is not a plain file name")
    screener = _build(ScreenerSpec, values["screener"], path)
    return _build(Manifest, {**values, "files": entries, "screener": screener}, path)


def _read_verified(folder: Path, name: str, entry: FileEntry) -> bytes:
    path = folder / name
    if path.is_symlink():
        raise BundleCorrupt(path, "is a symbolic link, which a bundle may not hold")
    if not path.is_file():
        raise BundleFileMissing(path)
    contents = path.read_bytes()
    if len(contents) != entry.bytes:
        raise BundleCorrupt(path, f"has {len(contents)} bytes and the manifest says {entry.bytes}")
    if hashlib.sha256(contents).hexdigest() != entry.sha256:
        raise BundleCorrupt(path, "does not have the SHA-256 that the manifest says")
    return contents


def _parse(path: Path, contents: bytes, kind: type[T]) -> T:
    try:
        value = json.loads(contents)
    except ValueError as error:
        raise BundleCorrupt(path, f"is not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise BundleCorrupt(path, f"holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def _build(kind: type[T], values: Mapping[str, Any], path: Path) -> T:
    """A dataclass from a JSON object; unknown and missing keys are errors."""
    if not isinstance(values, Mapping):
        raise BundleError(f"{path}: {kind.__name__} must be an object, not {values!r}")
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise BundleError(f"{path} has keys this version does not know: {', '.join(unknown)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise BundleError(
            f"{path}: {kind.__name__} is incomplete or ill-typed ({error})"
        ) from error


def _lists_to_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in values.items()
    }

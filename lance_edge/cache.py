"""Where the refiner's weights lie on this machine, and their verified contents."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lance_edge.bundle import Bundle, RefinerSpec
from lance_edge.errors import BundleCorrupt, BundleError, BundleFileMissing, RefinerMissing
from lance_edge.weights import WEIGHTS, Array, Entry, Precision, layout, total_bytes

CHUNK = 2**22  # bytes
RETURN_EVERY = 0.01  # seconds


class MappedArrays(dict[str, Array]):
    """The arrays of a mapped weights file by name."""

    def __init__(self, mapped: mmap.mmap, entries: Sequence[Entry]) -> None:
        super().__init__(
            (
                entry.name,
                np.frombuffer(mapped, entry.dtype, int(np.prod(entry.shape)), entry.offset).reshape(
                    entry.shape
                ),
            )
            for entry in entries
        )
        self._mapped = mapped

    @contextlib.contextmanager
    def being_copied(self) -> Iterator[None]:
        """For the time in which a session makes its own copy of the arrays.

        Otherwise the process would hold both, 138 MB each for the default refiner.
        """
        done = threading.Event()
        returning = threading.Thread(target=self._return_until, args=(done,), daemon=True)
        returning.start()
        try:
            yield
        finally:
            done.set()
            returning.join()

    def _return_until(self, done: threading.Event) -> None:
        finished = False
        while not finished:
            finished = done.wait(RETURN_EVERY)
            return_pages(self._mapped)


def cache_folder() -> Path:
    """Where pulled weights live: $LANCE_EDGE_CACHE, or the platform's cache folder."""
    if chosen := os.environ.get("LANCE_EDGE_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "lance-edge"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/lance-edge"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lance-edge"


def weights_path(bundle: Bundle, spec: RefinerSpec) -> Path:
    """Where a bundle's refiner weights are, or would be: in the bundle, or in the cache."""
    if WEIGHTS in bundle.manifest.files:
        return bundle.path / WEIGHTS
    return cache_folder() / f"refiner-{spec.weights.sha256[:32]}.weights"


def open_weights(bundle: Bundle, spec: RefinerSpec) -> MappedArrays:
    """The weights by name, mapped from their verified file.

    Raises RefinerMissing if they were never pulled, BundleFileMissing if the bundle has lost them,
    BundleCorrupt if they changed since.
    """
    path = weights_path(bundle, spec)
    own = WEIGHTS in bundle.manifest.files
    if own and path.is_symlink():
        raise BundleCorrupt(path, "is a symbolic link, which a bundle may not hold")
    if not path.is_file():
        raise BundleFileMissing(path) if own else RefinerMissing(path)
    size = path.stat().st_size
    # All of what is mapped is hashed at once, and Python is free meanwhile for other threads.
    mapped = map_file(path) if size and size == spec.weights.bytes else None
    if mapped is None or hashlib.sha256(mapped).hexdigest() != spec.weights.sha256:
        remedy = "copy or export the bundle again" if own else "run `lance-edge pull` again"
        raise BundleCorrupt(path, "does not have the SHA-256 that the manifest says", remedy)
    entries = layout(spec.shape, len(bundle.categories), precision_of(spec))
    if total_bytes(entries) != size:
        raise BundleCorrupt(path, f"has {size} bytes and its layout {total_bytes(entries)}")
    return MappedArrays(mapped, entries)


def map_weights(path: Path, entries: Sequence[Entry]) -> MappedArrays:
    """The arrays of a weights file by name, mapped."""
    return MappedArrays(map_file(path), entries)


def return_pages(mapped: mmap.mmap) -> None:
    """Give back the memory that what was read of a mapped file takes, where the system can do that.

    Read again, it comes from the file.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        with contextlib.suppress(OSError):  # pages that are locked stay
            mapped.madvise(mmap.MADV_DONTNEED)


def map_file(path: Path) -> mmap.mmap:
    """The file's contents, mapped; what is written to them stays in this process."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def is_whole(path: Path, spec: RefinerSpec) -> bool:
    """Whether a file has the size and hash that the manifest gives for the weights."""
    if path.stat().st_size != spec.weights.bytes:
        return False
    return sha256_of(path) == spec.weights.sha256


def precision_of(spec: RefinerSpec) -> Precision:
    """The precision of the weights. Raises BundleError for one that cannot be made here."""
    if spec.precision == "fp16":
        raise BundleError("a refiner in fp16 cannot be made here; it is fp32 or int8")
    return "int8" if spec.precision == "int8" else "fp32"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

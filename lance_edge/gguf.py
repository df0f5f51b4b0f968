"""Reads the weights of a GGUF file as float32 arrays. Knows the format, not the network.

Format: the GGUF specification of the ggml project, version 3; block layouts of its
quantised types Q8_0 and Q4_1 (32 weights to a block).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lance_edge.errors import BaseCorrupt

# What reading lengths and kinds from damaged bytes can end in.
_DAMAGE = (
    struct.error,
    ArithmeticError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)

Float32Array = npt.NDArray[np.float32]

BLOCK = 32  # weights
_SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")
_STRING, _ARRAY = 8, 9
_F32, _F16, _Q4_1, _Q8_0 = 0, 1, 3, 8


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]  # rows first, as numpy has it
    kind: int
    offset: int


class Gguf:
    """A GGUF file's metadata, and its tensors by name, each dequantised when it is asked for."""

    def __init__(self, contents: memoryview) -> None:
        """Raises BaseCorrupt if this is no GGUF file of version 2 or 3."""
        self._contents = contents
        try:
            self.metadata, self._entries, self._data = _parse(contents)
        except _DAMAGE as error:
            raise BaseCorrupt(f"the GGUF file ends early or is damaged ({error})") from error

    @property
    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor names and shapes."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def tensor(self, name: str) -> Float32Array:
        """One tensor as float32. Raises BaseCorrupt if it is missing or of a type we cannot read."""
        entry = self._entries.get(name)
        if entry is None:
            raise BaseCorrupt(f"the GGUF file has no tensor {name!r}")
        count = math.prod(entry.shape)
        data = self._contents[self._data + entry.offset :]
        try:
            return _dequantise(data, entry.kind, count).reshape(entry.shape)
        except _DAMAGE as error:
            raise BaseCorrupt(f"tensor {name!r} of the GGUF file is damaged ({error})") from error


def _parse(contents: memoryview) -> tuple[dict[str, Any], dict[str, _Entry], int]:
    magic, version, tensors, pairs = struct.unpack_from("<4sIQQ", contents, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise BaseCorrupt("this is no GGUF file of version 2 or 3")
    reader = _Reader(contents, 24)
    metadata = {}
    for _ in range(pairs):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("<I"))
    entries = {}
    for _ in range(tensors):
        name = reader.string()
        shape = [reader.scalar("<Q") for _ in range(reader.scalar("<I"))]
        entries[name] = _Entry(tuple(reversed(shape)), reader.scalar("<I"), reader.scalar("<Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    return metadata, entries, -(-reader.position // alignment) * alignment


class _Reader:
    def __init__(self, contents: memoryview, position: int) -> None:
        self.contents, self.position = contents, position

    def scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.contents, self.position)
        self.position += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.contents):
            raise ValueError("a text in it has no end")
        return bytes(self.contents[start : self.position]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            return [self.value(item) for _ in range(count)]
        return self.scalar(_SCALARS[kind])


def _dequantise(data: memoryview, kind: int, count: int) -> Float32Array:
    if kind == _F32:
        return np.frombuffer(data, "<f4", count).astype(np.float32)
    if kind == _F16:
        return np.frombuffer(data, "<f2", count).astype(np.float32)
    if kind == _Q8_0:
        layout = np.dtype([("scale", "<f2"), ("q", "i1", BLOCK)])
        blocks = np.frombuffer(data, layout, count // BLOCK)
        eight: Float32Array = blocks["scale"].astype(np.float32)[:, None] * blocks["q"].astype("f4")
        return eight
    if kind == _Q4_1:
        layout = np.dtype([("scale", "<f2"), ("least", "<f2"), ("q", "u1", BLOCK // 2)])
        blocks = np.frombuffer(data, layout, count // BLOCK)
        nibbles = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], 1).astype(np.float32)
        scale, least = (blocks[key].astype(np.float32)[:, None] for key in ("scale", "least"))
        four: Float32Array = scale * nibbles + least
        return four
    raise ValueError(f"its type {kind} is not one of F32, F16, Q8_0 and Q4_1")

"""The refiner's weights: how they lie in one file, and how they are made from base and delta.

Everything here is exact, so that every machine makes the same bytes and one hash can vouch for
them: products of int8 factors stay below 2^24, where float32 holds every integer and the order
of summation does not matter; all else is element by element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lance_edge.gguf import Float32Array
from lance_edge.llama import HEAD_NORMS, LINEARS, POST_NORMS, LlamaShape, Source

Array = npt.NDArray[Any]
Precision = Literal["fp32", "int8"]

WEIGHTS = "refiner.weights"  # the file's name, in a bundle and in the graph
ALIGNMENT = 64  # bytes
CHUNK = 4096  # columns that are quantised at once: an embedding is large
# Weights and activations are both -LEVELS..LEVELS: AVX2 adds pairs of u8 x s8 products in 16 bits,
# and 2 * 180 * 90 just fits. Halving one side for a full 8 bits of the other would lose more.
LEVELS = 90

# Products that read the same input are one: name -> its parts, side by side.
PACKED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NORM_BEFORE = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}


@dataclass(frozen=True)
class Entry:
    """Where one array lies in the weights file; offset in bytes."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def layout(shape: LlamaShape, categories: int, precision: Precision) -> list[Entry]:
    """The arrays of a weights file in order; matrices are [in, out]."""
    entries: list[Entry] = []
    end = 0

    def add(name: str, dtype: str, *sizes: int) -> None:
        nonlocal end
        entry = Entry(name, np.dtype(dtype), sizes, -(-end // ALIGNMENT) * ALIGNMENT)
        entries.append(entry)
        end = entry.offset + entry.bytes

    def add_matrix(name: str, rows: int, columns: int) -> None:
        add(name, "f4" if precision == "fp32" else "i1", rows, columns)
        if precision == "int8":
            add(f"{name}.scale", "f4", columns)

    turn = (shape.hidden,) * (2 if shape.rotatable else 1)
    add_matrix("embedding", shape.hidden, shape.vocabulary)
    if not shape.tied:
        add_matrix("output", shape.hidden, shape.vocabulary)
    add("enter", "f4", *turn)
    for layer in range(shape.layers):
        for packed, (rows, columns) in matrix_sizes(shape).items():
            add_matrix(f"{layer}.{packed}", rows, columns)
            if packed in shape.biases:
                add(f"{layer}.{packed}.bias", "f4", columns)
        for name in HEAD_NORMS if shape.head_norms else ():
            add(f"{layer}.{name}", "f4", shape.head_size)
        for name in POST_NORMS if shape.post_norms else ():
            add(f"{layer}.{name}", "f4", shape.hidden)
    add("leave", "f4", *turn)
    for name in ("look.mean", "look.deviation"):
        add(name, "f4", shape.hidden, categories)
        add(f"{name}.bias", "f4", categories)
    return entries


def matrix_sizes(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    """(in, out) of each packed product of a layer."""
    kv = shape.kv_heads * shape.head_size
    return {
        "qkv": (shape.hidden, shape.heads * shape.head_size + 2 * kv),
        "o": (shape.heads * shape.head_size, shape.hidden),
        "gate_up": (shape.hidden, 2 * shape.intermediate),
        "down": (shape.intermediate, shape.hidden),
    }


def total_bytes(entries: list[Entry]) -> int:
    """The size of a weights file."""
    return entries[-1].offset + entries[-1].bytes


def contents(
    entries: list[Entry], made: Iterable[tuple[str, Array]]
) -> Iterator[tuple[Entry, bytes | memoryview]]:
    """The bytes of a weights file, one array after the other, each with the gap before it."""
    end = 0
    for entry, (name, array) in zip(entries, made, strict=True):
        assert (entry.name, entry.shape, entry.dtype) == (name, array.shape, array.dtype)
        yield entry, b"\0" * (entry.offset - end)
        yield entry, np.ascontiguousarray(array).data.cast("B")
        end = entry.offset + entry.bytes


def make_weights(
    base: Source, delta: Mapping[str, Array], precision: Precision
) -> Iterator[tuple[str, Array]]:
    """The arrays of a weights file in the layout's order, made one by one.

    The residual stream and the attention's values are rotated (Ashkboos et al., "QuaRot", NeurIPS
    2024): the network computes the same, but no channel stands out, so int8 loses less. What the
    norms scale by is folded into the products that follow them. Where the stream cannot be
    rotated, what these products read is, block by block, as the graph runs.

    delta  per changed layer "{layer}.{name}.a" int8 [rank, in] with ".a_scale" [in], ".b" int8
           [out, rank] with ".b_scale" [out]; "look.*"; and "embedding.balance" [hidden]: the
           embedding is multiplied by it and what it meets divided, so that both quantise well
    """
    shape = base.shape
    balance: Float32Array = delta.get("embedding.balance", np.ones(shape.hidden, np.float32))
    yield from _matrix("embedding", _balanced(base.embedding(), balance), precision)
    if not shape.tied:
        yield from _matrix("output", _balanced(base.output(), balance), precision)
    enter = np.divide(np.float32(shape.embedding_scale), balance, dtype=np.float32)
    identity: Float32Array = np.eye(shape.hidden, dtype=np.float32)
    yield "enter", rotate(identity * enter, 1) if shape.rotatable else enter
    for layer in range(shape.layers):
        yield from _layer(base, delta, layer, precision)
    leave = np.divide(base.final_norm(), balance, dtype=np.float32)
    yield "leave", rotate(identity * leave, 0) if shape.rotatable else leave
    for name in ("look.mean", "look.deviation"):
        yield name, delta[name] * balance[:, None]
        yield f"{name}.bias", delta[f"{name}.bias"]


def _layer(
    base: Source, delta: Mapping[str, Array], layer: int, precision: Precision
) -> Iterator[tuple[str, Array]]:
    shape = base.shape
    parts = {name: merge(base.linear(layer, name), delta, f"{layer}.{name}").T for name in LINEARS}
    for name, norm in NORM_BEFORE.items():
        scale = base.norm(layer, norm)[:, None]
        for part in PACKED[name]:
            parts[part] = _turn_read(parts[part] * scale, shape)
    value, out = parts["self_attn.v_proj"], parts["self_attn.o_proj"]
    parts["self_attn.v_proj"] = rotate_blocks(value, value_block(shape), 1)
    parts["self_attn.o_proj"] = _turn_written(rotate_blocks(out, value_block(shape), 0), shape)
    # The graph rotates the input of this one as it runs: the gate stands before it.
    down = rotate_blocks(parts["mlp.down_proj"], gate_block(shape), 0)
    parts["mlp.down_proj"] = _turn_written(down, shape)
    for packed, names in PACKED.items():
        matrix = np.concatenate([parts[name] for name in names], 1)
        yield from _matrix(f"{layer}.{packed}", matrix, precision)
        if packed in shape.biases:
            yield f"{layer}.{packed}.bias", np.concatenate([_bias(base, layer, n) for n in names])
    for name in HEAD_NORMS if shape.head_norms else ():
        yield f"{layer}.{name}", base.norm(layer, name)
    for name in POST_NORMS if shape.post_norms else ():
        yield f"{layer}.{name}", base.norm(layer, name)


def _turn_read(matrix: Float32Array, shape: LlamaShape) -> Float32Array:
    """A matrix whose rows meet the stream."""
    return rotate(matrix, 0) if shape.rotatable else rotate_blocks(matrix, hidden_block(shape), 0)


def _turn_written(matrix: Float32Array, shape: LlamaShape) -> Float32Array:
    """A matrix whose columns are added to the stream."""
    return rotate(matrix, 1) if shape.rotatable else matrix


def _bias(base: Source, layer: int, name: str) -> Float32Array:
    """What a product adds, turned as its columns are."""
    row = base.bias(layer, name).reshape(1, -1)
    if name == "self_attn.v_proj":
        row = rotate_blocks(row, value_block(base.shape), 1)
    elif name in ("self_attn.o_proj", "mlp.down_proj"):
        row = _turn_written(row, base.shape)
    return row.reshape(-1)


def _balanced(embedding: Float32Array, balance: Float32Array) -> Float32Array:
    """[vocabulary, hidden] -> [hidden, vocabulary]"""
    if (balance == 1).all():
        return embedding.T  # without a copy
    result: Float32Array = embedding.T * balance[:, None]
    return result


def rotate(matrix: Float32Array, axis: int) -> Float32Array:
    """The matrix times an orthogonal, symmetric one along an axis: a Hadamard matrix within
    blocks of a power of two, and a reflection across the blocks if there are several."""
    length = matrix.shape[axis]
    block = length & -length
    moved = np.moveaxis(matrix, axis, -1)
    blocks = hadamard(moved.reshape(*moved.shape[:-1], length // block, block))
    if length > block:
        total = blocks[..., 0, :]
        for index in range(1, length // block):
            total = total + blocks[..., index, :]
        blocks = blocks - np.float32(2 * block / length) * total[..., None, :]
    return np.ascontiguousarray(np.moveaxis(blocks.reshape(moved.shape), -1, axis))


def rotate_blocks(matrix: Float32Array, block: int, axis: int) -> Float32Array:
    """Each block of so many neighbours along an axis times a Hadamard matrix."""
    moved = np.moveaxis(matrix, axis, -1)
    blocks = hadamard(moved.reshape(*moved.shape[:-1], -1, block))
    return np.ascontiguousarray(np.moveaxis(blocks.reshape(moved.shape), -1, axis))


def value_block(shape: LlamaShape) -> int:
    """In blocks of how many a head's values are rotated: the largest power of two that divides
    them."""
    return shape.head_size & -shape.head_size


def hidden_block(shape: LlamaShape) -> int:
    """In blocks of how many a stream that is not rotated itself is rotated for a product."""
    return math.gcd(shape.hidden, 128)


def gate_block(shape: LlamaShape) -> int:
    """In blocks of how many the gated activations are rotated."""
    return math.gcd(shape.intermediate, 128)


def hadamard(x: Float32Array) -> Float32Array:
    """The normalised Walsh-Hadamard transform of the last axis, a power of two long.

    Sums in a fixed order, so that the result is the same on every machine.
    """
    length = x.shape[-1]
    step = 1
    while step < length:
        pairs = x.reshape(*x.shape[:-1], length // (2 * step), 2, step)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([low + high, low - high], -2).reshape(x.shape)
        step *= 2
    result: Float32Array = x * np.float32(1 / math.sqrt(length))
    return result


def merge(weight: Float32Array, delta: Mapping[str, Array], name: str) -> Float32Array:
    """The weight with its low-rank delta, if it has one  [out, in]"""
    if f"{name}.a" not in delta:
        return weight
    product = delta[f"{name}.b"].astype(np.float32) @ delta[f"{name}.a"].astype(np.float32)
    scaled = product * delta[f"{name}.b_scale"][:, None] * delta[f"{name}.a_scale"]
    merged: Float32Array = weight + scaled
    return merged


def quantise(matrix: Float32Array) -> tuple[npt.NDArray[np.int8], Float32Array]:
    """A matrix [in, out] as int8 with one scale a column; symmetric, rounded to nearest."""
    quantised = np.empty(matrix.shape, np.int8)
    scale = np.empty(matrix.shape[1], np.float32)
    for start in range(0, matrix.shape[1], CHUNK):
        columns = slice(start, start + CHUNK)
        largest = np.abs(matrix[:, columns]).max(0) / np.float32(LEVELS)
        scale[columns] = np.where(largest > 0, largest, np.float32(1))
        quantised[:, columns] = np.rint(matrix[:, columns] / scale[columns])
    return quantised, scale


def _matrix(name: str, matrix: Float32Array, precision: Precision) -> Iterator[tuple[str, Array]]:
    if precision == "fp32":
        yield name, np.ascontiguousarray(matrix)
        return
    quantised, scale = quantise(matrix)
    yield name, np.ascontiguousarray(quantised)
    yield f"{name}.scale", scale

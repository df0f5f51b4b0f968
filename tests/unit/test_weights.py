"""The refiner's weights: their layout, and that they are made exactly and the same everywhere."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tiny_refiner
from tiny_refiner import SHAPE

from lance_edge.gguf import Gguf
from lance_edge.llama import LINEARS, GgufLlama
from lance_edge.weights import (
    ALIGNMENT,
    LEVELS,
    PACKED,
    Array,
    Precision,
    gate_block,
    hadamard,
    layout,
    make_weights,
    matrix_sizes,
    merge,
    quantise,
    rotate,
    rotate_blocks,
    total_bytes,
)

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
CATEGORIES = 3


def random(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def made(precision: Precision) -> dict[str, Array]:
    return dict(make_weights(tiny_refiner.network(), tiny_refiner.delta(), precision))


# Layout


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("categories", [1, 3, 14])
def test_arrays_lie_aligned_and_apart(precision: Precision, categories: int) -> None:
    entries = layout(SHAPE, categories, precision)
    assert entries[0].offset == 0
    for before, after in pairwise(entries):
        end = before.offset + before.bytes
        assert after.offset % ALIGNMENT == 0
        assert end <= after.offset < end + ALIGNMENT
    assert total_bytes(entries) == entries[-1].offset + entries[-1].bytes
    assert len({entry.name for entry in entries}) == len(entries)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_arrays_made_are_those_of_the_layout(precision: Precision) -> None:
    network, delta = tiny_refiner.network(), tiny_refiner.delta()
    found = [
        (name, array.shape, array.dtype) for name, array in make_weights(network, delta, precision)
    ]
    expected = [
        (entry.name, entry.shape, entry.dtype) for entry in layout(SHAPE, CATEGORIES, precision)
    ]
    assert found == expected


def test_int8_matrices_have_a_scale_for_each_column() -> None:
    entries = {entry.name: entry for entry in layout(SHAPE, CATEGORIES, "int8")}
    matrices = [name for name, entry in entries.items() if entry.dtype == np.int8]
    assert len(matrices) == 1 + SHAPE.layers * len(PACKED)
    for name in matrices:
        assert entries[f"{name}.scale"].shape == entries[name].shape[1:]
    assert not any(name.endswith(".scale") for name in made("fp32"))


def test_packed_products_hold_their_parts_side_by_side() -> None:
    sizes = matrix_sizes(SHAPE)
    checkpoint = tiny_refiner.checkpoint()
    for packed, names in PACKED.items():
        parts = [checkpoint[f"model.layers.0.{name}"].shape for name in names]
        assert {columns for _, columns in parts} == {sizes[packed][0]}
        assert sum(rows for rows, _ in parts) == sizes[packed][1]
    assert sorted(name for names in PACKED.values() for name in names) == sorted(LINEARS)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_base_and_delta_make_the_same_bytes(precision: Precision) -> None:
    fresh = GgufLlama(Gguf(memoryview(tiny_refiner.base_gguf())))
    delta = {name: array.copy() for name, array in reversed(tiny_refiner.delta().items())}
    again = dict(make_weights(fresh, delta, precision))
    for name, array in made(precision).items():
        assert array.tobytes() == again[name].tobytes(), name
        assert np.isfinite(array).all(), name


def test_making_weights_changes_nothing_it_was_given() -> None:
    delta = tiny_refiner.delta()
    before = {name: array.copy() for name, array in delta.items()}
    made("int8")
    assert delta.keys() == before.keys()
    for name, array in delta.items():
        np.testing.assert_array_equal(array, before[name])


# Rotations


@pytest.mark.parametrize("size", [1, 2, 4, 32, 64, 128, 512])
def test_hadamard_is_orthogonal_and_symmetric(size: int) -> None:
    turn = hadamard(np.eye(size, dtype=np.float32))
    np.testing.assert_array_equal(turn, turn.T)
    np.testing.assert_allclose(turn @ turn.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(np.abs(turn), size**-0.5, rtol=1e-6)


def test_hadamard_is_that_of_sylvester() -> None:
    two = np.array([[1, 1], [1, -1]])
    expected = np.kron(np.kron(two, two), two) / 8**0.5
    np.testing.assert_allclose(hadamard(np.eye(8, dtype=np.float32)), expected, atol=1e-7)


# 96 and 576 are a power of two times an odd number; 15 is all odd.
@pytest.mark.parametrize("size", [1, 2, 3, 8, 15, 24, 96, 128, 576])
@pytest.mark.parametrize("axis", [0, 1])
def test_rotate_is_its_own_inverse(size: int, axis: int) -> None:
    matrix = random(*((size, 7) if axis == 0 else (7, size)))
    turned = rotate(matrix, axis)
    assert turned.shape == matrix.shape
    assert turned.dtype == np.float32
    np.testing.assert_allclose(rotate(turned, axis), matrix, atol=1e-5)
    lengths = np.linalg.norm(turned, axis=axis), np.linalg.norm(matrix, axis=axis)
    np.testing.assert_allclose(*lengths, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 15, 96, 128, 576])
def test_rotate_is_orthogonal_and_symmetric(size: int) -> None:
    turn = rotate(np.eye(size, dtype=np.float32), 1)
    np.testing.assert_allclose(turn, turn.T, atol=1e-6)
    np.testing.assert_allclose(turn @ turn.T, np.eye(size), atol=1e-5)


@pytest.mark.parametrize(("size", "block"), [(8, 8), (96, 32), (96, 1), (128, 64)])
def test_rotate_blocks_turns_each_block_by_itself(size: int, block: int) -> None:
    matrix = random(size, 5)
    turned = rotate_blocks(matrix, block, 0)
    turn = hadamard(np.eye(block, dtype=np.float32))
    for start in range(0, size, block):
        rows = slice(start, start + block)
        np.testing.assert_allclose(turned[rows], turn @ matrix[rows], atol=1e-5)
    np.testing.assert_allclose(rotate_blocks(turned, block, 0), matrix, atol=1e-5)


def test_the_gate_is_rotated_in_blocks_of_a_power_of_two() -> None:
    assert gate_block(SHAPE) == 128
    for block in (gate_block(SHAPE), SHAPE.head_size):
        assert block & (block - 1) == 0
        assert SHAPE.intermediate % gate_block(SHAPE) == 0


def test_a_rotation_spreads_what_stands_out() -> None:
    """That is what it is for: int8 loses less."""
    matrix = random(96, 4)
    matrix[17] *= 100
    assert np.abs(rotate(matrix, 0)).max() < np.abs(matrix).max() / 3


# Deltas


def test_merge_adds_the_product_of_the_scaled_factors() -> None:
    checkpoint, delta = tiny_refiner.checkpoint(), tiny_refiner.delta()
    layer = SHAPE.layers - 1
    for name in LINEARS:
        weight, key = checkpoint[f"model.layers.{layer}.{name}"], f"{layer}.{name}"
        b = delta[f"{key}.b"] * delta[f"{key}.b_scale"][:, None].astype(np.float64)
        a = delta[f"{key}.a"] * delta[f"{key}.a_scale"].astype(np.float64)
        merged = merge(weight, delta, key)
        assert merged.dtype == np.float32
        np.testing.assert_allclose(merged, weight + b @ a, atol=1e-6)
        assert np.abs(merged - weight).max() > 0.01


def test_a_layer_without_a_delta_stays_as_it_is() -> None:
    weight = tiny_refiner.checkpoint()["model.layers.0.mlp.up_proj"]
    np.testing.assert_array_equal(merge(weight, tiny_refiner.delta(), "0.mlp.up_proj"), weight)


def test_the_largest_factors_are_summed_exactly() -> None:
    """Below 2^24 float32 holds every integer, so no order of summation matters."""
    rank = 1000
    delta: dict[str, Array] = {
        "x.a": np.full((rank, 32), 127, np.int8),
        "x.b": np.full((32, rank), -127, np.int8),
        "x.a_scale": np.ones(32, np.float32),
        "x.b_scale": np.ones(32, np.float32),
    }
    merged = merge(np.zeros((32, 32), np.float32), delta, "x")
    np.testing.assert_array_equal(merged, -127 * 127 * rank)


# int8


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e20])
@pytest.mark.parametrize("seed", range(5))
def test_quantised_values_are_at_most_half_a_step_off(scale: float, seed: int) -> None:
    matrix = random(96, 40, seed=seed) * np.float32(scale)
    matrix[:, 3] = 0
    matrix[:, 4] *= np.linspace(0, 1, 96, dtype=np.float32) ** 8  # few large, many small
    quantised, steps = quantise(matrix)
    assert quantised.dtype == np.int8
    assert (str(steps.dtype), steps.shape) == ("float32", (40,))
    assert np.abs(quantised.astype(int)).max() == LEVELS
    error = np.abs(quantised * steps.astype(np.float64) - matrix)
    assert (error <= 0.5 * steps * (1 + 1e-5)).all()
    assert not quantised[:, 3].any()


def test_int8_weights_are_the_fp32_weights_rounded() -> None:
    exact, rounded = made("fp32"), made("int8")
    for name, array in rounded.items():
        if array.dtype == np.int8:
            step = rounded[f"{name}.scale"]
            assert np.abs(array.astype(int)).max() <= LEVELS
            assert (np.abs(array * step - exact[name]) <= 0.5001 * step).all(), name
        elif not name.endswith(".scale"):
            np.testing.assert_array_equal(array, exact[name])

"""A trained low-rank delta as exact int8 factors: what a bundle holds of a refiner."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lance_edge.gguf import Float32Array
from lance_edge.weights import Array

LAYER = "model.layers."


def factors(trained: Mapping[str, Float32Array], seed: int = 0) -> dict[str, Array]:
    """ "model.layers.3.mlp.up_proj.a" and ".b" -> "3.mlp.up_proj.a", ".a_scale", ".b", ...

    B A is factored anew so that every component has the same size: then 8 bits serve them all.
    """
    rng = np.random.default_rng(seed)
    result: dict[str, Array] = {}
    for name in sorted(key[:-2] for key in trained if key.endswith(".a")):
        a, b = balanced(trained[f"{name}.a"], trained[f"{name}.b"], rng)
        short = name.removeprefix(LAYER)
        for side, matrix, axis in (("a", a, 0), ("b", b, 1)):
            scale = np.abs(matrix).max(axis, keepdims=True) / 127
            scale = np.where(scale > 0, scale, 1)
            result[f"{short}.{side}"] = np.rint(matrix / scale).astype(np.int8)
            result[f"{short}.{side}_scale"] = scale.reshape(-1).astype(np.float32)
    return result


def balanced(
    a: Float32Array, b: Float32Array, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A' [rank, in] and B' [out, rank] with the same product and components of one size."""
    left, left_r = np.linalg.qr(b.astype(np.float64))
    right, right_r = np.linalg.qr(a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(left_r @ right_r.T)
    turn, _ = np.linalg.qr(rng.standard_normal((len(s), len(s))))
    root = np.sqrt(s)
    return turn.T @ (root[:, None] * vt) @ right.T, left @ (u * root) @ turn

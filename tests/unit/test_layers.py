"""Which prompts choose scales, and which judge them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_edge_export.layers import relative, set_apart


@given(st.integers(0, 60), st.integers(1, 20))
def test_what_is_set_apart(items: int, count: int) -> None:
    chosen, others = set_apart(range(items), count)
    assert len(chosen) == min(items, count)
    assert sorted(chosen + others) == list(range(items))
    assert chosen == sorted(chosen) and others == sorted(others)


def test_it_comes_from_all_over_the_items() -> None:
    assert set_apart("abcdefgh", 4) == (list("aceg"), list("bdfh"))
    assert set_apart("abc", 4) == (list("abc"), [])
    assert set_apart("abcdefg", 4) == (list("abdf"), list("ceg"))


@pytest.mark.parametrize(
    ("moved", "size", "error"), [(1.0, 4.0, 0.5), (0.0, 0.0, 0.0), (1.0, 0.0, float("inf"))]
)
def test_the_error_of_a_layer_that_gives_nothing(moved: float, size: float, error: float) -> None:
    assert relative(moved, size) == error

"""Errors reach other processes as they are."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from lance_edge.errors import (
    BundleCorrupt,
    BundleFileMissing,
    InvalidPrompt,
    LanceError,
    ParityError,
    RefinerMissing,
)

ERRORS = [
    BundleCorrupt(Path("a"), "is bad"),
    BundleFileMissing(Path("b")),
    RefinerMissing(Path("c")),
    InvalidPrompt("it is empty"),
    ParityError("too far"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_can_be_pickled(error: LanceError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error) != ""

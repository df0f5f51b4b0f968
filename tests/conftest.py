"""Fixtures that every test may use. `tiny` explains the bundle's arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny

import lance_edge


@pytest.fixture(scope="module", autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """In modules that train: models so small only wait for each other's threads."""
    if request.node.get_closest_marker("train") is None or find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny bundle; tests must not change it."""
    return tiny.write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def guard(tiny_bundle: Path) -> Iterator[lance_edge.Pipeline]:
    """A pipeline on the tiny bundle."""
    with lance_edge.load(tiny_bundle, device="cpu") as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def default_guard() -> Iterator[lance_edge.Pipeline]:
    """A first look by the bundle that is installed with the package, pulled refiner or not."""
    with lance_edge.load(device="cpu", looks="1") as pipeline:
        yield pipeline

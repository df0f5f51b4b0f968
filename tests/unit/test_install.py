"""What an installed package promises before a model is loaded: light imports, no network, one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HEAVY = ("torch", "onnxruntime", "transformers", "onnx", "lance_edge_training", "lance_edge_export")

# package -> what it may import of ours; the order of the rooms, bottom up
ROOMS = {
    "lance_edge_engines": set(),
    "lance_edge": {"lance_edge_engines"},
    "lance_edge_training": {"lance_edge_engines", "lance_edge"},
    "lance_edge_export": {"lance_edge_engines", "lance_edge", "lance_edge_training"},
}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "statement", ["import lance_edge", "from lance_edge import load", "import lance_edge.cli"]
)
def test_imports_are_light(statement: str) -> None:
    done = python(f"{statement}; import sys; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()).isdisjoint(HEAVY)


def test_every_public_name_exists() -> None:
    code = "import lance_edge; [getattr(lance_edge, name) for name in lance_edge.__all__]"
    assert python(code).returncode == 0
    assert "has no attribute 'nothing'" in python("import lance_edge; lance_edge.nothing").stderr


def test_works_with_sockets_blocked(tiny_bundle: Path) -> None:
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise SystemExit("the network was used")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
from lance_edge.cli import main
main()
"""
    done = python(code, "screen", "the bomb", "--bundle", str(tiny_bundle))
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("rewrite")
    blocked = python(code.replace("from lance_edge.cli import main\nmain()", "socket.socket()"))
    assert "the network was used" in blocked.stderr  # the trap itself works


@pytest.mark.parametrize("package", ROOMS)
def test_imports_point_downward(package: str) -> None:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    for path in Path(spec.submodule_search_locations[0]).rglob("*.py"):
        imported = imported_packages(ast.parse(path.read_text(encoding="utf-8")))
        assert imported & set(ROOMS) <= ROOMS[package] | {package}, path
        if package in ("lance_edge_engines", "lance_edge"):
            assert imported.isdisjoint({"torch", "transformers", "onnx"}), path


def imported_packages(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ROOMS)
def test_packages_are_typed(package: str) -> None:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    assert (Path(spec.submodule_search_locations[0]) / "py.typed").is_file()

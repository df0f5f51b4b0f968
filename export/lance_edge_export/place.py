"""Folders that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A path next to `out` for a new folder, which takes its place if the block ends without an error."""
    out = out.resolve()  # so that it has a name, and a folder that it lies in
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        move_into_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_into_place(partial: Path, out: Path) -> None:
    """Put a finished folder in the place of another, which stays if that fails."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    try:
        partial.replace(out)
    except OSError:
        if old.exists():
            old.replace(out)
        raise
    shutil.rmtree(old, ignore_errors=True)

"""Folders that appear whole or not at all, and never in the place of somebody else's."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lance_edge.bundle import MANIFEST
from lance_edge.errors import InvalidOption
from lance_edge.signature import SIGNATURE

PARTIAL, OLD = "partial-", "old-"  # of hidden folders next to the one that is written


@contextmanager
def whole(out: Path, new: bool = False) -> Iterator[Path]:
    """A new folder next to `out`, which takes its place if the block ends without an error.

    new  whether nothing may be replaced. Raises InvalidOption if there is something by then
    """
    out = out.resolve()  # so that it has a name, and a folder that it lies in
    out.parent.mkdir(parents=True, exist_ok=True)
    with _at_work(out):
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.{PARTIAL}", dir=out.parent))
        try:
            partial.chmod(0o755)  # mkdtemp lets only its owner in
            yield partial
            if new:
                move_where_nothing_is(partial, out)
            else:
                move_into_place(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def move_into_place(partial: Path, out: Path) -> None:
    """Put a finished folder in the place of another, which stays if that fails."""
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.{OLD}", dir=out.parent)) / out.name
    try:
        if out.exists():
            out.replace(old)
        partial.replace(out)
    except BaseException:  # also of a person who interrupts
        if old.exists() and not out.exists():
            old.replace(out)
        raise
    finally:
        if out.exists() or not old.exists():
            shutil.rmtree(old.parent, ignore_errors=True)


def move_where_nothing_is(partial: Path, out: Path) -> None:
    """Give a finished folder its name. Raises InvalidOption if something has it by now."""
    check_new(out)
    try:
        partial.rename(out)
    except OSError:
        check_new(out)  # it came in between: a folder with files is not replaced
        raise


def check_replaceable(out: Path, found_ours: bool, what: str) -> None:
    """Raise InvalidOption where something else than `what` would be lost."""
    if not out.exists() or (out.is_dir() and (found_ours or not any(out.iterdir()))):
        return
    raise InvalidOption(f"--out {out} holds something else than {what}; name a new folder")


def check_new(out: Path) -> None:
    """Raise InvalidOption if there is something already."""
    if out.exists():
        raise InvalidOption(f"{out} exists; name another folder, or remove it first")


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a bundle's files and nothing beside them."""
    try:
        values = json.loads((folder / MANIFEST).read_bytes())
        named = {MANIFEST, SIGNATURE, *values["files"]}
        has_format = isinstance(values["format"], int)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    alone = all(path.name in named and not path.is_dir() for path in folder.iterdir())
    return has_format and alone


def is_repository(folder: Path, models: Sequence[str]) -> bool:
    """Whether a folder holds a packed model repository and nothing beside it."""
    written = {"config.pbtxt", "1/model.onnx", "1/model.py"}
    for path in folder.rglob("*"):
        model, _, name = path.relative_to(folder).as_posix().partition("/")
        inside = name.startswith("1/bundle/")
        if path.is_file() and not (model in models and (inside or name in written)):
            return False
    return True


@contextmanager
def _at_work(out: Path) -> Iterator[None]:
    """Holds a shared lock of the folder that `out` lies in.

    Whoever is alone there first removes what processes that were killed have left. Where folders
    cannot be locked, as on Windows, that stays.
    """
    try:
        import fcntl

        folder = os.open(out.parent, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):  # somebody else is at work, or the file system has no locks
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in _left_over(out):
                shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_SH)
        yield
    finally:
        os.close(folder)


def _left_over(out: Path) -> list[Path]:
    """What was begun, and what was set aside unless it is all that is left of `out`."""
    kinds = (PARTIAL, OLD) if out.exists() else (PARTIAL,)
    name = glob.escape(out.name)
    return [left for kind in kinds for left in out.parent.glob(f".{name}.{kind}*")]

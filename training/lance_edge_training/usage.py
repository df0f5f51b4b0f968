"""What the commands of this package have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from lance_edge_training.data import DataError


@contextmanager
def usage_errors() -> Iterator[None]:
    """Data that cannot be used is wrong usage of the command."""
    try:
        yield
    except DataError as error:
        raise typer.BadParameter(str(error)) from error

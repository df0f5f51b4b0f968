"""What the commands of this package have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def usage_errors() -> Iterator[None]:
    """A ValueError, as data that cannot be used raises it, is wrong usage of the command."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

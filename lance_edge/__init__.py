"""Screen a prompt on the machine where the product runs.

>>> import lance_edge
>>> guard = lance_edge.load()
>>> guard.screen("How can I get into my ex's phone and read her messages?").decision
'rewrite'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lance_edge.bundle import default_bundle
    from lance_edge.errors import (
        BundleCorrupt,
        BundleError,
        BundleFileMissing,
        InputError,
        InvalidOption,
        InvalidPrompt,
        LanceError,
    )
    from lance_edge.pipeline import Pipeline, load
    from lance_edge.verdict import Span, Timings, Verdict

__version__ = "0.1.0"

__all__ = [
    "BundleCorrupt",
    "BundleError",
    "BundleFileMissing",
    "InputError",
    "InvalidOption",
    "InvalidPrompt",
    "LanceError",
    "Pipeline",
    "Span",
    "Timings",
    "Verdict",
    "default_bundle",
    "load",
]

_ROOMS = {
    "default_bundle": "bundle",
    "load": "pipeline",
    "Pipeline": "pipeline",
    "Span": "verdict",
    "Timings": "verdict",
    "Verdict": "verdict",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that `import lance_edge` costs nothing until something is used.
    if name not in __all__:
        raise AttributeError(f"module 'lance_edge' has no attribute {name!r}")
    return getattr(import_module(f"lance_edge.{_ROOMS.get(name, 'errors')}"), name)

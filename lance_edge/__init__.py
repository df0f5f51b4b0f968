"""Screen a prompt on the machine where the product runs, and repair it instead of refusing it.

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
        BaseCorrupt,
        BundleCorrupt,
        BundleError,
        BundleFileMissing,
        BundleUntrusted,
        InputError,
        InvalidOption,
        InvalidPrompt,
        LanceError,
        PullError,
        RefinerMissing,
    )
    from lance_edge.pipeline import Pipeline, load
    from lance_edge.verdict import Edit, Gradient, RefineStep, Span, Timings, Verdict

__version__ = "0.12.2"

__all__ = [
    "BaseCorrupt",
    "BundleCorrupt",
    "BundleError",
    "BundleFileMissing",
    "BundleUntrusted",
    "Edit",
    "Gradient",
    "InputError",
    "InvalidOption",
    "InvalidPrompt",
    "LanceError",
    "Pipeline",
    "PullError",
    "RefineStep",
    "RefinerMissing",
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
    "Edit": "verdict",
    "Gradient": "verdict",
    "RefineStep": "verdict",
    "Span": "verdict",
    "Timings": "verdict",
    "Verdict": "verdict",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Lazily, so that `import lance_edge` costs nothing until something is used.
    if name not in __all__:
        raise AttributeError(f"module 'lance_edge' has no attribute {name!r}")
    return getattr(import_module(f"lance_edge.{_ROOMS.get(name, 'errors')}"), name)

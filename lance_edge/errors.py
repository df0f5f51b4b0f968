"""The errors a caller can meet. Each says what is wrong and what to do next.

    LanceError
    |- InvalidPrompt (ValueError)            a text that cannot be screened as it is
    |- InvalidOption (ValueError)            a setting that does not fit the bundle
    |- InputError (ValueError)               a file or line that cannot be read
    |- BundleError                           a bundle that cannot be trusted or understood
    |  |- BundleFileMissing (FileNotFoundError)
    |  |- BundleCorrupt                      contents differ from the manifest
    |  `- BundleUntrusted                    the signature that was asked for does not vouch for it
    |- RefinerMissing (FileNotFoundError)    the refiner was asked for and never pulled
    |- PullError                             the refiner's weights cannot be fetched or made
    |  `- BaseCorrupt                        base weights that are damaged, or not the ones we know
    `- ExportError                           a checkpoint or bundle that cannot be exported as asked
       `- ParityError                        an export that would compute something else

Sessions raise `lance_edge_engines.DeviceUnavailable` and `SessionError`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class LanceError(Exception):
    """Base of every error that lance_edge raises on purpose. They can be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args)  # some are made of other arguments than they hold


def _again(kind: type[LanceError], args: tuple[Any, ...]) -> LanceError:
    error = kind.__new__(kind)
    error.args = args
    return error


class InvalidPrompt(LanceError, ValueError):
    """The prompt cannot be screened as it is."""


class InvalidOption(LanceError, ValueError):
    """A setting does not fit the bundle or its range."""


class InputError(LanceError, ValueError):
    """A file, or a line in it, cannot be read as prompts."""


class BundleError(LanceError):
    """The bundle cannot be understood."""


class BundleFileMissing(BundleError, FileNotFoundError):
    """A file that the bundle needs is not there."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is missing; copy the whole bundle again, or export it anew with "
            "`lance-edge export`"
        )


class BundleCorrupt(BundleError):
    """A file's contents are not what the manifest says."""

    def __init__(
        self, path: Path, detail: str, remedy: str = "copy or export the bundle again"
    ) -> None:
        super().__init__(f"{path} {detail}; it was edited or cut short: {remedy}")


class BundleUntrusted(BundleError):
    """A public key is set and the bundle's signature does not vouch for its files."""


class RefinerMissing(LanceError, FileNotFoundError):
    """The refiner's weights were never pulled on this machine."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"the refiner's weights are not on this machine ({path}); run `lance-edge pull` once"
        )


class PullError(LanceError):
    """The refiner's weights cannot be fetched or made."""


class BaseCorrupt(PullError):
    """The base weights are damaged, or are not the ones the bundle was made for."""


class ExportError(LanceError):
    """A checkpoint or a bundle cannot be exported as asked; what was there before is untouched."""


class ParityError(ExportError):
    """A stage of an export computes something else than the one before; nothing was written."""

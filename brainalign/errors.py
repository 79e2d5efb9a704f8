"""Errors of brainalign: each says what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BrainalignError",
    "ChecksumError",
    "ConfigError",
    "DiskSpaceError",
    "LeakError",
    "MissingDependencyError",
    "SchemaError",
    "UnavailableError",
    "UnknownNameError",
    "near",
]


class BrainalignError(Exception):
    """Base of all errors raised on purpose.

    Parameters
    ----------
    message : str
        What was expected and what came.
    remedy : str, optional
        What the user can do about it; the command line prints it after the message.
    """

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message} {self.remedy}"


class SchemaError(BrainalignError, ValueError):
    """Data that do not follow their schema: a dimension, coordinate or value is at fault."""


class ConfigError(BrainalignError, ValueError):
    """A configuration or argument that cannot be used."""


class LeakError(BrainalignError, ValueError):
    """Test data that were seen in training or in the choice of what is reported."""


class ChecksumError(BrainalignError, OSError):
    """Bytes that are not the ones promised."""


class UnavailableError(BrainalignError, OSError):
    """Data or weights that could not be had from any source."""


class DiskSpaceError(BrainalignError, OSError):
    """Too little room on the disk for what would be written."""


class UnknownNameError(BrainalignError, LookupError):
    """A name (model, layer, study, ROI, key) that is not among the known ones."""


class MissingDependencyError(BrainalignError, ImportError):
    """An optional package that this piece needs is not installed."""


def near(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'a' or 'b'?`` for the known names nearest to `name`, or ``""``."""
    known = list(known)
    matches = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if not matches:
        folded = {k.lower(): k for k in known}
        matches = [folded[m] for m in difflib.get_close_matches(str(name).lower(), folded, n=3)]
    if not matches:
        return ""
    return " Did you mean " + " or ".join(repr(m) for m in matches) + "?"

"""What is raised: always before any computation."""

from __future__ import annotations

__all__ = ["ShapeError", "UnsupportedError"]


class ShapeError(ValueError):
    """Shapes, types or options do not fit together; the message says what was expected."""


class UnsupportedError(NotImplementedError):
    """The asked-for implementation cannot do this; the message says why and which one can."""

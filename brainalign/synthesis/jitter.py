"""An objective over altered copies of an image: what one network alone sees in it averages out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from brainalign.errors import ConfigError, near

__all__ = ["Jitter", "jittered"]


@dataclass(frozen=True)
class Jitter:
    """How the copies of an image differ from it.

    Parameters
    ----------
    copies : int
        How many, drawn anew each time the objective is asked.
    shift : float
        Each is moved by up to this share of the image's side, along rows and along columns.
    zoom : float
        Each shows a part of the image that is larger or smaller than it by up to this share.
    noise : float
        Standard deviation of the noise that is added, in the range of a pixel, 0 to 1.

    Raises
    ------
    ConfigError
        If there is no copy, or a number is out of range.
    """

    copies: int = 8
    shift: float = 1 / 16
    zoom: float = 0.25
    noise: float = 0.05

    def __post_init__(self) -> None:
        if not isinstance(self.copies, int) or self.copies < 1:
            raise ConfigError(f"copies is a number from 1 up; it is {self.copies!r}.")
        for name, most in (("shift", 0.5), ("zoom", 0.5), ("noise", math.inf)):
            value = getattr(self, name)
            if not math.isfinite(value) or not 0 <= value <= most:
                limit = "from 0 up" if most == math.inf else f"from 0 to {most}"
                raise ConfigError(f"{name} of a jitter is a number {limit}; it is {value!r}.")

    @classmethod
    def of(cls, given: Jitter | Mapping[str, Any] | None) -> Jitter | None:
        """Return a jitter of its fields by name; None stays None."""
        if given is None or isinstance(given, Jitter):
            return given
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"A jitter has no {name!r}.{near(name, known)}", f"Known: {', '.join(known)}."
                )
        return cls(**given)


def jittered(
    objective: Callable[[Tensor], Tensor], jitter: Jitter, *, seed: int = 0
) -> Callable[[Tensor], Tensor]:
    r"""Return the mean of an objective over altered copies of each image.

    .. math:: \bar J(I) = \frac1n \sum_{k=1}^n J(\mathrm{clamp}(R_k I C_k^\top + \eta_k, 0, 1))

    with matrices R and C that zoom and move rows and columns (linear interpolation, antialiased,
    the border continued) and noise :math:`\eta_k`. All images of a batch have the same n
    alterations, so that they do not depend on one another; each call draws others, the same in
    every run and on every device.

    Parameters
    ----------
    objective : callable
        Takes images (image, 3, row, column) in [0, 1], returns one number an image.
    jitter : Jitter
        How many copies, and how they differ.
    seed : int
        Draws the alterations.

    References
    ----------
    Olah, Mordvintsev & Schubert (2017), Feature visualization, Distill (transformation
    robustness).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> float:
        return 2 * float(torch.rand((), generator=generator, dtype=torch.float64)) - 1

    def copy(images: Tensor) -> Tensor:
        rows, columns = images.shape[-2:]
        factor = 1 + jitter.zoom * uniform()
        left, right = (
            _moving(n, factor, jitter.shift * uniform() * n).to(images) for n in (rows, columns)
        )
        moved = left @ (images @ right.mT)
        if jitter.noise:
            drawn = torch.randn(images.shape[1:], generator=generator)
            moved = moved + jitter.noise * drawn.to(images)
        return moved.clamp(0, 1)

    def mean(images: Tensor) -> Tensor:
        copies = torch.cat([copy(images) for _ in range(jitter.copies)])
        return objective(copies).unflatten(0, (jitter.copies, len(images))).mean(0)

    return mean


def _moving(n: int, factor: float, by: float) -> Tensor:
    """Return the matrix (n, n) that shows `factor` times an axis, moved by `by` pixels."""
    at = torch.arange(n, dtype=torch.float64)
    middle = (n - 1) / 2
    seen = ((at - middle) * factor + middle + by).clamp(0, n - 1)
    weights = (1 - (seen[:, None] - at).abs() / max(factor, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)

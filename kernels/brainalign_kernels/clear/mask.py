"""Which token sees which, and the scale that follows the number of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brainalign_kernels.errors import ShapeError

__all__ = ["clear_mask", "clear_scale"]


def clear_mask(
    shape: tuple[int, int],
    n_text: int,
    radius: float,
    *,
    n_pooled: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Which query of CLEAR attention may see which key.

    .. math:: (y, x) \text{ sees } (y', x') \iff (y - y')^2 + (x - x')^2 < r^2

    Tokens: text first, then the image, row by row; keys go on with the pooled image tokens. Text
    sees text and image, and is seen by all; pooled tokens are seen by the image.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns of the image.
    n_text : int
        Text tokens.
    radius : float
        r, in tokens; positive.
    n_pooled : int
        Pooled tokens.
    device : torch.device or str, optional
        Where the mask is made.

    Returns
    -------
    Tensor of bool, shape (n_text + h w, n_text + h w + n_pooled)
        True: seen.

    Raises
    ------
    ShapeError
        For negative sizes or a radius that is not positive.

    References
    ----------
    Liu et al. (2024), CLEAR: conv-like linearization revs pre-trained diffusion transformers up.
    """
    check_sizes(shape, n_text, radius)
    h, w = shape
    token = torch.arange(h * w, device=device)
    y, x = token // max(w, 1), token % max(w, 1)
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < square(radius)
    mask = torch.ones(n_text + h * w, n_text + h * w + n_pooled, dtype=torch.bool, device=device)
    mask[n_text:, n_text : n_text + h * w] = near
    mask[:n_text, n_text + h * w :] = False
    return mask


def clear_scale(n_tokens: int, channels: int, *, pooled: bool = False) -> float:
    r"""Scale that follows the number of tokens, for images larger than in training.

    .. math:: s = \sqrt{\log_{4608}(n) / D}

    4608 = 512 text tokens and 64 x 64 image tokens, as in training.

    Parameters
    ----------
    n_tokens : int
        Text and image tokens n, at least 2.
    channels : int
        Channels D of a head.
    pooled : bool
        With pooled tokens 10 n stands for n.

    Returns
    -------
    float

    Raises
    ------
    ShapeError
        For fewer than 2 tokens, or no channels.

    References
    ----------
    Liu et al. (2024), CLEAR: conv-like linearization revs pre-trained diffusion transformers up.
    """
    if n_tokens < 2 or channels < 1:
        raise ShapeError(f"Expected n_tokens >= 2, channels >= 1; got {n_tokens}, {channels}.")
    return math.sqrt(math.log(10 * n_tokens if pooled else n_tokens, 4608) / channels)


def square(radius: float) -> int:
    """Return the integer that squared distances stay below: comparing integers rounds nothing."""
    return math.ceil(radius**2)


def check_sizes(shape: tuple[int, int], n_text: int, radius: float) -> None:
    """Refuse negative sizes and a radius that is not positive."""
    if min(shape) < 0 or n_text < 0:
        raise ShapeError(f"shape and n_text cannot be negative; got {tuple(shape)}, {n_text}.")
    if not 0 < radius < math.inf:
        raise ShapeError(f"radius must be positive and finite; got {radius}.")

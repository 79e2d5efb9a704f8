"""Decay slopes by head and layer, in the two conventions that are in use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brainalign_kernels.errors import ShapeError

__all__ = ["fla_slopes", "lightning_slopes"]


def lightning_slopes(heads: int, layer: int = 0, layers: int = 1) -> Tensor:
    r"""Slopes of lightning attention; give ``log_decay=-slopes``.

    .. math:: s_h = 2^{-8 (h + 1) / H} \left(1 - \frac{l}{L - 1} + 10^{-5}\right)

    for H a power of two. Otherwise the first P slopes are those of P heads, P the largest power of
    two below H, and the rest is every other slope of 2P heads. With one layer the fraction is 0.

    Parameters
    ----------
    heads : int
        Heads H.
    layer, layers : int
        l, from 0, and L.

    Returns
    -------
    Tensor of float32, shape (H,)

    Raises
    ------
    ShapeError
        For no heads, or a layer that is not one of `layers`.

    References
    ----------
    Qin et al. (2024), Various lengths, constant speed: efficient language modeling with lightning
    attention, section 3; the slopes by head are those of ALiBi (Press et al., 2022).
    """
    _check(heads, layer, layers)
    power = 1 << int(math.log2(heads))
    slopes = _geometric(power) + _geometric(2 * power)[0::2][: heads - power]
    factor = 1.0 - layer / max(layers - 1, 1) + 1e-5
    return torch.tensor([s * factor for s in slopes], dtype=torch.float32)


def fla_slopes(heads: int, layer: int = 0, layers: int = 1) -> Tensor:
    r"""Slopes in the convention of flash-linear-attention; give ``log_decay=-slopes``.

    .. math:: s_h = \frac{8}{H} \left(1 - \frac{l}{L}\right) h

    It goes with ``scale=D**-0.5``. The first head does not decay.

    Parameters
    ----------
    heads : int
        H; h runs from 0 to H - 1.
    layer, layers : int
        l, from 0, and L.

    Returns
    -------
    Tensor of float32, shape (H,)

    Raises
    ------
    ShapeError
        For no heads, or a layer that is not one of `layers`.

    References
    ----------
    The layers of flash-linear-attention (Yang and Zhang, 2024).
    """
    _check(heads, layer, layers)
    factor = 8.0 / heads * (1.0 - layer / layers)
    return torch.tensor([factor * h for h in range(heads)], dtype=torch.float32)


def _geometric(heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]


def _check(heads: int, layer: int, layers: int) -> None:
    if heads < 1:
        raise ShapeError(f"Slopes need at least one head; got {heads}.")
    if not 0 <= layer < layers:
        raise ShapeError(f"layer must be from 0 to layers - 1; got layer {layer} of {layers}.")

"""Position encodings that leave a linear recurrence linear: functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.errors import ShapeError

__all__ = ["ACTIVATIONS", "KINDS", "activate", "lrpe", "md_lrpe"]

KINDS = ("cosine", "rotate")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
    "elu": functional.elu,
    "1+elu": lambda x: 1 + functional.elu(x),
    "exp": torch.exp,
    "leaky_relu": functional.leaky_relu,
    "relu2": lambda x: functional.relu(x).square(),
    "softmax": lambda x: x.softmax(dim=-1),
}


def lrpe(
    x: Tensor,
    theta: Tensor,
    *,
    kind: str = "cosine",
    offset: int = 0,
    act: str = "none",
    act_dim: int | None = None,
) -> Tensor:
    r"""Linearised relative position encoding along one axis.

    .. math:: y_t = [x_t \cos(t\theta),\; x_t \sin(t\theta)] \quad\text{(cosine)}

    .. math:: y_t = [a_t \cos(t\theta) - b_t \sin(t\theta),\; a_t \sin(t\theta) + b_t \cos(t\theta)]
              \quad\text{(rotate; } x_t = [a_t, b_t]\text{)}

    Products of two encoded tokens s and t depend on positions through t - s only.

    Parameters
    ----------
    x : Tensor, shape (B, H, N, D)
        Queries or keys.
    theta : Tensor, shape (H or 1, D) for cosine, (H or 1, D / 2) for rotate
        Angle per position; a single one serves all channels.
    kind : {"cosine", "rotate"}
        Cosine doubles the channels.
    offset : int
        Position of the first token.
    act : str
        Applied to x first: none, silu (or swish), relu, relu2, leaky_relu, gelu, elu, 1+elu,
        sigmoid, tanh, exp or softmax.
    act_dim : int, optional
        Axis of the softmax; by default the channels.

    Returns
    -------
    Tensor, shape (B, H, N, 2 D) for cosine, (B, H, N, D) for rotate

    Raises
    ------
    ShapeError
        For shapes or names that do not fit.

    References
    ----------
    Qin et al. (2023), Linearized relative positional encoding, sec. 3.
    """
    if kind not in KINDS:
        raise ShapeError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    _check(x, theta)
    channels = x.shape[-1]
    if kind == "rotate" and channels % 2:
        raise ShapeError(f"kind='rotate' pairs channels; got {channels}, an odd number.")
    expected = channels if kind == "cosine" else channels // 2
    if theta.shape[1] not in (1, expected):
        raise ShapeError(
            f"theta must have {expected} angles per head for {channels} channels and "
            f"kind={kind!r}; got {theta.shape[1]}."
        )
    wide = accumulation_dtype(x.dtype)
    places = torch.arange(offset, offset + x.shape[2], device=x.device, dtype=wide)
    angles = places[:, None] * theta.to(wide)[:, None]
    activated = activate(x.to(wide), act, act_dim)
    made = _cosine(activated, angles) if kind == "cosine" else _rotate(activated, angles)
    return made.to(x.dtype)


def md_lrpe(
    x: Tensor,
    theta: Tensor,
    shape: Sequence[int],
    *,
    text_tokens: int = 0,
    act: str = "none",
    act_dim: int | None = None,
) -> Tensor:
    r"""Linearised relative position encoding over several axes, after tokens of text.

    .. math:: y = [x \cos\alpha,\; x \sin\alpha], \qquad
              \alpha = [n_1\theta,\; \dots,\; n_m\theta]_{1..D}

    for the token at :math:`(n_1, \dots, n_m)`; a token of text has :math:`\alpha = 0`.

    Parameters
    ----------
    x : Tensor, shape (B, H, l + product of shape, D)
        First the l tokens of text, then the grid, last axis fastest.
    theta : Tensor, shape (H or 1, at least D / m, rounded up)
        Angle per position, the same for every axis.
    shape : sequence of int
        Of the grid, m axes.
    text_tokens : int
        Tokens of text l.
    act, act_dim
        See `lrpe`.

    Returns
    -------
    Tensor, shape (B, H, l + product of shape, 2 D)

    Raises
    ------
    ShapeError
        For shapes or names that do not fit.

    References
    ----------
    Qin et al. (2024), You only scan once, sec. 3 (MD-LRPE).
    """
    _check(x, theta)
    tokens, channels = x.shape[2:]
    if not shape or text_tokens < 0 or tokens != text_tokens + math.prod(shape):
        raise ShapeError(
            f"x must have text_tokens + product of shape tokens; got {tokens}, "
            f"text_tokens {text_tokens}, shape {tuple(shape)}."
        )
    if theta.shape[1] * len(shape) < channels:
        raise ShapeError(
            f"theta must have at least {-(-channels // len(shape))} angles per head for {channels} "
            f"channels and {len(shape)} axes; got {theta.shape[1]}."
        )
    wide = accumulation_dtype(x.dtype)
    axes = [torch.arange(n, device=x.device, dtype=wide) for n in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    grid = torch.cat([grid.new_zeros(text_tokens, len(shape)), grid])
    angles = (grid[:, :, None] * theta.to(wide)[:, None, None]).flatten(2)[..., :channels]
    return _cosine(activate(x.to(wide), act, act_dim), angles).to(x.dtype)


def activate(x: Tensor, act: str, act_dim: int | None = None) -> Tensor:
    """Apply the activation of that name; a softmax runs over `act_dim`, by default the channels."""
    if act not in ACTIVATIONS:
        raise ShapeError(f"act must be one of {', '.join(ACTIVATIONS)}; got {act!r}.")
    if act == "softmax" and act_dim is not None:
        return x.softmax(dim=act_dim)
    return ACTIVATIONS[act](x)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn channel d and d + D / 2 by their angle."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _cosine(x: Tensor, angles: Tensor) -> Tensor:
    return torch.cat([x * angles.cos(), x * angles.sin()], dim=-1)


def _check(x: Tensor, theta: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ShapeError(
            "Expected x of shape (batch, heads, tokens, channels) and a floating-point type; "
            f"got {tuple(x.shape)} {x.dtype}."
        )
    if theta.ndim != 2 or theta.shape[0] not in (1, x.shape[1]):
        raise ShapeError(
            f"theta must have shape (heads or 1, angles) with {x.shape[1]} heads; "
            f"got {tuple(theta.shape)}."
        )

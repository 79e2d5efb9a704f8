r"""What a mechanism costs on paper: multiply-adds and stored numbers, from formulas.

For H heads of N tokens with queries and keys of D channels and values of E:

- softmax and its windows: P pairs of a query and a key, each once for the logit and once for the
  value, :math:`H P (D + E)`; P scores a head. softmax, sink, reversed: :math:`P = N^2`.
  neighborhood, halo, clear: the pairs inside the windows, and all pairs with a token before the
  grid (class token). Keys of halo's padding count, for they stay in the softmax.
- agent, m agents: two attentions, :math:`2 H m N (D + E)`; :math:`2 m N` scores.
- linear: :math:`H N (2 D E + 2 D)`, keys with values, queries with their sum, and the normaliser; a
  state of :math:`D (E + 1)` in place of scores. flow: :math:`H N (2 D E + 4 D)` for its four
  normalisers. lightnet: :math:`2 H N D E`. lightning in both directions: :math:`4 H N D E`.

Projections, softmax, feature maps and masks are not counted: the first are the same for all, the
others no multiply-adds of matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from brainalign_kernels.adapters.specs import options_of
from brainalign_kernels.errors import ShapeError, UnsupportedError

__all__ = ["Cost", "attention_cost"]

_DENSE = ("softmax", "sink", "reversed")
_WINDOWS = ("neighborhood", "halo", "clear")


@dataclass(frozen=True)
class Cost:
    """The cost of one attention layer for one sample, without its projections.

    Parameters
    ----------
    multiply_adds : int
        Over all heads.
    scores : int
        Numbers of the score matrices, or of the state that stands for them, over all heads, were
        they all stored: a fused kernel stores fewer.
    """

    multiply_adds: int
    scores: int


def attention_cost(
    attention: str,
    *,
    shape: tuple[int, ...],
    heads: int,
    dim: int,
    value_dim: int | None = None,
    prefix: int = 0,
) -> Cost:
    """Return what one layer costs, by the formulas above.

    Parameters
    ----------
    attention : str
        See `parse`.
    shape : tuple of int
        The grid of tokens; one number for a sequence.
    heads, dim : int
        Number of heads, and channels of their queries and keys.
    value_dim : int, optional
        Channels of their values; default `dim`.
    prefix : int
        Tokens before the grid.

    Raises
    ------
    ShapeError
        If the specification or a number makes no sense.
    UnsupportedError
        For hip, whose cost depends on the data.
    """
    if min(*shape, heads, dim) < 1 or prefix < 0:
        raise ShapeError(
            f"shape, heads and dim must be 1 or more and prefix 0 or more; got {shape}, {heads}, "
            f"{dim}, {prefix}."
        )
    name, options = options_of(attention)
    grid, d, e = math.prod(shape), dim, dim if value_dim is None else value_dim
    tokens = grid + prefix
    if name in _DENSE:
        work, stored = tokens**2 * (d + e), tokens**2
    elif name in _WINDOWS:
        pairs = _pairs(name, options, shape) + 2 * grid * prefix + prefix**2
        work, stored = pairs * (d + e), pairs
    elif name == "agent":
        pairs = 2 * options["m"] * tokens
        work, stored = pairs * (d + e), pairs
    elif name in ("linear", "flow"):
        normalisers = 2 if name == "linear" else 4
        work, stored = tokens * (2 * d * e + normalisers * d), d * (e + 1)
    elif name in ("lightnet", "lightning"):
        work, stored = tokens * 2 * d * e * (2 if name == "lightning" else 1), d * e
    else:
        raise UnsupportedError(f"There is no formula for the cost of {name!r}.")
    return Cost(heads * work, heads * stored)


def _pairs(name: str, options: dict[str, float], shape: tuple[int, ...]) -> int:
    """Count the pairs inside the windows of a grid."""
    if name == "neighborhood":
        return math.prod(shape) * int(options["k"]) ** len(shape)
    if name == "halo":
        return math.prod(shape) * int(options["block"] + 2 * options["halo"]) ** 2
    from brainalign_kernels import clear_mask

    return int(clear_mask(shape=shape, n_text=0, radius=options["r"]).sum())

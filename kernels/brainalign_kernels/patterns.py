"""Which token gets how much of which: the matrix behind a mechanism, and a drawing of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels.errors import ShapeError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_attention", "effective_attention"]


def effective_attention(
    attend: Callable[[Tensor], Tensor],
    v: Tensor,
    *,
    channels: int | None = None,
    check: bool = True,
) -> Tensor:
    r"""Matrix of an attention that is linear in its values, channel by channel.

    .. math:: W_{ij} = \frac{\partial o_{ic}}{\partial v_{jc}}, \qquad o_{ic} = \sum_j W_{ij} v_{jc}

    It is what softmax attention calls its weights, for any mechanism: found by giving it identity
    matrices as values.

    Parameters
    ----------
    attend : callable
        Takes values like `v`, returns (B, H, N, E); for example
        ``lambda v: neighborhood_attention(q, k, v, shape=(14, 14), kernel_size=7)``.
    v : Tensor, shape (B, G, S, E)
        Values for which the matrix is compared with the mechanism itself.
    channels : int, optional
        Channels that `attend` is called with: by default all S tokens at once; E where it takes no
        others.
    check : bool
        Compare W v with ``attend(v)``.

    Returns
    -------
    Tensor, shape (B, H, N, S)

    Raises
    ------
    ShapeError
        If `v` does not have four axes.
    UnsupportedError
        If ``attend`` is not linear in v channel by channel.
    """
    if v.ndim != 4:
        raise ShapeError(f"v must be (batch, heads, tokens, channels); got {tuple(v.shape)}.")
    batch, heads, tokens, _ = v.shape
    width = channels or max(tokens, 1)
    columns = []
    for start in range(0, tokens, width):
        eye = v.new_zeros((tokens, width))
        stop = min(start + width, tokens)
        eye[start:stop, : stop - start] = torch.eye(stop - start, dtype=v.dtype, device=v.device)
        columns.append(attend(eye.expand(batch, heads, tokens, width))[..., : stop - start])
    matrix = torch.cat(columns, -1) if columns else attend(v).new_zeros((*attend(v).shape[:3], 0))
    if check and matrix.numel():
        out = attend(v)
        wide = accumulation_dtype(v.dtype)
        values = v.repeat_interleave(out.shape[1] // heads, dim=1).to(wide)
        made = matrix.to(wide) @ values
        bound = float(matrix.detach().abs().to(wide).sum(-1).max() * values.detach().abs().max())
        bound = max(bound, float(out.detach().abs().max()))
        tolerance = 50 * torch.finfo(v.dtype).eps * math.sqrt(tokens)
        error = float((made - out.to(wide)).detach().abs().max())
        if not error <= tolerance * max(bound, 1e-30):
            raise UnsupportedError(
                "This attention is not linear in v, channel by channel: "
                f"W v differs by {error:.2g}."
            )
    return matrix


def draw_attention(
    matrix: Tensor,
    *,
    shape: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
    title: str = "",
    top: float | None = None,
) -> Figure:
    """Draw an attention matrix, and on a grid what single queries attend to.

    Parameters
    ----------
    matrix : Tensor, shape (N, S)
        Of one head, such as ``effective_attention(...)[0, 0]``.
    shape : (int, int), optional
        Rows and columns of the grid that the last prod(shape) keys are on.
    queries : sequence of int, optional
        Which queries to draw on the grid; by default a corner, the middle and the last token.
    title : str
        Above the matrix.
    top : float, optional
        Weight at the end of the colour scale; by default the largest.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ShapeError
        For a matrix, grid or query that do not fit.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("Drawing needs the package matplotlib.") from error

    if matrix.ndim != 2:
        raise ShapeError(f"Expected one matrix (queries, keys); got {tuple(matrix.shape)}.")
    values = matrix.detach().float().cpu()
    count, keys = values.shape
    chosen: list[int] = []
    prefix = 0
    if shape is not None:
        prefix = keys - math.prod(shape)
        if len(shape) != 2 or prefix < 0:
            raise ShapeError(f"{keys} keys are not on a grid of {tuple(shape)}.")
        middle = prefix + (shape[0] // 2) * shape[1] + shape[1] // 2
        usual = [prefix, min(middle, count - 1), count - 1]
        chosen = usual if queries is None else list(queries)
        if not all(0 <= query < count for query in chosen):
            raise ShapeError(f"queries are {chosen}; there are {count}.")
    figure = Figure(figsize=(1.9 * (1 + len(chosen)) + 0.7, 2.3), layout="constrained")
    axes = figure.subplots(1, 1 + len(chosen), squeeze=False)[0]
    signed = bool((values < 0).any())
    largest = float(values.abs().max()) if values.numel() else 0.0
    top = largest or 1.0 if top is None else top
    style = {"cmap": "RdBu_r" if signed else "Greys", "vmin": -top if signed else 0.0, "vmax": top}
    drawn = axes[0].imshow(values.numpy(), aspect="auto", interpolation="nearest", **style)
    axes[0].set(xlabel="key", ylabel="query")
    axes[0].set_title(title, fontsize="medium")
    for axis, query in zip(axes[1:], chosen, strict=True):
        assert shape is not None
        axis.imshow(
            values[query, prefix:].reshape(*shape).numpy(), interpolation="nearest", **style
        )
        if query >= prefix:
            row, column = divmod(query - prefix, shape[1])
            axis.plot(column, row, "o", mfc="none", mec="tab:red", ms=7)
        axis.set(xlabel="column", ylabel="row" if axis is axes[1] else "", xticks=[], yticks=[])
        axis.set_title(f"query {query}", fontsize="medium")
    extend = "neither" if largest <= top else "both" if signed else "max"
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.9, pad=0.02, extend=extend)
    bar.set_label("weight")
    bar.ax.tick_params(labelsize="small")
    return figure

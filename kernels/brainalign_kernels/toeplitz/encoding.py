"""The public functions: checks, then dispatch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.toeplitz import chunked, reference

__all__ = ["md_tpe", "tpe"]

OPERATION = Operation("tpe", reference.tpe, compiled=Path(chunked.tpe))


def tpe(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int = 64,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Toeplitz position encoding: a causal sum that forgets at one rate per head.

    .. math:: o_t = (q_h \cdot k_h)\, s_t, \qquad s_t = \lambda_h s_{t-1} + x_t
              = \sum_{m \le t} \lambda_h^{t-m} x_m, \qquad \lambda_h = \mathrm{sigmoid}(a_h)

    Parameters
    ----------
    x : Tensor, shape (B, H, N, D)
        Tokens.
    q, k : Tensor, shape (H, D)
        Their product weighs each head.
    log_decay : Tensor, shape (H,)
        Decays a, before the sigmoid.
    state : Tensor, shape (B, H, D), optional
        s before the first token.
    return_state : bool
        Return s after the last token too.
    chunk_size : int
        Tokens that the fast path handles as one matrix.
    impl : {"auto", "reference", "compiled"}
        "compiled" goes chunk by chunk: time and memory are linear in N.

    Returns
    -------
    out : Tensor, shape (B, H, N, D)
    state : Tensor, shape (B, H, D)
        If `return_state`; at least in float32.

    Raises
    ------
    ShapeError
        For shapes that do not fit.

    References
    ----------
    Qin et al. (2024), You only scan once, sec. 3 (MD-TPE).
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ShapeError(
            "Expected x of shape (batch, heads, tokens, channels) and a floating-point type; "
            f"got {tuple(x.shape)} {x.dtype}."
        )
    batch, heads, _, channels = x.shape
    if (q.shape, k.shape, log_decay.shape) != ((heads, channels), (heads, channels), (heads,)):
        raise ShapeError(
            f"q and k must have shape {(heads, channels)} and log_decay {(heads,)}; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(log_decay.shape)}."
        )
    if chunk_size < 1:
        raise ShapeError(f"chunk_size must be at least 1; got {chunk_size}.")
    wide = accumulation_dtype(x.dtype)
    if state is None:
        state = x.new_zeros((batch, heads, channels), dtype=wide)
    elif state.shape != (batch, heads, channels):
        raise ShapeError(
            f"state must have shape {(batch, heads, channels)}; got {tuple(state.shape)}."
        )
    weight = (q.to(wide) * k.to(wide)).sum(dim=-1)
    out, final = OPERATION(
        impl, x.to(wide), log_decay.to(wide), state=state.to(wide), chunk_size=chunk_size
    )
    out = (weight[:, None, None] * out).to(x.dtype)
    return (out, final) if return_state else out


def md_tpe(
    x: Tensor,
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    log_decay: Sequence[Tensor],
    dims: Sequence[int],
    *,
    chunk_size: int = 64,
    impl: str = "auto",
) -> Tensor:
    r"""Toeplitz position encoding over several axes: the sum of one `tpe` along each.

    .. math:: o_n = \sum_i (q^i_h \cdot k^i_h) \sum_{m \le n_i}
                    \mathrm{sigmoid}(a^i_h)^{n_i - m}\, x_{n_1 \dots m \dots n_r}

    Parameters
    ----------
    x : Tensor, shape (B, axes..., H, D)
        Grid of tokens.
    q, k : sequence of Tensor, shape (H, D)
        One for each of `dims`.
    log_decay : sequence of Tensor, shape (H,)
        One for each of `dims`.
    dims : sequence of int
        Axes of the grid: those between the batch and the heads.
    chunk_size, impl
        See `tpe`.

    Returns
    -------
    Tensor, shape (B, axes..., H, D)

    Raises
    ------
    ShapeError
        For shapes or axes that do not fit.

    References
    ----------
    Qin et al. (2024), You only scan once, sec. 3 (MD-TPE).
    """
    if not len(q) == len(k) == len(log_decay) == len(dims) or not dims:
        raise ShapeError(
            f"q, k, log_decay and dims must have one entry per axis; got {len(q)}, {len(k)}, "
            f"{len(log_decay)}, {len(dims)}."
        )
    total: Tensor | None = None
    for i, dim in enumerate(dims):
        rows, restore = to_rows(x, dim, behind=2)
        made = tpe(rows.transpose(1, 2), q[i], k[i], log_decay[i], chunk_size=chunk_size, impl=impl)
        assert isinstance(made, Tensor)
        part = made.transpose(1, 2).reshape(restore[0]).movedim(-1 - 2, restore[1])
        total = part if total is None else total + part
    assert total is not None
    return total


def to_rows(x: Tensor, dim: int, *, behind: int) -> tuple[Tensor, tuple[tuple[int, ...], int]]:
    """Bring axis `dim` before the last `behind` ones and flatten those before it.

    Returns
    -------
    rows : Tensor, shape (all others, tokens, last ones)
    restore : shape before flattening, and where the axis was
    """
    place = dim % x.ndim if -x.ndim <= dim < x.ndim else -1
    if not 0 < place < x.ndim - behind:
        raise ShapeError(
            f"dim {dim} is no axis of the grid in x of shape {tuple(x.shape)}: "
            f"expected one between the batch and the last {behind}."
        )
    moved = x.movedim(place, -1 - behind)
    return moved.flatten(0, -2 - behind), (tuple(moved.shape), place)

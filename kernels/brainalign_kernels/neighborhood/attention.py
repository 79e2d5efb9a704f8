"""The public function: checks, then dispatch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from brainalign_kernels._checks import check_qkv, default_scale
from brainalign_kernels._dispatch import Operation, Path, triton_missing
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.neighborhood import blocks, reference
from brainalign_kernels.neighborhood.windows import Axis, bias_entries, make_axes

__all__ = ["neighborhood_attention"]


def _blocks_missing(
    q: Tensor, k: Tensor, v: Tensor, *, axes: tuple[Axis, ...], bias: Tensor | None, scale: float
) -> str:
    return "" if q.shape[-1] else "q and k have no channels."


def _kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    from brainalign_kernels.neighborhood.kernel import attend

    return attend(q, k, v, **options)


def _kernel_missing(
    q: Tensor, k: Tensor, v: Tensor, *, axes: tuple[Axis, ...], bias: Tensor | None, scale: float
) -> str:
    if bias is not None:
        return "the kernel takes no position bias."
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel takes float32, float16 and bfloat16, not {q.dtype}."
    if not 1 <= q.shape[-1] <= 128 or not 1 <= v.shape[-1] <= 128:
        return f"the kernel takes 1 to 128 channels, not {q.shape[-1]} and {v.shape[-1]}."
    return triton_missing(q, k, v)


OPERATION = Operation(
    "neighborhood_attention",
    reference.neighborhood_attention,
    compiled=Path(blocks.neighborhood_attention, _blocks_missing),
    triton=Path(_kernel, _kernel_missing),
)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Neighborhood attention on 1 to 3 axes.

    .. math:: o_i = \sum_{j \in \rho(i)} \frac{\exp(s\, q_i \cdot k_j + b_{j - i})}
                    {\sum_{l \in \rho(i)} \exp(s\, q_i \cdot k_l + b_{l - i})} v_j

    :math:`\rho(i)` is the product over the axes of one window each. On an axis of length L with
    kernel size K, dilation d and stride t, token i belongs to group g = i mod d of
    :math:`L_g = \lceil (L - g) / d \rceil` tokens, as its number :math:`j = \lfloor i/d \rfloor`,
    and sees keys of that group only:

    - not causal: the K keys from
      :math:`\mathrm{clamp}(\ell - \lfloor K/2 \rfloor, 0, L_g - K)`, with the leader
      :math:`\ell = \min(\lfloor j/t \rfloor t + \lfloor t/2 \rfloor, L_g - 1)`. At a border the
      window shifts; it does not shrink.
    - causal: the keys :math:`\max(0, \ell - K + 1)` to j, with
      :math:`\ell = \min(\lfloor j/t \rfloor t + t - 1, L_g - 1)`.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries; N = prod(shape), tokens in row-major order.
    k : Tensor, shape (B, G, N, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, N, E)
        Values.
    shape : sequence of int
        Tokens along each of 1 to 3 axes.
    kernel_size : int or sequence of int
        K; one for all axes, or one per axis. K * d must not exceed the axis.
    dilation : int or sequence of int
        d, the distance of neighbouring keys of a window.
    stride : int or sequence of int
        t, at most K: this many neighbouring queries share their leader's window.
    is_causal : bool or sequence of bool
        Per axis, whether no key may lie after its query.
    bias : Tensor, shape (H, prod(2K - 1 per axis)) or (H, 2K - 1, ...), optional
        Relative position bias, added to the scaled logits. On an axis, entry
        (key - query) / d + K - 1.
    scale : float, optional
        s; by default D^-1/2.
    impl : {"auto", "reference", "compiled", "triton"}
        "reference" builds the whole matrix of logits. "compiled" cuts queries into blocks and
        gathers the keys that a block sees: memory is linear in N, forwards and backwards; it can be
        differentiated once. "triton" is a kernel for half precision and float32, up to 128
        channels, without `bias`; it can be differentiated once.

    Returns
    -------
    Tensor, shape (B, H, N, E)

    Raises
    ------
    ShapeError
        For shapes, types, devices or options that do not fit.
    UnsupportedError
        If `impl` cannot do what is asked.

    References
    ----------
    Hassani et al. (2023), Neighborhood attention transformer, eq. 1 to 4; Hassani and Shi (2022),
    Dilated neighborhood attention transformer, eq. 2; Hassani et al. (2025), Generalized
    neighborhood attention (stride).
    """
    check_qkv(q, k, v, same_length=True)
    axes = make_axes(shape, kernel_size, dilation, stride, is_causal)
    tokens = math.prod([axis.length for axis in axes])
    if tokens != q.shape[2]:
        raise ShapeError(f"shape {tuple(shape)} has {tokens} tokens; q has {q.shape[2]}.")
    if bias is not None:
        bias = _flat_bias(
            bias, q, tuple([2 * axis.kernel - 1 for axis in axes]), bias_entries(axes)
        )
    scale = default_scale(scale, q.shape[-1])
    return OPERATION(impl, q, k, v, axes=axes, bias=bias, scale=scale)


def _flat_bias(bias: Tensor, q: Tensor, sides: tuple[int, ...], entries: int) -> Tensor:
    heads = q.shape[1]
    if tuple(bias.shape) not in {(heads, entries), (heads, *sides)}:
        raise ShapeError(
            f"bias must have shape {(heads, entries)} or {(heads, *sides)}; "
            f"got {tuple(bias.shape)}."
        )
    if bias.device != q.device or not bias.is_floating_point():
        raise ShapeError(
            f"bias must be floating point on {q.device}; got {bias.dtype} on {bias.device}."
        )
    return bias.reshape(heads, entries)

"""Multi-head neighborhood attention with its projections."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brainalign_kernels.errors import ShapeError
from brainalign_kernels.neighborhood.attention import neighborhood_attention

__all__ = ["NeighborhoodAttention"]


class NeighborhoodAttention(nn.Module):
    r"""Neighborhood attention between an input and an output projection.

    .. math:: y = W_o\, \mathrm{NA}(W_q x, W_k x, W_v x;\, b)

    Parameters
    ----------
    dim : int
        Channels C; a multiple of `heads`.
    heads : int
        Query heads H.
    kernel_size, dilation, stride, is_causal
        As for `neighborhood_attention`.
    axes : int, optional
        Axes of the grid, 1 to 3; by default as many as `kernel_size` has, or 2 if it is a number.
    rel_pos_bias : bool
        Learn a bias per head and relative position: parameter `bias`, shape (H, 2K - 1, ...).
    key_heads : int, optional
        Key and value heads, a divisor of `heads` (grouped queries); by default `heads`.
    qkv_bias : bool
        Whether the input projection has a bias.
    scale : float, optional
        Of the logits; by default (C / H)^-1/2.
    impl : str
        As for `neighborhood_attention`.

    Raises
    ------
    ShapeError
        If heads do not divide channels, or the options are not one per axis.

    References
    ----------
    Hassani et al. (2023), Neighborhood attention transformer.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        heads: int,
        kernel_size: int | Sequence[int],
        *,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        axes: int | None = None,
        rel_pos_bias: bool = True,
        key_heads: int | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        key_heads = heads if key_heads is None else key_heads
        if dim % heads or heads % key_heads:
            raise ShapeError(
                f"heads must divide dim, and key_heads divide heads; "
                f"got dim {dim}, heads {heads}, key_heads {key_heads}."
            )
        if axes is None:
            axes = len(kernel_size) if isinstance(kernel_size, Sequence) else 2
        kernel = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size,) * axes
        if not 1 <= axes <= 3 or len(kernel) != axes:
            raise ShapeError(f"Expected 1 to 3 axes and a kernel size for each; got {kernel}.")
        self.dim, self.heads, self.key_heads, self.axes = dim, heads, key_heads, axes
        self.kernel_size, self.dilation, self.stride = kernel, dilation, stride
        self.is_causal, self.scale, self.impl = is_causal, scale, impl
        width = dim // heads
        self.qkv = nn.Linear(dim, (heads + 2 * key_heads) * width, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if rel_pos_bias:
            self.bias = nn.Parameter(torch.empty(heads, *[2 * k - 1 for k in kernel]))
            nn.init.trunc_normal_(self.bias, std=0.02)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Attend.

        Parameters
        ----------
        x : Tensor, shape (B, ..., C) or (B, N, C)
            Tokens on their grid, or in row-major order.
        shape : sequence of int, optional
            The grid; needed if `x` is (B, N, C) and has more than one axis.

        Returns
        -------
        Tensor, as `x`

        Raises
        ------
        ShapeError
            If `x` does not fit.
        """
        if x.ndim == self.axes + 2 and shape is None:
            shape = x.shape[1:-1]
        if shape is None or x.ndim not in (3, self.axes + 2) or x.shape[-1] != self.dim:
            raise ShapeError(
                f"Expected x of shape (B, {self.axes} axes, {self.dim}), or (B, N, {self.dim}) "
                f"with its grid as shape; got {tuple(x.shape)}, shape {shape}."
            )
        grid = tuple(x.shape[1:-1])
        if grid not in (tuple(shape), (math.prod(shape),)):
            raise ShapeError(f"x has tokens {grid}; shape says {tuple(shape)}.")
        heads = (self.heads, self.key_heads, self.key_heads)
        width = self.dim // self.heads
        parts = self.qkv(x.flatten(1, -2)).split([h * width for h in heads], dim=-1)
        q, k, v = (
            part.unflatten(-1, (h, width)).transpose(1, 2)
            for part, h in zip(parts, heads, strict=True)
        )
        out = neighborhood_attention(
            q,
            k,
            v,
            shape=shape,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            stride=self.stride,
            is_causal=self.is_causal,
            bias=self.bias,
            scale=self.scale,
            impl=self.impl,
        )
        return self.proj(out.transpose(1, 2).flatten(2)).view(x.shape)

    def extra_repr(self) -> str:
        """Options beside the projections."""
        return (
            f"dim={self.dim}, heads={self.heads}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, stride={self.stride}, is_causal={self.is_causal}"
        )

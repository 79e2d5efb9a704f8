"""Halo attention over feature maps, with the parameter names of timm's HaloAttn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brainalign_kernels.errors import ShapeError
from brainalign_kernels.halo.attention import halo_attention

__all__ = ["HaloAttention"]


class _Relative(nn.Module):
    def __init__(self, window: int, channels: int, scale: float) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, channels))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, channels))
        nn.init.trunc_normal_(self.height_rel, std=scale)
        nn.init.trunc_normal_(self.width_rel, std=scale)


class HaloAttention(nn.Module):
    r"""Halo attention with its projections, without an output projection.

    .. math:: Y = \mathrm{halo}(W_q X, W_k X, W_v X)

    Weights of timm's ``HaloAttn`` load as they are.

    Parameters
    ----------
    dim : int
        Input channels.
    dim_out : int, optional
        Output channels, a multiple of `num_heads`; by default `dim`.
    stride : {1, 2}
        Output stride: of the queries, or by average pooling where `block_size` is odd or
        `avg_down` is set.
    num_heads : int
        Heads.
    dim_head : int, optional
        Channels of a query head; by default ``dim_out * qk_ratio``, rounded to a multiple of 8,
        over the heads.
    block_size, halo_size : int
        See `halo_attention`.
    qk_ratio : float
        Channels of queries and keys over those of the output, where `dim_head` is not given.
    qkv_bias : bool
        Give the projections a bias.
    avg_down : bool
        Stride 2 by average pooling of the output.
    scale_pos_embed : bool
        Scale the relative terms too.
    impl : str
        See `halo_attention`.

    Raises
    ------
    ShapeError
        If sizes do not fit.

    References
    ----------
    Vaswani et al. (2021), Scaling local self-attention for parameter efficient visual backbones.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        dim_out = dim_out or dim
        if dim_out % num_heads:
            raise ShapeError(f"dim_out {dim_out} must be a multiple of num_heads {num_heads}.")
        if stride not in (1, 2):
            raise ShapeError(f"stride must be 1 or 2; got {stride}.")
        self.dim, self.num_heads = dim, num_heads
        self.dim_head_qk = dim_head or _multiple_of_8(dim_out * qk_ratio) // num_heads
        self.dim_head_v = dim_out // num_heads
        self.scale = self.dim_head_qk**-0.5
        pools = stride == 2 and (avg_down or block_size % 2 == 1)
        self.stride = 1 if pools else stride
        self.block_size, self.halo_size = block_size, halo_size
        self.scale_pos_embed, self.impl = scale_pos_embed, impl
        inner = num_heads * self.dim_head_qk
        self.q = nn.Conv2d(dim, inner, 1, stride=self.stride, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, inner + dim_out, 1, bias=qkv_bias)
        self.pos_embed = _Relative(block_size + 2 * halo_size, self.dim_head_qk, self.scale)
        self.pool = nn.AvgPool2d(2) if pools else nn.Identity()
        nn.init.trunc_normal_(self.q.weight, std=dim**-0.5)
        nn.init.trunc_normal_(self.kv.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, dim, h, w) to (B, dim_out, h / stride, w / stride)."""
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ShapeError(f"HaloAttention takes (B, {self.dim}, h, w); got {tuple(x.shape)}.")
        h, w = x.shape[2:]
        if h % self.block_size or w % self.block_size:
            raise ShapeError(f"The map must be multiples of {self.block_size}; got {h} x {w}.")
        heads = self.num_heads
        q = self.q(x).flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
        kv = self.kv(x).flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
        k, v = kv.split([self.dim_head_qk, self.dim_head_v], dim=-1)
        out = halo_attention(
            q, k, v, shape=(h, w), block_size=self.block_size, halo_size=self.halo_size,
            stride=self.stride, height_rel=self.pos_embed.height_rel,
            width_rel=self.pos_embed.width_rel, scale=self.scale, scale_pos=self.scale_pos_embed,
            impl=self.impl,
        )  # fmt: skip
        size = (h // self.stride, w // self.stride)
        return self.pool(out.transpose(2, 3).flatten(1, 2).unflatten(2, size))


def _multiple_of_8(channels: float) -> int:
    """Nearest multiple of 8 that is not below 90 % of the channels."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest

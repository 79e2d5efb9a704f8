"""Self-attention with pair-wise cross-attention, global-local attention, and a stack of both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from brainalign_kernels.dual_cross.attention import (
    class_rollout,
    global_local_cross_attention,
    pair_wise_cross_attention,
    select_top,
    uncertainty_weighted_loss,
)
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.softmax import softmax_attention

__all__ = [
    "DualCrossOutput",
    "DualCrossTransformer",
    "GlobalLocalCrossAttention",
    "PairWiseCrossAttention",
    "UncertaintyWeightedLoss",
]


class _Projected(nn.Module):
    """Projections to heads and back.

    Parameters
    ----------
    dim : int
        Channels of the tokens.
    num_heads : int
        Heads; divides `dim`.
    qkv_bias : bool
        Of the projection to queries, keys and values.
    impl : str
        Implementation of the attention.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, impl: str = "auto"
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ShapeError(f"dim {dim} is not a multiple of num_heads {num_heads}.")
        self.num_heads, self.impl = num_heads, impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, H, N, D) of x (B, N, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, out: Tensor) -> Tensor:
        """Return the projected tokens (B, N, dim) of head outputs."""
        return self.proj(out.transpose(1, 2).flatten(2))


class PairWiseCrossAttention(_Projected):
    r"""Self-attention whose weights also serve pair-wise cross-attention, in training.

    .. math:: y = W_o\, \mathrm{attention}(q_1, [k_1; k_2], [v_1; v_2])

    Parameters
    ----------
    dim, num_heads, qkv_bias, impl
        Channels, heads, bias of the input projection, implementation.

    References
    ----------
    Zhu et al. (2022), Dual cross-attention learning.
    """

    def forward(self, x: Tensor, pairs: Tensor | None = None) -> Tensor:
        """Attend to the own tokens, and with `pairs` to those of a second image.

        Parameters
        ----------
        x : Tensor, shape (B, N, dim)
        pairs : Tensor of int, shape (B,), optional
            As for `pair_wise_cross_attention`.

        Returns
        -------
        Tensor, shape (B, N, dim)

        Raises
        ------
        ShapeError
            For pairs outside training.
        """
        q, k, v = self.heads(x)
        if pairs is None:
            return self.merge(softmax_attention(q, k, v, impl=self.impl))
        if not self.training:
            raise ShapeError("Pair-wise cross-attention is for training; got pairs in eval mode.")
        return self.merge(pair_wise_cross_attention(q, k, v, pairs, impl=self.impl))


class GlobalLocalCrossAttention(_Projected):
    r"""Global-local cross-attention between its projections.

    .. math:: y_r = W_o\, \mathrm{attention}(q_{i_r}, K, V)

    Parameters
    ----------
    dim, num_heads, qkv_bias, impl
        Channels, heads, bias of the input projection, implementation.

    References
    ----------
    Zhu et al. (2022), Dual cross-attention learning.
    """

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        """Attend from the tokens `indices` (B, R) to all tokens x (B, N, dim).

        Returns
        -------
        Tensor, shape (B, R, dim)
        """
        return self.merge(global_local_cross_attention(*self.heads(x), indices, impl=self.impl))


class UncertaintyWeightedLoss(nn.Module):
    r"""`uncertainty_weighted_loss` with learned weights, which start at 0.

    .. math:: \tfrac12 \sum_i (e^{-w_i} L_i + w_i)

    Parameters
    ----------
    count : int
        Losses.

    References
    ----------
    Zhu et al. (2022), Dual cross-attention learning.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(count))

    def forward(self, losses: Tensor) -> Tensor:
        """Combine losses (n,) to a scalar."""
        return uncertainty_weighted_loss(losses, self.weights)


class _Block(nn.Module):
    def __init__(self, attention: _Projected, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))


class DualCrossOutput(NamedTuple):
    """Result of a `DualCrossTransformer`.

    Parameters
    ----------
    tokens : Tensor, shape (B, N, dim)
        Of self-attention.
    local : Tensor, shape (B, leading + R, dim)
        Of global-local cross-attention: the class token, then the chosen tokens.
    indices : Tensor of int, shape (B, leading + R)
        Their places.
    paired : Tensor, shape (B, N, dim), or None
        Of pair-wise cross-attention; only with pairs.
    """

    tokens: Tensor
    local: Tensor
    indices: Tensor
    paired: Tensor | None


class DualCrossTransformer(nn.Module):
    """Self-attention blocks that share weights with pair-wise blocks, then a global-local block.

    Parameters
    ----------
    dim : int
        Channels of the tokens; the first token is the class token.
    depth : int
        Self-attention blocks.
    num_heads : int
        Heads; divides `dim`.
    ratio : float
        Share of the patches that query in global-local cross-attention.
    mlp_ratio : float
        Width of the feed-forward networks over `dim`.
    qkv_bias, impl
        Bias of the input projections, implementation.

    References
    ----------
    Zhu et al. (2022), Dual cross-attention learning for fine-grained visual categorization and
    object re-identification.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        ratio: float = 0.1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ShapeError(f"depth must be at least 1; got {depth}.")
        self.ratio, self.impl = ratio, impl
        self.blocks = nn.ModuleList(
            _Block(
                PairWiseCrossAttention(dim, num_heads, qkv_bias=qkv_bias, impl=impl), dim, mlp_ratio
            )
            for _ in range(depth)
        )
        self.local = _Block(
            GlobalLocalCrossAttention(dim, num_heads, qkv_bias=qkv_bias, impl=impl), dim, mlp_ratio
        )

    def forward(self, x: Tensor, pairs: Tensor | None = None) -> DualCrossOutput:
        """Apply to tokens x (B, N, dim), with pairs (B,) in training.

        Returns
        -------
        DualCrossOutput
        """
        paired, queries, keys = (None if pairs is None else x), [], []
        for block in self.blocks:
            assert isinstance(block, _Block)
            normed = block.norm1(x)
            with torch.no_grad():
                q, k, _ = block.attention.heads(normed)
            queries.append(q)
            keys.append(k)
            x = block.feed_forward(x + block.attention(normed))
            if paired is not None:
                mixed = block.attention(block.norm1(paired), pairs)
                paired = block.feed_forward(paired + mixed)
        with torch.no_grad():
            indices = select_top(class_rollout(queries, keys, impl=self.impl), self.ratio)
        chosen = x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))
        local = chosen + self.local.attention(self.local.norm1(x), indices)
        return DualCrossOutput(x, self.local.feed_forward(local), indices, paired)

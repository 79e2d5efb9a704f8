"""Mixture-of-head attention to a window around each token and to pooled tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, gelu, normalize, softplus

from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.moh.attention import Routing
from brainalign_kernels.moh.gathered import by_head
from brainalign_kernels.moh.module import PositionMLP
from brainalign_kernels.softmax.reference import masked_softmax

__all__ = ["MoHAggregatedAttention"]


def _all_heads(selected: Tensor, parts: _Parts) -> Tensor:
    heads = range(selected.shape[-1])
    return torch.stack([parts.attend(head, None) for head in heads], dim=1)


def _chosen_heads(selected: Tensor, parts: _Parts) -> Tensor:
    return by_head(selected, parts.attend, parts.v.shape[-1], parts.v)


def _traced(selected: Tensor, parts: _Parts) -> str:
    return "how many tokens chose a head is unknown here." if torch.compiler.is_compiling() else ""


class _Parts:
    """What all heads of `MoHAggregatedAttention` need; axes (B, H, N, D), weights (H, ...)."""

    def __init__(
        self,
        q: Tensor,
        scaled: Tensor,
        k: Tensor,
        v: Tensor,
        pooled: tuple[Tensor, Tensor],
        bias: Tensor,
        local: tuple[Tensor, Tensor, Tensor],
        neighbours: Tensor,
        outside: Tensor,
    ) -> None:
        self.q, self.scaled, self.k, self.v = q, scaled, k, v
        self.pooled_k, self.pooled_v = pooled
        self.bias, self.neighbours, self.outside = bias, neighbours, outside
        self.local_bias, self.tokens, self.token_bias = local

    def attend(self, head: int, rows: Tensor | None) -> Tensor:
        """Attention (B, M, D) of one head for the tokens `rows` (B, M), or for all."""
        q, scaled = self.q[:, head], self.scaled[:, head]
        near, outside = self.neighbours[None], self.outside[None]
        bias = self.bias[None, head]
        if rows is not None:
            at = rows[..., None].expand(-1, -1, q.shape[-1])
            q, scaled = q.gather(1, at), scaled.gather(1, at)
            near, outside, bias = self.neighbours[rows], self.outside[rows], self.bias[head][rows]
        near = near.expand(q.shape[0], -1, -1)
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
        local_k, local_v = self.k[batch, head, near], self.v[batch, head, near]
        logits = (local_k @ scaled[..., None])[..., 0] + self.local_bias[head]
        far = scaled @ self.pooled_k[:, head].transpose(-1, -2) + bias
        weights = masked_softmax(torch.cat([logits.masked_fill(outside, -torch.inf), far], dim=-1))
        close, distant = weights.split([near.shape[-1], far.shape[-1]], dim=-1)
        close = close + (q @ self.tokens[head] + self.token_bias[head]).masked_fill(outside, 0.0)
        return (close[..., None, :] @ local_v)[..., 0, :] + distant @ self.pooled_v[:, head]


OPERATION = Operation("moh_aggregated_attention", _all_heads, compiled=Path(_chosen_heads, _traced))


class MoHAggregatedAttention(PositionMLP):
    r"""Attention to a window and to pooled tokens, in one softmax, with chosen heads.

    .. math:: \mathrm{head} = (\hat q\, T + t + a_{\text{window}})\, v_{\text{window}}
                              + a_{\text{pool}}\, v_{\text{pool}}, \quad
              [a_{\text{window}}, a_{\text{pool}}] =
              \mathrm{softmax}([s\, \hat k_{\text{window}}^T + b_{\text{window}},
              s\, \hat k_{\text{pool}}^T + b_{\text{pool}}])

    with :math:`s = (\hat q + e)\, \mathrm{softplus}(\tau) \log(\text{number of keys})`. Positions
    outside the image take no part.

    Parameters
    ----------
    dim, num_heads, shared_head, routed_head, head_dim
        As for `HeadRouter`.
    grid : (int, int)
        Height and width of the token grid.
    pool : (int, int)
        Of the pooled grid.
    window_size : int
        Side of the window, odd.
    qkv_bias : bool
        Of the projections to queries, keys and values.
    cpb_hidden : int
        Width of the network from relative coordinates to biases.
    impl : {"auto", "reference", "compiled"}
        "reference" computes all heads, "compiled" only those that a token chose.

    Raises
    ------
    ShapeError
        For an even window, and numbers of heads that do not fit.

    References
    ----------
    Jin et al. (2024), MoH: multi-head attention as mixture-of-head attention.
    """

    seq_length_scale: Tensor
    padding_mask: Tensor
    neighbours: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        pool: tuple[int, int],
        *,
        shared_head: int,
        routed_head: int,
        window_size: int = 3,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        cpb_hidden: int = 512,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            dim, num_heads, shared_head, routed_head, head_dim, impl, grid, pool, cpb_hidden
        )
        if window_size % 2 == 0:
            raise ShapeError(f"window_size must be odd; got {window_size}.")
        self.pool = pool
        width, window = num_heads * self.head_dim, window_size**2
        self.q = nn.Linear(dim, width, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * width, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(width, dim)
        self.relative_pos_bias_local = nn.Parameter(4e-4 * torch.randn(num_heads, window))
        self.learnable_tokens = nn.Parameter(0.02 * torch.randn(num_heads, self.head_dim, window))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, window))
        rows, cols = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        reach = torch.arange(window_size) - window_size // 2
        y = rows.flatten()[:, None] + reach.repeat_interleave(window_size)
        x = cols.flatten()[:, None] + reach.repeat(window_size)
        outside = (y < 0) | (y >= grid[0]) | (x < 0) | (x >= grid[1])
        near = y.clamp(0, grid[0] - 1) * grid[1] + x.clamp(0, grid[1] - 1)
        keys = (~outside).sum(dim=1, keepdim=True) + pool[0] * pool[1]
        self.register_buffer("padding_mask", outside)
        self.register_buffer("neighbours", near, persistent=False)
        self.register_buffer("seq_length_scale", keys.double().log().float())

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Attend.

        Parameters
        ----------
        x : Tensor, shape (B, H*W, dim)

        Returns
        -------
        out : Tensor, shape (B, H*W, dim)
        routing : Routing
            For `load_balance_loss`.
        """
        self.check(x)
        routing = self.route(x)
        q = normalize(self.split(self.q(x), 1)[0], dim=-1)
        scaled = (q + self.query_embedding) * softplus(self.temperature) * self.seq_length_scale
        k, v = self.split(self.kv(x), 2)
        maps = self.sr(x.transpose(1, 2).unflatten(2, self.grid))
        coarse = self.norm(adaptive_avg_pool2d(gelu(maps), self.pool).flatten(2).transpose(1, 2))
        pooled_k, pooled_v = self.split(self.kv(coarse), 2)
        parts = _Parts(
            q,
            scaled,
            normalize(k, dim=-1),
            v,
            (normalize(pooled_k, dim=-1), pooled_v),
            self.position_bias(),
            (self.relative_pos_bias_local, self.learnable_tokens, self.learnable_bias),
            self.neighbours,
            self.padding_mask,
        )
        heads = OPERATION(self.impl, routing.selected, parts)
        weights = routing.gates.masked_fill(~routing.selected, 0.0).transpose(1, 2)
        out = (heads * weights[..., None]).to(x.dtype)
        return self.proj(out.transpose(1, 2).flatten(2)), routing

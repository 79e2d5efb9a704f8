"""Mixture-of-head attention between its projections: the DiT and the ViT form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, normalize, softplus

from brainalign_kernels.errors import ShapeError
from brainalign_kernels.moh.attention import Routing, moh_attention, moh_routing

__all__ = ["HeadRouter", "MoHAttention", "MoHViTAttention", "PositionMLP", "relative_coordinates"]


class HeadRouter(nn.Module):
    """Base of the modules: the routers ``wg`` (routed), ``wg_1`` (shared), ``wg_0`` (balance).

    Parameters
    ----------
    dim : int
        Channels of the tokens.
    num_heads : int
        All heads.
    shared_head : int
        Heads that every token uses.
    routed_head : int
        Heads that each token chooses among the others.
    head_dim : int, optional
        Channels of a head; by default dim / num_heads.
    impl : str
        As for `moh_attention`.

    Raises
    ------
    ShapeError
        If the numbers of heads do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared_head: int,
        routed_head: int,
        head_dim: int | None,
        impl: str,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % num_heads:
            raise ShapeError(f"dim {dim} is not a multiple of num_heads {num_heads}.")
        if shared_head < 0 or routed_head < 0 or shared_head + routed_head > num_heads:
            raise ShapeError(
                f"shared_head {shared_head} and routed_head {routed_head} must be at least 0 and "
                f"at most num_heads {num_heads} together."
            )
        if shared_head + routed_head == 0:
            raise ShapeError("shared_head and routed_head are both 0: no head would be used.")
        self.num_heads, self.shared_head, self.routed_head = num_heads, shared_head, routed_head
        self.head_dim, self.impl = head_dim or dim // num_heads, impl
        routed, both = routed_head > 0, routed_head > 0 and shared_head > 0
        self.wg = nn.Linear(dim, num_heads - shared_head, bias=False) if routed else None
        self.wg_0 = nn.Linear(dim, 2, bias=False) if both else None
        self.wg_1 = nn.Linear(dim, shared_head, bias=False) if shared_head > 1 else None

    def route(self, x: Tensor) -> Routing:
        """Choose the heads of the tokens x (B, N, dim)."""
        shared = None
        if self.shared_head:
            # The softmax over one shared head is 1, whatever its logit.
            shared = x[..., :1] * 0 if self.wg_1 is None else self.wg_1(x)
        routed = x.new_zeros((*x.shape[:2], self.num_heads - self.shared_head))
        return moh_routing(
            routed if self.wg is None else self.wg(x),
            self.routed_head,
            shared=shared,
            balance=None if self.wg_0 is None else self.wg_0(x),
        )

    def split(self, x: Tensor, parts: int) -> Tensor:
        """Heads (parts, B, H, N, head_dim) of projected tokens."""
        return x.unflatten(-1, (parts, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)


class MoHAttention(HeadRouter):
    r"""Multi-head attention with chosen heads (DiT form).

    .. math:: Y = W_o\, [g_1 \mathrm{head}_1(X), \dots, g_H \mathrm{head}_H(X)]

    Parameters
    ----------
    dim, num_heads, shared_head, routed_head, head_dim, impl
        As for `HeadRouter`.
    qkv_bias : bool
        Of the projection to queries, keys and values.
    qk_norm : bool
        Layer norm of queries and keys, per head.

    References
    ----------
    Jin et al. (2024), MoH: multi-head attention as mixture-of-head attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_head: int,
        routed_head: int,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, shared_head, routed_head, head_dim, impl)
        width = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, H, N, head_dim)."""
        q, k, v = self.split(self.qkv(x), 3)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Attend.

        Parameters
        ----------
        x : Tensor, shape (B, N, dim)

        Returns
        -------
        out : Tensor, shape (B, N, dim)
        routing : Routing
            For `load_balance_loss`.
        """
        routing = self.route(x)
        out = moh_attention(
            *self.heads(x), routing.gates, selected=routing.selected, impl=self.impl
        )
        return self.proj(out.transpose(1, 2).flatten(2)), routing


def relative_coordinates(
    grid: tuple[int, int], keys: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    r"""Distinct offsets between the tokens of two grids over one image, on a logarithmic scale.

    .. math:: \mathrm{sign}(\delta) \log_8(1 + |\delta|), \qquad
              \delta = 8\, (y_q - y_k) / (H - 1)

    and the same in x. A key of the coarser grid lies at the mean of the cells that it pools.

    Parameters
    ----------
    grid : (int, int)
        Height and width of the query grid.
    keys : (int, int), optional
        Of the key grid; by default the same.

    Returns
    -------
    table : Tensor, shape (offsets, 2)
    index : Tensor of int, shape (queries * keys,)
        Row of the table for each pair, the key fastest.
    """
    columns, indices = [], []
    for size, pooled in zip(grid, keys or grid, strict=True):
        at = torch.arange(size, dtype=torch.float64)
        there = adaptive_avg_pool1d(at[None], pooled)[0]
        offset = (at[:, None] - there[None]) / max(size - 1, 1) * 8
        # Offsets that differ by rounding are one.
        column, index = (offset * 2**20).round().unique(return_inverse=True)
        column = column / 2**20
        columns.append(column.sign() * (1 + column.abs()).log2() / math.log2(8))
        indices.append(index)
    rows, cols = indices
    table = torch.cartesian_prod(*columns)
    index = rows[:, None, :, None] * len(columns[1]) + cols[None, :, None, :]
    return table.float(), index.flatten()


class PositionMLP(HeadRouter):
    """Base of the ViT forms: cosine attention with a bias from relative coordinates.

    Parameters
    ----------
    dim, num_heads, shared_head, routed_head, head_dim, impl
        As for `HeadRouter`.
    grid : (int, int)
        Height and width of the query grid.
    keys : (int, int)
        Of the grid of keys.
    cpb_hidden : int
        Width of the network from coordinates to biases.
    """

    relative_coords_table: Tensor
    relative_pos_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared_head: int,
        routed_head: int,
        head_dim: int | None,
        impl: str,
        grid: tuple[int, int],
        keys: tuple[int, int],
        cpb_hidden: int,
    ) -> None:
        super().__init__(dim, num_heads, shared_head, routed_head, head_dim, impl)
        self.grid = grid
        self.temperature = nn.Parameter(
            torch.full((num_heads, 1, 1), math.log(math.expm1(1 / 0.24)))
        )
        self.query_embedding = nn.Parameter(0.02 * torch.randn(num_heads, 1, self.head_dim))
        self.cpb_fc1 = nn.Linear(2, cpb_hidden)
        self.cpb_fc2 = nn.Linear(cpb_hidden, num_heads)
        table, index = relative_coordinates(grid, keys)
        self.register_buffer("relative_coords_table", table, persistent=False)
        self.register_buffer("relative_pos_index", index, persistent=False)

    def position_bias(self) -> Tensor:
        """Bias (H, queries, keys) of the logits."""
        table = self.cpb_fc2(self.cpb_fc1(self.relative_coords_table).relu())
        tokens = self.grid[0] * self.grid[1]
        return table.T[:, self.relative_pos_index].unflatten(1, (tokens, -1))

    def check(self, x: Tensor) -> None:
        """Refuse tokens that are not those of the grid."""
        if x.ndim != 3 or x.shape[1] != self.grid[0] * self.grid[1]:
            raise ShapeError(
                f"Expected tokens (B, {self.grid[0]} * {self.grid[1]}, dim); got {tuple(x.shape)}."
            )


class MoHViTAttention(PositionMLP):
    r"""Cosine attention over a grid with chosen heads (ViT form).

    .. math:: Y = W_o\, [g_h\, \mathrm{softmax}((\hat q_h + e_h)\,
              \mathrm{softplus}(\tau_h)\, \log(N)\, \hat k_h^T + b_h)\, v_h]_h

    with queries and keys of unit length.

    Parameters
    ----------
    dim, num_heads, shared_head, routed_head, head_dim, impl
        As for `HeadRouter`.
    grid : (int, int)
        Height and width of the token grid.
    qkv_bias : bool
        Of the projection to queries, keys and values.
    cpb_hidden : int
        Width of the network from relative coordinates to biases.

    References
    ----------
    Jin et al. (2024), MoH: multi-head attention as mixture-of-head attention.
    """

    seq_length_scale: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        shared_head: int,
        routed_head: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        cpb_hidden: int = 512,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            dim, num_heads, shared_head, routed_head, head_dim, impl, grid, grid, cpb_hidden
        )
        width = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, dim)
        scale = torch.tensor(math.log(grid[0] * grid[1]))
        self.register_buffer("seq_length_scale", scale)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scaled queries, keys and values (B, H, N, head_dim)."""
        q, k, v = self.split(self.qkv(x), 3)
        q = normalize(q, dim=-1) + self.query_embedding
        q = q * softplus(self.temperature) * self.seq_length_scale
        return q, normalize(k, dim=-1), v

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
        out = moh_attention(
            *self.heads(x),
            routing.gates,
            selected=routing.selected,
            mask=self.position_bias()[None],
            scale=1.0,
            impl=self.impl,
        )
        return self.proj(out.transpose(1, 2).flatten(2)), routing

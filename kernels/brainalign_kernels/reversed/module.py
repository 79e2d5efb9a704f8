"""Reversed attention with its head router and message controller, and a stack that prunes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from brainalign_kernels.errors import ShapeError
from brainalign_kernels.reversed.attention import (
    dependency_mask,
    pruning_scores,
    reversed_attention,
)

__all__ = [
    "DependencyBlock",
    "DependencyOutput",
    "DependencyTransformer",
    "Messages",
    "ReversedAttention",
]


class Messages(NamedTuple):
    """What goes from a layer of reversed attention to the next.

    Parameters
    ----------
    gate : Tensor, shape (B, N)
        Product of the message controllers so far.
    scores : Tensor, shape (B, N)
        Sent mass of every token, by which it is pruned.
    """

    gate: Tensor
    scores: Tensor


class ReversedAttention(nn.Module):
    r"""Reversed attention between its projections.

    .. math:: P = \mathrm{softmax}_h(x W_P / \tau), \qquad
              m^{(l)} = m^{(l-1)}\, \sigma(\mathrm{MLP}(x))

    Parameters
    ----------
    dim : int
        Channels of the tokens.
    num_heads : int
        Heads; divides `dim`.
    tau : float
        Temperature of the head router.
    qkv_bias : bool
        Of the projection to queries, keys and values.
    controller_hidden : int, optional
        Width of the message controller; by default `dim`.
    impl : str
        As for `reversed_attention`.

    Raises
    ------
    ShapeError
        If the heads do not divide the channels, or tau is not positive.

    References
    ----------
    Ding et al. (2023), Visual dependency transformers: dependency tree emerges from reversed
    attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        tau: float = 0.1,
        qkv_bias: bool = True,
        controller_hidden: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ShapeError(f"dim {dim} is not a multiple of num_heads {num_heads}.")
        if tau <= 0:
            raise ShapeError(f"tau must be positive; got {tau}.")
        self.num_heads, self.tau, self.impl = num_heads, tau, impl
        hidden = controller_hidden or dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.head_router = nn.Linear(dim, num_heads)
        self.controller = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.proj = nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _controls(self, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        probabilities = (self.head_router(x) / self.tau).softmax(dim=-1).transpose(1, 2)
        passed = self.controller(x).squeeze(-1).sigmoid()
        return probabilities, passed if gate is None else gate * passed

    def forward(
        self, x: Tensor, gate: Tensor | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Messages]:
        """Send.

        Parameters
        ----------
        x : Tensor, shape (B, N, dim)
        gate : Tensor, shape (B, N), optional
            Of the layer before; 1 by default.
        mask : Tensor, broadcastable to (B, H, N, N), optional
            As for `reversed_attention`.

        Returns
        -------
        out : Tensor, shape (B, N, dim)
        messages : Messages
        """
        probabilities, gate = self._controls(x, gate)
        out = reversed_attention(
            *self._heads(x), head_probabilities=probabilities, gate=gate, mask=mask, impl=self.impl
        )
        messages = Messages(gate, pruning_scores(probabilities, gate))
        return self.proj(out.transpose(1, 2).flatten(2)), messages

    def dependencies(
        self, x: Tensor, gate: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Return the dependency mask (B, N, N) of the same arguments."""
        q, k, _ = self._heads(x)
        probabilities, gate = self._controls(x, gate)
        return dependency_mask(q, k, head_probabilities=probabilities, gate=gate, mask=mask)


class DependencyBlock(nn.Module):
    r"""Reversed attention and a feed-forward network, each after a norm and with a skip.

    .. math:: x \leftarrow x + \mathrm{RA}(\mathrm{LN}(x)), \quad
              x \leftarrow x + \mathrm{MLP}(\mathrm{LN}(x))

    Parameters
    ----------
    dim, num_heads, tau, qkv_bias, impl
        As for `ReversedAttention`.
    mlp_ratio : float
        Width of the feed-forward network over `dim`.

    References
    ----------
    Ding et al. (2023), Visual dependency transformers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        tau: float = 0.1,
        qkv_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = ReversedAttention(dim, num_heads, tau=tau, qkv_bias=qkv_bias, impl=impl)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Messages]:
        """Apply to x (B, N, dim) and the gate (B, N) of the block before."""
        sent, messages = self.attention(self.norm1(x), gate)
        x = x + sent
        return x + self.mlp(self.norm2(x)), messages


class DependencyOutput(NamedTuple):
    """Result of a `DependencyTransformer`.

    Parameters
    ----------
    tokens : Tensor, shape (B, n, dim)
        Of the tokens that are left.
    gate : Tensor, shape (B, n)
        Their message controllers' product.
    kept : Tensor of int, shape (B, n)
        Their places in the input, ascending.
    """

    tokens: Tensor
    gate: Tensor
    kept: Tensor


class DependencyTransformer(nn.Module):
    """Stack of dependency blocks; the light version prunes the tokens that send least.

    Parameters
    ----------
    dim, num_heads, mlp_ratio, tau, qkv_bias, impl
        As for `DependencyBlock`.
    depth : int
        Blocks.
    prune_after : sequence of int
        Blocks, counted from 1, after which tokens are pruned. The light version of the paper, of
        12 blocks, has (2, 5, 8, 11); by default none.
    keep : float
        Share of the tokens that a pruning leaves, rounded up.
    leading : int
        First tokens that are never pruned (class tokens).

    Raises
    ------
    ShapeError
        For blocks that do not exist and a share outside (0, 1].

    References
    ----------
    Ding et al. (2023), Visual dependency transformers.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        prune_after: Sequence[int] = (),
        keep: float = 0.7,
        leading: int = 0,
        mlp_ratio: float = 4.0,
        tau: float = 0.1,
        qkv_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if any(not 1 <= layer <= depth for layer in prune_after):
            raise ShapeError(f"prune_after must lie in 1 to {depth}; got {tuple(prune_after)}.")
        if not 0 < keep <= 1 or leading < 0:
            raise ShapeError(f"Expected 0 < keep <= 1 and leading >= 0; got {keep}, {leading}.")
        self.prune_after, self.keep, self.leading = frozenset(prune_after), keep, leading
        self.blocks = nn.ModuleList(
            DependencyBlock(
                dim, num_heads, mlp_ratio=mlp_ratio, tau=tau, qkv_bias=qkv_bias, impl=impl
            )
            for _ in range(depth)
        )

    def _choose(self, scores: Tensor) -> Tensor:
        tokens = scores.shape[1]
        leading = min(self.leading, tokens)
        # The margin keeps a product that is a whole number from being rounded up.
        count = math.ceil(self.keep * (tokens - leading) - 1e-9)
        best = scores[:, leading:].topk(count, dim=1).indices.sort(dim=1).values + leading
        first = torch.arange(leading, device=scores.device).expand(scores.shape[0], -1)
        return torch.cat([first, best], dim=1)

    def forward(self, x: Tensor) -> DependencyOutput:
        """Apply to tokens x (B, N, dim).

        Returns
        -------
        DependencyOutput
        """
        kept = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        gate = x.new_ones(x.shape[:2])
        for number, block in enumerate(self.blocks, start=1):
            x, messages = block(x, gate)
            gate = messages.gate
            if number in self.prune_after:
                at = self._choose(messages.scores)
                x = x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
                gate, kept = gate.gather(1, at), kept.gather(1, at)
        return DependencyOutput(x, gate, kept)

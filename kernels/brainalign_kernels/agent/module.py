"""The published blocks of agent attention, with the parameter names of their checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainalign_kernels.agent.attention import agent_attention
from brainalign_kernels.errors import ShapeError

__all__ = [
    "AgentAttentionCSWin",
    "AgentAttentionDeiT",
    "AgentAttentionPVT",
    "AgentAttentionSD",
    "AgentAttentionSwin",
]

#: Side of the bias tables, which are resized to the map.
_TABLE = 7


def _side(agent_num: int) -> int:
    side = math.isqrt(agent_num)
    if side * side != agent_num or side == 0:
        raise ShapeError(f"agent_num must be a square (the agents' grid); got {agent_num}.")
    return side


def _head_dim(dim: int, num_heads: int) -> int:
    if dim % num_heads:
        raise ShapeError(f"dim {dim} must be a multiple of num_heads {num_heads}.")
    return dim // num_heads


def _square(tokens: int, what: str) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ShapeError(f"{what} must be a square; got {tokens} tokens.")
    return side


def _to_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _from_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, h*w, C) to a map (B, C, h, w)."""
    return x.transpose(1, 2).unflatten(2, size)


class _AgentBlock(nn.Module):
    """Bias tables, pooled agents and the depthwise convolution, which all blocks share.

    Parameters
    ----------
    dim, num_heads, agent_num : int
        Channels, heads and agents.
    query_size, key_size : (int, int)
        Maps of the queries and of the keys.
    impl : str
        See `agent_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agent_num: int,
        query_size: tuple[int, int],
        key_size: tuple[int, int],
        impl: str,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.agent_num = dim, num_heads, agent_num
        self.head_dim = _head_dim(dim, num_heads)
        self.side = _side(agent_num)
        self.query_size, self.key_size, self.impl = query_size, key_size, impl
        (h, w), (kh, kw), m = query_size, key_size, agent_num
        self.an_bias = nn.Parameter(torch.zeros(num_heads, m, _TABLE, _TABLE))
        self.na_bias = nn.Parameter(torch.zeros(num_heads, m, _TABLE, _TABLE))
        self.ah_bias = nn.Parameter(torch.zeros(1, num_heads, m, kh, 1))
        self.aw_bias = nn.Parameter(torch.zeros(1, num_heads, m, 1, kw))
        self.ha_bias = nn.Parameter(torch.zeros(1, num_heads, h, 1, m))
        self.wa_bias = nn.Parameter(torch.zeros(1, num_heads, 1, w, m))
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def position_bias(self) -> Tensor:
        """B_1, shape (1, heads, agents, keys)."""
        table = functional.interpolate(self.an_bias, self.key_size, mode="bilinear")
        return (table + self.ah_bias + self.aw_bias).flatten(3)

    def agent_bias(self) -> Tensor:
        """B_2, shape (1, heads, queries, agents)."""
        table = functional.interpolate(self.na_bias, self.query_size, mode="bilinear")
        return (table.permute(0, 2, 3, 1) + self.ha_bias + self.wa_bias).flatten(2, 3)

    def agent_tokens(self, q: Tensor) -> Tensor:
        """Pool queries (B, h*w, C) to agents (B, heads, agents, channels)."""
        pooled = functional.adaptive_avg_pool2d(_to_map(q, self.query_size), self.side)
        return _to_heads(pooled.flatten(2).transpose(1, 2), self.num_heads)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        agents: Tensor,
        position_bias: Tensor,
        agent_bias: Tensor,
    ) -> Tensor:
        """Core on tokens (B, n, C) with given agents and biases."""
        q, k, v = (_to_heads(x, self.num_heads) for x in (q, k, v))
        out = agent_attention(
            q, k, v, agents, position_bias=position_bias.to(q.dtype),
            agent_bias=agent_bias.to(q.dtype), impl=self.impl,
        )  # fmt: skip
        return _from_heads(out)

    def check(self, x: Tensor, tokens: int, what: str) -> None:
        """Refuse what is not (B, tokens, dim)."""
        if x.ndim != 3 or x.shape[1] != tokens or x.shape[2] != self.dim:
            raise ShapeError(
                f"{type(self).__name__} takes (batch, {tokens}, {self.dim}), {what}; "
                f"got {tuple(x.shape)}."
            )


class AgentAttentionSwin(_AgentBlock):
    r"""Agent attention inside a window.

    .. math:: y = W_o \left(\mathrm{agent}(Q, K, V, \mathrm{pool}(Q))
                          + \mathrm{DWConv}_{3 \times 3}(V)\right)

    Parameters
    ----------
    dim, num_heads : int
        Channels and heads.
    window_size : (int, int)
        Rows and columns of a window.
    agent_num : int
        Agents per window, a square number.
    qkv_bias : bool
        Give the projection to queries, keys and values a bias.
    impl : str
        See `agent_attention`.

    Raises
    ------
    ShapeError
        If sizes do not fit.

    References
    ----------
    Han et al. (2024), Agent attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int],
        agent_num: int = 49,
        *,
        qkv_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, agent_num, window_size, window_size, impl)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map windows (windows, rows * columns, dim) to the same shape."""
        h, w = self.query_size
        self.check(x, h * w, f"windows of {h} x {w} tokens")
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        agents = self.agent_tokens(q)
        out = self.attend(q, k, v, agents, self.position_bias(), self.agent_bias())
        return self.proj(out + self.dwc(_to_map(v, self.query_size)).flatten(2).transpose(1, 2))


class AgentAttentionDeiT(_AgentBlock):
    """Agent attention over an image with a class token, which comes first.

    The class token is left out of the pooling and of the depthwise convolution, and has its own
    entries in both biases. Otherwise as `AgentAttentionSwin`.

    Parameters
    ----------
    dim, num_heads : int
        Channels and heads.
    window : int or (int, int)
        Rows and columns of the patches; one number for a square.
    agent_num : int
        Agents, a square number.
    qkv_bias : bool
        Give the projection to queries, keys and values a bias.
    impl : str
        See `agent_attention`.

    Raises
    ------
    ShapeError
        If sizes do not fit.

    References
    ----------
    Han et al. (2024), Agent attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int | tuple[int, int],
        agent_num: int = 49,
        *,
        qkv_bias: bool = False,
        impl: str = "auto",
    ) -> None:
        size = (window, window) if isinstance(window, int) else window
        super().__init__(dim, num_heads, agent_num, size, size, impl)
        self.ac_bias = nn.Parameter(torch.zeros(1, num_heads, agent_num, 1))
        self.ca_bias = nn.Parameter(torch.zeros(1, num_heads, 1, agent_num))
        nn.init.trunc_normal_(self.ac_bias, std=0.02)
        nn.init.trunc_normal_(self.ca_bias, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def position_bias(self) -> Tensor:
        """B_1 with the class key first, shape (1, heads, agents, 1 + keys)."""
        return torch.cat([self.ac_bias, super().position_bias()], dim=-1)

    def agent_bias(self) -> Tensor:
        """B_2 with the class query first, shape (1, heads, 1 + queries, agents)."""
        return torch.cat([self.ca_bias, super().agent_bias()], dim=-2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 1 + rows * columns, dim) to the same shape."""
        h, w = self.query_size
        self.check(x, 1 + h * w, f"a class token and {h} x {w} patches")
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        agents = self.agent_tokens(q[:, 1:])
        out = self.attend(q, k, v, agents, self.position_bias(), self.agent_bias())
        near = self.dwc(_to_map(v[:, 1:], self.query_size)).flatten(2).transpose(1, 2)
        return self.proj(out + functional.pad(near, (0, 0, 1, 0)))


class AgentAttentionPVT(_AgentBlock):
    """Agent attention with keys and values from a strided convolution of the map.

    The value map is resized back to the queries' map before the depthwise convolution. Otherwise
    as `AgentAttentionSwin`.

    Parameters
    ----------
    dim, num_heads : int
        Channels and heads.
    size : (int, int)
        Rows and columns of the map.
    agent_num : int
        Agents, a square number.
    sr_ratio : int
        Kernel and stride of the convolution that makes the keys' map; 1: there is none.
    qkv_bias : bool
        Give the projections to queries, keys and values a bias.
    impl : str
        See `agent_attention`.

    Raises
    ------
    ShapeError
        If sizes do not fit.

    References
    ----------
    Han et al. (2024), Agent attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        size: tuple[int, int],
        agent_num: int = 49,
        *,
        sr_ratio: int = 1,
        qkv_bias: bool = False,
        impl: str = "auto",
    ) -> None:
        if sr_ratio < 1 or min(size) < sr_ratio:
            raise ShapeError(f"sr_ratio must lie between 1 and the map {size}; got {sr_ratio}.")
        keys = (size[0] // sr_ratio, size[1] // sr_ratio)
        super().__init__(dim, num_heads, agent_num, size, keys, impl)
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, rows * columns, dim) to the same shape."""
        h, w = self.query_size
        self.check(x, h * w, f"a map of {h} x {w} tokens")
        q, source = self.q(x), x
        if self.sr_ratio > 1:
            source = self.norm(self.sr(_to_map(x, (h, w))).flatten(2).transpose(1, 2))
        k, v = self.kv(source).chunk(2, dim=-1)
        agents = self.agent_tokens(q)
        out = self.attend(q, k, v, agents, self.position_bias(), self.agent_bias())
        values = _to_map(v, self.key_size)
        if self.sr_ratio > 1:
            values = functional.interpolate(values, (h, w), mode="bilinear")
        return self.proj(out + self.dwc(values).flatten(2).transpose(1, 2))


class AgentAttentionCSWin(_AgentBlock):
    """Agent attention on stripes of a square map; takes projected queries, keys and values.

    There is no projection: CSWin projects before and after its two branches.

    Parameters
    ----------
    dim, num_heads : int
        Channels and heads of the branch.
    resolution : int
        Rows (and columns) of the map.
    stripe : (int, int)
        Rows and columns of a stripe; they divide the map.
    agent_num : int
        Agents per stripe, a square number.
    impl : str
        See `agent_attention`.

    Raises
    ------
    ShapeError
        If sizes do not fit.

    References
    ----------
    Han et al. (2024), Agent attention; Dong et al. (2022), CSWin transformer.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        resolution: int,
        stripe: tuple[int, int],
        agent_num: int = 49,
        *,
        impl: str = "auto",
    ) -> None:
        if min(stripe) < 1 or resolution % stripe[0] or resolution % stripe[1]:
            raise ShapeError(
                f"Stripes must divide the {resolution} x {resolution} map; got {stripe}."
            )
        super().__init__(dim, num_heads, agent_num, stripe, stripe, impl)
        self.resolution = resolution
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def _stripes(self, x: Tensor) -> Tensor:
        (h, w), n = self.query_size, self.resolution
        x = x.unflatten(1, (n // h, h, n // w, w)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def _whole(self, x: Tensor) -> Tensor:
        (h, w), n = self.query_size, self.resolution
        return (
            x.reshape(-1, n // h, n // w, h, w, self.dim)
            .transpose(2, 3)
            .reshape(-1, n * n, self.dim)
        )

    def forward(self, qkv: Tensor) -> Tensor:
        """Map (3, batch, resolution^2, dim) to (batch, resolution^2, dim)."""
        tokens = self.resolution**2
        if qkv.ndim != 4 or qkv.shape[0] != 3 or qkv.shape[2:] != (tokens, self.dim):
            raise ShapeError(
                f"AgentAttentionCSWin takes (3, batch, {tokens}, {self.dim}); "
                f"got {tuple(qkv.shape)}."
            )
        q, k, v = (self._stripes(x) for x in qkv)
        agents = self.agent_tokens(q)
        out = self.attend(q, k, v, agents, self.position_bias(), self.agent_bias())
        near = self.get_v(_to_map(v, self.query_size)).flatten(2).transpose(1, 2)
        return self._whole(out + near)


class AgentAttentionSD(nn.Module):
    r"""Self-attention of Stable Diffusion with agents: no new parameters, no training.

    .. math:: O = \mathrm{softmax}(s^{p} Q A^T)\, \mathrm{softmax}(s A K^T) V + c V

    The agents A are the queries pooled over the map. The parameters are those of the attention
    that it replaces (diffusers' names).

    Parameters
    ----------
    dim, num_heads : int
        Channels and heads.
    agent_num : int
        Agents, a square number.
    k_scale2 : float
        p: power of the scale in the second softmax.
    k_shortcut : float
        c: share of the values that is added.
    bias : bool
        Give the projections to queries, keys and values a bias.
    impl : str
        See `agent_attention`.

    Raises
    ------
    ShapeError
        If sizes do not fit.

    References
    ----------
    Han et al. (2024), Agent attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agent_num: int = 256,
        *,
        k_scale2: float = 0.3,
        k_shortcut: float = 0.075,
        bias: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        _head_dim(dim, num_heads)
        self.dim, self.num_heads, self.side = dim, num_heads, _side(agent_num)
        self.k_scale2, self.k_shortcut, self.impl = k_scale2, k_shortcut, impl
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, dim, bias=bias)
        self.to_v = nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map (batch, rows * columns, dim) to the same shape.

        Parameters
        ----------
        x : Tensor
            Tokens, row by row.
        size : (int, int), optional
            Rows and columns; by default a square.
        """
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ShapeError(f"Expected (batch, tokens, {self.dim}); got {tuple(x.shape)}.")
        if size is None:
            side = _square(x.shape[1], "Without a size the map")
            size = (side, side)
        if size[0] * size[1] != x.shape[1]:
            raise ShapeError(f"A map of {size} has not the {x.shape[1]} tokens that came.")
        q = self.to_q(x)
        pooled = functional.adaptive_avg_pool2d(_to_map(q, size), self.side)
        heads = [
            _to_heads(t, self.num_heads)
            for t in (q, self.to_k(x), self.to_v(x), pooled.flatten(2).transpose(1, 2))
        ]
        out = agent_attention(
            *heads, k_scale2=self.k_scale2, k_shortcut=self.k_shortcut, impl=self.impl
        )
        return self.to_out(_from_heads(out))

"""Attention of the dynamical systems framework between its projections."""

from __future__ import annotations

from torch import Tensor, nn

from brainalign_kernels.dynamics.attention import dsf_attention
from brainalign_kernels.errors import ShapeError

__all__ = ["DSFAttention"]


class DSFAttention(nn.Module):
    r"""Causal multi-head attention: softmax, linear or normalised.

    .. math:: y = W_o\, [\mathrm{DSF}(x W_q, x W_k, x W_v)]_h

    Parameters
    ----------
    d_model : int
        Channels of the tokens.
    num_heads : int
        Heads.
    kind : {"softmax", "linear", "norm"}
        As for `dsf_attention`.
    d_qk : int, optional
        Channels of queries and keys over all heads; by default `d_model`.
    d_v : int, optional
        Channels of values over all heads; by default `d_model`.
    bias : bool
        Of the projections to queries, keys, values and the normaliser.
    out_bias : bool
        Of the output projection.
    impl : str
        As for `dsf_attention`.

    Raises
    ------
    ShapeError
        If the heads do not divide the channels.

    References
    ----------
    Sieber et al. (2024), Understanding the differences in foundation models: attention, state
    space models, and recurrent neural networks.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        kind: str,
        *,
        d_qk: int | None = None,
        d_v: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        d_qk = d_model if d_qk is None else d_qk
        d_v = d_model if d_v is None else d_v
        if d_qk % num_heads or d_v % num_heads:
            raise ShapeError(f"d_qk {d_qk} and d_v {d_v} must be multiples of {num_heads} heads.")
        self.num_heads, self.kind, self.impl = num_heads, kind, impl
        self.Wqk = nn.Linear(d_model, 2 * d_qk, bias=bias)
        self.Wv = nn.Linear(d_model, d_v, bias=bias)
        self.Wn = nn.Linear(d_model, num_heads, bias=bias) if kind == "norm" else None
        self.out_proj = nn.Linear(d_v, d_model, bias=out_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries, keys and values (B, H, N, D), and the log normaliser (B, H, N)."""
        q, k = self.Wqk(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        v = self.Wv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return q, k, v, None if self.Wn is None else self.Wn(x).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Parameters
        ----------
        x : Tensor, shape (B, N, d_model)

        Returns
        -------
        Tensor, shape (B, N, d_model)
        """
        q, k, v, n = self.project(x)
        out = dsf_attention(q, k, v, kind=self.kind, log_normaliser=n, impl=self.impl)
        return self.out_proj(out.transpose(1, 2).flatten(2))

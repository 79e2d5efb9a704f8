"""Flow-Attention between its projections."""

from __future__ import annotations

from torch import Tensor, nn

from brainalign_kernels.errors import ShapeError
from brainalign_kernels.flow.attention import flow_attention

__all__ = ["FlowAttention"]


class FlowAttention(nn.Module):
    r"""Multi-head Flow-Attention.

    .. math:: y = W_o\, \mathrm{flow}(W_q x, W_k x, W_v x)

    Parameters
    ----------
    d_input : int
        Channels of the tokens.
    d_model : int
        Channels of queries, keys and values, over all heads.
    d_output : int
        Channels of the result.
    n_heads : int
        Heads; divides `d_model`.
    is_causal, eps, chunk_size, impl
        As for `flow_attention`.

    Raises
    ------
    ShapeError
        If `n_heads` does not divide `d_model`.

    References
    ----------
    Wu et al. (2022), Flowformer: linearizing transformers with conservation flows.
    """

    def __init__(
        self,
        d_input: int,
        d_model: int,
        d_output: int,
        n_heads: int,
        *,
        is_causal: bool = False,
        eps: float = 1e-6,
        chunk_size: int = 64,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ShapeError(f"d_model {d_model} is not a multiple of n_heads {n_heads}.")
        self.n_heads, self.is_causal, self.eps = n_heads, is_causal, eps
        self.chunk_size, self.impl = chunk_size, impl
        self.query_projection = nn.Linear(d_input, d_model)
        self.key_projection = nn.Linear(d_input, d_model)
        self.value_projection = nn.Linear(d_input, d_model)
        self.out_projection = nn.Linear(d_model, d_output)

    def forward(
        self, queries: Tensor, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Tensor:
        """Attend; keys default to the queries, values to the keys.

        Parameters
        ----------
        queries : Tensor, shape (B, N, d_input)
        keys, values : Tensor, shape (B, S, d_input), optional

        Returns
        -------
        Tensor, shape (B, N, d_output)
        """
        keys = queries if keys is None else keys
        values = keys if values is None else values
        q, k, v = (
            projection(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for projection, x in (
                (self.query_projection, queries),
                (self.key_projection, keys),
                (self.value_projection, values),
            )
        )
        out = flow_attention(
            q,
            k,
            v,
            is_causal=self.is_causal,
            eps=self.eps,
            chunk_size=self.chunk_size,
            impl=self.impl,
        )
        return self.out_projection(out.transpose(1, 2).flatten(2))

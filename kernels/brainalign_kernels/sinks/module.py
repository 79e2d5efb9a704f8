"""Attention with learned sink logits as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brainalign_kernels.sinks.attention import sink_attention

__all__ = ["SinkAttention"]


class SinkAttention(nn.Module):
    r"""`sink_attention` with one learned sink logit per head.

    .. math:: o_i = \sigma(\mathrm{lse}_i - c_h) \, \mathrm{softmax\ attention}_i

    Parameters
    ----------
    num_heads : int
        Of the queries.
    initial : float
        First value of the logits; -inf would never learn.
    impl : {"auto", "reference", "compiled"}
        See `sink_attention`.

    References
    ----------
    OpenAI (2025), gpt-oss model card.
    """

    def __init__(self, num_heads: int, *, initial: float = 0.0, impl: str = "auto") -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.full((num_heads,), initial))
        self.impl = impl

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Attend; arguments as in `sink_attention`."""
        options = {"mask": mask, "is_causal": is_causal, "scale": scale}
        return sink_attention(q, k, v, self.sink, impl=self.impl, **options)  # type: ignore[arg-type]

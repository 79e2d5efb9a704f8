"""Causal products of linear attention, by chunks: no (N, D, E) and no (N, N) array."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["causal_product"]


def causal_product(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    r"""Causal linear attention without decay, :math:`o_i = \sum_{j \le i} (q_i \cdot k_j) v_j`.

    Inside a chunk the scores are formed; earlier chunks arrive as the sum of their
    :math:`k_j v_j^T`, one (D, E) matrix for each chunk.

    Parameters
    ----------
    q, k : Tensor, shape (..., N, D)
        Queries and keys, in the precision of the sums.
    v : Tensor, shape (..., N, E)
        Values.
    chunk_size : int
        Tokens of a chunk.

    Returns
    -------
    Tensor, shape (..., N, E)
    """
    tokens = q.shape[-2]
    size = min(chunk_size, tokens)
    if size == 0:
        return (q @ k.transpose(-1, -2)) @ v
    chunks = (tokens + size - 1) // size
    extra = chunks * size - tokens
    q, k, v = (pad(x, (0, 0, 0, extra)).unflatten(-2, (chunks, size)) for x in (q, k, v))
    out = (q @ k.transpose(-1, -2)).tril() @ v
    if chunks > 1:
        sums = (k.transpose(-1, -2) @ v).cumsum(dim=-3)
        out = out + q @ pad(sums, (0, 0, 0, 0, 1, -1))
    return out.flatten(-3, -2)[..., :tokens, :]

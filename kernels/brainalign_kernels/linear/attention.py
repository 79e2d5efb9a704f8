"""Linear attention without decay: the public function, both ways to multiply."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, check_qkv, expand_heads
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.lightning import lightning_attention

__all__ = ["linear_attention"]


def _scores_first(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, eps: float | None
) -> Tensor:
    wide = accumulation_dtype(q.dtype)
    scores = scale * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    scores = scores.tril() if is_causal else scores
    out = scores @ v.to(wide)
    if eps is not None:
        out = out / (scores.sum(-1, keepdim=True) + eps)
    return out.to(q.dtype)


def _state_first(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float, eps: float | None
) -> Tensor:
    dtype, wide = q.dtype, accumulation_dtype(q.dtype)
    q, k, v = scale * q.to(wide), k.to(wide), v.to(wide)
    if is_causal:
        out = lightning_attention(q, k, v, None)
        total = k.cumsum(2)
    else:
        out = q @ (k.transpose(-1, -2) @ v)
        total = k.sum(2, keepdim=True)
    if eps is not None:
        out = out / ((q * total).sum(-1, keepdim=True) + eps)
    return out.to(dtype)


OPERATION = Operation("linear_attention", _scores_first, compiled=Path(_state_first))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    eps: float | None = None,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    r"""Linear attention: softmax attention with the exponential left out.

    .. math:: o_i = \frac{s \sum_j (q_i \cdot k_j)\, v_j}{s \sum_j q_i \cdot k_j + \epsilon}

    Without `eps` there is no denominator. Give feature maps of queries and keys, such as elu + 1,
    as q and k.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries.
    k : Tensor, shape (B, G, S, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, S, E)
        Values.
    is_causal : bool
        Query i sees the keys 0 to i; needs N = S.
    eps : float, optional
        Normalise, with this added to the denominator. Sensible where the products q.k are positive.
    scale : float
        Factor s of the products q.k.
    impl : {"auto", "reference", "compiled"}
        "reference" forms the (N, S) scores; "compiled" multiplies keys and values first.

    Returns
    -------
    Tensor, shape (B, H, N, E)

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Katharopoulos et al. (2020), Transformers are RNNs: fast autoregressive transformers with linear
    attention, eqs. 5 and 9.
    """
    check_qkv(q, k, v, same_length=is_causal)
    k, v = expand_heads(q, k, v)
    out: Tensor = OPERATION(impl, q, k, v, is_causal=is_causal, scale=float(scale), eps=eps)
    return out

"""The public function: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import check_mask, check_qkv, default_scale
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.softmax import reference, sdpa

__all__ = ["softmax_attention"]

OPERATION = Operation(
    "softmax_attention", reference.softmax_attention, compiled=Path(sdpa.softmax_attention)
)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Softmax attention.

    .. math:: o_i = \sum_j \frac{\exp(s\, q_i \cdot k_j + m_{ij})}
                               {\sum_l \exp(s\, q_i \cdot k_l + m_{il})} v_j

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries.
    k : Tensor, shape (B, G, S, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, S, E)
        Values.
    mask : Tensor, broadcastable to (B, H, N, S), optional
        Boolean (True: may be attended) or added to the logits. A row that may attend to nothing
        gives zeros.
    is_causal : bool
        Query i sees the keys 0 to i.
    scale : float, optional
        s; by default D^-1/2.
    impl : {"auto", "reference", "compiled"}
        "compiled" is PyTorch's scaled_dot_product_attention.

    Returns
    -------
    Tensor, shape (B, H, N, E)

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Vaswani et al. (2017), Attention is all you need, eq. 1.
    """
    check_qkv(q, k, v)
    check_mask(q, k, mask)
    scale = default_scale(scale, q.shape[-1])
    return OPERATION(impl, q, k, v, mask=mask, is_causal=is_causal, scale=scale)

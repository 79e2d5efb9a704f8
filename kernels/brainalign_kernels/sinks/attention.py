"""Attention with a learned sink logit: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import check_mask, check_qkv, default_scale
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.sinks import reference, sdpa

__all__ = ["sink_attention"]

OPERATION = Operation(
    "sink_attention", reference.sink_attention, compiled=Path(sdpa.sink_attention)
)


def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Softmax attention that may also attend to nothing, by a learned sink logit.

    .. math::
        \ell_{ij} = s\, q_i \cdot k_j + m_{ij}, \quad
        o_i = \sigma\Big(\log \sum_j e^{\ell_{ij}} - c\Big)\,
              \sum_j \frac{e^{\ell_{ij}}}{\sum_l e^{\ell_{il}}} v_j
            = \sum_j \frac{e^{\ell_{ij}}}{e^{c} + \sum_l e^{\ell_{il}}} v_j

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries.
    k : Tensor, shape (B, G, S, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, S, E)
        Values.
    sink : Tensor, shape (H,) or broadcastable to (B, H, N)
        c, the logit of attending to nothing. -inf gives plain softmax attention.
    mask : Tensor, broadcastable to (B, H, N, S), optional
        Boolean (True: may be attended) or added to the logits. A row that may attend to nothing
        gives zeros.
    is_causal : bool
        Query i sees the keys 0 to i.
    scale : float, optional
        s; by default D^-1/2.
    impl : {"auto", "reference", "compiled"}
        "compiled" is PyTorch's scaled_dot_product_attention with one key more.

    Returns
    -------
    Tensor, shape (B, H, N, E)

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Xiao et al. (2024), Efficient streaming language models with attention sinks. The learned logit:
    OpenAI (2025), gpt-oss model card.
    """
    check_qkv(q, k, v)
    check_mask(q, k, mask)
    if sink.ndim == 1:
        sink = sink[None, :, None]
    fits = sink.ndim == 3 and all(
        have in (1, want) for have, want in zip(sink.shape, q.shape, strict=False)
    )
    if not fits or not sink.is_floating_point() or sink.device != q.device:
        raise ShapeError(
            f"sink must be floating point, (H,) or broadcastable to (B, H, N) = "
            f"{tuple(q.shape[:3])}, on {q.device}; got {tuple(sink.shape)}, {sink.dtype} on "
            f"{sink.device}."
        )
    scale = default_scale(scale, q.shape[-1])
    return OPERATION(impl, q, k, v, sink, mask=mask, is_causal=is_causal, scale=scale)

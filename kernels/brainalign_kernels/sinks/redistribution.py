"""Visual attention redistribution: from the sinks to the rest of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, check_mask, check_qkv, default_scale
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.sinks import reference, sdpa

__all__ = ["image_centric_rows", "redistribute_attention", "visual_attention_redistribution"]

OPERATION = Operation(
    "visual_attention_redistribution",
    reference.visual_attention_redistribution,
    compiled=Path(sdpa.visual_attention_redistribution),
)


def image_centric_rows(
    attention: Tensor,
    sinks: Tensor,
    image: Tensor,
    *,
    rho: float = 0.5,
    image_mass: float = 0.2,
    eps: float = 1e-6,
) -> Tensor:
    r"""Heads that look at the image at a query, and at more of it than its sinks.

    .. math::
        \frac{\sum_{j \in \mathcal{S} \cap \mathcal{I}} A_{ij}}
             {\sum_{j \in \mathcal{I}} (A_{ij} + \epsilon)} \le \rho
        \quad \text{and} \quad \sum_{j \in \mathcal{I}} A_{ij} \ge m

    Without a sink in the image no row is chosen.

    Parameters
    ----------
    attention : Tensor, shape (B, H, Q, T)
        Attention weights.
    sinks : Tensor of bool, shape (T,) or (B, T)
        Sink tokens, S; see `sink_tokens`.
    image : Tensor of bool, shape (T,) or (B, T)
        Image tokens, I.
    rho : float
        Largest share of the image's attention on its sinks.
    image_mass : float
        m, smallest attention on the image.
    eps : float
        Added to every weight in the denominator.

    Returns
    -------
    Tensor of bool, shape (B, H, Q)

    Raises
    ------
    ShapeError
        For shapes and types that do not fit.

    References
    ----------
    Kang et al. (2025), See what you are told: visual attention sink in large multimodal models.
    """
    sinks, image = _token_marks(attention, sinks, image)
    wide = attention.to(accumulation_dtype(attention.dtype))
    return reference.centric_rows(
        (wide * (sinks & image)).sum(dim=-1),
        (wide * image).sum(dim=-1),
        sinks, image, rho=rho, image_mass=image_mass, eps=eps,
    )  # fmt: skip


def redistribute_attention(
    attention: Tensor,
    sinks: Tensor,
    image: Tensor,
    *,
    p: float = 0.6,
    rho: float = 0.5,
    image_mass: float = 0.2,
    queries: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    r"""Give a part of the sinks' attention to the rest of the image, in image-centric heads.

    .. math::
        A'_{ij} = p A_{ij} \ (j \in \mathcal{S}), \quad
        A'_{ij} = A_{ij} + \frac{A_{ij}}{\sum_{l \in \mathcal{I} \setminus \mathcal{S}} A_{il}}
                  (1 - p) \sum_{l \in \mathcal{S}} A_{il} \
                  (j \in \mathcal{I} \setminus \mathcal{S})

    in the rows of `image_centric_rows`; row sums do not change. A row without attention on the
    rest of the image is left as it is.

    Parameters
    ----------
    attention : Tensor, shape (B, H, Q, T)
        Attention weights. The last layer of a model is not to be changed.
    sinks : Tensor of bool, shape (T,) or (B, T)
        Sink tokens, S; see `sink_tokens`.
    image : Tensor of bool, shape (T,) or (B, T)
        Image tokens, I.
    p : float
        Share of the sinks' attention that stays.
    rho, image_mass, eps : float
        See `image_centric_rows`.
    queries : Tensor of bool, shape (Q,) or (B, Q), optional
        Rows that may change; by default those after the last image token, the queries being the
        last Q of the T tokens.

    Returns
    -------
    Tensor, shape (B, H, Q, T)

    Raises
    ------
    ShapeError
        For shapes, types or a `p` that do not fit.

    References
    ----------
    Kang et al. (2025), See what you are told: visual attention sink in large multimodal models.
    """
    rows = image_centric_rows(attention, sinks, image, rho=rho, image_mass=image_mass, eps=eps)
    sinks, image = _token_marks(attention, sinks, image)
    _check_share(p)
    rows = rows & _changeable(attention.shape[2], image, queries)
    wide = attention.to(accumulation_dtype(attention.dtype))
    return reference.redistribute(wide, sinks, image, rows, p=p).to(attention.dtype)


def visual_attention_redistribution(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    image: Tensor,
    *,
    p: float = 0.6,
    rho: float = 0.5,
    image_mass: float = 0.2,
    queries: Tensor | None = None,
    eps: float = 1e-6,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Softmax attention with redistributed weights.

    .. math:: o_i = \sum_j A'_{ij} v_j

    with A' of `redistribute_attention` from the weights of `softmax_attention`.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries: the last N of the S tokens.
    k : Tensor, shape (B, G, S, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, S, E)
        Values.
    sinks, image : Tensor of bool, shape (S,) or (B, S)
        Sink tokens and image tokens.
    p, rho, image_mass, queries, eps
        See `redistribute_attention`.
    mask : Tensor, broadcastable to (B, H, N, S), optional
        Boolean (True: may be attended) or added to the logits. A row that may attend to nothing
        gives zeros.
    is_causal : bool
        Query i sees the keys 0 to i.
    scale : float, optional
        Of the logits; by default D^-1/2.
    impl : {"auto", "reference", "compiled"}
        "compiled" is one scaled_dot_product_attention with 3 E + 4 value channels.

    Returns
    -------
    Tensor, shape (B, H, N, E)

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Kang et al. (2025), See what you are told: visual attention sink in large multimodal models.
    """
    check_qkv(q, k, v)
    check_mask(q, k, mask)
    _check_share(p)
    sinks, image = _token_marks(q.new_empty((*q.shape[:3], k.shape[2])), sinks, image)
    return OPERATION(
        impl, q, k, v, sinks, image, _changeable(q.shape[2], image, queries),
        p=p, rho=rho, image_mass=image_mass, eps=eps,
        mask=mask, is_causal=is_causal, scale=default_scale(scale, q.shape[-1]),
    )  # fmt: skip


def _token_marks(attention: Tensor, sinks: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (B, 1, 1, T)."""
    if attention.ndim != 4:
        raise ShapeError(f"attention must be (B, H, Q, T); got {tuple(attention.shape)}.")
    want = (attention.shape[0], attention.shape[3])
    made = []
    for name, mark in (("sinks", sinks), ("image", image)):
        if mark.dtype != torch.bool or mark.shape not in (want, want[1:]):
            raise ShapeError(
                f"{name} must be bool, shape (T,) or (B, T) = {want}; got {mark.dtype}, "
                f"{tuple(mark.shape)}."
            )
        made.append(mark.expand(want)[:, None, None])
    return made[0], made[1]


def _check_share(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ShapeError(f"p, the share of the sinks' attention that stays, is {p}; expected 0-1.")


def _changeable(count: int, image: Tensor, queries: Tensor | None) -> Tensor:
    """Rows that may change, (B, 1, Q)."""
    batch, tokens = image.shape[0], image.shape[3]
    if queries is None and count > tokens:
        raise ShapeError(
            f"{count} queries cannot be the last of {tokens} tokens: say by `queries` which rows "
            "may change."
        )
    if queries is None:
        here = torch.arange(tokens, device=image.device)
        last = (image[:, 0] * (here + 1)).amax(dim=-1) if tokens else image.new_zeros(batch, 1)
        return ((here[tokens - count :] if count else here[:0]) >= last)[:, None]
    if queries.dtype != torch.bool or queries.shape not in ((count,), (batch, count)):
        raise ShapeError(
            f"queries must be bool, shape (Q,) or (B, Q) = {(batch, count)}; got "
            f"{queries.dtype}, {tuple(queries.shape)}."
        )
    return queries.expand(batch, count)[:, None]

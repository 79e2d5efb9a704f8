"""Perturbations of attention scores, as functions of scores and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from brainalign_kernels.errors import ShapeError

__all__ = [
    "interpretable_perturbation",
    "masked_attention",
    "score_differences",
    "score_perturbation",
]


def masked_attention(scores: Tensor, mask: Tensor | None = None, *, eps: float = 1e-13) -> Tensor:
    r"""Masked softmax that never divides by zero.

    .. math:: a_t = \frac{m_t p_t}{\sum_u m_u p_u + \epsilon}, \quad p = \mathrm{softmax}(m s)

    Parameters
    ----------
    scores : Tensor, shape (..., T)
        Attention scores.
    mask : Tensor of bool, broadcastable to `scores`, optional
        True: a token. Without one: the plain softmax.
    eps : float
        A row without tokens gives zeros.

    Returns
    -------
    Tensor, shape (..., T)

    References
    ----------
    Gardner et al. (2018), AllenNLP: a deep semantic natural language processing platform.
    """
    if mask is None:
        return scores.softmax(dim=-1)
    keep = mask.to(scores.dtype)
    weights = (scores * keep).softmax(dim=-1) * keep
    return weights / (weights.sum(dim=-1, keepdim=True) + eps)


def score_perturbation(gradient: Tensor, *, xi: float = 1.0, eps: float = 1e-12) -> Tensor:
    r"""Direction of steepest ascent with a given length per row.

    .. math:: r = \xi\, \frac{g}{\max(\lVert g \rVert_2, \epsilon)}

    Parameters
    ----------
    gradient : Tensor, shape (..., T)
        g, of the loss with respect to the scores.
    xi : float
        Length of r.
    eps : float
        Smallest norm; a row without gradient is not perturbed.

    Returns
    -------
    Tensor, shape (..., T)

    References
    ----------
    Kitada and Iyatomi (2021), Attention meets perturbations, Attention AT.
    """
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return xi * gradient / norm.clamp_min(eps)


def score_differences(
    scores: Tensor, mask: Tensor | None = None, *, between: str = "tokens", eps: float = 1e-12
) -> Tensor:
    r"""Differences between attention scores, normalised.

    .. math:: d_{tk} = \frac{s_t - s_k}{\lVert (s_t - s_u)_u \rVert_2}

    Parameters
    ----------
    scores : Tensor, shape (B, T)
        Attention scores, s.
    mask : Tensor of bool, shape (B, T), optional
        True: a token. Differences with other positions are zero.
    between : {"tokens", "samples"}
        "tokens": of one sample, as published; "samples": d_ijt = s_it - s_jt between the samples
        of a batch, normalised over j, which is what the authors' classification code computes.
    eps : float
        Smallest norm.

    Returns
    -------
    Tensor, shape (B, T, T) or (B, B, T)
        Constant with respect to the scores.

    Raises
    ------
    ShapeError
        For other shapes, or another `between`.

    References
    ----------
    Kitada and Iyatomi (2021), Attention meets perturbations, Attention iAT.
    """
    if between not in ("tokens", "samples"):
        raise ShapeError(f"between is {between!r}; expected 'tokens' or 'samples'.")
    if scores.ndim != 2 or (mask is not None and mask.shape != scores.shape):
        raise ShapeError(
            f"Expected scores (B, T) and a mask of that shape; got {tuple(scores.shape)} and "
            f"{None if mask is None else tuple(mask.shape)}."
        )
    fixed = scores.detach()
    if between == "tokens":
        raw, axis = fixed[:, :, None] - fixed[:, None, :], 2
        both = None if mask is None else mask[:, :, None] & mask[:, None, :]
    else:
        raw, axis = fixed[:, None] - fixed[None], 1
        both = None if mask is None else mask[:, None] & mask[None]
    if both is not None:
        raw = raw * both
    return raw / torch.linalg.vector_norm(raw, dim=axis, keepdim=True).clamp_min(eps)


def interpretable_perturbation(
    gradient: Tensor, directions: Tensor, *, xi: float = 1.0, eps: float = 1e-12
) -> Tensor:
    r"""Worst perturbation among weighted differences of scores.

    .. math:: r_t = \sum_k \alpha_{tk} d_{tk}, \quad
              \alpha = \xi\, \frac{\nabla_\alpha L}{\lVert \nabla_\alpha L \rVert_2}, \quad
              (\nabla_\alpha L)_{tk} = g_t d_{tk}

    Since the differences of a token have norm one, this is g_t times one positive number per
    sample: `score_perturbation`, except that tokens whose score equals all others are left alone.

    Parameters
    ----------
    gradient : Tensor, shape (B, T)
        g, of the loss with respect to the scores.
    directions : Tensor, shape (B, T, T)
        d, from `score_differences` between tokens.
    xi : float
        Norm of the weights alpha of one sample.
    eps : float
        Smallest norm of their gradient.

    Returns
    -------
    Tensor, shape (B, T)

    Raises
    ------
    ShapeError
        If the directions do not fit.

    References
    ----------
    Kitada and Iyatomi (2021), Attention meets perturbations, Attention iAT.
    """
    if gradient.ndim != 2 or directions.shape != (*gradient.shape, gradient.shape[1]):
        raise ShapeError(
            f"Expected a gradient (B, T) and directions (B, T, T); got {tuple(gradient.shape)} and "
            f"{tuple(directions.shape)}."
        )
    slope = gradient[:, :, None] * directions
    norm = torch.linalg.vector_norm(slope, dim=(1, 2), keepdim=True)
    return (xi * slope / norm.clamp_min(eps) * directions).sum(dim=2)

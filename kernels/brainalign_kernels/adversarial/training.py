"""Losses of adversarial and virtual adversarial training, from a closure over the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from brainalign_kernels.adversarial.perturbation import (
    interpretable_perturbation,
    score_differences,
    score_perturbation,
)
from brainalign_kernels.errors import ShapeError

__all__ = [
    "AdversarialLoss",
    "VirtualAdversarialLoss",
    "adversarial_attention_loss",
    "virtual_adversarial_attention_loss",
]


class AdversarialLoss(NamedTuple):
    """What `adversarial_attention_loss` gives."""

    #: To be minimised: clean + weight * adversarial.
    total: Tensor
    clean: Tensor
    adversarial: Tensor
    #: Of the clean loss with respect to the scores, (B, T).
    gradient: Tensor
    #: Added to the scores, (B, T).
    perturbation: Tensor


class VirtualAdversarialLoss(NamedTuple):
    """What `virtual_adversarial_attention_loss` gives."""

    #: To be added to the supervised loss, where there is one.
    divergence: Tensor
    #: Of the divergence at the random direction with respect to the scores, (B, T).
    gradient: Tensor
    #: Added to the scores, (B, T).
    perturbation: Tensor


def adversarial_attention_loss(
    loss: Callable[[Tensor], Tensor],
    scores: Tensor,
    *,
    kind: str = "AT",
    xi: float = 1.0,
    weight: float = 1.0,
    mask: Tensor | None = None,
) -> AdversarialLoss:
    r"""Loss at the attention scores and at their worst neighbours.

    .. math:: L(s) + \lambda L(s + r), \quad
              r_{AT} = \xi \frac{g}{\lVert g \rVert}, \quad g = \nabla_s L(s)

    The perturbation r is a constant: the loss is not differentiated through it. For "iAT" it is a
    weighted sum of differences between scores, see `interpretable_perturbation`.

    Parameters
    ----------
    loss : callable
        Takes scores (B, T), does softmax and all that follows, and returns a scalar. Called twice:
        what is random in it (dropout) should be the same in both calls or off.
    scores : Tensor, shape (B, T)
        Attention scores before the softmax.
    kind : {"AT", "iAT", "iAT published code"}
        The last one is what the authors' classification code does: r = -xi g / ||g||.
    xi : float
        Length of the perturbation of one sample.
    weight : float
        Lambda.
    mask : Tensor of bool, shape (B, T), optional
        True: a token; others are not perturbed.

    Returns
    -------
    AdversarialLoss

    Raises
    ------
    ShapeError
        For another kind, scores of another shape, or a loss that is no scalar.

    References
    ----------
    Kitada and Iyatomi (2021), Attention meets perturbations: robust and interpretable attention
    with adversarial training.
    """
    _check_scores(scores, mask)
    with torch.enable_grad():
        probe = torch.zeros_like(scores, requires_grad=True)
        clean = loss(scores + probe)
        if clean.ndim != 0:
            raise ShapeError(f"The loss must be a scalar; got shape {tuple(clean.shape)}.")
        (gradient,) = torch.autograd.grad(clean, probe, retain_graph=True)
    gradient = gradient if mask is None else gradient * mask
    if kind == "AT":
        shift = score_perturbation(gradient, xi=xi)
    elif kind == "iAT":
        shift = interpretable_perturbation(gradient, score_differences(scores, mask), xi=xi)
    elif kind == "iAT published code":
        shift = score_perturbation(-gradient, xi=xi)
    else:
        raise ShapeError(f"kind is {kind!r}; expected 'AT', 'iAT' or 'iAT published code'.")
    adversarial = loss(scores + shift)
    return AdversarialLoss(clean + weight * adversarial, clean, adversarial, gradient, shift)


def virtual_adversarial_attention_loss(
    logits: Callable[[Tensor], Tensor],
    scores: Tensor,
    *,
    kind: str = "VAT",
    xi: float = 1.0,
    probe: float = 1e-1,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> VirtualAdversarialLoss:
    r"""Divergence of the prediction from the clean one at the worst neighbour; needs no labels.

    .. math:: D(r) = \mathrm{KL}\big(p(s) \,\Vert\, p(s + r)\big), \quad
              r = \xi \frac{g}{\lVert g \rVert}, \quad g = \nabla_r D(r)\big|_{r = \zeta u}

    with a random unit vector u; p(s) and r are constants. For "iVAT" both u and r are weighted sums
    of differences between scores, see `interpretable_perturbation`.

    Parameters
    ----------
    logits : callable
        Takes scores (B, T) and returns logits (B, K) of K classes; K = 1 is one logit of a yes.
    scores : Tensor, shape (B, T)
        Attention scores before the softmax.
    kind : {"VAT", "iVAT"}
        Which perturbation.
    xi : float
        Length of the perturbation of one sample.
    probe : float
        Zeta, length of the random perturbation where the gradient is taken.
    mask : Tensor of bool, shape (B, T), optional
        True: a token; others are not perturbed.
    generator : torch.Generator, optional
        Of u.

    Returns
    -------
    VirtualAdversarialLoss
        The divergence is the mean over the samples.

    Raises
    ------
    ShapeError
        For another kind, or scores or logits of another shape.

    References
    ----------
    Kitada and Iyatomi (2022), Making attention mechanisms more robust and interpretable with
    virtual adversarial training. Miyato et al. (2018), Virtual adversarial training.
    """
    _check_scores(scores, mask)
    if kind not in ("VAT", "iVAT"):
        raise ShapeError(f"kind is {kind!r}; expected 'VAT' or 'iVAT'.")
    directions = score_differences(scores, mask) if kind == "iVAT" else None
    shape = scores.shape if directions is None else directions.shape
    device = scores.device if generator is None else generator.device
    random = torch.randn(shape, dtype=scores.dtype, device=device, generator=generator)
    random = random.to(scores.device)
    if directions is not None:
        random = random * (directions != 0)
    elif mask is not None:
        random = random * mask
    norm = torch.linalg.vector_norm(random, dim=tuple(range(1, random.ndim)), keepdim=True)
    random = random / norm.clamp_min(1e-12)
    start = random if directions is None else (random * directions).sum(dim=2)
    with torch.no_grad():
        clean = _log_probabilities(logits(scores))
    with torch.enable_grad():
        moved = (probe * start).requires_grad_()
        found = _divergence(clean, _log_probabilities(logits(scores.detach() + moved)))
        (gradient,) = torch.autograd.grad(found, moved)
    gradient = gradient if mask is None else gradient * mask
    if directions is None:
        shift = score_perturbation(gradient, xi=xi)
    else:
        shift = interpretable_perturbation(gradient, directions, xi=xi)
    divergence = _divergence(clean, _log_probabilities(logits(scores + shift)))
    return VirtualAdversarialLoss(divergence, gradient, shift)


def _check_scores(scores: Tensor, mask: Tensor | None) -> None:
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ShapeError(
            f"Expected floating-point scores (B, T); got {scores.dtype}, {tuple(scores.shape)}."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != scores.shape):
        raise ShapeError(
            f"mask must be bool, shape {tuple(scores.shape)}; got {mask.dtype}, "
            f"{tuple(mask.shape)}."
        )


def _log_probabilities(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ShapeError(f"Expected logits (B, K), K > 0; got {tuple(logits.shape)}.")
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return logits.log_softmax(dim=1)


def _divergence(clean: Tensor, other: Tensor) -> Tensor:
    """KL divergence of log probabilities, mean over the samples; the first is a constant."""
    return (clean.exp() * (clean - other)).sum(dim=1).mean()

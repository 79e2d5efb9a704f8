"""Each layer as its (Lambda, B, C, D)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from brainalign_kernels._checks import accumulation_dtype, check_qkv, default_scale
from brainalign_kernels.dynamics.reference import log_forget, positive
from brainalign_kernels.dynamics.system import DynamicalSystem
from brainalign_kernels.errors import ShapeError

__all__ = ["linear_system", "normalised_system", "qlstm_system", "s6_system", "softmax_system"]


def softmax_system(
    q: Tensor, k: Tensor, *, scale: float | None = None, normalise: str = "output"
) -> DynamicalSystem:
    r"""Causal softmax attention as a system.

    .. math:: \Lambda_t = \eta_{t-1} / \eta_t, \quad B_t = \phi(k_t) / \eta_t, \quad
              C_t = \phi(q_t)^T, \quad \eta_t = \sum_{j \le t} e^{s q_t \cdot k_j}

    The feature map has infinitely many channels, but only :math:`\phi(q_t) \cdot \phi(k_j) =
    e^{s q_t \cdot k_j}` of the tokens at hand matters: with :math:`\phi(k_j)` the j-th unit
    vector the state has one row for each token.

    Parameters
    ----------
    q, k : Tensor, shape (B, H, N, D)
    scale : float, optional
        s; by default D^-1/2.
    normalise : {"output", "state"}
        "state" is the form above, whose exponentials can overflow; "output" divides by
        :math:`\eta_t` in C, with :math:`\Lambda = 1`: the same layer, in other coordinates.

    Returns
    -------
    DynamicalSystem

    Raises
    ------
    ShapeError
        For shapes that do not fit, or another `normalise`.

    References
    ----------
    Sieber et al. (2024), Understanding the differences in foundation models.
    """
    check_qkv(q, k, k, same_length=True)
    wide = accumulation_dtype(q.dtype)
    logits = default_scale(scale, q.shape[-1]) * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    tokens = q.shape[2]
    seen = torch.ones((tokens, tokens), dtype=torch.bool, device=q.device).tril()
    logits = logits.masked_fill(~seen, -torch.inf)
    slots = torch.eye(tokens, dtype=wide, device=q.device).expand(*q.shape[:2], -1, -1)
    log_normaliser = logits.logsumexp(dim=-1)
    if normalise == "output":
        ones = torch.ones_like(log_normaliser)
        return _attention(ones, slots, (logits - log_normaliser[..., None]).exp())
    return _normalised(logits.exp(), slots, log_normaliser, normalise)


def linear_system(q: Tensor, k: Tensor, *, normalise: str = "state") -> DynamicalSystem:
    r"""Causal normalised linear attention as a system.

    .. math:: \Lambda_t = \eta_{t-1} / \eta_t, \quad B_t = \phi(k_t) / \eta_t, \quad
              C_t = \phi(q_t)^T, \quad \eta_t = \phi(q_t) \cdot \sum_{j \le t} \phi(k_j)

    with :math:`\phi = \mathrm{elu} + 1`.

    Parameters
    ----------
    q, k : Tensor, shape (B, H, N, D)
    normalise : {"state", "output"}
        Where :math:`\eta` is: in Lambda and B, as above, or in C.

    Returns
    -------
    DynamicalSystem

    Raises
    ------
    ShapeError
        For shapes that do not fit, or another `normalise`.

    References
    ----------
    Sieber et al. (2024), Understanding the differences in foundation models.
    """
    check_qkv(q, k, k, same_length=True)
    wide = accumulation_dtype(q.dtype)
    queries, keys = positive(q.to(wide)), positive(k.to(wide))
    total = (queries * keys.cumsum(dim=2)).sum(dim=-1)
    return _normalised(queries, keys, total.log(), normalise)


def normalised_system(
    q: Tensor, k: Tensor, log_normaliser: Tensor, *, normalise: str = "state"
) -> DynamicalSystem:
    r"""Causal normalised attention as a system.

    .. math:: \Lambda_t = e^{n_{t-1} - n_t}, \quad B_t = e^{-n_t} k_t, \quad C_t = q_t^T

    Parameters
    ----------
    q, k : Tensor, shape (B, H, N, D)
    log_normaliser : Tensor, shape (B, H, N)
        Logarithm n of the normaliser.
    normalise : {"state", "output"}
        Where n is: in Lambda and B, as above, or in C.

    Returns
    -------
    DynamicalSystem

    Raises
    ------
    ShapeError
        For shapes that do not fit, or another `normalise`.

    References
    ----------
    Sieber et al. (2024), Understanding the differences in foundation models.
    """
    check_qkv(q, k, k, same_length=True)
    if log_normaliser.shape != q.shape[:3]:
        raise ShapeError(
            f"log_normaliser must have shape {tuple(q.shape[:3])}; "
            f"got {tuple(log_normaliser.shape)}."
        )
    wide = accumulation_dtype(q.dtype)
    return _normalised(q.to(wide), k.to(wide), log_normaliser.to(wide), normalise)


def qlstm_system(
    forget: Tensor, take: Tensor, give: Tensor, *, exponent: Tensor | None = None
) -> DynamicalSystem:
    r"""Return the qLSTM as a system with one row.

    .. math:: \Lambda_t = f_t, \quad B_t = \sigma(i_t), \quad C_t = \sigma(o_t)

    Parameters
    ----------
    forget, take, give : Tensor, shape (B, H, N, E)
        Gates before their sigmoid.
    exponent : Tensor, broadcastable to (B, H, N, E), optional
        As for `qlstm`.

    Returns
    -------
    DynamicalSystem

    References
    ----------
    Sieber et al. (2024), Understanding the differences in foundation models.
    """
    f = log_forget(forget, exponent).exp()
    return DynamicalSystem(*(x.unsqueeze(-2) for x in (f, take.sigmoid(), give.sigmoid())))


def s6_system(
    step: Tensor, decay: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None
) -> DynamicalSystem:
    r"""Return an S6-like layer as a system with n rows.

    .. math:: \Lambda_t = \sigma(-\hat f_t)^{\mathrm{relu}(\alpha)}, \quad
              B_t = \mathrm{softplus}(\hat f_t)\, b_t, \quad C_t = c_t, \quad D_t = d

    Parameters
    ----------
    step, decay, b, c, d
        As for `s6_layer`.

    Returns
    -------
    DynamicalSystem

    References
    ----------
    Sieber et al. (2024), Understanding the differences in foundation models.
    """
    transition = log_forget(step[..., None, :], decay).exp()
    return DynamicalSystem(transition, softplus(step)[..., None, :] * b[..., None], c[..., None], d)


def _attention(transition: Tensor, b: Tensor, c: Tensor) -> DynamicalSystem:
    return DynamicalSystem(transition[..., None, None], b[..., None], c[..., None])


def _normalised(c: Tensor, b: Tensor, log_normaliser: Tensor, where: str) -> DynamicalSystem:
    weight = (-log_normaliser).exp()[..., None]
    if where == "output":
        return _attention(torch.ones_like(log_normaliser), b, c * weight)
    if where != "state":
        raise ShapeError(f"normalise is {where!r}; expected 'state' or 'output'.")
    before = torch.cat([log_normaliser[..., :1], log_normaliser[..., :-1]], dim=-1)
    return _attention((before - log_normaliser).exp(), b * weight, c)

"""The public functions: checks, then dispatch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from brainalign_kernels._checks import accumulation_dtype, check_mask, check_qkv, default_scale
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.moh import gathered, reference

__all__ = ["Routing", "load_balance_loss", "moh_attention", "moh_routing"]


def _untraced_gradient(*args: Tensor, mask: Tensor | None, scale: float) -> str:
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        if any(x.requires_grad for x in (*args, mask) if x is not None):
            return "compiled code cannot differentiate it."
    return ""


OPERATION = Operation(
    "moh_attention",
    reference.moh_attention,
    compiled=Path(gathered.moh_attention, _untraced_gradient),
)


class Routing(NamedTuple):
    """Which heads each token uses, and how much.

    Parameters
    ----------
    gates : Tensor, shape (B, N, H)
        Weights of the head outputs: shared heads first, then routed heads.
    selected : Tensor of bool, shape (B, N, H)
        Heads in use.
    indices : Tensor of int, shape (B, N, routed_head)
        Chosen routed heads, the largest probability first.
    probabilities : Tensor, shape (B, N, H - shared heads)
        Of the routed heads, before the choice.
    """

    gates: Tensor
    selected: Tensor
    indices: Tensor
    probabilities: Tensor


def moh_routing(
    routed: Tensor,
    routed_head: int,
    *,
    shared: Tensor | None = None,
    balance: Tensor | None = None,
) -> Routing:
    r"""Choose the heads of every token.

    .. math:: g = [\alpha_0 n_s\, \mathrm{softmax}(\text{shared}),\;
                   \alpha_1 K\, p m / \textstyle\sum p m], \quad
              p = \mathrm{softmax}(\text{routed}), \quad
              \alpha = 2\, \mathrm{softmax}(\text{balance})

    with m = 1 for the K largest p. Without shared heads, or with K = 0, alpha is 1.

    Parameters
    ----------
    routed : Tensor, shape (B, N, E)
        Router logits of the E routed heads.
    routed_head : int
        K, routed heads of a token.
    shared : Tensor, shape (B, N, n_s), optional
        Router logits of the shared heads, which every token uses.
    balance : Tensor, shape (B, N, 2), optional
        Logits of shared against routed heads; needed if there are both.

    Returns
    -------
    Routing

    Raises
    ------
    ShapeError
        For shapes that do not fit, and K outside 0 to E.

    References
    ----------
    Jin et al. (2024), MoH: multi-head attention as mixture-of-head attention.
    """
    experts = routed.shape[-1]
    if routed.ndim != 3 or not 0 <= routed_head <= experts:
        raise ShapeError(
            f"Expected routed (B, N, E) with 0 <= routed_head <= E; got {tuple(routed.shape)} "
            f"and routed_head {routed_head}."
        )
    both = shared is not None and shared.shape[-1] > 0 and routed_head > 0
    if both and (balance is None or balance.shape[-1] != 2):
        raise ShapeError("With shared and routed heads, balance (B, N, 2) is needed.")
    wide = accumulation_dtype(routed.dtype)
    p = routed.to(wide).softmax(dim=-1) if experts else routed.to(wide)
    indices = p.topk(routed_head, dim=-1).indices
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, indices, True)
    kept = p.masked_fill(~chosen, 0.0)
    total = kept.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(wide).eps)
    gates = routed_head * (kept / total)
    if shared is not None and shared.shape[-1]:
        common = shared.shape[-1] * shared.to(wide).softmax(dim=-1)
        if both:
            assert balance is not None
            alpha = 2 * balance.to(wide).softmax(dim=-1)
            common, gates = alpha[..., :1] * common, alpha[..., 1:] * gates
        gates = torch.cat([common, gates], dim=-1)
        chosen = torch.cat([torch.ones_like(common, dtype=torch.bool), chosen], dim=-1)
    return Routing(gates, chosen, indices, p)


def load_balance_loss(routing: Routing) -> Tensor:
    r"""Loss that is least when all routed heads are used alike.

    .. math:: E^2\, \mathrm{mean}_e(\mathrm{mean}_{\text{tokens}}\, p_e \cdot
              \mathrm{mean}_{\text{tokens}}\, m_e)

    Parameters
    ----------
    routing : Routing
        Of a batch; the choice m carries no gradient.

    Returns
    -------
    Tensor, scalar

    References
    ----------
    Jin et al. (2024), MoH: multi-head attention as mixture-of-head attention.
    """
    p = routing.probabilities
    experts = p.shape[-1]
    if experts == 0:
        return p.sum()
    used = routing.selected[..., routing.selected.shape[-1] - experts :].to(p.dtype)
    return experts**2 * (p.mean(dim=(0, 1)) * used.mean(dim=(0, 1))).mean()


def moh_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    selected: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Mixture-of-head attention.

    .. math:: o_{hi} = m_{ih}\, g_{ih} \sum_j \mathrm{softmax}_j(s\, q_{hi} \cdot k_{hj} + b_{hij})
              v_{hj}

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries.
    k : Tensor, shape (B, G, S, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, S, E)
        Values.
    gates : Tensor, shape (B, N, H)
        g, of each token and head.
    selected : Tensor of bool, shape (B, N, H), optional
        m; a head that a token did not select gives zeros, and its gate has no gradient. By default
        where the gate is not zero.
    mask : Tensor, broadcastable to (B, H, N, S), optional
        Boolean (True: may be attended) or added to the logits. A row that may attend to nothing
        gives zeros.
    scale : float, optional
        s; by default D^-1/2.
    impl : {"auto", "reference", "compiled"}
        "reference" computes all heads; "compiled" gathers the tokens of each head and leaves out
        the rest. When traced by torch.compile or torch.export it is for inference only; "auto"
        then takes the reference where a gradient is needed.

    Returns
    -------
    Tensor, shape (B, H, N, E)
        Head outputs times their gates.

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Jin et al. (2024), MoH: multi-head attention as mixture-of-head attention.
    """
    check_qkv(q, k, v)
    expected = (q.shape[0], q.shape[2], q.shape[1])
    if gates.shape != expected:
        raise ShapeError(f"gates must have shape (B, N, H) {expected}; got {tuple(gates.shape)}.")
    if selected is None:
        selected = gates.detach() != 0
    elif selected.shape != expected or selected.dtype != torch.bool:
        raise ShapeError(
            f"selected must be boolean of shape {expected}; got {selected.dtype} of shape "
            f"{tuple(selected.shape)}."
        )
    check_mask(q, k, mask)
    scale = default_scale(scale, q.shape[-1])
    return OPERATION(impl, q, k, v, gates, selected, mask=mask, scale=scale)

"""The public functions: checks, then dispatch."""

from __future__ import annotations

from torch import Tensor

from brainalign_kernels._checks import check_mask, check_qkv, default_scale, expand_heads
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.errors import ShapeError
from brainalign_kernels.reversed import blocks, reference

__all__ = ["dependency_mask", "pruning_scores", "reversed_attention"]

OPERATION = Operation(
    "reversed_attention",
    reference.reversed_attention,
    compiled=Path(blocks.reversed_attention, blocks.missing),
)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_probabilities: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
) -> None:
    # The values belong to the children, with one head for each query head.
    check_qkv(q, k, k)
    check_qkv(q, q, v)
    if head_probabilities is not None and head_probabilities.shape != q.shape[:3]:
        raise ShapeError(
            f"head_probabilities must have shape (B, H, N) {tuple(q.shape[:3])}; "
            f"got {tuple(head_probabilities.shape)}."
        )
    if gate is not None and gate.shape != (q.shape[0], q.shape[2]):
        raise ShapeError(
            f"gate must have shape (B, N) {(q.shape[0], q.shape[2])}; got {tuple(gate.shape)}."
        )
    check_mask(q, k, mask)


def reversed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    head_probabilities: Tensor | None = None,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Reversed attention: a child i sends its value to its parents j.

    .. math:: o_{hj} = \sum_i A_{hij}\, P_{hi}\, m_i\, v_{hi}, \qquad
              A_{hij} = \mathrm{softmax}_j(s\, q_{hi} \cdot k_{hj} + b_{hij})

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries of the children.
    k : Tensor, shape (B, G, S, D)
        Keys of the parents; H is a multiple of G.
    v : Tensor, shape (B, H, N, E)
        Values of the children.
    head_probabilities : Tensor, shape (B, H, N), optional
        P, how much of a child goes through each head; 1 by default.
    gate : Tensor, shape (B, N), optional
        m, how much a child may send at all; 1 by default.
    mask : Tensor, broadcastable to (B, H, N, S), optional
        Boolean (True: j may be a parent of i) or added to the logits. A child without possible
        parents sends nothing.
    is_causal : bool
        Parents of child i are the tokens 0 to i.
    scale : float, optional
        s; by default D^-1/2.
    impl : {"auto", "reference", "compiled"}
        "compiled" goes by blocks of children, without (N, S) arrays; it gives no gradient for the
        mask, and no second derivatives.

    Returns
    -------
    Tensor, shape (B, H, S, E)

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Ding et al. (2023), Visual dependency transformers: dependency tree emerges from reversed
    attention.
    """
    _check(q, k, v, head_probabilities, gate, mask)
    scale = default_scale(scale, q.shape[-1])
    return OPERATION(
        impl, q, k, v, head_probabilities, gate, mask=mask, is_causal=is_causal, scale=scale
    )


def dependency_mask(
    q: Tensor,
    k: Tensor,
    *,
    head_probabilities: Tensor | None = None,
    gate: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    r"""How much of each child goes to each parent, over all heads.

    .. math:: M_{ij} = \sum_h A_{hij}\, P_{hi}\, m_i

    Parameters
    ----------
    q, k, head_probabilities, gate, mask, is_causal, scale
        As for `reversed_attention`.

    Returns
    -------
    Tensor, shape (B, N, S)
        float32 for half precision.

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Ding et al. (2023), Visual dependency transformers.
    """
    _check(q, k, q, head_probabilities, gate, mask)
    k = expand_heads(q, k, k)[0]
    scale = default_scale(scale, q.shape[-1])
    made = reference.weights(q, k, mask=mask, is_causal=is_causal, scale=scale)
    return reference.sent(made, head_probabilities, gate).sum(dim=1)


def pruning_scores(head_probabilities: Tensor, gate: Tensor) -> Tensor:
    r"""Return what a token sends in all: those that send least are pruned.

    .. math:: \sum_j M_{ij} = m_i \sum_h P_{hi}

    the row sums of the `dependency_mask`, for children that have a parent; no (N, S) array is
    needed as the rows of A sum to one.

    Parameters
    ----------
    head_probabilities : Tensor, shape (B, H, N)
    gate : Tensor, shape (B, N)

    Returns
    -------
    Tensor, shape (B, N)

    References
    ----------
    Ding et al. (2023), Visual dependency transformers.
    """
    return gate * head_probabilities.sum(dim=1)

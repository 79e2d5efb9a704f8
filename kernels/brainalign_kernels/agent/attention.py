"""The public function: checks, then dispatch."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from brainalign_kernels._checks import check_qkv, default_scale
from brainalign_kernels._dispatch import Operation, Path
from brainalign_kernels.agent import reference, sdpa
from brainalign_kernels.errors import ShapeError

__all__ = ["agent_attention"]

OPERATION = Operation(
    "agent_attention", reference.agent_attention, compiled=Path(sdpa.agent_attention)
)


@overload
def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    position_bias: Tensor | None = ...,
    agent_bias: Tensor | None = ...,
    scale: float | None = ...,
    k_scale2: float = ...,
    k_shortcut: float = ...,
    return_agent_values: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    position_bias: Tensor | None = ...,
    agent_bias: Tensor | None = ...,
    scale: float | None = ...,
    k_scale2: float = ...,
    k_shortcut: float = ...,
    return_agent_values: Literal[True],
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    position_bias: Tensor | None = None,
    agent_bias: Tensor | None = None,
    scale: float | None = None,
    k_scale2: float = 1.0,
    k_shortcut: float = 0.0,
    return_agent_values: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Agent attention: m agents gather the values, the queries read them from the agents.

    .. math:: V_A = \mathrm{softmax}(s A K^T + B_1) V, \qquad
              O = \mathrm{softmax}(s^{p} Q A^T + B_2) V_A + c V

    Its cost grows with N m, not with N squared. With every query as an agent it is the product of
    two softmax attentions, not softmax attention.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries.
    k : Tensor, shape (B, G, S, D)
        Keys; H is a multiple of G (grouped queries).
    v : Tensor, shape (B, G, S, E)
        Values.
    agents : Tensor, shape (B, H, m, D)
        A, usually queries pooled over the image.
    position_bias : Tensor, broadcastable to (B, H, m, S), optional
        B_1: added to the logits of the agents, or boolean (True: may be attended).
    agent_bias : Tensor, broadcastable to (B, H, N, m), optional
        B_2: added to the logits of the queries, or boolean.
    scale : float, optional
        s; by default D^-1/2.
    k_scale2 : float
        p: power of the scale in the second softmax (Agent-SD: 0.3).
    k_shortcut : float
        c: share of the values that is added (Agent-SD: 0.075); needs S = N.
    return_agent_values : bool
        Return V_A too.
    impl : {"auto", "reference", "compiled"}
        "compiled" is two calls of PyTorch's scaled_dot_product_attention.

    Returns
    -------
    out : Tensor, shape (B, H, N, E)
    agent_values : Tensor, shape (B, H, m, E)
        Only if asked for.

    Raises
    ------
    ShapeError
        For shapes, types or devices that do not fit.

    References
    ----------
    Han et al. (2024), Agent attention: on the integration of softmax and linear attention.
    """
    check_qkv(q, k, v)
    if agents.ndim != 4 or agents.shape[:2] != q.shape[:2] or agents.shape[3] != q.shape[3]:
        raise ShapeError(
            f"agents must be (B, H, m, D) with B, H, D of q {tuple(q.shape)}; "
            f"got {tuple(agents.shape)}."
        )
    if agents.dtype != q.dtype or agents.device != q.device:
        raise ShapeError(
            f"agents must have the type and device of q, {q.dtype} on {q.device}; "
            f"got {agents.dtype} on {agents.device}."
        )
    sizes = (
        ("position_bias", position_bias, (*q.shape[:2], agents.shape[2], k.shape[2])),
        ("agent_bias", agent_bias, (*q.shape[:3], agents.shape[2])),
    )
    for name, bias, size in sizes:
        if bias is not None and (
            bias.ndim != 4 or any(b not in (1, n) for b, n in zip(bias.shape, size, strict=True))
        ):
            raise ShapeError(f"{name} must broadcast to {size}; got {tuple(bias.shape)}.")
    if k_shortcut and q.shape[2] != k.shape[2]:
        raise ShapeError(
            f"k_shortcut adds each query its own value and needs as many keys as queries; "
            f"got {q.shape[2]} queries and {k.shape[2]} keys."
        )
    scale = default_scale(scale, q.shape[-1])
    if k_scale2 != 1.0 and scale <= 0:
        raise ShapeError(f"A power of the scale needs a positive one; got {scale}.")
    out, values = OPERATION(
        impl, q, k, v, agents, position_bias=position_bias, agent_bias=agent_bias,
        scale=scale, scale2=scale**k_scale2 if k_scale2 != 1.0 else scale, k_shortcut=k_shortcut,
    )  # fmt: skip
    return (out, values) if return_agent_values else out
